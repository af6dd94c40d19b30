"""A job's way to its start, moment by moment: what is told while it waits, what it is given, what a cancel meets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import pytest

from gpujobs.core.errors import Refused
from gpujobs.core.ports import Pin
from tests.contract.promises import Promises
from tests.contract.world import HOST, World

TURNS = 40
"""More turns of the loop than it takes from a submission to a start."""


@pytest.fixture
def world() -> Iterator[World]:
    found = World(seed=1)
    found.run_for(5.0)
    yield found
    found.close()


def submit(world: World, gpus: int, elements: int = 1) -> None:
    world.submit(user=0, gpus=gpus, elements=elements, image="local", signal="obeys", time_limit=None, volume=False)


def test_a_job_has_a_reason_at_every_moment_from_the_disk_to_its_start(world: World) -> None:
    promises = Promises(world)
    world.random.randrange = lambda *_: 1  # type: ignore[method-assign]
    submit(world, gpus=8)
    submit(world, gpus=1, elements=3)
    waited = 0
    for _ in range(TURNS):
        world.run_turns(1)
        promises.check()
        waited += sum(row[2] == "queued" for row in world.jobs())
    assert waited > TURNS // 2


@pytest.mark.parametrize("turns", range(TURNS))
def test_whoever_asks_while_a_job_starts_is_told_a_reason_or_that_it_starts(world: World, turns: int) -> None:
    world.random.randrange = lambda *_: 1  # type: ignore[method-assign]
    world.lag = lambda: 0.01
    submit(world, gpus=1, elements=3)
    world.run_turns(turns)
    world.look(0)
    world.run_for(1.0)
    assert world.wrong == []


@pytest.mark.parametrize("turns", range(8, 112))
def test_a_job_that_is_cancelled_at_any_moment_of_its_start_does_not_run_on(world: World, turns: int) -> None:
    promises = Promises(world)
    world.engine.latency = lambda: 0.003
    world.lag = lambda: 0.01
    submit(world, gpus=1)
    world.run_turns(turns)
    world.cancel(-1)
    for _ in range(60):
        world.run_turns(1)
        promises.check()
    world.run_for(30.0)
    promises.check()
    assert [row[2] for row in world.jobs()] == ["cancelled"]
    assert not [c for c in world.engine.containers.values() if c.running]


@pytest.mark.parametrize("turns", range(8, 112, 3))
def test_a_cancel_that_is_on_disk_counts_whenever_the_server_dies_after_it(world: World, turns: int) -> None:
    promises = Promises(world)
    world.engine.latency = lambda: 0.003
    submit(world, gpus=1)
    world.run_turns(turns)
    world.cancel(-1)
    world.run_turns(3)
    world.kill()
    (recorded,) = [row[2] for row in world.jobs()]
    world.run_for(60.0)
    promises.check()
    ends = recorded in ("stopping", "cancelled")
    assert [row[2] for row in world.jobs()] == ["cancelled" if ends else "running"]


def test_a_job_that_waits_while_the_driver_is_away_at_a_restart_gets_its_own_share_of_the_memory(world: World) -> None:
    submit(world, gpus=8)
    world.run_for(5.0)
    submit(world, gpus=2)
    world.run_for(1.0)
    world.driver(there=False)
    world.kill()
    world.run_for(30.0)
    world.driver(there=True)
    world.run_for(5.0)
    assert [row[2] for row in world.jobs()] == ["running", "queued"]
    world.finish(0, 0)
    world.run_for(5.0)
    assert [row[2] for row in world.jobs()] == ["succeeded", "running"]
    (allocation,) = world.ledger.execute("SELECT allocation FROM attempts WHERE number = 2").fetchone()
    assert json.loads(allocation)["memory"] == int(HOST.memory * 0.9 * 2 / 8)


@pytest.mark.parametrize(("after", "told"), [(0.5, ("isolation", 125)), (None, ("isolation", None))])
def test_where_a_containers_processes_are_gone_the_engine_is_waited_for_a_moment(
    world: World, after: float | None, told: tuple[str, int | None]
) -> None:
    """An init that refuses has ended before the Engine says so: how it ended is told, not what was not found."""
    assert world.service is not None

    async def gone(_: int, __: Mapping[str, Pin]) -> None:
        if after is not None:
            (container,) = (c for c in world.engine.containers.values() if c.made_by == "server")
            world.loop.call_later(after, world.engine.end, container, 125)
        raise Refused("no such process")

    world.service.mounts.unseal = gone  # type: ignore[method-assign]
    submit(world, gpus=1)
    world.run_for(10.0)
    row = world.ledger.execute("SELECT state, reason, exit_code FROM jobs").fetchone()
    assert (row[0], row[1:]) == ("failed", told)
