"""A real server, three accounts and what the attacks are made with."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from tests.attacks.tools import PROBE, Evil, import_image, raw, request, submission
from tests.e2e.conftest import alice, bob, environment, lab, nvml_state, people, place, serving
from tests.e2e.harness import Place, Row, Server
from tests.lab.accounts import Account
from tests.lab.engine import Engine, LabError

__all__ = ["alice", "bob", "environment", "lab", "nvml_state", "people", "place"]


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
def committed_by_a_test() -> set[str]:
    """Names of jobs' containers that a test itself has made an image of, as whoever may use Docker can."""
    return set()


@pytest.fixture(scope="package")
def server(
    ground: Place, environment: Mapping[str, str], nvml_state: Path, alice: Account, lab: Engine,
    committed_by_a_test: set[str],
) -> Iterator[Server]:  # fmt: skip
    """The server that is attacked, as root; it must outlive all of them, and never use what is root on mounts."""
    began = time.time()
    with serving(ground.path, environment, nvml_state, alice, lab) as found:
        yield found
        prefix = f"gpujobs-{found.get('/server')['server']}-"
        shown = lab.docker("events", "--since", f"{began:.3f}", "--until", f"{time.time():.3f}", "--filter",
                           "type=container", "--format", "{{.Action}} {{.Actor.Attributes.name}}")  # fmt: skip
        done = {action for action, _, name in (line.partition(" ") for line in shown.splitlines())
                if name.startswith(prefix) and not (action == "commit" and name in committed_by_a_test)}  # fmt: skip
        assert "create" in done
        assert not done & AS_ROOT, done


AS_ROOT = {"archive-path", "extract-to-dir", "copy", "export", "commit"}
"""The Engine's words for what it does as root with a container's files, volumes included: `docker cp` and the like."""


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


@pytest.fixture
def waiting(server: Server, alice: Account) -> Iterator[Row]:
    """A job of alice's that does not begin for as long as the test: its build context does not come."""
    job = {"build": {"context": "/nowhere"}, "command": ["true"]}
    answer = raw(server, alice, request("POST", "/v1/jobs", submission(job)))
    assert answer.status == 201, answer
    number = str(answer.body["jobs"][0]["id"])
    yield server.job(number)
    server.cli("cancel", number)


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
