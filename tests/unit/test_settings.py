"""The settings' file: what is taken, and how each mistake in it is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from gpujobs.core.errors import InvalidInput
from gpujobs.settings import PROBLEMS_MAX, RESTART, Settings, after_reload, load, read

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "server.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def told(text: str | bytes) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        read(text, "s.yaml")
    return [str(problem) for problem in caught.value.problems]


def test_without_a_file_the_defaults_hold() -> None:
    assert load(None) == Settings()


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "{}", "---\n", "null\n", "\ufeff"])
def test_an_empty_file_means_the_defaults(write: Write, text: str) -> None:
    assert load(write(text)) == Settings()


def test_what_the_file_says_holds_and_the_rest_stays_at_its_default() -> None:
    assert read("runtime: nvidia-legacy\nadmins: [ada, grace]\n", "s") == replace(
        Settings(), runtime="nvidia-legacy", admins=("ada", "grace")
    )


def test_values_are_written_as_in_a_job_file() -> None:
    found = read(
        "{keep_ended: 1d12h, build_memory: 2GiB, build_cpus: '1.5', build_time: 90, memory_reserve: 0,"
        " environment: [A=010, B=no], volumes: ['/srv/data:/data:ro']}",
        "s",
    )
    assert (found.keep_ended, found.build_memory, found.build_cpus, found.build_time) == (129600, 2 << 30, 1.5, 90)
    assert found.environment == (("A", "010"), ("B", "no"))
    assert [(volume.source, volume.target, volume.read_only) for volume in found.volumes] == [
        ("/srv/data", "/data", True)
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("runtimes: nvidia", "s.yaml:1:1: runtimes: unknown key; allowed are .*; did you mean `runtime`?"),
        ("\nadmin: [ada]", "s.yaml:2:1: admin: unknown key; .*; did you mean `admins`?"),
        ("keep-ended: 1h", "s.yaml:1:1: keep-ended: unknown key; .*; did you mean `keep_ended`?"),
        ("keep_ended: -1", "s.yaml:1:13: keep_ended: .-1. is out of range.*"),
        ("keep_ended: .nan", "s.yaml:1:13: keep_ended: .* is not a duration.*"),
        ("keep_ended: soon", 's.yaml:1:13: keep_ended: .soon. is not a duration; write .*12h.*'),
        ("keep_ended: 24:00:00", "s.yaml:1:13: keep_ended: .*is a clock time; write a duration with units: 24h"),
        ("keep_ended:", "s.yaml:1:12: keep_ended: the key has no value; write one, or leave the key out"),
        ("memory_reserve: 1", "s.yaml:1:17: memory_reserve: 1 would leave no memory for jobs;.*"),
        ("memory_reserve: -0.1", "s.yaml:1:17: memory_reserve: -0.1 is out of range.*"),
        ("memory_reserve: no", 's.yaml:1:17: memory_reserve: .no. is not a part of the memory.*'),
        ("admins: ada", r"s.yaml:1:9: admins: .*is not a list of accounts; write \[ada, grace\]"),
        ("admins:\n- ada\n- [eve]", r"s.yaml:3:3: admins\[1\]: a list is not an account; write its name"),
        ("runtime: [nvidia]", "s.yaml:1:10: runtime: a list is not the name of an OCI runtime.*"),
        ("build_cpus: 0", "s.yaml:1:13: build_cpus: 0 is out of range.*"),
        ("build_memory: 8", "s.yaml:1:15: build_memory: 8 is only 8 bytes; .* did you mean 8g?"),
        ("environment: {A=B: x}", "s.yaml:1:15: environment.*A=B.*"),
        ("volumes: ['cache:/cache']", r"s.yaml:1:11: volumes\[0\]: .*"),
        ("volumes: [{type: tmpfs, target: /t}]", r"s.yaml:1:11: volumes\[0\]: /t: only directories and files.*"),
    ],
)
def test_what_is_not_allowed_is_told_with_its_place_and_what_to_write(text: str, sentence: str) -> None:
    import re

    (found,) = told(text)
    assert re.fullmatch(sentence.replace("?", r"\?"), found), found


def test_every_mistake_is_told_at_once_in_the_files_order(write: Write) -> None:
    file = write("keep_ended: soon\nmemory_reserve: 2\nadmin: ada\nkeep_ended: 1h\n")
    with pytest.raises(InvalidInput, match=r"the settings .*server\.yaml have 4 mistakes") as caught:
        load(file)
    assert [(problem.line, problem.path) for problem in caught.value.problems] == [
        (1, "keep_ended"),
        (2, "memory_reserve"),
        (3, "admin"),
        (4, "keep_ended"),
    ]
    assert {problem.file for problem in caught.value.problems} == {str(file)}
    assert "docs/operations.md" in caught.value.hint


def test_of_very_many_mistakes_the_first_are_told() -> None:
    with pytest.raises(InvalidInput, match="have 500 mistakes") as caught:
        read("".join(f"unheard_of_{number:03}: 1\n" for number in range(500)), "s")
    assert len(caught.value.problems) == PROBLEMS_MAX
    assert f"The first {PROBLEMS_MAX} are shown." in caught.value.hint


@pytest.mark.parametrize("text", ["- runtime: nvidia", "just a text", "[]", "0", "false"])
def test_a_file_that_is_no_mapping_is_refused(text: str) -> None:
    words = "the settings are not a mapping; write keys and values, such as `keep_ended: 24h`"
    assert told(text) == [f"s.yaml:1:1: {words}"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("runtime: [nvidia", "a `[` is not closed"),
        ("\truntime: x", "a tab indents this line"),
        ("a: b: c", "not valid YAML"),
        ("runtime: \x01", "control character"),
        ("runtime: nvidia\nruntime: runc", "runtime: the key is given twice (also in line 1); keep one"),
        ("a: 1\n---\nb: 2", "a second document begins; the settings are one"),
        ("runtime: !!python/object/apply:os.system ['true']", "tag '!!python/object/apply:os.system' is not allowed"),
        ("a: &a [*a]", "is part of what it stands for"),
        (b"runtime: \xff\xfe", "byte 0xff is not UTF-8; save the file as UTF-8"),
        (b"\xff\xfer\0", "the file is UTF-16"),
        ("x" * (1 << 20) + "y", "at most 1,048,576 (1 MiB) are allowed"),
        ("\n".join(["a: &a [1,1,1,1,1,1,1,1,1]"]
                   + [f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]),
         "more than 50,000 values"),
        ("[" * 5000, "nested more than 24 deep"),
    ],
)  # fmt: skip
def test_the_traps_of_yaml_are_told_as_in_a_job_file(text: str | bytes, sentence: str) -> None:
    assert any(sentence in found for found in told(text)), told(text)


def test_what_a_terminal_would_obey_is_made_harmless() -> None:
    assert all("\x1b" not in found and "\u202e" not in found for found in told('"\\x1b[2J\\u202e": 1'))


def test_a_file_that_is_not_there_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read: No such file or directory"):
        load(tmp_path / "none.yaml")


def test_a_directory_is_no_settings_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(AttributeError):
        Settings().runtime = "other"  # type: ignore[misc]


def test_every_setting_has_a_default_that_its_reader_would_give() -> None:
    assert [item.name for item in fields(Settings) if not hasattr(Settings(), item.name)] == []
    assert all(isinstance(getattr(Settings(), item.name), type(item.default)) for item in fields(Settings))
    assert all(callable(item.metadata["read"]) for item in fields(Settings))


def test_a_running_server_takes_what_it_can_and_names_what_waits() -> None:
    now = Settings()
    wanted = replace(now, runtime="other", memory_reserve=0.5, keep_ended=60.0, admins=("ada",))
    settings, waiting = after_reload(now, wanted)
    assert settings == replace(now, keep_ended=60.0, admins=("ada",))
    assert set(waiting) == {"runtime", "memory_reserve"}
    assert set(waiting) <= RESTART
    assert after_reload(now, replace(now, build_cpus=1.0)) == (replace(now, build_cpus=1.0), ())
