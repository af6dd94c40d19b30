"""Using up what others need: processes, memory, disk, the server's time."""

from __future__ import annotations

import asyncio
import json
import random
import string
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from gpujobs.adapters.logfile import LogWriter
from gpujobs.core.container import PIDS_LIMIT
from gpujobs.logwire import STDOUT, LogRecord
from tests.attacks.tools import output, raw, request, shell, submitted, undefended
from tests.e2e.harness import BUSYBOX, Row, Server, cgroup_of, inspect, wait_for
from tests.lab.accounts import Account, command_as
from tests.lab.engine import Engine

LIMITS = """
for file in pids/pids.max memory/memory.limit_in_bytes pids.max memory.max; do
    [ -e /sys/fs/cgroup/$$file ] && echo $$file $$(cat /sys/fs/cgroup/$$file)
done
ulimit -Hc
df -k /dev/shm | tail -1
head -c 100m /dev/zero > /dev/shm/x; ls -l /dev/shm/x
exit 3
"""


@pytest.fixture(scope="module")
def without(lab: Engine) -> str:
    """What a container of plain Docker may use."""
    return undefended(lab, "--shm-size", "1g", command=shell(LIMITS.replace("$$", "$"))).out.decode()


@pytest.fixture(scope="module")
def limited(server: Server, alice: Account) -> Row:
    """A job of 64 MiB."""
    return submitted(server, alice, script=LIMITS, mem_limit="64m")


@pytest.fixture(scope="module")
def within(server: Server, limited: Row) -> str:
    """What it may use."""
    return output(server, limited)


def test_a_fork_bomb_ends_at_the_limit_of_processes(without: str, within: str) -> None:
    assert "pids.max max" in without
    assert f"pids.max {PIDS_LIMIT}" in within


def test_thousands_of_processes_are_the_jobs_own_end_and_nobody_elses(server: Server, alice: Account) -> None:
    """In 16 MiB they end sooner than at the limit of processes."""
    script = "for i in $$(seq 5000); do sleep 100 & done; wait"
    job = server.submit(user=alice, script=script, mem_limit="16m", time_limit="10s", cpus=1, stop_grace_period="0s")
    server.until(job, "running", "failed")
    assert server.get("/gpus")
    row = server.ended(job)
    assert (row["state"], row["reason"]) in (("failed", "oom"), ("failed", "exit"), ("failed", "time-limit")), row


LOOPS = 200
SPINNING = f"for i in $$(seq {LOOPS}); do (while :; do :; done) & done; wait"
"""Processes that end only when each has had some CPU time after it was killed."""


def _processes(lab: Engine, container: str) -> int:
    """How many a container has, as its cgroup counts them."""
    return int((cgroup_of(inspect(lab, container)["State"]["Pid"], "pids") / "pids.current").read_text())


def outlives_kill(lab: Engine, cpus: str) -> bool:
    """Whether a container of plain Docker with so much CPU time is not dead five seconds after it was killed."""
    made = lab.docker("run", "--detach", BUSYBOX, *shell(SPINNING.replace("$$", "$"))).strip()
    try:
        wait_for(lambda: _processes(lab, made) >= LOOPS, "its processes are there")
        lab.docker("update", "--cpus", cpus, made)
        lab.docker("kill", made, timeout=5)
    except subprocess.TimeoutExpired:
        return True
    finally:
        lab.docker("update", "--cpus", "2", made)
        lab.docker("rm", "--force", made)
    return False


def test_a_job_that_leaves_itself_no_time_to_be_killed_in_ends_at_its_limit_all_the_same(
    server: Server, alice: Account, lab: Engine
) -> None:
    """A fork bomb on a tenth of a CPU outlived SIGKILL by minutes: it would keep its GPUs as long."""
    assert outlives_kill(lab, "0.02")
    job = server.submit(user=alice, gpus=1, script=SPINNING, cpus=0.1, time_limit="5s", stop_grace_period="0s")
    server.until(job, "running", "failed")
    row = server.ended(job, timeout=60)
    assert (row["state"], row["reason"]) == ("failed", "time-limit"), row
    allowed = inspect(lab, row["container"]["id"])["HostConfig"]["NanoCpus"]
    assert allowed == int(lab.docker("info", "--format", "{{.NCPU}}")) * 10**9, "it was let end"


def test_memory_ends_at_what_was_asked_for(without: str, within: str) -> None:
    (limit,) = [line.split()[1] for line in without.splitlines() if line.startswith("memory")]
    assert limit == "max" or int(limit) > 1 << 50
    (limit,) = [line.split()[1] for line in within.splitlines() if line.startswith("memory")]
    assert int(limit) == 64 << 20


def test_shared_memory_is_part_of_a_jobs_memory(without: str, within: str, server: Server, alice: Account) -> None:
    assert without.splitlines()[-1].split()[4] == str(100 << 20), "unbounded, on the machine's memory"
    assert not within or str(100 << 20) not in within.splitlines()[-1]
    row = submitted(server, alice, script="head -c 200m /dev/zero > /dev/shm/x", mem_limit="64m", shm_size="1g")
    assert (row["state"], row["reason"]) in (("failed", "oom"), ("failed", "exit"))


def test_core_files_are_off(without: str, within: str) -> None:
    assert "unlimited" in without.splitlines()
    assert "0" in within.splitlines()


def test_what_the_engine_keeps_of_an_output_is_bounded(lab: Engine, limited: Row) -> None:
    """Docker's own default is a file without end."""
    kept = inspect(lab, limited["container"]["id"])["HostConfig"]["LogConfig"]
    assert json.loads(lab.docker("info", "--format", "{{json .LoggingDriver}}")) == "json-file"
    assert kept["Type"] == "local"
    assert int(kept["Config"]["max-file"]) <= 10
    assert kept["Config"]["max-size"].endswith("m")


def test_a_flood_of_output_is_kept_at_its_beginning_and_its_end(tmp_path: Path) -> None:
    """The same writer with a limit of 1 MiB instead of 200 MB, and without one."""

    async def size(limit: int) -> int:
        log = LogWriter(tmp_path / str(limit), head_limit=limit, tail_limit=limit)
        for number in range(400):
            log.append([LogRecord(number, STDOUT, b"x" * 20_000 + b"\n")])
        await log.finish()
        return sum(file.stat().st_size for file in (tmp_path / str(limit)).iterdir())

    assert asyncio.run(size(1 << 30)) > 7 << 20
    assert asyncio.run(size(1 << 20)) < 4 << 20


def test_a_matrix_of_a_million_elements_is_refused_at_once(server: Server, alice: Account) -> None:
    axes = {f"a{number}": list(range(100)) for number in range(3)}
    began = time.monotonic()
    done = server.run(user=alice, script=" ".join(f"{{{{ {name} }}}}" for name in axes), matrix=axes)
    assert done.code == 2
    assert "10,000" in done.words
    assert time.monotonic() - began < 10


def test_a_bomb_of_aliases_does_not_go_off_in_the_server(server: Server, alice: Account) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 7)]
    loaded = yaml.safe_load("\n".join(lines))
    assert len(json.dumps(loaded["a5"])) > 4_000_000, "what a reader makes of 400 bytes"
    text = "\n".join([*lines, "name: t", "image: a", "command: *a6"])
    began = time.monotonic()
    done = server.cli("submit", "-", user=alice, stdin=text.encode())
    assert done.code == 2
    assert time.monotonic() - began < 10
    assert server.get("/server")


HOLD = """
import socket, sys
held = []
data = sys.stdin.buffer.read()
for number in range(int(sys.argv[2])):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    if number % 2 == 0:
        connection.sendall(data)
    held.append(connection)
print("held", flush=True)
sys.stdin.close()
import time
time.sleep(60)
"""


@contextmanager
def held(server: Server, user: Account, count: int, data: bytes) -> Iterator[None]:
    """Connections of an account's, half of which have sent this, and which never read."""
    argv = ["/usr/bin/python3", "-c", HOLD, str(server.socket), str(count)]
    with subprocess.Popen(command_as(user, argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(data)
        process.stdin.close()
        assert process.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            process.kill()


WATCH = request("GET", "/v1/jobs/{job}/watch").replace(b"Connection: close\r\n", b"")


@pytest.fixture
def few_streams(server: Server) -> Iterator[None]:
    """The server allows an account ten streams."""
    server.reload("streams: 10")
    yield
    server.reload("")


def test_followers_without_end_are_told_the_limit_and_take_no_others_place(
    server: Server, alice: Account, bob: Account, waiting: Row, few_streams: None
) -> None:
    watch = WATCH.replace(b"{job}", str(waiting["id"]).encode())
    with held(server, bob, 20, watch):  # the half of them follow
        answer = wait_for(
            lambda: found if (found := raw(server, bob, watch, patience=3)).status == 403 else None, "it is refused"
        )
        assert answer.body["exit"] == 3
        assert "10" in answer.body["message"]
        assert raw(server, alice, request("GET", f"/v1/jobs/{waiting['id']}/logs")).status == 200
        server.reload("streams: 100")
        assert raw(server, bob, watch, patience=3).status == 200, "where there is no such limit"


HALF = b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{"


@pytest.mark.parametrize("data", [b"", HALF, b"GET /v1/jobs?all=1 HTTP/1.1\r\nHost: x\r\n\r\n" * 20],
                         ids=["silent", "half a request", "answers unread"])  # fmt: skip
def test_connections_that_are_only_held_keep_nobody_waiting(
    server: Server, alice: Account, bob: Account, data: bytes
) -> None:
    with held(server, alice, 200, data):
        began = time.monotonic()
        assert raw(server, bob, request("GET", "/v1/jobs")).status == 200
        assert server.get("/server")
        assert time.monotonic() - began < 10


def test_a_file_of_variables_that_no_process_can_have_is_told(server: Server, alice: Account) -> None:
    word = "".join(random.Random(1).choices(string.ascii_letters, k=130_000))
    done = server.run(user=alice, script="true", environment={"A": word * 2})
    assert done.code == 2
    assert "at most" in done.words


def test_a_program_that_always_fails_is_not_started_again_by_the_engine(lab: Engine, limited: Row) -> None:
    """Beyond what it costs: a pin that is gone after a reboot would be an empty directory for the next start."""
    made = lab.docker("run", "--detach", "--restart", "always", BUSYBOX, "false").strip()
    try:
        wait_for(lambda: inspect(lab, made)["RestartCount"], "it is started again")
    finally:
        lab.docker("rm", "--force", made)
    found = inspect(lab, limited["container"]["id"])
    assert (found["HostConfig"]["RestartPolicy"]["Name"], found["RestartCount"]) == ("no", 0)
    assert limited["exit_code"] != 0
