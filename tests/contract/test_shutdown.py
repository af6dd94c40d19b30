"""A server that stops leaves nothing at work behind it, and one that starts takes up each thing once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from gpujobs.core.spec import JobSpec
from gpujobs.service.tidy import Tidy
from tests.contract.world import World


@pytest.fixture
def world() -> Iterator[World]:
    found = World(seed=1)
    yield found
    found.close()


@pytest.mark.parametrize("restarted", [False, True])
def test_a_cancelled_program_gets_the_stop_signal_of_its_image(world: World, restarted: bool) -> None:
    world.run_for(5.0)
    (image,) = world.there
    world.engine.configs = {f"sha256:{image}": {"StopSignal": "SIGUSR1"}}
    heard: list[str] = []
    world.engine.on_signal = lambda _, signal: heard.append(signal)  # type: ignore[func-returns-value]
    world.submit(user=0, gpus=1, elements=1, image=image, signal="obeys", time_limit=None, volume=False)
    world.run_for(30.0)
    if restarted:
        world.kill()
        world.run_for(30.0)
    world.cancel(0)
    world.run_for(4.0)
    assert heard == ["SIGUSR1"]
    world.run_for(30.0)
    assert world.running() == []
    assert world.wrong == []


def test_an_image_that_has_no_command_where_the_job_file_has_none_is_named_as_the_reason(world: World) -> None:
    world.run_for(5.0)
    assert world.service is not None
    (image,) = world.there
    submission = world.service.submit(world.people[0], [("f.yaml", "", [(None, JobSpec(name="job", image=image))])])
    world.loop.create_task(submission)
    world.run_for(10.0)
    ((state, data),) = world.ledger.execute("SELECT state, data FROM jobs")
    assert (state, json.loads(data)["reason"]) == ("failed", "image")
    assert "has no command of its own" in json.loads(data)["message"]


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


def test_a_container_that_went_while_no_server_looked_has_its_end_and_its_log_finished_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_pins = Tidy.drop_pins

    async def slowly(self: Tidy) -> None:
        await asyncio.sleep(5.0)
        await drop_pins(self)

    world.run_for(5.0)
    image = next(iter(world.there))
    world.submit(user=0, gpus=1, elements=1, image=image, signal="obeys", time_limit=None, volume=False)
    world.run_for(30.0)
    assert len(world.running()) == 1
    assert world.service is not None
    logs = type(world.service.logs)
    finish, finished = logs.finish, []

    async def counted(self: object, *key: object) -> None:
        finished.append(key)
        await asyncio.sleep(10.0)
        await finish(self, *key)  # type: ignore[arg-type]

    monkeypatch.setattr(Tidy, "drop_pins", slowly)
    monkeypatch.setattr(logs, "finish", counted)
    world.kill()
    world.remove_container(0)
    world.run_for(30.0)
    assert len(finished) == 1
    assert world.wrong == []
