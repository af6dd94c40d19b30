"""A volume of a job's own cannot take the init's place, whatever links the image holds."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gpujobs import init
from gpujobs.adapters.engine import Engine
from gpujobs.adapters.streams import LOG_CONFIG
from gpujobs.core.container import (
    CONTROL,
    Mount,
    Order,
    control_file,
    control_path,
    create_request,
    group_file,
    passwd_file,
)
from gpujobs.core.job import Allocation, JobId
from gpujobs.core.spec import JobSpec
from tests.lab import images
from tests.lab.engine import Engine as LabEngine
from tests.unit.values import owner

NONCE = "5e4ae7f0"
LINKED = "gpujobs-lab/linked:1"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabEngine]:
    daemon = LabEngine.private(tmp_path_factory.mktemp("engine"))
    try:
        images.ensure(daemon.engine, images.BUSYBOX)
        context = tmp_path_factory.mktemp("context")
        (context / "Dockerfile").write_text(f"FROM {images.BUSYBOX}\nRUN ln -s {CONTROL} /a && ln -s / /b\n")
        daemon.engine.docker("build", "--quiet", "--network=none", "--tag", LINKED, str(context))
        yield daemon.engine
    finally:
        daemon.destroy()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for part in (tmp_path, *tmp_path.parents[:2]):  # the job's user has to reach it; pytest's directories are 0700
        part.chmod(0o755)
    evil = tmp_path / "evil"
    evil.write_text("#!/bin/sh\necho EVIL\n")
    evil.chmod(0o755)
    return tmp_path


def test_with_a_path_that_an_image_can_know_the_attack_works(lab: LabEngine, directory: Path) -> None:
    """So that the tests below are known to attack: this is how it went when the path was always the same."""
    control = directory / "control"
    control.mkdir()
    (control / "init").write_text("#!/bin/sh\necho OURS\n")
    (control / "init").chmod(0o755)
    said = lab.docker(
        "run",
        "--rm",
        "--network=none",
        "--user=5001:5001",
        f"--volume={control}:{CONTROL}:ro",
        f"--volume={directory / 'evil'}:/a/init",
        f"--entrypoint={CONTROL}/init",
        LINKED,
    )
    assert said == "EVIL\n"


@pytest.mark.parametrize("target", ["/a/init", f"/b{CONTROL}/init"])
def test_the_init_runs_and_the_volume_does_not(lab: LabEngine, directory: Path, target: str) -> None:
    control = directory / "control"
    control.mkdir(mode=0o755)
    ada = owner(groups=(5001,))
    with closing(Engine(lab.host)) as engine:
        order = Order(
            server="x",
            job=JobId(1),
            attempt=1,
            nonce=NONCE,
            owner=ada,
            spec=JobSpec(name="x", command=("echo", "GOOD")),
            allocation=Allocation(memory=64 << 20),
            image=asyncio.run(engine.image(LINKED)),
            control=str(control),
            home="/",
            mounts=(Mount(source=str(directory / "evil"), target=target, read_only=False),),
            log=LOG_CONFIG,
            ceilings=engine.ceilings(),
        )
        for name, content in (
            ("job", control_file(order)),
            ("passwd", passwd_file(ada, "/")),
            ("group", group_file(ada, [])),
        ):
            (control / name).write_bytes(content)
        (control / "init").write_bytes(init.binary().read_bytes())
        (control / "init").chmod(0o755)
        os.mkfifo(control / "gate", 0o644)
        gate = os.open(control / "gate", os.O_RDWR)
        container = asyncio.run(engine.create("gpujobs-x-1-1", create_request(order)))
        try:
            asyncio.run(engine.start(container))
            pid = asyncio.run(engine.inspect(container))["State"]["Pid"]
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            assert words[0].decode() == f"{control_path(NONCE)}/init"
            assert lab.docker("logs", container) == "", "it waits at its gate"
            os.write(gate, b"g")
            assert lab.docker("wait", container).strip() == "0"
            assert lab.docker("logs", container) == "GOOD\n"
        finally:
            os.close(gate)
            asyncio.run(engine.remove(container))
