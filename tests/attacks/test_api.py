"""The socket: other accounts' jobs, identities in requests, requests that are none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from tests.attacks.tools import Answer, raw, request, submission
from tests.e2e.harness import BUSYBOX, Place, Row, Server, wait_for
from tests.lab.accounts import Account
from tests.lab.engine import Engine

# -- other accounts' jobs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alices_job(server: Server, alice: Account) -> Iterator[Row]:
    """A job of alice's that runs, with a secret in it, for as long as the module's tests."""
    script = "echo the secret; while [ ! -e /tmp/end ]; do sleep 0.2; done"
    job = server.submit(user=alice, script=script, environment={"TOKEN": "the secret"}, working_dir="/tmp", cpus=0.1)
    wait_for(lambda: b"the secret" in server.cli("logs", job, user=alice).out, "it has said it")
    yield server.until(job, "running")
    server.cli("cancel", job)
    server.ended(job)


ACTIONS = {
    "cancel": ("POST", "/v1/jobs/{id}/cancel", {}),
    "logs": ("GET", "/v1/jobs/{id}/logs", None),
    "rerun": ("POST", "/v1/jobs/{id}/rerun", {}),
    "context": ("PUT", "/v1/jobs/{id}/context/0123", b"x"),
}


@pytest.mark.parametrize("action", [name for name in ACTIONS if name != "cancel"])
def test_an_action_on_anothers_job_is_refused_by_the_server_itself(
    server: Server, bob: Account, alices_job: Row, action: str
) -> None:
    """Whatever a client checks: the raw request of another account is refused, that of an administrator is not."""
    method, path, body = ACTIONS[action]
    data = request(method, path.format(id=alices_job["id"]), body)
    allowed = raw(server, None, data)
    assert allowed.status in (200, 201, 404), allowed  # there is no context of that key
    if action == "rerun":
        (made,) = allowed.body["jobs"]
        server.cli("cancel", str(made["id"]))
        server.ended(str(made["id"]))
    answer = raw(server, bob, data)
    assert answer.status == 403, answer
    assert answer.body["exit"] == 3
    assert "gjlab1" in answer.body["message"]
    assert "secret" not in answer.text


@pytest.mark.parametrize("command", [("cancel",), ("logs",), ("rerun",)])
def test_a_command_on_anothers_job_ends_with_3_and_says_whose_it_is(
    server: Server, bob: Account, alices_job: Row, command: tuple[str, ...]
) -> None:
    done = server.cli(*command, str(alices_job["id"]), user=bob)
    assert (done.code, b"secret" in done.out) == (3, False), done
    assert "gjlab1" in done.words
    assert server.job(str(alices_job["id"]))["state"] == "running"


def test_the_inside_of_anothers_job_is_not_shown(
    server: Server, alice: Account, bob: Account, alices_job: Row
) -> None:
    data = request("GET", f"/v1/jobs/{alices_job['id']}")
    assert "the secret" in raw(server, alice, data).text
    assert "the secret" not in raw(server, bob, data).text
    listed = raw(server, bob, request("GET", "/v1/jobs?all=1"))
    assert "the secret" not in listed.text


def test_cancelling_anothers_array_by_one_of_its_elements_is_refused(
    server: Server, alice: Account, bob: Account
) -> None:
    array = {"build": {"context": "/nowhere"}, "script": "echo {{ a }}", "matrix": {"a": [1, 2]}}
    answer = raw(server, alice, request("POST", "/v1/jobs", submission(array)))
    job = str(answer.body["jobs"][0]["id"])
    try:
        for element in (job, f"{job}_0", f"{job}_1"):
            answer = raw(server, bob, request("POST", f"/v1/jobs/{element}/cancel", {}))
            assert (answer.status, answer.body["exit"]) == (403, 3)
        assert all(row["state"] != "cancelled" for row in server.jobs() if str(row["id"]).startswith(job))
    finally:
        assert server.cli("cancel", job, user=alice).code == 0
        wait_for(lambda: all(row["ended_at"] for row in server.jobs()[-2:]), "the array has ended")


# -- what the Engine would do as root --------------------------------------------------------------------------

ENGINES = (
    ("GET", "/v1/jobs/{id}/archive?path=/etc/shadow"), ("PUT", "/v1/jobs/{id}/archive?path=/v"),
    ("HEAD", "/v1/jobs/{id}/archive?path=/"), ("GET", "/containers/{container}/archive?path=/etc/shadow"),
    ("GET", "/v1.41/containers/{container}/archive?path=/v/secret"), ("GET", "/containers/{container}/export"),
    ("POST", "/containers/{container}/exec"), ("POST", "/containers/create"), ("POST", "/commit?container={container}"),
    ("POST", "/images/load"), ("POST", "/images/create?fromSrc=-&repo=x"), ("POST", "/build?remote=x"),
    ("POST", "/volumes/create"), ("GET", "/events"), ("GET", "/v1/../containers/json"), ("GET", "/info"),
)  # fmt: skip


@pytest.fixture(scope="module")
def copied(lab: Engine, ground: Place) -> None:
    """What `docker cp` does with a read-only volume of a container that does not even run."""
    top = ground.path / "of-root"
    top.mkdir(mode=0o700)
    (top / "secret").write_text("root's secret\n")
    out, suid = ground.path / "copied", ground.path / "suid"
    suid.write_text("a program")
    suid.chmod(0o4755)
    mounts = ("--volume", f"{top}:/r:ro", "--volume", f"{top}:/w")
    made = lab.docker("create", *mounts, BUSYBOX, "true").strip()
    try:
        lab.docker("cp", f"{made}:/r/secret", str(out))
        lab.docker("cp", str(suid), f"{made}:/w/planted")
    finally:
        lab.docker("rm", made)
    assert out.read_text() == "root's secret\n"
    assert ((top / "planted").stat().st_uid, (top / "planted").stat().st_mode & 0o7777) == (0, 0o4755)


@pytest.mark.parametrize(("method", "path"), ENGINES)
def test_nothing_that_the_engine_does_as_root_can_be_asked_for_through_the_server(
    copied: None, server: Server, alice: Account, alices_job: Row, method: str, path: str
) -> None:
    """Nor does the server ask for it itself: the Engine's events of all attacks are looked through at their end."""
    wanted = path.format(id=alices_job["id"], container=alices_job["container"]["id"])
    answer = raw(server, alice, request(method, wanted))
    assert answer.status in (404, 405), answer
    assert "secret" not in answer.text


# -- identities ------------------------------------------------------------------------------------------------

SPOOFED = {
    "owner": "gjlab1", "uid": 5001, "user": "gjlab1", "gid": 0, "groups": [0, 42], "name": "gjlab1",
    "asker": {"uid": 0, "name": "root"}, "peer": {"pid": 1, "uid": 0, "gid": 0}, "is_admin": True, "admin": True,
}  # fmt: skip


def test_who_submits_is_the_connections_peer_whatever_the_request_says(
    server: Server, alice: Account, bob: Account
) -> None:
    """An administrator's ``run_as`` is what naming another account does where it is allowed."""
    allowed = raw(server, None, request("POST", "/v1/jobs", submission(run_as=alice.name)))
    (made,) = allowed.body["jobs"]
    assert server.ended(str(made["id"]))["owner"] == alice.name
    headers = "X-Remote-User: root\r\nX-Forwarded-For: 127.0.0.1\r\nAuthorization: Basic cm9vdDo=\r\n"
    body = {**submission(**SPOOFED), "files": [{**submission()["files"][0], **SPOOFED}]}  # type: ignore[index]
    answer = raw(server, bob, request("POST", "/v1/jobs", body, headers))
    if answer.status == 201:
        (made,) = answer.body["jobs"]
        row = server.ended(str(made["id"]))
        assert row["owner"] == bob.name
        assert server.cli("logs", str(row["id"])).out == f"{bob.uid}\n".encode()
    else:
        assert (answer.status, answer.body["exit"]) == (400, 2)


@pytest.mark.parametrize("run_as", ["gjlab1", "root", "0", "5001", "gjlab2", "", "gjlab1\x00", "../root", "-1"])
def test_only_administrators_submit_for_others(server: Server, bob: Account, run_as: str) -> None:
    before = len(server.jobs())
    answer = raw(server, bob, request("POST", "/v1/jobs", submission(run_as=run_as)))
    assert answer.status in (400, 403), answer
    assert answer.body["exit"] in (2, 3)
    assert len(server.jobs()) == before


def test_a_home_that_the_client_names_gives_nobody_elses_files(server: Server, alice: Account, bob: Account) -> None:
    (bob.home / "private").write_text("bob's\n")
    (bob.home / "private").chmod(0o600)
    os.chown(bob.home / "private", bob.uid, bob.gid)
    body = submission({"script": "cat /v/private", "volumes": ["~:/v:ro"]}, home=str(bob.home))
    assert raw(server, bob, request("POST", "/v1/jobs", body)).status == 201
    job = str(server.jobs()[-1]["id"])
    row = server.ended(job)
    assert server.cli("logs", job).out == b"bob's\n", row["message"]
    answer = raw(server, alice, request("POST", "/v1/jobs", body))
    assert answer.status == 201, answer
    row = server.ended(str(answer.body["jobs"][0]["id"]))
    assert (row["state"], row["started_at"]) == ("failed", None)
    assert "permission denied for gjlab1" in row["message"]


def test_an_account_that_may_not_use_the_server_cannot_even_ask(
    server: Server, alice: Account, mallory: Account
) -> None:
    assert server.cli("ps", user=alice).code == 0
    done = server.cli("ps", user=mallory)
    assert (done.code, done.out) == (3, b"")
    assert "may not use the server" in done.words


# -- requests that are none ------------------------------------------------------------------------------------

DEEP = b"[" * 200_000
BAD: dict[str, bytes] = {
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a line without end": b"GET /" + b"a" * 200_000,
    "headers without end": b"GET /v1/jobs HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 40_000,
    "a header of 200 KB": request("GET", "/v1/jobs", None, f"A: {'x' * 200_000}\r\n"),
    "deep JSON": request("POST", "/v1/jobs", DEEP),
    "JSON that is a list": request("POST", "/v1/jobs", b"[]"),
    "JSON that is a number": request("POST", "/v1/jobs", b"1e999"),
    "half a character": request("POST", "/v1/jobs", b'{"files": [{"text": "\\ud800"}]}'),
    "bytes that are no text": request("POST", "/v1/jobs", b"\xff\xfe"),
    "a NUL in the text": request("POST", "/v1/jobs", {"files": [{"text": "name: a\x00b"}]}),
    "texts that are numbers": request("POST", "/v1/jobs", {"files": [{"text": 5, "file": []}], "variables": [1]}),
    "files that are none": request("POST", "/v1/jobs", {"files": {"text": "x"}}),
    "an empty list": request("POST", "/v1/jobs", {"files": []}),
    "two lengths": request("POST", "/v1/jobs", b"{}", "Content-Length: 2\r\nContent-Length: 50\r\n"),
    "a length and chunks": request("POST", "/v1/jobs", b"0\r\n\r\nGET /v1/jobs HTTP/1.1\r\n\r\n",
                                   "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"),
    "a negative length": request("POST", "/v1/jobs", b"{}", "Content-Length: -1\r\n"),
    "a length that is no number": request("POST", "/v1/jobs", b"{}", "Content-Length: 0x10\r\n"),
    "a header in two lines": request("GET", "/v1/jobs", None, "A: b\r\n c\r\n"),
    "a header with a line in it": request("GET", "/v1/jobs", None, "A: b\rX: y\r\n"),
    "bad chunks": request("POST", "/v1/jobs", b"zz\r\n{}\r\n", "Transfer-Encoding: chunked\r\n"),
    "a GET with a body": request("GET", "/v1/server", b"{}"),
    "HTTP/1.0": b"GET /v1/server HTTP/1.0\r\n\r\n",
    "HTTP/9.9": b"GET /v1/server HTTP/9.9\r\n\r\n",
    "an unknown method": request("BREW", "/v1/jobs"),
    "TRACE": request("TRACE", "/v1/jobs"),
    "CONNECT": request("CONNECT", "localhost:22"),
    "an upgrade": request("GET", "/v1/jobs", None, "Upgrade: websocket\r\nConnection: Upgrade\r\n"),
    "another's address": request("GET", "http://169.254.169.254/latest/meta-data"),
    "a path that leads out": request("GET", "/v1/jobs/../../../../etc/passwd"),
    "a path that leads out, escaped": request("GET", "/v1/jobs/%2e%2e%2f%2e%2e%2fetc%2fpasswd"),
    "an id with a NUL": request("GET", "/v1/jobs/1%00"),
    "an id of SQL": request("GET", "/v1/jobs/1%27%20OR%20%271%27%3D%271"),
    "an id of a million digits": request("GET", f"/v1/jobs/{'9' * 60_000}"),
    "an id that is negative": request("GET", "/v1/jobs/-1"),
    "an id of other digits": request("GET", "/v1/jobs/%D9%A1"),
    "an attempt that is none": request("GET", "/v1/jobs/1/logs?attempt=..%2f..%2fx"),
    "a tail that is none": request("GET", "/v1/jobs/1/logs?tail=-1&since=nan&skip=1e9"),
    "a since that is infinite": request("GET", "/v1/jobs/1/logs?since=inf"),
    "a context of another's path": request("PUT", "/v1/jobs/1/context/..%2f..%2fx", b"x"),
    "a body of 100 MB in words": request("POST", "/v1/jobs", b"{}", "Content-Length: 100000000\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_request_that_is_none_is_answered_without_a_word_too_much(
    server: Server, alice: Account, what: str
) -> None:
    """The server outlives it, tells no trace of its code, and answers the next one."""
    answer: Answer = raw(server, alice, BAD[what], patience=0.5)
    assert answer.status < 500, answer
    assert "Traceback" not in answer.text
    assert "site-packages" not in answer.text
    assert "root:x:0" not in answer.text
    if answer.status >= 400 and answer.text.startswith("{"):
        assert {"code", "exit", "message"} <= set(answer.body), answer
    assert raw(server, alice, request("GET", "/v1/server")).status == 200


def test_a_reader_that_trusts_its_input_falls_over_the_same_bytes() -> None:
    """What these bytes do where nobody looks at them first."""
    with pytest.raises(RecursionError):
        json.loads(DEEP)
    text = json.loads('{"text": "\\ud800"}')["text"]
    with pytest.raises(UnicodeEncodeError):
        text.encode()


def test_a_submission_larger_than_the_limit_is_told_the_limit(server: Server, alice: Account) -> None:
    body = {"files": [{"text": "name: a\n# " + "x" * (40 << 20), "file": "x"}]}
    answer = raw(server, alice, request("POST", "/v1/jobs", body))
    assert (answer.status, answer.body["exit"]) in ((400, 2), (403, 3), (413, 2)), answer
    assert "MiB" in answer.body["message"]
