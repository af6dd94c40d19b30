"""Build contexts and Dockerfiles that were made to harm; more of both are in the tests of images and contexts.

What the Engine would do with another account's image, a layer cache and BuildKit's syntax is in
tests/integration/test_images.py; here is what an account can send by itself, past any client of ours.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attacks.tools import entry, raw, request, submission, undefended
from tests.e2e.harness import Place, Row, Server, run
from tests.lab.accounts import Account
from tests.lab.engine import Engine

DOCKERFILE = b"FROM gpujobs-lab/busybox:1\nCOPY . /here/\n"


def tar(*members: tuple[tarfile.TarInfo, bytes], dockerfile: bytes = DOCKERFILE) -> bytes:
    """A context with a Dockerfile and these."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for info, data in ((entry("Dockerfile"), dockerfile), *members):
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def node() -> tarfile.TarInfo:
    info = entry("gpu", tarfile.CHRTYPE, mode=0o666)
    info.devmajor, info.devminor = 195, 7
    return info


@pytest.fixture
def build(server: Server, alice: Account) -> Callable[[bytes], Row]:
    """Sends a context as alice, as no client of ours would; the job's row at its end."""

    def sent(content: bytes) -> Row:
        job = {"build": {"context": "/nowhere"}, "command": ["true"], "cpus": 0.1}
        answer = raw(server, alice, request("POST", "/v1/jobs", submission(job)))
        assert answer.status == 201, answer
        (wanted,) = answer.body["contexts"]
        put = request("PUT", f"/v1/jobs/{wanted['id']}/context/{wanted['key']}", content)
        assert raw(server, alice, put).status == 200
        return server.ended(str(wanted["id"]))

    return sent


def test_a_name_that_leads_out_of_a_context_writes_nothing_outside(place: Place, build: Callable[[bytes], Row]) -> None:
    for name in (f"{place.path}/planted", "../planted"):
        content = tar((entry(name), b"x"))
        (place.path / "in").mkdir(exist_ok=True)
        done = run(["tar", "--absolute-names", "-x", "-C", str(place.path / "in")], {}, stdin=content)
        assert (done.code, (place.path / "planted").exists()) == (0, True), done
        (place.path / "planted").unlink()
        row = build(content)
        assert (row["state"], row["reason"]) == ("failed", "image")
        assert "leads out of it" in row["message"]
        assert not (place.path / "planted").exists()


def test_a_device_in_a_context_comes_into_no_image(place: Place, build: Callable[[bytes], Row]) -> None:
    content = tar((node(), b""))
    done = run(["tar", "-x", "-C", str(place.path)], {}, stdin=content)
    assert (done.code, stat.S_ISCHR((place.path / "gpu").stat().st_mode)) == (0, True)
    row = build(content)
    assert (row["state"], row["reason"]) == ("failed", "image")
    assert "of a kind that no build can use" in row["message"]


def test_a_link_in_a_context_shows_nothing_of_the_host(
    lab: Engine, place: Place, build: Callable[[bytes], Row], server: Server
) -> None:
    secret = place.path / "secret"
    secret.write_text("the host's\n")
    content = tar((entry("link", tarfile.SYMTYPE, link=str(secret)), b""), dockerfile=(
        b"FROM gpujobs-lab/busybox:1\nCOPY link /here/link\nRUN cat /here/link\n"))  # fmt: skip
    (place.path / "in").mkdir()
    assert run(["tar", "-x", "-C", str(place.path / "in")], {}, stdin=content).code == 0
    assert (place.path / "in/link").read_text() == "the host's\n", "where a context is a directory of the host"
    row = build(content)
    assert (row["state"], row["reason"]) == ("failed", "image")
    assert b"the host's" not in server.cli("logs", str(row["id"])).out


def test_a_small_file_that_unpacks_to_a_large_one_is_not_unpacked(build: Callable[[bytes], Row]) -> None:
    bomb = gzip.compress(tar((entry("zeros"), bytes(8 << 20))))
    assert len(bomb) < 20_000
    assert len(gzip.decompress(bomb)) > 8 << 20
    row = build(bomb)
    assert (row["state"], row["reason"]) == ("failed", "image")
    assert "no tar file" in row["message"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"# syntax=evil/frontend:1\nFROM gpujobs-lab/busybox:1\n", "syntax"),
        (b"FROM gpujobs-lab/busybox:1\nRUN --mount=type=bind,from=other,target=/x cat /x\n", "mount"),
        (b"FROM gpujobs-lab/busybox:1\nRUN --network=host true\n", "network"),
        (b"FROM gpujobs-lab/busybox:1\nRUN --security=insecure true\n", "security"),
        (b"FROM a3b1\n", "a3b1"),
        (b"FROM gpujobs-lab/busybox:1\nCOPY --from=deadbeef /x /x\n", "deadbeef"),
    ],
)
def test_a_dockerfile_reaches_nothing_but_its_context_and_its_bases(
    build: Callable[[bytes], Row], line: bytes, words: str
) -> None:
    row = build(tar(dockerfile=line))
    assert (row["state"], row["reason"]) == ("failed", "image")
    assert words in row["message"]


def test_a_step_of_a_build_has_the_rights_of_root_in_a_container_and_no_device(
    lab: Engine, build: Callable[[bytes], Row]
) -> None:
    """A build is not a job: its steps run as root with Docker's default capabilities, without GPUs or volumes."""
    done = undefended(lab, "--device", "/dev/nvidia7", command=("ls", "/dev/nvidia7"))
    assert done.code == 0
    row = build(tar(dockerfile=b"FROM gpujobs-lab/busybox:1\nRUN ls /dev | grep -q nvidia && exit 9 || exit 8\n"))
    assert "exit 8" in row["message"]
    assert Path("/dev/nvidia7").exists()
    assert os.geteuid() == 0
