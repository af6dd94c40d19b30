"""The program ``gpujobs``: the command line, and the server behind it, loaded only when it is needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gpujobs.faces import cli
from gpujobs.faces.client import Host

if TYPE_CHECKING:
    from gpujobs.core.finding import Report


def serve(config: Path | None, simulate: Path | None, speed: float | None) -> int:
    """Be the server."""
    from gpujobs.service import wiring

    return wiring.serve(config, simulate, speed)


def ensure_server(_: Host) -> str | None:
    """Start a server for this account where the rules allow it; what to say of it, or None."""
    from gpujobs.service import autostart

    return autostart.ensure_server()


def doctor() -> Report:
    """Look at the machine."""
    from gpujobs.service import doctor

    return doctor.examine()


def check_state() -> str:
    """Look at the ledger of the server that this process would be."""
    from gpujobs.service import upkeep

    return upkeep.check_state(os.environ)


def back_up(target: Path) -> str:
    """Copy that ledger into a file."""
    from gpujobs.service import upkeep

    return upkeep.back_up(os.environ, target)


def setup(say: Callable[[str], None], *, uninstall: bool, purge: bool, dry_run: bool) -> None:
    """Make the system installation, or remove it."""
    from gpujobs.service import setup

    if uninstall:
        setup.uninstall(say, purge=purge, dry_run=dry_run)
    else:
        setup.install(say, dry_run=dry_run)


def main() -> int:
    """Run the command that the process was started with, and return its exit code."""
    return cli.main(
        serve=serve, ensure_server=ensure_server, doctor=doctor, check_state=check_state, back_up=back_up, setup=setup
    )


if __name__ == "__main__":
    sys.exit(main())
