"""Who may use a server, as whom, what they see of others, and that none of them can keep the others out."""

from __future__ import annotations

import grp
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import membership
from tests.e2e.floods import FLOOD, asking
from tests.e2e.harness import BUSYBOX, GPUJOBS, Done, Place, Server, inspect, spec, wait_for
from tests.lab import accounts, nvml
from tests.lab.accounts import Account, command_as
from tests.lab.engine import Engine

MakeServer = Callable[..., Server]
HANGS = "while :; do sleep 1; done"


def words(done: Done, code: int) -> str:
    assert done.code == code, done
    assert "Traceback" not in done.words
    return done.words


def mode(server: Server) -> int:
    return stat.S_IMODE(server.socket.stat().st_mode)


# -- who is let in -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outsider(people: Sequence[Account]) -> Account:
    """An account that is in no group of the server's."""
    return accounts.ensure(len(people) + 1)[-1]


def test_without_users_the_sockets_mode_decides(make_server: MakeServer, alice: Account, outsider: Account) -> None:
    server = make_server().start()
    assert (mode(server), server.socket.stat().st_gid) == (0o660, grp.getgrnam("gpujobs").gr_gid)
    assert server.cli("ps", user=alice).code == 0
    assert "Ask the administrator to add you to the group gpujobs" in words(server.cli("ps", user=outsider), 3)


def test_a_star_opens_the_socket_to_all_and_a_reload_closes_it_again(
    make_server: MakeServer, outsider: Account
) -> None:
    server = make_server("users: ['*']").start()
    assert mode(server) == 0o666
    assert server.run(user=outsider, script="id -u").out == f"{outsider.uid}\n".encode()
    nobody = Account("nobody", 65534, 65534, Path("/"))
    assert "nobody's account" in words(server.cli("ps", user=nobody), 3)
    nameless = subprocess.run(
        ["setpriv", "--reuid=4987", "--regid=4987", "--clear-groups", sys.executable, "-c", _ASK, str(server.socket)],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    assert "uid 4987 has no account on this machine" in nameless.stdout, nameless
    server.reload("users: []")
    assert mode(server) == 0o660
    words(server.cli("ps", user=outsider), 3)
    server.reload("users: ['*']")
    assert server.cli("ps", user=outsider).code == 0


def test_listed_users_are_those_of_the_sockets_group_that_are_named(
    make_server: MakeServer, alice: Account, bob: Account
) -> None:
    server = make_server(f"users: [{alice.name}]").start()
    assert mode(server) == 0o660
    assert server.run(user=alice, script="true").code == 0
    assert f"{bob.name} may not use this server" in words(server.cli("ps", user=bob), 3)
    with membership("gjextra", bob):
        server.reload(f"users: [{alice.name}, '@gjextra']")
        assert server.cli("ps", user=bob).code == 0
    server.reload(f"users: [{alice.name}, '@gjextra']")
    assert server.cli("ps", user=bob).code == 3
    server.reload(f"{{users: [{alice.name}], admins: [{bob.name}]}}")
    assert server.cli("ps", user=bob).code == 0


def test_administrators_by_name_or_group_act_on_all_jobs_until_they_are_none(
    make_server: MakeServer, alice: Account, bob: Account
) -> None:
    with membership("gjextra", bob):
        server = make_server("admins: ['@gjextra']").start()
        jobs = [server.submit(user=alice, script=HANGS) for _ in range(2)]
        assert server.cli("cancel", jobs[0], user=bob).code == 0
        assert server.job(jobs[0])["message"] == f"cancelled by {bob.name}"
        assert server.run(user=bob, script="true").code == 0
        done = server.cli("run", "--run-as", alice.name, "-", user=bob, stdin=spec(script="id -un"))
        assert done.out == f"{alice.name}\n".encode(), done
        assert server.cli("run", "--run-as", "root", "-", user=bob, stdin=spec(script="true")).code == 3
        server.reload("admins: []")
        assert f"{alice.name}'s" in words(server.cli("cancel", jobs[1], user=bob), 3)
        words(server.cli("submit", "--run-as", alice.name, "-", user=bob, stdin=spec(script="true")), 3)


# -- as whom -------------------------------------------------------------------------------------------------------


def test_a_job_has_the_groups_that_the_submitting_process_really_has(
    make_server: MakeServer, alice: Account
) -> None:
    with membership("gjextra", alice) as gid:
        server = make_server().start()
        everything = server.run(user=alice, script="id -G").out.decode().split()
        assert str(gid) in everything
        shed = [*command_as(alice, ["true"])[:-1]]
        shed[shed.index("--init-groups")] = f"--groups={alice.gid},{grp.getgrnam('gpujobs').gr_gid}"
        done = subprocess.run(
            [*shed, f"GPUJOBS_HOST={server.host}", str(GPUJOBS), "run", "-"],
            input=spec(script="id -G"), capture_output=True, check=False, cwd="/",
        )  # fmt: skip
        assert done.returncode == 0, done
        assert set(done.stdout.decode().split()) == set(everything) - {str(gid)}
        # What the database does not give is not had either, though the process has it.
        shed[shed.index(f"--groups={alice.gid},{grp.getgrnam('gpujobs').gr_gid}")] = (
            f"--groups=0,42,{alice.gid},{grp.getgrnam('gpujobs').gr_gid}"
        )
        done = subprocess.run(
            [*shed, f"GPUJOBS_HOST={server.host}", str(GPUJOBS), "run", "-"],
            input=spec(script="id -G"), capture_output=True, check=False, cwd="/",
        )  # fmt: skip
        assert set(done.stdout.decode().split()) == set(everything) - {str(gid)}


_ASK = """
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
s.sendall(b"GET /v1/jobs HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
answer = b""
while chunk := s.recv(65536):
    answer += chunk
print(answer.decode())
"""

_LEAVE = """
import os, socket, sys, time
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
parent = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == parent:
    time.sleep(0.01)
s.sendall(b"GET /v1/jobs HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
answer = b""
while chunk := s.recv(65536):
    answer += chunk
print(answer.decode())
"""


@pytest.mark.parametrize("uid", [0, 5001], ids=["root", "the owner"])
def test_a_process_in_a_container_that_has_the_socket_is_refused_whoever_it_is(
    make_server: MakeServer, lab: Engine, people: Sequence[Account], uid: int
) -> None:
    server = make_server("users: ['*']").start()
    become = ["/usr/bin/setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
    inside = ["chroot", "/host", *become, "/usr/bin/python3", "-c", _ASK, str(server.socket)]
    answer = lab.docker("run", "--rm", "--network", "none", "--volume", "/:/host", BUSYBOX, *inside)
    assert " 403 " in answer.splitlines()[0], answer
    assert "the server is not for processes inside containers" in answer
    # The same in the host's PID namespace, which only who is root already can have, is answered.
    answer = lab.docker("run", "--rm", "--pid=host", "--network", "none", "--volume", "/:/host", BUSYBOX, *inside)
    assert " 200 " in answer.splitlines()[0], answer


def test_a_connection_whose_process_has_ended_is_nobodys(make_server: MakeServer, alice: Account) -> None:
    server = make_server().start()
    os.kill(server.pid, signal.SIGSTOP)  # it accepts when the process has gone
    try:
        process = subprocess.Popen(
            command_as(alice, [sys.executable, "-c", _LEAVE, str(server.socket)]), stdout=subprocess.PIPE, text=True,
            cwd="/",
        )  # fmt: skip
        process.wait(timeout=20)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert process.stdout is not None
    with process.stdout:
        answer = process.stdout.read()
    assert " 403 " in answer.splitlines()[0], answer
    assert "the process that connected has ended" in answer


# -- disabled accounts ---------------------------------------------------------------------------------------------


@pytest.fixture
def expiring(people: Sequence[Account]) -> Iterator[Account]:
    """An account that may expire within the test."""
    account = people[2]
    yield account
    subprocess.run(["usermod", "--expiredate", "", account.name], check=True)


def test_jobs_of_an_account_that_has_expired_are_held_and_others_pass_them(
    make_server: MakeServer, expiring: Account, alice: Account
) -> None:
    server = make_server().start()
    blocker = server.submit(script=HANGS, gpus=8)
    done = server.cli("submit", "--quiet", "--run-as", expiring.name, "-", stdin=spec(script="id -un", gpus=8))
    held = done.out.decode().strip()
    passing = server.submit(user=alice, script="true", gpus=8)
    subprocess.run(["usermod", "--expiredate", "1", expiring.name], check=True)
    server.reload("")
    server.cli("cancel", blocker)
    assert server.ended(passing)["state"] == "succeeded"
    row = server.job(held)
    assert (row["state"], row["reason"]) == ("queued", "account"), row
    assert row["message"] == f"the account {expiring.name} has expired"
    words(server.cli("submit", "--run-as", expiring.name, "-", stdin=spec(script="true")), 3)
    # A server that starts again finds it so, too.
    assert server.stop() == 0
    server.start()
    wait_for(lambda: server.job(held)["reason"] == "account", lambda: str(server.job(held)))
    subprocess.run(["usermod", "--expiredate", "", expiring.name], check=True)
    server.reload("")
    assert server.ended(held)["state"] == "succeeded"
    assert server.cli("logs", held).out == f"{expiring.name}\n".encode()


# -- what is seen of others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("visibility", ["all", "names-hidden", "counts"])
def test_of_others_jobs_as_much_is_seen_as_the_settings_say(
    make_server: MakeServer, alice: Account, bob: Account, place: Place, visibility: str, machine: nvml.Machine,
    nvml_state: Path,
) -> None:  # fmt: skip
    server = make_server(f"queue_visibility: {visibility}").start()
    missing = place.volume(alice)
    failing = server.submit(user=alice, name="hush-a", script="true", volumes=[f"{missing}/hush-path:/v"])
    server.ended(failing)
    running = server.submit(user=alice, name="hush-b", script=HANGS, gpus=8)
    server.until(running, "running")
    waiting = server.submit(user=alice, name="hush-c", script="true", gpus=8)
    mine = server.submit(user=bob, name="bobs", script="true", gpus=1)
    everything = ""
    listed = server.cli("ps", "--all", "--json", user=bob).json
    everything += json.dumps(listed)
    rows = {str(row["id"]): row for row in listed["jobs"]}
    assert rows[mine]["name"] == "bobs"
    assert rows[mine]["reason"] == "priority"
    table = server.cli("ps", "--all", user=bob)
    everything += table.out.decode() + table.words
    gpus = server.cli("gpus", "--json", user=bob).json
    everything += json.dumps(gpus) + server.cli("gpus", user=bob).out.decode()
    held = gpus["gpus"][0]["allocations"][0]
    plan = server.cli("plan", "--json", "-", user=bob, stdin=spec(script="true", gpus=1))
    everything += plan.out.decode() + plan.words
    for job in (failing, running, waiting):
        shown = server.cli("show", job, "--json", user=bob)
        everything += shown.out.decode() + shown.words
        # (Of a job that has not run there is no log that the client would ask for.)
        for command in ("cancel", "rerun", *(["logs"] if job == running else [])):
            done = server.cli(command, job, user=bob)
            assert done.code == (2 if visibility == "counts" else 3), done
            everything += done.words
        assert shown.code == (2 if visibility == "counts" else 0)
        if shown.code == 0:
            assert (shown.json["spec"], shown.json["container"], shown.json["attempts"]) == (None, None, [])
    assert "hush-path" not in everything, "how a job failed is its owner's"
    assert server.job(failing)["message"].count("hush-path")
    if visibility == "all":
        assert rows[waiting]["name"] == "hush-c"
        assert rows[waiting]["owner"] == held["owner"] == alice.name
        assert f"job {running}" in rows[mine]["message"] or "first in line" in rows[mine]["message"]
    else:
        assert not re.search(rf"hush|{alice.name}\b", everything)
        assert held["owner"] is None
    if visibility == "names-hidden":
        assert (rows[waiting]["state"], rows[waiting]["owner"], held["job"]) == ("queued", None, int(running))
    if visibility == "counts":
        assert set(rows) == {mine}
        assert held["job"] is None
        assert listed["others"] == {"running": 1, "queued": 1}
        assert "jobs of others:" in table.words
        with subprocess.Popen(
            command_as(bob, [str(GPUJOBS), "wait", running], {"GPUJOBS_HOST": server.host}), cwd="/",
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as watching:  # fmt: skip
            assert watching.wait(timeout=20) == 2
    # The owner and administrators see all of it.
    row = server.cli("show", waiting, "--json", user=alice).json
    assert (row["name"], row["owner"]) == ("hush-c", alice.name)
    assert row["spec"]["name"] == "hush-c"
    assert server.job(running)["name"] == "hush-b"
    # Nor does the reason why a job waits name a stranger on a GPU.
    server.cli("cancel", waiting)
    server.cli("cancel", running)
    server.ended(running)


# -- limits --------------------------------------------------------------------------------------------------------


_POST = """
import http.client, json, socket, sys
c = http.client.HTTPConnection("x")
c.sock = socket.socket(socket.AF_UNIX)
c.sock.connect(sys.argv[1])
c.request("POST", sys.argv[2], sys.stdin.buffer.read())
answer = c.getresponse()
print(answer.status, json.loads(answer.read()))
"""


def post(server: Server, user: Account, path: str, body: bytes) -> str:
    done = subprocess.run(
        command_as(user, [sys.executable, "-c", _POST, str(server.socket), path]), input=body, capture_output=True,
        check=True, cwd="/", timeout=60,
    )  # fmt: skip
    return done.stdout.decode()


def test_each_limit_is_answered_with_what_it_is(make_server: MakeServer, alice: Account, bob: Account) -> None:
    server = make_server(
        "{array_elements: 3, submission_jobs: 5, queued_jobs: 8, submissions_per_minute: 12, streams: 2}"
    ).start()
    array = {"matrix": {"n": [1, 2, 3, 4]}, "command": ["sh", "-c", "echo {{ n }}"]}
    done = server.cli("submit", "-", user=alice, stdin=spec(**array))
    assert "4 elements of one array; the limit is 3" in words(done, 3)
    array["matrix"] = {"n": [1, 2, 3]}
    files = [server.directory / f"{n}.yaml" for n in range(2)]
    for file in files:
        file.write_bytes(spec(**array))
        file.chmod(0o644)
    done = server.cli("submit", *map(str, files), user=alice)
    assert "6 jobs of one submission; the limit is 5" in words(done, 3)
    blocker = server.submit(user=bob, gpus=8, script=HANGS)
    server.until(blocker, "running")
    for _ in range(2):
        server.submit(user=alice, gpus=8, **array)
    done = server.cli("submit", "-", user=alice, stdin=spec(gpus=8, **array))
    assert f"9 jobs of {alice.name} that wait; the limit is 8" in words(done, 3)
    deep = b'{"files": ' + b"[" * 20 + b"]" * 20 + b"}"
    assert "403" in (answer := post(server, alice, "/v1/jobs", deep))
    assert "nested deeper than 16 levels" in answer
    answer = post(server, alice, "/v1/plan", b"[" * 100_000)
    assert "403" in answer
    assert "nested deeper than 16 levels" in answer
    assert "larger than 8 MiB" in post(server, alice, "/v1/plan", b" " * (8 * 2**20 + 1))
    for _ in range(20):
        done = server.cli("submit", "-", user=alice, stdin=b"name: t")
        if done.code != 2:
            break
    assert "at most 12 submissions a minute" in words(done, 3)
    assert server.cli("submit", "-", user=bob, stdin=spec(script="true")).code == 0
    # Two streams are open: a third is refused, and another account has its own.
    following = [
        subprocess.Popen(command_as(alice, [str(GPUJOBS), "wait", "1"], {"GPUJOBS_HOST": server.host}), cwd="/")
        for _ in range(2)
    ]
    try:
        wait_for(
            lambda: server.cli("wait", blocker, user=alice, timeout=10).code == 3 if _streams(server) >= 2 else None,
            "a third stream is refused",
        )
    finally:
        for process in following:
            process.kill()
            process.wait()


def _streams(server: Server) -> int:
    """Connections of the server's socket, its listening one not counted."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sum(str(server.socket) in line and " 03 " in line for line in lines)


def test_a_job_that_fills_its_containers_file_system_is_ended(make_server: MakeServer, alice: Account) -> None:
    server = make_server("layer_size: 64m").start()
    writes = server.submit(user=alice, script="dd if=/dev/zero of=/tmp/x bs=1M count=600 2>/dev/null; " + HANGS)
    row = server.ended(writes)
    assert (row["state"], row["reason"]) == ("failed", "quota"), row
    assert "600 MiB into its container's own file system; the limit (layer_size) is 64 MiB" in row["message"]


def test_one_connection_more_than_the_limit_is_told_so_and_root_has_none(
    make_server: MakeServer, alice: Account, bob: Account
) -> None:
    server = make_server("connections: 20").start()
    with asking(server, bob, FLOOD, "idle", "20") as flood:
        assert flood.stdout is not None
        assert flood.stdout.readline() == "on\n"
        assert "has 20 connections open, which is the limit" in words(server.cli("ps", user=bob), 3)
        assert server.cli("ps", user=alice).code == 0
        assert server.get("/jobs") == {"jobs": []}
    wait_for(lambda: server.cli("ps", user=bob).code == 0, "closed connections do not count")


def test_a_connection_that_sends_no_whole_head_is_closed(make_server: MakeServer) -> None:
    server = make_server().start()
    with socket.socket(socket.AF_UNIX) as slow, socket.socket(socket.AF_UNIX) as idle:
        for one in (slow, idle):
            one.settimeout(40)
            one.connect(str(server.socket))
        slow.sendall(b"GET /v1/jobs HTTP/1.1\r\nX-Slow: ")
        for one in (slow, idle):
            with suppress(ConnectionResetError):
                assert one.recv(1) == b""


# -- what the settings have to allow -------------------------------------------------------------------------------


def test_gated_features_are_refused_by_name_and_work_where_they_are_allowed(
    make_server: MakeServer, alice: Account, bob: Account, lab: Engine
) -> None:
    closed: list[dict[str, Any]] = [
        {"ipc": "host"}, {"network_mode": "host"}, {"cap_add": ["SYS_PTRACE"]}, {"runtime": "runsc"},
        {"driver_capabilities": ["compute", "video"], "gpus": 1}, {"ports": ["0.0.0.0::80"]},
    ]  # fmt: skip
    server = make_server().start()
    for keys in closed:
        (key, _), *_ = keys.items()
        said = words(server.cli("submit", "-", user=alice, stdin=spec(script="true", **keys)), 3)
        assert f"not allowed to {alice.name} here" in said
        assert f"`allow: {{{key}: " in said
        words(server.cli("plan", "-", user=alice, stdin=spec(script="true", **keys)), 3)
    with membership("gjextra", alice):
        everything = "'@gjextra'"
        server.reload(f"""
allow:
  ipc: {{host: [{everything}]}}
  network_mode: {{host: [{everything}]}}
  cap_add: {{SYS_PTRACE: [{everything}], NET_RAW: [{everything}]}}
  driver_capabilities: {{video: [{everything}]}}
  runtime: {{runsc: [{everything}]}}
  ports: {{any: [{everything}]}}
images: [gpujobs-lab/*]
""")
        done = server.run(user=alice, ipc="host", script="readlink /proc/self/ns/ipc")
        assert done.out.decode().strip() == os.readlink("/proc/self/ns/ipc"), done
        done = server.run(user=alice, network_mode="host", script="readlink /proc/self/ns/net")
        assert done.out.decode().strip() == os.readlink("/proc/self/ns/net"), done
        done = server.run(user=alice, network_mode="none", script="ls /sys/class/net; id -u")
        assert done.out.decode().split() == ["lo", str(alice.uid)], done
        done = server.run(user=alice, cap_add=["sys_ptrace", "CAP_NET_RAW"], script="cat /proc/self/status; id -G")
        fields = dict(line.split(":\t", 1) for line in done.out.decode().splitlines() if ":\t" in line)
        assert done.code == 0, done
        for name in ("CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"):
            assert int(fields[name], 16) == 1 << 19 | 1 << 13, (name, fields)
        assert fields["Uid"].split() == [str(alice.uid)] * 4
        assert (fields["NoNewPrivs"], fields["Gid"].split()) == ("1", [str(alice.gid)] * 4)
        done = server.run(
            user=alice, gpus=1, driver_capabilities=["compute", "video"], script="echo $$NVIDIA_DRIVER_CAPABILITIES"
        )
        assert done.out == b"compute,video\n", done
        job = server.submit(user=alice, ports=["0.0.0.0::80"], script=HANGS)
        name = server.until(job, "running") and server.job(job)["container"]["name"]
        assert inspect(lab, name)["HostConfig"]["PortBindings"]["80/tcp"][0]["HostIp"] == "0.0.0.0"
        server.cli("cancel", job)
        said = words(server.cli("submit", "-", user=alice, stdin=spec(script="true", runtime="runsc")), 3)
        assert "has no runtime runsc" in said
        said = words(server.cli("submit", "-", user=alice, stdin=spec(script="true", runtime="runsc", gpus=1)), 3)
        assert "for jobs without GPUs" in said
        for keys in closed:
            words(server.cli("submit", "-", user=bob, stdin=spec(script="true", **keys)), 3)
        said = words(server.cli("submit", "-", user=alice, stdin=spec(script="true", image="alpine")), 3)
        assert "image: alpine is not among the images" in said
        assert server.run(user=bob, script="true").code == 0
