"""What must hold whatever happens, judged from what the Engine and the ledger's file show."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from gpujobs.adapters.store import Ledger
from gpujobs.core.explain import PASSING
from gpujobs.core.job import JobId
from gpujobs.service import rows as rows_of_api
from gpujobs.service.access import Asker
from gpujobs.testing.engine import FakeContainer
from tests.contract.world import HOST, KEEP_ENDED, KNOWN, Key, World, key_of, wrong_of_waiting

ENDED = ("succeeded", "failed", "cancelled")
SLOW = 90.0
"""Virtual seconds in which whatever is due must have been done; the longest hold of a mount is 30."""
MOMENT = 1.0
"""Virtual seconds after which a job that is on disk must have its place in the queue."""


class Promises:
    """The promises of one world, kept or not.

    Args:
        world: Where they are to hold.
    """

    def __init__(self, world: World) -> None:
        self.w = world
        self.ended: dict[Key, tuple[Any, ...]] = {}
        self.decided: set[tuple[int, int, int]] = set()
        self._checks = 0
        self._idle_since: float | None = None
        self._passing: dict[JobId, float] = {}

    def check(self) -> None:
        """Everything that must hold at any moment."""
        self._checks += 1
        assert not self.w.wrong, "\n".join(self.w.wrong)
        rows = self.w.jobs()
        known = {(row[0], row[1]) for row in rows}
        for submission in self.w.submissions:
            assert submission.answered is None or known.issuperset(submission.answered), "an accepted job is lost"
        self._check_ended(rows)
        self._check_gpus()
        self._check_programs()
        self._check_secrets()
        if self.w.open and not (self.w.full or self.w.slow or self.w.engine.away or self.w.engine.hangs):
            self._check_limits()
            self._check_strays()
        if self.w.open and self.w.service is not None:
            self._check_reasons(rows)
        else:
            self._idle_since = None
            self._passing.clear()
        if self.w.serving is not None and self.w.serving.done() and not self.w.serving.cancelled():
            assert self.w.serving.exception() is None, repr(self.w.serving.exception())

    def _check_ended(self, rows: list[tuple[Any, ...]]) -> None:
        for number, index, state, attempt, code, reason, _ in rows:
            if state in ENDED:
                now, before = (state, attempt, code, reason), self.ended.get((number, index))
                if before is None:
                    self._check_end((number, index), now)
                    self.ended[number, index] = now
                assert before in (None, now), f"{number}_{index} ended twice"
                assert attempt <= 1, "a job was started again"
            else:
                assert (number, index) not in self.ended, f"{number}_{index} had ended and is {state}"

    def _check_end(self, key: Key, end: tuple[Any, ...]) -> None:
        """What is told of an end is what its container shows, and what somebody or its file asked for."""
        state, _, code, reason = end
        told = f"{key}: {end}"
        containers = self._containers(key)
        last = self.w.ledger.execute(
            "SELECT container FROM attempts WHERE (number, idx) = (?, ?) ORDER BY attempt DESC", key
        ).fetchone()
        assert code is None or [code] in [c.exits[:1] for c in containers if c.id == last[0]], f"not its code: {told}"
        ran = any(c.runs for c in containers)
        excuses = self.w.fate(key).excuses
        assert not ran or code is not None or "removed" in excuses, f"its code is not told: {told}"
        assert (state == "succeeded") == (reason == ""), told
        assert state != "succeeded" or (ran and code == 0), told
        assert reason != "exit" or (ran and code != 0), told
        assert (state == "cancelled") == (reason == "cancelled"), told
        assert state != "cancelled" or "cancelled" in excuses, f"nobody cancelled it: {told}"
        strangers = {stranger.container.id for stranger in self.w.strangers}
        alive = [c.name for c in containers if c.running and c.id not in strangers]
        assert not alive, f"it is told to have ended, and runs: {told}"

    def _containers(self, key: Key) -> list[FakeContainer]:
        return [c for c in self.w.engine.history if c.made_by == "server" and key_of(c) == key]

    def _check_gpus(self) -> None:
        """No GPU is given twice by the ledger, nor one that somebody else was seen to have."""
        held: dict[str, Any] = {}
        waiting = self._waiting_for_gpus()
        for number, index, attempt, allocation, decided in self.w.ledger.execute(
            "SELECT number, idx, a.attempt, allocation, decided_at FROM attempts a JOIN jobs j USING (number, idx) "
            "WHERE j.active = 1 AND j.state <> 'queued' AND a.attempt = j.attempt"
        ):
            held_by_it = json.loads(allocation)
            gpus = held_by_it.get("gpus") or ()
            if gpus and (number, index, attempt) not in self.decided:
                passed = [key for key in waiting if key < (number, index)]
                assert not passed, f"{number}_{index} has passed {passed}"
            for uuid in gpus:
                assert uuid not in held, f"{uuid} is given to {number}_{index} and to {held[uuid]}"
                held[uuid] = f"{number}_{index}"
            if (number, index, attempt) in self.decided:
                continue
            self.decided.add((number, index, attempt))
            at = decided - self.w.clock.offset
            if gpus:
                share = int(HOST.memory * 0.9 * len(gpus) / len(self.w.uuids))
                assert held_by_it["memory"] == share, f"{number}_{index} was given {held_by_it['memory']} bytes"
            for uuid in gpus:
                since, trouble = self.w.gpu_troubles.get(uuid, (0.0, ""))
                assert not trouble or at < since + 1.0, f"{number}_{index} was given {uuid}, which is {trouble}"
            for stranger in self.w.strangers:
                prompt = not (self.w.engine.away or self.w.engine.hangs or self.w.slow)
                known = prompt and at > max(stranger.since, self.w.troubled) + KNOWN
                taken = stranger.container.gpus & set(gpus)
                if known and taken and not stranger.container.gone and stranger.container.status != "exited":
                    raise AssertionError(f"{number}_{index} was given {taken}, which {stranger.container.name} has")

    def _waiting_for_gpus(self) -> list[Key]:
        """The accepted jobs with GPUs that wait, and whose accounts are well."""
        if self.w.accounts_troubled:
            return []
        accepted = {key for submission in self.w.submissions for key in submission.answered or ()}
        found = self.w.ledger.execute(
            "SELECT number, idx FROM jobs WHERE state = 'queued' AND json_extract(spec, '$.gpus.count') > 0"
        ).fetchall()
        return [key for key in found if key in accepted]

    def _check_programs(self) -> None:
        ran: dict[Key, int] = {}
        for container in self.w.engine.history:
            if container.made_by == "server":
                key = key_of(container)
                ran[key] = ran.get(key, 0) + container.runs
                assert ran[key] <= 1, f"the program of {key} ran twice"

    def _check_secrets(self) -> None:
        """A program that ran was handed its own submission's secrets, and no request to the Engine had any."""
        for container in self.w.engine.history:
            if container.made_by == "server" and container.runs:
                (text,) = self.w.ledger.execute(
                    "SELECT spec FROM jobs WHERE number = ? AND idx = ?", key_of(container)
                ).fetchone()
                named = [secret["environment"] for secret in json.loads(text).get("secrets", ())]
                value = b"hunter2 of %s" % named[0].encode() if named else b""
                assert container.secrets == (b"key\0\0%d\0%s\0" % (len(value), value) if named else None)
                assert "hunter2 of" not in json.dumps(container.request)

    def _check_limits(self) -> None:
        """A time limit ends what runs, where the Engine has answered for long enough."""
        world = self.w
        for number, index, started, limit in world.ledger.execute(
            "SELECT number, idx, started_at, json_extract(spec, '$.time_limit') FROM jobs "
            "WHERE active = 1 AND started_at IS NOT NULL AND json_extract(spec, '$.time_limit') IS NOT NULL"
        ):
            due = max(started - world.clock.offset + limit, world.troubled) + SLOW
            assert world.loop.time() < due, f"{number}_{index} runs on beyond its time limit"

    def _check_strays(self) -> None:
        """What bears the secret of an attempt and stands for none is ended: started by hand, or copied."""
        kept = {row[0] for row in self.w.ledger.execute("SELECT nonce FROM attempts WHERE removed = 0")}
        for stranger in self.w.strangers:
            container = stranger.container
            if container.running and container.labels.get("gpujobs.nonce") in kept:
                due = max(stranger.since, self.w.troubled) + SLOW
                assert self.w.loop.time() < due, f"{container.name} runs on without a job"

    def _check_reasons(self, rows: list[tuple[Any, ...]]) -> None:
        """Every job that waits by the ledger has a reason at any moment, and none is told for long to be on its way."""
        waiting = [JobId.of_key(row[0], row[1]) for row in rows if row[2] == "queued"]
        if not waiting:
            self._idle_since = None
            self._passing.clear()
            return
        assert self.w.service is not None
        explainer = self.w.service.explainer()
        next_one = False
        for job_id in {waiting[0], waiting[-1], waiting[self._checks % len(waiting)]}:
            job = Ledger(self.w.ledger_rows).job(job_id)
            assert job is not None
            told = rows_of_api.row(self.w.service, job, explainer, Asker(job.owner, admin=False))
            assert not wrong_of_waiting(told), wrong_of_waiting(told)
            next_one = next_one or told["message"] == "it starts next"
            if told["message"] != PASSING.message:
                self._passing.pop(job_id, None)
                continue
            since = self._passing.setdefault(job_id, self.w.loop.time())
            assert self.w.loop.time() < since + MOMENT, f"{job_id} has no place in the queue"
        if not next_one or self.w.full:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = self.w.loop.time()
        else:
            assert self.w.loop.time() < self._idle_since + SLOW, f"{waiting[0]} could start, and nothing happens"

    # -- the end -----------------------------------------------------------------------------------------------

    def finish_all(self) -> None:
        """When all is well, everything ends as it should."""
        self.w.heal()
        for _ in range(400):
            self.w.run_for(2.0)
            self.check()
            while self.w.running():
                self.w.finish(0, self.w.random.choice((0, 0, 3, 255)))
            if self.w.open and all(row[2] in ENDED for row in self.w.jobs()):
                break
        self.w.run_for(40.0)
        self.check()
        left = [row for row in self.w.jobs() if row[2] not in ENDED]
        assert not left, f"these never end: {left}, {[self._note(row) for row in left]}"
        alive = [c.name for c in self.w.engine.containers.values() if c.made_by == "server" and c.running]
        assert not alive, f"these run although their jobs have ended: {alive}"
        for row in self.w.jobs():
            self._check_outcome(row)
        self._check_turns()
        self._check_logs()
        self._check_whole_machine()
        self.w.run_for(KEEP_ENDED + 3700.0)
        self.w.run_for(3700.0)
        self.check()
        assert not self.w.engine.containers, f"left behind: {[c.name for c in self.w.engine.containers.values()]}"
        assert not self.w.pins, f"pins left behind: {self.w.pins}"
        assert not list(self.w.paths.attempts.iterdir()), "control directories are left behind"
        assert not list((self.w.paths.state / "secrets").iterdir()), "secrets of jobs that have ended are left behind"

    def _note(self, row: tuple[Any, ...]) -> str:
        return "" if self.w.service is None else self.w.service.note_of(JobId.of_key(row[0], row[1]))

    def _check_outcome(self, row: tuple[Any, ...]) -> None:
        number, index, state, _, code, reason, _ = row
        fate = self.w.fate((number, index))
        ran = next((c for c in self._containers((number, index)) if c.runs), None)
        told = f"{row}, {fate}"
        if not fate.excuses and not self._excused(row):
            assert ran is not None, f"it never ran: {told}"
            assert code == ran.exits[0] == fate.code, told
            assert state == ("succeeded" if code == 0 else "failed"), told
            assert reason == ("" if code == 0 else "exit"), told

    def _check_turns(self) -> None:
        """Of those decided at once, programs begin in the order of the queue, where nothing of their own holds them."""
        if self.w.accounts_troubled:
            return
        begun = self.w.ledger.execute(
            "SELECT decided_at, number, idx, a.started_at FROM attempts a JOIN jobs j USING (number, idx) "
            "WHERE a.started_at IS NOT NULL AND json_extract(j.spec, '$.gpus.count') > 0 "
            "AND json_extract(j.spec, '$.image') = 'local' AND json_array_length(j.spec, '$.volumes') IS NOT 1 "
            "ORDER BY decided_at, number, idx"
        ).fetchall()
        for first, second in pairwise(begun):
            if first[0] == second[0]:
                assert first[3] <= second[3], f"{second} began before {first}"

    def _excused(self, row: tuple[Any, ...]) -> bool:
        reason, message = row[5], row[6]
        if reason == "time-limit" or (reason == "image" and "no image missing" in message):
            return True
        if "the Docker Engine was stopped or restarted" in message and self.w.engine.outages:
            return row[4] in (137, 143, 255)  # how Engines end containers: by the code alone it cannot be told apart
        words = ("server error", "the Engine did not make its container", "its container did not start")
        return (self.w.refused_next and any(word in message for word in words)) or reason == "gpu-lost"

    def _check_logs(self) -> None:
        """What programs wrote is stored, where the container was there to be read."""
        for container in self.w.engine.history:
            key = key_of(container) if container.made_by == "server" else None
            if key is None or not container.runs or "removed" in self.w.fate(key).excuses:
                continue
            log = self.w.logs.get((JobId.of_key(*key), 1))
            assert log is not None, f"{container.name} has no log"
            written = [record for record in container.output if record in log.records]
            assert written == container.output, f"{container.name}: {log.records} of {container.output}"
        still = self.w.ledger.execute("SELECT number, idx FROM attempts WHERE log_closed = 0").fetchall()
        assert not still, f"logs that are never closed: {still}, {self.w.tasks()}"

    def _check_whole_machine(self) -> None:
        """A job that needs every GPU runs: nothing is held by anybody any more."""
        self.w.submit(user=0, gpus=len(self.w.uuids), elements=1, image="local", signal="obeys", time_limit=None,
                    volume=False)  # fmt: skip
        self.w.run_for(SLOW)
        running = self.w.running()
        assert len(running) == 1, f"{self.w.jobs()[-1]}, {self.w.service and self.w.service.view().avoid}"
        assert running[0].gpus == frozenset(self.w.uuids)
        self.w.finish(0, 0)
        self.w.run_for(10.0)
        self.check()
        assert self.w.jobs()[-1][2] == "succeeded", self.w.jobs()[-1]
