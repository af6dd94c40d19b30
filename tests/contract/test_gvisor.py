"""A job under gVisor through a whole service: its init waits for a file, and is let go once, whatever is killed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import pytest

from gpujobs.core.spec import JobSpec
from gpujobs.service.faults import POINTS
from tests.contract.promises import Promises
from tests.contract.world import World


@pytest.fixture
def world() -> Iterator[World]:
    found = World(seed=1)
    found.engine.latency = lambda: 0.0
    found.run_for(1.0)
    yield found
    found.close()


def submit(world: World) -> None:
    assert world.service is not None
    spec = JobSpec(name="job", image="local", command=("train", "obeys"), mem_limit=1 << 30, runtime="runsc")
    world._ask(world.service.submit(world.people[0], [("f", "", [(None, spec)])]), lambda task: None)
    world.run_for(3.0)


def test_it_is_let_go_by_a_file(world: World) -> None:
    umask = os.umask(0o077)  # the server's
    submit(world)
    os.umask(umask)
    (container,) = world.running()
    assert container.request["HostConfig"]["Runtime"] == "runsc"
    control = world.paths.attempts / container.name
    assert (control / "word").read_bytes() == b"g"
    assert stat.S_IMODE((control / "word").stat().st_mode) == 0o644, "the job's user has to read it"
    assert not (control / "word.new").exists()
    assert b"\0filegate=1\0" in (control / "job").read_bytes()
    world.finish(0, 3)
    world.run_for(3.0)
    assert world.jobs()[0][2:6] == ("failed", 1, 3, "exit")
    Promises(world).finish_all()


def test_the_file_is_not_there_before_the_job_may_run(world: World) -> None:
    world.armed = ("running-committed", 1)
    submit(world)
    (control,) = world.paths.attempts.iterdir()
    assert world.deaths == 1
    assert not (control / "word").exists()


def test_the_policy_of_the_sandboxs_own_cgroup_does_not_end_it(world: World) -> None:
    world.engine.extra = frozenset({0, 1})
    submit(world)
    assert len(world.running()) == 1


@pytest.mark.parametrize("point", [name for name in POINTS if name not in ("cancel-committed", "container-removed")])
def test_a_server_that_is_killed_anywhere_lets_it_go_once(world: World, point: str) -> None:
    world.armed = (point, 1)
    submit(world)
    for _ in range(2):
        world.run_for(5.0)
        world.finish(0, 0)
    world.run_for(5.0)
    assert world.deaths == 1
    assert [row[2] for row in world.jobs()] == ([] if point == "submission-received" else ["succeeded"])
    Promises(world).check()
    Promises(world).finish_all()
