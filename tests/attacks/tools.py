"""What attacks are made with: images built to harm, plain Docker without our rules, raw requests."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.harness import BUSYBOX, Done, Row, Server, run, spec
from tests.lab import images
from tests.lab.accounts import Account
from tests.lab.engine import Engine

PROBE = Path(__file__).with_name("probe.c")


def undefended(
    lab: Engine, *options: str, image: str = BUSYBOX, command: Sequence[str] = ("true",), timeout: float = 60.0
) -> Done:
    """What comes of it without gpujobs: the container as plain ``docker run`` makes it, by somebody who may.

    Args:
        lab: The Engine.
        options: Of ``docker run``: what takes the defence away.
        image: What runs.
        command: Its program.
    """
    return run(["docker", "run", "--rm", *options, image, *command], {"DOCKER_HOST": lab.host}, timeout=timeout)


def shell(script: str) -> tuple[str, ...]:
    """A script as a command."""
    return ("sh", "-c", script)


@dataclass(frozen=True)
class Evil:
    """An image that was built to harm.

    Attributes:
        changes: Dockerfile instructions.
        links: Symbolic links, by their names.
        files: Files, by their names.
        probe: The probe as root's setuid program, and a GPU's device node, are in it.
    """

    changes: tuple[str, ...] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    probe: bool = False


def import_image(lab: Engine, reference: str, evil: Evil, probe: Path) -> None:
    """Make such an image of the files of the lab's busybox, by `docker import`."""
    lines = ("ENV PATH=/bin", 'CMD ["sh"]', *evil.changes)
    changes = [part for line in lines for part in ("--change", line)]
    with images.recipes()[BUSYBOX].root().open("rb") as root, tempfile.TemporaryFile() as made:
        _rewrite(root, made, evil, probe)
        made.seek(0)
        subprocess.run(
            ["docker", "import", *changes, "-", reference], env=lab.environment(), check=True, stdin=made,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip


def _rewrite(source: Any, target: Any, evil: Evil, probe: Path) -> None:
    replaced = {name.strip("/") for name in (*evil.links, *evil.files)}
    with tarfile.open(fileobj=source) as given, tarfile.open(fileobj=target, mode="w") as made:
        for member in given:
            if member.name.rstrip("/") not in replaced:
                made.addfile(member, given.extractfile(member) if member.isreg() else None)
        for name, to in evil.links.items():
            made.addfile(entry(name.strip("/"), tarfile.SYMTYPE, link=to))
        for name, text in evil.files.items():
            info = entry(name.strip("/"), size=len(text.encode()), mode=0o755)
            made.addfile(info, io.BytesIO(text.encode()))
        if evil.probe:
            with probe.open("rb") as file:
                made.addfile(entry("suid", size=probe.stat().st_size, mode=0o4755), file)
            node = entry("baked-gpu", tarfile.CHRTYPE, mode=0o666)
            node.devmajor, node.devminor = 195, 7
            made.addfile(node)


def entry(
    name: str, kind: bytes = tarfile.REGTYPE, *, link: str = "", size: int = 0, mode: int = 0o644
) -> tarfile.TarInfo:
    """A header of a tar file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, size, mode
    return info


def submitted(server: Server, user: Account, **keys: Any) -> Row:
    """Submit a job as an account; its row when it and its log have ended."""
    return server.ended(server.submit(user=user, **{"cpus": 0.1, **keys}))


def output(server: Server, row: Row) -> str:
    """What a job wrote to standard output."""
    done = server.cli("logs", str(row["id"]))
    assert done.code == 0, done
    return done.out.decode()


_ASK = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(20)
connection.connect(sys.argv[1])
try:
    connection.sendall(sys.stdin.buffer.read())
except OSError:
    pass
connection.settimeout(float(sys.argv[2]))  # after which a request that has no end is ended
try:
    while True:
        try:
            piece = connection.recv(65536)
        except TimeoutError:
            connection.settimeout(20)
            connection.shutdown(socket.SHUT_WR)
            continue
        if not piece:
            break
        sys.stdout.buffer.write(piece)
except OSError:
    pass
"""


@dataclass(frozen=True)
class Answer:
    """What the server's socket answered: the first status, and the JSON body where there is one."""

    status: int
    text: str

    @property
    def body(self) -> Any:
        """Its JSON."""
        return json.loads(self.text)


def raw(server: Server, user: Account | None, data: bytes, *within: str, patience: float = 20.0) -> Answer:
    """Send bytes to the server's socket as an account and read to the end; the first answer.

    Args:
        server: Whose socket it is.
        user: The account; root where there is none.
        data: The bytes.
        within: A command that runs another, and so says in what the process is that connects.
        patience: Seconds without an answer after which the request is ended, where it does not end by itself.
    """
    argv = [*within, "/usr/bin/python3", "-c", _ASK, str(server.socket), str(patience)]
    done = run(argv, {}, user=user, stdin=data)
    assert done.code == 0, done
    head, _, body = done.out.partition(b"\r\n\r\n")
    if not head:
        return Answer(0, "")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    length = int(lengths[0].split(b":")[1]) if lengths else len(body)
    return Answer(int(head.split(b" ")[1]), body[:length].decode("utf-8", "replace"))


def request(method: str, path: str, body: object | bytes | None = None, headers: str = "") -> bytes:
    """An HTTP request as bytes."""
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    length = f"Content-Length: {len(content)}\r\n" if body is not None and "ength:" not in headers else ""
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{length}{headers}\r\n".encode() + content


def submission(job: Mapping[str, object] | None = None, **more: object) -> dict[str, object]:
    """The body of a submission of one job file.

    Args:
        job: Its keys; by default it tells who it is.
        more: What else is in the body.
    """
    text = json.loads(spec(**(job or {"command": ["id", "-u"]})))
    if "build" in text:
        del text["image"]
    return {"files": [{"text": json.dumps(text), "file": "x", "directory": "/"}], **more}
