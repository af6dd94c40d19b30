"""The helper that works as users: ends of its workers."""

from __future__ import annotations

import signal
import socket
import subprocess

import pytest

from gpujobs.adapters.mounts_helper import Worker, answer, kill


@pytest.mark.parametrize("own_group", [True, False])
def test_a_worker_is_ended_also_before_it_has_a_group_of_its_own(own_group: bool) -> None:
    here, there = socket.socketpair()
    with here, there, subprocess.Popen(["sleep", "100"], process_group=0 if own_group else None) as worker:
        kill(Worker(worker.pid, here, {}, 0.0))
        assert worker.wait(10) == -signal.SIGKILL


def test_an_answer_to_a_helper_that_has_ended_is_lost_without_a_word() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.close()
    with here:
        answer(here, lambda: ({"ok": True}, []), "/x", "ada", "directory")
