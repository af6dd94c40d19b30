"""Waiting and starting: who is given which GPUs, in which order, why not now, and how a job is ended."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.harness import ENDED, GPUJOBS, Place, Server, spec, wait_for
from tests.lab import nvml
from tests.lab.accounts import Account
from tests.lab.engine import Engine

UNTIL_GO = "while [ ! -e /v/go ]; do sleep 0.05; done"
PS_KEYS = {"id", "index", "name", "owner", "state", "reason", "message", "gpus", "submitted_at", "started_at",
           "ended_at", "exit_code", "attempt", "estimated_start"}  # fmt: skip


@pytest.fixture
def volume(place: Place, alice: Account) -> Path:
    return place.volume(alice)


@contextmanager
def occupied(server: Server, volume: Path, gpus: int = 8) -> Iterator[str]:
    """All GPUs are held by one job for the time of the block."""
    job = server.submit(gpus=gpus, script=UNTIL_GO, volumes=[f"{volume}:/v"])
    server.until(job, "running")
    try:
        yield job
    finally:
        (volume / "go").touch()
        server.ended(job)


def test_twelve_jobs_of_two_gpus_share_eight_never_two_on_one_and_start_in_the_order_of_their_ids(
    server: Server, machine: nvml.Machine, lab: Engine, volume: Path
) -> None:
    since = time.time()
    volumes = [f"{volume}:/v"]
    jobs = [server.submit(name=f"pair-{n}", gpus=2, script=UNTIL_GO, volumes=volumes) for n in range(4)]
    jobs += [server.submit(name=f"pair-{n}", gpus=2, script=f"sleep 0.{3 + n % 3}") for n in range(4, 12)]
    for job in jobs[:4]:
        server.until(job, "running")
    (volume / "go").touch()
    done = server.cli("wait", *jobs, "--json", timeout=120)
    rows = done.json["jobs"]
    assert [str(row["id"]) for row in rows] == jobs
    assert {row["state"] for row in rows} == {"succeeded"}
    assert all(set(row) >= PS_KEYS for row in rows)
    assert all(len(set(row["gpus"])) == 2 for row in rows)
    starts = [row["started_at"] for row in rows]
    assert starts == sorted(starts), "started_at falls with the id"
    # The Engine's own account: on no GPU does a container start before the one before it has died.
    events = [json.loads(line) for line in lab.docker(
        "events", "--since", f"{since:.3f}", "--until", f"{time.time():.3f}", "--filter", "type=container",
        "--filter", "label=gpujobs.server", "--filter", "event=start", "--filter", "event=die",
        "--format", "{{json .}}",
    ).splitlines()]  # fmt: skip
    on: dict[str, str] = {}
    most = 0
    for event in events:
        labels = event["Actor"]["Attributes"]
        for uuid in labels["gpujobs.gpus"].split(","):
            if event["Action"] == "start":
                assert uuid not in on, f"jobs {on[uuid]} and {labels['gpujobs.job']} on {uuid} at once"
                on[uuid] = labels["gpujobs.job"]
            else:
                assert on.pop(uuid) == labels["gpujobs.job"]
        most = max(most, len(on))
    assert not on
    assert len(events) == 24
    assert most == 8, "the jobs did not run side by side: nothing was shown"


def test_a_waiting_job_says_what_is_asked_what_is_free_and_who_is_in_front(
    server: Server, machine: nvml.Machine, volume: Path, alice: Account
) -> None:
    with occupied(server, volume, 6) as holder:
        first, second = server.submit(gpus=4, script="true"), server.submit(gpus=1, script="true")
        cpu = server.submit(script="true")
        assert server.ended(cpu)["state"] == "succeeded", "a job without GPUs does not stand behind those with"
        rows = {str(row["id"]): row for row in server.cli("ps", "--json").json["jobs"]}
        assert set(rows) == {holder, first, second}
        assert (rows[first]["state"], rows[first]["reason"]) == ("queued", "resources")
        assert "4 GPUs asked, 2 free" in rows[first]["message"]
        assert (rows[second]["state"], rows[second]["reason"]) == ("queued", "priority")
        assert f"job {first} is first in line" in rows[second]["message"]
        assert (rows[first]["started_at"], rows[first]["exit_code"], rows[first]["gpus"]) == (None, None, [])
    assert {server.ended(job)["state"] for job in (first, second)} == {"succeeded"}


def test_what_can_never_fit_is_refused_at_once(server: Server, machine: nvml.Machine) -> None:
    known = len(server.jobs())
    for keys, words in (
        ({"gpus": 9}, "this can never start on this machine"),
        ({"gpus": {"count": 1, "memory": "80GB"}}, "this can never start on this machine"),
        ({"gpus": {"count": 1, "model": "H100"}}, "this can never start on this machine"),
        ({"mem_limit": "100t"}, "mem_limit"),
        ({"cpus": 4000}, "cpus"),
    ):
        done = server.cli("submit", "--run-as", "gjlab1", "-", stdin=spec(script="true", **keys))
        assert done.code == 3, done
        assert words in done.words
    assert len(server.jobs()) == known


def test_a_job_names_its_gpus_by_uuid_model_and_memory(server: Server, machine: nvml.Machine) -> None:
    wanted = [machine.gpus[6].uuid, machine.gpus[2].uuid]
    row = server.ended(server.submit(gpus={"uuid": wanted}, script="true"))
    assert sorted(row["gpus"]) == sorted(wanted)
    row = server.ended(server.submit(gpus={"count": 1, "model": "A100*", "memory": "40GB"}, script="true"))
    assert row["state"] == "succeeded"
    reasons = {choice["uuid"]: choice for choice in row["attempts"][0]["choices"]}
    assert len(reasons) == 8
    assert [uuid for uuid, choice in reasons.items() if choice["chosen"]] == row["gpus"]
    assert all(choice["reason"] for choice in reasons.values())


# -- ending jobs -----------------------------------------------------------------------------------------------


def test_a_waiting_job_that_is_cancelled_never_starts(server: Server, machine: nvml.Machine, volume: Path) -> None:
    with occupied(server, volume):
        job = server.submit(gpus=1, script="true")
        done = server.cli("cancel", job)
        assert (done.code, done.out) == (0, f"job {job} cancelled\n".encode())
        row = server.job(job)
        assert (row["state"], row["reason"], row["attempt"], row["container"]) == ("cancelled", "cancelled", 0, None)
    assert server.cli("wait", job).code == 1
    assert server.job(job)["started_at"] is None


def test_a_running_job_that_is_cancelled_ends_with_its_own_code_but_never_with_0(
    server: Server, machine: nvml.Machine, volume: Path
) -> None:
    def cancelled(script: str) -> tuple[int, dict[str, object]]:
        up = volume / "up"
        up.unlink(missing_ok=True)
        job = server.submit(gpus=1, script=script, volumes=[f"{volume}:/v"])
        wait_for(up.exists, "the program runs")
        done = server.cli("cancel", job)
        assert (done.code, done.out) == (0, f"job {job} stopping\n".encode())  # recorded: that is when it answers
        row = server.ended(job)
        assert (row["state"], row["reason"], row["message"]) == ("cancelled", "cancelled", "cancelled by root")
        return server.cli("wait", job).code, row

    loop = "touch /v/up; while :; do sleep 0.05; done"
    code, row = cancelled(f"trap 'echo bye; exit 0' TERM; {loop}")
    assert (code, row["exit_code"]) == (1, 0)
    assert server.cli("logs", str(row["id"])).out == b"bye\n"
    code, row = cancelled(f"trap 'exit 5' TERM; {loop}")
    assert (code, row["exit_code"]) == (5, 5)
    code, row = cancelled("touch /v/up; exec sleep 60")
    assert (code, row["exit_code"]) == (143, 143)


def test_a_job_that_is_cancelled_while_it_starts_never_runs_its_program(
    server: Server, machine: nvml.Machine, volume: Path
) -> None:
    jobs = [server.submit(gpus=2, script="touch /v/$$HOSTNAME", volumes=[f"{volume}:/v"]) for _ in range(4)]
    job = jobs[-1]
    # The starts are in order and take some hundred ms each: the last of them is surely not over.
    wait_for(lambda: server.job(job)["state"] != "queued", "it is being started")
    done = server.cli("cancel", job)
    assert done.code == 0, done
    row = server.ended(job)
    for other in jobs[:-1]:
        assert server.ended(other)["state"] == "succeeded"
    if row["started_at"] is None:
        assert (row["state"], row["exit_code"]) == ("cancelled", None)
        assert len(list(volume.iterdir())) == 3
    else:
        assert row["state"] in ("cancelled", "succeeded")


def test_a_time_limit_ends_a_job_by_term_and_after_the_grace_period_by_kill(
    server: Server, machine: nvml.Machine, volume: Path
) -> None:
    began = time.time()
    polite = server.submit(time_limit="1s", script="trap 'echo asked; exit 0' TERM; while :; do sleep 0.05; done")
    deaf = server.submit(time_limit="1s", stop_grace_period="1s",
                         script="trap 'echo asked' TERM; while :; do sleep 0.05; done")  # fmt: skip
    row = server.ended(polite)
    assert (row["state"], row["reason"], row["exit_code"]) == ("failed", "time-limit", 0)
    assert "1 s" in row["message"]
    assert server.cli("wait", polite).code == 1
    row = server.ended(deaf)
    assert (row["state"], row["reason"], row["exit_code"]) == ("failed", "time-limit", 137)
    assert server.cli("wait", deaf).code == 137
    assert [server.cli("logs", job).out for job in (polite, deaf)] == [b"asked\n", b"asked\n"]
    assert time.time() - began < 20


def test_waiting_for_several_jobs_gives_the_first_code_that_is_not_0_in_the_order_of_the_arguments(
    server: Server, machine: nvml.Machine
) -> None:
    good, slow, fast = (server.submit(script=script) for script in ("true", "sleep 1; exit 4", "exit 6"))
    assert server.cli("wait", good, slow, fast).code == 4
    assert server.cli("wait", fast, slow, good).code == 6
    assert server.cli("wait", good).code == 0
    assert server.cli("wait", good, "99999").code == 2


def test_an_array_is_one_submission_whose_elements_run_and_are_told_apart(
    server: Server, machine: nvml.Machine
) -> None:
    job = server.submit(gpus=1, matrix={"lr": [1, 2, 3]}, script="echo lr {{ lr }}; exit {{ lr }}")
    assert server.cli("wait", job).code == 1
    rows = server.get(f"/jobs/{job}")["jobs"]
    assert [(row["index"], row["exit_code"]) for row in rows] == [(0, 1), (1, 2), (2, 3)]
    assert rows[1]["container"]["name"].endswith(f"-{job}_1-1")
    out = server.cli("logs", job).out
    assert sorted(out.splitlines()) == [f"{job}_{n} | lr {n + 1}".encode() for n in range(3)]
    assert server.cli("wait", f"{job}_2").code == 3


def test_a_run_that_is_interrupted_leaves_the_job_running_and_says_how_to_return(
    server: Server, machine: nvml.Machine, volume: Path
) -> None:
    follower = subprocess.Popen(
        [GPUJOBS, "run", "--run-as", "gjlab1", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={"GPUJOBS_HOST": server.host, "HOME": "/root"},
    )  # fmt: skip
    assert follower.stdin is not None
    follower.stdin.write(spec(script=f"touch /v/up; {UNTIL_GO}; exit 3", volumes=[f"{volume}:/v"]))
    follower.stdin.close()
    wait_for((volume / "up").exists, "the program runs")
    follower.send_signal(signal.SIGINT)
    assert follower.wait(timeout=10) == 130
    assert follower.stderr is not None
    assert follower.stdout is not None
    said = follower.stderr.read().decode()
    follower.stdout.close()
    follower.stderr.close()
    job = str(server.jobs()[-1]["id"])
    assert f"job {job} goes on without this command" in said
    assert f"gpujobs logs -f {job}" in said
    assert server.job(job)["state"] not in ENDED
    (volume / "go").touch()
    assert server.ended(job)["exit_code"] == 3
