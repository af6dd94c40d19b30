"""Who floods a server with connections that ask for nothing, ask half, or do not read keeps nobody else from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.floods import FLOOD, asking
from tests.e2e.harness import Server
from tests.lab.accounts import Account

HANGS = "while :; do sleep 1; done"


@pytest.fixture(scope="module")
def flooded(server: Server) -> Server:
    """A server with a queue that is long enough to fill a socket's buffers."""
    hold = server.submit(script=HANGS, gpus=8)
    server.until(hold, "running")
    many = {"matrix": {"n": list(range(1500))}, "command": ["echo", "{{ n }}"], "gpus": 8}
    server.submit(**many)
    return server


@pytest.mark.parametrize(("kind", "count"), [("idle", 1000), ("head", 500), ("half", 500), ("deaf", 200)])
def test_who_floods_the_server_keeps_nobody_else_from_it(
    flooded: Server, alice: Account, bob: Account, kind: str, count: int
) -> None:
    with asking(flooded, bob, FLOOD, kind, str(count)) as flood:
        assert flood.stdout is not None
        assert flood.stdin is not None
        assert flood.stdout.readline() == "on\n"
        for _ in range(8):
            assert flooded.cli("show", "1", "--json", user=alice, timeout=30).code == 0
        job = flooded.submit(user=alice, script="true")
        assert flooded.cli("cancel", job, user=alice).code == 0
        flood.stdin.write("x")
        flood.stdin.flush()
        left = int(flood.stdout.readline())
        if kind != "idle":
            assert left > 0, "the flood was over before the requests were"
    assert rss(flooded.pid) < 600 << 20


def rss(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
