"""Real parts for the end-to-end tests: an Engine, a machine of eight GPUs in NVML, accounts, servers."""

from __future__ import annotations

import grp
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.harness import BUSYBOX, CUDA_LIKE, HOSTILE, Place, Server
from tests.lab import accounts, engine, images, nvml
from tests.lab.__main__ import LIBRARY_DIR
from tests.lab.accounts import Account
from tests.lab.engine import Daemon, Engine

GROUP = "gpujobs"
DOCKER_GROUP = "gjdocker"


@pytest.fixture(scope="session")
def lab() -> Engine:
    """An Engine whose runtime ``nvidia`` is the stand-in, with the small images."""
    found = engine.ensure()
    assert found.simulated, "these tests switch the lab's GPUs about: they do not run on a machine with real ones"
    images.ensure(found, BUSYBOX, CUDA_LIKE, HOSTILE)
    nvml.build(LIBRARY_DIR)
    return found


@pytest.fixture(scope="session")
def nvml_state(lab: Engine) -> Iterator[Path]:
    """The file of the machine that NVML and the runtime tell of; as it was before, afterwards."""
    assert lab.runtime_dir is not None
    path = Path(tomllib.loads((lab.runtime_dir / "config.toml").read_text())["lab"]["nvml-state"])
    before = path.read_bytes() if path.exists() else None
    yield path
    if before is None:
        path.unlink()
    else:
        path.write_bytes(before)


@pytest.fixture
def machine(nvml_state: Path) -> nvml.Machine:
    """Eight A100 at rest. Change it and :func:`write` it for what a test needs."""
    found = nvml.dgx_a100().fit_host()
    found.write(nvml_state)
    return found


@pytest.fixture(scope="session")
def environment(lab: Engine, nvml_state: Path) -> Mapping[str, str]:
    """What a server needs to find the Engine and NVML."""
    return {"DOCKER_HOST": lab.host, "LD_LIBRARY_PATH": str(LIBRARY_DIR), "LAB_NVML_STATE": str(nvml_state)}


@contextmanager
def membership(group: str, *members: Account) -> Iterator[int]:
    """A group of that name with these members for the time of a test; a group that is there stays.

    They leave it at the end even where a run that was killed had left them in it; where they have left it already, as
    when two tests' fixtures made them members, nothing is to be done.
    """
    try:
        grp.getgrnam(group)
        ours = False
    except KeyError:
        subprocess.run(["groupadd", "--system", group], check=True)
        ours = True
    try:
        for account in members:
            subprocess.run(["gpasswd", "--add", account.name, group], check=True, stdout=subprocess.DEVNULL)
        yield grp.getgrnam(group).gr_gid
    finally:
        left = set(grp.getgrnam(group).gr_mem)
        for account in members:
            if account.name in left:
                subprocess.run(["gpasswd", "--delete", account.name, group], check=True, stdout=subprocess.DEVNULL)
        if ours:
            subprocess.run(["groupdel", group], check=True)


@pytest.fixture(scope="session")
def people() -> Iterator[tuple[Account, ...]]:
    """Five accounts without Docker; the first two may use the machine's gpujobs server."""
    found = accounts.ensure()
    with membership(GROUP, *found[:2]):
        yield found


@pytest.fixture(scope="session")
def alice(people: tuple[Account, ...]) -> Account:
    """The account that most jobs run as."""
    return people[0]


@pytest.fixture(scope="session")
def bob(people: tuple[Account, ...]) -> Account:
    """Another one."""
    return people[1]


@pytest.fixture(scope="module")
def shared_place() -> Iterator[Place]:
    """A directory for the module's server."""
    place = Place()
    yield place
    place.remove()


@pytest.fixture
def place() -> Iterator[Place]:
    """A directory of the test's own."""
    found = Place()
    yield found
    found.remove()


@contextmanager
def serving(
    directory: Path, environment: Mapping[str, str], nvml_state: Path, runner: Account, lab: Engine
) -> Iterator[Server]:
    """A server of root on a machine of eight A100; it ends in order and has told of no mistake of its own."""
    nvml.dgx_a100().fit_host().write(nvml_state)
    found = Server(directory, environment, runner).start()
    try:
        yield found
    finally:
        code = found.stop()
        found.clean(lab)
    assert code == 0
    assert "Traceback" not in found.said, found.said[-5000:]


@pytest.fixture(scope="module")
def server(
    shared_place: Place, environment: Mapping[str, str], nvml_state: Path, alice: Account, lab: Engine
) -> Iterator[Server]:
    """The module's server, as root."""
    with serving(shared_place.path, environment, nvml_state, alice, lab) as found:
        yield found


@pytest.fixture
def make_server(
    place: Place, environment: Mapping[str, str], machine: nvml.Machine, alice: Account, lab: Engine
) -> Iterator[Callable[..., Server]]:
    """Servers of the test's own, not started yet; whatever of their containers is left goes."""
    made: list[Server] = []

    def make(settings: str = "", **changes: str) -> Server:
        directory = place.path / f"server{len(made)}"
        directory.mkdir(mode=0o755)
        made.append(Server(directory, {**environment, **changes}, alice, settings))
        return made[-1]

    yield make
    for server in made:
        server.clean(lab)


@pytest.fixture(scope="module")
def disposable(tmp_path_factory: pytest.TempPathFactory, nvml_state: Path) -> Iterator[Daemon]:
    """An Engine that a test may kill, whose socket belongs to a group."""
    daemon = Engine.private(tmp_path_factory.mktemp("engine"), nvml_state=nvml_state)
    images.ensure(daemon.engine, BUSYBOX)
    yield daemon
    daemon.destroy()
