"""The container init, run directly as several identities, as PID 1, on a terminal, and in real containers."""

from __future__ import annotations

import ctypes
import io
import os
import pty
import re
import shutil
import signal
import stat
import struct
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpujobs import init
from tests.lab import engine as lab

UID, GID = 5001, 5001
AS_PID_1 = ["unshare", "--pid", "--fork", "--kill-child"]  # its child is PID 1 of a new PID namespace
CAP_STATUS = ["grep", "-E", "^(Uid|Gid|Groups|Cap[A-Z]|NoNewPrivs)", "/proc/self/status"]
PATH = "/usr/local/bin:/usr/bin:/bin"  # not the tester's own, which may hold directories closed to others
GRACE = 15.0  # seconds that a condition may take on a loaded machine


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition; fail with its name when it does not come."""
    deadline = time.monotonic() + GRACE
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {GRACE:.0f} s for: {what}")
        time.sleep(0.01)


def record(**keys: str) -> bytes:
    return b"".join(f"{key}={value}".encode() + b"\0" for key, value in keys.items())


class Box:
    """A control directory that every uid can read, with the init in it as in a container."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.init = path / "init"
        self.gate = path / "gate"
        shutil.copy(init.binary(), self.init)
        os.mkfifo(self.gate, 0o644)
        self.control()

    def control(
        self,
        *extra: bytes,
        uid: int = UID,
        gid: int = GID,
        groups: str = "",
        caps: str = "0",
        nogate: bool = True,
    ) -> None:
        """Write the control file, readable by all."""
        self.raw(
            record(uid=str(uid), gid=str(gid), groups=groups, caps=caps)
            + (record(nogate="1") if nogate else b"")
            + b"".join(item + b"\0" for item in extra)
        )

    def raw(self, data: bytes) -> None:
        job = self.path / "job"
        job.unlink(missing_ok=True)
        job.write_bytes(data)

    def script(self, name: str, text: str, mode: int = 0o755) -> Path:
        path = self.path / name
        path.write_text(text)
        path.chmod(mode)
        return path

    def command(
        self,
        mode: str,
        *program: str,
        uid: int = UID,
        gid: int = GID,
        groups: str = "",
        bounding: str = "-all",
        inheritable: str = "-all",
        ambient: str = "",
    ) -> list[str]:
        """Return the command line of the init under an identity as an Engine would give it."""
        return [
            "setpriv",
            f"--reuid={uid}",
            f"--regid={gid}",
            f"--groups={groups}" if groups else "--clear-groups",
            f"--bounding-set={bounding}",
            f"--inh-caps={inheritable}",
            *([f"--ambient-caps={ambient}"] if ambient else []),
            str(self.init),
            "--dir",
            str(self.path),
            mode,
            *program,
        ]

    def run(
        self, mode: str, *program: str, env: dict[str, str] | None = None, **identity: object
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            self.command(mode, *program, **identity),
            check=False,  # type: ignore[arg-type]
            capture_output=True,
            text=True,
            timeout=30,
            env=env or {"PATH": PATH},
            stdin=subprocess.DEVNULL,
        )

    def as_root(self, mode: str, *program: str) -> subprocess.CompletedProcess[str]:
        """Run it as root, with whatever capabilities this process has."""
        return subprocess.run(
            [self.init, "--dir", self.path, mode, *program],
            check=False,
            capture_output=True,
            text=True,
            timeout=30,
        )

    def waiting(self, process: subprocess.Popen[str]) -> bool:
        """Tell whether the process holds the gate open."""
        try:
            return any(fd.readlink() == self.gate for fd in Path(f"/proc/{process.pid}/fd").iterdir())
        except FileNotFoundError:  # an fd closed between the listing and the look
            return False


@pytest.fixture
def box() -> Iterator[Box]:
    # Not tmp_path: pytest's directories are 0700 and the init runs as other users here.
    path = Path(tempfile.mkdtemp(prefix="gpujobs-init-"))
    path.chmod(0o755)
    yield Box(path)
    shutil.rmtree(path)


@contextmanager
def started(command: list[str], **options: object) -> Iterator[subprocess.Popen[str]]:
    """Start a process with pipes; kill it at the end, however the test went."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


# --- the command line ---------------------------------------------------------------------------------------


def test_the_binary_is_static_and_names_itself() -> None:
    done = subprocess.run([init.binary(), "--version"], check=True, capture_output=True, text=True)
    assert done.stdout == "gpujobs-init 1\n"
    assert b"/ld-linux" not in init.binary().read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["walk"],
        ["run"],
        ["exec"],
        ["--dir"],
        ["--dir", "/x"],
        ["--dir", "/x", "run"],
        ["--dir", "/x", "probe", "1:3"],
    ],
)
def test_a_command_line_without_mode_or_program_is_refused(arguments: list[str]) -> None:
    done = subprocess.run([init.binary(), *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 125
    assert re.match(r"gpujobs-init: (usage: |no program: )", done.stderr)


def test_a_users_command_cannot_name_another_control_directory(box: Box) -> None:
    done = box.run("run", "--dir", str(box.path), "sh", "-c", "echo in")
    assert (done.returncode, done.stderr) == (127, "gpujobs-init: --dir: No such file or directory\n")


# --- the control file ---------------------------------------------------------------------------------------

GOOD = record(uid="5001", gid="5001", groups="")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is cut off: its last record has no end"),
        (b"uid=5001", "is cut off: its last record has no end"),
        (b"\0", "control file: the record \"\" has no '='"),
        (b"hello\0", "control file: the record \"hello\" has no '='"),
        (GOOD + b"UID=5001\0", 'control file: unknown record "UID=5001"'),
        (GOOD + b"=\0", 'control file: unknown record "="'),
        (GOOD + b"env=\0", "control file: an environment variable without a name"),
        (GOOD + b"env==x\0", "control file: an environment variable without a name"),
        (GOOD + b"uid=5001\0", "control file: uid is given twice"),
        (GOOD + b"groups=1\0", "control file: groups is given twice"),
        (record(uid="5001", gid="5001"), "control file: uid, gid and groups must all be given"),
        (record(gid="5001", groups=""), "control file: uid, gid and groups must all be given"),
        (record(uid="0", gid="5001", groups=""), "uid: a job never runs as uid 0"),
        (record(uid="-1", gid="5001", groups=""), "control file: uid=-1 is not a number in range"),
        (
            record(uid="4294967295", gid="1", groups=""),
            "control file: uid=4294967295 is not a number in range",
        ),
        (
            record(uid="18446744073709556617", gid="1", groups=""),
            "control file: uid=18446744073709556617 is not a number in range",
        ),
        (record(uid="", gid="1", groups=""), "control file: uid= is not a number in range"),
        (record(uid=" 5001", gid="1", groups=""), "control file: uid= 5001 is not a number in range"),
        (record(uid="5001x", gid="1", groups=""), "control file: uid=5001x is not a number in range"),
        (record(uid="5001", gid="0x1", groups=""), "control file: gid=0x1 is not a number in range"),
        (record(uid="5001", gid="1", groups="1,"), "control file: groups=1, is not a list of group numbers"),
        (record(uid="5001", gid="1", groups=",1"), "control file: groups=,1 is not a list of group numbers"),
        (
            record(uid="5001", gid="1", groups="1 2"),
            "control file: groups=1 2 is not a list of group numbers",
        ),
        (
            record(uid="5001", gid="1", groups="docker"),
            "control file: groups=docker is not a list of group numbers",
        ),
        (
            record(uid="5001", gid="1", groups=",".join(map(str, range(65537)))),
            "control file: more than 65536 groups",
        ),
        (GOOD + b"caps=10000000000000000\0", "control file: caps=10000000000000000 is not a number in range"),
        (GOOD + b"caps=FF\0", "control file: caps=FF is not a number in range"),
        (GOOD + b"nogate=2\0", "control file: nogate=2 is not a number in range"),
        (GOOD + b"env=A=" + b"x" * (1 << 20) + b"\0", "is larger than 1048576 bytes"),
    ],
)
def test_a_bad_control_file_is_refused_in_words(box: Box, data: bytes, message: str) -> None:
    box.raw(data)
    done = box.run("run", "echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("gpujobs-init: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_control_file_of_exactly_the_limit_is_read(box: Box) -> None:
    head = GOOD + b"nogate=1\0env=LAST=here\0"
    records, rest = divmod((1 << 20) - len(head), 10)
    # Ten bytes each, all one variable, so that the environment itself stays small.
    box.raw(b"env=A=123\0" * (records - 1) + b"env=A=123" + b"x" * rest + b"\0" + head)
    done = box.run("run", "sh", "-c", "echo $LAST $A")
    assert done.stdout == f"here 123{'x' * rest}\n"


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "symlink", "unreadable"])
def test_a_control_file_that_is_no_readable_regular_file_is_refused(box: Box, kind: str) -> None:
    job = box.path / "job"
    data = job.read_bytes()
    job.unlink()
    if kind == "directory":
        job.mkdir()
    elif kind == "fifo":
        os.mkfifo(job, 0o644)
    elif kind == "symlink":
        (box.path / "real").write_bytes(data)
        job.symlink_to("real")
    elif kind == "unreadable":
        job.touch(0o600)
    done = box.run("run", "echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    words = {
        "missing": "No such file",
        "directory": "is not a regular file",
        "fifo": "is not a regular file",
        "symlink": "Too many levels of symbolic links",
        "unreadable": "Permission denied",
    }
    assert words[kind] in done.stderr


# --- identity -----------------------------------------------------------------------------------------------


def test_the_expected_identity_runs_with_no_new_privileges_and_no_capabilities(box: Box) -> None:
    box.control(groups="42,43")
    done = box.run("run", *CAP_STATUS, groups="43,42")
    assert done.returncode == 0, done.stderr
    status = dict(line.split(":\t") for line in done.stdout.splitlines())
    assert status["Uid"] == "\t".join(["5001"] * 4)
    assert status["Groups"].split() == ["42", "43"]
    assert {status[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"


@pytest.mark.parametrize(
    ("listed", "actual"), [("", "5001"), ("42", "42,5001"), ("42,5001", "42"), ("42,42,7", "7,42")]
)
def test_the_primary_group_may_or_may_not_be_listed(box: Box, listed: str, actual: str) -> None:
    box.control(groups=listed)
    assert box.run("run", "true", groups=actual).returncode == 0


@pytest.mark.parametrize("mode", ["run", "exec"])
@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"uid": 5002}, "uid: expected 5001, is 5002 (effective 5002, saved 5002)"),
        ({"gid": 42}, "gid: expected 5001, is 42 (effective 42, saved 42)"),
        ({"gid": 0}, "gid: expected 5001, is 0 (effective 0, saved 0)"),
        ({"groups": "42"}, "groups: expected 7,8 besides 5001, is 42"),
        ({"groups": "7"}, "groups: expected 7,8 besides 5001, is 7"),
        ({"groups": "7,8,9"}, "groups: expected 7,8 besides 5001, is 7,8,9"),
        ({}, "groups: expected 7,8 besides 5001, is none"),
        (
            {"groups": "7,8", "bounding": "-all,+net_admin"},
            "capabilities: expected a bounding set within 2000, is 1000",
        ),
        (
            {"groups": "7,8", "bounding": "-all,+net_raw", "inheritable": "-all,+net_raw"},
            "capabilities: expected none, is effective 0, permitted 0, inheritable 2000, ambient 0",
        ),
        (
            {
                "groups": "7,8",
                "bounding": "-all,+net_raw",
                "inheritable": "-all,+net_raw",
                "ambient": "+net_raw",
            },
            "capabilities: expected none, is effective 2000, permitted 2000, inheritable 2000, ambient 2000",
        ),
    ],
)
def test_any_other_identity_is_refused_in_words(
    box: Box, mode: str, identity: dict[str, str], message: str
) -> None:
    box.control(groups="7,8", caps="2000")
    done = box.run(mode, "echo", "ran", **identity)
    assert (done.returncode, done.stdout, done.stderr) == (125, "", f"gpujobs-init: {message}\n")


def test_a_long_list_of_groups_is_cut_in_the_message(box: Box) -> None:
    box.control(groups=",".join(map(str, range(1000, 3000))))
    done = box.run("run", "true")
    assert done.returncode == 125
    assert done.stderr.endswith(",... besides 5001, is none\n")
    assert len(done.stderr) < 700


def test_the_bounding_set_may_hold_what_the_control_file_allows(box: Box) -> None:
    box.control(caps="2001")
    done = box.run("run", *CAP_STATUS, bounding="-all,+net_raw")
    assert done.returncode == 0, done.stderr
    assert "CapBnd:\t0000000000002000" in done.stdout
    assert "CapEff:\t0000000000000000" in done.stdout


@pytest.mark.parametrize("mode", ["run", "exec"])
def test_root_with_the_capabilities_becomes_the_expected_identity(box: Box, mode: str) -> None:
    box.control(groups="42,43", caps="2000")
    done = box.as_root(mode, *CAP_STATUS)
    assert done.returncode == 0, done.stderr
    status = dict(line.split(":\t") for line in done.stdout.splitlines())
    assert (status["Uid"], status["Gid"]) == ("\t".join(["5001"] * 4),) * 2
    assert status["Groups"].split() == ["42", "43"]
    assert {status[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}
    assert status["CapBnd"] == "0000000000002000"
    assert status["NoNewPrivs"] == "1"


@pytest.mark.parametrize(
    ("bounding", "message"),
    [
        (
            "-all",
            "uid: expected 5001, is 0",
        ),  # root inside, with nothing: what an Engine that lost User would give
        ("-all,+setuid", "uid: expected 5001, is 0"),
        (
            "-all,+setuid,+setgid",
            "capabilities: expected a bounding set within 0, is c0",
        ),  # cannot drop: no setpcap
    ],
)
def test_root_that_cannot_become_it_wholly_is_refused(box: Box, bounding: str, message: str) -> None:
    done = box.run("exec", "echo", "ran", uid=0, gid=0, bounding=bounding)
    assert (done.returncode, done.stdout) == (125, "")
    assert message in done.stderr


def test_a_setuid_program_gives_nothing(box: Box) -> None:
    program = box.path / "id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    assert (
        subprocess.run(
            ["setpriv", "--reuid=5001", program, "-u"], check=True, capture_output=True, text=True
        ).stdout
        == "0\n"
    )  # it would, without the init
    assert box.run("run", str(program), "-u").stdout == "5001\n"


# --- environment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["run", "exec"])
def test_environment_records_set_and_remove_variables(box: Box, mode: str) -> None:
    box.control(
        b"env=NEW=a=b\nc",
        b"env=GONE",
        b"env=EMPTY=",
        b"env=TWICE=1",
        b"env=TWICE=2",
        b"env=BACK",
        b"env=BACK=again",
        b"env=BYTES=\xff\xfe",
    )
    done = subprocess.run(
        box.command(mode, "env", "-0"),
        check=True,
        capture_output=True,
        timeout=30,
        env={"PATH": PATH, "GONE": "x", "KEPT": "k", "TWICE": "0"},
    )
    assert dict(item.split(b"=", 1) for item in done.stdout.split(b"\0") if item) == {
        b"PATH": PATH.encode(),
        b"KEPT": b"k",
        b"NEW": b"a=b\nc",
        b"EMPTY": b"",
        b"TWICE": b"2",
        b"BACK": b"again",
        b"BYTES": b"\xff\xfe",
    }


def test_the_images_environment_does_not_steer_the_init(box: Box) -> None:
    done = box.run(
        "run",
        "sh",
        "-c",
        "echo fine",
        env={
            "PATH": PATH,
            "LD_PRELOAD": "/nowhere/evil.so",
            "GPUJOBS_INIT_DIR": "/nowhere",
            "GLIBC_TUNABLES": "glibc.malloc.check=3",
            "LD_LIBRARY_PATH": "/nowhere",
        },
    )
    assert done.stdout == "fine\n"


# --- starting the program -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["run", "exec"])
@pytest.mark.parametrize(
    "case",
    [
        "name",
        "empty name",
        "path",
        "not a directory",
        "interpreter",
        "windows",
        "loader",
        "format",
        "headless",
        "mode",
        "directory",
        "closed",
    ],
)
def test_a_program_that_cannot_start_is_told_with_the_shells_exit_code(
    box: Box, mode: str, case: str
) -> None:
    elf = bytearray(Path("/usr/bin/true").read_bytes())
    elf[18:20] = struct.pack(
        "<H", 243 if elf[18:20] != struct.pack("<H", 243) else 62
    )  # e_machine: another one's
    foreign = box.script("foreign", "")
    foreign.write_bytes(elf)
    orphan = box.script("orphan", "")
    orphan.write_bytes(
        re.sub(
            rb"/lib(64)?/ld-linux", lambda found: b"/nix" + found[0][4:], Path("/usr/bin/true").read_bytes()
        )
    )
    closed = box.path / "closed"
    closed.mkdir(0o700)
    program, code, words = {
        "name": ("pyton", 127, "No such file or directory"),
        "empty name": ("", 127, "No such file or directory"),
        "path": ("./pyton", 127, "No such file or directory"),
        "not a directory": ("/etc/passwd/x", 127, "Not a directory"),
        "interpreter": (
            str(box.script("script", "#! /opt/python9 -u\n")),
            127,
            "No such file or directory: its first line asks for /opt/python9, which is not in the image",
        ),
        "windows": (
            str(box.script("dos", "#!/bin/sh\r\necho\r\n")),
            127,
            (
                "No such file or directory: its first "
                'line asks for "/bin/sh" and a carriage return: the file has Windows line ends'
            ),
        ),
        "loader": (
            str(orphan),
            127,
            (
                "No such file or directory: its program loader is not in the image "
                "(built for another C library?)"
            ),
        ),
        "format": (
            str(foreign),
            126,
            "exec format error: built for another architecture, or a script without a first line #!",
        ),
        "headless": (
            str(box.script("plain", "echo hello\n")),
            126,
            "exec format error: built for another architecture, or a script without a first line #!",
        ),
        "mode": (
            str(box.script("unset", "#!/bin/sh\n", 0o644)),
            126,
            "Permission denied: it is not executable for this user (chmod a+rx)",
        ),
        "directory": (str(box.path), 126, "Permission denied: it is a directory"),
        "closed": ("python9", 127, f"No such file or directory ({closed}, of PATH, is closed to this user)"),
    }[case]
    done = box.run(mode, program, env={"PATH": f"{closed}:{PATH}" if case == "closed" else PATH})
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"gpujobs-init: {program}: {words}\n")


def test_a_broken_program_early_in_path_gives_way_to_a_good_one_later(box: Box) -> None:
    for name, text, mode in (
        ("a", "#!/nowhere\n", 0o755),
        ("b", "#!/bin/sh\n", 0o644),
        ("c", "#!/bin/sh\necho c\n", 0o755),
    ):
        (box.path / name).mkdir()
        box.script(f"{name}/tool", text, mode)
    (box.path / "a/half").mkdir()
    path = f"{box.path}/a:{box.path}/b:{box.path}/c:/bin"
    assert box.run("run", "tool", env={"PATH": path}).stdout == "c\n"
    assert box.run("run", "half", env={"PATH": path}).returncode == 126


def test_without_a_path_the_engines_own_is_searched(box: Box) -> None:
    box.control(b"env=PATH")
    assert box.run("run", "sh", "-c", "echo found").stdout == "found\n"


def test_a_path_of_the_users_environment_records_is_searched(box: Box) -> None:
    box.script("mine", "#!/bin/sh\necho mine\n")
    box.control(b"env=PATH=" + bytes(box.path) + b":/bin")
    assert box.run("run", "mine").stdout == "mine\n"


@pytest.mark.parametrize("pid1", [False, True])
@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 0", 0),
        ("exit 3", 3),
        ("exit 255", 255),
        ("kill -KILL $$", 137),
        ("kill -SEGV $$", 139),
        ("kill -TERM $$", 143),
    ],
)
def test_the_programs_end_is_the_exit_code(box: Box, pid1: bool, script: str, code: int) -> None:
    command = box.command("run", "sh", "-c", script)
    if pid1:
        command = [*AS_PID_1, *command]
    assert subprocess.run(command, check=False, timeout=30).returncode == code


_SYS_RT_SIGACTION = {"x86_64": 13, "aarch64": 134}


def ignore_libcs_own_signals() -> None:
    """Ignore signals 32 and 33, which libc's functions refuse to touch: some parents do it by the system call."""
    ignored = (ctypes.c_ulong * 4)(signal.SIG_IGN)
    for number in (32, 33):
        sent = ctypes.CDLL(None).syscall(_SYS_RT_SIGACTION[os.uname().machine], number, ignored, None, 8)
        assert sent == 0


def test_signal_dispositions_and_masks_do_not_reach_the_program(box: Box) -> None:
    command = box.command("run", "cat", "/proc/self/status")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1})
    try:
        done = subprocess.run(
            ["sh", "-c", 'trap "" HUP INT CHLD; exec "$@"', "sh", *command],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
            preexec_fn=ignore_libcs_own_signals,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1})
    assert re.findall(r"Sig(?:Blk|Ign|Cgt):\t(\w+)", done.stdout) == ["0" * 16] * 3


# --- the gate -----------------------------------------------------------------------------------------------


def test_the_program_starts_only_when_the_gate_says_go(box: Box) -> None:
    box.control(nogate=False)
    server = os.open(box.gate, os.O_RDWR)
    with started(box.command("run", "echo", "ran")) as job:
        until(lambda: box.waiting(job), "the init at the gate")
        # Its own user may not trace it, so cannot run code before the release (one check guards both).
        assert (
            subprocess.run(
                [
                    "setpriv",
                    "--reuid=5001",
                    "--regid=5001",
                    "--clear-groups",
                    "readlink",
                    f"/proc/{job.pid}/exe",
                ],
                check=False,
                stdout=subprocess.DEVNULL,
            ).returncode
            == 1
        )
        assert job.poll() is None
        os.write(server, b"g")
        assert job.communicate(timeout=GRACE) == ("ran\n", "")
        assert job.returncode == 0
    os.close(server)


def test_a_word_written_before_the_init_came_counts(box: Box) -> None:
    box.control(nogate=False)
    server = os.open(box.gate, os.O_RDWR)
    os.write(server, b"g")
    assert box.run("run", "echo", "ran").stdout == "ran\n"
    os.close(server)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (b"x", ""),
        (b"?", "gate: expected 'g' or 'x', is byte 63\n"),
        (b"\xff", "gate: expected 'g' or 'x', is byte 255\n"),
    ],
)
def test_abort_and_unknown_words_end_without_running_the_program(box: Box, word: bytes, message: str) -> None:
    box.control(nogate=False)
    server = os.open(box.gate, os.O_RDWR)
    os.write(server, word)
    done = box.run("run", "echo", "ran")
    os.close(server)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.endswith(message)
    assert bool(done.stderr) == bool(message)


def test_when_the_server_dies_the_job_waits_for_the_next_without_polling(box: Box) -> None:
    box.control(nogate=False)
    first = os.open(box.gate, os.O_RDWR)
    with started(box.command("run", "echo", "ran")) as job:
        until(lambda: box.waiting(job), "the init at the gate")

        def activity() -> tuple[str, str]:
            text = Path(f"/proc/{job.pid}/status").read_text()
            found = re.search(r"State:\t(\S).*\nvoluntary_ctxt_switches:\t(\d+)\n", text, re.DOTALL)
            assert found is not None
            return found[1], found[2]

        before = activity()
        os.close(first)
        until(
            lambda: activity()[1] != before[1] and activity()[0] == "S",
            "the init to see the end and sleep again",
        )
        settled = activity()
        time.sleep(0.3)  # a span to look at, not a wait: nothing may happen in it
        assert activity() == settled
        second = os.open(box.gate, os.O_RDWR)
        os.write(second, b"g")
        assert job.communicate(timeout=GRACE) == ("ran\n", "")
    os.close(second)


def test_a_word_of_a_server_that_died_right_after_it_is_not_lost(box: Box) -> None:
    box.control(nogate=False)
    first = os.open(box.gate, os.O_RDWR)
    with started(box.command("run", "echo", "ran")) as job:
        until(lambda: box.waiting(job), "the init at the gate")
        second = os.open(box.gate, os.O_RDWR)
        os.close(first)
        os.write(second, b"g")
        os.close(second)
        assert job.communicate(timeout=GRACE) == ("ran\n", "")


@pytest.mark.parametrize("pid1", [False, True])
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGRTMIN + 3]
)
def test_a_signal_at_the_gate_ends_the_job_at_once(box: Box, pid1: bool, number: int) -> None:
    box.control(nogate=False)
    command = box.command("run", "echo", "ran")
    if pid1:
        command = [*AS_PID_1, *command]
    server = os.open(box.gate, os.O_RDWR)
    with started(command) as job:
        pid = job.pid
        if pid1:
            until(lambda: children(job.pid), "the child of unshare")
            pid = children(job.pid)[0]
        until(lambda: str(box.gate) in links(pid), "the init at the gate")
        os.kill(pid, number)
        assert job.communicate(timeout=GRACE) == ("", "")
        assert job.returncode == 128 + number
    os.close(server)


@pytest.mark.parametrize("kind", ["missing", "regular", "symlink"])
def test_a_gate_that_is_no_fifo_is_refused(box: Box, kind: str) -> None:
    box.control(nogate=False)
    box.gate.unlink()
    if kind == "regular":
        box.gate.write_text("g")
    elif kind == "symlink":
        os.mkfifo(box.path / "other", 0o644)
        box.gate.symlink_to("other")
    done = box.run("run", "echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert str(box.gate) in done.stderr


def test_exec_does_not_wait_at_the_gate(box: Box) -> None:
    box.control(nogate=False)
    assert box.run("exec", "echo", "ran").stdout == "ran\n"


# --- signals, reaping, terminals ----------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Return the direct children of a process, zombies among them."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def links(pid: int) -> list[str]:
    """Return what a process has open."""
    try:
        return [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    except FileNotFoundError:
        return []


def read_line(job: subprocess.Popen[str], expected: str) -> None:
    assert job.stdout is not None
    assert job.stdout.readline() == f"{expected}\n"


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGTERM,
        signal.SIGALRM,
        signal.SIGWINCH,
        signal.SIGCONT,
        signal.SIGABRT,
        signal.SIGRTMIN + 3,
    ],
)
def test_signals_are_passed_on_to_the_program(box: Box, number: int) -> None:
    # Python's shell-free way to trap real-time signals: dash knows no names for them.
    program = (
        "import os, signal, sys\n"
        f"signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])\n"
        "print('ready', flush=True)\n"
        f"print(signal.sigwait([{int(number)}]) + 0)"
    )
    with started(box.command("run", "/usr/bin/python3", "-c", program)) as job:
        read_line(job, "ready")
        job.send_signal(number)
        assert job.communicate(timeout=GRACE) == (f"{int(number)}\n", "")
        assert job.returncode == 0


def test_a_signal_reaches_the_program_and_not_its_helpers(box: Box) -> None:
    """Data loaders must live on while the program's own handler saves a checkpoint."""
    helper = "read end; echo helper lives"
    program = f"{{ {helper}; }} < gate2 & trap 'echo asked to stop; echo > gate2; wait; exit 3' TERM; echo ready; wait"
    os.mkfifo(box.path / "gate2", 0o666)
    (box.path / "gate2").chmod(0o666)
    with started(box.command("run", "sh", "-c", program), cwd=box.path) as job:
        read_line(job, "ready")
        job.send_signal(signal.SIGTERM)
        assert job.communicate(timeout=GRACE) == ("asked to stop\nhelper lives\n", "")
        assert job.returncode == 3


def test_a_program_that_left_its_group_is_still_signalled(box: Box) -> None:
    program = (
        "import os, time; os.setpgid(0, os.getpgid(os.getppid())); print('ready', flush=True); time.sleep(60)"
    )
    with started(box.command("run", "/usr/bin/python3", "-c", program), start_new_session=True) as job:
        read_line(job, "ready")
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=GRACE) == 143


@pytest.mark.parametrize("pid1", [False, True])
def test_orphans_are_reaped(box: Box, pid1: bool) -> None:
    script = 'for i in 1 2 3 4 5 6 7 8; do (sh -c "read x < gate2" &) ; done; echo ready; read end'
    os.mkfifo(box.path / "gate2", 0o644)
    command = box.command("run", "sh", "-c", script)
    if pid1:
        command = [*AS_PID_1, *command]
    with started(command, cwd=box.path) as job:
        read_line(job, "ready")
        pid = children(job.pid)[0] if pid1 else job.pid
        until(lambda: len(children(pid)) == 9, "eight orphans and the program")
        end = os.open(box.path / "gate2", os.O_RDWR)
        os.write(end, b"\n" * 8)  # a line for each: they end
        until(lambda: len(children(pid)) == 1, "the orphans to be reaped")
        os.close(end)
        assert job.communicate("\n", timeout=GRACE) == ("", "")
        assert job.returncode == 0


def test_what_the_program_left_behind_dies_with_pid_1(box: Box) -> None:
    script = "setsid sleep 61.25 > /dev/null 2>&1 & echo ready; read end"
    command = [*AS_PID_1, *box.command("run", "sh", "-c", script)]
    with started(command) as job:
        read_line(job, "ready")

        def sleepers() -> list[str]:
            found = subprocess.run(
                ["pgrep", "-fx", "sleep 61.25"], check=False, capture_output=True, text=True
            )
            return found.stdout.split()

        until(sleepers, "the process in the background")
        job.communicate("\n", timeout=GRACE)
        until(lambda: not sleepers(), "its end")


def test_on_a_terminal_the_program_is_in_the_foreground_and_gets_its_keys(box: Box) -> None:
    master, slave = pty.openpty()
    program = (
        "import os, signal, time\n"
        "assert os.tcgetpgrp(0) == os.getpgrp() == os.getpid() != os.getppid()\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt: raise SystemExit(9)"
    )
    command = ["setsid", "--ctty", "--wait", *box.command("run", "/usr/bin/python3", "-c", program)]
    with started(command, stdin=slave, stdout=slave, stderr=slave) as job:
        os.close(slave)
        seen = b""
        while b"ready" not in seen:
            seen += os.read(master, 1000)
        os.write(master, b"\x03")
        assert job.wait(timeout=GRACE) == 9
    os.close(master)


# --- probe --------------------------------------------------------------------------------------------------


def open_results(devices: list[tuple[int, int]], procs: Path, directory: Path) -> dict[str, str]:
    """Return what open(2) says to a process in that cgroup: the truth that the probe has to match."""
    program = (
        "import errno, os, sys\n"
        "with open(sys.argv[1], 'w') as procs: procs.write('0')\n"
        "for path in sys.argv[2:]:\n"
        "    try: os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY)); word = 'opened'\n"
        "    except OSError as error: word = errno.errorcode[error.errno]\n"
        "    print(os.path.basename(path), word)\n"
    )
    nodes = []
    for major, minor in devices:
        node = directory / f"{major}:{minor}"
        os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(major, minor))
        nodes.append(str(node))
    done = subprocess.run(
        ["/usr/bin/python3", "-c", program, str(procs), *nodes],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return dict(line.split() for line in done.stdout.splitlines())


def deny_all_but(cgroup: Path, major: int, minor: int) -> None:
    """Attach a BPF device program to a v2 cgroup that allows one device alone (linux/bpf.h)."""

    def instruction(code: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
        return struct.pack("<BBhi", code, src << 4 | dst, offset, immediate)

    program = (
        instruction(0x61, 2, 1, 4)
        + instruction(0x61, 3, 1, 8)  # r2 = major, r3 = minor
        + instruction(0xB7, 0)
        + instruction(0x55, 2, 0, 2, major)
        + instruction(0x55, 3, 0, 1, minor)
        + instruction(0xB7, 0, immediate=1)
        + instruction(0x95)
    )  # r0 = both equal
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
    code, licence = ctypes.create_string_buffer(program), ctypes.create_string_buffer(b"MIT")
    load = struct.pack(
        "<IIQQIIQ", 15, len(program) // 8, ctypes.addressof(code), ctypes.addressof(licence), 0, 0, 0
    )
    fd = libc.syscall(number, 5, load + bytes(88), len(load) + 88)  # BPF_PROG_LOAD
    assert fd >= 0, os.strerror(ctypes.get_errno())
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    attach = struct.pack("<IIII", directory, fd, 6, 0)  # BPF_CGROUP_DEVICE
    assert libc.syscall(number, 8, attach + bytes(112), 128) == 0, os.strerror(
        ctypes.get_errno()
    )  # BPF_PROG_ATTACH
    os.close(directory)
    os.close(fd)


V1 = Path("/sys/fs/cgroup/devices")
V2 = next(path for path in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")) if path.exists())
HIERARCHIES = [name for name, there in (("v1", V1.exists()), ("v2", (V2 / "cgroup.procs").exists())) if there]


@pytest.fixture(params=HIERARCHIES)
def device_cgroup(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Yield cgroup.procs of a device cgroup that allows 195:3 and nothing else, not even mknod."""
    cgroup = (V1 if request.param == "v1" else V2) / f"gpujobs-test-{uuid.uuid4().hex[:8]}"
    cgroup.mkdir()
    if request.param == "v1":
        (cgroup / "devices.deny").write_text("a")
        (cgroup / "devices.allow").write_text("c 195:3 rw")
        (cgroup / "devices.allow").write_text("c 195:5 r")  # not enough: read-write is asked for
    else:
        deny_all_but(cgroup, 195, 3)
    yield cgroup / "cgroup.procs"
    until(lambda: not (cgroup / "cgroup.procs").read_text(), "the cgroup to be empty")
    cgroup.rmdir()


def probe(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [init.binary(), "probe", *arguments],
        check=False,
        capture_output=True,  # type: ignore[call-overload,no-any-return]
        text=True,
        timeout=30,
        **options,
    )


def test_the_probe_agrees_with_open_in_a_device_cgroup(device_cgroup: Path, tmp_path: Path) -> None:
    devices = [*((195, minor) for minor in range(8)), (195, 255), (1, 3), (1, 5), (511, 0)]
    truth = open_results(devices, device_cgroup, tmp_path)
    assert truth["195:3"] == "ENXIO"  # allowed, and no driver behind it
    assert set(truth.values()) == {"ENXIO", "EPERM"}
    done = probe("--join", device_cgroup, "195:0-7", "195:255", "1:3", "1:5", "511:0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{device} {'deny' if word == 'EPERM' else 'allow'}" for device, word in truth.items()
    ]


def test_the_probe_does_not_need_a_file_system_with_devices_and_leaves_nothing(device_cgroup: Path) -> None:
    directory = Path(tempfile.mkdtemp(prefix="gpujobs-nodev-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nodev,mode=755", "tmpfs", directory], check=True)
    try:
        done = probe("--dir", directory, "--join", device_cgroup, "195:2-4")
        assert (done.returncode, done.stdout) == (0, "195:2 deny\n195:3 allow\n195:4 deny\n")
        assert list(directory.iterdir()) == []
    finally:
        subprocess.run(["umount", directory], check=True)
        directory.rmdir()


def test_the_probe_without_a_device_cgroup_finds_all_allowed(tmp_path: Path) -> None:
    done = probe("--dir", tmp_path, "195:0-31")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(f"195:{minor} allow\n" for minor in range(32))


def test_the_probe_says_what_it_could_not_try(tmp_path: Path) -> None:
    done = probe("--dir", tmp_path, "--join", tmp_path / "none", "195:0")
    assert (done.returncode, done.stdout) == (1, "195:0 error join: No such file or directory\n")
    assert done.stderr == f"gpujobs-init: probe: {tmp_path}/none: No such file or directory\n"
    done = probe("--dir", tmp_path / "none", "195:0")
    assert (done.returncode, done.stdout) == (125, "")
    assert "cannot make a directory" in done.stderr
    directory = Path(tempfile.mkdtemp(prefix="gpujobs-probe-test-"))
    directory.chmod(0o777)
    command = ["setpriv", "--reuid=5001", "--regid=5001", "--clear-groups"]
    copy = directory / "init"
    shutil.copy(init.binary(), copy)
    done = subprocess.run(
        [*command, copy, "probe", "--dir", directory, "195:0"],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (1, "195:0 error mknod: Operation not permitted\n")
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "195",
        "195:",
        ":1",
        "195:1-",
        "195:3-1",
        "195:1:2",
        "4096:0",
        "195:1048576",
        "-1:0",
        "a:b",
        "195:0-4096",
        "--join",
        "--frob",
    ],
)
def test_a_bad_device_is_refused(text: str) -> None:
    done = probe(text)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("gpujobs-init: probe: ")


def test_a_probe_in_a_frozen_cgroup_can_be_ended_and_leaves_nothing(tmp_path: Path) -> None:
    if (V1.parent / "freezer").exists():
        cgroup, frozen, thawed = V1.parent / "freezer/gpujobs-test-frozen", "FROZEN", "THAWED"
        switch = cgroup / "freezer.state"
    else:
        cgroup, frozen, thawed = V2 / "gpujobs-test-frozen", "1", "0"
        switch = cgroup / "cgroup.freeze"
    cgroup.mkdir()
    switch.write_text(frozen)
    try:
        with started(
            [
                str(init.binary()),
                "probe",
                "--dir",
                str(tmp_path),
                "--join",
                str(cgroup / "cgroup.procs"),
                "195:0",
            ]
        ) as job:
            until((cgroup / "cgroup.procs").read_text, "the probe to be frozen")
            job.send_signal(signal.SIGTERM)
            assert job.wait(timeout=GRACE) == 143
            assert list(tmp_path.iterdir()) == []
    finally:
        switch.write_text(thawed)
        until(lambda: not (cgroup / "cgroup.procs").read_text(), "the killed child to go")
        cgroup.rmdir()


def test_a_missing_binary_is_told_with_the_way_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(
        FileNotFoundError, match=r"is not built: install the packages gcc and libc6-dev, then run"
    ):
        init.binary()


# --- real containers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docker() -> lab.Engine:
    return lab.ensure()


@pytest.fixture(scope="module")
def image(docker: lab.Engine) -> Iterator[str]:
    """An image of busybox whose /etc/group hands 5001 and 43 the group of the host's shadow file."""
    name = f"gpujobs-init-test:{uuid.uuid4().hex[:8]}"
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(os.path.realpath("/bin/busybox"), "bin/busybox")
        for applet in ("sh", "id", "grep", "sleep", "cat", "echo"):
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        for path, text in (
            ("etc/passwd", b"root:x:0:0::/:/bin/sh\n"),
            ("etc/group", b"5001:x:42:\n43:x:44:\n"),
        ):
            entry = tarfile.TarInfo(path)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    subprocess.run(
        ["docker", "import", "-", name],
        check=True,
        input=archive.getvalue(),
        capture_output=True,
        env=docker.environment(),
        timeout=60,
    )
    yield name
    docker.docker("rmi", "-f", name)


class Container:
    """Arguments of a container as the server makes one, and its removal."""

    def __init__(self, docker: lab.Engine, image: str, box: Box) -> None:
        self.docker, self.image, self.box = docker, image, box
        self.name = f"gpujobs-init-test-{uuid.uuid4().hex[:8]}"

    def command(self, *program: str, user: str = "5001:5001", options: tuple[str, ...] = ()) -> list[str]:
        return [
            "docker",
            "run",
            "--name",
            self.name,
            "--user",
            user,
            "--cap-drop",
            "ALL",
            "--security-opt",
            "no-new-privileges",
            "--network",
            "none",
            "-v",
            f"{self.box.path}:/.gpujobs:ro",
            "--entrypoint",
            "/.gpujobs/init",
            *options,
            self.image,
            "run",
            *program,
        ]

    def run(
        self, *program: str, user: str = "5001:5001", options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*program, user=user, options=options),
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env=self.docker.environment(),
        )

    def exec(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["docker", "exec", *command],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env=self.docker.environment(),
        )

    def pid(self) -> int:
        return int(self.docker.docker("inspect", "-f", "{{.State.Pid}}", self.name))


@pytest.fixture
def container(docker: lab.Engine, image: str, box: Box) -> Iterator[Container]:
    it = Container(docker, image, box)
    yield it
    subprocess.run(
        ["docker", "rm", "-f", it.name], check=False, capture_output=True, env=docker.environment()
    )


def test_an_images_group_file_that_remaps_the_primary_group_is_caught(container: Container) -> None:
    done = container.run("id")
    assert (done.returncode, done.stdout) == (125, "")
    # Engine 20.10 adds 42 to the groups; others change the gid itself.
    assert re.match(
        r"gpujobs-init: (groups: expected none besides 5001|gid: expected 5001), is 42\b", done.stderr
    )


def test_an_images_group_file_that_remaps_a_further_group_is_caught(container: Container) -> None:
    container.box.control(uid=5002, gid=5002, groups="43")
    done = container.run("id", user="5002:5002", options=("--group-add", "43"))
    assert (done.returncode, done.stdout) == (125, "")
    assert "gpujobs-init: groups: expected 43 besides 5002, is 44" in done.stderr


def test_a_container_runs_as_the_expected_identity_behind_the_gate(container: Container) -> None:
    box = container.box
    box.control(b"env=GREETING=hello", uid=5002, gid=5002, groups="50,51", nogate=False)
    server = os.open(box.gate, os.O_RDWR)
    options = ("--group-add", "50", "--group-add", "51", "--device", "/dev/nvidia1", "--read-only")
    command = container.command(
        "sh",
        "-c",
        "id -u; id -G; echo $GREETING; trap 'exit 6' TERM; echo ready; "
        "while :; do sleep 60 > /dev/null 2>&1 & wait $!; done",
        user="5002:5002",
        options=options,
    )
    with started(command, env=container.docker.environment()) as job:
        until(
            lambda: f"{container.name}\n" in container.docker.docker("ps", "--format", "{{.Names}}"),
            "its start",
        )
        until(lambda: "/.gpujobs/gate" in links(container.pid()), "the init at the gate")

        # Before the release: what the container's device cgroup allows, asked from the host.
        lines = Path(f"/proc/{container.pid()}/cgroup").read_text().splitlines()
        paths = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in lines}
        cgroup = Path(f"{V1}{paths['devices']}") if "devices" in paths else Path(f"{V2}{paths['']}")
        asked = probe("--join", cgroup / "cgroup.procs", "195:0-2", "1:3")
        assert (asked.returncode, asked.stdout) == (0, "195:0 deny\n195:1 allow\n195:2 deny\n1:3 allow\n")

        os.write(server, b"g")
        read_line(job, "5002")
        assert job.stdout is not None
        assert set(job.stdout.readline().split()) == {"5002", "50", "51"}
        read_line(job, "hello")
        read_line(job, "ready")

        done = container.exec(
            container.name, "/.gpujobs/init", "exec", "sh", "-c", "id -u; id -g; echo $GREETING"
        )
        assert (done.returncode, done.stdout) == (0, "5002\n5002\nhello\n"), done.stderr
        done = container.exec("--user", "0:0", container.name, "/.gpujobs/init", "exec", "id")
        assert (done.returncode, done.stdout) == (125, "")  # root without capabilities cannot become the user
        # The inside finds what the host was told: the device that may be opened has no driver.
        opened = container.exec(container.name, "/.gpujobs/init", "exec", "sh", "-c", "exec 3<>/dev/nvidia1")
        assert "No such device or address" in opened.stderr

        container.docker.docker("stop", "-t", "30", container.name)
        assert job.wait(timeout=GRACE) == 6
    os.close(server)


def test_a_container_started_as_root_becomes_the_expected_identity(container: Container) -> None:
    container.box.control(uid=5002, gid=5002, groups="50")
    options = [f"--cap-add={capability}" for capability in ("SETUID", "SETGID", "SETPCAP")]
    done = container.run(*CAP_STATUS, user="0:0", options=tuple(options))
    assert done.returncode == 0, done.stderr
    assert "Uid:\t5002\t5002\t5002\t5002\nGid:\t5002\t5002\t5002\t5002\nGroups:\t50 \n" in done.stdout
    assert "CapEff:\t0000000000000000\nCapBnd:\t0000000000000000\n" in done.stdout


def test_the_probe_inside_a_container_with_mknod_answers_too(container: Container) -> None:
    command = container.command(
        "195:0-2", user="0:0", options=("--cap-add", "MKNOD", "--device", "/dev/nvidia1")
    )
    command[command.index("run", 2)] = "probe"
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, env=container.docker.environment()
    )
    assert (done.returncode, done.stdout) == (0, "195:0 deny\n195:1 allow\n195:2 deny\n"), done.stderr


def test_docker_stop_ends_a_container_at_the_gate_at_once(container: Container) -> None:
    container.box.control(uid=5002, gid=5002, nogate=False)
    server = os.open(container.box.gate, os.O_RDWR)
    container.docker.docker(*container.command("echo", "ran", user="5002:5002", options=("--detach",))[1:])
    before = time.monotonic()
    container.docker.docker("stop", "-t", "30", container.name)
    assert time.monotonic() - before < 20
    assert container.docker.docker("inspect", "-f", "{{.State.ExitCode}}", container.name) == "143\n"
    os.close(server)


def test_a_container_with_a_terminal_has_its_program_in_the_foreground(container: Container) -> None:
    container.box.control(uid=5002, gid=5002)
    # Field 5 of /proc/PID/stat is the process group, 8 the terminal's foreground group (proc(5)).
    done = container.run("cat", "/proc/self/stat", user="5002:5002", options=("--tty",))
    fields = done.stdout.rpartition(")")[2].split()
    assert fields[2] == fields[5] != "1"
    assert done.returncode == 0
