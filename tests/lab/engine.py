"""A Docker Engine with a runtime named ``nvidia`` for tests and the demo.

``ensure`` takes the Engine that is there when it has such a runtime. Otherwise it starts a dockerd of the
lab's own beside whatever runs: own socket, data, bridge and containerd namespace, with the stand-in of
``runtime/nvidia-runtime`` registered. ``Engine.private`` starts disposable ones that a test may kill.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

RUN = Path("/run/gpujobs-lab")
LIB = Path("/var/lib/gpujobs-lab")
CACHE = Path("/var/cache/gpujobs-lab")
NVML_STATE = RUN / "nvml.state"
SYSTEM_HOST = "unix:///var/run/docker.sock"
RUNTIME = Path(__file__).parent / "runtime" / "nvidia-runtime"
NVIDIA_MAJOR = 195  # the kernel's documented device number for NVIDIA's nodes
NVIDIACTL_MINOR = 255
GPU_NODES = 16

Fault: TypeAlias = Literal["extra", "none", "fail"]

# package -> a path or command whose presence shows that it, or what replaces it, is installed
PACKAGES = {
    "docker.io": ("dockerd", "docker", "runc"),
    "iptables": ("iptables",),
    "iproute2": ("ip",),
    "busybox-static": ("/bin/busybox",),
    "debootstrap": ("debootstrap",),
    "gcc": ("gcc",),
    "libc6-dev": ("/usr/include/stdio.h",),
    "python3-venv": ("/usr/lib/python3.11/ensurepip/__init__.py",),
    "ca-certificates": ("/etc/ssl/certs/ca-certificates.crt",),
}

TEST_PACKAGES = {
    "procps": ("ps", "pgrep", "kill"),
    "systemd": ("systemd-analyze",),  # it judges the unit files that setup installs
    "runsc": ("runsc",),
    "zsh": ("zsh",),
    "fish": ("fish",),
}
"""What only the tests need besides."""



class LabError(RuntimeError):
    """The lab could not be set up; the message says what failed, with the failing program's own words."""


def run(*argv: str, timeout: float = 120.0, env: dict[str, str] | None = None) -> str:
    """Run a command and return its standard output.

    Raises:
        LabError: when it ends with another code than 0, with the end of what it wrote.
    """
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=timeout, env=env,
                          stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        words = (done.stderr or done.stdout)[-2000:].strip()
        raise LabError(f"{' '.join(argv[:4])}: exit {done.returncode}: {words}")
    return done.stdout


# --- the machine --------------------------------------------------------------------------------------------

def missing_packages(wanted: Mapping[str, Sequence[str]] = PACKAGES) -> list[str]:
    """Return the Debian packages of these that this machine has not."""
    def present(what: str) -> bool:
        return Path(what).exists() if what.startswith("/") else shutil.which(what) is not None

    missing = [name for name, signs in wanted.items() if not all(map(present, signs))]
    if "busybox-static" in wanted and "busybox-static" not in missing and _is_dynamic(Path("/bin/busybox")):
        missing.append("busybox-static")
    return missing


def _is_dynamic(path: Path) -> bool:
    """Tell whether an ELF program names an interpreter: such a busybox does not run in an empty image."""
    return b"/ld-linux" in path.read_bytes()


def install_packages(wanted: Mapping[str, Sequence[str]] = PACKAGES) -> list[str]:
    """Install what of these is missing, asking nothing; return the names of what was installed.

    Services are not started by the installation: the lab runs a dockerd of its own.
    """
    missing = missing_packages(wanted)
    if not missing:
        return []
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "APT_LISTCHANGES_FRONTEND": "none"}
    policy = Path("/usr/sbin/policy-rc.d")  # invoke-rc.d asks it; 101 means "do not start"
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        run("apt-get", "-q", "update", timeout=300, env=quiet)
        run("apt-get", "-qy", "-o", "Dpkg::Use-Pty=0", "install", "--no-install-recommends", *missing,
            timeout=900, env=quiet)
    finally:
        if ours:
            policy.unlink()
    if still := missing_packages():
        raise LabError(f"installed, but still not found: {', '.join(still)}")
    return missing


def make_device_nodes(count: int = GPU_NODES) -> None:
    """Create ``/dev/nvidia0`` … and ``/dev/nvidiactl`` where they are missing: character devices, mode 0666.

    With no driver behind them, opening one that the device cgroup allows fails with ENXIO and opening one
    that it denies fails with EPERM, which is the difference that tests of isolation look at. A machine with
    the real driver keeps the nodes that it has.
    """
    if Path("/proc/driver/nvidia").exists():
        return
    for name, minor in [*((f"nvidia{n}", n) for n in range(count)), ("nvidiactl", NVIDIACTL_MINOR)]:
        node = Path("/dev") / name
        if not node.exists():
            os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(NVIDIA_MAJOR, minor))
            node.chmod(0o666)  # mknod's mode is subject to the umask


# --- talking to an Engine -----------------------------------------------------------------------------------

class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def get(host: str, path: str, timeout: float = 10.0) -> bytes | None:
    """Return the body of ``GET path`` from the Engine at ``host`` (``unix://…``); None when none answers."""
    if not host.startswith("unix://"):
        return None
    with contextlib.closing(_UnixConnection(host.removeprefix("unix://"), timeout)) as connection:
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.read() if response.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None


def answers(host: str) -> bool:
    """Tell whether an Engine answers at ``host``."""
    return get(host, "/_ping", timeout=5.0) is not None


def _nvidia_runtime(host: str) -> Path | None:
    """Return the path that the Engine has for runtime ``nvidia``; None without it or without an Engine."""
    body = get(host, "/info")
    if body is None:
        return None
    runtime = json.loads(body).get("Runtimes", {}).get("nvidia")
    return Path(runtime["path"]) if runtime else None


@dataclass(frozen=True)
class Engine:
    """An Engine that answers and has a runtime ``nvidia``.

    Attributes:
        host: its address, ``unix://…``, fit for DOCKER_HOST.
        started: whether the lab started it, now or at an earlier call.
        pid: process id of the lab's dockerd, None for an Engine that was there.
        runtime_dir: directory of the stand-in's config.toml and fault file; None when the runtime is a real
            one, whose GPUs are real too.
    """

    host: str
    started: bool
    pid: int | None
    runtime_dir: Path | None

    @property
    def simulated(self) -> bool:
        """Whether the runtime is the lab's stand-in, granting the GPUs of the NVML state file."""
        return self.runtime_dir is not None

    def docker(self, *args: str, timeout: float = 120.0) -> str:
        """Run the docker command line against this Engine; return its standard output.

        Raises:
            LabError: when it fails.
        """
        return run("docker", *args, timeout=timeout, env=self.environment())

    def environment(self) -> dict[str, str]:
        """Return this process's environment with DOCKER_HOST set to this Engine."""
        return {**os.environ, "DOCKER_HOST": self.host, "DOCKER_BUILDKIT": "0"}

    @contextmanager
    def fault(
        self, mode: Fault, *, only: str | None = None, message: str = "broken by the lab"
    ) -> Iterator[None]:
        """Make the runtime stand-in misbehave at every create within the block.

        Args:
            mode: ``extra`` grants one GPU too many, ``none`` grants none, ``fail`` refuses to create.
            only: a ``NAME=value`` that a container's environment must hold to be affected; all are by
                default.
            message: the reason that ``fail`` gives.
        """
        path = self._stand_in() / "fault.json"
        _write_atomically(path, json.dumps({"mode": mode, "only": only, "message": message}))
        try:
            yield
        finally:
            path.unlink()

    @contextmanager
    def toolkit(self, text: str) -> Iterator[None]:
        """Put ``text`` before the stand-in's config.toml (NVIDIA's own keys) within the block."""
        path = self._stand_in() / "config.toml"
        before = path.read_text()
        _write_atomically(path, f"{text}\n{before}")
        try:
            yield
        finally:
            _write_atomically(path, before)

    def _stand_in(self) -> Path:
        if self.runtime_dir is None:
            raise LabError(f"the nvidia runtime of {self.host} is a real one: it has no faults to switch on")
        return self.runtime_dir

    @staticmethod
    def private(
        tmpdir: Path, *, bridge: str | None = None, live_restore: bool = False, nvml_state: Path = NVML_STATE,
        runtimes: Mapping[str, Sequence[str]] | None = None,
    ) -> Daemon:
        """Start a disposable Engine with its data in ``tmpdir``; end it with ``destroy``.

        Args:
            tmpdir: an existing directory for its data.
            bridge: name of its network bridge, made with it; by default one derived from ``tmpdir``. It
                writes no iptables rules, so that it cannot disturb another Engine.
            live_restore: whether containers outlive its dockerd and are taken up by the next.
            nvml_state: the state file of the machine whose GPUs its runtime grants.
            runtimes: programs of further runtimes and their options, by the runtimes' names.
        """
        digest = hashlib.sha256(str(tmpdir).encode()).hexdigest()[:8]
        daemon = Daemon(tmpdir, RUN / f"engine-{digest}", bridge or f"gj{digest}", iptables=False,
                        live_restore=live_restore, nvml_state=nvml_state, runtimes=runtimes)
        daemon.start()
        return daemon


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


# --- a dockerd of our own -----------------------------------------------------------------------------------

class Daemon:
    """One dockerd of the lab's own, every path of it below two directories, found again by its pid file.

    Args:
        home: what lasts: data-root, configuration, log, the runtime stand-in.
        run_dir: what does not: socket, pid file, containerd's state. Kept apart because the paths of sockets
            are limited to 107 bytes.
        bridge: name of the network bridge, created and removed with the daemon.
        iptables: whether it writes iptables rules: only one dockerd of a network namespace may, because each
            empties the chains named DOCKER when it starts.
        live_restore: whether containers outlive the daemon.
        nvml_state: state file of the machine whose GPUs the runtime grants.
        runtimes: programs of further runtimes and their options, by the runtimes' names.
    """

    def __init__(
        self, home: Path, run_dir: Path, bridge: str, *, iptables: bool, live_restore: bool = False,
        nvml_state: Path = NVML_STATE, runtimes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.home, self.run_dir, self.bridge = home, run_dir, bridge
        self.iptables, self.live_restore, self.nvml_state = iptables, live_restore, nvml_state
        self.runtimes = {
            name: {"path": path, "runtimeArgs": options} for name, (path, *options) in (runtimes or {}).items()
        }
        self.runtime_dir = home / "runtime"
        self.log = home / "dockerd.log"
        self._config = home / "daemon.json"
        self._pidfile = run_dir / "docker.pid"
        self._namespace = "gpujobs-lab-" + hashlib.sha256(str(home).encode()).hexdigest()[:8]

    @property
    def host(self) -> str:
        """Its address for DOCKER_HOST."""
        return f"unix://{self.run_dir}/docker.sock"

    @property
    def pid(self) -> int | None:
        """Process id of its dockerd, None when it does not run; a reused pid is not mistaken for it."""
        try:
            pid = int(self._pidfile.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return pid if str(self._config).encode() in _cmdline(pid) else None

    @property
    def engine(self) -> Engine:
        """This daemon as an Engine."""
        return Engine(self.host, started=True, pid=self.pid, runtime_dir=self.runtime_dir)

    def start(self, *, live_restore: bool | None = None, timeout: float = 60.0) -> None:
        """Start it unless it runs, and wait until it answers.

        Args:
            live_restore: changes that setting from now on.
            timeout: seconds to wait for its first answer.

        Raises:
            LabError: when it ends or does not answer in time, with the end of its log.
        """
        if live_restore is not None:
            self.live_restore = live_restore
        pid = self.pid
        self._install_runtime()
        if pid is None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._pidfile.unlink(missing_ok=True)
            self._write_files()
            self._make_bridge()
            pid = self._spawn()
        deadline = time.monotonic() + timeout
        while not (answers(self.host) and self.pid == pid):
            if not _alive(pid):
                raise LabError(f"dockerd ended at its start; {self.log} ends with:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise LabError(f"dockerd did not answer in {timeout:.0f} s; {self.log}:\n{self._log_tail()}")
            time.sleep(0.05)

    def _install_runtime(self) -> None:
        """Copy the runtime to where the Engine runs it: the checkout may go while the Engine stays."""
        self.runtime_dir.mkdir(parents=True, exist_ok=True)
        for source in (RUNTIME.with_name("rules.py"), RUNTIME):
            target = self.runtime_dir / source.name
            if not target.exists() or target.read_bytes() != source.read_bytes():
                partial = target.with_name(f".{target.name}.{os.getpid()}")
                partial.write_bytes(source.read_bytes())
                partial.chmod(0o755)
                partial.replace(target)

    def _write_files(self) -> None:
        _write_atomically(self.runtime_dir / "config.toml", "\n".join([
            "[nvidia-container-runtime]", 'mode = "cdi"', "",
            "[lab]", f"nvml-state = {json.dumps(str(self.nvml_state))}", "",
        ]))
        (self.runtime_dir / "fault.json").unlink(missing_ok=True)
        _write_atomically(self._config, json.dumps({
            "hosts": [self.host],
            "data-root": str(self.home / "docker"),
            "exec-root": str(self.run_dir / "exec"),
            "pidfile": str(self._pidfile),
            "bridge": self.bridge,
            "iptables": self.iptables,
            "live-restore": self.live_restore,
            "runtimes": {"nvidia": {"path": str(self.runtime_dir / RUNTIME.name)}, **self.runtimes},
            # A containerd of the system's is shared by every dockerd that finds one; the names are not.
            "containerd-namespace": self._namespace,
            "containerd-plugins-namespace": f"{self._namespace}-plugins",
            "shutdown-timeout": 5,
            "features": {"buildkit": False},
        }, indent=2))

    def _make_bridge(self) -> None:
        if Path("/sys/class/net", self.bridge).exists():
            return
        taken = run("ip", "-o", "-4", "address")
        number = next(n for n in range(1, 255) if f" 10.223.{n}." not in taken)
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "address", "add", f"10.223.{number}.1/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")

    def _spawn(self) -> int:
        dockerd = shutil.which("dockerd")
        if dockerd is None:
            raise LabError("dockerd is not installed")
        log = (os.POSIX_SPAWN_OPEN, 1, str(self.log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        files = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0), log, (os.POSIX_SPAWN_DUP2, 1, 2)]
        # posix_spawn and not Popen: it outlives this process, and nothing here waits for it.
        return os.posix_spawn(dockerd, [dockerd, "--config-file", str(self._config)], os.environ,
                              file_actions=files, setsid=True)

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def kill(self) -> None:
        """End dockerd as a crash would (SIGKILL) and wait until it is gone; containers stay as they are.

        Its containerd ends with it. That one is waited for until it is reaped too: the next dockerd takes a
        zombie of that pid for a living containerd and waits for its answer in vain.
        """
        if (pid := self.pid) is None:
            return
        containerd = self.run_dir / "exec/containerd/containerd.pid"
        child = Path("/proc", containerd.read_text().strip()) if containerd.exists() else None
        _end(pid, signal.SIGKILL, 10.0)
        deadline = time.monotonic() + 10.0
        while child is not None and child.exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def stop(self) -> None:
        """End dockerd and whatever of its containers is left, and remove its bridge; its data stay."""
        if (pid := self.pid) is not None and not _end(pid, signal.SIGTERM, 30.0):
            _end(pid, signal.SIGKILL, 10.0)
        for left in self._leftovers():
            _end(left, signal.SIGKILL, 10.0)
        _unmount_below(self.home, self.run_dir)
        for bridge in (self.bridge, *self._bridges()):
            if Path("/sys/class/net", bridge).exists():
                run("ip", "link", "delete", bridge)
        shutil.rmtree(self.run_dir / "exec", ignore_errors=True)
        self._pidfile.unlink(missing_ok=True)
        (self.run_dir / "docker.sock").unlink(missing_ok=True)

    def destroy(self) -> None:
        """Stop it and remove its data."""
        self.stop()
        for directory in (self.home / "docker", self.runtime_dir, self.run_dir):
            shutil.rmtree(directory, ignore_errors=True)

    def _bridges(self) -> list[str]:
        """Return the bridges of networks that were made in this daemon: it makes them anew when it starts."""
        store = self.home / "docker/network/files/local-kv.db"
        content = store.read_bytes() if store.exists() else b""
        return sorted({name.decode() for name in re.findall(rb'"BridgeName":"(br-[0-9a-f]{12})"', content)})

    def _leftovers(self) -> list[int]:
        """Return the pids of this daemon's shims, containerd and container inits that outlived it."""
        left = []
        for state in self.run_dir.glob("exec/runtime-*/*/*/state.json"):
            with suppress(OSError, ValueError, KeyError):
                saved = json.loads(state.read_text())
                pid = int(saved["init_process_pid"])
                if _start_time(pid) == int(saved["init_process_start"]):
                    left.append(pid)
        for process in Path("/proc").glob("[0-9]*"):
            if not _is_of_this_machine(process):
                continue
            words = _cmdline(int(process.name)).split(b"\0")
            mine = (self._namespace.encode(), str(self.run_dir / "exec/containerd/containerd.toml").encode())
            if words[0].rpartition(b"/")[2].startswith(b"containerd") and any(word in mine for word in words):
                left.append(int(process.name))
        return left


def _is_of_this_machine(process: Path) -> bool:
    """Whether a process is in this one's PID namespace: in another, a lab of the same paths may have begun it."""
    with suppress(OSError):
        return (process / "ns/pid").readlink() == Path("/proc/self/ns/pid").readlink()
    return False


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _start_time(pid: int) -> int:
    """Return field 22 of /proc/PID/stat, the start in clock ticks since boot (proc(5))."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _alive(pid: int) -> bool:
    """Tell whether a process runs; a child of ours that has ended is reaped, a zombie is not alive."""
    with suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _end(pid: int, number: signal.Signals, timeout: float) -> bool:
    """Send a signal and wait; return whether the process is gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
    deadline = time.monotonic() + timeout
    while _alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _unmount_below(*directories: Path) -> None:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4].replace("\\040", " ") for line in lines]  # spaces are octal there: proc(5)
    for point in reversed(points):
        if any(point.startswith(f"{directory}/") for directory in directories):
            run("umount", "--lazy", point)


# --- the lab's Engine ---------------------------------------------------------------------------------------

def _iptables_taken() -> bool:
    """Tell whether a dockerd runs that may write iptables rules (all but the disposable ones of the lab)."""
    for process in Path("/proc").glob("[0-9]*"):
        words = _cmdline(int(process.name)).decode(errors="replace").split("\0")
        if not words[0].endswith("dockerd") or "--iptables=false" in words:
            continue
        named = "--config-file" in words
        config = Path(words[words.index("--config-file") + 1] if named else "/etc/docker/daemon.json")
        if not config.exists() or json.loads(config.read_text()).get("iptables", True):
            return True
    return False


def lab_daemon() -> Daemon:
    """Return the lab's own daemon, running or not."""
    return Daemon(LIB, RUN, "gjlab0", iptables=not _iptables_taken())


def find() -> Engine | None:
    """Return the Engine that ``ensure`` would take without starting one, None without any."""
    daemon = lab_daemon()
    for host in (os.environ.get("DOCKER_HOST", ""), SYSTEM_HOST):
        if host == daemon.host:
            break
        if (runtime := _nvidia_runtime(host)) is not None:
            stand_in = runtime.name == RUNTIME.name and (runtime.parent / "config.toml").exists()
            return Engine(host, started=False, pid=None, runtime_dir=runtime.parent if stand_in else None)
    return daemon.engine if daemon.pid is not None and answers(daemon.host) else None


def ensure() -> Engine:
    """Return an Engine with a runtime ``nvidia``: the one that is there, else the lab's own, started then.

    The one of DOCKER_HOST comes first, then the system's. Calls at the same time wait for each other.

    Raises:
        LabError: when none can be had.
    """
    RUN.mkdir(parents=True, exist_ok=True)
    with (RUN / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make_device_nodes()
        found = find()
        if found is not None and not found.started:
            return found
        install_packages()
        daemon = lab_daemon()
        daemon.start()
    return daemon.engine


def stop() -> bool:
    """End the lab's own Engine; return whether it ran. An Engine that was there before is left alone."""
    daemon = lab_daemon()
    ran = daemon.pid is not None
    daemon.stop()
    return ran
