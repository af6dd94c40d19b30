"""An Engine with one small image, accounts, and a server as a service manager starts it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import BUSYBOX, Place
from tests.integration.managed import Server
from tests.lab import accounts, engine, images
from tests.lab.accounts import Account
from tests.lab.engine import Engine


@pytest.fixture(scope="module")
def lab() -> Engine:
    """The Engine; its GPUs do not matter."""
    found = engine.ensure()
    images.ensure(found, BUSYBOX)
    return found


@pytest.fixture(scope="module")
def people() -> tuple[Account, ...]:
    """Accounts without Docker."""
    return accounts.ensure()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of the test's own, which every account can enter."""
    found = Place()
    yield found.path
    found.remove()


@pytest.fixture
def server(place: Path, lab: Engine) -> Iterator[Server]:
    """A server that is not started yet; whatever is left of it goes."""
    found = Server(place, {"DOCKER_HOST": lab.host})
    yield found
    found.clean(lab)
