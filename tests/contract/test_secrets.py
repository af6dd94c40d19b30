"""Secrets through a whole service: handed to the init, kept while they are needed, and nowhere else."""

from __future__ import annotations

import base64
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpujobs.core.errors import GpujobsError, Refused, Unavailable
from gpujobs.core.secrets import TOTAL_MAX, VALUE_MAX, Secret
from gpujobs.core.spec import JobSpec
from gpujobs.service.faults import POINTS
from tests.contract.promises import Promises
from tests.contract.world import ENDED, World

VALUE = b"hunter2 of KEY0"
SECRET = re.compile(rb"hunter2 of|" + base64.b64encode(VALUE)[:12])


@pytest.fixture
def world() -> Iterator[World]:
    found = World(seed=1)
    found.engine.latency = lambda: 0.0
    found.run_for(1.0)
    yield found
    found.close()


def submit(world: World, *, gpus: int = 1, elements: int = 1, secret: bool = True) -> None:
    world.submit(
        user=0, gpus=gpus, elements=elements, image="local", signal="obeys", time_limit=None, volume=False,
        secret=secret,
    )  # fmt: skip


def kept(world: World) -> list[Path]:
    return sorted((world.paths.state / "secrets").iterdir())


def found_in(world: World) -> list[str]:
    """The files of the state directory in which a value is, in any form."""
    files = (path for path in world.paths.state.rglob("*") if path.is_file())
    return sorted(str(p.relative_to(world.paths.state)) for p in files if SECRET.search(p.read_bytes()))


def test_they_wait_with_the_job_in_one_file_for_the_servers_account_alone(world: World) -> None:
    submit(world, gpus=8, secret=False)
    submit(world)
    world.run_for(3.0)
    (file,) = kept(world)
    assert found_in(world) == [f"secrets/{file.name}"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_the_init_is_handed_them_and_the_engine_is_not(world: World) -> None:
    submit(world)
    world.run_for(3.0)
    (container,) = world.running()
    assert container.secrets == b"key\0\0" + b"15\0" + VALUE + b"\0"
    options = container.request["HostConfig"]["Tmpfs"]["/run/secrets"]
    assert set(options.split(",")) >= {"nosuid", "nodev", "noexec", "uid=5001", "gid=5001", "mode=0700"}
    file = world.paths.attempts / container.name / "secrets"
    assert (file.stat().st_uid, stat.S_IMODE(file.stat().st_mode)) == (5001, 0o400)
    Promises(world).check()


def test_nothing_of_them_is_left_when_the_job_has_ended(world: World) -> None:
    submit(world)
    world.run_for(3.0)
    assert len(found_in(world)) == 2
    world.finish(0, 0)
    world.run_for(3.0)
    assert world.jobs()[0][2] == "succeeded"
    assert found_in(world) == kept(world) == []
    Promises(world).finish_all()


def test_a_job_that_is_cancelled_before_it_ran_leaves_none(world: World) -> None:
    submit(world, gpus=8, secret=False)
    submit(world)
    world.run_for(1.0)
    world.cancel(1)
    world.run_for(3.0)
    assert world.jobs()[1][2] == "cancelled"
    assert found_in(world) == []


def test_an_array_keeps_them_until_its_last_element_has_ended(world: World) -> None:
    submit(world, elements=3)
    world.run_for(3.0)
    for _ in range(2):
        world.finish(0, 0)
        world.run_for(3.0)
        assert len(kept(world)) == 1
    world.finish(0, 0)
    world.run_for(3.0)
    assert found_in(world) == []


@pytest.mark.parametrize("point", [name for name in POINTS if name not in ("cancel-committed", "container-removed")])
def test_a_server_that_is_killed_anywhere_delivers_them_and_leaves_none(world: World, point: str) -> None:
    world.armed = (point, 1)
    submit(world)
    world.run_for(5.0)
    for code in (0, 0):
        world.run_for(5.0)
        world.finish(0, code)
    world.run_for(5.0)
    assert world.deaths == 1
    assert all(row[2] == "succeeded" for row in world.jobs()), world.jobs()
    assert len(world.jobs()) == (0 if point == "submission-received" else 1)
    assert found_in(world) == kept(world) == []
    Promises(world).finish_all()


def test_a_job_that_waits_over_a_restart_gets_them(world: World) -> None:
    submit(world, gpus=8, secret=False)
    submit(world)
    world.run_for(3.0)
    world.kill()
    world.run_for(3.0)
    world.finish(0, 0)
    world.run_for(3.0)
    (container,) = world.running()
    assert container.secrets is not None
    assert VALUE[:-1] in container.secrets


def test_a_file_that_belongs_to_no_submission_goes_at_the_next_start(world: World) -> None:
    submit(world)
    world.run_for(3.0)
    (mine,) = kept(world)
    (world.paths.state / "secrets" / "stray").write_bytes(VALUE)
    world.kill()
    world.run_for(1.0)
    assert kept(world) == [mine]


def test_a_submission_that_is_not_written_leaves_none(world: World) -> None:
    world.fill_disk(full=True)
    submit(world)
    world.run_for(3.0)
    assert "disk is full" in world.submissions[-1].refused
    assert kept(world) == []
    world.fill_disk(full=False)
    world.run_for(1.0)
    assert world.jobs() == []


def test_a_job_whose_secrets_are_gone_says_so_and_does_not_run(world: World) -> None:
    """As after a backup was restored, which has none."""
    submit(world, gpus=8, secret=False)
    submit(world)
    world.run_for(3.0)
    kept(world)[0].unlink()
    world.finish(0, 0)
    world.run_for(3.0)
    row = world.jobs()[1]
    assert (row[2], row[5]) == ("failed", "server")
    assert row[6] == "its secrets are not in the server's state any more. Submit it again."
    assert all(container.secrets is None for container in world.engine.history)


def ask(world: World, secrets: tuple[Secret, ...], values: list[dict[str, bytes]]) -> GpujobsError:
    assert world.service is not None
    spec = JobSpec(name="job", image="local", mem_limit=1 << 30, secrets=secrets)
    task = world.loop.create_task(world.service.submit(world.people[0], [("f", "", [(None, spec)])], values))
    world.run_for(1.0)
    error = task.exception()
    assert isinstance(error, GpujobsError)
    return error


@pytest.mark.parametrize(
    ("names", "values", "words"),
    [
        ("a", [], "the value of the secret a was not sent"),
        ("ab", [{"b": b"x"}], "the value of the secret a was not sent"),
        ("a", [{"a": b"x" * (VALUE_MAX + 1)}], "256 KiB"),
        ("abcde", [dict.fromkeys("abcde", b"x" * VALUE_MAX)], f"{TOTAL_MAX >> 20} MiB"),
    ],
)
def test_what_a_client_sends_in_spite_of_its_own_checks_is_refused(
    world: World, names: str, values: list[dict[str, bytes]], words: str
) -> None:
    error = ask(world, tuple(Secret(name=name, target=name, file="/k") for name in names), values)
    assert isinstance(error, Refused)
    assert words in str(error)
    assert kept(world) == []


def test_a_full_disk_is_told_and_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    error = ask(world, (Secret(name="a", target="a", file="/k"),), [{"a": b"x"}])
    assert isinstance(error, Unavailable)
    assert str(error) == "the secrets could not be stored: No space left on device"
    assert kept(world) == []


def test_a_job_with_secrets_is_not_run_again_without_them(world: World) -> None:
    submit(world)
    world.run_for(3.0)
    world.finish(0, 0)
    world.run_for(3.0)
    service = world.service
    assert service is not None

    async def rerun() -> None:
        await service.rerun(await service.named("1"), world.people[0])

    task = world.loop.create_task(rerun())
    world.run_for(1.0)
    error = task.exception()
    assert isinstance(error, Refused)
    assert str(error) == "job 1 has secrets, which are not kept for another job"
    assert [row[2] in ENDED for row in world.jobs()] == [True]
