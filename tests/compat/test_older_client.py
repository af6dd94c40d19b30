"""A client of an older version goes on working: its requests as it wrote them, and what it read of the answers.

The bodies and keys are those of the first client, which knew nothing of secrets, notes or further attempts. They are
written down here and never brought up to date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from gpujobs import logwire
from tests.e2e.harness import BUSYBOX, Place, Server, connected
from tests.lab import accounts, engine, images
from tests.lab.__main__ import LIBRARY_DIR

ROW = {
    "id", "index", "name", "owner", "state", "reason", "message", "gpus", "submitted_at", "started_at", "ended_at",
    "exit_code", "attempt", "estimated_start",
}  # fmt: skip
TEXT = f"name: old\nimage: {BUSYBOX}\ncommand: [sh, -c, echo out; echo err >&2; exit 5]\nmem_limit: 64m\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    lab = engine.ensure()
    images.ensure(lab, BUSYBOX)
    place = Place()
    directory = place.path / "server"
    directory.mkdir(mode=0o755)
    environment = {"DOCKER_HOST": lab.host, "LD_LIBRARY_PATH": str(LIBRARY_DIR)}
    found = Server(directory, environment, accounts.ensure()[0])
    yield found.start()
    assert found.stop() == 0
    found.clean(lab)
    place.remove()


def asked(server: Server, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """One request, byte for byte as http.client writes it, and the answer."""
    with connected(server.socket) as connection:
        data = None if body is None else json.dumps(body)
        connection.request(method, f"/v1{path}", data, {"Content-Type": "application/json"} if data else {})
        answer = connection.getresponse()
        return answer.status, answer.read()


def submission(text: str, run_as: str) -> dict[str, Any]:
    return {
        "files": [{"file": "job.yaml", "directory": "/", "text": text}],
        "variables": {}, "home": "/root", "working_directory": "/", "env_files": {}, "run_as": run_as, "options": {},
    }  # fmt: skip


def test_a_job_of_an_older_client_runs_and_is_followed_to_its_end(server: Server) -> None:
    owner = accounts.ensure()[0].name
    status, answer = asked(server, "POST", "/jobs", submission(TEXT, owner))
    assert status == 201
    (job,) = (entry["id"] for entry in json.loads(answer)["jobs"])
    status, lines = asked(server, "GET", f"/jobs/{job}/watch")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert status == 200
    assert all(set(row) >= ROW for row in rows)
    assert (rows[-1]["state"], rows[-1]["exit_code"], rows[-1]["reason"]) == ("failed", 5, "exit")
    status, frames = asked(server, "GET", f"/jobs/{job}/logs?follow=1")
    records, rest = logwire.decode_frames(frames)
    assert status == 200
    assert rest == b""
    assert {(record.stream, record.payload) for record in records} >= {(1, b"out\n"), (2, b"err\n")}
    status, listing = asked(server, "GET", "/jobs?all=1&limit=10")
    assert job in [row["id"] for row in json.loads(listing)["jobs"]]
    status, shown = asked(server, "GET", f"/jobs/{job}")
    assert {"spec", "container", "attempts"} <= set(json.loads(shown)["jobs"][0])


def test_mistakes_are_answered_in_the_form_that_an_older_client_shows(server: Server) -> None:
    status, answer = asked(server, "POST", "/jobs", submission("image: [\n", accounts.ensure()[0].name))
    error = json.loads(answer)
    assert (status, error["exit"]) == (400, 2)
    assert set(error) >= {"code", "exit", "message", "hint", "problems"}
    assert set(error["problems"][0]) >= {"file", "line", "column", "path", "message"}
