"""Job files that ask for more than their submitter may have: GPUs by variables, privileges by keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.attacks.tools import output, shell, submitted, undefended
from tests.e2e.harness import BUSYBOX, CUDA_LIKE, GPUJOBS, Done, Server, inspect, run
from tests.lab.accounts import Account
from tests.lab.engine import Engine

COUNT = shell("ls /dev | grep -c '^nvidia[0-9]'")

# As they are written in a file, each a different way to the same variable.
ASKING = {
    "mapping": "environment: {NVIDIA_VISIBLE_DEVICES: all}",
    "list": "environment: [NVIDIA_VISIBLE_DEVICES=all]",
    "the client's value": "environment: [NVIDIA_VISIBLE_DEVICES]",
    "the client's value by null": "environment: {NVIDIA_VISIBLE_DEVICES: }",
    "an interpolated value": "environment: {NVIDIA_VISIBLE_DEVICES: '${GPUS}'}",
    "an interpolated item": "environment: ['${NAME}=all']",
    "an interpolated part": "environment: ['NVIDIA_${PART}=all']",
    "a matrix": "matrix: {n: [NVIDIA_VISIBLE_DEVICES]}\nenvironment: ['{{ n }}=all']",
    "a matrix's part": "matrix: {n: [NVIDIA]}\nenvironment: ['{{ n }}_VISIBLE_DEVICES=all']",
    "an alias": "x-e: &e {NVIDIA_VISIBLE_DEVICES: all}\nenvironment: *e",
    "a merge": "x-e: &e {NVIDIA_VISIBLE_DEVICES: all}\nenvironment:\n  <<: *e\n  A: b",
    "a duplicate key": "environment: {A: 1}\nenvironment: {NVIDIA_VISIBLE_DEVICES: all}",
    "a duplicate item": "environment: [A=1, A=2, NVIDIA_VISIBLE_DEVICES=all]",
    "a file of variables": "env_file: gpus.env",
    "an escaped key": 'environment: {"NVIDIA\\x5fVISIBLE_DEVICES": all}',
    "a folded key": 'environment: {? "NVIDIA_\\\n  VISIBLE_DEVICES" : all}',
    "a space before": "environment: [' NVIDIA_VISIBLE_DEVICES=all']",
    "a space behind": "environment: ['NVIDIA_VISIBLE_DEVICES =all']",
    "a line before": 'environment: ["A\\nNVIDIA_VISIBLE_DEVICES=all"]',
    "a NUL before": 'environment: ["A=1\\0NVIDIA_VISIBLE_DEVICES=all"]',
    "a NUL in a value": 'environment: {A: "1\\0NVIDIA_VISIBLE_DEVICES=all"}',
    "capabilities": "environment: {NVIDIA_DRIVER_CAPABILITIES: all}",
    "MIG": "environment: {NVIDIA_MIG_CONFIG_DEVICES: all}",
    "our own": "environment: {GPUJOBS_JOB_ID: 1}",
}


@pytest.fixture(scope="module")
def all_gpus(lab: Engine) -> Done:
    """What a submitter who can set the variable has: the last value wins."""
    done = undefended(lab, "--runtime", "nvidia", "--env", "NVIDIA_VISIBLE_DEVICES=0", "--env",
                      "NVIDIA_VISIBLE_DEVICES=all", command=COUNT)  # fmt: skip
    assert done.out == b"8\n"
    return done


@pytest.mark.parametrize("way", ASKING)
def test_a_job_file_asks_for_no_gpu_by_a_variable(all_gpus: Done, server: Server, alice: Account, volume: Path,
                                                  way: str) -> None:  # fmt: skip
    (volume / "gpus.env").write_text("export NVIDIA_VISIBLE_DEVICES=all\n")
    file = volume / "job.yaml"
    file.write_text(f"name: t\nimage: gpujobs-lab/busybox:1\ncommand: [env]\n{ASKING[way]}\n")
    given = {"GPUJOBS_HOST": server.host, "NVIDIA_VISIBLE_DEVICES": "all", "GPUS": "all", "PART": "VISIBLE_DEVICES",
             "NAME": "NVIDIA_VISIBLE_DEVICES"}  # fmt: skip
    before = len(server.jobs())
    done = run([str(GPUJOBS), "run", str(file)], given, user=alice)
    assert (done.code, done.out) == (2, b""), done
    assert "job.yaml:" in done.words
    assert "Traceback" not in done.words
    assert len(server.jobs()) == before


def test_a_variable_of_nearly_that_name_is_only_a_variable(
    all_gpus: Done, lab: Engine, server: Server, alice: Account
) -> None:
    names = ("nvidia_visible_devices", "Nvidia_Visible_Devices", "NVIDIA.VISIBLE.DEVICES", "XNVIDIA_VISIBLE_DEVICES",
             "\u039dVIDIA_VISIBLE_DEVICES", "DOCKER_RESOURCE_GPU")  # fmt: skip
    row = submitted(server, alice, gpus=1, command=list(COUNT), environment=dict.fromkeys(names, "all"))
    assert output(server, row) == "1\n"
    row = submitted(server, alice, command=list(COUNT), image=CUDA_LIKE, environment=dict.fromkeys(names, "all"))
    assert output(server, row) == "0\n"
    entries = inspect(lab, row["container"]["id"])["Config"]["Env"]
    assert [entry for entry in entries if entry.startswith("NVIDIA_VIS")] == ["NVIDIA_VISIBLE_DEVICES=void"]


KEYS = {
    "privileged": True, "devices": ["/dev/nvidia7:/dev/nvidia7"], "device_requests": [{"count": -1}],
    "cap_add": ["SYS_ADMIN"], "security_opt": ["seccomp=unconfined"], "pid": "host", "userns_mode": "host",
    "uts": "host", "cgroup_parent": "/", "cgroup": "host", "sysctls": {"net.ipv4.ip_forward": 1}, "ipc": "host",
    "network_mode": "host", "networks": ["other"], "links": ["other"], "dns": ["10.0.0.1"], "extra_hosts": ["a:1"],
    "volumes_from": ["other"], "volume_driver": "local", "user": "0:0", "group_add": ["0"], "runtime": "nvidia",
    "restart": "always", "container_name": "other", "oom_score_adj": -1000, "oom_kill_disable": True,
    "storage_opt": {"size": "1t"}, "device_cgroup_rules": ["c *:* rwm"], "deploy": {"replicas": 9}, "init": False,
    "logging": {"driver": "none"}, "annotations": {"cdi.k8s.io/x": "nvidia.com/gpu=all"}, "pids_limit": -1,
    "driver_capabilities": ["graphics"], "gpus_all": True, "extends": "/etc/passwd", "configs": ["x"],
    "develop": {}, "tmpfs": "/t:exec,suid", "read_only": False, "isolation": "process", "mac_address": "02::1",
}  # fmt: skip


@pytest.fixture(scope="module")
def privileged(lab: Engine) -> None:
    """What a key of Docker's gives to who may write it: here a device beyond the allocation."""
    done = undefended(lab, "--device", "/dev/nvidia7", command=COUNT)
    assert done.out == b"1\n"


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_would_give_more_is_refused_and_never_passed_through(
    privileged: None, server: Server, alice: Account, key: str
) -> None:
    text = json.dumps({"name": "t", "image": BUSYBOX, "command": "true", key: KEYS[key]})
    done = server.cli("run", "-", user=alice, stdin=text.encode())
    assert done.code in (2, 3), done
    assert done.out == b""
    assert key in done.words


@pytest.mark.parametrize(
    "keys",
    [
        {"ipc": "container:other"}, {"network_mode": "container:other"}, {"ipc": "host "}, {"gpus": {"uuid": "all"}},
        {"gpus": "all"}, {"gpus": -1}, {"gpus": {"count": -1}}, {"gpus": {"count": 0, "uuid": ["nvidia.com/gpu=all"]}},
        {"labels": {"gpujobs.job": "1"}}, {"labels": ["gpujobs.server=x"]}, {"labels": {"gpujobs": "x"}},
        {"image": "sha256:0"}, {"image": "../x"}, {"name": "../../etc"}, {"name": "a b"}, {"name": ".hidden"},
        {"mem_limit": "-1"}, {"shm_size": "-1"}, {"ulimits": {"nofile": -5}}, {"ports": ["0"]},
        {"stop_grace_period": "1000d"}, {"healthcheck": {"test": "true", "interval": "1ms"}},
        {"matrix": {"a": list(range(101)), "b": list(range(100))}},
    ],
    ids=lambda keys: json.dumps(keys)[:40],
)  # fmt: skip
def test_a_value_beyond_its_bounds_is_bad_input(server: Server, alice: Account, keys: dict[str, object]) -> None:
    done = server.run(user=alice, **{"script": "true", **keys})
    assert (done.code, done.out) in ((2, b""), (3, b"")), done
    assert "Traceback" not in done.words
