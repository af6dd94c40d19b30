"""What the ledger promises, kept against the real SQLite: on disk before it is told, all or nothing, never guessed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings

from gpujobs.adapters import store as module
from gpujobs.adapters.store import QUERIES, Ledger, Store, migrate, migrations
from gpujobs.core.errors import Refused, Unavailable
from gpujobs.core.job import Allocation, Ended, Job, JobId, Pulling, Queued, Running, Starting, State, Stopping
from gpujobs.core.spec import GpuRequest, JobSpec
from tests.unit.values import owner, specs, states

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
ADA = owner()
SPEC = JobSpec(name="train", image="busybox", gpus=GpuRequest(count=2, max_count=2), environment=(("A", "1"),))
HELD = Allocation(gpus=("GPU-a", "GPU-b"), cpus=2.0, memory=2**30)
NOW = 1_700_000_000.25
SECONDS = 20.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with closing(Store(path)) as opened:
        yield opened


def run(work: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(SECONDS):
            return await work

    return asyncio.run(limited())


def change(store: Store, action: Callable[[Ledger], T]) -> T:
    return run(store.change(action))


def read(store: Store, query: Callable[[Ledger], T]) -> T:
    return run(store.read(query))


def submit(ledger: Ledger, elements: int = 0, spec: JobSpec = SPEC) -> list[Job]:
    """One job, or an array of so many elements."""
    indices: list[int | None] = list(range(elements)) if elements else [None]
    return ledger.submit(ADA, NOW, "job.yaml", "name: train", [(index, spec) for index in indices])


def begin(ledger: Ledger, job: Job, state: State, now: float = NOW) -> Job:
    """The job in that state, with the attempt that belongs to it."""
    changed = replace(job, state=state)
    ledger.set_state(changed)
    ledger.add_attempt(changed, f"gpujobs-x-{job.id}-1", f"nonce-{job.id}", HELD, "[]", now)
    return changed


def finish(ledger: Ledger, job: Job, ended_at: float) -> Job:
    ended = replace(job, state=Ended(outcome="succeeded", attempt=1, started_at=NOW, ended_at=ended_at, exit_code=0))
    ledger.set_state(ended)
    ledger.on_attempt("set_attempt_ended", job.id, 1, ended_at=ended_at, exit_code=0, reason="", message="")
    return ended


@contextmanager
def held_up(store: Store) -> Iterator[list[str]]:
    """Keep the writer busy until the block ends, so that what is asked within it becomes one group.

    Gives the statements that the writer runs afterwards.
    """
    busy, go_on = threading.Event(), threading.Event()
    statements: list[str] = []

    def wait(ledger: Ledger) -> None:
        busy.set()
        assert go_on.wait(SECONDS)
        ledger._connection.set_trace_callback(statements.append)

    thread = threading.Thread(target=change, args=(store, wait))
    thread.start()
    assert busy.wait(SECONDS)
    try:
        yield statements
    finally:
        go_on.set()
        thread.join()


async def queued(store: Store, *actions: Callable[[Ledger], Any]) -> list[Any]:
    return await asyncio.gather(*(store.change(action) for action in actions), return_exceptions=True)


def together(store: Store, *actions: Callable[[Ledger], Any]) -> tuple[list[Any], list[str]]:
    """Run changes as one group; gives what each was answered, and the statements that ran."""
    with held_up(store) as statements:
        outcome: list[Any] = []
        asking = threading.Thread(target=lambda: outcome.extend(run(queued(store, *actions))))
        asking.start()
        wait_until(lambda: store._inbox.qsize() == len(actions))
    asking.join()
    return outcome, statements


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(int(SECONDS / 0.005)):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it did not come about in time")


# -- group commit ---------------------------------------------------------------------------------------------


def test_changes_that_came_in_meanwhile_are_committed_as_one_group(store: Store) -> None:
    answers, statements = together(store, *[submit] * 40)
    assert sorted(job.id.number for (job,) in answers) == list(range(1, 41))
    ran = [statement.partition(" ")[0] for statement in statements]
    assert statements.count("COMMIT") == 2, "the one that was held up, and the group"
    assert ran.count("INSERT") == 80
    assert len(read(store, Ledger.active)) == 40


def test_a_group_is_bounded_and_nothing_of_what_is_above_is_left_out(store: Store) -> None:
    answers, statements = together(store, *[submit] * 600)
    assert sorted(job.id.number for (job,) in answers) == list(range(1, 601))
    assert 3 <= statements.count("COMMIT") <= 5


def test_a_failing_change_takes_nothing_of_its_group_with_it(store: Store) -> None:
    def writes_and_fails(ledger: Ledger) -> None:
        submit(ledger)
        ledger.set_meta("half", "done")
        raise KeyError("a mistake of its own")

    answers, _ = together(store, submit, writes_and_fails, lambda ledger: ledger.set_meta("after", "1"), submit)
    assert isinstance(answers[1], KeyError)
    assert [type(answer) for answer in answers] == [list, KeyError, type(None), list]
    assert read(store, lambda ledger: (ledger.meta("half"), ledger.meta("after"))) == (None, "1")
    assert len(read(store, Ledger.active)) == 2


def test_a_broken_constraint_fails_only_whoever_broke_it(store: Store) -> None:
    (job,) = change(store, submit)
    change(store, lambda ledger: begin(ledger, job, Starting(allocation=HELD, attempt=1)))

    def same_attempt_again(ledger: Ledger) -> None:
        begin(ledger, job, Starting(allocation=HELD, attempt=1))

    answers, _ = together(store, submit, same_attempt_again, submit)
    assert isinstance(answers[1], sqlite3.IntegrityError)
    assert [job.id.number for job in read(store, Ledger.active)] == [
        1,
        answers[0][0].id.number,
        answers[2][0].id.number,
    ]


def test_who_stops_waiting_for_a_change_stops_neither_the_writer_nor_the_others(store: Store) -> None:
    done = threading.Event()

    async def ask_and_leave() -> None:
        tasks = [asyncio.create_task(store.change(submit)) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        outcome = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(outcome[1], asyncio.CancelledError)
        assert [len(outcome[0]), len(outcome[2])] == [1, 1]
        done.set()

    with held_up(store):
        asking = threading.Thread(target=run, args=(ask_and_leave(),))
        asking.start()
        wait_until(lambda: store._inbox.qsize() == 3)
    asking.join()
    assert done.is_set()
    assert len(read(store, Ledger.active)) == 2, "what nobody waits for any more was not begun"
    assert change(store, submit)


def test_who_stops_waiting_for_a_change_under_way_leaves_it_whole(store: Store) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(ledger: Ledger) -> None:
        submit(ledger, elements=3)
        begun.set()
        assert go_on.wait(SECONDS)

    async def ask_and_leave() -> None:
        task = asyncio.create_task(store.change(slow))
        await asyncio.to_thread(begun.wait, SECONDS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    run(ask_and_leave())
    assert len(change(store, Ledger.active)) == 3


def test_what_has_come_in_is_written_before_the_store_closes(path: Path) -> None:
    async def ask_and_close() -> None:
        opened = Store(path)
        asked = [asyncio.create_task(opened.change(submit)) for _ in range(20)]
        await asyncio.sleep(0)
        await asyncio.to_thread(opened.close)
        await asyncio.gather(*asked)

    run(ask_and_close())
    with closing(Store(path)) as again:
        assert len(read(again, Ledger.active)) == 20


def test_what_was_answered_is_seen_by_the_next_read(store: Store) -> None:
    for number in range(1, 30):
        change(store, submit)
        assert len(read(store, Ledger.active)) == number


def test_the_disk_is_asked_before_the_answer(store: Store) -> None:
    def pragma(ledger: Ledger) -> tuple[object, ...]:
        names = ("journal_mode", "synchronous", "foreign_keys", "trusted_schema")
        return tuple(ledger._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names)

    full = 2  # https://sqlite.org/pragma.html#pragma_synchronous
    assert change(store, pragma) == read(store, pragma) == ("wal", full, 1, 0)


def test_readers_cannot_write(store: Store) -> None:
    with pytest.raises(Unavailable, match="could not be used: attempt to write a readonly database"):
        read(store, submit)


def test_reading_holds_no_transaction_open_so_that_the_journal_can_be_emptied(store: Store, path: Path) -> None:
    change(store, lambda ledger: submit(ledger, elements=50))
    read(store, Ledger.active)
    with closing(sqlite3.connect(path)) as other:
        busy, _, _ = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert busy == 0
    assert path.with_name(path.name + "-wal").stat().st_size == 0


def test_only_the_server_can_read_the_ledgers_files(path: Path) -> None:
    before = os.umask(0)
    try:
        with closing(Store(path)) as opened:
            change(opened, submit)
            read(opened, Ledger.active)
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("state.sqlite", "state.sqlite-wal", "state.sqlite-shm"), 384)


# -- killed ---------------------------------------------------------------------------------------------------

WRITER = """
import asyncio, sys
from pathlib import Path
from gpujobs.adapters.store import Store
from tests.contract.test_store import submit

async def client(store):
    while True:
        jobs = await store.change(lambda ledger: submit(ledger, elements=7))
        print(jobs[0].id.number, flush=True)

async def main():
    store = Store(Path(sys.argv[1]))
    await asyncio.gather(*(client(store) for _ in range(8)))

asyncio.run(main())
"""


@pytest.mark.parametrize("answers", [1, 40, 400])
def test_nothing_that_was_answered_is_lost_when_the_writer_is_killed(path: Path, answers: int) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        told = [int(child.stdout.readline()) for _ in range(answers)]
        child.send_signal(signal.SIGKILL)
        told += [int(line) for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        assert child.wait() == -signal.SIGKILL
    with closing(Store(path)) as again:
        found = read(again, Ledger.active)
        assert read(again, lambda ledger: ledger._connection.execute("PRAGMA integrity_check").fetchall()[0][0]) == "ok"
        (new, *_) = change(again, submit)
    numbers = {job.id.number for job in found}
    assert set(told) <= numbers
    assert all(sum(job.id.number == number for job in found) == 7 for number in numbers), "an array is there as a whole"
    assert new.id.number > max(numbers), "no id is given twice"


# -- versions -------------------------------------------------------------------------------------------------


def newest() -> int:
    return migrations()[-1][0]


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_what_a_newer_gpujobs_wrote_is_refused_and_left_as_it_is(path: Path, journal: str) -> None:
    with closing(sqlite3.connect(path)) as newer:
        newer.execute(f"PRAGMA journal_mode={journal}")
        newer.executescript(
            f"CREATE TABLE future (x); INSERT INTO future VALUES (1); PRAGMA user_version={newest() + 1}"
        )
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(Refused, match=rf"newer gpujobs \(schema {newest() + 1}, this one knows {newest()}\)") as caught:
        Store(path)
    assert "GPUJOBS_STATE" in caught.value.hint
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def schema(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    rows = connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name").fetchall()
    return [(row[0], row[1]) for row in rows]


def test_migrations_are_numbered_from_one_without_a_gap() -> None:
    assert [number for number, _ in migrations()] == list(range(1, newest() + 1))


@pytest.mark.parametrize("start", range(newest() + 1))
def test_from_every_earlier_version_the_same_schema_comes_about(path: Path, start: int) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        for number, text in migrations()[:start]:
            old.executescript(f"BEGIN;{text};PRAGMA user_version={number};COMMIT;")
    with closing(Store(path)) as opened:
        assert change(opened, submit)
    with closing(sqlite3.connect(path)) as after, closing(sqlite3.connect(":memory:", isolation_level=None)) as scratch:
        migrate(scratch)
        assert schema(after) == schema(scratch)
        assert after.execute("PRAGMA user_version").fetchone() == (newest(),)


def test_migrating_again_changes_nothing(path: Path) -> None:
    with closing(Store(path)) as opened:
        change(opened, submit)
    with closing(Store(path)) as again:
        assert [job.id for job in read(again, Ledger.active)] == [JobId(1)]


def test_a_migration_that_fails_leaves_the_version_before_it_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Store(path)) as opened:
        change(opened, submit)
    broken = (newest() + 1, "CREATE TABLE half (x); INSERT INTO nowhere VALUES (1);")
    with monkeypatch.context() as patched:
        steps = [*migrations(), broken]
        patched.setattr(module, "migrations", lambda: steps)
        with pytest.raises(Unavailable, match="no such table: nowhere"):
            Store(path)
    with closing(Store(path)) as again:
        assert len(read(again, Ledger.active)) == 1
        assert ("half",) not in read(
            again, lambda ledger: [tuple(row) for row in ledger._connection.execute("SELECT name FROM sqlite_schema")]
        )


def test_every_table_is_strict(store: Store) -> None:
    tables = read(store, lambda ledger: [tuple(row) for row in ledger._connection.execute("PRAGMA table_list")])
    ours = {row[1]: row[5] for row in tables if not row[1].startswith("sqlite_")}
    assert ours
    assert set(ours.values()) == {1}


# -- disks ----------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(point: Path, size: str = "1m") -> Iterator[Path]:
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "small", point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)


def fill(directory: Path) -> Path:
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(directory).f_bavail == 0
    return ballast


def test_a_full_disk_is_told_in_plain_words_and_needs_nothing_but_space(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk, closing(Store(disk / "state.sqlite")) as store:
        change(store, submit)
        ballast = fill(disk)
        for _ in range(3):
            with pytest.raises(
                Unavailable, match=re.escape(f"nothing was written: the disk of {disk} is full")
            ) as caught:
                change(store, lambda ledger: submit(ledger, elements=500))
            assert "Free some space" in caught.value.hint
        assert [job.id.number for job in read(store, Ledger.active)] == [1], "what was there can still be read"
        ballast.unlink()
        (job,) = change(store, submit)
        assert [found.id for found in read(store, Ledger.active)] == [JobId(1), job.id]


def test_on_a_full_disk_everybody_of_a_group_is_told_and_nothing_of_it_is_kept(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk, closing(Store(disk / "state.sqlite")) as store:
        fill(disk)
        answers, _ = together(store, *[lambda ledger: submit(ledger, elements=50)] * 20)
        assert [type(answer) for answer in answers] == [Unavailable] * 20
        assert read(store, Ledger.active) == []


def test_a_ledger_cannot_be_made_on_a_full_disk_and_says_so(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        ballast = fill(disk)
        with pytest.raises(Unavailable, match=r"is full|No space left on device"):
            Store(disk / "state.sqlite")
        ballast.unlink()
        with closing(Store(disk / "state.sqlite")) as store:
            assert change(store, submit)


@pytest.mark.parametrize("magic", sorted(module._NETWORK_FILE_SYSTEMS))
def test_a_network_file_system_is_refused_by_its_name(path: Path, monkeypatch: pytest.MonkeyPatch, magic: int) -> None:
    monkeypatch.setattr(module, "_file_system_type", lambda directory: magic)
    name = module._NETWORK_FILE_SYSTEMS[magic]
    with pytest.raises(Refused, match=rf"the state directory {re.escape(str(path.parent))} is on {name}") as caught:
        Store(path)
    assert "local disk" in caught.value.hint
    assert not path.exists()


def test_the_kernel_is_asked_what_a_directory_lies_on(tmp_path: Path) -> None:
    tmpfs, proc = 0x01021994, 0x9FA0  # linux/magic.h
    assert module._file_system_type(Path("/proc")) == proc
    with small_disk(tmp_path / "disk") as disk:
        assert module._file_system_type(disk) == tmpfs


def test_a_state_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot be used: No such file or directory"):
        Store(tmp_path / "none" / "state.sqlite")


def test_a_damaged_ledger_is_told_and_left_alone(path: Path) -> None:
    path.write_bytes(b"this is no database, and long enough to be taken for one" * 100)
    before = path.read_bytes()
    with pytest.raises(Unavailable, match=r"the ledger .*state.sqlite could not be used: file is not a database"):
        Store(path)
    assert path.read_bytes() == before


# -- the statements -------------------------------------------------------------------------------------------


def test_every_statement_fits_the_schema_and_is_used(store: Store) -> None:
    def prepare(ledger: Ledger) -> None:
        for statement in QUERIES.values():
            names = dict.fromkeys(re.findall(r":(\w+)", statement), 0)
            ledger._connection.execute(f"EXPLAIN {statement}", names).fetchall()

    read(store, prepare)
    sources = "\n".join(file.read_text() for file in (ROOT / "gpujobs").rglob("*.py"))
    assert [name for name in QUERIES if f'"{name}"' not in sources] == []


@pytest.mark.parametrize(
    "name", ["active_jobs", "page_active", "next_expiry", "one_job", "submission_jobs", "job_attempts"]
)
def test_what_is_asked_often_walks_no_table(store: Store, name: str) -> None:
    def plan(ledger: Ledger) -> str:
        names = dict.fromkeys(re.findall(r":(\w+)", QUERIES[name]), 0)
        rows = ledger._connection.execute(f"EXPLAIN QUERY PLAN {QUERIES[name]}", names).fetchall()
        return "; ".join(row["detail"] for row in rows)

    assert re.search(r"USING .*(INDEX|PRIMARY KEY)", read(store, plan))


def test_ids_ascend_and_the_elements_of_an_array_share_one(store: Store) -> None:
    (first,) = change(store, submit)
    array = change(store, lambda ledger: submit(ledger, elements=3))
    (last,) = change(store, submit)
    assert [str(job.id) for job in (first, *array, last)] == ["1", "2_0", "2_1", "2_2", "3"]
    assert all(job.state == Queued() for job in array)
    assert [str(job.id) for job in read(store, lambda ledger: ledger.submission(2))] == ["2_0", "2_1", "2_2"]
    assert read(store, lambda ledger: ledger.submission(99)) == []


def test_one_job_is_found_by_its_id_and_nothing_by_another(store: Store) -> None:
    change(store, lambda ledger: submit(ledger, elements=2))
    found = read(store, lambda ledger: ledger.job(JobId(1, 1)))
    assert found is not None
    assert (found.owner, found.spec, found.submitted_at, found.state) == (ADA, SPEC, NOW, Queued())
    assert read(store, lambda ledger: (ledger.job(JobId(1)), ledger.job(JobId(1, 2)))) == (None, None)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=specs, state=states)
def test_any_job_in_any_state_comes_back_as_it_was(store: Store, spec: JobSpec, state: State) -> None:
    def write(ledger: Ledger) -> Job:
        (job,) = submit(ledger, spec=spec)
        changed = replace(job, state=state)
        ledger.set_state(changed)
        return changed

    written = change(store, write)
    assert read(store, lambda ledger: ledger.job(written.id)) == written
    listed = read(store, lambda ledger: [job.id for job in ledger.active()])
    assert (written.id in listed) is not isinstance(state, Ended)


def test_what_has_not_ended_is_listed_oldest_first_and_all_jobs_up_to_the_newest(store: Store) -> None:
    for _ in range(4):
        (job,) = change(store, submit)
    change(store, lambda ledger: finish(ledger, job, NOW))
    numbers = lambda jobs: [job.id.number for job in jobs]  # noqa: E731
    assert numbers(read(store, Ledger.active)) == [1, 2, 3]
    assert numbers(read(store, lambda ledger: ledger.page(every=False, limit=2))) == [1, 2]
    assert numbers(read(store, lambda ledger: ledger.page(every=True, limit=2))) == [3, 4]
    assert numbers(read(store, lambda ledger: ledger.page(every=True, limit=99))) == [1, 2, 3, 4]
    assert numbers(read(store, lambda ledger: ledger.page(every=True, limit=2, before=JobId(3)))) == [1, 2]


def test_a_page_begins_within_an_array_where_the_one_before_ended(store: Store) -> None:
    change(store, lambda ledger: submit(ledger, 3))
    change(store, submit)
    keys = lambda jobs: [str(job.id) for job in jobs]  # noqa: E731
    assert keys(read(store, lambda ledger: ledger.page(every=True, limit=2))) == ["1_2", "2"]
    assert keys(read(store, lambda ledger: ledger.page(every=True, limit=9, before=JobId(1, 2)))) == ["1_0", "1_1"]


def test_an_attempt_is_recorded_from_the_decision_to_its_removal(store: Store) -> None:
    (job,) = change(store, submit)
    started = change(store, lambda ledger: begin(ledger, job, Starting(allocation=HELD, attempt=1)))
    row = read(store, lambda ledger: ledger.attempt(job.id, 1))
    assert row is not None
    assert (row["name"], row["nonce"], row["container"], row["config"]) == ("gpujobs-x-1-1", "nonce-1", None, "")
    change(
        store,
        lambda ledger: ledger.on_attempt(
            "set_attempt_container", job.id, 1, config="c", container="id1", image="sha256:1", digest=None
        ),
    )
    change(store, lambda ledger: ledger.on_attempt("set_attempt_started", job.id, 1, started_at=NOW))
    change(store, lambda ledger: finish(ledger, started, NOW + 5))
    (row,) = read(store, lambda ledger: ledger.attempts(job.id))
    assert (row["container"], row["config"], row["started_at"], row["ended_at"], row["exit_code"]) == (
        "id1",
        "c",
        NOW,
        NOW + 5,
        0,
    )
    assert read(store, lambda ledger: ledger.attempt(job.id, 2)) is None


def test_what_may_still_have_a_container_is_kept_with_whether_it_is_active(store: Store) -> None:
    states_ = {
        1: Pulling(allocation=HELD, attempt=1),
        2: Running(allocation=HELD, attempt=1, started_at=NOW),
        3: Stopping(allocation=HELD, attempt=1, started_at=None, reason="cancelled", message=""),
    }
    for state in states_.values():
        (job,) = change(store, submit)
        change(store, lambda ledger, job=job, state=state: begin(ledger, job, state))
    kept = read(store, Ledger.kept)
    assert {row["number"]: (row["state"], row["active"]) for row in kept} == {
        1: ("pulling", 1),
        2: ("running", 1),
        3: ("stopping", 1),
    }
    change(store, lambda ledger: finish(ledger, replace(job, state=states_[3]), NOW))
    assert {row["number"]: row["active"] for row in read(store, Ledger.kept)} == {1: 1, 2: 1, 3: 0}
    change(store, lambda ledger: ledger.on_attempt("set_removed", JobId(3), 1))
    assert {row["number"] for row in read(store, Ledger.kept)} == {1, 2}


def test_an_earlier_attempt_of_an_active_job_is_not_active(store: Store) -> None:
    (job,) = change(store, submit)
    change(store, lambda ledger: begin(ledger, job, Running(allocation=HELD, attempt=1, started_at=NOW)))

    def again(ledger: Ledger) -> None:
        second = replace(job, state=Starting(allocation=HELD, attempt=2))
        ledger.set_state(second)
        ledger.add_attempt(second, "gpujobs-x-1-2", "nonce-2", HELD, "[]", NOW)

    change(store, again)
    assert {row["attempt"]: row["active"] for row in read(store, Ledger.kept)} == {1: 0, 2: 1}


def test_a_container_goes_when_it_was_kept_long_enough_and_its_log_is_stored(store: Store) -> None:
    assert read(store, Ledger.next_expiry) is None
    (job,) = change(store, submit)
    running = change(store, lambda ledger: begin(ledger, job, Running(allocation=HELD, attempt=1, started_at=NOW)))
    assert read(store, lambda ledger: (ledger.expired(1e12), ledger.next_expiry())) == ([], None)
    change(
        store,
        lambda ledger: ledger.on_attempt(
            "set_attempt_container", job.id, 1, config="c", container="id1", image="sha256:1", digest=None
        ),
    )
    change(store, lambda ledger: finish(ledger, running, NOW + 5))
    assert read(store, Ledger.next_expiry) is None
    assert read(store, lambda ledger: ledger.expired(1e12)) == [], "its log is not stored yet"
    assert [row["container"] for row in read(store, Ledger.open_logs)] == ["id1"]
    change(store, lambda ledger: ledger.on_attempt("close_log", job.id, 1))
    assert read(store, Ledger.open_logs) == []
    assert read(store, Ledger.next_expiry) == NOW + 5
    assert read(store, lambda ledger: ledger.expired(NOW + 5)) == []
    assert [row["name"] for row in read(store, lambda ledger: ledger.expired(NOW + 5.001))] == ["gpujobs-x-1-1"]
    change(store, lambda ledger: ledger.on_attempt("set_removed", job.id, 1))
    assert read(store, lambda ledger: (ledger.expired(1e12), ledger.next_expiry())) == ([], None)


def test_named_values_are_kept_and_can_be_set_again(store: Store) -> None:
    assert read(store, lambda ledger: ledger.meta("server")) is None
    for value in ("one", "two"):
        change(store, lambda ledger, value=value: ledger.set_meta("server", value))
        assert read(store, lambda ledger: ledger.meta("server")) == value
