"""Five people submit at random while the server and the Engine are killed at random: what the Engine saw is judged.

No table of ours is believed: containers' lives are taken from the Engine's events, recorded by a process of its own,
and from inspect; what programs did is taken from what they wrote. GPUJOBS_SEED chooses another course,
GPUJOBS_SOAK=1 makes it ten minutes.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import recorder as recorder_program
from tests.e2e.conftest import GROUP, membership
from tests.e2e.harness import BUSYBOX, ENDED, Place, Row, Server, spec, wait_for
from tests.lab import images, nvml
from tests.lab.__main__ import LIBRARY_DIR
from tests.lab.accounts import Account
from tests.lab.engine import Daemon, Engine

SEED = int(os.environ.get("GPUJOBS_SEED", "20261124"))
SECONDS = 600.0 if os.environ.get("GPUJOBS_SOAK") else 60.0
PAUSE = (0.2, 1.5) if os.environ.get("GPUJOBS_SOAK") else (2.0, 6.0)
"""Seconds between two things that one person does; the short form is to make few containers."""

DRAIN_SECONDS = 180.0
WAITING = 3
"""Jobs of one person that have not begun, at most: the machine is to be busy, not the queue long."""

CODES = 4
PROGRAM = """
id=$$GPUJOBS_JOB_ID; code=$$(( ($${id%%_*} + $${GPUJOBS_ARRAY_INDEX:-0}) % 4 ))
echo begin $$id >> /v/ran; echo begun; sleep $DURATION; echo end $$id >> /v/ran; exit $$code
"""

pytestmark = pytest.mark.timeout(SECONDS + DRAIN_SECONDS + 120)


def code_of(job: str) -> int:
    """The code with which a job's program ends by itself: as PROGRAM works it out."""
    number, _, index = job.partition("_")
    return (int(number) + int(index or 0)) % CODES


@dataclass
class Person:
    """Somebody who submits, and what they were told."""

    account: Account
    volume: Path
    accepted: list[str] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)
    unanswered: int = 0
    wrong: list[str] = field(default_factory=list)

    def lines(self, word: str) -> Counter[str]:
        file = self.volume / "ran"
        lines = file.read_text().splitlines() if file.exists() else []
        return Counter(line.removeprefix(f"{word} ") for line in lines if line.startswith(f"{word} "))

    def work(self, server: Server, seed: str, until: float) -> None:
        """Submit, and now and then cancel, until the time is over; whatever fails because nobody answers is fine."""
        chance = random.Random(seed)
        while time.monotonic() < until:
            time.sleep(chance.uniform(*PAUSE))
            waiting = set(self.accepted) - set(self.lines("begin")) - self.cancelled
            if len(waiting) >= WAITING:
                continue
            if self.accepted and chance.random() < 0.12:
                self._cancel(server, chance.choice(self.accepted))
            else:
                self._submit(server, chance)

    def _submit(self, server: Server, chance: random.Random) -> None:
        elements = chance.choice([1, 1, 1, 2])
        duration = chance.choice([0, 0.3, 1, 2, 4])
        keys: dict[str, Any] = {
            "script": PROGRAM.replace("$DURATION", f"{duration:g}"),
            "volumes": [f"{self.volume}:/v"],
            "gpus": chance.choice([0, 1, 1, 1, 2, 4, 8]),
        }
        if elements > 1:
            keys |= {"matrix": {"n": list(range(elements))}, "environment": {"N": "{{ n }}"}}
        done = server.cli("submit", "--quiet", "-", user=self.account, stdin=spec(**keys))
        if done.code == 0:
            number = done.out.decode().strip()
            self.accepted += [number] if elements == 1 else [f"{number}_{n}" for n in range(elements)]
        else:
            self._not_served(done.code, done.words)

    def _cancel(self, server: Server, job: str) -> None:
        self.cancelled.add(job)  # also where no answer comes: it may have been done
        done = server.cli("cancel", job, user=self.account)
        if done.code:
            self._not_served(done.code, done.words)

    def _not_served(self, code: int, words: str) -> None:
        self.unanswered += 1
        if code != 4:
            self.wrong.append(f"exit {code}: {words}")


@dataclass
class Chaos:
    """Kills the server and the Engine, and starts them again as a service manager would."""

    server: Server
    daemon: Daemon
    chance: random.Random
    kills: int = 0
    outages: list[tuple[float, float, bool]] = field(default_factory=list)  # from, to, whether containers lived on

    def up(self) -> None:
        """Have the server listen."""
        while True:
            process = self.server.spawn()
            out = self.server.directory / f"out.{self.server._runs}"
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                if b"listening" in out.read_bytes():
                    return
                time.sleep(0.02)
            assert process.returncode in (3, 4), f"exit {process.returncode}: {self.server.said}"
            assert "Traceback" not in self.server.said, self.server.said
            self.server._process = None

    def strike(self) -> None:
        """One blow, and all is up again."""
        kind = self.chance.random()
        pause = self.chance.choice([0, 0, 0.1, 0.5, 1.5])
        if kind < 0.75:
            self.server.kill()
            time.sleep(pause)
        elif kind < 0.9:
            self._kill_engine(pause)
            return
        elif kind < 0.95:
            self.server.kill()
            self._kill_engine(pause)
        else:
            self._kill_engine(pause)
            self.server.kill()
        self.kills += 1
        self.up()

    def _kill_engine(self, pause: float) -> None:
        began = time.time()
        lived = self.daemon.live_restore
        self.daemon.kill()
        time.sleep(pause)
        self.daemon.start(live_restore=(True, False, False, True)[len(self.outages) % 4])
        self.outages.append((began, time.time(), lived and self.daemon.live_restore))


@pytest.fixture
def machine_file(tmp_path: Path) -> Path:
    path = tmp_path / "nvml.state"
    nvml.dgx_a100().fit_host().write(path)
    return path


@pytest.fixture
def engine(lab: Engine, tmp_path: Path, machine_file: Path) -> Iterator[Daemon]:
    """An Engine of this test's own, which it kills."""
    home = tmp_path / "engine"
    home.mkdir()
    daemon = Engine.private(home, live_restore=True, nvml_state=machine_file)
    images.ensure(daemon.engine, BUSYBOX)
    yield daemon
    daemon.destroy()


def test_whatever_dies_no_job_is_lost_or_run_twice_and_no_gpu_given_twice(
    engine: Daemon, place: Place, machine_file: Path, people: tuple[Account, ...]
) -> None:
    print(f"GPUJOBS_SEED={SEED}")
    directory = place.path / "server"
    directory.mkdir(mode=0o755)
    environment = {
        "DOCKER_HOST": engine.host, "LD_LIBRARY_PATH": str(LIBRARY_DIR), "LAB_NVML_STATE": str(machine_file),
    }  # fmt: skip
    server = Server(directory, environment, people[0])
    crowd = [Person(account, place.volume(account, f"v{n}")) for n, account in enumerate(people)]
    recorded = place.path / "events"
    recorder = subprocess.Popen(
        [sys.executable, recorder_program.__file__, engine.host.removeprefix("unix://"), recorded]
    )
    chaos = Chaos(server, engine, random.Random(SEED))
    try:
        with membership(GROUP, *people):
            chaos.up()
            until = time.monotonic() + SECONDS
            threads = [
                threading.Thread(target=person.work, args=(server, f"{SEED} {person.account.name}", until))
                for person in crowd
            ]
            for thread in threads:
                thread.start()
            while time.monotonic() < until:
                time.sleep(chaos.chance.uniform(0.5, 5.0))
                chaos.strike()
            for thread in threads:
                thread.join()
            rows = _all_ended(server)
            judge(rows, crowd, chaos, lives(engine.engine, server, recorded))
            _judge_words(server, crowd)
    finally:
        recorder.kill()
        recorder.wait()
        server.clean(engine.engine)


def _all_ended(server: Server) -> list[Row]:
    def ended() -> list[Row] | None:
        rows = server.jobs()
        return rows if all(row["state"] in ENDED for row in rows) else None

    def left() -> str:
        return f"all jobs have ended: {[row for row in server.jobs() if row['state'] not in ENDED]}"

    return wait_for(ended, left, DRAIN_SECONDS)


@dataclass
class Life:
    """One container, as the Engine tells of it; times in seconds since the epoch."""

    name: str
    job: str
    gpus: tuple[str, ...]
    starts: int
    started: float | None
    ended: float
    code: int
    removed: bool = False


def lives(engine: Engine, server: Server, recorded: Path) -> list[Life]:
    """Every container of the server that there ever was."""
    own = server.get("/server")["server"]
    events = [json.loads(line) for line in recorded.read_text().splitlines()]
    starts = Counter(event["Actor"]["ID"] for event in events if event["Action"] == "start")
    made = {event["Actor"]["ID"]: event["Actor"]["Attributes"] for event in events if event["Action"] == "create"}
    names = engine.docker("ps", "--all", "--no-trunc", "--quiet", "--filter", f"label=gpujobs.server={own}").split()
    found = []
    for data in json.loads(engine.docker("inspect", *names)) if names else []:
        variables = dict(entry.partition("=")[::2] for entry in data["Config"]["Env"])
        visible, state = variables["NVIDIA_VISIBLE_DEVICES"], data["State"]
        assert not state["Running"], f"{data['Name']} runs, and all jobs have ended"
        found.append(
            Life(
                job=data["Config"]["Labels"]["gpujobs.job"],
                name=data["Name"].lstrip("/"),
                gpus=() if visible == "void" else tuple(visible.split(",")),
                starts=starts[data["Id"]],
                started=_seconds(state["StartedAt"]),
                ended=_seconds(state["FinishedAt"]) or time.time(),
                code=state["ExitCode"],
            )
        )
    # Those that were removed: ended with the Engine before their programs ran, and replaced.
    found += [
        _removed(labels, [event for event in events if event["Actor"]["ID"] == identity])
        for identity, labels in made.items()
        if identity not in names and labels.get("gpujobs.server") == own
    ]
    return found


def _removed(labels: dict[str, str], events: list[dict[str, Any]]) -> Life:
    times = {event["Action"]: event["timeNano"] / 1e9 for event in events}
    ended = min(times.get("die", times["destroy"]), times["destroy"])
    gpus = tuple(filter(None, labels["gpujobs.gpus"].split(",")))
    starts = sum(event["Action"] == "start" for event in events)
    return Life(labels["name"], labels["gpujobs.job"], gpus, starts, times.get("start"), ended, -1, removed=True)


def _seconds(text: str) -> float | None:
    """Docker's RFC 3339 with nanoseconds; None for its year 1."""
    if text.startswith("0001"):
        return None
    whole, _, rest = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp() + float(f"0.{rest or 0}")


def judge(rows: list[Row], crowd: list[Person], chaos: Chaos, containers: list[Life]) -> None:
    """Hold what the server says against what the Engine and the programs show."""
    by_job = {_id(row): row for row in rows}
    begun = sum((person.lines("begin") for person in crowd), Counter())
    finished = sum((person.lines("end") for person in crowd), Counter())
    cancelled = set().union(*(person.cancelled for person in crowd))
    accepted = [job for person in crowd for job in person.accepted]
    ran = {life.job: life for life in containers if life.started is not None and not life.removed}
    tally = Counter(f"{row['state']} {row['reason'] or ''}".strip() for row in rows)
    print(f"{len(rows)} jobs ({len(accepted)} accepted with an answer), {sum(begun.values())} programs ran, "
          f"{chaos.kills} times the server was killed, {len(chaos.outages)} times the Engine "
          f"({sum(lived for *_, lived in chaos.outages)} of them with live restore); {dict(tally)}")  # fmt: skip
    assert len(accepted) == len(set(accepted)), "an id was given twice"
    lost = [job for job in accepted if job not in by_job]
    assert not lost, f"accepted and not there: {lost}"
    assert not (twice := [job for job, times in begun.items() if times > 1]), f"these programs ran twice: {twice}"
    starts = Counter(life.job for life in containers if life.starts or life.started is not None)
    started_twice = [life for life in containers if life.starts > 1]
    assert not started_twice, started_twice
    _no_gpu_twice(containers)
    for job, row in by_job.items():
        _judge_end(job, row, ran.get(job), chaos, begun=begun[job], finished=finished[job], cancelled=job in cancelled)
    assert sum(starts.values()) >= len(begun)
    assert len(begun) >= SECONDS / 6, "hardly anything ran"


def _no_gpu_twice(containers: list[Life]) -> None:
    by_gpu: dict[str, list[Life]] = {}
    for life in containers:
        if life.started is not None:
            for uuid in life.gpus:
                by_gpu.setdefault(uuid, []).append(life)
    assert by_gpu
    for uuid, found in by_gpu.items():
        found.sort(key=lambda life: life.started or 0.0)
        for first, second in pairwise(found):
            assert first.ended <= (second.started or 0.0), f"{uuid}: {first} and {second} at once"


def _judge_end(
    job: str, row: Row, life: Life | None, chaos: Chaos, *, begun: int, finished: int, cancelled: bool
) -> None:
    told = f"job {job}: {row}; {life}; begun {begun}, finished {finished}"
    if row["state"] == "succeeded":
        assert (row["exit_code"], code_of(job), finished) == (0, 0, 1), told
    if row["exit_code"] is not None:
        assert life is not None, told
        assert row["exit_code"] == life.code, told
    if cancelled:
        return
    # Without live restore an Engine that is started again ends what its predecessor left.
    struck = [
        outage for outage in chaos.outages
        if not outage[2] and life is not None and life.started is not None
        and life.started < outage[1] + 1 and life.ended > outage[0] - 1
    ]  # fmt: skip
    if struck and row["reason"] == "server":
        return
    # With it the Engine does not know the code of what ended while it was away: 255, and it is told as that.
    away = [outage for outage in chaos.outages if life is not None and outage[0] - 1 < life.ended < outage[1] + 1]
    if away and (row["reason"], row["exit_code"], finished) == ("server", 255, 1):
        return
    assert begun == 1, f"its program did not run: {told}"
    assert finished == 1 or struck, f"its program was ended: {told}"
    if finished and not struck:
        assert row["exit_code"] == code_of(job), told
        assert row["state"] == ("succeeded" if code_of(job) == 0 else "failed"), told


def _judge_words(server: Server, crowd: list[Person]) -> None:
    """Who was not served was told so in words, and no server has died of a mistake of its own."""
    wrong = [f"{person.account.name}: {words}" for person in crowd for words in person.wrong]
    assert not wrong, "\n".join(wrong)
    assert all(person.accepted for person in crowd), "somebody was never served"
    for errors in server.directory.glob("err.*"):
        assert "Traceback" not in errors.read_text(), errors.read_text()[-4000:]


def _id(row: Row) -> str:
    return str(row["id"]) if row["index"] is None else f"{row['id']}_{row['index']}"
