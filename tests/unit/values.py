"""Values of the core, made up by hypothesis and by hand, for the tests of its modules."""

from __future__ import annotations

from hypothesis import strategies as st

from gpujobs import testing
from gpujobs.core.inventory import Inventory
from gpujobs.core.job import Allocation, Ended, JobId, Owner, Pulling, Queued, Running, Starting, State, Stopping
from gpujobs.core.secrets import Secret
from gpujobs.core.spec import Build, GpuRequest, Healthcheck, JobSpec, Port, Ulimit, Volume

GIB = 2**30

MACHINES = (
    testing.dgx_a100,
    testing.two_socket_rtx,
    testing.mixed,
    testing.mig_a100,
    testing.one_t4,
    testing.dgx1_v100,
    Inventory,
)
"""Machines of every kind, and one without GPUs."""

texts = st.text(max_size=12)
words = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=8)
seconds = st.floats(min_value=0, max_value=2e9, allow_nan=False)
sizes = st.integers(0, 2**50)
pairs = st.lists(st.tuples(texts, texts), max_size=3).map(tuple)


def optional(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | strategy


def tuples_of(strategy: st.SearchStrategy, most: int = 3) -> st.SearchStrategy:
    return st.lists(strategy, max_size=most).map(tuple)


uuids = st.uuids().map(lambda value: f"GPU-{value}")
job_ids = st.builds(JobId, st.integers(1, 10**6), optional(st.integers(0, 9999)))
owners = st.builds(
    Owner,
    uid=st.integers(0, 2**32 - 2),
    gid=st.integers(0, 2**32 - 2),
    groups=tuples_of(st.integers(0, 2**32 - 2)),
    name=texts,
    home=texts,
)
allocations = st.builds(Allocation, gpus=tuples_of(uuids, 8), cpus=st.floats(0, 256, allow_nan=False), memory=sizes)
states: st.SearchStrategy[State] = st.one_of(
    st.builds(Queued),
    st.builds(Pulling, allocation=allocations, attempt=st.integers(1, 9)),
    st.builds(Starting, allocation=allocations, attempt=st.integers(1, 9)),
    st.builds(Running, allocation=allocations, attempt=st.integers(1, 9), started_at=seconds),
    st.builds(
        Stopping,
        allocation=allocations,
        attempt=st.integers(1, 9),
        started_at=optional(seconds),
        reason=texts,
        message=texts,
    ),
    st.builds(
        Ended,
        outcome=st.sampled_from(["succeeded", "failed", "cancelled"]),
        attempt=st.integers(0, 9),
        started_at=optional(seconds),
        ended_at=seconds,
        exit_code=optional(st.integers(0, 255)),
        gpus=tuples_of(uuids),
        reason=texts,
        message=texts,
    ),
)

gpu_requests = st.builds(
    GpuRequest,
    count=st.integers(0, 16),
    max_count=st.integers(0, 16),
    memory=optional(sizes),
    model=tuples_of(texts),
    capability=optional(
        st.tuples(st.sampled_from([">=", ">", "==", "<", "<="]), st.tuples(st.integers(0, 12), st.integers(0, 9)))
    ),
    link=st.sampled_from(["any", "same-numa", "nvlink"]),
    mig=optional(texts),
    share=optional(sizes),
    uuid=tuples_of(uuids),
)
specs = st.builds(
    JobSpec,
    name=words,
    image=optional(texts),
    build=optional(st.builds(Build, context=texts, args=pairs, no_cache=st.booleans())),
    command=optional(tuples_of(texts)),
    entrypoint=optional(tuples_of(texts)),
    environment=pairs,
    secrets=tuples_of(
        st.builds(Secret, name=texts, target=texts, file=texts, environment=texts, variable=texts)
    ),
    volumes=tuples_of(
        st.builds(
            Volume,
            target=texts,
            source=texts,
            type=st.sampled_from(["bind", "tmpfs"]),
            read_only=st.booleans(),
            size=optional(sizes),
        )
    ),
    working_dir=optional(texts),
    gpus=gpu_requests,
    cpus=optional(st.floats(0.01, 4096)),
    mem_limit=optional(sizes),
    shm_size=optional(sizes),
    time_limit=optional(seconds),
    ports=tuples_of(st.builds(Port, target=st.integers(1, 65535), published=optional(st.integers(1, 65535)))),
    ulimits=tuples_of(st.builds(Ulimit, name=words, soft=st.integers(-1, 2**62), hard=st.integers(-1, 2**62))),
    labels=pairs,
    stop_signal=optional(texts),
    stop_grace_period=seconds,
    healthcheck=optional(st.builds(Healthcheck, test=tuples_of(texts), shell=st.booleans(), interval=seconds)),
)


def owner(name: str = "ada", uid: int = 5001, groups: tuple[int, ...] = (5001, 44)) -> Owner:
    """An account with a home."""
    return Owner(uid=uid, gid=uid, groups=groups, name=name, home=f"/home/{name}")
