"""The command line's contract against a real server: the JSON's keys, the exit codes, what goes to which stream."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpujobs.core.spec import KEYS, SUPPORTED
from tests.e2e.harness import BUSYBOX, GPUJOBS, Place, Server, run, spec, wait_for
from tests.lab import nvml
from tests.lab.accounts import Account

ROW = {"id", "index", "name", "owner", "state", "reason", "message", "gpus", "submitted_at", "started_at", "ended_at",
       "exit_code", "attempt", "estimated_start"}  # fmt: skip
GPU = {"uuid", "index", "minor", "model", "memory_bytes", "health", "allocations", "processes"}
PROCESS = {"pid", "user", "name", "memory_bytes", "container", "job"}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


@pytest.fixture
def running(server: Server, machine: nvml.Machine, place: Place, alice: Account) -> Iterator[tuple[str, Path]]:
    """A job on two GPUs that runs until its test is over."""
    volume = place.volume(alice)
    job = server.submit(name="train", gpus=2, script="echo up; while [ ! -e /v/go ]; do sleep 0.05; done; exit 3",
                        volumes=[f"{volume}:/v"])  # fmt: skip
    server.until(job, "running")
    yield job, volume
    (volume / "go").touch()
    server.ended(job)


def test_submit_answers_with_the_ids(server: Server, machine: nvml.Machine, place: Place) -> None:
    files = []
    for n in range(2):
        files.append(place.path / f"{n}.yaml")
        files[-1].write_bytes(spec(script="true"))
    done = server.cli("submit", "--json", "--run-as", "gjlab1", *map(str, files))
    first, second = done.json["jobs"]
    assert second["id"] == first["id"] + 1
    done = server.cli("submit", "--quiet", "--run-as", "gjlab1", *map(str, files))
    assert done.out == f"{first['id'] + 2}\n{first['id'] + 3}\n".encode()
    assert server.cli("wait", *(str(first["id"] + n) for n in range(4))).code == 0


def test_rows_of_ps_show_and_wait_have_the_contracts_keys_and_values(
    server: Server, running: tuple[str, Path], alice: Account
) -> None:
    job, volume = running
    (row,) = server.cli("ps", "--json").json["jobs"]
    assert set(row) >= ROW
    assert (row["id"], row["index"], row["name"], row["owner"]) == (int(job), None, "train", alice.name)
    assert (row["state"], row["reason"], row["ended_at"], row["exit_code"]) == ("running", None, None, None)
    assert (row["attempt"], len(row["gpus"]), row["estimated_start"]) == (1, 2, None)
    assert all(TIME.fullmatch(row[key]) for key in ("submitted_at", "started_at"))
    assert row["submitted_at"] < row["started_at"]
    shown = server.cli("show", job, "--json").json
    assert set(shown) >= ROW | {"spec", "container", "attempts"}
    assert {key: shown[key] for key in ROW} == {key: row[key] for key in ROW}
    assert shown["spec"]["gpus"]["count"] == 2
    assert shown["container"]["name"].startswith("gpujobs-")
    assert [attempt["gpus"] for attempt in shown["attempts"]] == [row["gpus"]]
    (volume / "go").touch()
    done = server.cli("wait", job, "--json")
    assert done.code == 3
    (row,) = json.loads(done.out)["jobs"]
    assert set(row) >= ROW
    assert (row["state"], row["reason"], row["exit_code"], row["message"]) == ("failed", "exit", 3, "exit 3")
    assert TIME.fullmatch(row["ended_at"])
    assert server.cli("ps", "--json").json["jobs"] == []
    assert row in server.cli("ps", "--all", "--json").json["jobs"]


def test_gpus_tells_who_has_what(
    server: Server, machine: nvml.Machine, nvml_state: Path, running: tuple[str, Path], alice: Account
) -> None:
    job, _ = running
    row = server.job(job)
    machine.gpus[row["gpu_indices"][0]].processes = [nvml.Process(pid := _pid(server, row), memory=1 << 30)]
    machine.write(nvml_state)
    wait_for(lambda: any(gpu["processes"] for gpu in server.get("/gpus")["gpus"]), "the process is seen")
    shown: dict[str, Any] = server.cli("gpus", "--json").json
    assert shown["simulated"] is False
    assert len(shown["gpus"]) == 8
    assert all(set(gpu) >= GPU for gpu in shown["gpus"])
    for number, gpu in enumerate(shown["gpus"]):
        assert (gpu["index"], gpu["minor"], gpu["health"]) == (number, number, "ok")
        assert (gpu["uuid"], gpu["model"]) == (machine.gpus[number].uuid, machine.gpus[number].name)
        assert gpu["memory_bytes"] == machine.gpus[number].memory
        held = [{"job": int(job), "index": None, "owner": alice.name, "memory_bytes": gpu["memory_bytes"]}]
        assert gpu["allocations"] == (held if gpu["uuid"] in row["gpus"] else [])
    (process,) = shown["gpus"][row["gpu_indices"][0]]["processes"]
    assert set(process) >= PROCESS
    assert (process["pid"], process["user"], process["memory_bytes"]) == (pid, alice.name, 1 << 30)
    assert (process["container"], process["job"], process["index"]) == (row["container"]["id"], int(job), None)
    machine.gpus[row["gpu_indices"][0]].processes = []
    machine.write(nvml_state)


def _pid(server: Server, row: dict[str, Any]) -> int:
    done = run(["docker", "inspect", "--format", "{{.State.Pid}}", row["container"]["id"]], server.environment)
    return int(done.out)


def test_tables_are_plain_when_they_are_piped(server: Server, running: tuple[str, Path]) -> None:
    for command in (["ps"], ["ps", "--all"], ["gpus"], ["show", running[0]]):
        done = server.cli(*command)
        assert (done.code, done.err) == (0, b""), done
        assert b"\x1b" not in done.out
        assert running[0].encode() in done.out


def test_what_is_wrong_with_a_file_is_told_with_positions_all_at_once_and_nothing_is_launched(
    server: Server, machine: nvml.Machine
) -> None:
    known = len(server.jobs())
    unsupported = next(key for key in KEYS if key not in SUPPORTED)
    text = f"name: bad\nimage: {BUSYBOX}\ngpus: -1\n{unsupported}: 3\nimagine: x\ncpus: lots\n"
    done = server.cli("submit", "--run-as", "gjlab1", "-", stdin=text.encode())
    assert (done.code, done.out) == (2, b"")
    lines = done.words.splitlines()
    for position, words in (("3:7: gpus", "-1"), (f"4:1: {unsupported}", "not supported by this server"),
                            ("5:1: imagine", "did you mean `image`"), ("6:7: cpus", "lots")):  # fmt: skip
        assert [line for line in lines if line.startswith(f"<stdin>:{position}") and words in line], (position, lines)
    assert len(server.jobs()) == known
    good = spec(script="true")
    done = server.cli("check", "-", stdin=good)
    assert done.code == 0, done
    done = server.cli("check", "-", stdin=text.encode())
    assert done.code == 2, done


def test_of_several_files_with_one_mistake_none_is_launched(
    server: Server, machine: nvml.Machine, place: Place
) -> None:
    known = len(server.jobs())
    (place.path / "good.yaml").write_bytes(spec(script="true"))
    (place.path / "bad.yaml").write_text("name: bad\n")
    done = server.cli("submit", "--run-as", "gjlab1", str(place.path / "good.yaml"), str(place.path / "bad.yaml"))
    assert done.code == 2, done
    assert "bad.yaml:1:1: neither image nor build is given" in done.words
    assert len(server.jobs()) == known


@pytest.mark.parametrize("command", ["show", "logs", "wait", "cancel"])
def test_an_id_that_is_not_there_is_bad_input(server: Server, machine: nvml.Machine, command: str) -> None:
    for job in ("99999", "x; rm -rf /", ""):
        done = server.cli(command, job)
        assert (done.code, done.out) == (2, b""), done
        assert done.words.startswith("gpujobs: "), done


def test_runs_exit_code_is_the_jobs_own(server: Server, machine: nvml.Machine) -> None:
    for script, code in (("exit 0", 0), ("exit 42", 42), ("kill -9 $$$$", 137), ("/no/such/program", 127)):
        done = server.run(script=script)
        assert done.code == code, done
    done = server.run(command=["/no/such/program"])
    assert done.code == 127, done
    assert server.jobs()[-1]["message"].startswith("exit 127: the command was not found in the image")


def test_jobs_see_what_their_file_says(server: Server, machine: nvml.Machine, place: Place, alice: Account) -> None:
    volume = place.volume(alice)
    (volume / "read").write_text("data")
    (volume / "read").chmod(0o644)
    done = server.run(
        script="pwd; echo $$A; cat /data/read; echo; touch /data/new || echo ro; df -k /dev/shm | tail -1; nproc",
        working_dir="/tmp", environment={"A": "a b"}, volumes=[f"{volume}:/data:ro"], shm_size="96m",
    )  # fmt: skip
    assert done.code == 0, done
    where, variable, data, read_only, shm, _ = done.out.decode().splitlines()
    assert (where, variable, data, read_only) == ("/tmp", "a b", "data", "ro")
    assert shm.split()[1] == str(96 * 1024)
    assert not (volume / "new").exists()


def test_nobody_reading_ends_a_command_quietly(server: Server, machine: nvml.Machine) -> None:
    job = server.submit(script="for n in $$(seq 20000); do echo a line that is long enough to fill a pipe $$n; done")
    server.ended(job)
    reader, writer = os.pipe()
    process = subprocess.Popen([GPUJOBS, "logs", job], stdout=writer, stderr=subprocess.PIPE,
                               env={"GPUJOBS_HOST": server.host, "HOME": "/root"})  # fmt: skip
    os.close(writer)
    assert os.read(reader, 100)
    os.close(reader)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (141, b"")
