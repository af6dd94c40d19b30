"""The server's socket: where it is made, and who may come to it."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from gpujobs import places
from gpujobs.core.errors import Refused, Unavailable
from gpujobs.service.door import listen


@pytest.fixture(autouse=True)
def tight_umask():
    before = os.umask(0o077)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's socket is for others")
def test_directories_made_for_the_socket_let_accounts_through_whatever_the_umask(tmp_path: Path) -> None:
    with listen(tmp_path / "a/b/s.sock"):
        assert [mode(tmp_path / name) for name in ("a", "a/b", "a/b/s.sock")] == [0o755, 0o755, 0o600]
    assert mode(tmp_path) == 0o700, "what was there stays as it was"


def test_a_path_too_long_for_a_socket_address_works(tmp_path: Path) -> None:
    address = tmp_path / ("d" * 120) / "s.sock"
    with listen(address), socket.socket(socket.AF_UNIX) as client, places.short_path(address) as name:
        client.connect(name)
        with pytest.raises(Refused, match=f"pid {os.getpid()}.* answers at"):
            listen(address)


def test_a_socket_where_none_can_be_made_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match=r"s\.sock cannot be made: File exists"):
        listen(tmp_path / "file/s.sock")
