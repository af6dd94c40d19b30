from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpujobs import places, wire
from gpujobs.core.errors import InvalidInput, Problem, Refused, Unavailable, UnknownId
from gpujobs.faces import jobfiles
from gpujobs.faces.client import FIRST_RECORD, Client, exit_code_of, find_host, id_of
from gpujobs.faces.transport import Host, Lost, NoServer
from tests.unit.fakeserver import Drop, FakeServer, Request, Stream, frames, lines, row


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeServer]:
    server = FakeServer(tmp_path / "s.sock")
    server.start()
    yield server
    server.stop()


def client_of(fake: FakeServer, **more) -> Client:
    return Client(Host(fake.path), **more)


# --- where the server is


def test_the_host_that_the_environment_names_comes_first():
    found = find_host({"GPUJOBS_HOST": "unix:///somewhere/a.sock", "HOME": "/home/a"})
    assert (found.path, found.given) == (Path("/somewhere/a.sock"), True)
    assert str(found) == "unix:///somewhere/a.sock"


@pytest.mark.parametrize("bad", ["tcp://a:1", "unix://relative", "/plain", "unix:///dir/", "ssh://a@b", "unix://"])
def test_a_host_that_is_no_unix_socket_is_refused_as_bad_input(bad):
    with pytest.raises(InvalidInput, match="GPUJOBS_HOST"):
        find_host({"GPUJOBS_HOST": bad})


def test_the_systems_socket_comes_before_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(places, "SYSTEM_RUN", tmp_path / "run")
    monkeypatch.setattr(places, "SYSTEM_SETTINGS", tmp_path / "server.yaml")
    environ = {"XDG_RUNTIME_DIR": str(tmp_path / "user"), "HOME": "/home/a"}
    own = tmp_path / "user/gpujobs/gpujobs.sock"
    assert find_host(environ).path == own
    (tmp_path / "server.yaml").touch()
    assert find_host(environ).path == tmp_path / "run/gpujobs.sock"
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_host(environ).path == own
    (tmp_path / "run").mkdir()
    (tmp_path / "run/gpujobs.sock").touch()
    assert find_host(environ).path == tmp_path / "run/gpujobs.sock"


def test_state_and_socket_follow_the_xdg_variables_and_ignore_relative_ones():
    assert places.user_state({"HOME": "/h"}) == Path("/h/.local/state/gpujobs")
    assert places.user_state({"HOME": "/h", "XDG_STATE_HOME": "/x"}) == Path("/x/gpujobs")
    assert places.user_state({"HOME": "/h", "XDG_STATE_HOME": "x"}) == Path("/h/.local/state/gpujobs")
    assert places.user_state({"HOME": "/h", "GPUJOBS_STATE": "/s"}) == Path("/s")
    assert places.user_socket({"HOME": "/h"}) == Path("/h/.local/state/gpujobs/gpujobs.sock")
    assert places.user_socket({"HOME": "/h", "XDG_RUNTIME_DIR": "/r"}) == Path("/r/gpujobs/gpujobs.sock")


def test_a_socket_path_of_300_bytes_works(tmp_path):
    directory = tmp_path / ("d" * 150) / ("e" * 150)
    directory.mkdir(parents=True)
    fake = FakeServer(directory / "s.sock")
    fake.on("GET", "/v1/server", {"version": "1"})
    fake.start()
    try:
        assert len(bytes(fake.path)) > 300
        assert client_of(fake).server() == {"version": "1"}
    finally:
        fake.stop()


def test_a_socket_name_that_fits_no_address_is_refused_plainly(tmp_path):
    with pytest.raises(InvalidInput, match="too long"):
        Client(Host(tmp_path / ("n" * 120))).server()


# --- who answers


def test_nobody_there_is_told_with_what_to_do(tmp_path):
    with pytest.raises(NoServer, match="no server is running") as caught:
        Client(Host(tmp_path / "none.sock")).jobs()
    assert caught.value.exit == 4
    assert "gpujobs serve" in caught.value.hint


def test_a_socket_that_its_server_left_behind_is_told_as_an_unclean_end(fake):
    fake.stop(uncleanly=True)
    with pytest.raises(NoServer, match="ended uncleanly") as caught:
        client_of(fake).jobs()
    assert caught.value.exit == 4


AS_NOBODY = """
import os, sys
from pathlib import Path
from gpujobs.core.errors import GpujobsError
from gpujobs.faces.client import Client
from gpujobs.faces.transport import Host
# Only now: the other account may not be able to read what is imported.
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    Client(Host(Path(sys.argv[1]))).jobs()
except GpujobsError as error:
    print(error.exit, error.message, error.hint, sep="|")
"""


def as_nobody(path: Path) -> list[str]:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(path)], capture_output=True, text=True, timeout=60, check=True,
        cwd=root, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(root)},
    )  # fmt: skip
    return done.stdout.strip().split("|")


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every account can enter; pytest's own are private."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_socket_closed_to_this_account_is_refused_with_the_group_to_ask_for(open_directory):
    fake = FakeServer(open_directory / "s.sock")
    fake.start()
    try:
        os.chown(fake.path, 0, 1)
        fake.path.chmod(0o660)
        code, message, hint = as_nobody(fake.path)
        assert code == "3"
        assert "may not use the server" in message
        assert "group daemon" in hint
        fake.path.chmod(0o600)
        assert "another account alone" in as_nobody(fake.path)[2]
    finally:
        fake.stop()


def test_a_server_of_another_account_is_refused_and_sent_nothing(fake, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    fake.on("GET", "/v1/jobs", {"jobs": []})
    if os.getuid() == 0:
        # root's server is trusted by everybody
        assert client_of(fake).jobs() == []
    monkeypatch.setattr(
        socket.socket,
        "getsockopt",
        lambda *_: (1).to_bytes(4, "little") + (777).to_bytes(4, "little") + bytes(4),
    )
    asked = len(fake.requests)
    with pytest.raises(Refused, match="runs as uid 777"):
        client_of(fake).jobs()
    assert len(fake.requests) == asked


# --- errors and odd answers


def test_an_error_of_the_api_arrives_with_its_kind_hint_and_problems(fake):
    problem = {"file": "a.yaml", "line": 3, "column": 5, "path": "gpus", "message": "is no number"}
    body = {
        "code": "invalid",
        "exit": 2,
        "message": "a.yaml has a mistake",
        "hint": "fix it",
        "problems": [problem],
    }
    fake.on("GET", "/v1/jobs/12", (400, body))
    with pytest.raises(InvalidInput) as caught:
        client_of(fake).job("12")
    assert caught.value.hint == "fix it"
    assert caught.value.problems == (Problem("a.yaml", 3, 5, "gpus", "is no number"),)


@pytest.mark.parametrize("body", [b"oops", b"[]", b'{"detail": 1}', b'{"message": "m", "problems": [1]}', b"\xff"])
def test_an_error_that_is_none_of_ours_is_told_as_such(fake, body):
    fake.on("GET", "/v1/gpus", (500, body))
    with pytest.raises(Exception, match="answered 500 without saying why"):
        client_of(fake).gpus()


def test_what_answers_without_json_is_no_server_of_ours(fake):
    fake.on("GET", "/v1/gpus", (200, b"<html>"))
    with pytest.raises(Exception, match="no gpujobs server"):
        client_of(fake).gpus()


def test_a_submission_whose_answer_is_lost_is_not_sent_again(fake, tmp_path):
    (tmp_path / "a.yaml").write_text("name: a\n")

    def vanish(_: Request) -> Stream:
        raise ConnectionAbortedError

    fake.on("POST", "/v1/jobs", vanish)
    with pytest.raises(Lost) as caught:
        client_of(fake).submit([str(tmp_path / "a.yaml")])
    assert "gpujobs ps" in caught.value.hint
    assert len(fake.requests) == 1


def test_an_answer_that_does_not_come_is_given_up(fake):
    release = threading.Event()
    fake.on("GET", "/v1/gpus", lambda _: {"waited": release.wait(30)})
    with pytest.raises(Lost, match="took longer"):
        client_of(fake, answer=0.1).gpus()
    release.set()


def test_an_id_cannot_leave_its_place_in_the_path(fake):
    with pytest.raises(UnknownId):
        client_of(fake).job("../gpus?x=1#y")
    assert fake.requests[-1].path == "/v1/jobs/..%2Fgpus%3Fx%3D1%23y"
    with pytest.raises(InvalidInput, match="empty"):
        client_of(fake).job("")


# --- what is sent


def test_the_exact_requests(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.setenv("DATA", "/srv")
    monkeypatch.setenv("SECRET", "s")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/train.yaml").write_text("name: ${DATA:-x} $$SECRET\nenv_file: my.env\n")
    (tmp_path / "sub/my.env").write_text("A=1\n")
    for path in ("/v1/jobs", "/v1/jobs/12_3", "/v1/jobs/12_3/cancel"):
        fake.on("GET", path, {"jobs": []})
        fake.on("POST", path, {"jobs": [{"id": 1}]})
    client = client_of(fake)
    client.submit(["sub/train.yaml"], run_as="bob")
    client.jobs()
    client.jobs(everything=True, limit=5)
    client.job("12_3")
    client.cancel("12_3")
    assert [(r.method, r.path, r.query) for r in fake.requests] == [
        ("POST", "/v1/jobs", {}),
        ("GET", "/v1/jobs", {"all": "0"}),
        ("GET", "/v1/jobs", {"all": "1", "limit": "5"}),
        ("GET", "/v1/jobs/12_3", {}),
        ("POST", "/v1/jobs/12_3/cancel", {}),
    ]
    assert fake.requests[0].body == {
        "files": [
            {
                "file": "sub/train.yaml",
                "directory": str(tmp_path / "sub"),
                "text": "name: ${DATA:-x} $$SECRET\nenv_file: my.env\n",
            }
        ],
        "variables": {"DATA": "/srv"},
        "home": "/home/a",
        "working_directory": str(tmp_path),
        "env_files": {"my.env": "A=1\n"},
        "run_as": "bob",
        "options": {},
    }


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("env_file: a.env", {"a.env"}),
        ("env_file: 'a.env'  # mine", {"a.env"}),
        ("env_file: [a.env, \"b.env\"]", {"a.env", "b.env"}),
        ("env_file: [a.env,\n  b.env] # x", {"a.env", "b.env"}),
        ("env_file:\n- a.env\n- b.env\nname: c.env", {"a.env", "b.env"}),
        ("env_file:\n  # c.env\n  - path: a.env\n    required: false\n\n  - b.env", {"a.env", "b.env"}),
        ("env_file:\n  - required: false\n    path: a.env", {"a.env"}),
        ("env_file: [{path: a.env, required: false}]", {"a.env"}),
        ("env_file: ${WHICH}.env", {"a.env"}),
        ("env_file: ${NONE:-b}.env", {"b.env"}),
        ("env_file: ~/home.env", {"~/home.env"}),
        ("env_file: missing.env", set()),
        ("env_file: pipe.env", set()),
        ("env_file: .", set()),
        ("environment:\n  env_file: a.env", set()),
        ("name: a.env", set()),
        ("env_file:", set()),
        ("env_file: \"a\0.env\"", set()),
    ],
)  # fmt: skip
def test_env_files_are_found_in_every_form(tmp_path, monkeypatch, text, found):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.env", "b.env", "c.env", "home.env"):
        (tmp_path / name).write_text("A=1\n")
    os.mkfifo(tmp_path / "pipe.env")
    assert set(jobfiles.env_files_of(text, tmp_path, {"WHICH": "a"})) == found


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("a: ${ONE}", {"ONE"}),
        ("a: $ONE ${TWO:-b} $$TWO", {"ONE", "TWO"}),
        ("environment:\n  - ONE\n  - TWO=2\n", {"ONE"}),
        ("environment:\n  ONE:\n  TWO: 2\n", {"ONE"}),
        ("environment:\n  ONE: ~ # mine\n", {"ONE"}),
        ("environment: [ONE, TWO]", {"ONE", "TWO"}),
        ("environment: {ONE: , X: 1}", {"ONE"}),
        ("command: [echo, ONE]", set()),
    ],
)
def test_the_variables_that_are_named_are_sent_and_no_others(text, sent):
    environ = {"ONE": "1", "TWO": "2", "OTHER": "3"}
    assert set(jobfiles.variables_of(text, environ)) == sent


def test_one_path_that_means_two_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.yaml").write_text("env_file: .env\n")
        (tmp_path / name / ".env").write_text(f"WHO={name}\n")
    with pytest.raises(InvalidInput, match="different files"):
        jobfiles.submission(["a/job.yaml", "b/job.yaml"], {})


def test_bytes_that_are_no_utf8_are_refused_at_their_place(tmp_path):
    (tmp_path / "bad.yaml").write_bytes("name: ä\nimage: ü".encode() + b"\xff\n")
    with pytest.raises(InvalidInput) as caught:
        jobfiles.read_text(str(tmp_path / "bad.yaml"))
    (problem,) = caught.value.problems
    assert (problem.line, problem.column) == (2, 9)
    assert "0xff" in problem.message


@pytest.mark.parametrize(("name", "words"), [("none.yaml", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_bad_input(tmp_path, name, words):
    with pytest.raises(InvalidInput, match=words):
        jobfiles.read_text(str(tmp_path / name))


def test_a_file_over_a_mebibyte_is_refused_before_anything_is_sent(fake, tmp_path):
    (tmp_path / "big.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(InvalidInput, match="at most 1 MiB"):
        client_of(fake).submit([str(tmp_path / "big.yaml")])
    assert fake.requests == []


def test_too_many_files_at_once_are_refused_before_anything_is_sent(fake, tmp_path):
    (tmp_path / "big.yaml").write_bytes(b"#" * (1 << 20))
    with pytest.raises(InvalidInput, match="the request is"):
        client_of(fake).submit([str(tmp_path / "big.yaml")] * 9)
    assert fake.requests == []
    assert wire.MAX_REQUEST_BYTES == 8 << 20


# --- watching


def test_watching_goes_on_after_the_connection_breaks_and_tells_nothing_twice(fake):
    queued, running, done = row(state="queued"), row(state="running"), row(state="succeeded")
    answers = iter([lines(queued, running, Drop), lines(running, done)])
    fake.on("GET", "/v1/jobs/12/watch", lambda _: Stream(next(answers)))
    assert list(client_of(fake).watch("12")) == [queued, running, done]


def test_watching_goes_on_when_a_stopping_server_ends_the_stream_in_good_order(fake):
    running, done = row(state="running"), row(state="failed", exit_code=3)
    answers = iter([lines(running), lines(running, done)])
    fake.on("GET", "/v1/jobs/12/watch", lambda _: Stream(next(answers)))
    assert list(client_of(fake).watch("12")) == [running, done]


def test_watching_survives_a_restart_of_the_server_and_says_so(fake):
    running, done = row(state="running"), row(state="succeeded")
    seen, told = threading.Event(), []

    def first(_: Request) -> Stream:
        def rows() -> Iterator[bytes]:
            yield from lines(running)
            seen.wait(30)
            raise Drop

        return Stream(rows())

    def tell(sentence: str) -> None:
        told.append(sentence)
        if "away" in sentence:
            fake.on("GET", "/v1/jobs/12/watch", lambda _: Stream(lines(running, done)))
            fake.start()

    fake.on("GET", "/v1/jobs/12/watch", first)
    rows = []
    for found in client_of(fake, tell=tell).watch("12"):
        rows.append(found)
        if len(rows) == 1:
            fake.stop()
            seen.set()
    assert rows == [running, done]
    assert len(told) == 2
    assert "away" in told[0]
    assert "back" in told[1]


def test_a_server_that_stays_away_is_given_up_when_the_patience_is_over(fake):
    fake.on("GET", "/v1/jobs/12/watch", lambda _: Stream(lines(row(), Drop)))
    watching = client_of(fake, patience=0.3).watch("12")
    next(watching)
    fake.stop()
    before = time.monotonic()
    with pytest.raises(Unavailable):
        next(watching)
    assert time.monotonic() - before < 10


def test_a_server_that_was_never_there_is_not_waited_for(tmp_path):
    before = time.monotonic()
    with pytest.raises(NoServer):
        next(Client(Host(tmp_path / "none.sock")).watch("12"))
    assert time.monotonic() - before < 5


def test_watching_an_array_ends_when_every_element_has(fake):
    rows = [row(9, "running", index=0), row(9, "queued", index=1), row(9, "succeeded", index=0)]
    last = row(9, "cancelled", index=1)
    fake.on("GET", "/v1/jobs/9/watch", lambda _: Stream(lines(*rows, last)))
    assert [(id_of(r), r["state"]) for r in client_of(fake).watch("9")] == [
        ("9_0", "running"), ("9_1", "queued"), ("9_0", "succeeded"), ("9_1", "cancelled"),
    ]  # fmt: skip


# --- logs

RECORDS = [(1, b"one\n"), (2, b"two\n"), (1, b"three\n"), (1, b"four\n")]


def log_route(*ends: int, first: int | None = None):
    """A log that breaks off after so many records at each answer, and at last does not; it honours ``skip``."""
    breaks = iter(ends)

    def answer(request: Request) -> Stream:
        start = int(request.query.get("skip", first or 0))
        stop = next(breaks, None)
        headers = {} if first is None else {FIRST_RECORD: str(start)}
        some = RECORDS[start:stop]
        return Stream(frames(*some) if stop is None else frames(*some, Drop), headers)

    return answer


def payloads(records) -> list[tuple[int, bytes]]:
    return [(record.stream, record.payload) for record in records]


def test_a_followed_log_is_continued_exactly_where_it_broke_off(fake):
    fake.on("GET", "/v1/jobs/12", {"jobs": [row(state="succeeded")]})
    fake.on("GET", "/v1/jobs/12/logs", log_route(1, 3))
    assert payloads(client_of(fake).logs("12", follow=True, attempt=1)) == RECORDS
    assert [r.query for r in fake.asked("/v1/jobs/12/logs")] == [
        {"follow": "1", "attempt": "1"},
        {"follow": "1", "attempt": "1", "skip": "1"},
        {"follow": "1", "attempt": "1", "skip": "3"},
    ]


def test_a_log_asked_for_with_tail_is_continued_by_its_position(fake):
    fake.on("GET", "/v1/jobs/12", {"jobs": [row(state="succeeded")]})
    fake.on("GET", "/v1/jobs/12/logs", log_route(3, first=2))
    assert payloads(client_of(fake).logs("12", follow=True, tail=2, since=1.5)) == RECORDS[2:]
    assert [r.query for r in fake.asked("/v1/jobs/12/logs")] == [
        {"follow": "1", "tail": "2", "since": "1.500000"},
        {"follow": "1", "skip": "3"},
    ]


def test_a_log_with_tail_whose_server_cannot_continue_it_says_so_and_doubles_nothing(fake):
    fake.on("GET", "/v1/jobs/12/logs", lambda _: Stream(frames(RECORDS[0], Drop)))
    with pytest.raises(Unavailable, match="cannot continue"):
        list(client_of(fake).logs("12", follow=True, tail=5))


def test_our_own_marks_do_not_count_when_a_log_is_continued(fake):
    fake.on("GET", "/v1/jobs/12", {"jobs": [row(state="succeeded")]})
    answers = iter([frames((0, b"a gap"), RECORDS[0], Drop), frames(*RECORDS[1:])])
    fake.on("GET", "/v1/jobs/12/logs", lambda _: Stream(next(answers)))
    assert payloads(client_of(fake).logs("12", follow=True)) == [(0, b"a gap"), *RECORDS]
    assert fake.asked("/v1/jobs/12/logs")[1].query["skip"] == "1"


def test_a_followed_log_that_ends_before_its_job_is_asked_for_again(fake):
    states = iter([row(state="running"), row(state="succeeded")])
    fake.on("GET", "/v1/jobs/12", lambda _: {"jobs": [next(states)]})
    answers = iter([frames(*RECORDS[:2]), frames(*RECORDS[2:])])
    fake.on("GET", "/v1/jobs/12/logs", lambda _: Stream(next(answers)))
    assert payloads(client_of(fake).logs("12", follow=True)) == RECORDS


def test_a_record_cut_in_any_place_arrives_whole(fake):
    whole = b"".join(frames(*RECORDS))
    fake.on("GET", "/v1/jobs/12/logs", lambda _: Stream(iter([whole[i : i + 1] for i in range(len(whole))])))
    assert payloads(client_of(fake).logs("12")) == RECORDS


def test_bytes_that_are_no_log_are_told_as_such(fake):
    fake.on("GET", "/v1/jobs/12/logs", lambda _: Stream(iter([b"\xff" * 64])))
    with pytest.raises(Exception, match="the log cannot be read"):
        list(client_of(fake).logs("12"))


# --- rows


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("succeeded", 0, 0),
        ("failed", 137, 137),
        ("failed", None, 1),
        ("failed", 0, 1),
        ("cancelled", 0, 1),
        ("cancelled", 143, 143),
        ("failed", 256, 1),
    ],
)
def test_the_exit_code_is_the_containers_own_but_never_0_without_success(state, code, expected):
    assert exit_code_of(row(state=state, exit_code=code)) == expected


def test_an_elements_id_has_its_index():
    assert [id_of({"id": 12}), id_of({"id": 12, "index": 0}), id_of({"id": "12_3", "index": 3})] == [
        "12", "12_0", "12_3",
    ]  # fmt: skip
