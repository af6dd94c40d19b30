"""The init and a job's secrets: files in memory that are the job's user's alone, variables, and what it refuses."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from gpujobs.core.container import in_memory
from gpujobs.core.job import Owner
from gpujobs.core.secrets import TOTAL_MAX, Secret, handed_over
from tests.integration.test_init import GID, PATH, UID, Box, box, started, until

__all__ = ["box"]

ASKED = b"secrets=1"
OWNER = Owner(uid=UID, gid=GID, groups=(GID,), name="gjlab1", home="/home/gjlab1")
WANDB = Secret(name="wandb", target="wandb", file="/k")
TOKEN = Secret(name="hf", target="hf-token", environment="HF", variable="HF_TOKEN")
OURS = f"mount -t tmpfs -o {in_memory(OWNER, 8 << 20)},noexec t /run/secrets"
NUL = bytes(range(256))
ENVIRONMENT = {"PATH": f"{PATH}:/usr/sbin:/sbin"}


def hand_over(box: Box, content: bytes, *, uid: int = UID, mode: int = 0o400) -> None:
    """As the server does: for the job's user alone."""
    path = box.path / "secrets"
    path.write_bytes(content)
    path.chmod(mode)
    os.chown(path, uid, uid)


def given(box: Box, *values: tuple[Secret, bytes]) -> None:
    box.control(ASKED)
    hand_over(box, handed_over([s for s, _ in values], {s.name: value for s, value in values}))


def within(command: Sequence[str], prepared: str = OURS) -> list[str]:
    """A command in a mount namespace where /run is empty but for what was prepared."""
    script = f'mount -t tmpfs -o mode=0755 t /run && mkdir -p /run/secrets && {prepared} && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *command]


def run(
    box: Box, *program: str, mode: str = "run", prepared: str = OURS, umask: int = 0o022
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        within(box.command(mode, *program), prepared), check=False, capture_output=True, timeout=30,
        env=ENVIRONMENT, stdin=subprocess.DEVNULL, umask=umask,
    )  # fmt: skip


def refused(box: Box, message: str, *, prepared: str = OURS, mode: str = "run") -> None:
    done = run(box, "echo", "ran", prepared=prepared, mode=mode)
    assert (done.returncode, done.stdout) == (125, b""), done
    assert message in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("umask", [0o022, 0o777, 0])
def test_the_program_finds_each_secret_as_a_file_of_its_own(box: Box, umask: int) -> None:
    given(box, (WANDB, NUL), (TOKEN, b"two\nlines\n\n"))
    done = run(box, "sh", "-c", "cd /run/secrets; stat -c '%n %a %u %g %F' . *; cat wandb", umask=umask)
    assert done.returncode == 0, done
    assert done.stdout == (
        b". 700 5001 5001 directory\nhf-token 400 5001 5001 regular file\nwandb 400 5001 5001 regular file\n" + NUL
    )


def test_a_secret_is_its_bytes_and_the_variable_has_no_end_of_line(box: Box) -> None:
    given(box, (TOKEN, b"two\nlines\n\n"))
    done = run(box, "sh", "-c", "cat /run/secrets/hf-token; printf '[%s]' \"$HF_TOKEN\"")
    assert done.stdout == b"two\nlines\n\n[two\nlines]"


def test_a_variable_of_a_secret_wins_over_the_job_files(box: Box) -> None:
    given(box, (TOKEN, b"secret"))
    box.control(ASKED, b"env=HF_TOKEN=environment")
    assert run(box, "printenv", "HF_TOKEN").stdout == b"secret\n"


def test_what_is_executed_beside_the_program_has_the_variables_and_writes_no_file(box: Box) -> None:
    given(box, (TOKEN, b"secret"))
    done = run(box, "sh", "-c", "echo $HF_TOKEN; ls -A /run/secrets", mode="exec")
    assert (done.returncode, done.stdout) == (0, b"secret\n"), done


def test_without_the_record_nothing_is_read(box: Box) -> None:
    box.control()
    hand_over(box, b"broken")
    done = run(box, "sh", "-c", "ls -A /run/secrets; env")
    assert done.returncode == 0, done
    assert b"HF_TOKEN" not in done.stdout


def test_as_many_bytes_as_a_job_may_have_are_handed_over(box: Box) -> None:
    values = [(Secret(name=f"s{n}", target=f"s{n}", file="/k"), bytes([n]) * (TOTAL_MAX // 4)) for n in range(4)]
    given(box, *values)
    done = run(box, "sh", "-c", "cat /run/secrets/* | wc -c")
    assert (done.returncode, done.stdout.strip()) == (0, str(TOTAL_MAX).encode()), done


def test_they_are_there_before_the_gate_opens_and_the_program_is_not(box: Box) -> None:
    given(box, (WANDB, b"secret"))
    box.control(ASKED, nogate=False)
    gate = os.open(box.gate, os.O_RDWR)
    with started(within(box.command("run", "cat", "/run/secrets/wandb")), env=ENVIRONMENT) as process:
        until(lambda: box.waiting(process), "the init waits at the gate")
        (box.path / "secrets").unlink()  # it has them
        os.write(gate, b"g")
        assert process.stdout is not None
        assert process.stdout.read() == "secret"
    os.close(gate)


@pytest.mark.parametrize(
    ("prepared", "message"),
    [
        ("mount -t ramfs t /run/secrets && chown 5001 /run/secrets && chmod 700 /run/secrets", "is not in memory"),
        ("rmdir /run/secrets", "No such file or directory"),
        ("rmdir /run/secrets && mkdir /run/x && ln -s x /run/secrets", "Not a directory"),
        ("rmdir /run/secrets && echo > /run/secrets", "Not a directory"),
        ("mount -t tmpfs -o uid=5002,mode=0700 t /run/secrets && chmod a+rx /run/secrets", "is not the job's alone"),
        ("mount -t tmpfs -o uid=5001,mode=0755 t /run/secrets", "is not the job's alone"),
        ("mount -t tmpfs -o uid=5001,mode=0710 t /run/secrets", "is not the job's alone"),
        (f"{OURS} && echo mine > /run/secrets/wandb", "wandb: File exists"),
        (f"{OURS} && ln -s /tmp/elsewhere /run/secrets/wandb", "wandb: File exists"),
        (f"{OURS} && mount -o remount,ro /run/secrets", "Read-only file system"),
        ("mount -t tmpfs -o uid=5001,mode=0700,size=4k t /run/secrets", "No space left on device"),
    ],
)
def test_a_place_that_is_not_the_jobs_own_memory_is_refused(box: Box, prepared: str, message: str) -> None:
    """What is written into an image's own directory, or into a volume, is kept and shown."""
    given(box, (WANDB, b"x" * 8192))
    refused(box, message, prepared=prepared)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "secrets is cut off"),
        (b"a\0\0005\0value", "secrets is cut off"),
        (b"a\0", "secrets: the last one is cut off"),
        (b"a\0\0", "secrets: the last one is cut off"),
        (b"a\0\0005\0", "the length of a is wrong"),
        (b"a\0\0006\0value\0", "the length of a is wrong"),
        (b"a\0\0004\0value\0", "the length of a is wrong"),
        (b"a\0\0-1\0value\0", "the length of a is wrong"),
        (b"a\0\00099999999999999999999\0value\0", "the length of a is wrong"),
        (b"a\0\0\0value\0", "the length of a is wrong"),
        (b"a\0\0005\0value\0b\0", "secrets: the last one is cut off"),
        (b"../x\0\0005\0value\0", 'secrets: "../x" is no file\'s name'),
        (b"/etc/x\0\0005\0value\0", 'secrets: "/etc/x" is no file\'s name'),
        (b"..\0\0005\0value\0", 'secrets: ".." is no file\'s name'),
        (b"\0\0005\0value\0", 'secrets: "" is no file\'s name'),
        (b"a\0A=B\0005\0value\0", 'secrets: "A=B" is no variable\'s name'),
        (b"a\0\0005\0value\0" * 2, "a: File exists"),
        (b"a\0\0" + b"2000000\0" + b"x" * 2_000_000 + b"\0", "is larger than"),
    ],
)
def test_what_is_no_set_of_secrets_is_refused(box: Box, content: bytes, message: str) -> None:
    box.control(ASKED)
    hand_over(box, content)
    refused(box, message)


@pytest.mark.parametrize("mode", ["run", "exec"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [("missing", "No such file"), ("others", "Permission denied"), ("fifo", "is not a regular file"),
     ("link", "Too many levels"), ("directory", "is not a regular file")],
)  # fmt: skip
def test_a_file_of_secrets_that_is_not_the_servers_is_refused(box: Box, kind: str, message: str, mode: str) -> None:
    box.control(ASKED)
    path = box.path / "secrets"
    if kind == "others":
        hand_over(box, b"a\0\0005\0value\0", uid=5002)
    elif kind == "fifo":
        os.mkfifo(path, 0o644)
    elif kind == "link":
        path.symlink_to(box.path / "job")
    elif kind == "directory":
        path.mkdir()
    refused(box, message, mode=mode)


def test_nothing_of_them_is_in_the_inits_memory_once_the_program_runs(box: Box) -> None:
    """The init outlives the handing over: what it has could be read by whoever may trace it."""
    given(box, (WANDB, b"a-secret-in-memory"))
    box.control(ASKED, b"env=SEEN=what-is-no-secret")
    program = ("sh", "-c", "cat /run/secrets/wandb; echo; read line")
    with started(within(box.command("run", *program)), env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "a-secret-in-memory\n"
        content = memory(process.pid)
    assert b"what-is-no-secret" in content, "its memory was not read"
    assert b"secret-in-memory" not in content


def memory(pid: int) -> bytes:
    """All that a process can write to of its memory."""
    content = b""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as file:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            where, flags, *_ = line.split()
            if flags.startswith("rw"):
                first, last = (int(part, 16) for part in where.split("-"))
                file.seek(first)
                content += file.read(last - first)
    return content
