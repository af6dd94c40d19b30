"""Makes the ledger that is checked in for a schema version, with that version's own code.

    python -m tests.compat.make             for the newest schema, with this checkout's code
    PYTHONPATH=OLD python tests/compat/make.py [DIRECTORY]
                                            for an older one, with the code of a checkout of its time

Run it when a migration is added, before the release, and check both files in; one that was released is never made
anew. It writes ``NNNN.sqlite`` and ``NNNN.json``, what has to be shown of it, beside itself or into DIRECTORY.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from gpujobs.adapters.store import Ledger, Store, migrations
from gpujobs.core import job as jobs
from gpujobs.core.job import Allocation, Job, Owner
from gpujobs.specfile import Context, parse

HERE = Path(__file__).parent
NOW = 1_790_000_000.0
GPUS = tuple(f"GPU-{number:08d}-0000-4000-8000-000000000000" for number in range(8))
ADA = Owner(uid=5001, gid=5001, groups=(44, 5001), name="gjlab1", home="/home/gjlab1")
GRACE = Owner(uid=5002, gid=5002, groups=(5002,), name="gjlab2", home="/home/gjlab2")

FULL = """\
name: everything
image: gpujobs-lab/busybox:1
command: [sh, -c, "echo $$HOME; sleep 1"]
entrypoint: []
environment: {LR: 0.10, GREETING: "héllo \\u2028 'world'", EMPTY: ""}
gpus: {count: 2, memory: 40GB}
volumes: ["/srv/data:/data:ro", {type: tmpfs, target: /scratch, tmpfs: {size: 1g}}]
ports: ["127.0.0.1:8888:8888"]
ulimits: {memlock: -1}
working_dir: /data
shm_size: 2g
cpus: 3.5
mem_limit: 16g
labels: {team: vision}
stop_signal: SIGINT
stop_grace_period: 20s
time_limit: 12h
"""
ARRAY = "name: sweep\nimage: a\ngpus: 1\nenvironment: {LR: '{{ lr }}'}\nmatrix: {lr: [0.1, 0.01, 0.001]}\n"


def small(name: str) -> str:
    return f"name: {name}\nimage: gpujobs-lab/busybox:1\ncommand: 'true'\n"


def fill(ledger: Ledger) -> None:
    """Jobs in every state that a ledger of any version can hold, as the server itself writes them."""
    ledger.set_meta("server", "c0ffee00")

    def submit(owner: Owner, text: str) -> list[Job]:
        context = Context(file="t.yaml", directory="/srv", home=owner.home, variables={})
        specs = [(element.index, element.spec) for element in parse(text, context)]
        return ledger.submit(owner, NOW, "t.yaml", text, specs)

    def attempt(job: Job, number: int, gpus: tuple[str, ...] = ()) -> tuple[Job, Allocation]:
        allocation = Allocation(gpus=gpus, cpus=3.5, memory=16 << 30)
        started = job.to(jobs.Starting(allocation=allocation, attempt=number))
        ledger.set_state(started)
        name = f"gpujobs-c0ffee00-{job.id}-{number}"
        why = json.dumps([[uuid, True, "free"] for uuid in gpus])
        ledger.add_attempt(started, name, f"{number:032x}", allocation, why, NOW + 1)
        return started, allocation

    def made(job: Job, number: int) -> None:
        ledger.on_attempt("set_attempt_container", job.id, number, config="c" * 64, container="d" * 64,
                          image="sha256:" + "e" * 64, digest=None)  # fmt: skip

    def runs(job: Job, number: int, gpus: tuple[str, ...] = ()) -> Job:
        started, allocation = attempt(job, number, gpus)
        made(job, number)
        running = started.to(jobs.Running(allocation=allocation, attempt=number, started_at=NOW + 2))
        ledger.set_state(running)
        ledger.on_attempt("set_attempt_started", job.id, number, started_at=NOW + 2)
        return running

    def ends(job: Job, number: int, outcome: str, code: int | None, reason: str = "", message: str = "") -> None:
        allocation = job.allocation
        ended = jobs.Ended(outcome=outcome, attempt=number, started_at=NOW + 2 if number else None,
                           ended_at=NOW + 60, exit_code=code, gpus=allocation.gpus if allocation else (),
                           reason=reason, message=message)  # fmt: skip
        ledger.set_state(job.to(ended))
        if number:
            ledger.on_attempt("set_attempt_ended", job.id, number, ended_at=NOW + 60, exit_code=code, reason=reason,
                              message=message)  # fmt: skip
            ledger.on_attempt("close_log", job.id, number)

    (everything,) = submit(ADA, FULL)
    ends(runs(everything, 1, GPUS[:2]), 1, "succeeded", 0)
    (failed,) = submit(GRACE, small("failed"))
    ends(runs(failed, 1), 1, "failed", 137, "oom", "exit 137: the kernel ended it: 16 GiB were not enough")
    ledger.on_attempt("set_removed", failed.id, 1)
    (cancelled,) = submit(ADA, small("cancelled-while-waiting"))
    ends(cancelled, 0, "cancelled", None, "cancelled", "cancelled by gjlab1")
    (running,) = submit(ADA, small("running"))
    runs(running, 1)
    (stopping,) = submit(ADA, small("stopping"))
    going = runs(stopping, 1)
    assert isinstance(going.state, jobs.Running)
    ledger.set_state(going.to(jobs.Stopping(allocation=going.state.allocation, attempt=1, started_at=NOW + 2,
                                            reason="time-limit", message="its time was over")))  # fmt: skip
    (starting,) = submit(GRACE, small("starting"))
    attempt(starting, 1)
    (pulling,) = submit(GRACE, small("pulling"))
    held, allocation = attempt(pulling, 1)
    ledger.set_state(held.to(jobs.Pulling(allocation=allocation, attempt=1)))
    sweep = submit(ADA, ARRAY)
    ends(runs(sweep[1], 1, GPUS[2:3]), 1, "failed", 1, "exit", "exit 1")
    submit(GRACE, small("waits"))
    fill_0002(ledger, everything.id.number)


def fill_0002(ledger: Ledger, number: int) -> None:
    """Build contexts and images that were built, since schema 2."""
    if not hasattr(ledger, "add_context"):
        return
    ledger.add_context(number, "k" * 43, "/home/gjlab1/src", "Dockerfile", NOW + 600)
    ledger.context_received(number, "k" * 43)
    ledger.context_removed(number, "k" * 43)
    ledger.add_build(number, "b" * 64, "sha256:" + "f" * 64)


def shown(found: list[Job]) -> list[dict[str, Any]]:
    """What has to be seen of a ledger's jobs, whatever version opens it."""
    return [
        {
            "id": str(job.id),
            "owner": [job.owner.uid, job.owner.name],
            "name": job.spec.name,
            "image": job.spec.image,
            "command": list(job.spec.command or ()),
            "environment": [list(pair) for pair in job.spec.environment],
            "gpus": job.spec.gpus.count,
            "state": jobs.name_of(job.state),
            "exit_code": getattr(job.state, "exit_code", None),
            "message": getattr(job.state, "message", ""),
            "held": list(job.allocation.gpus if job.allocation else getattr(job.state, "gpus", ())),
            "submitted_at": job.submitted_at,
        }
        for job in found
    ]


def main(target: Path) -> None:
    """Write the two files of this code's newest schema."""
    name = f"{migrations()[-1][0]:04d}"

    async def write(path: Path) -> list[dict[str, Any]]:
        store = Store(path)
        await store.change(fill)
        found = await store.read(lambda ledger: ledger.page(every=True, limit=1000))
        store.close()
        return shown(found)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "state.sqlite"
        expected = asyncio.run(write(path))
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("VACUUM")
        (target / f"{name}.sqlite").write_bytes(path.read_bytes())
    (target / f"{name}.json").write_text(json.dumps(expected, indent=1, ensure_ascii=True) + "\n")
    sys.stdout.write(f"{target / name}.sqlite and .json: {len(expected)} jobs\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
