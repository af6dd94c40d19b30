"""A real server, three accounts and what the attacks are made with."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from tests.attacks.tools import PROBE, Evil, import_image
from tests.e2e.conftest import environment, lab, nvml_state, people
from tests.e2e.harness import Place, Server
from tests.lab import nvml
from tests.lab.accounts import Account
from tests.lab.engine import Engine, LabError

__all__ = ["environment", "lab", "nvml_state", "people"]


@pytest.fixture(scope="session")
def alice(people: tuple[Account, ...]) -> Account:
    """Who is attacked, or attacks the machine."""
    return people[0]


@pytest.fixture(scope="session")
def bob(people: tuple[Account, ...]) -> Account:
    """Who may use the server too, and attacks others."""
    return people[1]


@pytest.fixture(scope="session")
def mallory(people: tuple[Account, ...]) -> Account:
    """An account that may not use the server."""
    return people[2]


@pytest.fixture(scope="package")
def ground(lab: Engine) -> Iterator[Place]:
    """A directory for the server of all attacks, with the probe in it."""
    place = Place()
    subprocess.run(["gcc", "-static", "-O1", "-o", place.path / "probe", PROBE], check=True)
    yield place
    place.remove()


@pytest.fixture(scope="package")
def server(
    ground: Place, environment: Mapping[str, str], nvml_state: Path, alice: Account, lab: Engine
) -> Iterator[Server]:
    """The server that is attacked, as root; it must outlive all of them without one traceback."""
    nvml.dgx_a100().fit_host().write(nvml_state)
    found = Server(ground.path, environment, alice).start()
    yield found
    assert found.stop() == 0
    found.clean(lab)
    told = found.said
    assert "Traceback" not in told, told[-5000:]


@pytest.fixture
def place() -> Iterator[Place]:
    """A directory of the test's own."""
    found = Place()
    yield found
    found.remove()


@pytest.fixture
def volume(place: Place, alice: Account) -> Path:
    """A directory of alice's, of mode 0700."""
    return place.volume(alice)


@pytest.fixture(scope="package")
def evil(lab: Engine, ground: Place) -> Iterator[Callable[..., str]]:
    """Makes images that were built to harm; they go afterwards."""
    made: list[str] = []

    def make(name: str, image: Evil) -> str:
        reference = f"gpujobs-attack/{name}:1"
        if reference not in made:
            import_image(lab, reference, image, ground.path / "probe")
            made.append(reference)
        return reference

    yield make
    for reference in made:
        with suppress(LabError):  # a container that is kept still needs it
            lab.docker("image", "rm", "--force", reference)


@pytest.fixture
def roots(place: Place) -> Path:
    """A directory that is root's and that everybody may look into: what /etc is to an account."""
    directory = place.path / "roots"
    directory.mkdir(mode=0o755)
    secret = directory / "secret"
    secret.write_text("root's secret\n")
    secret.chmod(0o600)
    return directory


@pytest.fixture(scope="package")
def server_id(server: Server) -> str:
    """The server's own id."""
    found = str(server.get("/server")["server"])
    assert re.fullmatch(r"[0-9a-f]{8}", found)
    return found


@pytest.fixture(autouse=True)
def nothing_ran_as_root() -> Iterator[None]:
    """Whatever an attack tried: no code of an image ran on the host while it was defended."""
    mark = Path("/tmp/gpujobs-lab-evil")
    yield
    if mark.exists():
        text = mark.read_text()
        mark.unlink()
        pytest.fail(f"code of an image ran on the host: {text}")
