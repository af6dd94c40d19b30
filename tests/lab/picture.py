"""``python -m tests.lab.picture FILE.svg``: the demo as a terminal shows it, drawn from a real run."""

from __future__ import annotations

import os
import pty
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS, LINES = 118, 50
LEFT_OUT = ("lab: ", "gpujobs: job 1 starting")


def recorded() -> str:
    """The demo's output, escape sequences and all."""
    parts: list[bytes] = []

    def keep(descriptor: int) -> bytes:
        data = os.read(descriptor, 65536)
        parts.append(data)
        return data

    os.environ.update(COLUMNS=str(COLUMNS), LINES=str(LINES), TERM="xterm-256color")
    status = pty.spawn([sys.executable, "-m", "tests.lab.demo"], keep)
    if status != 0:
        raise SystemExit(f"the demo ended with status {status}")
    return b"".join(parts).decode(errors="replace").replace("\r\n", "\n")


def main() -> int:
    """Record, draw, write."""
    lines = [line for line in recorded().splitlines() if not line.startswith(LEFT_OUT)]
    console = Console(record=True, width=COLUMNS, file=Path(os.devnull).open("w"))  # noqa: SIM115 - as long as the program
    console.print(Text.from_ansi("\n".join(lines).strip("\n")))
    Path(sys.argv[1]).write_text(console.export_svg(title="make demo", theme=MONOKAI))
    return 0


if __name__ == "__main__":
    sys.exit(main())
