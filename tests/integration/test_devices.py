"""What the device probe says of a container, beside what an open in that container's cgroup says."""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpujobs import init
from gpujobs.adapters import devices
from gpujobs.adapters.devices import CONTROL_MINORS, MAJOR, TRIED, device_cgroups, granted, host_minors, mount_of
from gpujobs.adapters.engine import Engine
from gpujobs.core.container import Image, Order, control_file, control_path, init_command
from gpujobs.core.errors import Unavailable
from gpujobs.core.job import Allocation, JobId
from gpujobs.core.spec import JobSpec
from tests.lab import images, nvml
from tests.lab.engine import Engine as LabEngine
from tests.unit.values import owner

TRIES = range(TRIED + 4)

# Nodes of its own for every minor, so that the device policy alone decides what opens: ENXIO where it allows
# (there is no driver behind the lab's nodes), EPERM where it denies.
OPENS = f"""
for n in {" ".join(map(str, TRIES))}; do
    [ -e /tmp/$n ] || mknod /tmp/$n c {MAJOR} $n
    (: < /tmp/$n) 2>&1 | sed "s/.*: /open $n /"
done
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabEngine]:
    state = tmp_path_factory.mktemp("machine") / "nvml.state"
    machine = nvml.dgx_a100()
    machine.gpus[6].minor = 12  # a device file's number need not be the index
    machine.write(state)
    daemon = LabEngine.private(tmp_path_factory.mktemp("engine"), nvml_state=state)
    try:
        images.ensure(daemon.engine, images.BUSYBOX, images.CUDA_LIKE)
        yield daemon.engine
    finally:
        daemon.destroy()


@pytest.fixture(scope="module")
def uuids(lab: LabEngine) -> list[str]:
    return [gpu.uuid for gpu in nvml.dgx_a100().gpus]


@pytest.fixture
def engine(lab: LabEngine) -> Iterator[Engine]:
    with closing(Engine(lab.host)) as engine:
        yield engine


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "nodes"
    directory.mkdir(mode=0o700)
    yield directory
    assert list(directory.iterdir()) == [], "the probe leaves no device node behind"


@contextmanager
def container(lab: LabEngine, *options: str, image: str = images.BUSYBOX) -> Iterator[tuple[str, int]]:
    """A container that runs; its id and the pid of its first process."""
    name = lab.docker("run", "--detach", "--network=none", *options, image, "sleep", "600").strip()
    try:
        yield name, pid_of(lab, name)
    finally:
        lab.docker("rm", "--force", name)


def pid_of(lab: LabEngine, name: str) -> int:
    return int(json.loads(lab.docker("inspect", name))[0]["State"]["Pid"])


def opened(lab: LabEngine, name: str) -> frozenset[int]:
    """The minors that a process inside the container could open."""
    said = dict(
        re.findall(r"^open (\d+) (.*)$", lab.docker("exec", "--user=0:0", name, "sh", "-c", OPENS), re.MULTILINE)
    )
    assert set(said) == {str(number) for number in TRIES}
    assert set(said.values()) <= {"No such device or address", "Operation not permitted"}
    return frozenset(int(number) for number, words in said.items() if words == "No such device or address")


def probe(engine: Engine, nodes: Path, name: str, pid: int, binary: Path | None = None) -> frozenset[int]:
    return asyncio.run(granted(engine, binary or init.binary(), nodes, name, pid, TRIES))


def gpus(*numbers: int) -> Callable[[list[str]], list[str]]:
    return lambda uuids: ["--runtime=nvidia", "--env", f"NVIDIA_VISIBLE_DEVICES={','.join(uuids[n] for n in numbers)}"]


@pytest.mark.parametrize(
    ("options", "image", "expected"),
    [
        (gpus(1, 4), images.BUSYBOX, {1, 4}),
        (gpus(6), images.BUSYBOX, {12}),
        (lambda _: [], images.BUSYBOX, set()),
        (lambda _: ["--runtime=nvidia", "--env", "NVIDIA_VISIBLE_DEVICES=void"], images.CUDA_LIKE, set()),
        (lambda _: ["--runtime=nvidia"], images.CUDA_LIKE, {0, 1, 2, 3, 4, 5, 7, 12}),
        (lambda _: ["--device=/dev/nvidia3"], images.BUSYBOX, {3}),
        (lambda _: [f"--device-cgroup-rule=c {MAJOR}:* rwm"], images.BUSYBOX, set(TRIES)),
    ],
    ids=[
        "two GPUs",
        "a GPU whose number is not its index",
        "none",
        "void",
        "all, unasked for",
        "a device file",
        "a rule for all numbers",
    ],
)
def test_the_probe_says_what_an_open_inside_says(
    lab: LabEngine,
    uuids: list[str],
    engine: Engine,
    nodes: Path,
    options: Callable[[list[str]], list[str]],
    image: str,
    expected: set[int],
) -> None:
    with container(lab, *options(uuids), image=image) as (name, pid):
        said = probe(engine, nodes, name, pid)
        assert said == opened(lab, name) == expected


def test_a_runtime_that_grants_one_gpu_too_many_is_seen(
    lab: LabEngine, uuids: list[str], engine: Engine, nodes: Path
) -> None:
    with lab.fault("extra"), container(lab, *gpus(1)(uuids)) as (name, pid):
        said = probe(engine, nodes, name, pid)
        assert len(said) == 2
        assert 1 in said
        assert said == opened(lab, name)


def test_a_runtime_that_grants_none_is_seen(lab: LabEngine, uuids: list[str], engine: Engine, nodes: Path) -> None:
    with lab.fault("none"), container(lab, *gpus(1)(uuids)) as (name, pid):
        assert probe(engine, nodes, name, pid) == opened(lab, name) == set()


def test_the_probe_leaves_the_containers_cgroup_as_it_was(
    lab: LabEngine, uuids: list[str], engine: Engine, nodes: Path
) -> None:
    with container(lab, *gpus(0)(uuids)) as (name, pid):
        (cgroup,) = device_cgroups(pid)
        before = (cgroup / "cgroup.procs").read_text()
        assert probe(engine, nodes, name, pid) == probe(engine, nodes, name, pid) == {0}
        assert (cgroup / "cgroup.procs").read_text() == before


def test_the_device_cgroup_found_is_the_one_that_the_container_is_in(lab: LabEngine) -> None:
    with container(lab) as (_, pid):
        (cgroup,) = device_cgroups(pid)
        assert str(pid) in (cgroup / "cgroup.procs").read_text().split()
        assert cgroup != device_cgroups(os.getpid())[0]
        assert cgroup.is_relative_to(
            mount_of(None) if (cgroup / "cgroup.controllers").exists() else mount_of("devices")
        )


def test_at_the_gate_the_probe_of_root_and_the_one_through_the_engine_agree(
    lab: LabEngine, uuids: list[str], engine: Engine, nodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The init waits, nothing was released; through the Engine is how a server that is not root has to ask."""
    control, nonce = tmp_path / "control", "n0nce"
    control.mkdir(mode=0o755)
    ada = owner(groups=(5001,))
    order = Order(
        server="x",
        job=JobId(1),
        attempt=1,
        nonce=nonce,
        owner=ada,
        spec=JobSpec(name="x", command=("sleep", "600")),
        allocation=Allocation(gpus=(uuids[2],)),
        image=Image(id="x", reference="x"),
        control=str(control),
        home="/",
    )
    (control / "job").write_bytes(control_file(order))
    (control / "init").write_bytes(init.binary().read_bytes())
    (control / "init").chmod(0o755)
    for part in (tmp_path, *tmp_path.parents[:2]):  # the job's user has to reach it; pytest's directories are 0700
        part.chmod(0o755)
    os.mkfifo(control / "gate", 0o644)
    inside = control_path(nonce)
    entry, *words = init_command(inside, "run")
    name = lab.docker(
        "run",
        "--detach",
        "--network=none",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--user=5001:5001",
        f"--volume={control}:{inside}:ro",
        f"--entrypoint={entry}",
        *gpus(2, 6)(uuids),
        images.BUSYBOX,
        *words,
        "sleep",
        "600",
    ).strip()
    gate = os.open(control / "gate", os.O_RDWR)
    try:
        assert probe(engine, nodes, name, pid_of(lab, name)) == {2, 12}
        monkeypatch.setattr(os, "geteuid", lambda: 5001)
        assert probe(engine, nodes, name, pid_of(lab, name)) == {2, 12}
        assert lab.docker("ps", "--all", "--quiet", "--filter", "label=gpujobs.probe") == "", "it leaves no container"
    finally:
        os.close(gate)
        lab.docker("rm", "--force", name)


def test_the_control_nodes_are_no_gpus(lab: LabEngine, uuids: list[str], engine: Engine, nodes: Path) -> None:
    with container(lab, *gpus(0)(uuids)) as (name, pid):
        said = asyncio.run(granted(engine, init.binary(), nodes, name, pid, [255, 300]))
        assert said == {0}
        assert not said & CONTROL_MINORS


def test_the_hosts_own_device_files_are_those_in_dev() -> None:
    there = {
        os.minor(path.stat().st_rdev)
        for path in Path("/dev").iterdir()
        if re.fullmatch(r"nvidia[0-9]+", path.name) and stat.S_ISCHR(path.stat().st_mode)
    }
    assert host_minors() == there


def test_of_a_process_that_is_gone_nothing_is_known(lab: LabEngine, engine: Engine, nodes: Path) -> None:
    with container(lab) as (name, pid):
        pass
    with pytest.raises(Unavailable, match=rf"\(pid {pid}\) is gone"):
        probe(engine, nodes, name, pid)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 0", "no answer"),
        ("echo 195:0 allow", "195:0 allow"),
        ("echo probe: cannot join >&2; exit 125", "probe: cannot join"),
    ],
)
def test_half_an_answer_of_the_probe_is_none(
    engine: Engine, tmp_path: Path, nodes: Path, script: str, words: str
) -> None:
    binary = tmp_path / "init"
    binary.write_text(f"#!/bin/sh\n{script}\n")
    binary.chmod(0o755)
    with pytest.raises(Unavailable, match=f"the container's device policy could not be read: .*{words}"):
        probe(engine, nodes, "any", os.getpid(), binary)


def test_a_probe_that_hangs_is_ended(
    engine: Engine, tmp_path: Path, nodes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary, told = tmp_path / "init", tmp_path / "pid"
    binary.write_text(f"#!/bin/sh\necho $$ > {told}\nexec sleep 600\n")
    binary.chmod(0o755)
    monkeypatch.setattr(devices, "PROBE_SECONDS", 1)

    async def ask() -> Any:
        await granted(engine, binary, nodes, "any", os.getpid(), [])

    with pytest.raises(Unavailable, match="the device probe gave no answer in 1 s"):
        asyncio.run(ask())
    assert not Path(f"/proc/{int(told.read_text())}").exists()


def test_where_no_cgroup_is_mounted_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="is not mounted"):
        mount_of("no-such-controller")
