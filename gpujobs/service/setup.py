"""The system installation: what `gpujobs setup --system` makes, and `gpujobs setup --uninstall` removes.

    /opt/gpujobs                      root's venv of the distribution's Python, with this package and what it needs
    /usr/local/bin/gpujobs            a link to its command
    /usr/local/lib/systemd/system/    gpujobs.service and gpujobs.socket, as they are in configs/systemd
    /etc/gpujobs/server.yaml          the annotated settings; never overwritten
    /var/lib/gpujobs                  the state directory
    the group gpujobs                 its members may use the server

An interpreter below someone's home cannot be run by other accounts: the installation is made of the distribution's
own, and of copies of the very files that run now, so that it needs no network and is what was tested. Every step
looks first whether it is done, so that setup may be run again, and is how a newer version is installed.
"""

from __future__ import annotations

import contextlib
import grp
import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from gpujobs import __version__, init, places
from gpujobs.core.errors import Refused, Unavailable
from gpujobs.service.upkeep import LEDGER, holder

PACKAGE = Path(init.__file__).parents[1]
CONFIGS = PACKAGE / "configs"
UNITS = ("gpujobs.socket", "gpujobs.service")
PYTHON = Path("/usr/bin/python3")
NOBODY = 65534
_MANIFEST = "installed.json"
_RECORD = "setup.json"
_PATIENCE = 300.0

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything goes.

    Attributes:
        root: ``/``; a test installs below another directory.
        group: The group whose members may use the server; a test names its own, or none with "".
        booted: Whether systemd runs this machine (sd_booted(3)).
        systemctl: The command that talks to it.
    """

    root: Path = Path("/")
    group: str = places.GROUP
    booted: bool = field(default_factory=lambda: Path("/run/systemd/system").is_dir())
    systemctl: str = "systemctl"

    def at(self, path: Path | str) -> Path:
        """An absolute path, below the root."""
        return self.root / str(path).lstrip("/")

    @property
    def prefix(self) -> Path:
        """The venv."""
        return self.at("/opt/gpujobs")

    @property
    def command(self) -> Path:
        """The command that everybody's PATH finds."""
        return self.at("/usr/local/bin/gpujobs")

    @property
    def units(self) -> Path:
        """Where software that the administrator installs keeps its units: /etc is for the administrator's own."""
        return self.at("/usr/local/lib/systemd/system")

    @property
    def settings(self) -> Path:
        """The server's settings."""
        return self.at(places.SYSTEM_SETTINGS)

    @property
    def state(self) -> Path:
        """The state directory."""
        return self.at(places.SYSTEM_STATE)


_BASE = {"made": "make", "wrote": "write", "removed": "remove", "told": "tell", "enabled": "enable", "stopped": "stop"}
"""What is done, and what would be."""


class Work:
    """Does steps and tells each, or only tells them.

    Args:
        say: Takes a line for a person.
        dry_run: Do nothing, say what would be done.
    """

    def __init__(self, say: Say, *, dry_run: bool) -> None:
        self._say = say
        self.dry_run = dry_run

    def step(self, verb: str, what: str, action: Callable[[], object]) -> None:
        """One thing that is done: ``made``, ``the group gpujobs``."""
        if self.dry_run:
            self._say(f"would {_BASE[verb]} {what}")
            return
        try:
            action()
        except OSError as error:
            raise Unavailable(f"could not {_BASE[verb]} {what}: {error.strerror}: {error.filename}") from error
        self._say(f"{verb} {what}")

    def kept(self, what: str) -> None:
        """One thing that is as it should be, or stays as it is."""
        self._say(f"kept {what}")

    def run(self, verb: str, what: str, argv: list[str]) -> None:
        """One thing that another program does."""
        self.step(verb, what, lambda: _run(argv))

    def directory(self, path: Path, mode: int) -> None:
        """A directory of root's."""
        if path.is_dir():
            self.kept(str(path))
            return

        def make() -> None:
            path.mkdir(parents=True, mode=mode)
            path.chmod(mode)

        self.step("made", f"{path}, mode {mode:04o}", make)

    def file(self, path: Path, content: bytes) -> None:
        """A file of root's that everybody may read, with this content."""
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes() == content:
                self.kept(str(path))
                return
        self.step("wrote", str(path), lambda: _write(path, content))


def install(say: Say, *, dry_run: bool = False, layout: Layout | None = None) -> None:
    """Make the system installation, or bring one up to date.

    Raises:
        Refused: Not root; or this Python is not the distribution's; or a server that was started by hand runs where
            systemd would start one.
        Unavailable: A step could not be done; those before it are, and setup may be run again.
    """
    layout = layout or Layout()
    _root_only("--system")
    _same_python()
    _nothing_by_hand(layout)
    files = dict(_package_files())
    work = Work(say, dry_run=dry_run)
    umask = os.umask(0o022)  # whatever root's own is, all accounts have to reach what is made
    try:
        work.directory(layout.state, 0o700)
        _make_group(layout, work)
        _make_tree(layout, work, files)
        _make_command(layout, work)
        work.directory(layout.settings.parent, 0o755)
        if layout.settings.exists():
            work.kept(f"{layout.settings}: settings that are there are never overwritten")
        else:
            work.file(layout.settings, (CONFIGS / "server.yaml").read_bytes())
        work.directory(layout.units, 0o755)
        for name in UNITS:
            work.file(layout.units / name, unit(name, layout))
    finally:
        os.umask(umask)
    if not layout.booted:
        say("systemd does not run here: start the server by hand, `gpujobs serve`")
        return
    work.run("told", "systemd of the units", [layout.systemctl, "daemon-reload"])
    work.run("enabled", f"and started {' and '.join(UNITS)}", [layout.systemctl, "enable", "--now", *UNITS])
    say("a server that ran already goes on as it is: `systemctl restart gpujobs` starts what was installed now")


def uninstall(say: Say, *, purge: bool = False, dry_run: bool = False, layout: Layout | None = None) -> None:
    """Remove what :func:`install` made; containers go on.

    Args:
        say: Takes a line for a person.
        purge: State and settings too, and the group where setup made it.
        dry_run: Only say what would be done.
        layout: Where everything is.

    Raises:
        Refused: Not root; a server still runs; or ``purge`` would forget jobs that have not ended.
        Unavailable: A step could not be done.
    """
    layout = layout or Layout()
    _root_only("--uninstall")
    _nothing_by_hand(layout)
    work = Work(say, dry_run=dry_run)
    if purge:
        _nothing_to_lose(layout)
    units = [layout.units / name for name in UNITS if (layout.units / name).exists()]
    if units and layout.booted:
        work.run("stopped", " and ".join(UNITS), [layout.systemctl, "disable", "--now", *UNITS])
    elif (pid := holder(layout.state)) is not None:
        raise Refused(f"a server (pid {pid}) uses {layout.state}", hint="Stop it first; its containers go on.")
    for path in units:
        work.step("removed", str(path), path.unlink)
    if units and layout.booted:
        work.run("told", "systemd of it", [layout.systemctl, "daemon-reload"])
    if layout.command.is_symlink() and layout.command.readlink() == layout.prefix / "bin/gpujobs":
        work.step("removed", str(layout.command), layout.command.unlink)
    if (layout.prefix / _MANIFEST).exists():
        work.step("removed", str(layout.prefix), lambda: shutil.rmtree(layout.prefix))
    if not purge:
        for path, why in (
            (layout.state, "the ledger and the logs"),
            (layout.settings, "while it is there, commands wait for the machine's server and start none of their own"),
        ):
            if path.exists():
                work.kept(f"{path}: {why}; `--purge` removes it")
        return
    _purge(layout, work)


def unit(name: str, layout: Layout) -> bytes:
    """The unit of that name with the layout's paths: below ``/``, the file in configs/systemd as it is."""
    text = (CONFIGS / "systemd" / name).read_text()
    for path in ("/opt/gpujobs", "/run/gpujobs"):
        text = text.replace(f"={path}/", f"={layout.at(path)}/")
    return text.encode()


# -- what must be true before anything is touched ------------------------------------------------------------------


def _root_only(option: str) -> None:
    if os.geteuid() != 0:
        raise Refused(
            f"setup {option} is for root: it changes /opt, /etc and /usr/local",
            hint=f"Run `sudo gpujobs setup {option}`; with --dry-run too, for it looks at what is root's.",
        )


def _same_python() -> None:
    """What is copied holds machine code for the Python that runs now: the distribution's must be of its kind."""
    here = str(sysconfig.get_config_var("SOABI"))
    question = "import sysconfig; print(sysconfig.get_config_var('SOABI'))"
    try:
        there = _run([str(PYTHON), "-I", "-c", question]).strip()
    except Unavailable as error:
        raise Refused(
            f"the distribution's Python, {PYTHON}, does not run", hint="Install the packages python3 and python3-venv."
        ) from error
    if here != there:
        raise Refused(
            f"gpujobs runs on another Python ({here}) than the distribution's {PYTHON} ({there})",
            hint=f"Install gpujobs with {PYTHON} first (`make install PYTHON={PYTHON}`), and run its setup.",
        )


def _nothing_by_hand(layout: Layout) -> None:
    pid = holder(layout.state)
    if pid is None or not layout.booted:
        return
    with contextlib.suppress(OSError):
        if "/gpujobs.service" in Path(f"/proc/{pid}/cgroup").read_text():
            return
    raise Refused(
        f"a server that systemd did not start (pid {pid}) uses {layout.state}", hint="Stop it first; its jobs go on."
    )


def _nothing_to_lose(layout: Layout) -> None:
    ledger = layout.state / LEDGER
    if ledger.exists():
        try:
            with contextlib.closing(sqlite3.connect(f"{ledger.as_uri()}?mode=rw", uri=True, timeout=10)) as connection:
                (count,) = connection.execute("SELECT count(*) FROM jobs WHERE active = 1").fetchone()
        except sqlite3.DatabaseError as error:
            raise Refused(
                f"{ledger} cannot be read, so that nobody knows what --purge would lose: {error}",
                hint="Move the file away first, if it can go.",
            ) from error
        if count:
            raise Refused(
                f"{count} job{' has' if count == 1 else 's have'} not ended, and --purge would forget "
                f"{'it' if count == 1 else 'them'}",
                hint="Cancel or wait for them first, or leave --purge out.",
            )
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for path in (layout.state, layout.settings.parent):
        # What is mounted below is somebody else's, and would be deleted with it.
        if inside := [point for point in mounted if Path(point).is_relative_to(path)]:
            raise Refused(f"{inside[0]} is a mount; --purge deletes nothing below it", hint="Unmount it first.")


# -- the steps -----------------------------------------------------------------------------------------------------


def _make_group(layout: Layout, work: Work) -> None:
    if not layout.group:
        return
    try:
        grp.getgrnam(layout.group)
    except KeyError:
        work.run("made", f"the group {layout.group}; add accounts with `gpasswd -a NAME {layout.group}`",
                 ["groupadd", "--system", layout.group])  # fmt: skip
        if not work.dry_run:
            _write(layout.state / _RECORD, json.dumps({"group": layout.group}).encode())
    else:
        work.kept(f"the group {layout.group}")


def _make_tree(layout: Layout, work: Work, files: Mapping[str, Path]) -> None:
    manifest = json.dumps({"version": __version__, "files": _digest(files)}).encode()
    with contextlib.suppress(OSError):
        if (layout.prefix / _MANIFEST).read_bytes() == manifest:
            work.kept(f"{layout.prefix}: gpujobs {__version__}, the same files")
            return
    if layout.prefix.exists() and not (layout.prefix / _MANIFEST).exists():
        raise Refused(f"{layout.prefix} is there, and setup did not make it", hint="Move it away first.")
    what = f"{layout.prefix}: gpujobs {__version__} and what it needs, {len(files)} files, a venv of {PYTHON}"
    work.step("made", what, lambda: _build(layout, files, manifest))


def _build(layout: Layout, files: Mapping[str, Path], manifest: bytes) -> None:
    """Build beside the old tree, try it as somebody who owns nothing, and only then put it in its place."""
    fresh = layout.prefix.with_name(".gpujobs.new")
    old = layout.prefix.with_name(".gpujobs.old")
    for leftover in (fresh, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    try:
        _run([str(PYTHON), "-I", "-m", "venv", "--without-pip", str(fresh)])
        for script in (fresh / "bin").iterdir():
            if not script.name.startswith("python"):
                script.unlink()  # they say where the venv is, and nobody works in it
        cfg = fresh / "pyvenv.cfg"
        cfg.write_text(cfg.read_text().replace(str(fresh), str(layout.prefix)))
        packages = _packages_of(fresh)
        for name, source in files.items():
            target = packages / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)
        command = fresh / "bin/gpujobs"
        command.write_text(_COMMAND.format(python=layout.prefix / "bin/python3"))
        command.chmod(0o755)
        _run([str(fresh / "bin/python3"), "-I", "-m", "compileall", "-q", "-s", str(fresh), "-p", str(layout.prefix),
              str(packages)])  # fmt: skip
        (fresh / _MANIFEST).write_bytes(manifest)
        _run([str(fresh / "bin/python3"), "-I", "-c", _TRIAL], user=NOBODY)
        if layout.prefix.exists():
            layout.prefix.rename(old)
        fresh.rename(layout.prefix)
    finally:
        for leftover in (fresh, old):
            if leftover.exists():
                shutil.rmtree(leftover)


# Isolated: neither the caller's PYTHONPATH nor what lies in a home directory gets into a program of root's.
_COMMAND = """\
#!{python} -I
import sys

from gpujobs.__main__ import main

sys.exit(main())
"""
_TRIAL = "import gpujobs.service.wiring, gpujobs.service.doctor, gpujobs.init as i; i.binary()"


def _make_command(layout: Layout, work: Work) -> None:
    target = layout.prefix / "bin/gpujobs"
    if layout.command.is_symlink() and layout.command.readlink() == target:
        work.kept(str(layout.command))
        return
    if os.path.lexists(layout.command):
        raise Refused(f"{layout.command} is there, and setup did not make it", hint="Move it away first.")

    def make() -> None:
        layout.command.parent.mkdir(parents=True, exist_ok=True)
        layout.command.symlink_to(target)

    work.step("made", f"{layout.command}, a link to {target}", make)


def _purge(layout: Layout, work: Work) -> None:
    group = ""
    with contextlib.suppress(OSError, ValueError):
        group = str(json.loads((layout.state / _RECORD).read_text())["group"])
    for path in (layout.state, layout.settings.parent):
        if path.exists():
            work.step("removed", str(path), lambda path=path: shutil.rmtree(path))  # type: ignore[misc]
    if group and group == layout.group:
        work.run("removed", f"the group {group}", ["groupdel", group])
    elif layout.group:
        work.kept(f"the group {layout.group}: setup did not make it")


# -- what is copied ------------------------------------------------------------------------------------------------


def _package_files() -> Iterator[tuple[str, Path]]:
    """Every file of the installation: its path below site-packages, and where it is now.

    Raises:
        Refused: Some are not there.
    """
    try:
        init.binary()
    except FileNotFoundError as error:
        raise Refused(str(error)) from error
    for directory, folders, names in os.walk(PACKAGE, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            path = Path(directory, name)
            yield str(Path(PACKAGE.name, path.relative_to(PACKAGE))), path
    for name in sorted(_needed("gpujobs", set())):
        found = metadata.distribution(name)
        if found.files is None:
            raise Refused(
                f"it is not known which files belong to {name}", hint="Install gpujobs and what it needs with pip."
            )
        for entry in found.files:
            # Of ourselves only the metadata: the package came above, wherever it runs from. Commands are not needed.
            ours = name != "gpujobs" or entry.parts[0].endswith(".dist-info")
            if ours and entry.parts[0] != ".." and "__pycache__" not in entry.parts and entry.name not in _LOCAL:
                yield str(entry), Path(str(found.locate_file(entry)))


_LOCAL = frozenset({"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"})
"""Of a distribution's metadata, what tells of the place where it was installed."""


def _needed(name: str, known: set[str]) -> set[str]:
    """A distribution and all that it needs, as far as it is installed (markers choose among the rest)."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        if name == "gpujobs":
            raise Refused(
                "this gpujobs runs without having been installed",
                hint="`make install` in the checkout, then `.venv/bin/gpujobs setup --system`.",
            ) from error
        return known
    known.add(name)
    for requirement in found.requires or ():
        words = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert words is not None
        needed = re.sub(r"[-_.]+", "-", words[0]).lower()
        if needed not in known and "extra ==" not in requirement:
            _needed(needed, known)
    return known


def _digest(files: Mapping[str, Path]) -> str:
    """A hash of all names, modes and contents."""
    found = hashlib.sha256()
    for name, source in sorted(files.items()):
        executable = os.access(source, os.X_OK)
        found.update(f"{name}\0{executable}\0".encode() + hashlib.sha256(source.read_bytes()).digest())
    return found.hexdigest()


def _packages_of(prefix: Path) -> Path:
    (found,) = (prefix / "lib").glob("python3.*/site-packages")
    return found


def _write(path: Path, content: bytes) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(content)
    fresh.chmod(0o644)
    fresh.replace(path)


def _run(argv: list[str], user: int | None = None) -> str:
    """Run a program; returns its standard output.

    Raises:
        Unavailable: It failed, with its last words.
    """
    groups: list[int] | None = None if user is None else []
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL, cwd="/",
            timeout=_PATIENCE, user=user, group=user, extra_groups=groups, env={"PATH": os.environ.get("PATH", "")},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{argv[0]} did not run: {error}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Unavailable(f"`{' '.join(argv[:4])}` failed with {done.returncode}: {said[-1] if said else ''}")
    return done.stdout
