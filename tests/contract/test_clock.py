"""Whoever sets the machine's clock ends no job early, gives none more time, and loses none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpujobs.adapters.clock import SteadyClock
from gpujobs.testing.time import VirtualClock
from tests.contract.promises import ENDED, Promises
from tests.contract.world import World

DAY = 86400.0


@pytest.fixture
def world() -> Iterator[World]:
    found = World(seed=1)
    found.run_for(5.0)
    yield found
    found.close()


def set_apart(world: World) -> VirtualClock:
    """Have the server's time made of a clock that can be set; returns that."""
    shown = VirtualClock(world.loop)
    world.kill()
    world.clock = SteadyClock(shown.now, world.loop.time)  # type: ignore[assignment]
    world.engine.clock = shown
    world.run_for(5.0)
    return shown


def submit(world: World, limit: float | None) -> None:
    world.submit(user=0, gpus=1, elements=1, image="local", signal="obeys", time_limit=limit, volume=False)


@pytest.mark.parametrize("step", [DAY, -DAY, 3600.0, -3600.0, -1.5])
def test_a_time_limit_is_of_the_time_that_has_passed_whatever_the_clock_shows(world: World, step: float) -> None:
    shown = set_apart(world)
    submit(world, 60.0)
    submit(world, None)
    world.run_for(30.0)
    shown.offset += step
    world.run_for(20.0)
    assert [row[2] for row in world.jobs()] == ["running", "running"]
    world.run_for(40.0)
    assert [(row[2], row[5]) for row in world.jobs()] == [("failed", "time-limit"), ("running", "")]
    assert world.wrong == []


def test_jobs_that_come_after_a_step_start_and_end_in_their_turn(world: World) -> None:
    shown = set_apart(world)
    for step in (DAY, -3 * DAY, 0.5, -0.5, 700 * DAY):
        submit(world, None)
        world.run_for(3.0)
        shown.offset += step
        submit(world, None)
        world.run_for(3.0)
        world.finish(0, 0)
    world.run_for(30.0)
    while world.running():
        world.finish(0, 0)
        world.run_for(5.0)
    rows = world.jobs()
    assert len(rows) == 10
    assert all(row[2] in ENDED for row in rows)
    starts = [start for (start,) in world.ledger.execute("SELECT started_at FROM jobs ORDER BY number")]
    assert starts == sorted(starts)
    Promises(world)._check_logs()
    assert world.wrong == []


def test_the_servers_time_begins_with_the_machines_and_then_passes_steadily() -> None:
    shown, passed = [1000.0], [7.0]
    clock = SteadyClock(lambda: shown[0], lambda: passed[0])
    assert clock.now() == 1000.0
    shown[0], passed[0] = 5.0, 9.5
    assert clock.now() == 1002.5
    assert SteadyClock(lambda: shown[0], lambda: passed[0]).now() == 5.0
