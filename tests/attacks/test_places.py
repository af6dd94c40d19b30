"""Places that others can reach: sockets, directories, locks, names in the Engine."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.tools import submitted
from tests.e2e.harness import GPUJOBS, Place, Server, run, wait_for
from tests.lab.accounts import Account, command_as
from tests.lab.engine import Engine, LabError

FAKE = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
import os
os.chmod(sys.argv[1], 0o666)
listener.listen(4)
print("listening", flush=True)
while True:
    connection, _ = listener.accept()
    connection.settimeout(3)
    try:
        data = connection.recv(65536)
    except OSError:
        data = b""
    print("heard", len(data), flush=True)
    body = b'{"version": "0", "api": 1, "server": "x", "jobs": [{"id": 1}]}'
    try:
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body))
    except OSError:
        pass
    connection.close()
"""


@pytest.fixture
def fake(place: Place, bob: Account) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A server of bob's, in a place where anybody may put one."""
    place.path.chmod(0o1777)
    path = place.path / "gpujobs.sock"
    process = subprocess.Popen(command_as(bob, ["/usr/bin/python3", "-u", "-c", FAKE, str(path)]), cwd="/", text=True,
                               stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    yield path, process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_server_of_another_account_is_told_nothing(
    fake: tuple[Path, subprocess.Popen[str]], alice: Account
) -> None:
    path, process = fake
    assert process.stdout is not None
    with socket.socket(socket.AF_UNIX) as trusting:
        trusting.connect(str(path))
        trusting.sendall(b"POST /v1/jobs HTTP/1.1\r\n\r\nsecret")
        assert process.stdout.readline() == "heard 32\n"
        assert trusting.recv(100).startswith(b"HTTP/1.1 200")
    for command in (["ps"], ["submit", "-"], ["cancel", "1"]):
        done = run([str(GPUJOBS), *command], {"GPUJOBS_HOST": f"unix://{path}"}, user=alice, stdin=b"name: secret")
        assert (done.code, done.out) == (3, b""), done
        assert "which is neither root nor you" in done.words
        assert process.stdout.readline() == "heard 0\n"


def test_a_link_to_another_accounts_socket_is_not_trusted_either(
    fake: tuple[Path, subprocess.Popen[str]], alice: Account, volume: Path
) -> None:
    (volume / "s.sock").symlink_to(fake[0])
    done = run([str(GPUJOBS), "ps"], {"GPUJOBS_HOST": f"unix://{volume}/s.sock"}, user=alice)
    assert (done.code, done.out) == (3, b"")


def test_an_account_without_docker_makes_no_lock(lab: Engine, alice: Account) -> None:
    """The lock is a volume of the Engine: who can make one can do anything already."""
    name = "gpujobs-attack-lock"
    assert lab.docker("volume", "create", name).strip() == name
    lab.docker("volume", "rm", name)
    done = run(["docker", "volume", "create", "gpujobs-lock-1"], {"DOCKER_HOST": lab.host}, user=alice)
    assert done.code != 0
    assert "permission denied" in done.words


def test_a_second_server_on_one_engine_is_refused_and_names_the_first(
    server: Server, place: Place, lab: Engine
) -> None:
    environment = {**server.environment, "GPUJOBS_STATE": str(place.path / "state"),
                   "GPUJOBS_HOST": f"unix://{place.path}/s.sock"}  # fmt: skip
    done = run([str(GPUJOBS), "serve"], environment)
    assert (done.code, done.out) == (3, b"")
    assert f"pid {server.pid}" in done.words


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_a_state_directory_of_another_account_is_refused(
    server: Server, place: Place, mallory: Account, kind: str
) -> None:
    """Whoever owns a directory can put other files in the place of those in it."""
    place.path.chmod(0o1777)
    trap = place.path / "trap"
    trap.mkdir()
    os.chown(trap, mallory.uid, mallory.gid)
    if kind == "link":
        link = place.path / "link"
        subprocess.run(command_as(mallory, ["ln", "-s", str(trap), str(link)]), check=True)
        trap = link
    (trap / "ledger").write_text("root's\n")
    swap = ["sh", "-c", f"mv {trap}/ledger {trap}/old && echo x > {trap}/ledger"]
    assert subprocess.run(command_as(mallory, swap), check=False).returncode == 0
    environment = {**server.environment, "GPUJOBS_STATE": str(trap), "GPUJOBS_HOST": f"unix://{place.path}/s.sock"}
    done = run([str(GPUJOBS), "serve"], environment)
    assert (done.code, done.out) == (3, b""), done
    assert f"belongs to uid {mallory.uid}" in done.words
    assert trap.stat().st_uid == mallory.uid
    assert not (trap / "state.sqlite").exists()


def test_no_file_of_the_server_can_be_read_or_changed_by_others(server: Server, alice: Account) -> None:
    ledger = server.state / "state.sqlite"
    assert ledger.read_bytes().startswith(b"SQLite format 3")
    for path in (ledger, server.state, server.state / "logs", server.state / "attempts", Path("/run/gpujobs/pins")):
        done = run(["/usr/bin/stat", str(path / "x" if path.is_dir() else path)], {}, user=alice)
        assert "Permission denied" in done.words, path
    wide = [path for path in server.state.iterdir() if path.stat().st_mode & 0o077]
    assert wide == []


def test_a_secret_in_a_command_line_of_a_client_is_not_made_by_us(server: Server, alice: Account, bob: Account) -> None:
    """Any account reads the arguments of any process; ours has none that the user has not typed."""
    told = threading.Event()
    seen: list[str] = []

    def look() -> None:
        while not told.wait(0.01):
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    words = (process / "cmdline").read_bytes()
                    if b"gpujobs" in words:
                        seen.append(words.decode(errors="replace"))

    typed = run(["sh", "-c", f"cat /proc/{os.getpid()}/cmdline"], {}, user=bob)
    assert typed.out, "another account's arguments are everybody's to read"
    looking = threading.Thread(target=look)
    looking.start()
    try:
        row = submitted(server, alice, script="true", environment={"TOKEN": "hunter2"})
    finally:
        told.set()
        looking.join()
    assert row["state"] == "succeeded"
    assert seen
    assert not [words for words in seen if "hunter2" in words]


@pytest.fixture
def look_alike(lab: Engine, server: Server) -> Iterator[None]:
    """A network of our network's name on which containers reach each other."""

    def gone() -> bool:
        try:
            lab.docker("network", "rm", "gpujobs")
        except LabError:
            return False
        return True

    wait_for(gone, "nobody is on it")
    lab.docker("network", "create", "gpujobs")
    yield
    lab.docker("network", "rm", "gpujobs")


def test_a_network_of_our_name_on_which_containers_reach_each_other_is_not_used(
    look_alike: None, server: Server, alice: Account
) -> None:
    done = server.run(user=alice, script="true")
    assert done.code == 1
    assert "on the network gpujobs containers reach each other" in done.words


def test_a_network_that_somebody_pruned_is_made_again(server: Server, alice: Account, lab: Engine) -> None:
    assert submitted(server, alice, script="true")["state"] == "succeeded"
    (found,) = json.loads(lab.docker("network", "inspect", "gpujobs"))
    assert found["Options"] == {"com.docker.network.bridge.enable_icc": "false"}
