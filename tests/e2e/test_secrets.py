"""Secrets with real containers: where they are, whose they are, and that they are nowhere else, whatever is killed."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.harness import BUSYBOX, GPUJOBS, Done, Place, Row, Server, inspect, run, wait_for
from tests.lab.accounts import Account
from tests.lab.engine import Engine

VALUE = "correct-horse-battery-staple"
FORMS = tuple(text.encode() for text in (VALUE, base64.b64encode(VALUE.encode()).decode().rstrip("=")[:-2]))
UNTIL_GO = "while [ ! -e /v/go ]; do sleep 0.05; done"
LOOK = "cd /run/secrets && stat -c '%n %a %u %g %s' . * && grep -c ' /run/secrets tmpfs ' /proc/mounts"

MakeServer = Callable[..., Server]
pytestmark = pytest.mark.usefixtures("machine")


@pytest.fixture
def key(place: Place, alice: Account) -> Path:
    """A file that alice alone can read."""
    path = place.volume(alice, "keys") / "key"
    path.write_text(VALUE)
    os.chown(path, alice.uid, alice.gid)
    path.chmod(0o600)
    return path


@pytest.fixture
def server(make_server: MakeServer) -> Server:
    """A server of the test's own: two on one Engine refuse, and some tests kill theirs."""
    return make_server().start()


@pytest.fixture
def volume(place: Place, alice: Account) -> Path:
    return place.volume(alice)


def secrets(key: Path, **more: str) -> dict[str, dict[str, str]]:
    return {"key": {"file": str(key), **more}}


def has(content: bytes) -> bool:
    return any(form in content for form in FORMS)


def has_in(directory: Path) -> list[str]:
    """The files below a directory in which the value is."""
    return [str(path) for path in directory.rglob("*") if path.is_file() and has(path.read_bytes())]


def exported(lab: Engine, container: str) -> bytes:
    """All that there is in a container's file system, as ``docker export`` has it."""
    done = run(["docker", "export", container], {"DOCKER_HOST": lab.host})
    assert done.code == 0, done
    return done.out


def output(server: Server, row: Row) -> str:
    done = server.cli("logs", str(row["id"]))
    assert done.code == 0, done
    return done.out.decode()


def test_the_program_finds_its_secret_as_a_file_of_its_own_in_memory(
    server: Server, alice: Account, key: Path
) -> None:
    row = server.ended(server.submit(user=alice, secrets=secrets(key), script=f"{LOOK}; cat key"))
    assert row["exit_code"] == 0, (row, server.cli("logs", str(row["id"])))
    assert output(server, row) == (
        f". 700 {alice.uid} {alice.gid} 60\nkey 400 {alice.uid} {alice.gid} {len(VALUE)}\n1\n{VALUE}"
    )


def test_a_variable_of_the_clients_becomes_one_of_the_programs(server: Server, alice: Account) -> None:
    text = {"name": "t", "image": BUSYBOX, "mem_limit": "64m",
            "secrets": {"hf": {"environment": "MY_TOKEN", "target": "hf-token", "variable": "HF_TOKEN"}},
            "command": ["sh", "-c", "cat /run/secrets/hf-token; printf '[%s]' \"$$HF_TOKEN\"; env | grep -c MY_TOKEN"]}
    done = run([str(GPUJOBS), "run", "-"], {"GPUJOBS_HOST": server.host, "MY_TOKEN": f"{VALUE}\n"},
               user=alice, stdin=json.dumps(text).encode())  # fmt: skip
    assert done.out.decode() == f"{VALUE}\n[{VALUE}]0\n", done


def test_nothing_but_the_program_and_its_files_has_the_value(
    make_server: MakeServer, alice: Account, bob: Account, key: Path, volume: Path, lab: Engine, place: Place
) -> None:
    server = make_server().start()
    job = server.submit(
        user=alice, secrets=secrets(key, variable="TOKEN"), script=f'[ "$$TOKEN" ] && {UNTIL_GO}',
        volumes=[f"{volume}:/v"],
    )  # fmt: skip
    row = server.until(job, "running")
    container = row["container"]["id"]
    pid = inspect(lab, container)["State"]["Pid"]
    wait_for(lambda: Path(f"/proc/{pid}/root/run/secrets/key").exists(), "the secret is there")
    assert not has(json.dumps(inspect(lab, container)).encode())
    for command in (("show", job, "--json"), ("ps", "--json"), ("logs", job)):
        assert not has(server.cli(*command, user=alice).out), command
    for argv in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert not has(argv.read_bytes()), argv
        except (FileNotFoundError, ProcessLookupError):
            continue
    assert not has(exported(lab, container))
    image = "gpujobs-test/committed:1"
    lab.docker("commit", container, image)
    try:
        assert not has(lab.docker("image", "inspect", image).encode())
        assert not has(lab.docker("history", "--no-trunc", image).encode())
        made = lab.docker("create", image).strip()
        assert not has(exported(lab, made))
        lab.docker("rm", made)
    finally:
        lab.docker("image", "rm", image)
    allowed = {path for path in has_in(server.state) if Path(path).parent.name == "secrets" or
               Path(path).name == "secrets"}  # fmt: skip
    assert len(allowed) == len(has_in(server.state)) == 2
    for path in (*allowed, f"/proc/{pid}/root/run/secrets/key", f"/proc/{pid}/environ"):
        done = run(["cat", path], {}, user=bob)
        assert (done.code, done.out) == (1, b""), done
    (volume / "go").touch()
    assert server.ended(job)["state"] == "succeeded"
    wait_for(lambda: not has_in(server.state), lambda: f"nothing is left in the state: {has_in(server.state)}")
    assert not has(exported(lab, container))
    assert server.stop() == 0
    assert not has_in(place.path / "state")
    assert not has(server.said.encode())


def test_a_server_that_is_killed_before_the_start_delivers_it_all_the_same(
    make_server: MakeServer, alice: Account, key: Path, volume: Path
) -> None:
    server = make_server().start()
    first = server.submit(user=alice, gpus=8, script=UNTIL_GO, volumes=[f"{volume}:/v"])
    server.until(first, "running")
    job = server.submit(user=alice, gpus=1, secrets=secrets(key), script="cat /run/secrets/key")
    key.unlink()
    server.kill()
    server.start()
    assert server.job(job)["state"] == "queued"
    (volume / "go").touch()
    row = server.ended(job)
    assert output(server, row) == VALUE
    wait_for(lambda: not has_in(server.state / "secrets") and not has_in(server.state / "attempts"), "it is gone")


@pytest.mark.parametrize("point", ["submission-committed", "container-created", "container-started", "released",
                                   "container-ended", "end-committed"])  # fmt: skip
def test_a_server_that_is_killed_while_a_job_starts_or_ends_delivers_it_and_leaves_none(
    make_server: MakeServer, alice: Account, key: Path, point: str
) -> None:
    server = make_server().start(GPUJOBS_FAULT=point)
    text = json.dumps({"name": "t", "image": BUSYBOX, "mem_limit": "64m", "secrets": secrets(key),
                       "command": ["cat", "/run/secrets/key"]}).encode()  # fmt: skip
    server.cli("submit", "-", user=alice, stdin=text)
    server.died()
    server.start()
    (job,) = server.jobs()
    row = server.ended(str(job["id"]))
    assert (row["exit_code"], output(server, row)) == (0, VALUE), row
    wait_for(lambda: not has_in(server.state / "secrets") and not has_in(server.state / "attempts"), "it is gone")


def test_a_job_that_keeps_a_capability_has_its_secrets_as_its_own(
    make_server: MakeServer, alice: Account, key: Path
) -> None:
    """Its container begins as root, and the init becomes the user."""
    server = make_server("allow: {cap_add: {SYS_PTRACE: ['*']}}").start()
    job = server.submit(user=alice, cap_add=["SYS_PTRACE"], secrets=secrets(key), script=LOOK)
    row = server.ended(job)
    assert row["exit_code"] == 0, (row, server.cli("logs", str(row["id"])))
    assert f"key 400 {alice.uid} {alice.gid}" in output(server, row)


def test_a_health_check_has_the_variable(server: Server, alice: Account, key: Path, lab: Engine) -> None:
    job = server.submit(
        user=alice, secrets=secrets(key, variable="TOKEN"), script="while [ ! -e /tmp/well ]; do sleep 0.1; done",
        healthcheck={"test": ["CMD", "sh", "-c", "[ -n \"$$TOKEN\" ] && cat /run/secrets/key && touch /tmp/well"],
                     "interval": "1s"},
    )  # fmt: skip
    assert server.ended(job)["state"] == "succeeded"


def test_a_volume_above_the_secrets_gets_their_directory_as_its_owners(
    server: Server, alice: Account, key: Path, volume: Path
) -> None:
    job = server.submit(user=alice, secrets=secrets(key), volumes=[f"{volume}:/run"], script="cat /run/secrets/key")
    row = server.ended(job)
    assert (row["exit_code"], output(server, row)) == (0, VALUE), row
    made = (volume / "secrets").stat()
    assert (made.st_uid, list((volume / "secrets").iterdir())) == (alice.uid, [])


def test_a_plan_tells_where_it_would_be_from_and_not_what_it_is(server: Server, alice: Account, key: Path) -> None:
    text = json.dumps({"name": "t", "image": BUSYBOX, "secrets": secrets(key)}).encode()
    done = server.cli("plan", "--json", "-", user=alice, stdin=text)
    assert f"source={key},target=/run/secrets/key,readonly" in done.json["docker_run"]
    assert not has(done.out)


def refused(done: Done, code: int, *words: str) -> None:
    assert (done.code, done.out) == (code, b""), done
    for text in words:
        assert text in done.words


def test_what_cannot_be_read_is_told_in_its_place(server: Server, alice: Account, key: Path) -> None:
    text = f"name: t\nimage: a\nsecrets:\n  a: {{file: /etc/shadow}}\n  b: {{file: {key}}}\n  c: {{file: /tmp}}\n"
    refused(server.cli("submit", "-", user=alice, stdin=text.encode()), 2,
            "<stdin>:4:6: secrets.a: /etc/shadow: Permission denied",
            "<stdin>:6:6: secrets.c: /tmp: Is a directory")  # fmt: skip


def test_it_is_not_run_again_without_its_secrets(server: Server, alice: Account, key: Path) -> None:
    job = server.submit(user=alice, secrets=secrets(key), script="true")
    server.ended(job)
    refused(server.cli("rerun", job, user=alice), 3, f"job {job} has secrets", "Submit its file again")


def test_somebody_else_gives_none_to_a_job(server: Server, alice: Account, key: Path) -> None:
    text = json.dumps({"name": "t", "image": BUSYBOX, "secrets": secrets(key)}).encode()
    refused(server.cli("submit", "--run-as", alice.name, "-", stdin=text), 2, "with --run-as there are none")

