"""The server's settings file: what it may say, and what is answered where it says something else."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from gpujobs.core.errors import InvalidInput
from gpujobs.settings import Settings, load


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "server.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_without_a_file_the_defaults_hold() -> None:
    assert load(None) == Settings()


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "{}", "---\n"])
def test_an_empty_file_means_the_defaults(write, text: str) -> None:
    assert load(write(text)) == Settings()


def test_what_the_file_says_holds_and_the_rest_stays_at_its_default(write) -> None:
    found = load(write("runtime: nvidia-legacy\nadmins: [ada, grace]\n"))
    assert (found.runtime, found.admins) == ("nvidia-legacy", ("ada", "grace"))
    assert (found.keep_ended, found.memory_reserve) == (Settings().keep_ended, Settings().memory_reserve)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("runtimes: nvidia", "runtimes"),
        ("keep_ended: -1", "keep_ended"),
        ("keep_ended: .nan", "keep_ended"),
        ("keep_ended: soon", "keep_ended"),
        ("memory_reserve: 1", "memory_reserve"),
        ("memory_reserve: -0.1", "memory_reserve"),
        ("admins: ada", "admins"),
        ("admins: [[ada]]", "admins.0"),
        ("runtime: [nvidia]", "runtime"),
    ],
)
def test_what_is_not_allowed_is_refused_with_its_key(write, text: str, path: str) -> None:
    file = write(text)
    with pytest.raises(InvalidInput, match="are not valid") as caught:
        load(file)
    assert [problem.path for problem in caught.value.problems] == [path]
    assert caught.value.problems[0].file == str(file)
    assert caught.value.problems[0].message


def test_every_mistake_is_told_at_once(write) -> None:
    with pytest.raises(InvalidInput) as caught:
        load(write("keep_ended: -1\nmemory_reserve: 2\nadmin: ada\n"))
    assert {problem.path for problem in caught.value.problems} == {"keep_ended", "memory_reserve", "admin"}


@pytest.mark.parametrize("text", ["- runtime: nvidia", "just a text", "[]", "0", "false"])
def test_a_file_that_is_no_mapping_is_refused(write, text: str) -> None:
    with pytest.raises(InvalidInput, match="are not valid"):
        load(write(text))


@pytest.mark.parametrize("text", ["runtime: [", "\truntime: x", "a: b: c", "runtime: \x01"])
def test_what_is_no_yaml_is_refused(write, text: str) -> None:
    with pytest.raises(InvalidInput, match="are no YAML"):
        load(write(text))


def test_a_python_tag_constructs_nothing(write) -> None:
    with pytest.raises(InvalidInput, match="are no YAML"):
        load(write("runtime: !!python/object/apply:os.system ['true']"))


def test_bytes_that_are_no_utf_8_are_told_with_their_place(write) -> None:
    with pytest.raises(InvalidInput, match=r"are not UTF-8: .* at byte 9"):
        load(write(b"runtime: \xff\xfe"))


def test_a_file_that_is_not_there_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read: No such file or directory"):
        load(tmp_path / "none.yaml")


def test_a_directory_is_no_settings_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(AttributeError):
        Settings().runtime = "other"  # type: ignore[misc]


def test_every_setting_has_a_default() -> None:
    assert [item.name for item in fields(Settings) if not hasattr(Settings(), item.name)] == []
