"""The lab itself: what the runtime stand-in grants, Engines that are killed, images, accounts, training.

An Engine of its own with a machine of its own is used, so that nothing here depends on what else runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab import accounts, images, nvml
from tests.lab.engine import RUN, Daemon, Engine, LabError, ensure

TRAIN = Path(__file__).parents[2] / "examples" / "train"
MINORS = [*range(16), 255]

# Makes nodes of its own for every minor and tries each: the device cgroup alone decides what opens.
PROBE = f"""
ls /dev | grep nvidia
for n in {' '.join(map(str, MINORS))}; do
    mknod /tmp/$n c 195 $n
    (: < /tmp/$n) 2>&1 | sed "s/.*: /open $n /"
done
echo "variable ${{NVIDIA_VISIBLE_DEVICES-unset}}"
"""


@dataclass(frozen=True)
class Machine:
    """Eight GPUs: number 6 has another minor than its index, number 7 is in MIG mode with two devices."""

    uuids: tuple[str, ...]
    mig: tuple[str, ...]


@dataclass(frozen=True)
class Grant:
    """What a container was seen to have: nodes in /dev, minors that its cgroup lets it open, the variable."""

    nodes: frozenset[str]
    allowed: frozenset[int]
    variable: str


def gpus(*minors: int) -> Grant:
    """Return the grant of these GPUs: their nodes and the control node, and a variable that reads void."""
    return Grant(frozenset({f"nvidia{n}" for n in minors} | {"nvidiactl"}), frozenset({*minors, 255}), "void")


def nothing(variable: str) -> Grant:
    return Grant(frozenset(), frozenset(), variable)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Machine]:
    machine = nvml.dgx_a100()
    machine.gpus[6].minor = 9
    mig = tuple(machine.gpus[7].add_mig("3g.20gb").uuid for _ in range(2))
    path = tmp_path_factory.mktemp("machine") / "nvml.state"
    machine.write(path)
    return path, Machine(tuple(gpu.uuid for gpu in machine.gpus), mig)


@pytest.fixture(scope="module")
def engine(state: tuple[Path, Machine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    daemon = Engine.private(tmp_path_factory.mktemp("engine"), nvml_state=state[0])
    try:
        images.ensure(daemon.engine, images.BUSYBOX, images.CUDA_LIKE, images.HOSTILE)
        yield daemon.engine
    finally:
        daemon.destroy()


@pytest.fixture
def machine(state: tuple[Path, Machine]) -> Machine:
    return state[1]


def grant(engine: Engine, *env: str, image: str = images.BUSYBOX) -> Grant:
    """Run the probe under the nvidia runtime with these ``NAME=value`` and read what it saw."""
    settings = [word for entry in env for word in ("--env", entry)]
    command = ["run", "--rm", "--network=none", "--runtime=nvidia", *settings, image, "sh", "-c", PROBE]
    out = engine.docker(*command)
    lines = out.splitlines()
    opened = dict(re.findall(r"^open (\d+) (.*)$", out, re.MULTILINE))
    assert set(opened) == {str(n) for n in MINORS}
    assert set(opened.values()) <= {"No such device or address", "Operation not permitted"}
    return Grant(
        frozenset(line for line in lines if line.startswith("nvidia")),
        frozenset(int(n) for n, error in opened.items() if error == "No such device or address"),
        lines[-1].removeprefix("variable "),
    )


def visible(value: str) -> str:
    return f"NVIDIA_VISIBLE_DEVICES={value}"


EVERY_GPU = (0, 1, 2, 3, 4, 5, 7, 9)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(lambda m: f"{m.uuids[1]},{m.uuids[4]}", gpus(1, 4), id="two UUIDs"),
        pytest.param(lambda m: m.uuids[6], gpus(9), id="a UUID whose minor is not its index"),
        pytest.param(lambda m: " 5 , 6", gpus(5, 9), id="indexes, with blanks"),
        pytest.param(lambda m: m.mig[1], gpus(7), id="a MIG device's UUID"),
        pytest.param(lambda m: f"nvidia.com/gpu=2,nvidia.com/gpu={m.uuids[3]}", gpus(2, 3), id="CDI names"),
        pytest.param(lambda m: f"{m.uuids[0]},all", gpus(*EVERY_GPU), id="a list with all"),
        pytest.param(lambda m: f"{m.uuids[0]},void,all", nothing("{value}"), id="a list with void"),
        pytest.param(lambda m: "", nothing(""), id="an empty value"),
    ],
)
def test_the_variable_grants_what_it_names_and_nothing_else(
    engine: Engine, machine: Machine, value: Callable[[Machine], str], expected: Grant
) -> None:
    text = value(machine)
    expected = Grant(expected.nodes, expected.allowed, expected.variable.format(value=text))
    assert grant(engine, visible(text)) == expected


def test_an_unset_variable_grants_nothing_in_a_plain_image(engine: Engine) -> None:
    assert grant(engine) == nothing("unset")


def test_an_unset_variable_grants_everything_in_an_image_known_by_cuda_version_alone(engine: Engine) -> None:
    assert grant(engine, "CUDA_VERSION=12.4") == gpus(*EVERY_GPU)


def test_an_unset_variable_grants_nothing_where_the_image_says_what_cuda_it_requires(engine: Engine) -> None:
    assert grant(engine, "CUDA_VERSION=12.4", "NVIDIA_REQUIRE_CUDA=cuda>=12.0") == nothing("unset")


def test_a_cuda_image_grants_everything_when_the_variable_is_left_to_it(engine: Engine) -> None:
    assert grant(engine, image=images.CUDA_LIKE) == gpus(*EVERY_GPU)


def test_the_last_value_of_the_variable_wins_over_the_image_and_earlier_ones(
    engine: Engine, machine: Machine
) -> None:
    given = (visible("0"), visible(machine.uuids[2]))
    assert grant(engine, *given, image=images.CUDA_LIKE) == gpus(2)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(lambda m: "none", id="none"),
        pytest.param(lambda m: m.uuids[0].lower(), id="a UUID in lower case"),
        pytest.param(lambda m: m.uuids[7], id="a whole GPU in MIG mode"),
        pytest.param(lambda m: "8", id="an index too high"),
    ],
)
def test_an_id_that_cannot_be_granted_stops_the_container_and_is_named(
    engine: Engine, machine: Machine, value: Callable[[Machine], str]
) -> None:
    text = value(machine)
    with pytest.raises(LabError, match=re.escape(f"unresolvable CDI devices nvidia.com/gpu={text}")):
        grant(engine, visible(text))


def test_a_toolkit_that_does_not_accept_the_variable_silently_grants_nothing(
    engine: Engine, machine: Machine
) -> None:
    asked = visible(machine.uuids[0])
    with engine.toolkit("accept-nvidia-visible-devices-envvar-when-unprivileged = false"):
        assert grant(engine, asked) == nothing(machine.uuids[0])
    assert grant(engine, asked) == gpus(0)


def test_a_swarm_resource_replaces_the_variable(engine: Engine) -> None:
    with engine.toolkit('swarm-resource = "DOCKER_RESOURCE_GPU"'):
        assert grant(engine, visible("0"), "DOCKER_RESOURCE_GPU=3") == gpus(3)


def test_a_broken_toolkit_configuration_stops_the_container_and_is_named(engine: Engine) -> None:
    said = r"could not load config: .*config\.toml"
    with engine.toolkit("this is no TOML"), pytest.raises(LabError, match=said):
        grant(engine, visible("0"))


def test_the_runtime_can_be_made_to_grant_too_much_or_too_little_or_to_fail(engine: Engine) -> None:
    only = "VICTIM=1"
    with engine.fault("extra", only=only):
        assert grant(engine, visible("3"), only) == gpus(3, 0)
        assert grant(engine, visible("3")) == gpus(3)
    with engine.fault("none", only=only):
        assert grant(engine, visible("3"), only) == nothing("3")
    said = "the card is on fire"
    with engine.fault("fail", message=said), pytest.raises(LabError, match=said):
        grant(engine, visible("3"))


def test_containers_survive_the_death_of_their_engine_only_under_live_restore(tmp_path: Path) -> None:
    daemon = Engine.private(tmp_path, live_restore=True)
    try:
        docker = daemon.engine.docker
        images.ensure(daemon.engine, images.BUSYBOX)
        docker("run", "--detach", "--name=job", "--stop-signal=KILL", images.BUSYBOX, "sleep", "1000")
        first = docker("inspect", "--format={{.State.Pid}}", "job")
        daemon.kill()
        assert daemon.pid is None
        daemon.start()
        assert docker("inspect", "--format={{.State.Running}} {{.State.Pid}}", "job") == f"true {first}"
        daemon.kill()
        daemon.start(live_restore=False)
        assert docker("inspect", "--format={{.State.Running}}", "job").strip() == "false"
        docker("start", "job")
        daemon.kill()  # destroy must end a container that no dockerd watches
    finally:
        daemon.destroy()
    assert not daemon.run_dir.exists()
    assert not Path("/sys/class/net", daemon.bridge).exists()
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert _processes_that_mention(daemon) == []


def _processes_that_mention(daemon: Daemon) -> list[str]:
    done = subprocess.run(["ps", "-eo", "args"], check=True, capture_output=True, text=True)
    marks = (str(daemon.run_dir), str(daemon.home))
    return [line for line in done.stdout.splitlines() if any(mark in line for mark in marks)]


def test_the_same_engine_is_found_again(tmp_path: Path) -> None:
    first = ensure()
    assert ensure() == first
    assert first.docker("info", "--format={{.Runtimes.nvidia}}").strip() != "<no value>"
    assert RUN.is_dir()


def test_an_image_is_made_once_and_again_when_its_recipe_changes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert images.ensure(engine, images.BUSYBOX) == []
    before = engine.docker("inspect", "--format={{.Id}}", images.BUSYBOX)
    with monkeypatch.context() as patch:
        patch.setattr(images, "PASSWD", images.PASSWD + "more:x:7:7::/:/bin/sh\n")
        assert images.ensure(engine, images.BUSYBOX) == [images.BUSYBOX]
        assert engine.docker("inspect", "--format={{.Id}}", images.BUSYBOX) != before
    assert images.ensure(engine, images.BUSYBOX) == [images.BUSYBOX]


def test_the_hostile_image_does_hand_out_a_group_of_the_host(engine: Engine) -> None:
    options = ["--rm", "--network=none", "--no-healthcheck", "--user=5001:5001"]
    assert "groups=42(" in engine.docker("run", *options, images.HOSTILE, "id")
    config = engine.docker("inspect", "--format={{json .Config}}", images.HOSTILE)
    for part in ("LD_PRELOAD=/proc/self/cwd/evil.so", '"gpujobs.job":"1"', '"Interval":1000000', "/anonym"):
        assert part in config


def test_accounts_are_ordinary_people_without_docker(engine: Engine) -> None:
    first, *others = accounts.ensure()
    assert [account.uid for account in (first, *others)] == [5001, 5002, 5003, 5004, 5005]
    seen = accounts.run_as(first, ["sh", "-c", 'id -u; id -gn; pwd; echo "$HOME $EXTRA"; cat'],
                           env={"EXTRA": "a b"}, stdin="typed")
    assert seen.stdout == f"5001\ngjlab1\n{first.home}\n{first.home} a b\ntyped"
    groups = accounts.run_as(first, ["id", "-Gn"]).stdout.split()
    assert not {"root", "docker", "sudo", "adm", "disk", "video", "render"} & set(groups)
    assert accounts.run_as(first, ["ls", str(others[0].home)]).returncode != 0
    denied = accounts.run_as(first, ["docker", "ps"], env={"DOCKER_HOST": engine.host})
    assert denied.returncode != 0
    assert "permission denied" in denied.stderr.lower()


def test_a_command_of_an_account_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    account = accounts.ensure(1)[0]
    with pytest.raises(subprocess.TimeoutExpired):
        accounts.run_as(account, ["sh", "-c", "sleep 987654 & sleep 987654"], timeout=0.5)
    deadline = time.monotonic() + 10
    while subprocess.run(["pgrep", "-f", "sleep 987654"], check=False, capture_output=True).returncode == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- the training program -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab_engine() -> Engine:
    found = ensure()
    images.ensure(found, images.PYTHON)
    return found


def trainer(engine: Engine, name: str, checkpoints: Path) -> None:
    """Start the training program on two GPUs in a container of that name."""
    engine.docker("run", "--detach", f"--name={name}", "--network=none", "--user=5001:5001",
                  "--runtime=nvidia", "--env=NVIDIA_VISIBLE_DEVICES=2,3", f"--volume={TRAIN}:/train:ro",
                  f"--volume={checkpoints}:/checkpoints", images.PYTHON, "python3", "/train/train.py",
                  "--checkpoint-dir=/checkpoints", "--epochs=300", "--seed=7", "--checkpoint-every=150")


def wait_for_step(engine: Engine, name: str, step: int) -> None:
    deadline = time.monotonic() + 60
    while not any(int(n) >= step for n in re.findall(r" step (\d+) loss", engine.docker("logs", name))):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def arrays(checkpoints: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(checkpoints / "checkpoint.npz") as saved:
        return {name: saved.read(name) for name in saved.namelist()}


def test_training_that_was_stopped_and_killed_ends_with_the_weights_of_training_that_was_not(
    lab_engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    docker = lab_engine.docker
    whole, broken = (tmp_path_factory.mktemp(name) for name in ("whole", "broken"))
    for directory in (whole, broken):
        directory.chmod(0o777)
    names = [f"gjlab-{os.getpid()}-{run}" for run in ("whole", "stopped", "killed", "resumed")]
    try:
        trainer(lab_engine, names[0], whole)
        assert docker("wait", names[0]).strip() == "0"
        log = docker("logs", names[0])
        assert "GPUs visible: /dev/nvidia2 /dev/nvidia3" in log
        assert float(re.search(r"held-out accuracy (\d\.\d+) on 360 images", log)[1]) > 0.95

        trainer(lab_engine, names[1], broken)
        wait_for_step(lab_engine, names[1], 1000)
        docker("kill", "--signal=TERM", names[1])
        assert docker("wait", names[1]).strip() == "143"
        stopped = int(re.search(r"SIGTERM: saved at step (\d+)", docker("logs", names[1]))[1])

        trainer(lab_engine, names[2], broken)
        wait_for_step(lab_engine, names[2], stopped + 500)
        docker("kill", names[2])
        assert docker("wait", names[2]).strip() == "137"
        assert f"resumed at step {stopped} of 13500" in docker("logs", names[2])

        trainer(lab_engine, names[3], broken)
        assert docker("wait", names[3]).strip() == "0"
        resumed = int(re.search(r"resumed at step (\d+)", docker("logs", names[3]))[1])
        assert stopped < resumed < 13500
        assert resumed % 150 == 0
        assert arrays(broken) == arrays(whole)
    finally:
        docker("rm", "--force", *names)
