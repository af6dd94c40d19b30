"""What the ledger promises, kept against the real SQLite: on disk before it is told, all or nothing, never guessed."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from gpujobs.adapters import store as module
from gpujobs.adapters.store import QUERIES, Ledger, Store, migrate, migrations
from gpujobs.core.errors import Refused, Unavailable
from gpujobs.core.job import Allocation, Ended, Job, JobId, Pulling, Queued, Running, Starting, State, Stopping
from gpujobs.core.spec import GpuRequest, JobSpec
from tests.lab.fuse import Fuse
from tests.unit.values import owner, specs, states

ADA = owner()
SPEC = JobSpec(name="train", image="busybox", gpus=GpuRequest(count=2, max_count=2), environment=(("A", "1"),))
HELD = Allocation(gpus=("GPU-a", "GPU-b"), cpus=2.0, memory=2**30)
NOW = 1_700_000_000.25


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with closing(Store(path)) as opened:
        yield opened


def change[T](store: Store, action: Callable[[Ledger], T]) -> T:
    return asyncio.run(store.change(action))


def read[T](store: Store, query: Callable[[Ledger], T]) -> T:
    return asyncio.run(store.read(query))


def submit(ledger: Ledger, *specs_: JobSpec) -> list[Job]:
    return ledger.submit(ADA, NOW, "job.yaml", "name: train", [(None, spec) for spec in specs_ or (SPEC,)])
