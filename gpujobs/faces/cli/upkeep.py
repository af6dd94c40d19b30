"""The commands ``backup`` and ``setup``, for who looks after a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gpujobs.core.errors import OK, InvalidInput
from gpujobs.faces.cli.common import emit, hooks_of
from gpujobs.faces.words import clean

BACKUP_EXAMPLES = """\b
Examples:
  gpujobs backup /srv/backup/gpujobs-$(date +%F).sqlite
  GPUJOBS_STATE=/srv/state gpujobs backup /srv/backup/other.sqlite"""

SETUP_EXAMPLES = """\b
Examples:
  sudo .venv/bin/gpujobs setup --system --dry-run     what it would do
  sudo .venv/bin/gpujobs setup --system               install, or bring up to date
  sudo gpujobs setup --uninstall                      remove it; jobs, their state and the settings stay"""


def backup(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The new file.")],
) -> int:
    """Copy the server's ledger, as it is at one moment, into one file, while the server runs or not.

    The copy is checked before it gets its name, and a file that is there is never overwritten. How it is restored is
    in docs/operations.md.
    """
    copy = hooks_of(context).back_up
    assert copy is not None
    emit(copy(file))
    return OK


def setup(
    context: typer.Context,
    system: Annotated[
        bool, typer.Option("--system", help="Install for the whole machine, or bring up to date.")
    ] = False,
    uninstall: Annotated[bool, typer.Option("--uninstall", help="Remove what --system made.")] = False,
    purge: Annotated[
        bool, typer.Option("--purge", help="With --uninstall: the ledger, the logs and the settings too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what would be done.")] = False,
) -> int:
    """Install a server for this machine, as root: systemd's units, settings, directories, the group `gpujobs`.

    The program goes to /opt/gpujobs, into a venv of the distribution's Python that everybody can run, copied from
    what runs now: no network is needed. It can be run again, and brings an installation up to date. Running
    containers are left alone, also by --uninstall.
    """
    if system == uninstall:
        raise InvalidInput("setup needs one of --system and --uninstall")
    if purge and not uninstall:
        raise InvalidInput("--purge goes with --uninstall only")
    change = hooks_of(context).setup
    assert change is not None
    change(lambda line: emit(f"{clean(line)}\n"), uninstall=uninstall, purge=purge, dry_run=dry_run)
    return OK
