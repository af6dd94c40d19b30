"""The system installation, made below a directory of the test's own: what it makes, who can use it, what it leaves."""

from __future__ import annotations

import grp
import os
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gpujobs.core.errors import Refused, Unavailable
from gpujobs.service import setup
from gpujobs.service.setup import CONFIGS, UNITS, Layout, install, uninstall, unit
from tests.e2e.harness import BUSYBOX, ROOT, Done, Place, run, spec, wait_for
from tests.integration.managed import Server
from tests.lab import accounts, engine, images
from tests.lab.accounts import Account

GROUP = "gjsetuptest"


@dataclass
class Made:
    """An installation and what was said of it."""

    layout: Layout
    said: list[str] = field(default_factory=list)

    def install(self, **options: bool) -> list[str]:
        self.said = []
        install(self.said.append, layout=self.layout, **options)
        return self.said

    def uninstall(self, **options: bool) -> list[str]:
        self.said = []
        uninstall(self.said.append, layout=self.layout, **options)
        return self.said


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below a directory with its inode, mode and time of change."""
    return {
        str(path.relative_to(root)): (path.lstat().st_ino, path.lstat().st_mode, path.lstat().st_mtime_ns)
        for path in root.rglob("*")
    }


@pytest.fixture(scope="module")
def alice() -> Account:
    return accounts.ensure()[0]


@pytest.fixture(scope="module")
def installed() -> Iterator[Made]:
    """One installation that the tests of this module look at and do not change."""
    place = Place()
    made = Made(Layout(root=place.path, group="", booted=False))
    umask = os.umask(0o077)
    try:
        made.install()
        yield made
    finally:
        os.umask(umask)
        place.remove()


@pytest.fixture
def made() -> Iterator[Made]:
    """Where a test may install."""
    place = Place()
    yield Made(Layout(root=place.path, group="", booted=False))
    place.remove()


@pytest.fixture
def small(made: Made, monkeypatch: pytest.MonkeyPatch) -> Made:
    """As ``made``, of the package alone, which cannot run: for tests of everything around it."""
    inits = {"gpujobs/__init__.py": setup.PACKAGE / "__init__.py"}
    monkeypatch.setattr(setup, "_package_files", lambda: iter(inits.items()))
    monkeypatch.setattr(setup, "_TRIAL", "import gpujobs")
    return made


LOADED_FROM = """
import sys, gpujobs.service.wiring, pydantic, yaml, docker
print(*sys.path, *{m.__file__ for m in sys.modules.values() if getattr(m, "__file__", None)}, sep="\\n")
"""


def as_account(account: Account, layout: Layout, *args: str, **environ: str) -> Done:
    return run([str(layout.command), *args], environ, user=account)


# -- the program ---------------------------------------------------------------------------------------------------


def test_another_account_runs_the_command_from_its_shell(installed: Made, alice: Account) -> None:
    path = f"PATH={installed.layout.command.parent}:/usr/bin:/bin"
    done = run(["env", path, "sh", "-c", "cd && gpujobs --version && gpujobs check t.yaml -"], {}, user=alice)
    assert done.out.startswith(b"gpujobs ")
    assert as_account(alice, installed.layout, "ps", GPUJOBS_HOST="unix:///nowhere.sock").code == 4
    assert as_account(alice, installed.layout, "schema").code == 0


def test_all_of_it_is_roots_and_for_everybody_to_read_whatever_roots_umask(installed: Made) -> None:
    top = installed.layout.root
    for path in [top / "opt", top / "usr", top / "etc", *top.rglob("*")]:
        found = path.lstat()
        assert (found.st_uid, found.st_gid) == (0, 0), path
        if path.is_symlink() or path.is_relative_to(installed.layout.state):
            continue
        assert not found.st_mode & 0o022, path
        wanted = 0o555 if path.is_dir() else 0o444
        assert found.st_mode & wanted == wanted, path
    assert stat.S_IMODE(installed.layout.state.stat().st_mode) == 0o700


def test_nothing_of_the_checkout_or_of_the_callers_environment_is_in_it(
    installed: Made, alice: Account, tmp_path: Path
) -> None:
    evil = installed.layout.root / "evil"
    (evil / "gpujobs").mkdir(parents=True)
    (evil / "gpujobs" / "__init__.py").write_text("raise SystemExit(99)\n")
    for directory in (evil, evil / "gpujobs"):
        directory.chmod(0o755)
    done = as_account(alice, installed.layout, "--version", PYTHONPATH=str(evil), PYTHONSTARTUP=str(evil))
    shutil.rmtree(evil)
    assert done.code == 0
    python = installed.layout.prefix / "bin/python3"
    seen = run([str(python), "-I", "-c", LOADED_FROM], {}).out.decode().splitlines()
    assert seen
    assert all(path.startswith((str(installed.layout.prefix), "/usr/lib/python3")) for path in seen), seen
    files = [path for path in installed.layout.prefix.rglob("*") if path.is_file() and not path.is_symlink()]
    assert not [path for path in files if str(ROOT).encode() in path.read_bytes()]


def test_a_server_of_the_installation_runs_another_accounts_job(installed: Made, alice: Account) -> None:
    lab = engine.ensure()
    images.ensure(lab, BUSYBOX)
    place = Place()
    server = Server(place.path, {"DOCKER_HOST": lab.host}, installed.layout.command)
    server.spawn()
    try:
        server.listens()
        done = run([str(installed.layout.command), "run", "--run-as", alice.name, "-"],
                   {"GPUJOBS_HOST": f"unix://{server.own}"}, stdin=spec(script="id -u; exit 3"))  # fmt: skip
        assert (done.code, done.out) == (3, f"{alice.uid}\n".encode()), done
    finally:
        server.clean(lab)
        place.remove()


def test_who_is_not_root_is_refused_in_words(installed: Made, alice: Account) -> None:
    for option in ("--system", "--uninstall"):
        done = as_account(alice, installed.layout, "setup", option, "--dry-run")
        assert done.code == 3
        assert f"setup {option} is for root" in done.words
        assert f"sudo gpujobs setup {option}" in done.words


@pytest.mark.parametrize("args", [(), ("--system", "--uninstall"), ("--system", "--purge")])
def test_what_is_not_said_is_asked_for(installed: Made, args: tuple[str, ...]) -> None:
    assert run([str(installed.layout.command), "setup", *args], {}).code == 2


def test_a_second_run_changes_nothing_and_says_so(installed: Made) -> None:
    before = snapshot(installed.layout.root)
    assert all(line.startswith(("kept ", "systemd does not run here")) for line in installed.install())
    assert snapshot(installed.layout.root) == before


# -- the units -----------------------------------------------------------------------------------------------------


def test_what_is_installed_on_a_machine_is_what_configs_holds() -> None:
    assert CONFIGS.resolve() == ROOT / "configs"
    for name in UNITS:
        assert unit(name, Layout()) == (ROOT / "configs/systemd" / name).read_bytes()
    assert {path.name for path in (ROOT / "configs/systemd").iterdir()} == set(UNITS)


def test_the_installed_files_are_those_of_configs_with_the_paths_of_the_place(installed: Made) -> None:
    layout = installed.layout
    assert layout.settings.read_bytes() == (ROOT / "configs/server.yaml").read_bytes()
    service, socket_unit = ((layout.units / name).read_text() for name in ("gpujobs.service", "gpujobs.socket"))
    assert f"\nExecStart={layout.prefix}/bin/gpujobs serve\n" in service
    assert f"\nListenStream={layout.root}/run/gpujobs/gpujobs.sock\n" in socket_unit
    for name, text in (("gpujobs.service", service), ("gpujobs.socket", socket_unit)):
        assert text.replace(f"={layout.root}/", "=/") == (ROOT / "configs/systemd" / name).read_text()


def test_systemd_understands_every_line_of_them(installed: Made) -> None:
    names = [str(installed.layout.units / name) for name in UNITS]
    done = subprocess.run(["systemd-analyze", "verify", *names], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_would_tell_a_line_that_it_does_not_understand(installed: Made, tmp_path: Path) -> None:
    wrong = tmp_path / "gpujobs.service"
    text = (installed.layout.units / "gpujobs.service").read_text()
    wrong.write_text(text.replace("WatchdogSec=60", "WatchdogSek=60"))
    done = subprocess.run(["systemd-analyze", "verify", wrong], capture_output=True, text=True, check=False)
    assert "WatchdogSek" in done.stderr


def lines_of(name: str) -> dict[str, str]:
    text = (ROOT / "configs/systemd" / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in text if "=" in line and not line.startswith("#"))


HIDING = (
    "BindPaths", "BindReadOnlyPaths", "DynamicUser", "ExecPaths", "ExtensionDirectories", "ExtensionImages",
    "InaccessiblePaths", "LogNamespace", "MountAPIVFS", "MountFlags", "MountImages", "NoExecPaths", "PrivateDevices",
    "PrivateIPC", "PrivateMounts", "PrivateNetwork", "PrivateTmp", "PrivateUsers", "ProcSubset", "ProtectControlGroups",
    "ProtectHome", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables",
    "ProtectProc", "ProtectSystem", "ReadOnlyPaths", "ReadWritePaths", "RestrictNamespaces", "RootDirectory",
    "RootHash", "RootImage", "TemporaryFileSystem", "DeviceAllow", "DevicePolicy",
)  # fmt: skip
"""What gives a service a mount namespace or other devices of its own: systemd.exec(5), systemd.resource-control(5)."""


def test_no_option_of_the_unit_hides_mounts_or_devices_from_the_server_or_its_mounts_from_the_engine() -> None:
    assert not set(lines_of("gpujobs.service")) & set(HIDING)


def test_the_unit_says_what_the_server_counts_on() -> None:
    service, listener = lines_of("gpujobs.service"), lines_of("gpujobs.socket")
    assert service["Type"] == "notify"
    assert int(service["WatchdogSec"]) >= 30
    assert service["RuntimeDirectoryPreserve"] == "yes", "the pins of running containers are below it"
    assert (service["StateDirectory"], service["StateDirectoryMode"]) == ("gpujobs", "0700")
    assert service["RestartPreventExitStatus"].split() == ["2", "3"]
    assert "Requires=docker" not in (ROOT / "configs/systemd/gpujobs.service").read_text()
    assert (listener["SocketUser"], listener["SocketGroup"], listener["SocketMode"]) == ("root", "gpujobs", "0660")


# -- installing, step by step --------------------------------------------------------------------------------------


def test_a_dry_run_tells_every_step_and_makes_nothing(made: Made) -> None:
    said = made.install(dry_run=True)
    assert not list(made.layout.root.iterdir())
    would = [line for line in said if line.startswith("would ")]
    for path in (made.layout.prefix, made.layout.command, made.layout.settings, made.layout.state,
                 *(made.layout.units / name for name in UNITS)):  # fmt: skip
        assert any(str(path) in line for line in would), path


def test_settings_that_are_there_stay_and_a_unit_that_was_edited_is_written_anew(small: Made) -> None:
    small.install()
    small.layout.settings.write_text("keep_ended: 1h\n")
    (small.layout.units / UNITS[0]).write_text("[Socket]\n")
    said = small.install()
    assert small.layout.settings.read_text() == "keep_ended: 1h\n"
    assert f"wrote {small.layout.units / UNITS[0]}" in said
    assert (small.layout.units / UNITS[0]).read_bytes() == unit(UNITS[0], small.layout)


def test_another_version_replaces_the_program_as_a_whole(small: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    small.install()
    packages = small.layout.prefix / "lib/python3.11/site-packages/gpujobs"
    (packages / "of_the_old_version.py").write_text("")
    monkeypatch.setattr(setup, "__version__", "9.9.9")
    said = small.install()
    assert any(line.startswith(f"made {small.layout.prefix}: gpujobs 9.9.9") for line in said)
    assert [path.name for path in packages.glob("*.py")] == ["__init__.py"]
    assert [path.name for path in small.layout.prefix.parent.iterdir()] == ["gpujobs"]


def test_a_version_that_does_not_run_is_not_put_in_the_place_of_one_that_does(
    small: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.install()
    before = snapshot(small.layout.prefix)
    monkeypatch.setattr(setup, "__version__", "9.9.9")
    monkeypatch.setattr(setup, "_TRIAL", "import gpujobs.no_such_module")
    with pytest.raises(Unavailable, match=r"No module named 'gpujobs\.no_such_module'"):
        small.install()
    assert snapshot(small.layout.prefix) == before
    assert [path.name for path in small.layout.prefix.parent.iterdir()] == ["gpujobs"]


def test_another_python_than_the_distributions_is_refused_before_anything_is_made(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = made.layout.root / "python3"
    other.write_text("#!/bin/sh\necho cpython-399-x86_64-linux-gnu\n")
    other.chmod(0o755)
    monkeypatch.setattr(setup, "PYTHON", other)
    with pytest.raises(Refused, match="runs on another Python") as caught:
        made.install()
    assert "make install PYTHON=" in caught.value.hint
    monkeypatch.setattr(setup, "PYTHON", made.layout.root / "none")
    with pytest.raises(Refused, match="does not run"):
        made.install()
    assert [path.name for path in made.layout.root.iterdir()] == ["python3"]


@pytest.mark.parametrize("which", ["prefix", "command"])
def test_what_somebody_else_put_there_is_not_replaced(small: Made, which: str) -> None:
    path: Path = getattr(small.layout, which)
    path.parent.mkdir(parents=True)
    path.mkdir() if which == "prefix" else path.write_text("#!/bin/sh\n")
    with pytest.raises(Refused, match=f"{path} is there, and setup did not make it"):
        small.install()
    small.uninstall()
    assert path.exists()


@pytest.fixture
def no_group() -> Iterator[str]:
    def there() -> bool:
        return GROUP in {entry.gr_name for entry in grp.getgrall()}

    assert not there()
    yield GROUP
    if there():
        subprocess.run(["groupdel", GROUP], check=True)


def test_the_group_is_made_and_only_a_purge_of_what_setup_made_removes_it(small: Made, no_group: str) -> None:
    small = Made(Layout(root=small.layout.root, group=no_group, booted=False))
    assert any(line.startswith(f"made the group {no_group}") for line in small.install())
    assert grp.getgrnam(no_group)
    assert f"kept the group {no_group}" in small.install()
    small.uninstall()
    assert grp.getgrnam(no_group)
    assert f"removed the group {no_group}" in small.uninstall(purge=True)
    with pytest.raises(KeyError):
        grp.getgrnam(no_group)
    subprocess.run(["groupadd", "--system", no_group], check=True)
    small.install()
    assert f"kept the group {no_group}: setup did not make it" in small.uninstall(purge=True)
    assert grp.getgrnam(no_group)


# -- systemd -------------------------------------------------------------------------------------------------------


@pytest.fixture
def booted(small: Made) -> Callable[[], list[str]]:
    """A machine on which systemd runs, as far as setup can tell; what it was asked."""
    script, log = small.layout.root / "systemctl", small.layout.root / "asked"
    script.write_text(f'#!/bin/sh\necho "$*" >> {log}\n')
    script.chmod(0o755)
    small.layout = Layout(root=small.layout.root, group="", booted=True, systemctl=str(script))
    return lambda: log.read_text().splitlines()


def test_where_systemd_runs_it_is_told_and_asked_to_start_it(small: Made, booted: Callable[[], list[str]]) -> None:
    said = small.install()
    assert booted() == ["daemon-reload", "enable --now gpujobs.socket gpujobs.service"]
    assert "systemctl restart gpujobs" in said[-1]
    small.uninstall()
    assert booted()[2:] == ["disable --now gpujobs.socket gpujobs.service", "daemon-reload"]


def test_what_systemd_says_against_it_is_told(small: Made, booted: Callable[[], list[str]]) -> None:
    Path(small.layout.systemctl).write_text('#!/bin/sh\necho "Job for gpujobs.service failed." >&2\nexit 1\n')
    with pytest.raises(Unavailable, match=r"failed with 1: Job for gpujobs\.service failed\."):
        small.install()


# -- uninstalling --------------------------------------------------------------------------------------------------


def test_uninstalling_leaves_state_and_settings_and_says_so(small: Made) -> None:
    small.install()
    ledger = small.layout.state / "state.sqlite"
    ledger.write_bytes(b"jobs")
    said = small.uninstall()
    left = {str(path.relative_to(small.layout.root)) for path in small.layout.root.rglob("*") if path.is_file()}
    assert left == {"var/lib/gpujobs/state.sqlite", "etc/gpujobs/server.yaml"}
    assert not small.layout.command.is_symlink()
    assert {line.split()[1].rstrip(":") for line in said if line.startswith("kept")} == {
        str(small.layout.state), str(small.layout.settings)
    }  # fmt: skip
    assert all("--purge" in line for line in said if line.startswith("kept"))
    assert [line.split()[0] for line in small.uninstall()] == ["kept", "kept"]


def test_a_purge_leaves_nothing(small: Made) -> None:
    small.install()
    small.uninstall(purge=True, dry_run=True)
    assert small.layout.prefix.exists()
    small.uninstall(purge=True)
    assert [path for path in small.layout.root.rglob("*") if not path.is_dir()] == []
    assert small.uninstall(purge=True) == []


def ledger_with(small: Made, active: int) -> None:
    shutil.copyfile(ROOT / "tests/compat/0002.sqlite", small.layout.state / "state.sqlite")
    with closing(sqlite3.connect(small.layout.state / "state.sqlite")) as connection:
        connection.execute("UPDATE jobs SET active = (number <= ?)", (active,))
        connection.commit()


def test_a_purge_that_would_forget_jobs_is_refused_before_anything_is_removed(small: Made) -> None:
    small.install()
    ledger_with(small, active=1)
    before = snapshot(small.layout.prefix)
    with pytest.raises(Refused, match="1 job has not ended, and --purge would forget it"):
        small.uninstall(purge=True)
    assert snapshot(small.layout.prefix) == before
    ledger_with(small, active=0)
    small.uninstall(purge=True)
    assert not small.layout.state.exists()


def test_a_purge_deletes_nothing_below_a_mount(small: Made) -> None:
    small.install()
    precious = small.layout.root / "precious"
    precious.mkdir()
    (precious / "data").write_text("years of work")
    below = small.layout.state / "pinned"
    below.mkdir()
    subprocess.run(["mount", "--bind", precious, below], check=True)
    try:
        with pytest.raises(Refused, match=f"{below} is a mount; --purge deletes nothing below it"):
            small.uninstall(purge=True)
    finally:
        subprocess.run(["umount", below], check=True)
    assert (precious / "data").read_text() == "years of work"
    assert small.layout.prefix.exists()


def test_a_server_that_runs_is_not_uninstalled_from_under_itself(small: Made) -> None:
    small.install()
    lock = small.layout.state / "lock"
    holder = subprocess.Popen(["flock", "--no-fork", lock, "sleep", "60"])
    try:
        wait_for(lambda: setup.holder(small.layout.state), "it holds the lock")
        with pytest.raises(Refused, match=r"a server \(pid \d+\) uses"):
            small.uninstall()
        assert small.layout.prefix.exists()
    finally:
        holder.terminate()
        holder.wait(timeout=10)
    small.uninstall()
    assert not small.layout.prefix.exists()
