"""The examples: each is a valid file that says what it shows, and gets what it asks for on a fitting machine."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from gpujobs import simulated, specfile
from gpujobs.core.container import Image
from gpujobs.core.decide import Host, Policy, View
from gpujobs.core.job import Owner
from gpujobs.core.planning import Plan, as_row, plan
from gpujobs.core.queue import QueueState
from gpujobs.core.translate import from_docker
from gpujobs.faces.jobfiles import env_files_of

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MODELINE = "# yaml-language-server: $schema=../../docs/job-file.schema.json"
TOPICS = sorted(path.parent.name for path in EXAMPLES.glob("*/job.yaml"))
OWNER = Owner(uid=1001, gid=1001, groups=(1001,), name="ann", home="/home/ann")

MACHINES = {
    "hello": ("one-t4", "dgx-h100"),
    "ddp": ("dgx-a100", "dgx-h100"),
    "tensorflow": ("two-rtx4090",),
    "prepare-data": ("one-t4",),
    "sweep": ("mixed",),
    "jupyter": ("one-t4",),
    "mig": ("mig-a100",),
    "shared": ("one-t4", "two-rtx4090"),
    "build": ("two-rtx4090",),
    "finetune": ("mixed",),
    "compose": ("one-t4",),
    "from-docker": ("two-rtx4090",),
    "train": ("dgx-a100",),
}
GPUS = {"ddp": 4, "tensorflow": 2, "prepare-data": 0, "from-docker": 2, "train": 2}  # the others: 1


def elements(topic: str, **variables: str) -> list[specfile.Element]:
    """The jobs of an example, as somebody without any variable set gets them."""
    path = EXAMPLES / topic / "job.yaml"
    text = path.read_text()
    env_files = env_files_of(text, path.parent, variables)
    context = specfile.Context(
        file=str(path), directory=str(path.parent), home="/home/ann", variables=variables, env_files=env_files
    )
    return specfile.parse(text, context)


def planned(topic: str, machine: str) -> list[Plan]:
    found = simulated.load(ROOT / f"configs/simulated/{machine}.yaml")
    host = Host(cpus=float(found.cpus), memory=found.memory_bytes)
    view = View(queue=QueueState(), inventory=found.inventory, host=host, policy=Policy())
    return [
        plan(element.spec, OWNER, Image(id="", reference=element.spec.image or "(built)"), view)
        for element in elements(topic)
    ]


def test_there_is_one_for_each_topic_and_the_table_names_them() -> None:
    assert sorted(MACHINES) == TOPICS
    table = (EXAMPLES / "README.md").read_text()
    assert sorted(re.findall(r"\| \[([a-z-]+)\]\(\1/job\.yaml\) \|", table)) == TOPICS


@pytest.mark.parametrize("topic", TOPICS)
def test_it_begins_with_the_schema_and_says_what_it_shows(topic: str) -> None:
    lines = (EXAMPLES / topic / "job.yaml").read_text().splitlines()
    assert lines[0] == MODELINE
    assert lines[1].startswith("# ")
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("topic", TOPICS)
def test_it_is_valid_and_its_paths_are_there(topic: str) -> None:
    found = elements(topic)
    for element in found:
        spec = element.spec
        assert spec.time_limit or topic == "from-docker", "nobody should learn to leave it out"
        for volume in spec.volumes:
            assert volume.type != "bind" or Path(volume.source).is_dir(), volume
        if spec.build is not None:
            context = Path(spec.build.context)
            assert (context / spec.build.dockerfile).is_file()
            assert (context / dict(spec.build.args)["REQUIREMENTS"]).is_file()
            for word in spec.command or ():
                assert not word.endswith(".py") or (context / word).is_file()


@pytest.mark.parametrize("topic", TOPICS)
def test_the_image_can_be_chosen_by_a_variable_and_is_a_public_one_otherwise(topic: str) -> None:
    for variables, expected in (({}, None), ({"IMAGE": "my/image:1", "BASE": "my/image:1"}, "my/image:1")):
        for element in elements(topic, **variables):
            build = element.spec.build
            image = element.spec.image if build is None else dict(build.args)["BASE"]
            assert image is not None
            assert ":" in image, "a version, or the same file means something else next year"
            if topic != "train":
                assert image == expected if expected else not image.startswith("gpujobs-lab/")


@pytest.mark.parametrize(("topic", "machine"), [(topic, name) for topic in MACHINES for name in MACHINES[topic]])
def test_it_could_start_at_once_on_this_machine(topic: str, machine: str) -> None:
    outcomes = planned(topic, machine)
    assert len(outcomes) == (6 if topic == "sweep" else 1)
    for outcome in outcomes:
        assert outcome.starts, outcome.message
        assert len(set(outcome.gpus)) == len(outcome.gpus) == GPUS.get(topic, 1)
        row = as_row(outcome)
        assert row["docker_run"].startswith("docker run --rm ")
        assert sorted(reason["uuid"] for reason in row["reasons"] if reason["chosen"]) == sorted(outcome.gpus)


def test_the_slice_is_a_mig_device_and_the_share_leaves_room_for_others() -> None:
    inventory = simulated.load(ROOT / "configs/simulated/mig-a100.yaml").inventory
    profiles = {device.uuid: device.profile for gpu in inventory.gpus for device in gpu.mig}
    (outcome,) = planned("mig", "mig-a100")
    assert [profiles[uuid] for uuid in outcome.gpus] == ["1g.5gb"]
    (element,) = elements("shared")
    assert element.spec.gpus.share == 10 << 30


def test_the_sweep_leaves_out_and_adds_what_its_file_says() -> None:
    found = [dict(element.axes) for element in elements("sweep")]
    assert {"lr": "1.0", "momentum": "0.9"} not in found
    assert found[-1] == {"lr": "0.3", "momentum": "0.5"}
    names = [element.spec.name for element in elements("sweep")]
    assert names[:2] == ["sweep-lr0.01-momentum0", "sweep-lr0.01-momentum0.9"]


def test_the_compose_style_file_reads_as_compose_would() -> None:
    (element,) = elements("compose", LOG_LEVEL="debug")
    spec = element.spec
    assert dict(spec.environment) == {"MODEL": "tiny", "BATCH": "8", "GREETING": "two words", "LOG_LEVEL": "debug"}
    assert spec.command == ("/app/worker.py", "--items", "40")
    assert (spec.stop_signal, spec.stop_grace_period, spec.mem_limit) == ("SIGINT", 20.0, 256 << 20)
    assert [(limit.name, limit.soft, limit.hard) for limit in spec.ulimits] == [
        ("core", 0, 0), ("nofile", 1024, 4096),
    ]  # fmt: skip
    assert spec.healthcheck is not None
    assert not spec.healthcheck.shell
    assert [volume.type for volume in spec.volumes] == ["bind", "volume", "tmpfs"]


def test_from_docker_prints_the_file_that_is_there() -> None:
    directory = EXAMPLES / "from-docker"
    text = (directory / "job.yaml").read_text()
    header = [line for line in text.splitlines(keepends=True)[:3] if line.startswith("#")]
    assert text == "".join(header) + from_docker((directory / "docker.txt").read_text()).text


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("**/*.py")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_its_program_compiles_and_says_what_it_does(path: Path) -> None:
    tree = ast.parse(path.read_text(), str(path))
    compile(tree, str(path), "exec")
    assert ast.get_docstring(tree)
    assert path.read_text().startswith("#!/usr/bin/env python3\n")
