"""What a job writes comes back byte for byte: live, later, after a crash, and when its container is gone."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.harness import GPUJOBS, Place, Server, spec, wait_for
from tests.lab import nvml
from tests.lab.accounts import Account
from tests.lab.engine import Engine

LINES = 1_250_000  # of 80 bytes: 100 MB


@pytest.fixture
def volume(place: Place, alice: Account) -> Path:
    return place.volume(alice)


def put(volume: Path, name: str, data: bytes) -> bytes:
    """A file that the job can read."""
    (volume / name).write_bytes(data)
    (volume / name).chmod(0o644)
    return data


def test_both_streams_come_back_byte_for_byte_through_run_and_logs(
    server: Server, machine: nvml.Machine, volume: Path
) -> None:
    out = put(volume, "out", bytes(range(256)) * 40 + b"\r\n\x1b[31mred\x1b[0m\n\xff\xfe no newline at the end")
    err = put(volume, "err", b"x" * (1 << 20) + b"\nafter a line of a MiB")
    done = server.run(script="cat /v/out; cat /v/err >&2", volumes=[f"{volume}:/v"])
    assert done.code == 0
    assert done.out == out
    before, _, after = done.err.partition(err)
    assert err in done.err
    ours = [line for line in (before + after).splitlines() if line]
    assert ours
    assert all(line.startswith(b"gpujobs: ") for line in ours), ours
    job = str(server.jobs()[-1]["id"])
    server.ended(job)
    done = server.cli("logs", job)
    assert (done.code, done.out, done.err) == (0, out, err)


def test_a_log_is_followed_live_and_to_its_end(server: Server, machine: nvml.Machine, volume: Path) -> None:
    script = "echo one; while [ ! -e /v/go ]; do sleep 0.05; done; printf two; echo no >&2; exit 3"
    job = server.submit(script=script, volumes=[f"{volume}:/v"])
    follower = subprocess.Popen([GPUJOBS, "logs", "-f", job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                                env={"GPUJOBS_HOST": server.host, "HOME": "/root"})  # fmt: skip
    assert follower.stdout is not None
    assert follower.stdout.readline() == b"one\n"  # comes while the job runs
    assert server.job(job)["state"] == "running"
    (volume / "go").touch()
    out, err = follower.communicate(timeout=30)
    assert (out, err, follower.returncode) == (b"two", b"no\n", 0)


def test_a_log_is_followed_across_the_death_of_its_server(
    server: Server, machine: nvml.Machine, volume: Path
) -> None:
    script = "n=0; while [ ! -e /v/go ]; do n=$$((n+1)); echo $$n; echo $$n > /v/last; sleep 0.05; done"
    job = server.submit(script=script, volumes=[f"{volume}:/v"])
    wait_for(lambda: server.job(job)["state"] == "running", "it runs")
    follower = subprocess.Popen([GPUJOBS, "logs", "-f", job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                                env={"GPUJOBS_HOST": server.host, "HOME": "/root"})  # fmt: skip
    assert follower.stdout is not None
    told = [follower.stdout.readline()]
    assert told == [b"1\n"]
    server.kill()
    server.start()
    written = int(wait_for(lambda: (volume / "last").read_text().strip(), "the program says where it is"))
    while int(told[-1]) <= written:  # until it follows the server that was started
        told.append(follower.stdout.readline())
    (volume / "go").touch()
    out, _ = follower.communicate(timeout=30)
    last = int((volume / "last").read_text())
    assert b"".join(told) + out == b"".join(b"%d\n" % n for n in range(1, last + 1))


def test_a_hundred_megabytes_are_whole_though_the_server_is_killed_while_they_are_written(
    server: Server, machine: nvml.Machine, volume: Path
) -> None:
    count = "awk 'BEGIN {{ for (i = {}; i < {}; i++) printf \"%079d\\n\", i }}'"
    middle = LINES * 2 // 3
    first, second = count.format(0, middle), count.format(middle, LINES)
    waiting = "while [ ! -e /v/go ]; do sleep 0.05; done"
    job = server.submit(
        script=f"{first} && {waiting} && {second} && echo done >&2", mem_limit="256m", volumes=[f"{volume}:/v"]
    )
    log = server.state / "logs" / job

    def stored() -> int:
        return sum(file.stat().st_size for file in log.rglob("*") if file.is_file()) if log.exists() else 0

    wait_for(lambda: stored() > 20_000_000, "a fifth is stored", timeout=60)
    assert server.job(job)["state"] == "running"
    server.kill()
    (volume / "go").touch()
    server.start()
    row = server.ended(job, timeout=150)
    assert row["state"] == "succeeded"
    expected, received, size = hashlib.sha256(), hashlib.sha256(), 0
    for start in range(0, LINES, 10_000):
        expected.update(b"".join(b"%079d\n" % n for n in range(start, start + 10_000)))
    reader = subprocess.Popen([GPUJOBS, "logs", job], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env={"GPUJOBS_HOST": server.host, "HOME": "/root"})  # fmt: skip
    assert reader.stdout is not None
    assert reader.stderr is not None
    while data := os.read(reader.stdout.fileno(), 1 << 20):
        received.update(data)
        size += len(data)
    said = reader.stderr.read()
    reader.stdout.close()
    reader.stderr.close()
    assert reader.wait(timeout=30) == 0
    assert said == b"done\n", "a gap that could not be helped is a marked line; there was none to be"
    assert size == LINES * 80
    assert received.digest() == expected.digest()


def test_a_log_stays_when_its_container_has_been_removed(
    server: Server, machine: nvml.Machine, volume: Path, lab: Engine
) -> None:
    server.stop()
    server.settings.write_text("keep_ended: 1\n")
    server.start()
    out = put(volume, "out", os.urandom(100_000))
    done = server.run(script="cat /v/out; echo e >&2; exit 5", volumes=[f"{volume}:/v"])
    assert (done.code, done.out) == (5, out)
    job = str(server.jobs()[-1]["id"])
    row = wait_for(lambda: row if (row := server.job(job))["container"]["removed"] else None, "its container goes")
    assert row["container"]["name"] not in lab.docker("ps", "--all", "--format", "{{.Names}}").split()
    done = server.cli("logs", job)
    assert (done.out, done.err) == (out, b"e\n")
    server.kill()
    server.start()
    done = server.cli("logs", job)
    assert (done.out, done.err) == (out, b"e\n")
    assert server.job(job)["exit_code"] == 5


def test_the_end_and_parts_of_a_log_can_be_asked_for(server: Server, machine: nvml.Machine) -> None:
    job = server.submit(script="for n in 1 2 3 4 5; do echo line $$n; done")
    server.ended(job)
    assert server.cli("logs", "--tail", "2", job).out == b"line 4\nline 5\n"
    assert server.cli("logs", "--grep", "[24]", job).out == b"line 2\nline 4\n"
    stamped = server.cli("logs", "--timestamps", "--tail", "1", job).out.decode()
    assert stamped.endswith("Z line 5\n")
    done = server.cli("logs", "99999")
    assert (done.code, done.out) == (2, b"")


def test_a_job_that_never_ran_has_no_output_and_says_why(server: Server, machine: nvml.Machine) -> None:
    done = server.cli("run", "--run-as", "gjlab1", "-", stdin=spec(image="gpujobs-lab/not-there:1", script="true"))
    assert done.code != 0
    row = server.jobs()[-1]
    assert (row["state"], row["reason"]) == ("failed", "image"), row
    done = server.cli("logs", str(row["id"]))
    assert (done.code, done.out) == (0, b"")
