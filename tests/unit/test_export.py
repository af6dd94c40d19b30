"""The same job in other launchers' words: what a shell, Docker and Compose make of them."""

from __future__ import annotations

import csv
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpujobs import simulated, specfile
from gpujobs.core.container import Image
from gpujobs.core.decide import Host, Policy, View
from gpujobs.core.export import compose, docker_run
from gpujobs.core.job import Owner
from gpujobs.core.planning import plan
from gpujobs.core.queue import QueueState
from gpujobs.core.shellwords import folded, quoted, split
from tests.unit.corpus import CONTEXT

MACHINE = simulated.load(Path(__file__).parents[2] / "configs/simulated/two-rtx4090.yaml")
OWNER = Owner(uid=1000, gid=1000, groups=(1000, 27), name="ann", home="/home/ann")
ODD = [
    "two words", "it's", "$HOME", "`id`", "!x", "*", "", "a\nb", "\t", 'say "x"', "\\n", "é", "a\u202eb", "a --b",
    "\x1b[1m", "\U0001f332",
]  # fmt: skip


def order(text: str) -> Any:
    (element,) = specfile.parse(text, CONTEXT)
    view = View(queue=QueueState(), inventory=MACHINE.inventory, policy=Policy(),
                host=Host(cpus=float(MACHINE.cpus), memory=MACHINE.memory_bytes))  # fmt: skip
    found = plan(element.spec, OWNER, Image(id="", reference=element.spec.image or "(built)"), view).order
    assert found is not None
    return found


def run(line: str, shell: str = "bash") -> list[str]:
    """The arguments that a shell gives to docker; ``docker build`` answers with an image's id."""
    docker = """docker() { if [ "$1" = build ]; then echo sha256:1; else printf '%s\\0' "$@"; fi; }\n"""
    done = subprocess.run([shell, "-c", docker + line], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    return done.stdout.decode().split("\0")[:-1]


def values(words: list[str], option: str) -> list[str]:
    return [after for word, after in pairwise(words) if word == option]


def spec(**keys: object) -> str:
    return yaml.safe_dump({"name": "t", "image": "a", **keys}, allow_unicode=True, sort_keys=False)


def test_every_argument_arrives_as_it_was_written_also_folded_over_lines() -> None:
    escaped = [word.replace("$", "$$") for word in ODD]
    line = docker_run(order(spec(command=["python", *escaped], environment={"A": "x\ny $$z"})))
    for form in (line, folded(line)):
        words = run(form)
        assert words[words.index("a") + 1 :] == ["python", *ODD]
        assert "A=x\ny $z" in values(words, "--env")
    assert all(char.isprintable() or char in "\n\t" for char in line)
    assert run(docker_run(order(spec(command="sh -c 'a\nb'"))), shell="sh")[-1] == "a\nb"
    assert folded(line).count("\\\n") > 10
    assert run("docker " + quoted("it's\n")) == ["it's\n"]


@pytest.mark.parametrize(("name", "container", "project"), [
    ("t", "t-job", "t"),
    ("resnet-lr=0.1+B_x", "resnet-lr-0.1-B_x", "resnet-lr-0-1-b_x"),
])  # fmt: skip
def test_names_are_those_that_docker_and_compose_take(name: str, container: str, project: str) -> None:
    found = order(spec(name=name))
    assert values(run(docker_run(found)), "--name") == [container]
    assert yaml.safe_load(compose(found))["name"] == project
    assert re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", container)


def test_all_that_the_file_asks_of_the_container_is_in_both() -> None:
    found = order(spec(
        volumes=[{"type": "tmpfs", "target": "/scratch", "tmpfs": {"size": "1g"}},
                 {"type": "bind", "source": '/x,y"z', "target": "/data", "read_only": True}],
        ports=["[::1]:80:80", "8080:81/udp"], stop_grace_period="1m30s", stop_signal="SIGINT", cap_add=["SYS_PTRACE"],
        healthcheck={"test": ["CMD", "curl", "local host"], "interval": "5s", "timeout": "2s", "retries": 2},
        ulimits={"nofile": 100}, cpus=2, mem_limit="8g", labels={"a": "b"}, working_dir="/w",
    ))  # fmt: skip
    words = run(docker_run(found))
    options = "rw,nosuid,nodev,uid=1000,gid=1000,mode=0700"
    assert f"/scratch:{options},size=1073741824" in values(words, "--tmpfs")
    (mount,) = values(words, "--mount")
    assert next(csv.reader([mount])) == ["type=bind", 'source=/x,y"z', "target=/data", "readonly"]
    assert values(words, "--publish") == ["[::1]:80:80/tcp", "127.0.0.1:8080:81/udp"]
    assert (values(words, "--stop-timeout"), values(words, "--stop-signal")) == (["90"], ["SIGINT"])
    assert values(words, "--health-cmd") == ["curl 'local host'"]
    assert values(words, "--health-retries") == ["2"]
    assert (values(words, "--cap-add"), values(words, "--group-add")) == (["SYS_PTRACE"], ["27"])
    assert "--init" in words

    service = yaml.safe_load(compose(found))["services"]["job"]
    assert service["tmpfs"][0] == f"/scratch:{options},size=1073741824"
    assert service["volumes"] == [{"type": "bind", "source": '/x,y"z', "target": "/data", "read_only": True}]
    assert service["stop_grace_period"] == "90s"
    assert (service["init"], service["cap_add"], service["cap_drop"]) == (True, ["SYS_PTRACE"], ["ALL"])
    assert service["healthcheck"]["test"] == ["CMD", "curl", "local host"]
    assert service["ports"][0] == {"target": 80, "published": "80", "host_ip": "::1", "protocol": "tcp"}
    assert set(service) <= COMPOSE_SERVICE


COMPOSE_SERVICE = {
    "image", "build", "init", "runtime", "user", "group_add", "cap_drop", "cap_add", "security_opt", "pids_limit",
    "mem_limit", "memswap_limit", "shm_size", "ipc", "network_mode", "cpus", "cpuset", "ulimits", "entrypoint",
    "command", "working_dir", "stop_signal", "stop_grace_period", "environment", "labels", "ports", "volumes", "tmpfs",
    "healthcheck",
}  # fmt: skip
"""Keys of a service in the Compose specification that are written."""


def test_modes_of_network_and_memory_are_in_both() -> None:
    found = order(spec(network_mode="none", ipc="none"))
    words = run(docker_run(found))
    assert (values(words, "--network"), values(words, "--ipc"), values(words, "--shm-size")) == (["none"], ["none"], [])
    service = yaml.safe_load(compose(found))["services"]["job"]
    assert (service["network_mode"], service["ipc"], "shm_size" in service) == ("none", "none", False)


def test_a_job_that_builds_its_image_builds_it_in_both() -> None:
    text = "name: t\nbuild: {context: ~/my src, dockerfile: D.cuda, args: {A: b c}, target: dev, no_cache: true}\n"
    found = order(text)
    line = docker_run(found)
    assert run(line)[-1] == "sha256:1"
    assert run(folded(line)) == run(line)
    build = re.search(r"\$\((.*)\)", line)
    assert build is not None
    assert split(build[1]).words == [
        "docker", "build", "--quiet", "--file", "/home/ann/my src/D.cuda", "--build-arg", "A=b c", "--target", "dev",
        "--no-cache", "/home/ann/my src",
    ]  # fmt: skip
    service = yaml.safe_load(compose(found))["services"]["job"]
    assert service["build"] == {"context": "/home/ann/my src", "dockerfile": "D.cuda", "args": {"A": "b c"},
                                "target": "dev", "no_cache": True}  # fmt: skip
    assert "image" not in service
