"""The init's gate under gVisor: a file that appears, where a FIFO of the host may not be opened."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.test_init import AS_PID_1, PATH, Box, box, started, until

__all__ = ["box"]

ASKED = b"filegate=1"


def write(box: Box, word: bytes) -> None:
    """As the server does: the file is there as a whole or not at all."""
    new = box.path / "word.new"
    new.write_bytes(word)
    new.rename(box.path / "word")


def sleeps(pid: int) -> bool:
    """Whether a process is between two looks."""
    name, state = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")[::2]
    return (name, state.split()[0]) == ("init", "S")


def test_the_program_starts_only_when_the_word_is_there(box: Box) -> None:
    box.control(ASKED, nogate=False)
    with started(box.command("run", "echo", "ran"), env={"PATH": PATH}) as process:
        until(lambda: sleeps(process.pid), "it looks for the word")
        assert process.poll() is None
        (box.path / "word.new").write_bytes(b"g")
        os.utime(box.path)
        until(lambda: sleeps(process.pid), "it goes on looking: that name is not the word's")
        write(box, b"g")
        assert process.communicate(timeout=15) == ("ran\n", "")
        assert process.returncode == 0


def test_a_word_that_is_there_already_counts_however_often(box: Box) -> None:
    box.control(ASKED, nogate=False)
    write(box, b"g")
    for _ in range(2):
        assert box.run("run", "echo", "ran").stdout == "ran\n"


def test_a_gate_that_is_a_fifo_is_not_waited_at(box: Box) -> None:
    box.control(ASKED, nogate=False)
    box.gate.unlink()
    write(box, b"g")
    assert box.run("run", "echo", "ran").stdout == "ran\n"


@pytest.mark.parametrize(
    ("word", "message"),
    [(b"x", ""), (b"?", "word: expected 'g' or 'x', is byte 63"), (b"", "word is not a file with a word")],
)
def test_abort_and_unknown_words_end_without_running_the_program(box: Box, word: bytes, message: str) -> None:
    box.control(ASKED, nogate=False)
    write(box, word)
    done = box.run("run", "echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == bool(message)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("directory", "is not a file with a word"), ("fifo", "is not a file with a word"), ("link", "Too many levels"),
     ("unreadable", "Permission denied")],
)  # fmt: skip
def test_a_word_that_is_no_file_of_the_servers_is_refused(box: Box, kind: str, message: str) -> None:
    box.control(ASKED, nogate=False)
    word = box.path / "word"
    if kind == "directory":
        word.mkdir()
    elif kind == "fifo":
        os.mkfifo(word, 0o644)
    elif kind == "link":
        word.symlink_to(box.path / "job")
    else:
        word.touch(0o600)
    done = box.run("run", "echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert message in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_while_it_looks_ends_the_job_at_once(box: Box, number: signal.Signals) -> None:
    box.control(ASKED, nogate=False)
    command = [*AS_PID_1, *box.command("run", "echo", "ran")]
    with started(command, env={"PATH": PATH}) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until(children.read_text, "PID 1 is there")
        init = int(children.read_text())
        until(lambda: sleeps(init), "it looks for the word")
        os.kill(init, number)
        assert process.wait(timeout=15) == 128 + number
        assert process.stdout is not None
        assert process.stdout.read() == ""


def test_the_record_is_zero_or_one(box: Box) -> None:
    box.control(b"filegate=2")
    done: subprocess.CompletedProcess[str] = box.run("run", "echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert "filegate=2 is not a number in range" in done.stderr
