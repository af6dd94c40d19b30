"""Job files that ask for more than their submitter may have: GPUs by variables, privileges by keys."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest

from tests.attacks.tools import Answer, output, raw, request, shell, submission, submitted, undefended
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
    "MIG's monitor": "environment: {NVIDIA_MIG_MONITOR_DEVICES: all}",
    "IMEX": "environment: {NVIDIA_IMEX_CHANNELS: 0}",
    "GDS": "environment: {NVIDIA_GDS: enabled}",
    "MOFED": "environment: {NVIDIA_MOFED: enabled}",
    "any of NVIDIA's": "environment: {NVIDIA_WHATEVER_COMES_NEXT: 1}",
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


# -- what the server knows and the submitter does not ------------------------------------------------------------


def planned(server: Server, user: Account, text: str, **more: object) -> Answer:
    """What the server says to a job file that comes past our clients; nothing is run."""
    body = {"files": [{"text": f"name: t\nimage: {BUSYBOX}\ncommand: [env]\n{text}\n", "file": "/v/x"}], **more}
    return raw(server, user, request("POST", "/v1/plan", body))


@pytest.mark.parametrize(
    "text", ["environment: {A: '${NAME}'}", "environment: [NAME]", "volumes: ['${NAME}:/v']", "working_dir: /${NAME}"]
)
@pytest.mark.parametrize("name", ["DOCKER_HOST", "GPUJOBS_STATE", "LD_LIBRARY_PATH"])
def test_no_value_of_the_servers_own_environment_comes_into_a_job(
    server: Server, alice: Account, text: str, name: str
) -> None:
    held = dict(entry.partition("=")[::2] for entry in
                Path(f"/proc/{server.pid}/environ").read_text().split("\0"))  # fmt: skip
    assert string.Template("${" + name + "}").substitute(held) == held[name], "where it is filled in by the server"
    answer = planned(server, alice, text.replace("NAME", name))
    assert (answer.status, answer.body["exit"]) == (400, 2), answer
    assert held[name] not in answer.text
    answer = planned(server, alice, text.replace("NAME", name), variables={name: "/mine"})
    assert held[name] not in answer.text


def test_a_file_of_variables_is_never_read_by_the_server(server: Server, alice: Account, roots: Path) -> None:
    """The client reads it, as who it is, and sends what is in it."""
    file = roots / "secret"
    file.write_text("SECRET=of-root\n")
    assert file.read_text() == "SECRET=of-root\n", "the server, as root, could"
    for word in (str(file), f"file://{file}", f"../../../{file}"):
        answer = planned(server, alice, f"env_file: {word}")
        assert (answer.status, answer.body["exit"]) == (400, 2), answer
        assert "of-root" not in answer.text
    (roots / "job.yaml").write_text(f"name: t\nimage: {BUSYBOX}\ncommand: [env]\nenv_file: {file}\n")
    done = server.cli("run", str(roots / "job.yaml"), user=alice)
    assert (done.code, done.out) == (2, b""), done
    assert "was not found or cannot be read" in done.words


EXPRESSIONS = ("{{ a.__class__ }}", "{{ 7 * 7 }}", "{{ a | e }}", "{{ [].__class__ }}", "{{ a['x'] }}", "{{ self }}",
               "{{ b }}{{ a.real }}")  # fmt: skip


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_in_a_job_file_is_never_worked_out(server: Server, alice: Account, expression: str) -> None:
    trusting = "{a.__class__}"
    assert "class" in trusting.format(a=1), "what a format of Python's, or an engine of templates, does"
    labels = json.dumps({"x": "{{ b }}", "y": expression})
    answer = planned(server, alice, f"matrix: {{a: [1], b: [2]}}\nlabels: {labels}")
    assert (answer.status, answer.body["exit"]) == (400, 2), answer
    assert "no matrix name" in answer.text or "names no axis" in answer.text
    assert "class '" not in answer.text


@pytest.mark.parametrize("text", ["${A:-${B}}", "{% for x in a %}", "<%= 7 * 7 %>", "#{7*7}", "$$(id)", "`id`", "%x%"])
def test_what_other_programs_work_out_is_a_text_like_any_other(server: Server, alice: Account, text: str) -> None:
    done = run(["sh", "-c", 'eval "echo $1"', "sh", "$(id -u)"], {}, user=alice)
    assert done.out == f"{alice.uid}\n".encode(), "what a shell makes of such a text"
    answer = planned(server, alice, f"working_dir: {json.dumps('/' + text)}", variables={"B": "$(id)"})
    assert answer.status == 200, answer
    assert {"${A:-${B}}": "$(id)", "$$(id)": "$(id)"}.get(text, text) in answer.body["docker_run"], answer


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
    answer = raw(server, alice, request("POST", "/v1/jobs", submission({"command": "true", key: KEYS[key]})))
    assert answer.body["exit"] in (2, 3), answer
    assert key in answer.text


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
    answer = raw(server, alice, request("POST", "/v1/jobs", submission({"script": "true", **keys})))
    assert answer.body["exit"] in (2, 3), answer
    assert "Traceback" not in answer.text
