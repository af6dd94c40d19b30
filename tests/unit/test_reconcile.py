"""The table of three truths, row by row, and whose GPUs a stranger's container holds."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from gpujobs import testing
from gpujobs.core import reconcile as module
from gpujobs.core.job import JobId
from gpujobs.core.reconcile import (
    Action,
    Adopt,
    Forget,
    Kill,
    Lost,
    Recorded,
    Resume,
    Seen,
    foreign,
    gpus_of,
    reconcile,
)

SERVER = "5e4ae7f0"
JOB = JobId(12)
NAME = f"gpujobs-{SERVER}-12-1"
ACTIVE = ("pulling", "starting", "running", "stopping")

MACHINE = testing.dgx_a100()
UUIDS = tuple(gpu.uuid for gpu in MACHINE.gpus)


def row(state: str, *, config: str = "c0ffee", active: bool = True) -> Recorded:
    return Recorded(job=JOB, attempt=1, name=NAME, nonce="n0nce", config=config, state=state, active=active)


def container(state: str, name: str = NAME, id: str = "id1", **labels: str) -> Seen:  # noqa: A002
    ours = {"gpujobs.server": SERVER, "gpujobs.nonce": "n0nce", "gpujobs.config": "c0ffee", "gpujobs.job": "12"}
    return Seen(id=id, name=name, state=state, labels={**ours, **{f"gpujobs.{key}": v for key, v in labels.items()}})


def actions(recorded: Recorded, *seen: Seen) -> list[Action]:
    return reconcile(SERVER, [recorded], seen)


# -- the table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["starting", "pulling"])
def test_starting_or_pulling_and_nothing_there_begins_the_attempt_again(state: str) -> None:
    assert actions(row(state)) == actions(row(state, config="")) == [Resume(JOB)]


@pytest.mark.parametrize("state", ["starting", "pulling"])
@pytest.mark.parametrize("config", ["", "c0ffee"])
def test_starting_or_pulling_and_our_container_created_is_adopted_by_its_name(state: str, config: str) -> None:
    assert actions(row(state, config=config), container("created")) == [Resume(JOB)]


def test_starting_and_our_container_running_is_adopted_to_check_its_devices_and_release_it() -> None:
    assert actions(row("starting"), container("running")) == [Adopt(JOB, "id1")]


@pytest.mark.parametrize("state", ["running", "stopping"])
@pytest.mark.parametrize("docker", ["running", "paused"])
def test_running_or_stopping_and_our_container_running_is_adopted(state: str, docker: str) -> None:
    assert actions(row(state), container(docker)) == [Adopt(JOB, "id1")]


@pytest.mark.parametrize("state", ACTIVE)
@pytest.mark.parametrize("docker", ["exited", "dead"])
def test_any_active_and_our_container_exited_is_adopted_and_its_end_collected(state: str, docker: str) -> None:
    assert actions(row(state), container(docker)) == [Adopt(JOB, "id1")]


def test_stopping_and_nothing_there_and_none_was_recorded_is_resumed_and_ends_as_asked() -> None:
    assert actions(row("stopping", config="")) == [Resume(JOB)]


@pytest.mark.parametrize("state", ["running", "stopping"])
def test_running_or_stopping_and_nothing_there_though_one_was_recorded_is_lost(state: str) -> None:
    assert actions(row(state)) == [Lost(JOB, f"its container {NAME} was removed by someone else")]


@pytest.mark.parametrize("state", ACTIVE)
@pytest.mark.parametrize("docker", ["created", "running", "exited"])
@pytest.mark.parametrize(
    "forged",
    [{"nonce": "guessed"}, {"config": "changed"}, {"server": "another"}, {"nonce": "guessed", "config": "changed"}],
)
def test_any_active_and_that_name_but_not_our_nonce_or_hash_is_lost_and_never_touched(
    state: str, docker: str, forged: dict[str, str]
) -> None:
    (action,) = actions(row(state), container(docker, **forged))
    assert isinstance(action, Lost)
    assert "is not the one that was made for it; it was left alone" in action.message


def test_ended_and_not_removed_and_nothing_there_is_forgotten() -> None:
    assert actions(row("succeeded", active=False)) == [Forget(JOB, 1)]


@pytest.mark.parametrize("docker", ["running", "paused"])
def test_ended_or_unknown_and_our_nonce_running_is_killed(docker: str) -> None:
    assert actions(row("failed", active=False), container(docker)) == [Kill("id1", NAME)]
    unknown = container(docker, name=f"gpujobs-{SERVER}-12-2", id="id2")
    assert actions(row("running"), container("running"), unknown) == [Adopt(JOB, "id1"), Kill("id2", unknown.name)]


def test_other_servers_or_made_by_hand_with_gpus_is_foreign_and_those_gpus_are_taken() -> None:
    other = replace(
        container("running", name="gpujobs-0ther-3-1", id="id3", server="0ther", job="3"),
        runtime="nvidia",
        visible=UUIDS[2],
    )
    by_hand = Seen(id="id9", name="notebook", state="running", labels={}, runtime="nvidia", visible="5")
    assert actions(row("running"), container("running"), other, by_hand) == [Adopt(JOB, "id1")]
    assert foreign(SERVER, [container("running"), other, by_hand], frozenset({"id1"}), MACHINE, "nvidia") == {
        UUIDS[2]: "job 3 of another gpujobs server (gpujobs-0ther-3-1)",
        UUIDS[5]: "a container that was not started by gpujobs (notebook)",
    }


def test_every_row_of_the_table_has_its_test_here() -> None:
    """A row's first two columns are words, in their order, of the name of the test that holds it."""
    table = (module.__doc__ or "").partition("─\n")[2].splitlines()
    rows = [re.split(r" {2,}", line.strip())[:-1] for line in table if line.startswith("    ")]
    assert len(rows) == 11
    names = [name.split("_") for name in globals() if name.startswith("test_")]
    for cells in rows:
        said = re.findall(r"[a-z]+", " ".join(cells).lower().replace("'", ""))
        assert any(_in_order(said, name) for name in names), f"no test says: {' '.join(said)}"


def _in_order(wanted: list[str], found: list[str]) -> bool:
    rest = iter(found)
    return all(word in rest for word in wanted)


# -- beside the table -----------------------------------------------------------------------------------------


def test_an_ended_attempts_container_that_stands_still_is_left_for_keep_ended() -> None:
    for docker in ("exited", "created", "dead"):
        assert actions(row("succeeded", active=False), container(docker)) == []


def test_an_ended_attempt_is_not_an_excuse_to_kill_somebody_elses_container_of_that_name() -> None:
    assert actions(row("succeeded", active=False), container("running", nonce="guessed")) == []
    assert actions(row("succeeded", active=False), container("running", config="changed")) == []


def test_a_container_with_our_servers_label_and_an_unknown_nonce_is_left_alone() -> None:
    assert actions(row("running"), container("running"), container("running", name="forged", nonce="guessed")) == [
        Adopt(JOB, "id1")
    ]


def test_another_servers_containers_are_never_touched() -> None:
    assert actions(row("running"), container("running"), container("running", name="x", id="id2", server="0ther")) == [
        Adopt(JOB, "id1")
    ]


def test_a_container_that_was_made_but_not_recorded_is_known_by_its_name_and_nonce_alone() -> None:
    assert actions(row("starting", config=""), container("created", config="whatever")) == [Resume(JOB)]


def test_each_attempt_is_judged_by_itself() -> None:
    first = replace(row("running", active=False), attempt=1)
    second = replace(row("running"), attempt=2, name=f"gpujobs-{SERVER}-12-2", nonce="n2")
    element = replace(row("pulling", config=""), job=JobId(13, 3), name=f"gpujobs-{SERVER}-13_3-1", nonce="n3")
    seen = [container("running", name=second.name, id="id2", nonce="n2")]
    assert reconcile(SERVER, [first, second, element], seen) == [
        Forget(JOB, 1),
        Adopt(JOB, "id2"),
        Resume(JobId(13, 3)),
    ]


def test_nothing_recorded_and_nothing_seen_needs_nothing() -> None:
    assert reconcile(SERVER, [], []) == []
    assert reconcile(SERVER, [], [Seen(id="x", name="notebook", state="running", labels={})]) == []


# -- which GPUs a container of somebody else can use -----------------------------------------------------------


def stranger(**more: object) -> Seen:
    return Seen(id="id9", name="notebook", state="running", labels={}, **{"runtime": "nvidia", **more})  # type: ignore[arg-type]


MIG = testing.mig_a100()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("all", UUIDS),
        ("0", UUIDS[:1]),
        ("1,3", (UUIDS[1], UUIDS[3])),
        (" 5 , 6", (UUIDS[5], UUIDS[6])),
        (UUIDS[4], (UUIDS[4],)),
        (f"{UUIDS[0]},all", UUIDS),
        ("void", ()),
        ("0,void", ()),
        ("none", ()),
        ("", ()),
        ("17", ()),
        ("GPU-of-another-machine", ()),
        ("nvidia.com/gpu=2", (UUIDS[2],)),
        (f"nvidia.com/gpu={UUIDS[7]}", (UUIDS[7],)),
        ("nvidia.com/gpu=all", UUIDS),
        ("0:1", (UUIDS[0],)),
        ("nvidia.com/gpu=3:0", (UUIDS[3],)),
        ("٣", ()),
    ],
)
def test_the_variable_is_read_by_the_rules_of_the_nvidia_runtime(visible: str, expected: tuple[str, ...]) -> None:
    assert gpus_of(stranger(visible=visible), MACHINE) == frozenset(expected)


def test_a_mig_device_stands_for_its_gpu() -> None:
    mig = MIG.gpus[1].mig[3]
    assert gpus_of(stranger(visible=mig.uuid), MIG) == {MIG.gpus[1].uuid}


def test_an_unset_variable_means_all_gpus_in_a_cuda_image_and_none_in_another() -> None:
    assert gpus_of(stranger(cuda_image=True), MACHINE) == frozenset(UUIDS)
    assert gpus_of(stranger(), MACHINE) == frozenset()


def test_under_another_runtime_the_variable_means_nothing() -> None:
    assert gpus_of(stranger(runtime="runc", visible="all", cuda_image=True), MACHINE) == frozenset()


def test_the_runtimes_name_is_a_setting() -> None:
    assert gpus_of(stranger(runtime="nvidia-legacy", visible="all"), MACHINE, "nvidia-legacy") == frozenset(UUIDS)


def test_device_files_count_under_any_runtime_and_by_their_minor() -> None:
    moved = replace(MACHINE, gpus=(replace(MACHINE.gpus[0], minor=9), *MACHINE.gpus[1:]))
    seen = stranger(runtime="runc", devices=("/dev/nvidia9", "/dev/nvidiactl", "/dev/null", "/dev/nvidia3"))
    assert gpus_of(seen, moved) == {UUIDS[0], UUIDS[3]}


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        (((-1, ()),), UUIDS),
        (((2, ()),), UUIDS[:2]),
        (((0, ()),), ()),
        (((0, (UUIDS[6], "1")),), (UUIDS[6], UUIDS[1])),
        (((0, ("all",)),), UUIDS),
        (((0, ("nvidia.com/gpu=all",)),), UUIDS),
        (((0, ("nvidia.com/gpu=4", "vendor.com/net=1")),), (UUIDS[4],)),
        (((1, ()), (0, (UUIDS[5],))), (UUIDS[0], UUIDS[5])),
    ],
)
def test_device_requests_beat_the_variable(
    requests: tuple[tuple[int, tuple[str, ...]], ...], expected: tuple[str, ...]
) -> None:
    assert gpus_of(stranger(runtime="runc", visible="void", requests=requests), MACHINE) == frozenset(expected)


@pytest.mark.parametrize(
    ("state", "holds"),
    [
        ("running", True),
        ("paused", True),
        ("restarting", True),
        ("created", True),
        ("exited", False),
        ("dead", False),
        ("removing", False),
    ],
)
def test_a_container_holds_its_gpus_as_long_as_it_runs_or_may_be_started_at_any_moment(state: str, holds: bool) -> None:
    seen = replace(stranger(visible="0"), state=state)
    assert bool(foreign(SERVER, [seen], frozenset(), MACHINE, "nvidia")) is holds


def test_our_own_containers_are_nobodys_elses() -> None:
    ours = replace(stranger(visible="all"), id="id1")
    assert foreign(SERVER, [ours], frozenset({"id1"}), MACHINE, "nvidia") == {}


def test_a_container_with_our_servers_label_that_the_ledger_does_not_know_is_a_strangers() -> None:
    forged = replace(stranger(visible="0"), labels={"gpujobs.server": SERVER, "gpujobs.job": "1"})
    assert foreign(SERVER, [forged], frozenset(), MACHINE, "nvidia") == {
        UUIDS[0]: "a container that was not started by gpujobs (notebook)"
    }


def test_on_a_gpu_that_several_hold_the_first_is_named() -> None:
    first, second = stranger(visible="0"), replace(stranger(visible="0,1"), id="id8", name="other")
    taken = foreign(SERVER, [first, second], frozenset(), MACHINE, "nvidia")
    assert taken[UUIDS[0]].endswith("(notebook)")
    assert taken[UUIDS[1]].endswith("(other)")
