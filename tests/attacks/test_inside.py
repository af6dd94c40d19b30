"""What a program inside a job may do: nothing that its owner could not do in a shell, and nothing of root's.

One probe tries everything twice: in a container as Docker gives it to whoever asks for all, where each attempt must
succeed, and in a job.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.attacks.tools import Evil, output, submitted, undefended
from tests.e2e.harness import Place, Server
from tests.lab.accounts import Account
from tests.lab.engine import Engine

# What --privileged would give, as far as an Engine inside a sandbox has it to give.
RIGHTS = ("SYS_ADMIN", "SYS_NICE", "SYS_RAWIO", "SYS_PTRACE", "DAC_READ_SEARCH", "SYSLOG")
EVERYTHING = (
    *(f"--cap-add={name}" for name in RIGHTS),
    *(f"--security-opt={name}=unconfined" for name in ("seccomp", "apparmor", "systempaths")),
    "--device-cgroup-rule=c *:* rwm", "--device=/dev/kmsg", "--pid=host", "--volume=/sys/fs/cgroup:/sys/fs/cgroup",
)  # fmt: skip

DENIED = {"EPERM", "EACCES"}
READ_ONLY = {"EROFS", "EACCES", "EPERM"}

ATTEMPTS: Mapping[str, set[str]] = {
    # a volume gives what a shell would give
    "read_roots_file": DENIED, "write_roots_directory": DENIED, "chown_to_root": DENIED,
    "open_by_handle": DENIED, "write_read_only_volume": READ_ONLY, "write_read_only_submount": READ_ONLY,
    "remount_read_only_volume": DENIED,
    # no way to another identity
    "setuid_root": DENIED, "setgid_shadow": DENIED, "setgroups_shadow": DENIED, "setuid_in_volume": DENIED,
    "setuid_in_image": DENIED, "edit_group_file": READ_ONLY, "write_control_directory": READ_ONLY,
    # no devices
    "mknod_gpu": DENIED, "open_node_in_volume": DENIED, "open_node_of_image": DENIED,
    "read_kmsg": {"ENOENT", *DENIED},
    # no other kernel than the job's corner of it
    "mount_tmpfs": DENIED, "umount_hosts_file": DENIED, "unshare_user": DENIED, "unshare_mounts": DENIED,
    "chroot_away": DENIED, "set_hostname": DENIED, "write_proc_sys": READ_ONLY, "write_proc_irq": READ_ONLY,
    "read_kernel_keys": {"ENODATA"},
    "write_cgroup": {"ENOENT", *READ_ONLY}, "raise_priority": DENIED, "core_files": DENIED,
    "keyring": DENIED,
    "bpf_map": DENIED, "fault_fd": {"ENOSYS", *DENIED}, "raw_socket": DENIED, "packet_socket": DENIED,
    "host_process": {"ENOENT", "ESRCH"},
}  # fmt: skip


@pytest.fixture(scope="module")
def stage(ground: Place, alice: Account) -> Iterator[dict[str, Path]]:
    """The directories that the probe finds: alice's, root's, and one with another file system mounted in it."""
    made = {name: ground.path / f"stage-{name}" for name in "ver"}
    for directory in made.values():
        directory.mkdir(mode=0o755)
    os.chown(made["v"], alice.uid, alice.gid)
    for name in ("mine", "suid"):
        shutil.copy(ground.path / "probe", made["v"] / name)
    os.chown(made["v"] / "mine", alice.uid, alice.gid)
    (made["v"] / "suid").chmod(0o4755)
    os.mknod(made["v"] / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    (made["v"] / "zero").chmod(0o666)
    (made["e"] / "secret").write_text("root's secret\n")
    (made["e"] / "secret").chmod(0o600)
    os.chown(made["r"], alice.uid, alice.gid)
    below = made["r"] / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"uid={alice.uid},mode=0755", "attack", below], check=True)
    yield made
    subprocess.run(["umount", below], check=True)


@pytest.fixture(scope="module")
def image(evil: Callable[..., str]) -> str:
    return evil("probe", Evil(probe=True))


@pytest.fixture(scope="module")
def host_process(server: Server) -> dict[str, str]:
    """A process of the host that a job must not see: the server."""
    return {"HOST_PID": str(server.pid), "HOST_COMM": Path(f"/proc/{server.pid}/comm").read_text().strip()}


def results(text: str) -> dict[str, str]:
    return dict(line.split() for line in text.splitlines())


@pytest.fixture(scope="module")
def by_root(
    lab: Engine, ground: Place, stage: dict[str, Path], image: str, host_process: dict[str, str]
) -> dict[str, str]:
    """The probe in a container that has every right, its volumes bound as they are."""
    control = ground.path / "control"
    control.mkdir()
    (control / "job").write_text("")
    shown = [part for name, path in stage.items() for part in ("--volume", f"{path}:/{name}")]
    given = [part for name, value in host_process.items() for part in ("--env", f"{name}={value}")]
    done = undefended(
        lab, *EVERYTHING, "--volume", f"{ground.path}:/s", "--volume", f"{control}:/.gpujobs", *shown, *given,
        image=image, command=("/s/probe",),
    )  # fmt: skip
    assert done.code == 0, done
    for planted in ("e/planted", "r/planted", "r/below/planted", "v/made-gpu"):
        top, _, name = planted.partition("/")
        (stage[top] / name).unlink(missing_ok=True)
    os.chown(stage["v"] / "mine", stage["v"].stat().st_uid, -1)
    return results(done.out.decode())


@pytest.fixture(scope="module")
def by_a_job(
    by_root: dict[str, str], server: Server, ground: Place, stage: dict[str, Path], image: str, alice: Account,
    host_process: dict[str, str],
) -> dict[str, str]:
    """The same probe in a job of alice's with the same volumes."""
    volumes = [f"{stage['v']}:/v", f"{stage['e']}:/e", f"{stage['r']}:/r:ro", f"{ground.path}:/s:ro"]
    row = submitted(
        server, alice, image=image, gpus=1, command=["/s/probe"], volumes=volumes, environment=host_process
    )
    assert row["state"] == "succeeded", row
    return results(output(server, row))


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_what_root_may_do_in_a_container_fails_in_a_job(
    by_root: dict[str, str], by_a_job: dict[str, str], attempt: str
) -> None:
    assert by_root[attempt] == "done"
    assert by_a_job[attempt] in ATTEMPTS[attempt]


def test_nothing_that_the_probe_tried_is_left_untested(by_root: dict[str, str]) -> None:
    assert {*ATTEMPTS, "ask_the_server"} == set(by_root)


def test_a_job_that_mounts_the_servers_socket_is_told_that_it_is_not_for_containers(
    by_a_job: dict[str, str], server: Server, alice: Account
) -> None:
    """The same account from outside of a container is answered: only the PID namespace is what differs."""
    assert server.cli("ps", user=alice).code == 0
    assert by_a_job["ask_the_server"] == "EACCES"


def test_root_of_a_container_that_has_the_servers_socket_is_not_root_for_the_server(
    by_root: dict[str, str], lab: Engine, ground: Place
) -> None:
    """The kernel names it uid 0 (a container with the host's PID namespace is answered): only the namespace differs."""
    assert by_root["ask_the_server"] == "done"
    done = undefended(lab, "--volume", f"{ground.path}:/s", command=("/s/probe", "ask_the_server"))
    assert results(done.out.decode()) == {"ask_the_server": "EACCES"}


def test_what_a_job_left_in_root_and_read_only_directories_is_nothing(
    by_a_job: dict[str, str], stage: dict[str, Path]
) -> None:
    assert sorted(path.name for path in stage["e"].iterdir()) == ["secret"]
    assert sorted(path.name for path in stage["r"].rglob("*")) == ["below"]
