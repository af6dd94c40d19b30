from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpujobs.core.errors import Refused
from gpujobs.faces import cli
from tests.unit.fakeserver import FakeServer, Stream, frames, lines, row

ROOT = Path(__file__).parents[2]
COMMANDS = ["run", "submit", "ps", "show", "logs", "wait", "cancel", "gpus", "check", "schema", "from-docker",
            "serve", "completion"]  # fmt: skip


@pytest.fixture
def fake(tmp_path: Path, monkeypatch) -> Iterator[FakeServer]:
    server = FakeServer(tmp_path / "s.sock")
    server.start()
    monkeypatch.setenv("GPUJOBS_HOST", server.host)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("name: job\n")
    yield server
    server.stop()


class Command:
    """Runs commands in this process."""

    def __init__(self, capture) -> None:
        self._capture = capture
        self.ensured: list[str] = []
        self.served: list[tuple] = []
        self.say: str | None = None
        self.on_ensure = lambda: None
        self.serve_result = 0

    def __call__(self, *argv: str) -> tuple[int, bytes, str]:
        code = cli.main(list(argv), serve=self._serve, ensure_server=self._ensure)
        out, err = self._capture.readouterr()
        return code, out, err.decode()

    def _serve(self, *given) -> int:
        self.served.append(given)
        return self.serve_result

    def _ensure(self, host) -> str | None:
        self.ensured.append(str(host))
        self.on_ensure()
        return self.say


@pytest.fixture
def gpujobs(capsysbinary) -> Command:
    return Command(capsysbinary)


def start(*argv: str, **more) -> subprocess.Popen:
    """The real program in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "gpujobs", *argv], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **more)  # fmt: skip


def one_job(fake: FakeServer, *rows: dict, log=((1, b"out\n"),)) -> None:
    """Job 12 goes through these rows and has this log."""
    fake.on("POST", "/v1/jobs", (201, {"jobs": [{"id": 12}]}))
    fake.on("GET", "/v1/jobs/12", {"jobs": [rows[-1]]})
    fake.on("GET", "/v1/jobs/12/watch", lambda _: Stream(lines(*rows)))
    fake.on("GET", "/v1/jobs/12/logs", lambda _: Stream(frames(*log)))


# --- run


def test_run_passes_streams_on_byte_for_byte_and_ends_with_the_jobs_code(fake, gpujobs):
    junk = bytes(range(256)) + b"\x1b[31m no newline"
    waiting = row(state="queued", reason="resources", message="2 GPUs are asked for, 1 is free")
    end = row(state="failed", exit_code=137, message="exit 137: killed: the 8 GiB memory limit was reached")
    one_job(fake, waiting, waiting, row(state="running", gpus=["GPU-8f3a2c41-1"]), end,
            log=[(1, junk), (2, b"err\r"), (1, junk)])  # fmt: skip
    code, out, err = gpujobs("run", "job.yaml")
    assert code == 137
    assert out == junk + junk
    assert err.replace("err\r", "") == (
        "gpujobs: job 12 queued: resources: 2 GPUs are asked for, 1 is free\n"
        "gpujobs: job 12 running on 1 GPU\n"
        "gpujobs: job 12 failed after 10m00s: exit 137: killed: the 8 GiB memory limit was reached\n"
    )
    assert "err\r" in err
    assert gpujobs.ensured == []


@pytest.mark.parametrize(
    ("end", "code"),
    [(row(state="succeeded"), 0), (row(state="cancelled", exit_code=0), 1), (row(state="failed", exit_code=3), 3),
     (row(state="failed", reason="isolation", exit_code=0), 1), (row(state="failed", attempt=0), 1)],
)  # fmt: skip
def test_run_is_0_only_for_success(fake, gpujobs, end, code):
    one_job(fake, end)
    assert gpujobs("run", "job.yaml")[0] == code


def test_run_tells_a_gap_in_our_own_words_on_stderr(fake, gpujobs):
    one_job(fake, row(state="succeeded"), log=[(1, b"a\n"), (0, b"gap: 5 bytes\x1b are missing"), (1, b"b\n")])
    _, out, err = gpujobs("run", "job.yaml")
    assert out == b"a\nb\n"
    assert r"gpujobs: job 12: gap: 5 bytes\x1b are missing" in err


def test_run_of_an_array_puts_the_element_before_each_whole_line(fake, gpujobs):
    fake.on("POST", "/v1/jobs", (201, {"jobs": [{"id": 12}]}))
    ends = [row(state="succeeded", index=0), row(state="failed", index=1, exit_code=5)]
    fake.on("GET", "/v1/jobs/12/watch", lambda _: Stream(lines(*[row(index=i) for i in (0, 1)], *ends)))
    logs = {0: [(1, b"one\ntw"), (1, b"o\n"), (2, b"e\n")], 1: [(1, b"a\n\n"), (1, b"last")]}
    for index, log in logs.items():
        fake.on("GET", f"/v1/jobs/12_{index}", {"jobs": [ends[index]]})
        fake.on("GET", f"/v1/jobs/12_{index}/logs", lambda _, log=log: Stream(frames(*log)))
    code, out, err = gpujobs("run", "job.yaml")
    assert code == 5
    assert sorted(out.splitlines()) == [b"12_0 | one", b"12_0 | two", b"12_1 | ", b"12_1 | a", b"12_1 | last"]
    assert "12_0 | e\n" in err
    assert "job 12_1 failed after 10m00s: exit 5" in err


def test_run_of_an_array_with_one_element_still_names_it(fake, gpujobs):
    fake.on("POST", "/v1/jobs", (201, {"jobs": [{"id": 12, "elements": 1}]}))
    end = row(state="succeeded", index=0)
    fake.on("GET", "/v1/jobs/12/watch", lambda _: Stream(lines(end)))
    fake.on("GET", "/v1/jobs/12_0", {"jobs": [end]})
    fake.on("GET", "/v1/jobs/12_0/logs", lambda _: Stream(frames((1, b"x\n"))))
    assert gpujobs("run", "job.yaml")[1] == b"12_0 | x\n"


def test_run_of_several_files_follows_all_and_returns_the_first_code_in_their_order(fake, gpujobs):
    fake.on("POST", "/v1/jobs", (201, {"jobs": [{"id": 12}, {"id": 13}]}))
    ends = {12: row(12, "failed", exit_code=4), 13: row(13, "failed", exit_code=9)}
    for job, end in ends.items():
        fake.on("GET", f"/v1/jobs/{job}", {"jobs": [end]})
        fake.on("GET", f"/v1/jobs/{job}/watch", lambda _, end=end: Stream(lines(end)))
        fake.on("GET", f"/v1/jobs/{job}/logs", lambda _, job=job: Stream(frames((1, b"%d\n" % job))))
    code, out, _ = gpujobs("run", "job.yaml", "job.yaml")
    assert code == 4
    assert sorted(out.splitlines()) == [b"12 | 12", b"13 | 13"]


def test_ctrl_c_leaves_the_job_running_and_says_how_to_return(fake):
    hold = threading.Event()

    def rows(_) -> Stream:
        def forever() -> Iterator[bytes]:
            yield from lines(row())
            hold.wait(60)

        return Stream(forever())

    one_job(fake, row())
    fake.on("GET", "/v1/jobs/12/watch", rows)
    process = start("run", str(fake.path.parent / "job.yaml"))
    assert process.stdout.readline() == b"out\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    hold.set()
    assert process.returncode == 130
    assert "gpujobs: job 12 goes on without this command\n" in err.decode()
    assert "`gpujobs logs -f 12`" in err.decode()
    assert "`gpujobs cancel 12`" in err.decode()
    assert fake.asked("/v1/jobs/12/cancel") == []


def test_a_reader_that_goes_away_ends_the_command_quietly(fake):
    one_job(fake, row(state="succeeded"), log=[(1, b"x" * 65536)] * 64)
    process = start("logs", "12")
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 141
    assert err == b""
    process.stderr.close()


# --- submit, and starting a server


def test_submit_prints_ids_json_or_a_sentence(fake, gpujobs):
    answer = {"jobs": [{"id": 12, "elements": 6}, {"id": 13, "elements": 1}]}
    fake.on("POST", "/v1/jobs", (201, answer))
    assert gpujobs("submit", "--quiet", "job.yaml", "job.yaml")[:2] == (0, b"12\n13\n")
    code, out, _ = gpujobs("submit", "--json", "job.yaml")
    assert (code, json.loads(out)) == (0, answer)
    assert gpujobs("submit", "job.yaml")[1] == b"jobs 12, 13 submitted\n"
    assert gpujobs("submit", "--run-as", "alice", "job.yaml")[0] == 0
    assert fake.requests[-1].body["run_as"] == "alice"
    fake.on("POST", "/v1/jobs", (201, answer | {"notes": ["paths are not pinned"]}))
    assert "gpujobs: paths are not pinned" in gpujobs("submit", "job.yaml")[2]
    assert gpujobs("submit", "-q", "job.yaml")[2] == ""


def test_submit_reads_the_standard_input(fake):
    fake.on("POST", "/v1/jobs", (201, {"jobs": [{"id": 12}]}))
    process = start("submit", "-q", "-", stdin=subprocess.PIPE)
    out, err = process.communicate(b"name: from-stdin\n", timeout=60)
    assert (process.returncode, out, err) == (0, b"12\n", b"")
    assert fake.requests[-1].body["files"] == [
        {"file": "<stdin>", "directory": str(ROOT), "text": "name: from-stdin\n"}
    ]


def test_with_no_server_one_is_started_and_that_is_said(fake, gpujobs):
    fake.on("POST", "/v1/jobs", (201, {"jobs": [{"id": 12}]}))
    fake.stop()
    gpujobs.say, gpujobs.on_ensure = "started a server", fake.start
    code, out, err = gpujobs("submit", "-q", "job.yaml")
    assert (code, out, err) == (0, b"12\n", "gpujobs: started a server\n")
    assert gpujobs.ensured == [fake.host]


def test_only_run_and_submit_start_a_server(fake, gpujobs):
    fake.stop()
    for command in (["ps"], ["show", "1"], ["logs", "1"], ["wait", "1"], ["cancel", "1"], ["gpus"],
                    ["plan", "job.yaml"], ["rerun", "1"]):  # fmt: skip
        code, _, err = gpujobs(*command)
        assert code == 4
        assert err.startswith("gpujobs: no server is running")
    assert gpujobs.ensured == []


@pytest.mark.parametrize(
    ("command", "code"),
    [("ps >&-", 0), ("ps --json 2>&-", 0), ("check job.yaml >&- 2>&-", 2), ("check - <&-", 2), ("logs 12 <&- >&-", 0),
     ("run job.yaml <&-", 3)],
)  # fmt: skip
def test_a_command_started_without_standard_streams_does_its_work(fake, tmp_path, command, code):
    one_job(fake, row(state="failed", exit_code=3))
    fake.on("GET", "/v1/jobs", {"jobs": [row()]})
    done = subprocess.run(f"{sys.executable} -m gpujobs {command}", shell=True, cwd=tmp_path, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)  # fmt: skip
    assert (done.returncode, b"should not have happened" in done.stderr) == (code, False), done


def test_a_second_interrupt_while_the_first_is_told_of_ends_quietly(fake, gpujobs, monkeypatch):
    def interrupted(_: str) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.stderr, "write", interrupted)
    fake.stop()
    assert gpujobs("ps")[0] == 130


def test_what_starting_a_server_is_refused_with_is_told(fake, gpujobs):
    def refuse() -> None:
        raise Refused("the server ended. Its last lines:\n  one\x1b\n  two", hint="look")

    fake.stop()
    gpujobs.on_ensure = refuse
    assert gpujobs("run", "job.yaml") == (
        3, b"", "gpujobs: the server ended. Its last lines:\n  one\\x1b\n  two\nhint: look\n",
    )  # fmt: skip


# --- errors


def test_all_problems_are_told_each_on_its_line(fake, gpujobs):
    problems = [{"file": "job.yaml", "line": n, "column": 2, "path": "gpus", "message": f"bad\x1b {n}"} for n in (1, 2)]
    body = {"code": "invalid", "message": "job.yaml has 2 mistakes", "hint": "", "problems": problems}
    fake.on("POST", "/v1/jobs", (400, body))
    assert gpujobs("submit", "job.yaml") == (
        2, b"", "gpujobs: job.yaml has 2 mistakes\njob.yaml:1:2: gpus: bad\\x1b 1\njob.yaml:2:2: gpus: bad\\x1b 2\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    "argv",
    [["nonsense"], ["ps", "--nonsense"], ["show"], ["logs", "1", "--tail", "x"], ["completion", "tcsh"],
     ["logs", "1", "--grep", "("], ["logs", "1", "--since", "soon"], ["serve", "--speed", "3"],
     ["gpus", "--json", "--watch"], ["run", "missing.yaml"], ["logs", "1", "--attempt", "0"]],
)  # fmt: skip
def test_wrong_use_is_exit_2_with_a_sentence(fake, gpujobs, argv):
    code, out, err = gpujobs(*argv)
    assert (code, out) == (2, b"")
    assert err.startswith("gpujobs: ")
    assert "Traceback" not in err


def test_an_unforeseen_error_is_one_sentence_and_a_file(fake, gpujobs, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake.on("GET", "/v1/jobs", {"jobs": [5]})
    code, out, err = gpujobs("ps")
    assert (code, out) == (1, b"")
    assert "Traceback" not in err
    (kept,) = (tmp_path / "cache/gpujobs").iterdir()
    assert str(kept) in err
    assert "Traceback" in kept.read_text()
    assert kept.stat().st_mode & 0o777 == 0o600


def test_an_unforeseen_error_without_a_place_for_its_file_is_still_a_sentence(fake, gpujobs, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    fake.on("GET", "/v1/jobs", {"jobs": [5]})
    code, _, err = gpujobs("ps")
    assert code == 1
    assert "no file (" in err


# --- ps show wait cancel gpus


def test_ps_is_a_plain_table_when_piped_and_json_on_request(fake, gpujobs):
    fake.on("GET", "/v1/jobs", {"jobs": [row(), row(13, "queued", message="why")]})
    code, out, err = gpujobs("ps", "--all", "--limit", "7")
    assert (code, err) == (0, "")
    assert b"\x1b" not in out
    assert [line.split()[0] for line in out.decode().splitlines()] == ["ID", "12", "13"]
    assert fake.requests[-1].query == {"all": "1", "limit": "7"}
    assert json.loads(gpujobs("ps", "--json")[1]) == {"jobs": [row(), row(13, "queued", message="why")]}


def test_show_is_one_row_or_an_arrays_elements(fake, gpujobs):
    fake.on("GET", "/v1/jobs/12", {"jobs": [row()]})
    fake.on("GET", "/v1/jobs/13", {"jobs": [row(13, index=i, state=s) for i, s in enumerate(("running", "failed"))]})
    assert json.loads(gpujobs("show", "12", "--json")[1]) == row()
    assert b"Job:         12\n" in gpujobs("show", "12")[1]
    assert len(json.loads(gpujobs("show", "13", "--json")[1])["jobs"]) == 2
    assert gpujobs("show", "13")[1].startswith(b"2 jobs, 1 ended: 1 running, 1 failed\nID ")


def test_wait_returns_the_first_code_in_the_order_of_arguments_and_indices(fake, gpujobs):
    array = [row(9, "failed", index=10, exit_code=7), row(9, "failed", index=2, exit_code=6)]
    fake.on("GET", "/v1/jobs/9/watch", lambda _: Stream(lines(*array)))
    fake.on("GET", "/v1/jobs/8/watch", lambda _: Stream(lines(row(8), row(8, "succeeded"))))
    code, out, err = gpujobs("wait", "8", "9", "--json")
    assert code == 6
    assert [(r["id"], r["index"]) for r in json.loads(out)["jobs"]] == [(8, None), (9, 2), (9, 10)]
    assert "job 9_10 failed after 10m00s: exit 7" in err


def test_cancel_goes_on_after_one_that_cannot_be(fake, gpujobs):
    fake.on("POST", "/v1/jobs/13/cancel", {"jobs": [row(13, "stopping")]})
    code, out, err = gpujobs("cancel", "12", "13")
    assert (code, out) == (2, b"job 13 stopping\n")
    assert "nothing at /v1/jobs/12/cancel" in err


GPUS = {"simulated": True, "gpus": [{"uuid": "GPU-1", "index": 0, "model": "T4", "health": "simulated"}], "links": []}


def test_gpus_as_table_matrix_and_json(fake, gpujobs):
    fake.on("GET", "/v1/gpus", GPUS)
    assert gpujobs("gpus")[1].startswith(b"SIMULATED  1 GPU, 1 free\n")
    assert b"GPU0  X     " in gpujobs("gpus", "--topology")[1]
    assert json.loads(gpujobs("gpus", "--json")[1]) == GPUS


def test_gpus_watch_goes_on_until_ctrl_c(fake):
    fake.on("GET", "/v1/gpus", GPUS)
    process = start("gpus", "--watch", "--interval", "0.2")
    told = 0
    while told < 3:
        told += process.stdout.readline().startswith(b"SIMULATED")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


def test_on_a_terminal_tables_are_coloured_and_fold_to_its_width(fake):
    fake.on("GET", "/v1/jobs", {"jobs": [row(12, "queued", name="evil\x1b[2J", message="because " * 20)]})
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environ = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen([sys.executable, "-m", "gpujobs", "ps"], cwd=ROOT, stdout=theirs,
                               env=environ | {"TERM": "xterm-256color"})  # fmt: skip
    os.close(theirs)
    text = b""
    try:
        while chunk := os.read(ours, 65536):
            text += chunk
    except OSError:
        pass  # the terminal's other end is closed
    os.close(ours)
    assert process.wait(60) == 0
    assert b"\x1b[33mqueued" in text
    assert b"\x1b[2J" not in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text.decode())
    assert max(len(line) for line in plain.splitlines()) <= 80
    assert plain.count("because") == 20


# --- logs


@pytest.fixture
def logged(fake) -> FakeServer:
    one_job(fake, row(state="succeeded"),
            log=[(1, b"loss=1\nlo"), (2, b"warn\n"), (1, b"ss=2\n"), (1, b"end")])  # fmt: skip
    return fake


def test_logs_gives_both_streams_byte_for_byte(logged, gpujobs):
    assert gpujobs("logs", "12") == (0, b"loss=1\nloss=2\nend", "warn\n")
    assert gpujobs("logs", "-f", "12") == (0, b"loss=1\nloss=2\nend", "warn\n")


def test_logs_of_lines_in_which_something_is_found(logged, gpujobs):
    assert gpujobs("logs", "--grep", r"=\d|end", "12") == (0, b"loss=1\nloss=2\nend\n", "")


def test_logs_with_the_time_at_which_each_line_began(logged, gpujobs):
    assert gpujobs("logs", "-t", "12")[1] == (
        b"2023-11-14T22:13:20.000000Z loss=1\n2023-11-14T22:13:20.000000Z loss=2\n2023-11-14T22:13:20.003000Z end\n"
    )


def test_logs_asks_the_server_for_tail_since_and_attempt(logged, gpujobs):
    before = time.time()
    gpujobs("logs", "--tail", "5", "--since", "1h30m", "--attempt", "2", "12")
    query = logged.requests[-1].query
    assert abs(float(query.pop("since")) - (before - 5400)) < 60
    assert query == {"follow": "0", "tail": "5", "attempt": "2"}
    gpujobs("logs", "--since", "2026-01-02T03:04:05Z", "12")
    assert logged.requests[-1].query["since"] == "1767323045.000000"


def test_logs_of_an_array_names_each_element(fake, gpujobs):
    rows = [row(12, "succeeded", index=0), row(12, "queued", index=1), row(12, "failed", index=2)]
    fake.on("GET", "/v1/jobs/12", {"jobs": rows})
    for index in (0, 2):
        fake.on("GET", f"/v1/jobs/12_{index}/logs", lambda _, i=index: Stream(frames((1, b"part"), (1, b" %d" % i))))
    assert gpujobs("logs", "12") == (0, b"12_0 | part 0\n12_2 | part 2\n", "")


@pytest.mark.parametrize("follow", [[], ["-f"]])
def test_logs_of_one_element_are_as_they_are(fake, gpujobs, follow):
    states = iter([row(12, index=3), *[row(12, "succeeded", index=3)] * 2])
    fake.on("GET", "/v1/jobs/12_3", lambda _: {"jobs": [next(states)]})
    fake.on("GET", "/v1/jobs/12_3/watch", lambda _: Stream(lines(row(12, "succeeded", index=3))))
    fake.on("GET", "/v1/jobs/12_3/logs", lambda _: Stream(frames((1, b"a\nb"))))
    assert gpujobs("logs", *follow, "12_3") == (0, b"a\nb", "")


def test_logs_follow_of_a_running_job_ends_with_it(fake, gpujobs):
    running, done = row(), row(state="succeeded")
    states = iter([running, done, done])
    one_job(fake, running, done, log=[(1, b"a\n")])
    fake.on("GET", "/v1/jobs/12", lambda _: {"jobs": [next(states)]})
    assert gpujobs("logs", "-f", "--tail", "3", "12") == (0, b"a\n", "")
    assert fake.asked("/v1/jobs/12/logs")[0].query == {"follow": "1", "tail": "3", "attempt": "1"}


def test_logs_of_a_job_that_never_ran_says_why(fake, gpujobs):
    fake.on("GET", "/v1/jobs/12", {"jobs": [row(12, "queued", message="4 GPUs are asked for")]})
    assert gpujobs("logs", "12") == (0, b"", "gpujobs: job 12 has no output: queued: 4 GPUs are asked for\n")


# --- commands without a server


def test_check_tells_every_file(gpujobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text("name: a\nimage: busybox\nenv_file: my.env\nmatrix: {n: [1, 2]}\n"
                                        "command: [echo, '{{ n }}', $WHO]\n")  # fmt: skip
    (tmp_path / "my.env").write_text("A=1\n")
    monkeypatch.setenv("WHO", "me")
    (tmp_path / "bad.yaml").write_text("name: a\nimage: busybox\ngpus: many\nnonsense: 1\n")
    code, out, err = gpujobs("check", "good.yaml", "bad.yaml")
    assert code == 2
    assert out == b"good.yaml: ok: 2 jobs\n"
    assert "bad.yaml:3:7: gpus: " in err
    assert "bad.yaml:4:1: nonsense: " in err
    code, out, err = gpujobs("check", "--json", "good.yaml", "bad.yaml")
    good, bad = json.loads(out)["files"]
    assert (code, err, good["ok"], good["jobs"], bad["ok"]) == (2, "", True, 2, False)
    assert [(p["line"], p["path"]) for p in bad["problems"]] == [(3, "gpus"), (4, "nonsense")]


@pytest.mark.parametrize(
    "argv",
    [["docker", "run", "--rm", "--gpus", "2", "busybox", "nvidia-smi", "-L"],
     ["--", "docker", "run", "--rm", "--gpus", "2", "busybox", "nvidia-smi", "-L"],
     ["docker run --rm --gpus 2 busybox nvidia-smi -L"]],
)  # fmt: skip
def test_from_docker_prints_a_job_file_that_check_takes(gpujobs, tmp_path, argv):
    code, out, _ = gpujobs("from-docker", *argv)
    assert code == 0
    assert b"gpus: 2" in out
    (tmp_path / "job.yaml").write_bytes(out)
    assert gpujobs("check", str(tmp_path / "job.yaml"))[0] == 0


def test_schema_is_json(gpujobs):
    code, out, _ = gpujobs("schema")
    assert code == 0
    assert json.loads(out)["$schema"].startswith("https://json-schema.org/")


def test_serve_hands_its_options_on(gpujobs):
    gpujobs.serve_result = 3
    assert gpujobs("serve")[0] == 3
    assert gpujobs("serve", "--config", "c.yaml", "--simulate", "s.yaml", "--speed", "10")[0] == 3
    assert gpujobs.served == [(None, None, None), (Path("c.yaml"), Path("s.yaml"), 10.0)]


def test_version(gpujobs):
    assert re.fullmatch(rb"gpujobs \d+\.\d+\.\d+\n", gpujobs("--version")[1])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(gpujobs, command):
    for option in ("--help", "-h"):
        code, out, err = gpujobs(command, option)
        assert (code, err) == (0, "")
        assert b"Examples:\n    gpujobs " + command.encode() in out or b"gpujobs " + command.encode() in out
        assert b"Examples:" in out


def test_no_command_is_help(gpujobs):
    code, out, _ = gpujobs()
    assert code == 0
    for command in COMMANDS:
        assert f"\n  {command} ".encode() in out


# --- plans


def test_a_plan_on_a_simulated_machine_tells_each_gpu_by_index_and_uuid(gpujobs, tmp_path):
    (tmp_path / "job.yaml").write_text("name: t\nimage: a\ngpus: {mig: 1g.5gb}\n")
    machine = ROOT / "configs/simulated/mig-a100.yaml"
    code, raw, err = gpujobs("plan", str(tmp_path / "job.yaml"), "--simulate", str(machine))
    out = raw.decode()
    assert (code, "SIMULATED" in err) == (0, True)
    assert out.startswith("It could start now, on 1 GPU.\n")
    assert re.search(r"^→ +0  MIG-00000000-0000-0000-0000-000000000002  free", out, re.MULTILINE)
    assert re.search(r"^ +1  MIG-00000000-0000-0000-0001-000000000000  a MIG device", out, re.MULTILINE)


def test_indices_are_answered_with_the_simulated_machines_uuids(gpujobs, tmp_path):
    (tmp_path / "job.yaml").write_text("name: t\nimage: a\ngpus: 1,0\n")
    machine = ROOT / "configs/simulated/two-rtx4090.yaml"
    code, _, err = gpujobs("plan", str(tmp_path / "job.yaml"), "--simulate", str(machine))
    both = "GPU-00000000-0000-0000-0000-000000000001, GPU-00000000-0000-0000-0000-000000000000"
    assert (code, f"write {{uuid: [{both}]}}" in err) == (2, True)


# --- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_each_shell(gpujobs, shell):
    code, out, _ = gpujobs("completion", shell)
    assert code == 0
    assert b"_GPUJOBS_COMPLETE" in out


def completed(words: str, environ: dict[str, str]) -> list[str]:
    """What bash is given for this command line, whose last word is incomplete."""
    count = len(words.split()) - (not words.endswith(" "))
    done = subprocess.run(
        [sys.executable, "-m", "gpujobs"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        env=environ | {"_GPUJOBS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)},
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split()


def test_the_shell_completes_commands_and_ids_from_the_server(fake):
    environ = dict(os.environ)
    fake.on("GET", "/v1/jobs", {"jobs": [row(12, name="$(touch x)`"), row(13, index=0), row(20)]})
    assert completed("gpujobs ca", environ) == ["cancel"]
    assert set(completed("gpujobs cancel 1", environ)) == {"12", "13_0", "13"}
    assert fake.requests[-1].query == {"all": "0", "limit": "200"}
    assert completed("gpujobs logs 2", environ) == ["20"]
    assert fake.requests[-1].query["all"] == "1"


def test_completion_without_a_server_is_quiet(tmp_path):
    assert completed("gpujobs cancel ", dict(os.environ) | {"GPUJOBS_HOST": f"unix://{tmp_path}/none"}) == []


def test_a_hostile_name_cannot_reach_the_shell_that_completes(fake):
    fake.on("GET", "/v1/jobs", {"jobs": [row(12, name="$(id)`id`';\"\x1b[/bold]"), row(0) | {"id": "$(id)"}]})
    done = subprocess.run(
        [sys.executable, "-m", "gpujobs"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        env=dict(os.environ) | {"_GPUJOBS_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "gpujobs cancel "},
    )  # fmt: skip
    assert done.stdout.strip() == '_arguments \'*: :(("12":"running ididbold"))\''


# --- what is loaded

PROBE = """
import sys
from gpujobs.__main__ import main
sys.argv = ["gpujobs", *sys.argv[1:]]
code = main()
heavy = {"pydantic", "docker", "yaml", "starlette", "uvicorn", "rich", "pynvml", "sqlite3", "asyncio", "requests"}
print(code, sorted(heavy & set(sys.modules)), sorted(m for m in sys.modules if m.startswith("gpujobs.service")),
      file=sys.stderr)
"""


@pytest.mark.parametrize("argv", [["ps"], ["gpus"], ["show", "12"], ["submit", "-q", "job.yaml"], ["run", "job.yaml"]])
def test_client_commands_load_nothing_heavy_when_piped(fake, argv):
    one_job(fake, row(state="succeeded"))
    fake.on("GET", "/v1/jobs", {"jobs": [row()]})
    fake.on("GET", "/v1/gpus", GPUS)
    environ = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROBE, *argv], cwd=fake.path.parent, capture_output=True, text=True,
                          timeout=60, check=True, env=environ)  # fmt: skip
    assert done.stderr.splitlines()[-1] == "0 [] []"
