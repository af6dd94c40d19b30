"""The examples as somebody would run them: the files as they are, on the lab's images."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpujobs.core.translate import from_docker
from tests.e2e.harness import BUSYBOX, GPUJOBS, ROOT, Done, Place, Server, inspect, run, wait_for
from tests.lab import images, nvml
from tests.lab.accounts import Account
from tests.lab.engine import Engine


@pytest.fixture(scope="module")
def repository(lab: Engine, shared_place: Place) -> Path:
    """What the examples need of the repository, where the account that runs them may read it."""
    images.ensure(lab, images.PYTHON)
    target = shared_place.path / "repository"
    target.mkdir()
    for name in ("Dockerfile.cuda", ".dockerignore"):
        shutil.copy(ROOT / name, target)
    shutil.copytree(ROOT / "examples", target / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.fixture
def kept(alice: Account) -> Iterator[Path]:
    """The account's named volumes; those of the examples are gone before and afterwards."""
    volumes = alice.home / ".local/share/gpujobs/volumes"

    def forget() -> None:
        for name in ("dataset", "sweep", "labels", "counts"):
            shutil.rmtree(volumes / name, ignore_errors=True)

    forget()
    yield volumes
    forget()


def gpujobs(server: Server, *arguments: str, image: str = images.PYTHON, **variables: str) -> Done:
    """A command on the module's server, with IMAGE and more variables in its environment."""
    environment = {"GPUJOBS_HOST": server.host, "IMAGE": image, **variables}
    return run([str(GPUJOBS), *arguments], environment, timeout=120)


def submitted(server: Server, file: Path, image: str = images.PYTHON, **variables: str) -> str:
    """The id of the job that an example's file becomes."""
    done = gpujobs(server, "submit", "--quiet", "--run-as", server.runner.name, str(file), image=image, **variables)
    assert done.code == 0, done
    return done.out.decode().strip()


def output(server: Server, job: str) -> str:
    """What the job has written so far."""
    done = server.cli("logs", job)
    assert done.code == 0, done
    return done.out.decode()


def test_hello_says_who_it_is_and_which_gpu_it_has(
    server: Server, machine: nvml.Machine, repository: Path, alice: Account
) -> None:
    file = repository / "examples/hello/job.yaml"
    done = gpujobs(server, "run", "--run-as", alice.name, str(file), image=BUSYBOX)
    assert done.code == 0, done
    greeting, gpu = done.out.decode().splitlines()
    place = rf"/home/{alice.name}/checkpoints/[0-9a-z]+"
    assert re.fullmatch(rf"Hello, {alice.name}: job ([0-9]+), attempt 1, checkpoints in {place}-\1", greeting)
    assert re.fullmatch(r"/dev/nvidia[0-7]", gpu)


def test_prepare_data_leaves_a_data_set_that_is_the_same_every_time(
    server: Server, machine: nvml.Machine, repository: Path, alice: Account, kept: Path
) -> None:
    file = repository / "examples/prepare-data/job.yaml"
    contents = []
    for _ in range(2):
        row = server.ended(job := submitted(server, file))
        assert (row["state"], row["gpus"]) == ("succeeded", []), (row["message"], output(server, job))
        assert "3 files, 9 paragraphs, 8 different ones" in output(server, job)
        found = {path.name: path for path in (kept / "dataset").iterdir()}
        assert set(found) == {"train.bin", "validation.bin", "manifest.json"}
        assert {path.stat().st_uid for path in found.values()} == {alice.uid}
        contents.append({name: path.read_bytes() for name, path in found.items()})
    assert contents[0] == contents[1]
    manifest = json.loads(contents[0]["manifest.json"])
    parts = [contents[0][f"{name}.bin"] for name in ("train", "validation")]
    assert [entry["tokens"] for entry in manifest.values()] == [len(part) for part in parts]
    assert all(parts), "something is held out, and something is not"
    assert b"darling buds of May" in b"".join(parts)


def test_the_sweep_runs_every_element_and_best_ranks_them(
    server: Server, machine: nvml.Machine, repository: Path, alice: Account, kept: Path
) -> None:
    directory = repository / "examples/sweep"
    job = submitted(server, directory / "job.yaml")
    done = server.cli("wait", job, "--json", timeout=180)
    rows = done.json["jobs"]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert {row["state"] for row in rows} == {"succeeded"}
    assert {row["name"] for row in rows} >= {"sweep-lr1.0-momentum0", "sweep-lr0.3-momentum0.5"}
    assert "sweep-lr1.0-momentum0.9" not in {row["name"] for row in rows}
    ranked = run(["/usr/bin/python3", str(directory / "best.py"), str(kept / "sweep")], {})
    lines = ranked.out.decode().splitlines()
    assert len(lines) == 6, ranked
    assert lines == sorted(lines, key=lambda line: -float(line.split()[0]))
    assert float(lines[0].split()[0]) > 0.9


def test_finetune_that_was_killed_goes_on_and_ends_with_the_same_weights(
    server: Server, machine: nvml.Machine, repository: Path, lab: Engine
) -> None:
    file = repository / "examples/finetune/job.yaml"
    whole = server.ended(submitted(server, file, STEPS="1600"), timeout=180)
    assert whole["state"] == "succeeded", output(server, str(whole["id"]))
    result = output(server, str(whole["id"])).splitlines()[-1]
    assert re.fullmatch(r"held-out accuracy 0\.9[0-9]{3}|held-out accuracy 1\.0000", result.partition(",")[0])

    killed = submitted(server, file, STEPS="1600")
    wait_for(lambda: "saved step 400" in output(server, killed), "a checkpoint is there", 60)
    lab.docker("kill", server.job(killed)["container"]["id"])
    row = server.ended(killed)
    assert (row["state"], row["exit_code"]) == ("failed", 137)
    assert "held-out" not in output(server, killed)

    resumed = server.ended(submitted(server, file, STEPS="1600", RESUME=killed), timeout=180)
    lines = output(server, str(resumed["id"])).splitlines()
    assert resumed["state"] == "succeeded", lines
    start = re.fullmatch(r"resumed at step ([0-9]+) of 2000", lines[0])
    assert start is not None
    assert 400 <= int(start[1]) < 2000
    assert lines[-1] == result, "bit for bit: the line has a hash of the weights"


def test_finetune_that_is_cancelled_saves_first(server: Server, machine: nvml.Machine, repository: Path) -> None:
    job = submitted(server, repository / "examples/finetune/job.yaml", STEPS="100000")
    wait_for(lambda: "saved step" in output(server, job), "it trains", 60)
    assert server.cli("cancel", job).code == 0
    row = server.ended(job)
    assert (row["state"], row["exit_code"]) == ("cancelled", 143)
    last = output(server, job).splitlines()[-1]
    assert re.fullmatch(r"saved step [0-9]+", last)


def test_the_image_is_built_on_the_base_that_was_named_and_run(
    server: Server, machine: nvml.Machine, repository: Path, alice: Account
) -> None:
    job = submitted(server, repository / "examples/build/job.yaml", BASE=images.PYTHON)
    row = server.ended(job, timeout=200)
    words = output(server, job)
    assert row["state"] == "succeeded", (row["message"], words)
    assert re.search(rf"^Python 3\.[0-9.]+ of /opt/venv, in /workspace, uid {alice.uid}$", words, re.MULTILINE)
    assert re.search(r"^GPUs visible: nvidia[0-7]$", words, re.MULTILINE)


def test_the_compose_style_job_is_well_limited_labelled_and_stops_cleanly(
    server: Server, machine: nvml.Machine, repository: Path, lab: Engine, kept: Path
) -> None:
    job = submitted(server, repository / "examples/compose/job.yaml", LOG_LEVEL="debug")
    container = server.until(job, "running")["container"]["id"]
    wait_for(lambda: inspect(lab, container)["State"]["Health"]["Status"] == "healthy", "it is healthy")
    found = inspect(lab, container)
    assert found["Config"]["Labels"].items() >= {"project": "labelling", "stage": "1"}.items()
    assert found["HostConfig"]["NanoCpus"] == 500_000_000
    assert (found["HostConfig"]["Memory"], found["HostConfig"]["ShmSize"]) == (256 << 20, 64 << 20)
    assert {"Name": "nofile", "Soft": 1024, "Hard": 4096} in found["HostConfig"]["Ulimits"]
    (binding,) = found["NetworkSettings"]["Ports"]["8000/tcp"]
    assert binding["HostIp"] == "127.0.0.1"
    assert server.cli("cancel", job).code == 0
    row = server.ended(job)
    words = output(server, job)
    assert 'settings {"BATCH": "8", "GREETING": "two words", "LOG_LEVEL": "debug", "MODEL": "tiny"}' in words
    stopped = re.search(r"stopped after ([0-9]+) items", words)
    assert stopped is not None, words
    assert json.loads((kept / "labels/labels.json").read_text()) == {"done": int(stopped[1])}
    assert (row["state"], row["exit_code"]) == ("cancelled", 0)


def test_the_compose_style_job_finishes_by_itself(
    server: Server, machine: nvml.Machine, repository: Path, kept: Path
) -> None:
    row = server.ended(job := submitted(server, repository / "examples/compose/job.yaml"))
    assert row["state"] == "succeeded", (row["message"], output(server, job))
    assert "finished after 40 items" in output(server, job)
    assert '"LOG_LEVEL": "info"' in output(server, job)


def test_what_from_docker_prints_runs(
    server: Server, machine: nvml.Machine, repository: Path, kept: Path
) -> None:
    directory = repository / "examples/from-docker"
    printed = from_docker((directory / "docker.txt").read_text()).text
    assert (directory / "job.yaml").read_text().endswith(printed)
    (directory / "again.yaml").write_text(printed)
    row = server.ended(job := submitted(server, directory / "again.yaml"))
    assert row["state"] == "succeeded", (row["message"], output(server, job))
    assert output(server, job).splitlines() == [f"round {n}: 2 GPUs in /workspace" for n in (1, 2, 3)]
    assert (kept / "counts/count").read_text() == "2\n"
