"""Hostile names, labels, values, commands and outputs: no shell, path, statement or terminal acts on them."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.attacks.tools import output, submitted
from tests.e2e.harness import BUSYBOX, GPUJOBS, Place, Row, Server, inspect, spec, wait_for
from tests.lab import nvml
from tests.lab.accounts import Account, command_as
from tests.lab.engine import Engine

OSC = "\x1b]0;owned\x07"
CLEAR = "\x1b[2J\x1b[1;1H"
BIDI = "\u202egpj.exe\u202c"
C1 = "\x9b31mred"
HIDDEN = "a\u200bb\u2066"
SHELL = "$$(touch {mark}); `touch {mark}`; touch {mark} && touch {mark} # ' \"\n touch {mark}"
SQL = "'; DROP TABLE jobs; -- \"); DELETE FROM attempts; /*"
ACTIVE = ("\x1b", "\x07", "\x9b", "\u202e", "\u200b", "\u2066", "\r")


@pytest.fixture(scope="module")
def mark(ground: Place) -> Path:
    return ground.path / "mark"


@pytest.fixture(scope="module")
def hostile(server: Server, alice: Account, mark: Path) -> Row:
    """A job with something hostile in each place that takes any text."""
    told = SHELL.format(mark=mark)
    return submitted(
        server, alice, entrypoint=["/bin/echo"], command=[OSC, CLEAR, BIDI, C1, HIDDEN, told, SQL, "$$HOME"],
        environment={"TOLD": told, "SQL": SQL, "OSC": OSC}, labels={"a": OSC + told, "b": SQL, "c": BIDI},
    )  # fmt: skip


def test_a_shell_acts_on_such_a_text(mark: Path) -> None:
    """Where a text is put into a shell's line, it does what it says."""
    subprocess.run(["sh", "-c", f"echo {SHELL.format(mark=mark)}".replace("$$", "$")], capture_output=True, check=False)
    assert mark.exists()
    mark.unlink()


def test_no_shell_sees_the_words_of_a_job(server: Server, hostile: Row, mark: Path, lab: Engine) -> None:
    assert hostile["state"] == "succeeded", hostile
    assert not mark.exists()
    found = inspect(lab, hostile["container"]["id"])
    assert found["Config"]["Cmd"][1:7] == [OSC, CLEAR, BIDI, C1, HIDDEN, SHELL.format(mark=mark).replace("$$", "$")]
    assert found["Config"]["Labels"]["b"] == SQL
    assert "$HOME" in output(server, hostile)


def test_a_database_acts_on_such_a_text(place: Place) -> None:
    with closing(sqlite3.connect(place.path / "x")) as database:
        database.executescript("CREATE TABLE jobs (name TEXT)")
        database.executescript(f"INSERT INTO jobs VALUES ('{SQL.partition(' -- ')[0]}')".replace("('';", "('');")[:-2])
        assert not database.execute("SELECT name FROM sqlite_master WHERE name = 'jobs'").fetchall()


def test_the_ledger_keeps_such_a_text_as_it_is(server: Server, hostile: Row) -> None:
    row = server.job(str(hostile["id"]))
    assert dict(row["spec"]["labels"])["b"] == SQL
    assert dict(row["spec"]["environment"])["SQL"] == SQL
    with closing(sqlite3.connect(f"file:{server.state}/state.sqlite?mode=ro", uri=True)) as ledger:
        assert ledger.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert len(server.jobs()) >= 1


@pytest.mark.parametrize("command", [("ps", "--all"), ("show", "{id}"), ("gpus",)])
def test_nothing_in_a_table_acts_on_a_terminal(
    server: Server, bob: Account, hostile: Row, command: tuple[str, ...]
) -> None:
    raw = server.get(f"/jobs/{hostile['id']}")
    assert OSC in raw["jobs"][0]["spec"]["command"][0], "the API gives it as it is"
    done = server.cli(*(word.format(id=hostile["id"]) for word in command))
    assert done.code == 0, done
    told = done.out.decode() + done.words
    assert not [char for char in ACTIVE if char in told]
    if command[0] == "show":
        assert r"\x1b]0;owned\x07" in told


@pytest.fixture
def strangers(server: Server, nvml_state: Path, bob: Account, lab: Engine) -> Iterator[None]:
    """A process of bob's and a container by hand that hold GPUs, both of hostile names."""
    sleeper = subprocess.Popen([f"/usr/bin/{OSC}{BIDI}", "60"], executable="/usr/bin/sleep", user=bob.uid)
    machine = nvml.dgx_a100().fit_host()
    uuid = machine.gpus[1].uuid
    machine.gpus[0].processes = [nvml.Process(sleeper.pid, memory=1 << 30, name=f"/usr/bin/{OSC}{CLEAR}")]
    machine.write(nvml_state)
    made = lab.docker("create", "--runtime", "nvidia", "--env", f"NVIDIA_VISIBLE_DEVICES={uuid}", "--label",
                      "gpujobs.server=other", "--label", f"gpujobs.job={OSC}{C1}", BUSYBOX, "true").strip()  # fmt: skip
    yield
    lab.docker("rm", made)
    sleeper.kill()
    sleeper.wait()
    machine.gpus[0].processes = []
    machine.write(nvml_state)
    wait_for(lambda: not any(gpu["avoided"] or gpu["processes"] for gpu in server.get("/gpus")["gpus"]), "all is free")


def test_who_holds_a_gpu_is_told_without_obeying_their_names(
    server: Server, alice: Account, strangers: None
) -> None:
    job = server.submit(user=alice, gpus=8, script="true")
    try:
        seen = wait_for(
            lambda: found if (found := server.get("/gpus")["gpus"])[0]["processes"] and found[1]["avoided"] else None,
            "both are seen",
        )
        assert OSC in str(seen[0]["processes"][0]["name"]) + seen[1]["avoided"], "the API gives it as it is"
        wait_for(lambda: server.job(job)["message"], "the wait is explained")
        for command in (["gpus"], ["ps"], ["show", job]):
            done = server.cli(*command, user=alice)
            assert done.code == 0, done
            assert not [char for char in ACTIVE if char in done.out.decode() + done.words], command
    finally:
        assert server.cli("cancel", job, user=alice).code == 0


def test_an_end_is_told_without_obeying_what_the_program_was_called(server: Server, alice: Account) -> None:
    row = submitted(server, alice, command=[f"/no/{OSC}{BIDI}{CLEAR}"])
    assert row["state"] == "failed", row
    for command in (["ps", "--all"], ["show", str(row["id"])], ["wait", str(row["id"])]):
        told = server.cli(*command)
        assert not [char for char in ACTIVE if char in told.out.decode() + told.words], command
    assert not [char for char in ACTIVE if char in server.said]


@pytest.mark.parametrize("command", [["plan"], ["plan", "--as", "compose"], ["plan", "--as", "docker"], ["check"]])
def test_a_job_file_of_somebody_else_is_looked_at_without_obeying_it(
    server: Server, bob: Account, volume: Path, command: list[str]
) -> None:
    """A file that was sent by somebody is looked at before it is run."""
    file = volume / "job.yaml"
    file.write_bytes(spec(command=["echo", OSC, CLEAR, BIDI, C1, HIDDEN], labels={"a": OSC}, environment={"A": BIDI}))
    assert OSC in json.loads(file.read_text())["command"]
    volume.chmod(0o755)
    told = on_a_terminal(server, bob, *command, str(file)).decode().replace("\r\n", "\n")
    assert not [char for char in ACTIVE if char in COLOUR.sub("", told)]


COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def on_a_terminal(server: Server, user: Account | None, *args: str) -> bytes:
    """What a command writes to a terminal."""
    leader, follower = pty.openpty()
    argv = [str(GPUJOBS), *args]
    environment = {"PATH": os.environ["PATH"], "HOME": "/root", "GPUJOBS_HOST": server.host, "TERM": "xterm"}
    command = argv if user is None else command_as(user, argv, {"GPUJOBS_HOST": server.host, "TERM": "xterm"})
    running = subprocess.Popen(command, env=environment, stdin=follower, stdout=follower, stderr=follower, cwd="/")
    os.close(follower)
    told = b""
    with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
        while piece := os.read(leader, 65536):
            told += piece
    os.close(leader)
    assert running.wait(timeout=30) == 0, told
    return told


SCREEN = r"printf '\033]0;owned\007\302\233\342\200\256evil\r12_0 | not my line\n'"


@pytest.fixture(scope="module")
def screens(server: Server, alice: Account) -> str:
    """An array of alice's whose elements write what acts on a terminal."""
    job = server.submit(user=alice, script=f"{SCREEN} # {{{{ a }}}}", matrix={"a": [1, 2]}, cpus=0.1)
    assert server.cli("wait", job, user=alice, timeout=120).code == 0
    return job


def test_lines_behind_a_prefix_are_shown_on_a_terminal_and_not_obeyed(
    server: Server, alice: Account, screens: str
) -> None:
    to_a_pipe = server.cli("logs", screens, user=alice).out
    assert b"\x1b]0;owned" in to_a_pipe, "data passes as it is"
    lines = on_a_terminal(server, alice, "logs", screens).decode().replace("\r\n", "\n").splitlines()
    assert len(lines) == 2
    assert not [char for line in lines for char in ACTIVE if char in line]
    assert all(line.startswith(f"{screens}_") for line in lines)


def test_the_log_of_somebody_else_is_shown_on_a_terminal_and_not_obeyed(
    server: Server, alice: Account, screens: str
) -> None:
    job = f"{screens}_0"
    assert server.cli("logs", job, user=alice).out.startswith(b"\x1b]0;owned\x07\xc2\x9b")
    assert b"\x1b]0;owned" in on_a_terminal(server, alice, "logs", job), "one's own is one's own"
    told = on_a_terminal(server, None, "logs", job).decode().replace("\r\n", "\n")
    assert not [char for char in ACTIVE if char in told]
    assert r"\x1b]0;owned\x07" in told


MISTAKES = {
    "a name": {"name": f"a{OSC}"}, "a key": {f"ima{OSC}ge": "x"}, "an image": {"image": f"busybox{CLEAR}"},
    "a variable": {"environment": {f"A{OSC}": "b"}}, "a label": {"labels": {f"{BIDI} x": "y"}},
    "a volume": {"volumes": [f"/nowhere{OSC}:/dev{C1}"]}, "a signal": {"stop_signal": OSC},
    "a model": {"gpus": {"count": 1, "model": [f"A100{OSC}\n"]}},
    "a size": {"mem_limit": f"1{HIDDEN}g"}, "a name with a line": {"name": "a\nb"},
}  # fmt: skip


@pytest.mark.parametrize("place_of", MISTAKES)
def test_a_mistake_is_told_without_obeying_it(server: Server, alice: Account, place_of: str) -> None:
    done = server.run(user=alice, script="true", **{"image": "nobody/has:this", **MISTAKES[place_of]})
    assert done.code in (1, 2, 3), done
    told = (done.out + done.err).decode()
    assert not [char for char in ACTIVE if char in told]


def test_a_path_of_hostile_name_is_told_without_obeying_it(server: Server, alice: Account, place: Place) -> None:
    directory = place.path / f"{CLEAR}{OSC}"
    directory.mkdir(mode=0o700)
    done = server.run(user=alice, script="true", volumes=[f"{directory}:/v"])
    assert done.code == 2
    assert not [char for char in ACTIVE if char in done.words]
    assert r"\x1b" in done.words
    assert not [char for char in ACTIVE if char in server.said], "the server's log neither"


def test_a_file_of_hostile_name_is_told_without_obeying_it(server: Server, alice: Account, volume: Path) -> None:
    file = volume / f"{OSC}.yaml"
    file.write_bytes(spec(script="true", nonsense=1))
    done = server.cli("submit", str(file), user=alice)
    assert done.code == 2
    assert not [char for char in ACTIVE if char in done.words]


def test_a_name_of_a_job_makes_no_path(server: Server, alice: Account, hostile: Row) -> None:
    assert os.path.normpath("/state/logs/../../etc") == "/etc"
    for name in ("..", "../../x", "/etc", "a/b", "a\0b", "-x", "."):
        done = server.cli("submit", "-", user=alice, stdin=spec(script="true", name=name))
        assert (done.code, done.out) == (2, b""), name
    assert hostile["container"]["name"].endswith(f"-{hostile['id']}-1"), "numbers alone are in it"
