"""Containers that pretend to be a job's: made by an account that may use Docker, with our names and labels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpujobs.core.inventory import Inventory
from gpujobs.core.job import JobId
from gpujobs.core.reconcile import Adopt, Lost, Recorded, Seen, foreign, reconcile
from tests.attacks.tools import submitted
from tests.e2e.harness import BUSYBOX, Row, Server, inspect, wait_for
from tests.lab.accounts import Account
from tests.lab.engine import Engine

RECORDED = Recorded(job=JobId(7), attempt=1, name="gpujobs-aa-7-1", nonce="secret", config="c0", state="running",
                    active=True)  # fmt: skip


def forged(nonce: str, config: str = "c0") -> Seen:
    labels = {"gpujobs.server": "aa", "gpujobs.job": "7", "gpujobs.attempt": "1", "gpujobs.nonce": nonce,
              "gpujobs.config": config}  # fmt: skip
    return Seen(id="f", name="gpujobs-aa-7-1", state="running", labels=labels)


@pytest.mark.parametrize(("nonce", "config"), [("guessed", "c0"), ("", "c0"), ("secret", "c1")])
def test_a_container_without_the_ledgers_nonce_and_hash_is_not_adopted(nonce: str, config: str) -> None:
    assert reconcile("aa", [RECORDED], [forged("secret")]) == [Adopt(JobId(7), "f")]
    (action,) = reconcile("aa", [RECORDED], [forged(nonce, config)])
    assert isinstance(action, Lost)


@pytest.fixture
def next_job(server: Server, waiting: Row) -> int:
    """The number that the next submission has."""
    return int(waiting["id"]) + 1


@pytest.fixture
def by_hand(lab: Engine, server_id: str, next_job: int, alice: Account) -> Iterator[str]:
    """A container with the next job's name and all labels that can be seen from outside."""
    name = f"gpujobs-{server_id}-{next_job}-1"
    labels = {"gpujobs.server": server_id, "gpujobs.job": str(next_job), "gpujobs.attempt": "1",
              "gpujobs.owner": str(alice.uid), "gpujobs.gpus": "", "gpujobs.nonce": "guessed"}  # fmt: skip
    options = [part for key, value in labels.items() for part in ("--label", f"{key}={value}")]
    lab.docker("create", "--name", name, *options, "--user", "0:0", BUSYBOX, "sleep", "60")
    yield name
    lab.docker("rm", "--force", name)


def test_a_container_of_the_next_jobs_name_and_labels_is_neither_taken_nor_touched(
    lab: Engine, server: Server, alice: Account, by_hand: str, next_job: int
) -> None:
    lab.docker("start", by_hand)
    done = server.run(user=alice, script="true")
    row = server.jobs()[-1]
    assert (done.code, row["id"]) == (1, next_job)
    assert "is not the one made for this job" in done.words
    assert inspect(lab, by_hand)["State"]["Running"], "it is somebody's: it goes on"


def test_a_container_with_a_running_jobs_labels_changes_nothing_for_that_job(
    lab: Engine, server: Server, alice: Account
) -> None:
    job = server.submit(user=alice, script="sleep 5; exit 7")
    row = server.until(job, "running")
    labels = inspect(lab, row["container"]["id"])["Config"]["Labels"]
    options = [part for key, value in labels.items() for part in ("--label", f"{key}={value}")]
    made = lab.docker("run", "--detach", *options, BUSYBOX, "false").strip()
    try:
        wait_for(lambda: not inspect(lab, made)["State"]["Running"], "the forged one has ended")
        assert server.job(job)["state"] == "running"
        assert server.ended(job)["exit_code"] == 7
        assert server.job(job)["container"]["id"] == row["container"]["id"]
    finally:
        lab.docker("rm", "--force", made)


def test_gpus_of_a_container_with_our_labels_count_as_taken(
    lab: Engine, server: Server, alice: Account, server_id: str
) -> None:
    """Were labels believed, whoever forges them could run on GPUs that the server gives away."""
    uuid = server.get("/gpus")["gpus"][0]["uuid"]
    inventory = Inventory(simulated=False, gpus=())
    assert foreign(server_id, [], frozenset(), inventory, "nvidia") == {}
    made = lab.docker("run", "--detach", "--runtime", "nvidia", "--env", f"NVIDIA_VISIBLE_DEVICES={uuid}", "--label",
                      f"gpujobs.server={server_id}", "--label", "gpujobs.job=1", "--label", f"gpujobs.gpus={uuid}",
                      BUSYBOX, "sleep", "60").strip()  # fmt: skip
    try:
        seen = wait_for(
            lambda: found if (found := server.get("/gpus")["gpus"][0]["avoided"]) else None, "the container is seen"
        )
        assert "was not started by gpujobs" in seen
        row = submitted(server, alice, gpus=7, script="true")
        assert uuid not in row["gpus"]
    finally:
        lab.docker("rm", "--force", made)
    wait_for(lambda: not server.get("/gpus")["gpus"][0]["avoided"], "the GPU is free again")
