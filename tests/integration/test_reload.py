"""SIGHUP: a right file holds at once, a wrong one changes nothing, and what needs a restart is named."""

from __future__ import annotations

import signal
import sqlite3
from contextlib import closing

import pytest

from tests.e2e.harness import GPUJOBS, Done, run, spec, wait_for
from tests.integration.managed import Server, ask
from tests.lab.accounts import Account
from tests.lab.engine import Engine


@pytest.fixture
def server(server: Server) -> Server:
    """It runs, with settings to change."""
    server.config.write_text("keep_ended: 1h\nenvironment: {WHEN: at the start}\n")
    server.spawn()
    server.listens()
    return server


def reload(server: Server, text: str, said: str) -> None:
    """Write the settings, ask for a reload, and wait until the server has said this once more."""
    assert server.process is not None
    before = server.said.count(said)
    server.config.write_text(text)
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: server.said.count(said) > before, lambda: f"it says {said!r}: {server.said}")


def job(server: Server, account: Account, **keys: object) -> Done:
    return ask(server.own, "run", "--run-as", account.name, "-", stdin=spec(**keys))


def test_a_right_file_holds_at_once_and_a_wrong_one_changes_nothing(
    server: Server, lab: Engine, people: tuple[Account, ...]
) -> None:
    ada = people[0]
    assert job(server, ada, script='echo "$$WHEN"').out == b"at the start\n"

    # The first line of it is right: as a whole it is refused.
    reload(server, "keep_ended: 0\nenvironment: {WHEN: later}\nruntim: x\nbuild_cpus: -1\n", "what held before goes on")
    assert f"{server.config}:3:1: runtim: unknown key" in server.said
    assert f"{server.config}:4:13: build_cpus: -1 is out of range" in server.said
    assert job(server, ada, script='echo "$$WHEN"').out == b"at the start\n"
    containers = ("ps", "--all", "--quiet", "--filter", "label=gpujobs.server=" + _id(server))
    assert len(lab.docker(*containers).split()) == 2

    reload(server, "keep_ended: 0\nenvironment: {WHEN: later}\n", "the settings were read again")
    assert job(server, ada, script='echo "$$WHEN"').out == b"later\n"
    wait_for(lambda: lab.docker(*containers).split() == [], "ended containers go: keep_ended is 0 now")


def _id(server: Server) -> str:
    with closing(sqlite3.connect(f"file:{server.state}/state.sqlite?mode=ro", uri=True)) as ledger:
        (found,) = ledger.execute("SELECT value FROM meta WHERE name = 'server'").fetchone()
    return str(found)


def test_who_becomes_an_administrator_may_act_from_then_on(server: Server, people: tuple[Account, ...]) -> None:
    ada, bob = people[:2]
    reload(server, "users: ['*']\n", "the settings were read again")
    done = ask(server.own, "submit", "--quiet", "--run-as", ada.name, "-", stdin=spec(script="exec sleep 300"))
    number = done.out.decode().strip()

    def cancel() -> Done:
        return run([str(GPUJOBS), "cancel", number], {"GPUJOBS_HOST": f"unix://{server.own}"}, user=bob)

    assert cancel().code != 0
    reload(server, f"users: ['*']\nadmins: [{bob.name}]\n", "the settings were read again")
    assert cancel().code == 0
    reload(server, "users: ['*']\n", "the settings were read again")
    done = ask(server.own, "submit", "--quiet", "--run-as", ada.name, "-", stdin=spec(script="exec sleep 300"))
    number = done.out.decode().strip()
    assert cancel().code != 0


def test_what_needs_a_restart_is_named_and_holds_after_one(server: Server, people: tuple[Account, ...]) -> None:
    def runtime() -> bytes:
        done = ask(server.own, "plan", "--run-as", people[0].name, "-", stdin=spec(script="true", gpus=1))
        assert done.code == 0, done
        return done.out

    assert b"--runtime nvidia " in runtime()
    reload(server, "runtime: other\nmemory_reserve: 0.5\n", "wait for a restart of the server: ")
    (told,) = (line for line in server.said.splitlines() if "wait for a restart" in line)
    assert told.endswith(": runtime, memory_reserve")
    assert b"--runtime nvidia " in runtime()
    assert server.stop() == 0
    server.spawn()
    server.listens()
    assert b"--runtime other " in runtime()


def test_many_reloads_at_once_end_with_the_last_file(server: Server, people: tuple[Account, ...]) -> None:
    assert server.process is not None
    for number in range(20):
        server.config.write_text(f"environment: {{WHEN: {number}}}\n")
        server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: job(server, people[0], script='echo "$$WHEN"').out == b"19\n", "the last one holds")
    assert "Traceback" not in server.said


def test_a_file_that_is_gone_is_a_wrong_one(server: Server, people: tuple[Account, ...]) -> None:
    assert server.process is not None
    server.config.unlink()
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "cannot be read: No such file" in server.said, "it says that the file is gone")
    assert job(server, people[0], script='echo "$$WHEN"').out == b"at the start\n"
