"""The server, its containers and the Engine are killed at every moment: nothing accepted is lost or doubled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gpujobs.service.faults import POINTS
from tests.e2e.harness import BUSYBOX, ENDED, Place, Row, Server, inspect, spec, wait_for
from tests.lab import nvml
from tests.lab.accounts import Account
from tests.lab.engine import Daemon, Engine

UNTIL_GO = "while [ ! -e /v/go ]; do sleep 0.05; done"
LINES = "for n in 1 2 3 4 5; do echo line $$n; echo error $$n >&2; sleep 0.02; done"

SUBMITTING = ("submission-received", "submission-committed")
ENDING = ("cancel-committed", "container-removed")
STARTING = tuple(name for name in POINTS if name not in (*SUBMITTING, *ENDING))

MakeServer = Callable[..., Server]


@pytest.fixture
def volume(place: Place, alice: Account) -> Path:
    return place.volume(alice)


def ran(volume: Path) -> list[str]:
    """What jobs have noted when they ran: a line for each time."""
    file = volume / "ran"
    return sorted(file.read_text().splitlines()) if file.exists() else []


def note(name: str) -> str:
    return f"echo {name} >> /v/ran;"


def is_whole(server: Server, row: Row, code: int) -> None:
    """The job ended as its program did, its log is complete, and it had one attempt."""
    assert (row["exit_code"], row["attempt"], len(row["attempts"])) == (code, 1, 1), row
    assert row["state"] == ("succeeded" if code == 0 else "failed")
    done = server.cli("logs", str(row["id"]))
    assert done.out == b"".join(b"line %d\n" % n for n in range(1, 6))
    assert done.err == b"".join(b"error %d\n" % n for n in range(1, 6))


def containers(lab: Engine, server: Server) -> list[str]:
    return lab.docker(
        "ps", "--all", "--format", "{{.Names}}", "--filter", f"label=gpujobs.server={server.get('/server')['server']}"
    ).split()


@pytest.mark.parametrize("point", STARTING)
def test_a_server_that_dies_while_a_job_starts_or_ends_goes_on_where_it_was(
    make_server: MakeServer, volume: Path, lab: Engine, point: str
) -> None:
    server = make_server().start(GPUJOBS_FAULT=point)
    job = server.submit(gpus=1, script=f"{note('first')} {LINES}; exit 7", volumes=[f"{volume}:/v"])
    server.died()
    server.start()
    row = server.ended(job)
    is_whole(server, row, 7)
    assert ran(volume) == ["first"]
    assert containers(lab, server) == [row["container"]["name"]]
    assert not [gpu for gpu in server.get("/gpus")["gpus"] if gpu["allocations"]], "what it held is not free again"
    pins = Path("/run/gpujobs/pins")
    wait_for(lambda: not list(pins.glob(f"{row['container']['name']}-*")), "its pins have gone")
    assert server.stop() == 0
    assert "Traceback" not in server.said


@pytest.mark.parametrize("point", SUBMITTING)
def test_a_server_that_dies_during_a_submission_has_it_whole_or_not_at_all(
    make_server: MakeServer, volume: Path, point: str
) -> None:
    server = make_server().start(GPUJOBS_FAULT=point)
    done = server.cli(
        "submit", "-q", "--run-as", "gjlab1", "-",
        stdin=spec(gpus=1, script=f"{note('job')} {LINES}", volumes=[f"{volume}:/v"]),
    )  # fmt: skip
    assert (done.code, done.out) == (4, b""), done
    assert done.words
    server.died()
    server.start()
    rows = server.jobs()
    if point == "submission-received":
        assert rows == []
        return
    (row,) = rows
    is_whole(server, server.ended(str(row["id"])), 0)
    assert ran(volume) == ["job"]


def test_a_server_that_dies_after_a_cancellation_was_recorded_carries_it_out(
    make_server: MakeServer, volume: Path
) -> None:
    server = make_server().start(GPUJOBS_FAULT="cancel-committed")
    job = server.submit(gpus=1, script=f"{note('job')} trap 'exit 9' TERM; while :; do sleep 0.05; done",
                        volumes=[f"{volume}:/v"])  # fmt: skip
    wait_for(lambda: ran(volume), "the program runs")
    assert server.cli("cancel", job).code == 4
    server.died()
    server.start()
    row = server.ended(job)
    assert (row["state"], row["reason"], row["exit_code"]) == ("cancelled", "cancelled", 9)
    assert ran(volume) == ["job"]


def test_a_server_that_dies_while_it_tidies_up_finishes_that(
    make_server: MakeServer, lab: Engine, volume: Path
) -> None:
    server = make_server("keep_ended: 0\n").start(GPUJOBS_FAULT="container-removed")
    job = server.submit(script=f"{note('job')} {LINES}; exit 7", volumes=[f"{volume}:/v"])
    server.died()
    server.start()
    wait_for(lambda: server.job(job)["container"]["removed"], "the ledger knows that the container is gone")
    assert containers(lab, server) == []
    is_whole(server, server.job(job), 7)
    assert ran(volume) == ["job"]
    assert list((server.state / "attempts").iterdir()) == []


def test_a_kill_while_jobs_run_start_and_wait_disturbs_none_of_them(
    make_server: MakeServer, volume: Path, lab: Engine
) -> None:
    server = make_server().start()
    keys = {"gpus": 2, "volumes": [f"{volume}:/v"]}
    jobs = [server.submit(script=f"{note(str(n))} {UNTIL_GO}; {LINES}; exit {n}", **keys) for n in range(2)]
    wait_for(lambda: ran(volume) == ["0", "1"], "two run")
    pids = {job: inspect(lab, server.job(job)["container"]["id"])["State"]["Pid"] for job in jobs}
    jobs += [server.submit(script=f"{note(str(n))} {LINES}; exit {n}", **keys) for n in range(2, 7)]
    server.kill()  # two run, two start, three wait, or nearly so
    server.start()
    names = {}
    for job in jobs[:2]:
        row = server.job(job)
        names[job] = row["container"]["name"]
        assert row["state"] == "running"
        assert inspect(lab, row["container"]["id"])["State"]["Pid"] == pids[job], "it was disturbed"
    server.kill()
    (volume / "go").touch()  # they end while no server looks
    for job in jobs[:2]:
        name = names[job]
        wait_for(lambda name=name: not inspect(lab, name)["State"]["Running"], "it has ended")  # type: ignore[misc]
    server.start()
    rows = [server.ended(job) for job in jobs]
    for n, row in enumerate(rows):
        is_whole(server, row, n)
    assert ran(volume) == [str(n) for n in range(7)]
    starts = [row["started_at"] for row in rows]
    assert starts == sorted(starts)
    assert len(containers(lab, server)) == 7


def test_a_container_that_was_removed_behind_the_servers_back_ends_its_job_as_failed(
    make_server: MakeServer, volume: Path, lab: Engine
) -> None:
    server = make_server().start()
    keys = {"gpus": 2, "script": f"{note('x')} {UNTIL_GO}", "volumes": [f"{volume}:/v"]}
    absent, present = server.submit(**keys), server.submit(**keys)
    wait_for(lambda: len(ran(volume)) == 2, "both run")
    names = {job: server.job(job)["container"]["name"] for job in (absent, present)}
    lab.docker("rm", "--force", names[present])
    row = server.ended(present)
    assert row["state"] == "failed"  # the Engine kills it first, and the server may look before it is gone
    assert row["message"] in (f"its container {names[present]} was removed by someone else",
                              "exit 137: ended by SIGKILL")  # fmt: skip
    server.kill()
    lab.docker("rm", "--force", names[absent])
    server.start()
    row = server.ended(absent)
    assert (row["state"], row["reason"]) == ("failed", "server")
    assert row["message"] == f"its container {names[absent]} was removed by someone else"
    assert server.ended(server.submit(gpus=8, script="true"))["state"] == "succeeded"


def test_a_container_of_our_name_that_is_not_ours_is_neither_adopted_nor_touched(
    make_server: MakeServer, volume: Path, lab: Engine
) -> None:
    server = make_server().start()
    assert server.ended(server.submit(script="true"))["state"] == "succeeded"
    server_id = server.get("/server")["server"]
    name = f"gpujobs-{server_id}-2-1"
    lab.docker("run", "--detach", "--name", name, "--label", f"gpujobs.server={server_id}", "--label", "gpujobs.job=2",
               "--label", "gpujobs.attempt=1", BUSYBOX, "sleep", "600")  # fmt: skip
    row = server.ended(server.submit(gpus=1, script="true"))
    assert (row["id"], row["state"], row["reason"]) == (2, "failed", "server")
    assert f"there is a container {name} that is not the one made for this job" in row["message"]
    assert inspect(lab, name)["State"]["Running"]
    server.kill()
    server.start()
    assert inspect(lab, name)["State"]["Running"]
    assert server.ended(server.submit(gpus=1, script="true"))["state"] == "succeeded"


def test_a_second_server_is_refused_on_the_same_state_and_on_the_same_engine(
    make_server: MakeServer, alice: Account
) -> None:
    first, second = make_server().start(), make_server()
    said = f"pid {first.pid}, uid 0"
    process = second.spawn()
    assert process.wait(timeout=20) == 3
    assert said in second.said
    assert "Docker Engine" in second.said
    process = second.spawn(GPUJOBS_STATE=str(first.state))
    assert process.wait(timeout=20) == 3
    assert said in second.said
    assert str(first.state) in second.said
    process = second.spawn(GPUJOBS_STATE=str(second.state), GPUJOBS_HOST=first.host)
    assert process.wait(timeout=20) == 3
    assert first.ended(first.submit(script="true"))["state"] == "succeeded", "the first was not disturbed"
    first.kill()  # a holder that died holds nothing
    second.start()
    assert second.ended(second.submit(script="true"))["state"] == "succeeded"


def test_jobs_of_an_engine_that_was_killed_end_in_words_and_the_next_one_runs(
    make_server: MakeServer, volume: Path, disposable: Daemon
) -> None:
    server = make_server(DOCKER_HOST=disposable.host).start()
    keys = {"gpus": 4, "volumes": [f"{volume}:/v"]}
    jobs = [server.submit(script=f"{note(str(n))} {UNTIL_GO}", **keys) for n in range(2)]
    wait_for(lambda: len(ran(volume)) == 2, "both run")
    waiting = server.submit(script=f"{note('waiting')} {LINES}", **keys)
    disposable.kill()
    wait_for(lambda: "the Engine does not answer" in server.said, "the server sees it")
    late = server.submit(script=f"{note('late')} {LINES}", volumes=[f"{volume}:/v"])
    assert server.job(late)["state"] not in ENDED
    assert server.job(jobs[0])["state"] == "running"
    disposable.start()
    for job in jobs:
        row = server.ended(job)
        assert (row["state"], row["reason"]) == ("failed", "server"), row
        assert "the Docker Engine was stopped or restarted" in row["message"]
        assert server.cli("wait", job).code != 0
    for job in (waiting, late):
        is_whole(server, server.ended(job), 0)
    assert ran(volume) == ["0", "1", "late", "waiting"]
    assert server.stop() == 0
    assert "Traceback" not in server.said


def test_an_engine_with_live_restore_takes_jobs_across_its_own_death(
    make_server: MakeServer, volume: Path, disposable: Daemon, machine: nvml.Machine
) -> None:
    disposable.stop()
    disposable.start(live_restore=True)
    try:
        server = make_server(DOCKER_HOST=disposable.host).start()
        job = server.submit(gpus=2, script=f"{note('job')} {LINES}; {UNTIL_GO}; exit 3", volumes=[f"{volume}:/v"])
        wait_for(lambda: ran(volume), "it runs")
        disposable.kill()
        wait_for(lambda: "the Engine does not answer" in server.said, "the server sees it")
        disposable.start()
        wait_for(lambda: "the Engine answers again" in server.said, "the server sees that too")
        assert server.job(job)["state"] == "running"
        (volume / "go").touch()
        is_whole(server, server.ended(job), 3)
        assert ran(volume) == ["job"]
        server.stop()
    finally:
        disposable.stop()
        disposable.start(live_restore=False)
