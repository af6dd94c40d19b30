"""The device policy for shells: every kind of device but NVIDIA's, as systemd reads it and as the kernel does."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.e2e.harness import ROOT

POLICY = ROOT / "configs/shells/gpujobs-shells.conf"
LINES = [line.split("=", 1) for line in POLICY.read_text().splitlines() if "=" in line and not line.startswith("#")]
ALLOWED = [value.split()[0] for key, value in LINES if key == "DeviceAllow"]

# Names of /proc/devices: systemd compares them with what follows char- and block- (systemd.resource-control(5)).
NVIDIA = ("nvidia", "nvidia-frontend", "nvidia-uvm", "nvidia-caps", "nvidia-modeset", "nvidia-nvlink",
          "nvidia-nvswitch", "nvidia-caps-imex-channels")  # fmt: skip
OTHERS = ("mem", "tty", "/dev/tty", "/dev/console", "/dev/ptmx", "ptm", "pts", "misc", "input", "sound", "alsa", "fb",
          "video4linux", "i2c", "usb", "usb_device", "drm", "hidraw", "rtc", "nvme", "nvme-generic", "nvram", "net",
          "ttyS", "vcs", "watchdog", "bsg", "cpu/msr", "n_hdlc")  # fmt: skip


def allowed(kind: str, name: str) -> bool:
    return any(fnmatchcase(f"{kind}-{name}", pattern) for pattern in ALLOWED)


@pytest.mark.parametrize("name", NVIDIA)
def test_a_login_opens_no_node_of_nvidias_driver(name: str) -> None:
    assert not allowed("char", name)


@pytest.mark.parametrize("name", OTHERS)
def test_a_login_opens_what_it_opened_before(name: str) -> None:
    assert allowed("char", name)
    assert allowed("block", "sd")


def test_systemd_understands_every_line_of_it(tmp_path: Path) -> None:
    right = POLICY.read_text()
    for text, told in ((right, ""), (right.replace("DeviceAllow", "DeviceAlow"), "DeviceAlow")):
        drop_in = tmp_path / "user-5001.slice.d"
        drop_in.mkdir(exist_ok=True)
        (drop_in / "gpujobs-shells.conf").write_text(text)
        (tmp_path / "user-5001.slice").write_text("[Slice]\n")
        done = subprocess.run(
            ["systemd-analyze", "verify", tmp_path / "user-5001.slice"], capture_output=True, text=True, check=False
        )
        assert (told in done.stderr) if told else (done.returncode, done.stderr) == (0, ""), done


@pytest.fixture
def login() -> Iterator[Path]:
    """A device cgroup with what systemd makes of the policy there: the numbers of all kinds that it allows."""
    top = Path("/sys/fs/cgroup/devices")
    if not (top / "devices.deny").exists() and not (top / "cgroup.procs").exists():
        pytest.skip("no cgroup v1 controller of devices here; on v2 systemd loads a program for the same numbers")
    made = top / f"gpujobs-test-{os.getpid()}"
    made.mkdir()
    (made / "devices.deny").write_text("a")
    kind = ""
    for line in Path("/proc/devices").read_text().splitlines():
        number, _, name = line.strip().partition(" ")
        if name == "devices:":
            kind = {"Character": "char", "Block": "block"}[number]
        elif number and allowed(kind, name):
            (made / "devices.allow").write_text(f"{kind[0]} {number}:* rwm")
    yield made
    made.rmdir()


_OPEN = """
import os, sys
open(sys.argv[1], "w").write("0")
for path in sys.argv[2:]:
    try:
        os.close(os.open(path, os.O_RDWR))
        print(0)
    except OSError as error:
        print(error.errno)
"""


def test_the_kernel_answers_a_login_with_eperm_whatever_the_nodes_mode(login: Path, tmp_path: Path) -> None:
    """Not in that cgroup the same nodes can be opened: without a driver behind it a GPU's answers ENXIO."""
    nodes = ["/dev/nvidia0", "/dev/nvidiactl", "/dev/null", "/dev/zero", "/dev/full"]

    def opened(within: Path) -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", _OPEN, str(within / "cgroup.procs"), *nodes], capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        return [int(line) for line in done.stdout.split()]

    assert opened(Path("/sys/fs/cgroup/devices"))[:2] in ([errno.ENXIO] * 2, [0, 0])
    assert opened(login) == [errno.EPERM, errno.EPERM, 0, 0, 0]
