"""A service manager's two protocols with the real server: the socket that it passes on, and what it is told."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from gpujobs.adapters.servicemanager import ServiceManager, passed_socket
from tests.e2e.harness import Done, spec, wait_for
from tests.integration.managed import Receiver, Server, ask
from tests.lab import accounts
from tests.lab.accounts import Account


@pytest.fixture
def listener(place: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as found:
        found.bind(str(place / "passed.sock"))
        (place / "passed.sock").chmod(0o640)
        found.listen(64)
        yield found


@pytest.fixture(params=["path", "abstract"])
def receiver(request: pytest.FixtureRequest, place: Path) -> Iterator[Receiver]:
    found = Receiver(str(place / "notify") if request.param == "path" else f"@gpujobs-test-{os.getpid()}")
    yield found
    found.close()


# -- the socket ----------------------------------------------------------------------------------------------


def test_a_passed_socket_is_used_as_it_is_and_left_to_its_maker(
    server: Server, place: Path, listener: socket.socket
) -> None:
    address = place / "passed.sock"
    before = address.stat()
    early = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with closing(early):
        early.connect(str(address))  # before there is any server: the connection waits in the queue
        early.sendall(b"GET /v1/server HTTP/1.1\r\nHost: x\r\n\r\n")
        server.spawn(listener)
        early.settimeout(30)
        assert early.recv(65536).startswith(b"HTTP/1.1 200")
    assert f"listening on unix://{address}\n" in server.said
    assert ask(address, "ps").code == 0
    assert not server.own.exists()
    assert server.stop() == 0
    after = address.stat()
    assert after.st_ino == before.st_ino
    assert after.st_mode & 0o007 == 0  # by the settings, members of the group at most


def test_who_asks_while_the_server_restarts_only_waits(server: Server, place: Path, listener: socket.socket) -> None:
    address = place / "passed.sock"
    server.spawn(listener)
    server.listens()
    assert server.stop() == 0
    answers: list[Done] = []
    asking = threading.Thread(target=lambda: answers.append(ask(address, "ps")))
    asking.start()
    server.spawn(listener)
    asking.join(timeout=60)
    assert [answer.code for answer in answers] == [0], answers


def test_no_process_that_the_server_starts_gets_the_socket_or_the_managers_variables(
    server: Server, listener: socket.socket, receiver: Receiver
) -> None:
    process = server.spawn(listener, NOTIFY_SOCKET=receiver.address, WATCHDOG_USEC="60000000")
    receiver.until("READY")
    inode = f"socket:[{os.fstat(listener.fileno()).st_ino}]"
    assert inode in {os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()}
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    for child in children:
        assert inode not in {os.readlink(link) for link in Path(f"/proc/{child}/fd").iterdir()}
        names = {item.partition(b"=")[0] for item in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")}
        assert not names & {b"NOTIFY_SOCKET", b"WATCHDOG_USEC", b"LISTEN_FDS", b"LISTEN_PID", b"LISTEN_FDNAMES"}


def test_a_socket_that_was_passed_to_another_process_is_not_taken(server: Server, listener: socket.socket) -> None:
    server.spawn(listener, LISTEN_PID="1")
    server.listens()
    assert f"listening on unix://{server.own}" in server.said
    assert ask(server.own, "ps").code == 0
    assert server.stop() == 0
    assert not server.own.exists()


def _datagram(stack: ExitStack, place: Path) -> list[socket.socket | int]:
    made = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    made.bind(str(place / "datagram"))
    return [made]


def _not_listening(stack: ExitStack, place: Path) -> list[socket.socket | int]:
    made = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    made.bind(str(place / "silent"))
    return [made]


def _tcp(stack: ExitStack, place: Path) -> list[socket.socket | int]:
    made = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    made.bind(("127.0.0.1", 0))
    made.listen()
    return [made]


def _abstract(stack: ExitStack, place: Path) -> list[socket.socket | int]:
    made = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    made.bind(f"\0gpujobs-abstract-{os.getpid()}")
    made.listen()
    return [made]


def _pipe(stack: ExitStack, place: Path) -> list[socket.socket | int]:
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return [ends[0]]


def _two(stack: ExitStack, place: Path) -> list[socket.socket | int]:
    return [*_not_listening(stack, place), *_tcp(stack, place)]


@pytest.mark.parametrize(
    ("passed", "words"),
    [
        (_datagram, "is no listening unix stream socket"),
        (_not_listening, "is no listening unix stream socket"),
        (_tcp, "is no listening unix stream socket"),
        (_abstract, "is no listening unix stream socket"),
        (_pipe, "descriptor 3, which the service manager passed, is no socket"),
        (_two, "the service manager passed 2 sockets, and the server listens at one"),
    ],
)
def test_any_other_socket_is_refused_before_anything_is_made(
    server: Server, place: Path, passed: Callable[[ExitStack, Path], list[socket.socket | int]], words: str
) -> None:
    with ExitStack() as stack:
        assert server.spawn(*passed(stack, place)).wait(timeout=30) == 3
    assert words in server.said
    assert not server.state.exists()
    assert not server.own.exists()


def test_without_a_manager_nothing_is_passed_and_nobody_is_told() -> None:
    assert passed_socket({}) is None
    assert passed_socket({"LISTEN_FDS": "x", "LISTEN_PID": str(os.getpid())}) is None
    assert passed_socket({"LISTEN_FDS": "0", "LISTEN_PID": str(os.getpid())}) is None
    manager = ServiceManager.of({})
    assert manager.watchdog is None
    manager.ready("x")
    manager.stopping()


# -- what is told --------------------------------------------------------------------------------------------


def test_the_manager_hears_of_start_reload_and_stop_from_the_server_itself(server: Server, receiver: Receiver) -> None:
    process = server.spawn(NOTIFY_SOCKET=receiver.address)
    first = receiver.next()
    assert first == {"READY": "1", "STATUS": f"listening on unix://{server.own}"}
    assert ask(server.own, "ps").code == 0
    server.config.write_text("keep_ended: soon\n")
    process.send_signal(signal.SIGHUP)
    reloading, wrong = receiver.next(), receiver.next()
    assert reloading["RELOADING"] == "1"
    assert reloading["MONOTONIC_USEC"].isdecimal()
    assert wrong == {"READY": "1", "STATUS": f"{first['STATUS']}; the settings on disk are wrong: see the log"}
    server.config.write_text("keep_ended: 1h\n")
    process.send_signal(signal.SIGHUP)
    assert [receiver.next().get(name) for name in ("RELOADING", "READY")] == ["1", "1"]
    process.send_signal(signal.SIGTERM)
    assert receiver.next()["STOPPING"] == "1"
    assert process.wait(timeout=30) == 0
    assert receiver.senders == {process.pid}


def test_a_server_that_cannot_start_never_says_that_it_is_ready(server: Server, receiver: Receiver) -> None:
    server.config.write_text("admins: ada\n")
    assert server.spawn(NOTIFY_SOCKET=receiver.address).wait(timeout=30) == 2
    assert receiver.next(timeout=0) == {}
    assert "server.yaml:1:9: admins: " in server.said
    assert not server.state.exists()


@pytest.mark.parametrize("address", ["/nowhere/at/all", "@gpujobs-nobody", "vsock:2:1234"])
def test_a_manager_that_does_not_hear_is_no_reason_not_to_serve(server: Server, address: str) -> None:
    server.spawn(NOTIFY_SOCKET=address, WATCHDOG_USEC="100000")
    server.listens()
    assert ask(server.own, "ps").code == 0
    assert server.stop() == 0
    assert server.said.count("service manager") == 1, server.said


def test_the_watchdog_of_another_process_is_not_fed() -> None:
    usual = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "3000000"}
    assert ServiceManager.of(dict(usual)).watchdog == 3.0
    assert ServiceManager.of({**usual, "WATCHDOG_PID": str(os.getpid())}).watchdog == 3.0
    assert ServiceManager.of({**usual, "WATCHDOG_PID": "1"}).watchdog is None
    assert ServiceManager.of({"WATCHDOG_USEC": "3000000"}).watchdog is None
    assert ServiceManager.of({**usual, "WATCHDOG_USEC": "0"}).watchdog is None
    assert ServiceManager.of({**usual, "WATCHDOG_USEC": "-5"}).watchdog is None


def test_the_watchdog_is_fed_at_half_its_time_while_the_loop_decides_and_not_while_it_is_stuck(
    server: Server, receiver: Receiver, alice: Account
) -> None:
    within = 1.0
    server.spawn(NOTIFY_SOCKET=receiver.address, WATCHDOG_USEC=str(int(within * 1e6)))
    receiver.until("READY")
    done = ask(server.own, "submit", "--quiet", "--run-as", alice.name, "-", stdin=spec(script="exec sleep 300"))
    assert done.code == 0, done
    job = done.out.decode().strip()
    wait_for(lambda: ask(server.own, "show", "--json", job).out.find(b'"running"') > 0, "the job runs", 60)
    while receiver.next(timeout=0):
        pass  # what came while the job started
    times = []
    for _ in range(5):
        receiver.until("WATCHDOG", timeout=within)
        times.append(time.monotonic())
    assert (times[-1] - times[0]) / 4 == pytest.approx(within / 2, rel=0.5)

    cancelled: list[Done] = []
    with closing(sqlite3.connect(server.state / "state.sqlite", isolation_level=None)) as ledger:
        ledger.execute("BEGIN IMMEDIATE")  # what the loop has to write cannot be written: it waits
        asking = threading.Thread(target=lambda: cancelled.append(ask(server.own, "cancel", job)))
        asking.start()
        deadline = time.monotonic() + 20
        while receiver.next(timeout=2 * within):  # until none has come for twice the time that the manager allows
            assert time.monotonic() < deadline, "it is told that all is well, and nothing is decided"
        assert ask(server.own, "ps").code == 0  # the process as such lives: reading needs no decision
        ledger.execute("ROLLBACK")
    receiver.until("WATCHDOG")
    asking.join(timeout=60)
    assert cancelled[0].code == 0, cancelled
    wait_for(lambda: ask(server.own, "show", "--json", job).out.find(b'"cancelled"') > 0, "it is cancelled", 60)
    assert server.stop() == 0


@pytest.fixture(scope="module")
def alice() -> Account:
    return accounts.ensure()[0]
