"""The init and volumes under gVisor itself, without an Engine: the gate, the identity, secrets, the gofer's mounts.

Debian's package is ``runsc``, which the lab installs.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gpujobs import init
from gpujobs.adapters.mounts import Mounts
from gpujobs.adapters.mounts_kernel import MountError
from gpujobs.adapters.mounts_seal import keeper
from gpujobs.core.container import in_memory
from gpujobs.core.job import Owner
from gpujobs.core.secrets import Secret, handed_over
from tests.integration.test_init import GID, UID, record, until

RUNSC = shutil.which("runsc")
OWNER = Owner(uid=UID, gid=GID, groups=(42, GID), name="gjlab1", home="/home/gjlab1")
CONTROL = "/.gpujobs-x"


@dataclass
class Bundle:
    """A container of a static busybox as the Engine would have runsc make it."""

    path: Path
    mounts: list[dict[str, object]] = field(default_factory=list)
    groups: list[int] = field(default_factory=lambda: [42])
    uid: int = UID
    kill: list[str | Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.path / "root/bin").mkdir(parents=True)
        shutil.copy("/bin/busybox", self.path / "root/bin/busybox")
        for name in ("sh", "cat", "id", "echo", "touch", "sleep", "stat", "ls", "grep"):
            (self.path / "root/bin" / name).symlink_to("busybox")
        self.control.mkdir()
        shutil.copy(init.binary(), self.control / "init")
        os.mkfifo(self.control / "gate", 0o644)
        self.told(filegate="1")

    @property
    def control(self) -> Path:
        return self.path / "control"

    def told(self, **more: str) -> None:
        """Write the control file."""
        given = {"uid": str(UID), "gid": str(GID), "groups": "42", "caps": "0", **more}
        (self.control / "job").write_bytes(record(**given))

    def mount(self, target: str, source: Path | str, *options: str, kind: str = "bind") -> None:
        self.mounts.append({"destination": target, "type": kind, "source": str(source), "options": [*options]})

    def let_go(self) -> None:
        """As the server does."""
        (self.control / "word.new").write_bytes(b"g")
        (self.control / "word.new").rename(self.control / "word")

    @contextmanager
    def running(self, script: str) -> Iterator[subprocess.Popen[str]]:
        """Run it in the foreground; what is left of it goes."""
        assert RUNSC is not None
        name = f"gpujobs-test-{uuid.uuid4().hex[:12]}"
        own = [{"destination": CONTROL, "type": "bind", "source": str(self.control), "options": ["rbind", "ro"]},
               {"destination": "/proc", "type": "proc", "source": "proc"}]  # fmt: skip
        user = {"uid": self.uid, "gid": GID, "additionalGids": self.groups}
        argv = [f"{CONTROL}/init", "--dir", CONTROL, "run", "sh", "-c", script]
        (self.path / "config.json").write_text(json.dumps({
            "ociVersion": "1.0.0", "root": {"path": "root"}, "mounts": own + self.mounts,
            "process": {"user": user, "args": argv, "env": ["PATH=/bin"], "cwd": "/", "noNewPrivileges": True,
                        "capabilities": {}},
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]},
        }))  # fmt: skip
        command = [RUNSC, f"--root={self.path}/state", "--ignore-cgroups", "--network=none"]
        self.kill = [*command, "kill", name]
        with subprocess.Popen([*command, "run", "--bundle", self.path, name], stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # fmt: skip
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()
                subprocess.run([*command, "delete", "--force", name], check=False, capture_output=True)

    def ended(self, script: str) -> tuple[int, str, str]:
        with self.running(script) as process:
            out, err = process.communicate(timeout=30)
            return process.returncode, out, err


@pytest.fixture
def bundle() -> Iterator[Bundle]:
    path = Path(tempfile.mkdtemp(prefix="gpujobs-gvisor-"))  # not tmp_path, which other uids cannot reach
    path.chmod(0o755)
    yield Bundle(path)
    shutil.rmtree(path)


def sandbox(process: subprocess.Popen[str]) -> int | None:
    """The container's first process on the host, as the Engine tells it."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
            if path.read_bytes().startswith(b"runsc-sandbox\0") and parent == process.pid:
                return int(path.parent.name)
    return None


def first_process(process: subprocess.Popen[str]) -> int:
    until(lambda: sandbox(process), "the sandbox is there")
    found = sandbox(process)
    assert found is not None
    return found


def test_the_init_checks_the_identity_there_too(bundle: Bundle) -> None:
    bundle.let_go()
    code, out, err = bundle.ended("cat /proc/version; id -u; id -G; exit 7")
    version, *identity = out.splitlines()
    assert version != Path("/proc/version").read_text().strip()
    assert (code, identity, err) == (7, [str(UID), f"{GID} 42"], "")
    bundle.groups = [42, 43]
    code, out, err = bundle.ended("echo ran")
    assert (code, out, err) == (125, "", f"gpujobs-init: groups: expected 42 besides {GID}, is 42,43\n")
    bundle.uid, bundle.groups = 0, [42]
    code, out, err = bundle.ended("echo ran")
    assert (code, out) == (125, "")
    assert "uid: expected 5001, is 0" in err


def test_a_fifo_of_the_host_is_no_gate_there(bundle: Bundle) -> None:
    """Which is why there is the other one."""
    bundle.told()
    code, out, err = bundle.ended("echo ran")
    assert (code, out) == (125, "")
    assert err == f"gpujobs-init: {CONTROL}/gate: Operation not permitted\n"


def test_the_program_waits_for_the_word_that_appears_on_the_host(bundle: Bundle) -> None:
    with bundle.running("echo ran; exit 3") as process:
        first_process(process)
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=1.0)  # long enough for a program that does not wait
        bundle.let_go()
        assert process.communicate(timeout=30) == ("ran\n", "")
        assert process.returncode == 3


def test_a_signal_ends_it_while_it_waits(bundle: Bundle) -> None:
    with bundle.running("echo ran") as process:
        first_process(process)

        def asked() -> bool:
            """It may not be there yet, or not have set its handlers up."""
            subprocess.run([*bundle.kill, "TERM"], check=False, capture_output=True)
            return process.poll() is not None

        until(asked, "it ends")
        assert process.stdout is not None
        assert (process.returncode, process.stdout.read()) == (128 + signal.SIGTERM, "")


def test_secrets_are_handed_over_there_too(bundle: Bundle) -> None:
    secret = Secret(name="key", target="key", file="/k", variable="KEY")
    bundle.told(filegate="1", secrets="1")
    path = bundle.control / "secrets"
    path.write_bytes(handed_over([secret], {"key": b"hunter2\n"}))
    os.chown(path, UID, GID)
    path.chmod(0o400)
    bundle.mount("/run/secrets", "tmpfs", *in_memory(OWNER, 1 << 20).split(",")[1:], "noexec", kind="tmpfs")
    bundle.let_go()
    code, out, err = bundle.ended("stat -c '%a %u %g' /run/secrets/key; cat /run/secrets/key; echo $KEY")
    assert (code, out, err) == (0, f"400 {UID} {GID}\nhunter2\nhunter2\n", "")
    assert list((bundle.path / "root/run/secrets").iterdir()) == []


@pytest.mark.parametrize("opened", [False, True])
def test_a_sealed_volume_is_opened_in_the_gofers_mounts(bundle: Bundle, opened: bool) -> None:
    volume = bundle.path / "volume"
    volume.mkdir()
    os.chown(volume, UID, GID)

    async def through() -> tuple[int, str]:
        mounts = await Mounts.start(bundle.path / "pins")
        try:
            pin = await mounts.pin(OWNER, str(volume), False, "volume", sealed=True)
            bundle.mount("/v", pin.path, "rbind", "rprivate")
            with bundle.running("touch /v/file; ls /v") as process:
                first = first_process(process)
                until(lambda: _mounted(first), "the gofer has the mount")
                if opened:
                    await mounts.unseal(first, {"/v": pin})
                bundle.let_go()
                out, err = process.communicate(timeout=30)
                return process.returncode, out + err
        finally:
            await mounts.unpin("volume")
            await mounts.remove_all()
            await mounts.close()

    (bundle.path / "pins").mkdir()
    code, said = asyncio.run(through())
    if opened:
        assert (code, said) == (0, "file\n")
        assert (volume / "file").stat().st_uid == UID
    else:
        assert "Read-only file system" in said
        assert list(volume.iterdir()) == []


def _mounted(first: int) -> bool:
    """The gofer makes its mounts after it has begun, and the Engine's start waits for them."""
    try:
        return " /v " in Path(f"/proc/{keeper(first)}/mountinfo").read_text()
    except MountError:  # the gofer has not its name yet
        return False


def test_the_keeper_of_other_mounts_is_the_first_process_itself() -> None:
    assert keeper(os.getpid()) == os.getpid()
