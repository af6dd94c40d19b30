"""Servers come and go: started by hand, by an account's first command, without NVML, without Docker."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import DOCKER_GROUP, membership
from tests.e2e.harness import GPUJOBS, Done, Place, Server, run, spec, wait_for
from tests.lab import nvml
from tests.lab.accounts import Account
from tests.lab.engine import Daemon

MakeServer = Callable[..., Server]


def test_without_nvml_the_server_runs_cpu_jobs_and_refuses_gpu_jobs(make_server: MakeServer) -> None:
    server = make_server(LD_LIBRARY_PATH="").start()
    shown = server.cli("gpus", "--json").json
    assert (shown["simulated"], shown["gpus"]) == (False, [])
    assert "libnvidia-ml.so.1 was not found" in shown["problem"]
    done = server.run(gpus=1, script="true")
    assert done.code == 3, done
    assert "libnvidia-ml.so.1 was not found" in done.words
    assert server.run(script="exit 3").code == 3
    assert server.run(script="true").code == 0


def test_a_driver_that_goes_and_comes_back_holds_up_jobs_and_loses_none(
    make_server: MakeServer, machine: nvml.Machine, nvml_state: Path
) -> None:
    server = make_server().start()
    machine.unload_driver()
    machine.write(nvml_state)
    wait_for(lambda: server.get("/gpus")["problem"], "the loss is seen")
    done = server.cli("submit", "--run-as", "gjlab1", "-", stdin=spec(gpus=1, script="true"))
    assert done.code == 3, done
    machine.load_driver()
    machine.write(nvml_state)
    wait_for(lambda: not server.get("/gpus")["problem"], "it is back")
    assert server.run(gpus=8, script="true").code == 0


def test_the_socket_is_the_groups_and_the_state_roots_alone(make_server: MakeServer, people: object) -> None:
    server = make_server().start()
    socket = server.socket.stat()
    import grp

    assert (socket.st_uid, socket.st_gid) == (0, grp.getgrnam("gpujobs").gr_gid)
    assert stat.S_IMODE(socket.st_mode) == 0o660
    assert stat.S_IMODE(server.state.stat().st_mode) == 0o700
    assert stat.S_IMODE((server.state / "state.sqlite").stat().st_mode) == 0o600
    assert server.stop() == 0
    assert not server.socket.exists()
    assert json.loads((server.state / "server.json").read_text())["clean"] is True


def test_a_stop_lets_containers_run_and_the_next_server_takes_them_up(
    make_server: MakeServer, place: Place, alice: Account
) -> None:
    volume = place.volume(alice)
    server = make_server().start()
    script = "echo one; touch /v/up; while [ ! -e /v/go ]; do sleep 0.05; done; echo two; exit 4"
    job = server.submit(gpus=2, script=script, volumes=[f"{volume}:/v"])
    wait_for((volume / "up").exists, "it runs")
    started = server.job(job)["started_at"]
    assert server.stop() == 0
    (volume / "go").touch()
    server.start()
    row = server.ended(job)
    assert (row["exit_code"], row["started_at"], row["attempt"]) == (4, started, 1)
    assert server.cli("logs", job).out == b"one\ntwo\n"


def test_settings_that_are_wrong_stop_the_server_before_it_does_anything(make_server: MakeServer) -> None:
    server = make_server("keep_ended: -1\nkeep_ender: 3\n")
    assert server.spawn().wait(timeout=20) == 2
    assert "keep_ender" in server.said
    assert not server.state.exists()


def test_no_engine_is_told_in_words(make_server: MakeServer, place: Place) -> None:
    server = make_server(DOCKER_HOST=f"unix://{place.path}/none.sock")
    assert server.spawn().wait(timeout=20) == 4
    assert f"the Docker Engine at unix://{place.path}/none.sock does not answer" in server.said
    assert "Traceback" not in server.said
    done = run([str(GPUJOBS), "ps"], {"GPUJOBS_HOST": server.host})
    assert done.code == 4, done
    assert str(server.socket) in done.words


# -- a server of one's own -------------------------------------------------------------------------------------


@dataclass
class Own:
    """An account that may use a Docker Engine, and the server that its first command starts."""

    account: Account
    state: Path
    environment: Mapping[str, str]

    def cli(self, *args: str, stdin: bytes = b"", **environment: str) -> Done:
        return run([str(GPUJOBS), *args], {**self.environment, **environment}, user=self.account, stdin=stdin)

    @property
    def record(self) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.state / "server.json").read_text())
        return found

    def kill(self) -> None:
        pid = int(str(self.record["pid"]))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), "it is gone")


@pytest.fixture
def own(
    place: Place, people: tuple[Account, ...], disposable: Daemon, environment: Mapping[str, str], machine: nvml.Machine
) -> Iterator[Own]:
    account = people[4]
    home = place.volume(account, "home")
    state = home / "state"
    with membership(DOCKER_GROUP, account) as gid:
        socket = Path(disposable.host.removeprefix("unix://"))
        os.chown(socket, 0, gid)
        found = Own(account, state / "gpujobs", {
            **environment, "DOCKER_HOST": disposable.host, "HOME": str(home), "XDG_STATE_HOME": str(state),
            "PATH": os.environ["PATH"],
        })  # fmt: skip
        yield found
        with suppress(FileNotFoundError, ProcessLookupError):
            pid = int(str(found.record["pid"]))
            os.kill(pid, signal.SIGTERM)
            wait_for(lambda: not Path(f"/proc/{pid}").exists(), "it stops")
    left = disposable.engine.docker("ps", "--all", "--quiet").split()
    if left:
        disposable.engine.docker("rm", "--force", "--volumes", *left)


def test_the_first_command_of_an_account_that_may_use_docker_starts_a_server_of_its_own_and_says_so(
    own: Own, people: tuple[Account, ...], disposable: Daemon, place: Place
) -> None:
    done = own.cli("run", "-", stdin=spec(gpus=2, script="ls /dev | grep '^nvidia[0-9]'; id -u; id -un"))
    assert done.code == 0, done
    assert f"started a server (state in {own.state})" in done.words
    first, second, uid, name = done.out.decode().splitlines()
    assert (uid, name) == (str(own.account.uid), own.account.name)
    assert own.record["uid"] == own.account.uid
    socket = Path(str(own.record["socket"]))
    assert socket == own.state / "gpujobs.sock"
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(own.state.stat().st_mode) == 0o700
    # The second command uses it, and says nothing of the kind.
    (row,) = own.cli("ps", "--all", "--json").json["jobs"]
    assert (row["state"], row["owner"]) == ("succeeded", own.account.name)
    shown = {gpu["uuid"]: f"nvidia{gpu['minor']}" for gpu in own.cli("gpus", "--json").json["gpus"]}
    assert [shown[uuid] for uuid in row["gpus"]] == [first, second]
    done = own.cli("run", "-", stdin=spec(script="true"))
    assert (done.code, "started a server" in done.words) == (0, False)
    # It serves its owner alone: another account is kept out by modes, and root by the server.
    done = run([str(GPUJOBS), "ps"], {"GPUJOBS_HOST": f"unix://{socket}"})
    assert done.code == 3, done
    assert str(own.account.uid) in done.words
    done = run([str(GPUJOBS), "ps"], {"GPUJOBS_HOST": f"unix://{socket}"}, user=people[3])
    assert done.code in (3, 4), done


@pytest.mark.parametrize("fault", ["extra", "none"])
def test_a_server_that_is_not_root_finds_out_a_runtime_that_grants_other_gpus(
    own: Own, disposable: Daemon, place: Place, fault: str
) -> None:
    with disposable.engine.fault(fault):  # type: ignore[arg-type]
        done = own.cli("run", "-", stdin=spec(gpus=2, script="echo ran"))
    assert done.code != 0
    assert done.out == b""
    (row,) = own.cli("ps", "--all", "--json").json["jobs"]
    assert (row["state"], row["reason"], row["started_at"]) == ("failed", "isolation", None), row
    names = disposable.engine.docker("ps", "--all", "--format", "{{.Names}}").split()
    assert not [name for name in names if name.endswith("-probe")], "the probe's container was left"
    assert own.cli("run", "-", stdin=spec(gpus=2, script="true")).code == 0


def test_a_server_of_ones_own_gives_ones_own_paths_and_says_so(own: Own, place: Place, bob: Account) -> None:
    mine, theirs = place.volume(own.account, "mine"), place.volume(bob, "theirs")
    done = own.cli("run", "-", stdin=spec(script="echo kept > /v/file", volumes=[f"{mine}:/v"]))
    assert done.code == 0, done
    assert (mine / "file").stat().st_uid == own.account.uid
    assert f"This server runs as {own.account.name}" in done.words
    done = own.cli("run", "-", stdin=spec(script="true", volumes=[f"{theirs}:/v"]))
    assert done.code != 0
    assert str(theirs) in done.words


def test_an_unclean_end_is_told_with_its_last_lines_and_not_hidden_by_another_start(own: Own) -> None:
    assert own.cli("run", "-", stdin=spec(script="true")).code == 0
    pid = own.record["pid"]
    own.kill()
    for command in (["run", "-"], ["submit", "-"]):
        done = own.cli(*command, stdin=spec(script="true"))
        assert done.code == 4, done
        assert f"the server (pid {pid}) ended without being stopped. Its last lines:" in done.words
        assert re.search(r"^ +\d{4}-.* INFO", done.words, re.MULTILINE), done.words
        assert "gpujobs serve" in done.words
        assert own.record["pid"] == pid
    done = own.cli("ps")
    assert done.code == 4


def test_an_account_without_docker_and_without_a_server_is_told_so(
    people: tuple[Account, ...], place: Place, disposable: Daemon, environment: Mapping[str, str]
) -> None:
    account = people[3]
    state = place.volume(account, "state")
    given = {**environment, "DOCKER_HOST": disposable.host, "XDG_STATE_HOME": str(state), "PATH": os.environ["PATH"]}
    for command in (["run", "-"], ["submit", "-"]):
        done = run([str(GPUJOBS), *command], given, user=account, stdin=spec(script="true"))
        assert done.code == 4, done
        assert "no gpujobs server answers, and none was started" in done.words
        assert f"may not use the Docker Engine at {disposable.host}" in done.words
        assert "Traceback" not in done.words
    done = run([str(GPUJOBS), "ps"], given, user=account)
    assert done.code == 4, done
    assert not (state / "gpujobs" / "server.json").exists()
