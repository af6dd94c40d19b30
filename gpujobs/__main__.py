"""The program ``gpujobs``: the command line, and the server behind it, loaded only when it is needed."""

from __future__ import annotations

import sys
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
    from gpujobs.service import wiring

    return wiring.ensure_server()


def doctor() -> Report:
    """Look at the machine."""
    from gpujobs.service import doctor

    return doctor.examine()


def main() -> int:
    """Run the command that the process was started with, and return its exit code."""
    return cli.main(serve=serve, ensure_server=ensure_server, doctor=doctor)


if __name__ == "__main__":
    sys.exit(main())
