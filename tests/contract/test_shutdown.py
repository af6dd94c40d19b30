"""A server that is told to stop leaves nothing at work behind it: containers go on, its own tasks do not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.world import World


@pytest.fixture
def world() -> Iterator[World]:
    found = World(seed=1)
    yield found
    found.close()


def test_nothing_writes_to_a_log_once_the_server_has_let_go_of_it(world: World) -> None:
    world.run_for(5.0)
    image = next(iter(world.there))
    world.submit(user=0, gpus=1, elements=2, image=image, signal="obeys", time_limit=None, volume=False)
    world.run_for(30.0)
    assert len(world.running()) == 2
    assert world.service is not None
    world.loop.run_until_complete(world.service.shut_down())
    assert not [name for name in world.tasks() if name.startswith(("log ", "attempt "))], world.tasks()
    assert len(world.running()) == 2, "they run on"
    assert world.wrong == []
