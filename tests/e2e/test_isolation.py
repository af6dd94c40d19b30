"""A job sees its GPUs and no others, and is nobody but its owner: looked at from inside and from outside."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.harness import (
    BUSYBOX,
    CUDA_LIKE,
    HOSTILE,
    Place,
    Row,
    Server,
    cgroup_of,
    inspect,
    openings,
    spec,
    wait_for,
)  # fmt: skip
from tests.lab import nvml
from tests.lab.accounts import Account
from tests.lab.engine import Engine

CLIENT = r"""
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
int main(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "/s/s.sock"};
    const char *question = "GET /v1/jobs HTTP/1.0\r\n\r\n";
    char answer[4096];
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(s, (void *)&address, sizeof address) || write(s, question, strlen(question)) < 0) {
        perror("connect");
        return 1;
    }
    for (ssize_t n; (n = read(s, answer, sizeof answer)) > 0;)
        if (write(1, answer, n) < 0)
            return 1;
}
"""

NODES = "ls /dev | grep '^nvidia[0-9]' ; "
HOLD = "while [ ! -e /v/go ]; do sleep 0.05; done"


@contextmanager
def held(server: Server, volume: Path, script: str = "", **keys: object) -> Iterator[tuple[Row, int]]:
    """A job that runs until the block is over: its row, and the host's pid of its first process."""
    job = server.submit(script=f"{script} touch /v/up; {HOLD}", volumes=[f"{volume}:/v"], **keys)
    try:
        wait_for((volume / "up").exists, lambda: f"the job runs: {server.job(job)}")
        row = server.until(job, "running")
        yield row, int(subprocess.check_output(
            ["docker", "inspect", "--format", "{{.State.Pid}}", row["container"]["id"]],
            env={**os.environ, "DOCKER_HOST": server.environment["DOCKER_HOST"]},
        ))  # fmt: skip
    finally:
        (volume / "go").touch()
    assert server.ended(job)["state"] == "succeeded", server.job(job)


def output(server: Server, job: str) -> str:
    done = server.cli("logs", job)
    assert done.code == 0, done
    return done.out.decode()


def minors(server: Server, row: Row) -> list[int]:
    by_uuid = {gpu["uuid"]: gpu["minor"] for gpu in server.get("/gpus")["gpus"]}
    return sorted(by_uuid[uuid] for uuid in row["gpus"])


@pytest.fixture
def volume(place: Place, alice: Account) -> Path:
    return place.volume(alice)


# -- GPUs ------------------------------------------------------------------------------------------------------


def test_two_of_eight_gpus_are_seen_inside_and_the_kernel_denies_the_six_others(
    server: Server, machine: nvml.Machine, volume: Path, lab: Engine
) -> None:
    with held(server, volume, NODES, gpus=2) as (row, pid):
        own = minors(server, row)
        assert len(own) == len(set(own)) == 2
        assert openings(pid) == {minor: "ENXIO" if minor in own else "EPERM" for minor in range(8)}
        allowed = (cgroup_of(pid, "devices") / "devices.list").read_text() if (
            cgroup_of(pid, "devices") / "devices.list").exists() else None
        if allowed is not None:  # cgroup v2 has no such file; what opening says is all there is to ask
            assert sorted(map(int, re.findall(r"^c 195:(\d+) rwm?$", allowed, re.MULTILINE))) == [*own, 255]
        found = inspect(lab, row["container"]["id"])
        assert found["HostConfig"]["Runtime"] == "nvidia"
        assert found["HostConfig"]["Devices"] == []
        assert not found["HostConfig"]["DeviceRequests"]
        assert f"NVIDIA_VISIBLE_DEVICES={','.join(row['gpus'])}" in found["Config"]["Env"]
    assert output(server, str(row["id"])).splitlines() == [f"nvidia{minor}" for minor in own]


def test_a_job_without_gpus_gets_none_of_an_image_that_asks_for_all(
    server: Server, machine: nvml.Machine, volume: Path, lab: Engine
) -> None:
    with held(server, volume, NODES + "env | sort;", image=CUDA_LIKE) as (row, pid):
        assert row["gpus"] == []
        assert set(openings(pid).values()) == {"EPERM"}
        found = inspect(lab, row["container"]["id"])
        assert found["HostConfig"]["Runtime"] == "runc"
        assert [e for e in found["Config"]["Env"] if e.startswith("NVIDIA_VIS")] == ["NVIDIA_VISIBLE_DEVICES=void"]
    seen = output(server, str(row["id"]))
    assert not re.search(r"^nvidia\d", seen, re.MULTILINE)
    assert "NVIDIA_VISIBLE_DEVICES=void" in seen.splitlines()


@pytest.mark.parametrize(
    ("fault", "words"), [("extra", r"/dev/nvidia\d was granted besides"), ("none", r"/dev/nvidia\d was not granted")]
)
def test_a_runtime_that_grants_other_gpus_than_allocated_ends_the_job_before_its_program_ran(
    server: Server, machine: nvml.Machine, volume: Path, lab: Engine, fault: str, words: str
) -> None:
    with lab.fault(fault):  # type: ignore[arg-type]
        job = server.submit(gpus=2, script="touch /v/ran; echo ran", volumes=[f"{volume}:/v"])
        row = server.ended(job)
    assert (row["state"], row["reason"], row["started_at"]) == ("failed", "isolation", None)
    assert re.search(words, row["message"]), row["message"]
    assert not (volume / "ran").exists()
    assert output(server, job) == ""
    assert server.cli("wait", job).code != 0
    assert inspect(lab, row["container"]["id"])["State"]["Status"] == "exited"


def test_a_runtime_that_fails_ends_the_job_with_the_runtimes_own_words(
    server: Server, machine: nvml.Machine, lab: Engine
) -> None:
    with lab.fault("fail", message="no GPU today, said the runtime"):
        row = server.ended(server.submit(gpus=1, script="true"))
    assert (row["state"], row["reason"]) == ("failed", "server")
    assert "no GPU today, said the runtime" in row["message"]
    assert server.ended(server.submit(gpus=1, script="true"))["state"] == "succeeded"


def test_a_runtime_that_ignores_the_variable_of_unprivileged_containers_is_found_out(
    server: Server, machine: nvml.Machine, lab: Engine
) -> None:
    with lab.toolkit("accept-nvidia-visible-devices-envvar-when-unprivileged = false"):
        row = server.ended(server.submit(gpus=1, script="true"))
    assert (row["state"], row["reason"]) == ("failed", "isolation")


def test_a_device_node_in_a_volume_opens_no_gpu(server: Server, machine: nvml.Machine, volume: Path) -> None:
    os.mknod(volume / "gpu", stat.S_IFCHR | 0o666, os.makedev(195, 7))
    (volume / "gpu").chmod(0o666)
    row = server.ended(server.submit(gpus=1, script="true < /v/gpu", volumes=[f"{volume}:/v"]))
    assert (row["state"], row["exit_code"]) == ("failed", 1)
    assert b"Permission denied" in server.cli("logs", str(row["id"])).err


def test_gpus_that_a_container_made_by_hand_holds_are_taken_before_nvml_shows_a_process(
    server: Server, machine: nvml.Machine, lab: Engine
) -> None:
    uuids = [gpu.uuid for gpu in machine.gpus]
    try:
        lab.docker("run", "--detach", "--runtime", "nvidia", "--env", f"NVIDIA_VISIBLE_DEVICES={uuids[0]},1",
                   "--name", "gje2e-by-hand", BUSYBOX, "sleep", "600")  # fmt: skip
        lab.docker("create", "--gpus", "device=2", "--name", "gje2e-created", BUSYBOX, "true")
        wait_for(lambda: sum(gpu["avoided"] is not None for gpu in server.get("/gpus")["gpus"]) == 3, "three are taken")
        taken = {gpu["index"]: gpu["avoided"] for gpu in server.get("/gpus")["gpus"] if gpu["avoided"]}
        assert sorted(taken) == [0, 1, 2]
        assert "gje2e-by-hand" in taken[0]
        job = server.submit(gpus=6, script="true")
        row = wait_for(lambda: row if (row := server.job(job))["message"] else None, "the wait is explained")
        assert (row["state"], row["reason"]) == ("queued", "resources")
        lab.docker("rm", "--force", "gje2e-created")
        row = server.ended(job)
        assert row["state"] == "succeeded"
        assert not set(row["gpus"]) & set(uuids[:2])
    finally:
        lab.docker("rm", "--force", *lab.docker("ps", "--all", "--quiet", "--filter", "name=^gje2e-").split())


def test_a_strangers_process_keeps_its_gpu_and_a_job_that_needs_it_waits_until_it_ends(
    server: Server, machine: nvml.Machine, nvml_state: Path, bob: Account
) -> None:
    identity = [f"--reuid={bob.uid}", f"--regid={bob.gid}", "--clear-groups"]
    stranger = subprocess.Popen(["setpriv", *identity, "sleep", "60"])
    try:
        wait_for(lambda: Path("/proc", str(stranger.pid)).stat().st_uid == bob.uid, "it is bob's")
        machine.gpus[3].processes = [nvml.Process(stranger.pid, memory=1 << 30)]
        machine.write(nvml_state)
        seen = wait_for(
            lambda: gpu if (gpu := server.get("/gpus")["gpus"][3])["processes"] else None, "the process is seen"
        )
        (process,) = seen["processes"]
        assert (process["pid"], process["user"], process["memory_bytes"]) == (stranger.pid, bob.name, 1 << 30)
        assert (process["container"], process["job"]) == (None, None)
        row = server.ended(server.submit(gpus=7, script="true"))
        assert machine.gpus[3].uuid not in row["gpus"]
        job = server.submit(gpus=8, script="true")
        row = wait_for(lambda: row if (row := server.job(job))["message"] else None, "the wait is explained")
        assert (row["state"], row["reason"]) == ("queued", "resources")
        assert bob.name in row["message"], row["message"]
    finally:
        stranger.kill()
        stranger.wait()
        machine.gpus[3].processes = []
        machine.write(nvml_state)
    assert server.ended(job)["state"] == "succeeded"


def test_a_lost_gpu_is_shown_as_lost_and_a_metric_that_is_not_there_as_null_while_the_rest_is_used(
    server: Server, machine: nvml.Machine, nvml_state: Path
) -> None:
    machine.gpus[5].lost = True
    machine.gpus[1].unsupported("PowerUsage", "UtilizationRates")
    machine.write(nvml_state)
    shown = wait_for(
        lambda: gpus if (gpus := server.get("/gpus")["gpus"])[5]["health"] == "lost" else None, "the loss is seen"
    )
    assert [gpu["health"] for gpu in shown] == ["lost" if gpu["index"] == 5 else "ok" for gpu in shown]
    assert (shown[1]["power_w"], shown[1]["utilisation_percent"]) == (None, None)
    assert shown[2]["power_w"] is not None
    row = server.ended(server.submit(gpus=7, script="true"))
    assert row["state"] == "succeeded"
    assert machine.gpus[5].uuid not in row["gpus"]


# -- who a job is ----------------------------------------------------------------------------------------------


def test_a_job_is_its_submitter_with_all_groups_and_no_privilege(
    server: Server, machine: nvml.Machine, volume: Path, alice: Account
) -> None:
    groups = sorted(map(int, subprocess.check_output(["id", "--groups", alice.name], text=True).split()))
    script = "id -u; id -g; id -G; id -un; grep -E '^(Cap|NoNewPrivs)' /proc/self/status; echo a > /v/mine; echo $$HOME"
    done = server.run(gpus=1, script=script, volumes=[f"{volume}:/v"])
    assert done.code == 0, done
    uid, gid, all_groups, name, *status, home = done.out.decode().splitlines()
    assert (uid, gid, name) == (str(alice.uid), str(alice.gid), alice.name)
    assert sorted(map(int, all_groups.split())) == groups
    assert status == [*(f"Cap{kind}:\t{0:016x}" for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")), "NoNewPrivs:\t1"]
    assert home == f"/home/{alice.name}"
    written = (volume / "mine").stat()
    assert (written.st_uid, written.st_gid) == (alice.uid, alice.gid)


def test_a_job_of_an_ordinary_account_is_that_account(server: Server, machine: nvml.Machine, bob: Account) -> None:
    done = server.run(user=bob, script="id -u; id -un")
    assert (done.code, done.out.decode().split()) == (0, [str(bob.uid), bob.name])
    assert server.jobs()[-1]["owner"] == bob.name


def test_an_image_whose_group_file_hands_out_a_host_group_is_refused_before_its_program_runs(
    server: Server, machine: nvml.Machine, volume: Path, lab: Engine
) -> None:
    """Its /etc/group has ``5001:x:42:``, and 42 is shadow: seen to read /etc/shadow through a mounted /etc."""
    done = server.run(image=HOSTILE, script="id -G; touch /v/ran", volumes=[f"{volume}:/v"])
    row = server.jobs()[-1]
    if done.code == 0:  # the generated group file, which is mounted over the image's, left the image no say
        assert "42" not in done.out.decode().split()
    else:
        assert row["reason"] == "isolation", row
        assert not (volume / "ran").exists()
    assert not Path("/tmp/gpujobs-lab-evil").exists(), "the image's LD_PRELOAD ran on the host"
    labels = inspect(lab, server.job(str(row["id"]))["container"]["id"])["Config"]["Labels"]
    assert labels["gpujobs.job"] == str(row["id"])


def test_loader_and_nvidia_variables_of_images_are_gone_and_the_users_reach_the_program_alone(
    server: Server, machine: nvml.Machine, lab: Engine
) -> None:
    done = server.run(image=CUDA_LIKE, gpus=1, script="env", environment={"LD_PRELOAD": "/mine.so", "A": "b"})
    assert done.code == 0, done
    inside = dict(line.partition("=")[::2] for line in done.out.decode().splitlines())
    assert inside["LD_PRELOAD"] == "/mine.so"
    assert "LD_LIBRARY_PATH" not in inside
    assert inside["A"] == "b"
    assert inside["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    config = inspect(lab, server.job(str(server.jobs()[-1]["id"]))["container"]["id"])["Config"]["Env"]
    assert not [entry for entry in config if entry.startswith("LD_") and "=" in entry]


def test_a_directory_that_only_another_account_may_enter_is_no_volume(
    server: Server, machine: nvml.Machine, place: Place, bob: Account
) -> None:
    private = place.volume(bob, "bobs")
    (private / "below").mkdir(mode=0o777)
    for source in (private, private / "below"):
        row = server.ended(server.submit(script="ls /v", volumes=[f"{source}:/v"]))
        assert row["state"] == "failed", row
        assert str(source) in row["message"]
        assert row["started_at"] is None


def test_the_servers_own_directories_are_no_volumes(server: Server, machine: nvml.Machine) -> None:
    for directory in (server.state, Path("/run/gpujobs"), Path("/run/gpujobs/pins")):
        row = server.ended(server.submit(script="ls /v", volumes=[f"{directory}:/v"]))
        assert (row["state"], row["started_at"]) == ("failed", None), row
        assert str(directory) in row["message"]


def test_a_job_that_mounts_the_servers_socket_is_no_user_of_it(
    server: Server, machine: nvml.Machine, shared_place: Place, alice: Account
) -> None:
    directory = shared_place.path / "client"
    if not directory.exists():
        directory.mkdir()
        (directory / "ask.c").write_text(
            CLIENT
        )
        subprocess.run(["gcc", "-static", "-o", directory / "ask", directory / "ask.c"], check=True)
    done = server.run(script="/s/client/ask", volumes=[f"{shared_place.path}:/s:ro"])
    answer = done.out + done.err
    assert b'"jobs"' not in answer
    assert b"not for processes inside containers" in answer or done.code != 0, done


# -- what it may do --------------------------------------------------------------------------------------------


def test_root_runs_no_job_and_only_root_and_administrators_run_them_for_others(
    server: Server, machine: nvml.Machine, alice: Account
) -> None:
    text = spec(script="true")
    for args, user, code, words in (
        ((), None, 3, "--run-as USER"),
        (("--run-as", "root"), None, 3, "a job does not run as root"),
        (("--run-as", "nobody-of-that-name"), None, 2, "there is no account"),
        (("--run-as", "gjlab2"), alice, 3, "only root and administrators"),
    ):
        done = server.cli("submit", *args, "-", user=user, stdin=text)
        assert (done.code, done.out) == (code, b""), done
        assert words in done.words


def test_an_account_outside_the_gpujobs_group_cannot_reach_the_server(
    server: Server, machine: nvml.Machine, people: tuple[Account, ...]
) -> None:
    done = server.cli("ps", user=people[2])
    assert done.code in (3, 4), done
    assert "permission" in done.words.lower() or "may not" in done.words, done


def test_accounts_see_all_rows_but_not_inside_each_others_jobs(
    server: Server, machine: nvml.Machine, alice: Account, bob: Account
) -> None:
    job = server.submit(script="echo secret; exit 3", environment={"TOKEN": "secret"})
    assert server.ended(job)["exit_code"] == 3
    row = server.cli("show", job, "--json", user=bob).json
    assert (row["owner"], row["state"], row["spec"], row["container"], row["attempts"]) == (
        alice.name, "failed", None, None, [])  # fmt: skip
    for command in (["logs", job], ["cancel", job]):
        done = server.cli(*command, user=bob)
        assert done.code == 3, done
        assert alice.name in done.words
        assert b"secret" not in done.out
    assert b"secret" in server.cli("logs", job, user=alice).out


def test_containers_are_named_labelled_and_limited_to_the_letter(
    server: Server, machine: nvml.Machine, lab: Engine, alice: Account
) -> None:
    job = server.submit(gpus=2, script="true", mem_limit="512m", labels={"team": "vision"})
    row = server.ended(job)
    server_id = server.get("/server")["server"]
    found = inspect(lab, row["container"]["id"])
    assert found["Name"] == f"/gpujobs-{server_id}-{job}-1" == f"/{row['container']['name']}"
    ours = {name: value for name, value in found["Config"]["Labels"].items() if name in (
        "gpujobs.server", "gpujobs.job", "gpujobs.attempt", "gpujobs.owner", "gpujobs.gpus", "team")}  # fmt: skip
    assert ours == {
        "gpujobs.server": server_id, "gpujobs.job": job, "gpujobs.attempt": "1", "gpujobs.owner": str(alice.uid),
        "gpujobs.gpus": ",".join(row["gpus"]), "team": "vision",
    }  # fmt: skip
    host = found["HostConfig"]
    assert (host["Memory"], host["MemorySwap"], host["ShmSize"]) == (1 << 29, 1 << 29, 1 << 27)
    assert host["PidsLimit"] == 16384
    assert (host["CapDrop"], host["CapAdd"] or [], host["Privileged"]) == (["ALL"], [], False)
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["RestartPolicy"]["Name"] == "no"
    assert found["Config"]["User"] == f"{alice.uid}:{alice.gid}"


def test_a_job_that_names_no_memory_gets_its_gpus_share_of_the_machines(
    server: Server, machine: nvml.Machine, lab: Engine
) -> None:
    text = json.loads(spec(gpus=2, script="true"))
    del text["mem_limit"]
    job = server.cli("submit", "-q", "--run-as", "gjlab1", "-", stdin=json.dumps(text).encode()).out.decode().strip()
    row = server.ended(job)
    total = json.loads(lab.docker("info", "--format", "{{.MemTotal}}"))
    assert inspect(lab, row["container"]["id"])["HostConfig"]["Memory"] == int(total * 0.9 * 2 / 8)


def test_a_job_over_its_memory_limit_is_told_so(server: Server, machine: nvml.Machine) -> None:
    row = server.ended(server.submit(script="tail /dev/zero", mem_limit="16m"))
    assert (row["state"], row["reason"], row["exit_code"]) == ("failed", "oom", 137)
    assert row["message"].startswith("exit 137: killed: the 16 MiB memory limit was reached (peak 16 MiB): raise")
