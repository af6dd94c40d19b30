"""What is done beside a server: a look at its state, a backup while it runs, a restore as the documentation has it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import threading
from contextlib import closing
from pathlib import Path

import pytest

from gpujobs.adapters import ledgercheck
from gpujobs.adapters.store import Store
from gpujobs.core.errors import Refused, Unavailable
from gpujobs.service import upkeep
from tests.e2e.harness import GPUJOBS, ROOT, Done, run, spec, wait_for
from tests.integration.managed import Server, ask
from tests.lab.accounts import Account

LEDGER = max((ROOT / "tests/compat").glob("*.sqlite"))


@pytest.fixture
def state(place: Path) -> Path:
    """A state directory that no server uses, with eleven jobs."""
    found = place / "state"
    found.mkdir(mode=0o700)
    shutil.copyfile(LEDGER, found / "state.sqlite")
    return found


def beside(state: Path, *args: str) -> Done:
    return run([str(GPUJOBS), *args], {"GPUJOBS_STATE": str(state)})


def submit(server: Server, account: Account, **keys: object) -> str:
    done = ask(server.own, "submit", "--quiet", "--run-as", account.name, "-", stdin=spec(**keys))
    assert done.code == 0, done
    return done.out.decode().strip()


def ended(server: Server, job: str) -> None:
    def look() -> bool:
        row = ask(server.own, "show", "--json", job).json
        assert row["state"] != "failed", row
        return bool(row["ended_at"] and all(item["log_complete"] for item in row["attempts"]))

    wait_for(look, f"job {job} has ended", 60)


# -- a look ------------------------------------------------------------------------------------------------------


def test_a_look_tells_of_a_server_that_runs_and_does_not_disturb_it(server: Server) -> None:
    assert b"not there yet; a server that starts makes it\n" in beside(server.state, "serve", "--check-state").out
    assert not server.state.exists()
    process = server.spawn()
    server.listens()
    done = beside(server.state, "serve", "--check-state")
    assert (done.code, done.err) == (0, b"")
    path = f"{server.state}/state.sqlite"
    assert done.out.decode().splitlines() == [
        f"{path}: whole",
        f"schema {ledgercheck.migrations()[-1][0]}, the newest that this gpujobs knows",
        "0 jobs, 0 of them not ended",
        f"the server with pid {process.pid} uses it",
    ]
    assert server.stop() == 0
    assert beside(server.state, "serve", "--check-state").out.endswith(b"\nno server uses it\n")


def test_a_server_that_starts_during_looks_is_not_kept_from_it(server: Server) -> None:
    looking = threading.Event()
    looks: list[int] = []

    def look() -> None:
        while not looking.is_set():
            upkeep.holder(server.state)
            looks.append(1)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        server.spawn()
        server.listens()
    finally:
        looking.set()
        thread.join()
    assert looks


def test_a_look_goes_alone(state: Path) -> None:
    done = beside(state, "serve", "--check-state", "--config", "x.yaml")
    assert (done.code, done.words.splitlines()[0]) == (2, "gpujobs: --check-state goes alone: it starts no server")


def _page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 9] = b"\xff" * 4096 * 6
    path.write_bytes(content)


def _header(path: Path) -> None:
    path.write_bytes(b"not a database" * 1000)


def _orphan(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM submissions WHERE number = 3")
        connection.commit()


def _unreadable(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE jobs SET owner = '{\"uid\":' WHERE number = 2")
        connection.commit()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_page, "is damaged: "),
        (_header, "is damaged: file is not a database"),
        (_orphan, "refers to no submissions"),
        (_unreadable, "job 2 cannot be read: JSONDecodeError"),
    ],
)
def test_damage_is_told_with_what_to_do_and_is_never_backed_up(
    state: Path, place: Path, damage: object, words: str
) -> None:
    assert callable(damage)
    damage(state / "state.sqlite")
    before = (state / "state.sqlite").read_bytes()
    done = beside(state, "serve", "--check-state")
    assert done.code == 3
    assert words in done.words
    assert "Restore a backup" in done.words
    copied = beside(state, "backup", str(place / "copy.sqlite"))
    assert copied.code in (3, 4), copied
    assert [path.name for path in place.iterdir()] == ["state"]
    assert (state / "state.sqlite").read_bytes() == before


def test_what_is_not_this_accounts_to_read_is_told(state: Path, place: Path, people: tuple[Account, ...]) -> None:
    done = run([str(GPUJOBS), "serve", "--check-state"], {"GPUJOBS_STATE": str(state)}, user=None)
    assert done.code == 0
    with pytest.raises(Unavailable, match="cannot be read: Not a directory"):
        upkeep.check_state({"GPUJOBS_STATE": str(state / "state.sqlite")})


# -- a backup ----------------------------------------------------------------------------------------------------


def test_a_backup_is_one_file_of_roots_that_holds_every_job(state: Path, place: Path) -> None:
    target = place / "copy.sqlite"
    done = beside(state, "backup", str(target))
    assert done.code == 0, done
    assert done.out.decode().splitlines() == [
        f"{target}: a copy of {state}/state.sqlite, whole",
        f"schema {int(LEDGER.stem)}, the newest that this gpujobs knows",
        "11 jobs, 7 of them not ended",
    ]
    assert sorted(path.name for path in place.iterdir()) == ["copy.sqlite", "state"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    dumps = []
    for path in (LEDGER, target):
        with closing(sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)) as connection:
            dumps.append(list(connection.iterdump()))
    assert dumps[0] == dumps[1]


def test_a_relative_name_is_where_the_administrator_is(state: Path, place: Path) -> None:
    done = subprocess.run([GPUJOBS, "backup", "here.sqlite"], env={"PATH": os.environ["PATH"], "HOME": "/root",
                          "GPUJOBS_STATE": str(state)}, cwd=place, capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done
    assert (place / "here.sqlite").exists()


@pytest.mark.parametrize("there", ["file", "directory", "dangling link"])
def test_a_file_that_is_there_is_never_overwritten(state: Path, place: Path, there: str) -> None:
    target = place / "copy.sqlite"
    match there:
        case "file":
            target.write_text("yesterday's")
        case "directory":
            target.mkdir()
        case _:
            target.symlink_to(place / "elsewhere")
    done = beside(state, "backup", str(target))
    assert done.code == 3
    assert f"{target} is there already" in done.words
    assert os.path.lexists(target)
    assert not (place / "elsewhere").exists()


def test_where_nothing_can_be_copied_or_written_nothing_is_left(state: Path, place: Path) -> None:
    assert beside(place / "none", "backup", str(place / "x.sqlite")).code == 4
    assert beside(state, "backup", str(place / "no/such/directory.sqlite")).code == 4
    small = place / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", small], check=True)
    try:
        done = beside(state, "backup", str(small / "copy.sqlite"))
        assert done.code == 4, done
        assert "full" in done.words
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_the_backup_of_a_ledger_that_is_written_to_all_the_time_is_one_moment_of_it(state: Path, place: Path) -> None:
    """Each change adds two rows that belong together: a copy that caught one without the other would show it."""
    path = state / "state.sqlite"

    async def write() -> list[int]:
        store = Store(path)
        counts = []
        for number in range(3):
            stop = asyncio.Event()

            async def go_on(stop: asyncio.Event = stop) -> int:
                done = 0
                while not stop.is_set():
                    key = f"x{done}"
                    await store.change(lambda ledger, key=key: [ledger.set_meta(f"{side}{key}", key) for side in "ab"])
                    done += 1
                return done

            writing = asyncio.create_task(go_on())
            await asyncio.to_thread(ledgercheck.back_up, path, place / f"{number}.sqlite")
            stop.set()
            counts.append(await writing)
        store.close()
        return counts

    assert min(asyncio.run(write())) > 0  # it went on meanwhile
    for number in range(3):
        with closing(sqlite3.connect(place / f"{number}.sqlite")) as copy:
            names = {name for (name,) in copy.execute("SELECT name FROM meta WHERE name <> 'server'")}
        assert {name[1:] for name in names if name[0] == "a"} == {name[1:] for name in names if name[0] == "b"}


# -- restoring ---------------------------------------------------------------------------------------------------


def documented(page: str, heading: str) -> str:
    """The commands below a heading."""
    text = (ROOT / "docs" / page).read_text().partition(f"\n{heading}\n")[2]
    found = re.search(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_what_the_documentation_says_restores_what_was_backed_up(
    server: Server, place: Path, people: tuple[Account, ...]
) -> None:
    ada, bob = people[:2]
    server.spawn()
    server.listens()
    first = submit(server, ada, name="before", script="echo ada before")
    ended(server, first)
    backup = place / "backup.sqlite"
    assert beside(server.state, "backup", str(backup)).code == 0
    lost = submit(server, ada, name="after", script="echo ada after")
    ended(server, lost)
    assert ask(server.own, "logs", lost).out == b"ada after\n"

    (place / "bin").mkdir()
    (place / "bin/gpujobs").symlink_to(GPUJOBS)
    commands = documented("operations.md", "### Restoring")
    stop, *rest = commands.splitlines()
    assert stop.startswith("systemctl stop ")
    assert rest.pop().startswith("systemctl start ")
    server.stop()
    (server.state / "state.sqlite").write_bytes(b"a disk's last words")  # what made it necessary
    script = "\n".join(rest).replace("/var/lib/gpujobs", str(server.state))
    script = re.sub(r"/srv/backup/\S+\.sqlite", str(backup), script)
    environ = {"PATH": f"{place}/bin:{os.environ['PATH']}", "GPUJOBS_STATE": str(server.state), "HOME": "/root"}
    done = subprocess.run(["sh", "-euc", script], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert "1 job, 0 of them not ended" in done.stdout

    server.spawn()
    server.listens()
    rows = ask(server.own, "ps", "--all", "--json").json["jobs"]
    assert [(row["id"], row["name"]) for row in rows] == [(int(first), "before")]
    assert ask(server.own, "logs", first).out == b"ada before\n"
    # The number of a job that was lost is not given again: its log is there, and it is not the next one's to see.
    again = submit(server, bob, name="bobs", script="echo bob")
    assert int(again) > int(lost)
    ended(server, again)
    assert ask(server.own, "logs", again).out == b"bob\n"


def test_numbers_go_on_after_the_logs_also_where_the_ledger_is_new(server: Server, people: tuple[Account, ...]) -> None:
    (server.state / "logs/41").mkdir(parents=True)
    (server.state / "logs/not-a-number").mkdir()
    server.spawn()
    server.listens()
    assert submit(server, people[0], script="true") == "42"
    assert server.stop() == 0
    server.spawn()
    server.listens()
    assert submit(server, people[0], script="true") == "43"


def test_a_backup_of_a_newer_gpujobs_is_not_made_by_an_older_one(state: Path, place: Path) -> None:
    with closing(sqlite3.connect(state / "state.sqlite")) as newer:
        newer.execute("PRAGMA user_version = 9999")
    with pytest.raises(Refused, match="is newer: schema 9999"):
        ledgercheck.back_up(state / "state.sqlite", place / "x.sqlite")
    assert not (place / "x.sqlite").exists()
    assert json.loads((ROOT / "tests/compat/0002.json").read_text())
