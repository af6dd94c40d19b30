"""Requests to Engines of other versions: stand-ins on a unix socket."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gpujobs.adapters import enginesocket
from gpujobs.adapters.engine import Engine
from gpujobs.adapters.enginepost import posted
from gpujobs.adapters.enginesocket import Answer
from gpujobs.core.errors import InvalidInput

TOO_OLD = b'{"message":"client version 1.41 is too old. Minimum supported API version is 1.44, please upgrade"}'


def on_engine(place: Path, oldest: str, work: Callable[[str], Awaitable[None]]) -> list[str]:
    """Do something beside an Engine whose API begins with a version; returns the paths that it was asked for."""
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(head.split()[1].decode())
        if asked[-1].startswith(f"/v{oldest}/"):
            writer.write(b"HTTP/1.0 200 OK\r\nServer: Docker/29.0.1 (linux)\r\n\r\n")
            await writer.drain()
            writer.write(b'{"status":"yes"}\n')
        else:
            writer.write(b"HTTP/1.0 400 Bad Request\r\n\r\n")
            await writer.drain()  # the body comes by itself
            writer.write(TOO_OLD)
        writer.close()

    async def all_of_it() -> None:
        async with await asyncio.start_unix_server(answer, place / "engine.sock"):
            await work(str(place / "engine.sock"))

    asyncio.run(asyncio.wait_for(all_of_it(), 20))
    return asked


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enginesocket, "_spoken", {})


async def got(path: str) -> str:
    answer = Answer(path)
    try:
        await answer.open("/info")
        body = b""
        while data := await answer.receive():
            body += data
    finally:
        answer.close()
    return str(json.loads(body)["status"])


def test_an_engine_that_has_dropped_the_old_api_is_asked_in_its_oldest_one_from_then_on(tmp_path: Path) -> None:
    async def work(path: str) -> None:
        assert await got(path) == "yes"
        assert await got(path) == "yes"
        async with posted(f"unix://{path}", "/images/create", {"fromImage": "busybox"}) as events:
            assert [event async for event in events] == [{"status": "yes"}]

    assert on_engine(tmp_path, "1.44", work) == [
        "/v1.41/info", "/v1.44/info", "/v1.44/info", "/v1.44/images/create?fromImage=busybox",
    ]  # fmt: skip


def test_an_engine_that_has_the_old_api_is_asked_in_it(tmp_path: Path) -> None:
    async def work(path: str) -> None:
        assert await got(path) == "yes"

    assert on_engine(tmp_path, "1.41", work) == ["/v1.41/info"]


def test_an_engine_that_refuses_also_what_it_asks_for_is_not_asked_for_ever(tmp_path: Path) -> None:
    async def work(path: str) -> None:
        with pytest.raises(ConnectionError, match="too old"):
            await got(path)

    assert on_engine(tmp_path, "1.45", work) == ["/v1.41/info", "/v1.44/info"]


CEILINGS = """
import socket, sys
from gpujobs.adapters.engine import Engine
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    print(Engine("tcp://127.0.0.1:1").ceilings(), Engine(f"unix://{sys.argv[1]}").ceilings(), sep="\\n")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can bound what a process may have")
def test_an_engine_behind_tcp_is_taken_to_be_as_bounded_as_the_server(tmp_path: Path) -> None:
    bounded = ["setpriv", "--bounding-set", "-sys_resource", "prlimit", "--memlock=1048576:1048576"]
    done = subprocess.run(
        [*bounded, sys.executable, "-c", CEILINGS, tmp_path / "s"], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    over_tcp, over_a_socket = done.stdout.splitlines()
    assert "'memlock': 1048576" in over_tcp
    assert over_tcp == over_a_socket


@pytest.mark.parametrize("host", ["tcp://localhost", "unix://run/docker.sock", "ssh://server", "tcp://h:70000", "unix://"])
def test_an_address_of_no_engine_is_refused_before_it_is_used(host: str) -> None:
    with pytest.raises(InvalidInput, match="DOCKER_HOST"):
        Engine(host)
