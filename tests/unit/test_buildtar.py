"""Build contexts from hostile clients: what of them reaches the Engine."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gpujobs.adapters import buildtar
from gpujobs.core.errors import InvalidInput

Change = Callable[[tarfile.TarInfo], None]


def write(
    path: Path, members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT, **options: object
) -> Path:
    with tarfile.open(path, "w", format=form, **options) as archive:  # type: ignore[call-overload]
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


DOCKERFILE = (member("Dockerfile"), b"FROM x\n")


def passed(tmp_path: Path, *members: tuple[tarfile.TarInfo, bytes], **options: int) -> dict[str, tarfile.TarInfo]:
    """What comes out, by name."""
    source = write(tmp_path / "in.tar", [*members, DOCKERFILE])
    return rewritten(tmp_path, source, **options)


def rewritten(tmp_path: Path, source: Path, **options: int) -> dict[str, tarfile.TarInfo]:
    with (
        (tmp_path / "out.tar").open("w+b") as target,
        buildtar.rewrite(source, target, "Dockerfile", **options) as context,  # type: ignore[arg-type]
    ):
        context.finish("FROM changed\n")
    with tarfile.open(tmp_path / "out.tar") as archive:
        return {info.name: info for info in archive}


def content(tmp_path: Path, name: str) -> bytes:
    with tarfile.open(tmp_path / "out.tar") as archive:
        file = archive.extractfile(name)
        assert file is not None
        return file.read()


def test_the_dockerfile_for_the_engine_is_last_and_the_users_own_is_as_it_was(tmp_path: Path) -> None:
    found = passed(tmp_path, (member("a"), b"1"), (member(".dockerignore"), b"*.log"))
    assert list(found) == ["a", "Dockerfile", ".dockerignore", buildtar.DOCKERFILE]
    assert content(tmp_path, "Dockerfile") == b"FROM x\n"
    assert content(tmp_path, buildtar.DOCKERFILE) == b"FROM changed\n"
    assert content(tmp_path, ".dockerignore") == b"*.log\n.gpujobs.dockerfile\n"


def test_the_file_ends_where_the_engine_stops_reading(tmp_path: Path) -> None:
    passed(tmp_path)
    data = (tmp_path / "out.tar").read_bytes()
    assert data.endswith(bytes(1024))
    assert data[-1536:-1024].strip(b"\0") != b""


def test_owners_attributes_and_times_of_another_world_do_not_pass(tmp_path: Path) -> None:
    strange = member("a", uid=5, gid=6, uname="u", gname="g", mode=0o4755, mtime=2**60,
                     pax_headers={"SCHILY.xattr.security.capability": "x", "comment": "y"})  # fmt: skip
    found = passed(tmp_path, (strange, b"1"))["a"]
    assert (found.uid, found.gid, found.uname, found.gname, found.mode) == (0, 0, "", "", 0o4755)
    assert found.mtime <= 2**33
    assert "SCHILY.xattr.security.capability" not in found.pax_headers


@pytest.mark.parametrize(("info", "words"), [
    (member("/etc/passwd"), "leads out"), (member("../x"), "leads out"), (member("a/../../x"), "leads out"),
    (member("l", tarfile.LNKTYPE, linkname="../../etc/shadow"), "leads out"),
    (member("l", tarfile.LNKTYPE, linkname="/etc/shadow"), "leads out"),
    (member("l", tarfile.SYMTYPE, linkname=""), "leads nowhere"),
    (member("dev", tarfile.BLKTYPE, devmajor=8), "kind that no build"),
    (member("c", tarfile.CHRTYPE), "kind that no build"),
    (member("p", tarfile.FIFOTYPE), "kind that no build"),
    (member("Dockerfile", tarfile.SYMTYPE, linkname="/etc/shadow"), "Dockerfile in the build context is no file"),
    (member(".dockerignore", tarfile.DIRTYPE), "dockerignore in the build context is no file"),
    (member("s", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}), "sparse"),
    (member("s", pax_headers={"GNU.sparse.size": "9" * 15, "GNU.sparse.map": "0,1"}), "sparse"),
    (member("long", pax_headers={"comment": "x" * 100_000}), "header that is too large"),
    (member("n" * 5000), "leads out"),
])  # fmt: skip
def test_what_no_client_of_ours_sends_is_refused(tmp_path: Path, info: tarfile.TarInfo, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        passed(tmp_path, (info, b""))


def test_global_headers_and_old_sparse_files_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "g.tar", [DOCKERFILE], pax_headers={"comment": "all"})
    with pytest.raises(InvalidInput, match="global headers or sparse"):
        rewritten(tmp_path, source)
    data = bytearray(write(tmp_path / "s.tar", [(member("s"), b"x"), DOCKERFILE], tarfile.GNU_FORMAT).read_bytes())
    data[156:157] = tarfile.GNUTYPE_SPARSE
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(InvalidInput, match="global headers or sparse"):
        rewritten(tmp_path, tmp_path / "s.tar")


def test_a_file_that_would_replace_the_engines_dockerfile_does_not_pass(tmp_path: Path) -> None:
    found = passed(
        tmp_path, (member(buildtar.DOCKERFILE), b"FROM evil\n"), (member(f"./{buildtar.DOCKERFILE}"), b"FROM evil\n"),
        (member("d", tarfile.SYMTYPE, linkname="."), b""), (member(f"d/{buildtar.DOCKERFILE}"), b"FROM evil\n"),
    )  # fmt: skip
    assert list(found)[-1] == buildtar.DOCKERFILE
    assert content(tmp_path, buildtar.DOCKERFILE) == b"FROM changed\n"


def test_too_much_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="more than 10 bytes"):
        passed(tmp_path, (member("a"), b"x" * 11), limit=10)
    with pytest.raises(InvalidInput, match="larger than 1 MiB"):
        passed(tmp_path, (member(".dockerignore"), b"x" * (2 << 20)))


def test_what_is_no_tar_file_is_told(tmp_path: Path) -> None:
    for content in (b"", b"x" * 2000, bytes(10240)):
        (tmp_path / "in.tar").write_bytes(content)
        with pytest.raises(InvalidInput):
            rewritten(tmp_path, tmp_path / "in.tar")
