"""A ledger of each schema version opens, is brought to the newest, and loses nothing; a newer one is left alone."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gpujobs.adapters import ledgercheck
from gpujobs.adapters.store import Store, migrations
from gpujobs.core.errors import Refused
from gpujobs.service import upkeep
from tests.compat.make import shown
from tests.e2e.harness import BUSYBOX, Place
from tests.integration.managed import Server, ask
from tests.lab import accounts, engine, images
from tests.lab.engine import Engine

HERE = Path(__file__).parent
VERSIONS = sorted(path.stem for path in HERE.glob("*.sqlite"))
NEWEST = migrations()[-1][0]
NOT_YET = {"0001": {"builds", "contexts"}, "0002": set()}
"""Tables that a version did not have."""


@pytest.fixture
def place() -> Iterator[Path]:
    found = Place()
    yield found.path
    found.remove()


def state_with(place: Path, content: bytes) -> Path:
    state = place / "state"
    state.mkdir(mode=0o700)
    (state / "state.sqlite").write_bytes(content)
    return state


def expected(version: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((HERE / f"{version}.json").read_text())
    return found


def test_there_is_a_ledger_of_every_schema_version() -> None:
    missing = {f"{number:04d}" for number, _ in migrations()} - set(VERSIONS)
    assert not missing, "python -m tests.compat.make"


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_what_its_version_wrote(version: str) -> None:
    with closing(sqlite3.connect(f"file:{HERE / version}.sqlite?mode=ro&immutable=1", uri=True)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (int(version),)
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        states = {state for (state,) in connection.execute("SELECT state FROM jobs")}
    assert not tables & NOT_YET.get(version, set())
    assert states == {"queued", "pulling", "starting", "running", "stopping", "succeeded", "failed", "cancelled"}


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_migrated_and_every_job_attempt_and_text_is_still_there(version: str, place: Path) -> None:
    content = (HERE / f"{version}.sqlite").read_bytes()
    path = state_with(place, content) / "state.sqlite"

    async def look() -> tuple[list[dict[str, Any]], int]:
        store = Store(path)
        found = await store.read(lambda ledger: ledger.page(every=True, limit=1000))
        attempts = await store.read(lambda ledger: sum(len(ledger.attempts(job.id)) for job in found))
        server = await store.read(lambda ledger: ledger.meta("server"))
        store.close()
        assert server == "c0ffee00"
        return shown(found), attempts

    jobs, attempts = asyncio.run(look())
    assert jobs == expected(version)
    with closing(sqlite3.connect(path)) as now, closing(sqlite3.connect(":memory:")) as before:
        before.deserialize(_without_log(content))
        assert now.execute("PRAGMA user_version").fetchone() == (NEWEST,)
        assert attempts == before.execute("SELECT count(*) FROM attempts").fetchone()[0] > 0
        for table in ("submissions", "meta", "attempts"):
            columns = ", ".join(row[1] for row in before.execute(f"PRAGMA table_info({table})"))
            rows = [sorted(one.execute(f"SELECT {columns} FROM {table}")) if table != "attempts"
                    else one.execute(f"SELECT {columns} FROM {table} ORDER BY name").fetchall()
                    for one in (before, now)]  # fmt: skip
            assert rows[0] == rows[1], table
    assert ledgercheck.examine(path).found == "ok"


def _without_log(content: bytes) -> bytes:
    """A database in memory cannot have a write-ahead log: bytes 18 and 19 say whether there is one."""
    return content[:18] + b"\1\1" + content[20:]


@pytest.mark.parametrize("version", VERSIONS)
def test_looking_at_it_says_what_a_start_would_do_and_does_nothing(version: str, place: Path) -> None:
    content = (HERE / f"{version}.sqlite").read_bytes()
    state = state_with(place, content)
    said = upkeep.check_state({"GPUJOBS_STATE": str(state)})
    assert f"{state}/state.sqlite: whole\n" in said
    assert f"{len(expected(version))} jobs, 7 of them not ended" in said
    schema = f"schema {int(version)}, the newest" if int(version) == NEWEST else f"brings it to {NEWEST}"
    assert schema in said
    assert [path.name for path in state.iterdir()] == ["state.sqlite"]
    assert (state / "state.sqlite").read_bytes() == content


@pytest.fixture(scope="module")
def lab() -> Engine:
    accounts.ensure()
    found = engine.ensure()
    images.ensure(found, BUSYBOX)
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_a_server_that_starts_on_it_shows_its_jobs(version: str, place: Path, lab: Engine) -> None:
    state_with(place, (HERE / f"{version}.sqlite").read_bytes())
    server = Server(place, {"DOCKER_HOST": lab.host})
    server.spawn()
    try:
        server.listens()
        done = ask(server.own, "ps", "--all", "--json")
        one = ask(server.own, "show", "--json", "1")
        assert server.stop() == 0
    finally:
        server.clean(lab)
    assert "Traceback" not in server.said
    rows = {_id(row): row for row in done.json["jobs"]}
    before = {job["id"]: job for job in expected(version)}
    assert {key: (row["name"], row["owner"], row["gpu_count"]) for key, row in rows.items()} == {
        key: (job["name"], job["owner"][1], job["gpus"]) for key, job in before.items()
    }
    ended = [key for key, job in before.items() if job["state"] in {"succeeded", "failed", "cancelled"}]
    assert len(ended) == 4
    for key in ended:
        now = (rows[key]["state"], rows[key]["exit_code"], rows[key]["message"] or "", rows[key]["gpus"])
        assert now == tuple(before[key][name] for name in ("state", "exit_code", "message", "held"))
    assert "h\\u00e9llo" in one.out.decode()


def _id(row: Mapping[str, Any]) -> str:
    return str(row["id"]) if row["index"] is None else f"{row['id']}_{row['index']}"


def test_a_newer_one_is_refused_in_words_and_not_a_byte_of_it_changes(place: Path, lab: Engine) -> None:
    state = state_with(place, (HERE / f"{VERSIONS[-1]}.sqlite").read_bytes())
    path = state / "state.sqlite"
    with closing(sqlite3.connect(path)) as newer:
        newer.executescript(f"CREATE TABLE hence (x TEXT) STRICT; PRAGMA user_version = {NEWEST + 1};")
    content = path.read_bytes()
    server = Server(place, {"DOCKER_HOST": lab.host})
    assert server.spawn().wait(timeout=60) == 3
    words = f"newer gpujobs (schema {NEWEST + 1}, this one knows {NEWEST})"
    assert words in server.said
    with pytest.raises(Refused, match="was written by a newer gpujobs") as caught:
        upkeep.check_state({"GPUJOBS_STATE": str(state)})
    assert caught.value.exit == 3
    assert path.read_bytes() == content
    assert not list(state.glob("state.sqlite-*"))
