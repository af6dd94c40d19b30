"""The whole service through thousands of random events, every promise checked after each.

The course is the same each time; GPUJOBS_SEED chooses another, GPUJOBS_SOAK=1 goes through hundreds of thousands of
events. A failure is shrunk to the few events that lead to it and printed as a program.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from gpujobs.service.faults import POINTS
from tests.contract.promises import Promises
from tests.contract.world import KEEP_ENDED, Settings, World

SEED = int(os.environ.get("GPUJOBS_SEED", "20261124"))
SOAK = bool(os.environ.get("GPUJOBS_SOAK"))
EXAMPLES = 2000 if SOAK else 60
STEPS = 120

counts = {"steps": 0, "examples": 0, "turns": 0, "deaths": 0, "jobs": 0}

picks = st.integers(0, 40)
methods = st.sampled_from(["create", "start", "inspect", "kill", "remove", "containers", "granted"])
forgeries = st.sampled_from(["", "", "labels", "name", "name and labels", "in its place", "copied", "other server"])

submissions = st.fixed_dictionaries(
    {
        "user": st.integers(0, 4),
        "gpus": st.sampled_from([1, 0, 1, 2, 3, 8]),
        "elements": st.sampled_from([1, 1, 1, 3]),
        "image": st.sampled_from(["local", "local", "local", "remote", "missing"]),
        "signal": st.sampled_from(["obeys", "handles", "ignores"]),
        "time_limit": st.sampled_from([None, None, None, 20.0]),
        "volume": st.booleans(),
        "secret": st.booleans(),
    }
)


class Machine(RuleBasedStateMachine):
    """Everything that people do and that befalls the server, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None
        self.failed = False

    @initialize(number=st.integers(0, 2**32 - 1))
    def begin(self, number: int) -> None:
        self.world = World(number)
        self.promises = Promises(self.world)
        self.world.run_for(1.0)

    @property
    def w(self) -> World:
        assert self.world is not None
        return self.world

    @rule(files=st.lists(submissions, min_size=1, max_size=5))
    def submit(self, files: list[dict[str, object]]) -> None:
        for keys in files:
            self.w.submit(**keys)  # type: ignore[arg-type]

    @rule(seconds=st.sampled_from([0.02, 0.3, 1.0, 3.0, 12.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.w.run_for(seconds)

    @rule(turns=st.integers(1, 30))
    def a_little_happens(self, turns: int) -> None:
        self.w.run_turns(turns)

    @rule(codes=st.lists(st.sampled_from([0, 0, 1, 3, 127, 137, 255]), min_size=1, max_size=6), pick=picks)
    def programs_end(self, codes: list[int], pick: int) -> None:
        for code in codes:
            self.w.finish(pick, code)

    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        self.w.cancel(pick)

    @rule(turns=st.integers(0, 12), lose=st.booleans())
    def the_server_is_killed(self, turns: int, lose: bool) -> None:
        if turns:
            self.w.run_turns(turns)
        if self.w.service is not None:
            self.w.kill(lose=lose)

    @rule(point=st.sampled_from(sorted(POINTS)), count=st.integers(1, 2))
    def the_server_will_be_killed(self, point: str, count: int) -> None:
        self.w.armed = (point, count)

    @rule(keep=st.sampled_from([0.0, 5.0, KEEP_ENDED]))
    def the_server_is_restarted_with_other_settings(self, keep: float) -> None:
        self.w.settings = Settings(keep_ended=keep)
        if self.w.open:
            self.w.stop()

    @rule(method=methods, kind=st.sampled_from(["refused", "away before", "away after"]), times=st.integers(1, 3))
    def calls_will_fail(self, method: str, kind: str, times: int) -> None:
        for _ in range(times):
            self.w.fail_call(method, kind)

    @rule(what=st.sampled_from(["goes", "returns", "returns restarted", "slow", "hangs", "well"]))
    def the_engine(self, what: str) -> None:
        if what == "goes":
            self.w.engine_goes()
        elif what.startswith("returns"):
            self.w.engine_returns(live_restore=what == "returns")
        else:
            self.w.engine_lags(hangs=what == "hangs", slow=what == "slow")

    @rule(pick=picks, what=st.sampled_from(["removes", "starts"]))
    def somebody_meddles_with_a_container(self, pick: int, what: str) -> None:
        (self.w.remove_container if what == "removes" else self.w.start_ended)(pick)

    @rule(pick=picks, forged=forgeries, start=st.booleans())
    def somebody_makes_a_container(self, pick: int, forged: str, start: bool) -> None:
        self.w.make_stranger(pick, forged, start=start)

    @rule(pick=picks, remove=st.booleans())
    def a_stranger_ends(self, pick: int, remove: bool) -> None:
        self.w.end_stranger(pick, remove=remove)

    @rule(pick=picks, how=st.sampled_from(["lost", "back", "occupied", "free", "no driver", "driver"]))
    def a_gpu_changes(self, pick: int, how: str) -> None:
        self.w.change_gpu(pick, how)

    @rule(what=st.sampled_from(["silent", "stuck", "full", "well"]))
    def file_systems(self, what: str) -> None:
        self.w.hold_mount(held=what == "silent")
        self.w.stick_pins(stuck=what == "stuck")
        self.w.fill_disk(full=what == "full")

    @rule(user=st.integers(0, 4), how=st.sampled_from(["expires", "returns", "silent", "answers"]))
    def accounts(self, user: int, how: str) -> None:
        self.w.change_accounts(user, how)

    @rule(user=st.integers(0, 4))
    def somebody_looks(self, user: int) -> None:
        self.w.look(user)

    @rule(user=st.integers(0, 4), count=st.integers(2, 9))
    def every_gpu_is_asked_for(self, user: int, count: int) -> None:
        self.w.recover()
        self.w.run_for(6.0)
        for _ in range(count):
            self.w.submit(user=user, gpus=1, elements=1, image="local", signal="obeys", time_limit=None, volume=False)
        self.w.run_for(2.0)

    @rule(user=st.integers(0, 4), turns=st.integers(1, 150))
    def a_start_is_cancelled(self, user: int, turns: int) -> None:
        self.w.recover()
        self.w.submit(user=user, gpus=1, elements=1, image="local", signal="ignores", time_limit=None, volume=False)
        self.w.run_turns(turns)
        self.w.cancel(-1)

    @rule()
    def all_is_well(self) -> None:
        self.w.heal()

    @invariant()
    def every_promise_holds(self) -> None:
        if self.world is not None:
            counts["steps"] += 1
            try:
                self.promises.check()
            except BaseException:
                self.failed = True
                raise

    def teardown(self) -> None:
        if self.world is None:
            return
        world, self.world = self.world, None
        try:
            if not self.failed:
                self.promises.finish_all()
        finally:
            counts["examples"] += 1
            counts["turns"] += world.loop.iterations
            counts["deaths"] += world.deaths
            counts["jobs"] += len(self.promises.ended)
            world.close()


@pytest.mark.timeout(3600 if SOAK else 1200)  # shrinking a failure takes minutes
def test_every_promise_holds_whatever_happens_in_whatever_order() -> None:
    print(f"GPUJOBS_SEED={SEED}")
    options = settings(
        max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), print_blob=True,
    )  # fmt: skip
    run_state_machine_as_test(seed(SEED)(Machine), settings=options)
    print(counts)
    assert counts["steps"] > EXAMPLES * STEPS * 0.6, counts
