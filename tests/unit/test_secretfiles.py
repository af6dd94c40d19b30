"""What the client reads of the secrets that a job file names, and how the answer is told in its place."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpujobs import specfile
from gpujobs.core.errors import InvalidInput
from gpujobs.core.secrets import TOTAL_MAX, VALUE_MAX
from gpujobs.core.values import Context
from gpujobs.faces import jobfiles
from gpujobs.faces.cli.files import elements_in
from gpujobs.faces.secretfiles import AS_SOMEBODY_ELSE, Found, secrets_of

HEAD = "name: t\nimage: a\n"
BYTES = bytes(range(256))


def found_in(text: str, directory: Path, **variables: str) -> dict[str, Found]:
    context = Context(file="t.yaml", directory=str(directory), home=str(directory), variables=variables)
    return secrets_of(HEAD + text, context)


def problem(text: str, directory: Path, **variables: str) -> str:
    (found,) = found_in(text, directory, **variables).values()
    assert (found.value == b"") == (found.problem != "")
    return found.problem


@pytest.mark.parametrize("content", [b"x", b"line\n", b"a\r\n\n", BYTES, b"\xff\xfe", b"x" * VALUE_MAX])
def test_a_file_is_read_byte_for_byte(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "k").write_bytes(content)
    for path in ("k", "./k", "~/k", str(tmp_path / "k"), "${WHERE}/k"):
        text = f"secrets: {{a: {{file: '{path}'}}}}"
        assert found_in(text, tmp_path, WHERE=str(tmp_path)) == {"a": Found(content)}


def test_a_variable_is_read_byte_for_byte(tmp_path: Path) -> None:
    value = os.fsdecode(b"two\nlines\xff")
    text = "secrets: [TOKEN, {source: b, environment: TOKEN, target: c}]"
    assert found_in(text, tmp_path, TOKEN=value) == {"TOKEN": Found(b"two\nlines\xff"), "b": Found(b"two\nlines\xff")}


def test_a_link_is_followed_as_a_shell_would(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "k").symlink_to("real")
    assert found_in("secrets: {a: {file: k}}", tmp_path) == {"a": Found(b"x")}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "No such file or directory"),
        ("dangling", "No such file or directory"),
        ("loop", "Too many levels of symbolic links"),
        ("directory", "Is a directory"),
        ("fifo", "it is not a regular file"),
        ("device", "it is not a regular file"),
        ("socket", "No such device or address"),
        ("large", "it has more than 256 KiB, which is the limit of one secret"),
    ],
)
def test_what_is_no_file_to_read_is_told(tmp_path: Path, kind: str, words: str) -> None:
    path = tmp_path / "k"
    if kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to("k")
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(10_000_000)
    assert problem("secrets: {a: {file: k}}", tmp_path) == f"{path}: {words}"


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """As an account: root reads everything."""
    path = Path("/etc/shadow")
    code = (
        "import sys; from pathlib import Path; from tests.unit.test_secretfiles import problem\n"
        "print(problem('secrets: {a: {file: /etc/shadow}}', Path('/')))"
    )
    command = [sys.executable, "-c", code]
    if os.geteuid() == 0:
        command = ["setpriv", "--reuid=5001", "--regid=5001", "--clear-groups", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.stdout == f"{path}: Permission denied\n", done.stderr


def test_an_empty_value_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "k").touch()
    assert problem("secrets: {a: {file: k}}", tmp_path) == f"{tmp_path}/k is empty"
    assert problem("secrets: [A]", tmp_path, A="") == "the variable A is empty"
    assert problem("secrets: [A]", tmp_path) == "the variable A is not set in your environment"


def test_a_value_with_a_nul_is_no_variable(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(b"a\0b")
    assert "holds a NUL byte" in problem("secrets: {a: {file: k, variable: A}}", tmp_path)
    assert problem("secrets: {a: {file: k}}", tmp_path) == ""


def test_all_of_them_together_have_a_limit(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(b"x" * VALUE_MAX)
    names = [f"s{n}" for n in range(TOTAL_MAX // VALUE_MAX + 1)]
    text = "secrets: {" + ", ".join(f"{name}: {{file: k}}" for name in names) + "}"
    found = found_in(text, tmp_path)
    assert {item.problem for item in found.values()} == {"all of them have more than 1 MiB, which is the limit"}
    assert not any(item.value for item in found.values())


def test_what_is_badly_written_is_left_to_the_server(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(b"x")
    text = "secrets: {a: {file: k}, ../b: {file: k}, c: , d: {file: k, mode: 0}, e: {file: '$'}, f: {file: '${NO}'}}"
    assert found_in(text, tmp_path) == {"a": Found(b"x")}
    for text in ("secrets: wandb", "secrets: [", "secrets:", "x: secrets", "secrets: {[]: 1}", "- secrets"):
        assert found_in(text, tmp_path) == {}


def test_a_file_without_the_word_is_not_read_as_yaml() -> None:
    """Every command would be slower by it."""
    code = (
        "import os, sys; from gpujobs.faces import jobfiles; jobfiles.submission(['-'], os.environ)\n"
        "print(sorted({'yaml', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=HEAD, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_mistakes_are_told_in_their_places_with_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.yaml").write_text(
        f"{HEAD}cpus: many\nsecrets:\n  a: {{file: gone}}\n  b:\n    environment: UNSET_HERE\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNSET_HERE", raising=False)
    with pytest.raises(InvalidInput) as caught:
        elements_in("t.yaml")
    assert [f"{p.file}:{p.line}:{p.column}: {p.path}: {p.message}" for p in caught.value.problems][1:] == [
        f"t.yaml:5:6: secrets.a: {tmp_path}/gone: No such file or directory",
        "t.yaml:7:5: secrets.b: the variable UNSET_HERE is not set in your environment",
    ]


@pytest.mark.parametrize("values", [True, False])
def test_a_plan_is_told_that_they_are_there_and_not_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k").write_bytes(BYTES)
    (tmp_path / "t.yaml").write_text(f"{HEAD}secrets: {{a: {{file: k}}, b: {{file: gone}}}}\n")
    body = jobfiles.submission(["t.yaml"], {"HOME": "/h"}, secrets=values)
    value = {"value": base64.b64encode(BYTES).decode()} if values else {}
    assert body["files"][0]["secrets"] == {
        "a": value, "b": {"problem": f"{tmp_path}/gone: No such file or directory"},
    }  # fmt: skip


def test_nothing_is_read_for_a_job_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may have written the file: what root can read would be theirs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text(f"{HEAD}secrets: {{a: {{file: /etc/hostname}}}}\n")
    body = jobfiles.submission(["t.yaml"], {"HOME": "/h"}, run_as="ada")
    assert body["files"][0]["secrets"] == {"a": {"problem": AS_SOMEBODY_ELSE}}


def test_the_specification_has_no_value(tmp_path: Path) -> None:
    context = Context(file="t.yaml", directory=str(tmp_path), home="/h", variables={"K": "hunter2"}, secrets={"K": ""})
    (element,) = specfile.parse(f"{HEAD}secrets: [K]", context)
    assert "hunter2" not in repr(element)
