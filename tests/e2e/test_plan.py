"""Plans, the same job in Docker's words, jobs run again, and what the end of a log tells."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

from tests.e2e.harness import BUSYBOX, Place, Server, spec
from tests.lab import nvml
from tests.lab.accounts import Account
from tests.lab.engine import Engine

KEYS = {"gpus", "reasons", "docker_run"}


def test_the_docker_run_line_of_a_plan_works_when_pasted(
    server: Server, machine: nvml.Machine, place: Place, alice: Account, lab: Engine
) -> None:
    volume = place.volume(alice)
    script = "id -u; ls /dev/nvidia? | wc -l; echo \"$$A\"; touch /v/made; exit 3"
    file = spec(gpus=2, script=script, volumes=[f"{volume}:/v"], environment={"A": "it's \"x\" $$y"})
    done = server.cli("plan", "--run-as", alice.name, "--json", "-", stdin=file)
    assert done.code == 0, done
    plan = json.loads(done.out)
    assert plan.keys() >= KEYS
    assert len(plan["gpus"]) == 2
    assert {r["uuid"] for r in plan["reasons"]} == {gpu.uuid for gpu in machine.gpus}
    assert [r["uuid"] for r in plan["reasons"] if r["chosen"]] == plan["gpus"]
    assert all(r["reason"] for r in plan["reasons"])
    words = shlex.split(plan["docker_run"])
    assert words[:2] == ["docker", "run"]
    pasted = subprocess.run(
        plan["docker_run"], shell=True, env={"DOCKER_HOST": lab.host, "PATH": "/usr/sbin:/usr/bin:/bin"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (pasted.returncode, pasted.stdout) == (3, f'{alice.uid}\n2\nit\'s "x" $y\n'), pasted.stderr
    assert (volume / "made").stat().st_uid == alice.uid


def test_a_plan_does_nothing_and_says_why_a_job_would_wait(server: Server, machine: nvml.Machine) -> None:
    before = len(server.jobs())
    holder = server.submit(gpus=8, script="sleep 60")
    server.until(holder, "running")
    try:
        done = server.cli("plan", "--run-as", server.runner.name, "--json", "-", stdin=spec(gpus=1, script="true"))
        plan = json.loads(done.out)
        assert (plan["gpus"], plan["docker_run"]) == ([], None)
        assert f"taken by job {holder}" in {r["reason"] for r in plan["reasons"]}
        assert server.cli("plan", "--run-as", server.runner.name, "--as", "docker", "-",
                          stdin=spec(gpus=1, script="true")).code == 3  # fmt: skip
        assert server.cli("plan", "--run-as", server.runner.name, "-", stdin=spec(gpus=9, script="true")).code == 3
    finally:
        server.cli("cancel", holder)
        server.ended(holder)
    assert len(server.jobs()) == before + 1


def test_a_job_run_again_is_the_same_specification_on_the_same_image(server: Server, machine: nvml.Machine) -> None:
    first = server.submit(script="echo once more; exit 4", environment={"A": "b"})
    assert server.ended(first)["exit_code"] == 4
    done = server.cli("rerun", first, "--quiet")
    assert done.code == 0, done
    second = server.ended(done.out.decode().strip())
    assert second["exit_code"] == 4
    assert second["id"] != int(first)
    original = server.job(first)
    assert second["owner"] == original["owner"]
    assert second["container"]["image"] == original["container"]["image"]
    assert second["spec"]["environment"] == original["spec"]["environment"]
    assert server.cli("logs", str(second["id"])).out == b"once more\n"
    assert server.cli("rerun", "99999").code == 2


def test_ends_are_told_as_people_need_them(server: Server, machine: nvml.Machine) -> None:
    ends = {
        "echo 'RuntimeError: CUDA out of memory. Tried to allocate 2 GiB' >&2; exit 1": "CUDA out of memory",
        "kill -SEGV $$$$": "segmentation fault",
        "echo 'OSError: [Errno 28] No space left on device' >&2; exit 1": "no space left",
        "echo 'Watchdog caught collective operation timeout: WorkNCCL' >&2; exit 1": "NCCL",
    }
    jobs = {server.submit(script=script): words for script, words in ends.items()}
    for job, words in jobs.items():
        row = server.ended(job)
        assert row["state"] == "failed"
        assert words in row["message"], row["message"]
    missing = server.submit(command=["pyhton3", "train.py"])
    assert "did you mean 'python3'?" in server.ended(missing)["message"]


def test_an_image_that_needs_a_newer_driver_is_told_at_the_submission(
    server: Server, machine: nvml.Machine, lab: Engine, tmp_path: Path
) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {BUSYBOX}\nENV NVIDIA_REQUIRE_CUDA=cuda>=99.1\n")
    lab.docker("build", "--quiet", "--tag", "gpujobs-lab/newer:1", str(tmp_path))
    try:
        done = server.run(gpus=1, image="gpujobs-lab/newer:1", script="true")
        assert done.code == 3, done
        assert b"needs CUDA 99.1" in done.err
        assert server.run(image="gpujobs-lab/newer:1", script="true").code == 0
    finally:
        lab.docker("rmi", "--force", "gpujobs-lab/newer:1")
