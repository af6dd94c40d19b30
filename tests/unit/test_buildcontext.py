"""Packing build contexts: Docker's rules of what is left out, and trees that somebody made to harm."""

from __future__ import annotations

import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from gpujobs.buildcontext import Ignore, pack
from gpujobs.core.errors import InvalidInput


def tree(root: Path, **files: str | bytes) -> Path:
    for name, content in {"Dockerfile": "FROM x\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def packed(root: Path, dockerfile: str = "Dockerfile", **options: int) -> dict[str, tarfile.TarInfo]:
    out = io.BytesIO()
    assert pack(root, dockerfile, out, **options) == len(out.getvalue())  # type: ignore[arg-type]
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        return {member.name: member for member in archive}


# Each: the file's lines, and for paths whether they are left out. By moby/patternmatcher's own cases and the manual.
RULES: list[tuple[str, dict[str, bool]]] = [
    ("# comment\n\n  \n", {"# comment": False, "a": False}),
    ("a", {"a": True, "a/b": True, "b/a": False, "ab": False}),
    ("/a", {"a": True, "b/a": False}),
    ("./a/../b/", {"b": True, "a": False}),
    ("*.log", {"x.log": True, "d/x.log": False}),
    ("*/*.log", {"d/x.log": True, "x.log": False, "d/e/x.log": False}),
    ("**/*.log", {"x.log": True, "d/x.log": True, "d/e/x.log": True, "x.logs": False}),
    ("**", {"a": True, "a/b": True}),
    ("a/**", {"a/b": True, "a/b/c": True, "a": False}),
    ("a/**/b", {"a/b": True, "a/x/b": True, "a/x/y/b": True, "a/x/c": False}),
    ("**/node_modules", {"node_modules": True, "x/node_modules/y/z": True, "my_node_modules": False}),
    ("*\n!README.md", {"a": True, "README.md": False, "d/README.md": True}),
    ("*.md\n!README*.md\nREADME-secret.md", {"x.md": True, "README.md": False, "README-secret.md": True}),
    ("*.md\nREADME-secret.md\n!README*.md", {"README-secret.md": False}),
    ("a?c", {"abc": True, "ac": False, "a/c": False}),
    ("[a-c]x", {"bx": True, "dx": False, "-x": False}),
    ("[^a]x", {"bx": True, "ax": False}),
    ("[]a]x", {"]x": True, "ax": True}),
    (r"a\*", {"a*": True, "ab": False}),
    ("a.b+(c){1}|$", {"a.b+(c){1}|$": True, "aXb": False}),
    ("  spaced  ", {"spaced": True}),
    ("! back", {" back": False}),
    ("d\n!d/keep", {"d/other": True, "d/keep": False, "d/keep/below": False}),
    ("\ufeffbom", {"bom": True}),
    ("#no\n\\#yes", {"#no": False, "#yes": True}),
    ("ünïcode/*", {"ünïcode/x": True}),
    ("a\r\nb\r\n", {"a": True, "b": True}),
]


@pytest.mark.parametrize(("text", "paths"), RULES)
def test_ignore_files_mean_what_docker_means_by_them(text: str, paths: dict[str, bool]) -> None:
    rules = Ignore(text)
    assert {path: rules.ignores(path) for path in paths} == paths


@pytest.mark.parametrize("text", ["!", "[", "a[", "[^", "a\\", "x/[a"])
def test_a_line_that_is_no_pattern_is_named(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"^\.dockerignore:2: "):
        Ignore(f"fine\n{text}\n")


def test_what_is_ignored_is_not_packed_and_the_two_files_of_a_build_always_are(tmp_path: Path) -> None:
    tree(tmp_path, **{".dockerignore": "*\n!src\n**/*.pyc\n", "src/a.py": "1", "src/a.pyc": "2", "big/data": "3"})
    assert list(packed(tmp_path)) == [".dockerignore", "Dockerfile", "src", "src/a.py"]


def test_a_directory_is_entered_only_where_something_in_it_may_be_taken_back(tmp_path: Path) -> None:
    tree(tmp_path, **{".dockerignore": "closed\nopen\n!open/in/this\n", "closed/x": "", "open/out": "",
                      "open/in/this": "", "open/in/that": ""})  # fmt: skip
    (tmp_path / "closed").chmod(0)
    try:
        assert list(packed(tmp_path)) == [".dockerignore", "Dockerfile", "open/in/this"]
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_the_same_files_give_the_same_bytes_all_owned_by_root(tmp_path: Path) -> None:
    one = tree(tmp_path / "1", b="2", a="1", **{"d/z": "3", "d/y": "4"})
    two = tree(tmp_path / "2", **{"d/y": "4", "d/z": "3"}, a="1", b="2")
    for path in (*one.rglob("*"), *two.rglob("*")):
        os.chown(path, 1234, 1234)
        os.utime(path, ns=(0, 1_600_000_000_123_456_789))
    (one / "a").chmod(0o751)
    (two / "a").chmod(0o751)
    first, second = io.BytesIO(), io.BytesIO()
    pack(one, "Dockerfile", first)
    pack(two, "Dockerfile", second)
    assert first.getvalue() == second.getvalue()
    members = packed(one)
    assert list(members) == ["Dockerfile", "a", "b", "d", "d/y", "d/z"]
    assert {(m.uid, m.gid, m.uname, m.gname) for m in members.values()} == {(0, 0, "", "")}
    assert (members["a"].mode, members["a"].mtime) == (0o751, 1_600_000_000)


def test_links_stay_links_wherever_they_lead(tmp_path: Path) -> None:
    root = tree(tmp_path / "c")
    (tmp_path / "secret").write_text("secret")
    links = {"out": "../secret", "etc": "/etc/shadow", "dead": "nowhere", "loop": "loop", "up": ".."}
    for name, target in links.items():
        (root / name).symlink_to(target)
    members = packed(root)
    assert {n: m.linkname for n, m in members.items() if m.issym()} == links
    assert not any(name.startswith("up/") for name in members)


def test_strange_names_come_through(tmp_path: Path) -> None:
    names = [b"a b", b"new\nline", b"\xff\xfe", "\u202eevil".encode(), b"x" * 255, b"-rf", b"*"]
    root = tree(tmp_path)
    for name in names:
        (Path(os.fsdecode(os.fsencode(root) + b"/" + name))).write_bytes(name)
    out = io.BytesIO()
    pack(root, "Dockerfile", out)
    out.seek(0)
    with tarfile.open(fileobj=out, errors="surrogateescape") as archive:
        found = {os.fsencode(member.name): archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert found == {b"Dockerfile": b"FROM x\n", **{name: name for name in names}}


def test_pipes_sockets_and_devices_are_named_and_can_be_ignored(tmp_path: Path) -> None:
    root = tree(tmp_path)
    os.mkfifo(root / "pipe")
    with pytest.raises(InvalidInput, match="the build context has a pipe: pipe"):
        packed(root)
    tree(root, **{".dockerignore": "pipe\nsock*\n"})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "sock"))
        assert list(packed(root)) == [".dockerignore", "Dockerfile"]
        tree(root, **{".dockerignore": "pipe"})
        with pytest.raises(InvalidInput, match="has a socket: sock"):
            packed(root)


def test_too_much_is_refused_before_anything_is_written_and_the_largest_are_named(tmp_path: Path) -> None:
    root = tree(tmp_path, **{"data/train/a": b"x" * 70_000, "data/train/b": b"x" * 9_000, "data/test": b"x" * 20_000,
                             "src/a.py": b"x" * 100})  # fmt: skip
    out = io.BytesIO()
    with pytest.raises(InvalidInput) as error:
        pack(root, "Dockerfile", out, limit=65_536)
    assert out.getvalue() == b""
    assert str(error.value).endswith(
        "has 96.8 KiB, at most 64.0 KiB are taken. The largest in it: data/train/ 77.1 KiB, data/test 19.5 KiB"
    )
    assert error.value.hint == "Name in .dockerignore what the build does not need; data belongs into `volumes`."


def test_a_missing_or_unreal_dockerfile_is_told(tmp_path: Path) -> None:
    root = tree(tmp_path / "c")
    with pytest.raises(InvalidInput, match="there is no other in the build context"):
        packed(root, "other")
    (root / "link").symlink_to("/etc/passwd")
    with pytest.raises(InvalidInput, match="must be files in the build context, not links"):
        packed(root, "link")
    with pytest.raises(InvalidInput, match="is no directory"):
        packed(tmp_path / "none")
    (root / ".dockerignore").symlink_to("/dev/zero")
    with pytest.raises(InvalidInput, match=r"\.dockerignore is no file"):
        packed(root)


def test_a_file_that_changes_while_it_is_packed_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path, growing="x", zlast="y")

    class Sink:
        def write(self, data: bytes) -> int:
            return len(data)

    def told(done: int, whole: int) -> None:
        (root / "growing").write_text("longer now")

    with pytest.raises(InvalidInput, match="growing changed while it was packed"):
        pack(root, "Dockerfile", Sink(), told=told)


def test_what_the_account_cannot_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path, **{"private/key": "k", "own": "o"})
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **kw: "key" not in str(path) and real(path, mode, **kw))
    with pytest.raises(InvalidInput, match="cannot be read: private/key: Permission denied"):
        packed(root)
