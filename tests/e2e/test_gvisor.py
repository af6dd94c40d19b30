"""Jobs under gVisor, by a real server and a private Engine: the same job as under runc, with another kernel.

Debian's package is ``runsc``, which the lab installs.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.e2e.harness import BUSYBOX, Place, Row, Server, inspect, spec, wait_for
from tests.lab import images, nvml
from tests.lab.__main__ import LIBRARY_DIR
from tests.lab.accounts import Account
from tests.lab.engine import Daemon, Engine

RUNSC = shutil.which("runsc")
OPTIONS = ("--network=none",)
"""A gVisor older than Linux 6.12 takes every network there for the machine's own, and refuses to start."""

SETTINGS = "allow: {runtime: {runsc: ['*']}}\n"
UNTIL_GO = "while [ ! -e /v/go ]; do sleep 0.05; done"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """An Engine that knows gVisor, and a machine of eight GPUs."""
    assert RUNSC is not None
    directory = tmp_path_factory.mktemp("engine")
    state = directory / "nvml.state"
    nvml.build(LIBRARY_DIR)
    nvml.dgx_a100().fit_host().write(state)
    found = Engine.private(directory, nvml_state=state, runtimes={"runsc": (RUNSC, *OPTIONS)})
    try:
        images.ensure(found.engine, BUSYBOX)
        yield found
    finally:
        found.destroy()


@pytest.fixture(scope="module")
def given(daemon: Daemon) -> Mapping[str, str]:
    return {"DOCKER_HOST": daemon.host, "LD_LIBRARY_PATH": str(LIBRARY_DIR), "LAB_NVML_STATE": str(daemon.nvml_state)}


@pytest.fixture(scope="module")
def server(shared_place: Place, given: Mapping[str, str], alice: Account, daemon: Daemon) -> Iterator[Server]:
    """The module's server, as root."""
    found = Server(shared_place.path, given, alice, SETTINGS).start()
    yield found
    assert found.stop() == 0
    found.clean(daemon.engine)
    assert "Traceback" not in found.said


@pytest.fixture
def volume(place: Place, alice: Account) -> Path:
    return place.volume(alice)


def submit(server: Server, user: Account, **keys: object) -> str:
    return server.submit(user=user, runtime="runsc", cpus=0.5, mem_limit="256m", **keys)


def ended(server: Server, user: Account, **keys: object) -> Row:
    return server.ended(submit(server, user, **keys))


def output(server: Server, row: Row) -> str:
    return server.cli("logs", str(row["id"])).out.decode()


def test_a_job_runs_under_another_kernel_as_its_owner(server: Server, daemon: Daemon, alice: Account) -> None:
    script = "cat /proc/version; id; grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status; echo err >&2; exit 7"
    row = ended(server, alice, script=script)
    done = server.cli("logs", str(row["id"]))
    assert (row["state"], row["reason"], row["exit_code"]) == ("failed", "exit", 7), (row, done)
    version, identity, *status = done.out.decode().splitlines()
    assert version != Path("/proc/version").read_text().strip()
    assert identity.startswith(f"uid={alice.uid}({alice.name}) gid={alice.gid}")
    assert {line.split()[1].lstrip("0") for line in status if line.startswith("Cap")} <= {""}
    assert done.err == b"err\n"
    assert inspect(daemon, row["container"]["id"])["HostConfig"]["Runtime"] == "runsc"


def test_cancelling_ends_it_by_its_signal(server: Server, alice: Account) -> None:
    job = submit(server, alice, script="trap 'echo asked; exit 9' TERM; echo begun; while :; do sleep 0.1; done")
    wait_for(lambda: b"begun" in server.cli("logs", job).out, "it has begun")
    assert server.cli("cancel", job, user=alice).code == 0
    row = server.ended(job)
    assert (row["state"], output(server, row)) == ("cancelled", "begun\nasked\n"), row


def test_one_that_does_not_obey_is_killed(server: Server, alice: Account) -> None:
    job = submit(server, alice, script="trap '' TERM; echo begun; while :; do sleep 0.1; done", stop_grace_period="1s")
    wait_for(lambda: b"begun" in server.cli("logs", job).out, "it has begun")
    server.cli("cancel", job, user=alice)
    assert server.ended(job)["state"] == "cancelled"


def test_its_time_limit_ends_it(server: Server, alice: Account) -> None:
    row = ended(server, alice, script="sleep 600", time_limit="1s", stop_grace_period="1s")
    assert (row["state"], row["reason"]) == ("failed", "time-limit")


def test_its_memory_limit_ends_it(server: Server, alice: Account) -> None:
    row = server.ended(server.submit(user=alice, runtime="runsc", cpus=0.5, mem_limit="128m", script="tail /dev/zero"))
    assert row["state"] == "failed", row
    assert row["reason"] in ("oom", "exit"), row


def test_its_volumes_are_its_owners(server: Server, alice: Account, place: Place, volume: Path) -> None:
    shared = place.path / "shared"
    shared.mkdir(mode=0o755)
    (shared / "data").write_text("data\n")
    row = ended(server, alice, volumes=[f"{volume}:/v", f"{shared}:/data:ro", f"{volume}:/v/below"], working_dir="/v/w",
                script="cat /data/data; echo mine > /v/file; touch /data/x; pwd; touch ~/there; ls ~")  # fmt: skip
    assert row["exit_code"] == 0, (row, server.cli("logs", str(row["id"])))
    assert output(server, row).splitlines()[:2] == ["data", "/v/w"]
    assert {path.name: path.stat().st_uid for path in volume.iterdir()} == dict.fromkeys(
        ("below", "file", "w"), alice.uid
    )
    assert [path.name for path in shared.iterdir()] == ["data"]


def test_nothing_is_made_in_a_directory_of_roots(server: Server, alice: Account, place: Place, volume: Path) -> None:
    shared = place.path / "shared"
    shared.mkdir(mode=0o755)
    below = {"volumes": [f"{shared}:/v", f"{volume}:/v/below"]}
    for keys in (below, {"volumes": [f"{shared}:/v"], "working_dir": "/v/w"}):
        row = ended(server, alice, script="true", **keys)
        assert row["state"] == "failed", row
        assert list(shared.iterdir()) == []


def test_it_reaches_no_gpu(server: Server, alice: Account, volume: Path) -> None:
    """Whatever the sandbox's cgroup allows the sandbox: no device of the host is in there, and none can be made."""
    node = volume / "gpu"
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(195, 0))
    node.chmod(0o666)
    script = "ls /dev; mknod /v/made c 195 0; mknod /tmp/gpu c 195 0; cat /tmp/gpu; cat /v/gpu; echo end"
    row = ended(server, alice, volumes=[f"{volume}:/v"], script=script)
    done = server.cli("logs", str(row["id"]))
    assert "nvidia" not in done.out.decode()
    assert done.out.endswith(b"end\n")
    # In gVisor's own memory a node can be made, and there is no device behind it.
    assert done.words.splitlines() == ["mknod: /v/made: Operation not permitted",
                                       "cat: can't open '/tmp/gpu': No such device or address",
                                       "cat: can't open '/v/gpu': Permission denied"]  # fmt: skip
    assert [path.name for path in volume.iterdir()] == ["gpu"]


def test_it_finds_its_secrets(server: Server, alice: Account, volume: Path) -> None:
    key = volume / "key"
    key.write_text("hunter2")
    os.chown(key, alice.uid, alice.gid)
    row = ended(server, alice, secrets={"key": {"file": str(key), "variable": "KEY"}},
                script="cd /run/secrets; stat -c '%n %a %u' key; cat key; echo; echo $$KEY")  # fmt: skip
    assert output(server, row) == f"key 400 {alice.uid}\nhunter2\nhunter2\n", server.cli("logs", str(row["id"]))


def test_a_health_check_runs_as_its_owner(server: Server, daemon: Daemon, alice: Account, volume: Path) -> None:
    job = submit(server, alice, volumes=[f"{volume}:/v"], script=UNTIL_GO,
                 healthcheck={"test": ["CMD", "sh", "-c", "id -u > /v/checked"], "interval": "1s"})  # fmt: skip
    wait_for(lambda: (volume / "checked").exists() and (volume / "checked").read_text(), "it was checked")
    assert (volume / "checked").read_text() == f"{alice.uid}\n"
    (volume / "go").touch()
    assert server.ended(job)["state"] == "succeeded"


@pytest.mark.parametrize("point", ["container-created", "container-started", "devices-verified", "running-committed",
                                   "released", "container-ended"])  # fmt: skip
def test_a_server_that_dies_goes_on_where_it_was(
    given: Mapping[str, str], server: Server, daemon: Daemon, alice: Account, place: Place, volume: Path, point: str
) -> None:
    server.stop()
    own = Server(place.path, given, alice, SETTINGS).start(GPUJOBS_FAULT=point)
    try:
        job = submit(own, alice, volumes=[f"{volume}:/v"], script="echo ran >> /v/ran; exit 7")
        own.died()
        if point in ("container-started", "devices-verified", "running-committed"):
            assert not (volume / "ran").exists(), "its program did not wait to be let go"
        own.start()
        row = own.ended(job)
        assert (row["exit_code"], row["attempt"]) == (7, 1), row
        assert (volume / "ran").read_text() == "ran\n"
        assert "Traceback" not in own.said
    finally:
        own.clean(daemon.engine)
        server.start()


def test_with_gpus_it_is_refused(server: Server, alice: Account) -> None:
    done = server.cli("submit", "-", user=alice, stdin=spec(runtime="runsc", gpus=1, script="true"))
    assert (done.code, done.out) == (3, b""), done
    assert "for jobs without GPUs" in done.words


def test_a_plan_tells_of_it(server: Server, alice: Account) -> None:
    done = server.cli("plan", "--json", "-", user=alice, stdin=spec(runtime="runsc", script="true"))
    assert " --runtime runsc " in json.dumps(done.json["docker_run"])
