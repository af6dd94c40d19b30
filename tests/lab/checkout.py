"""A name of this checkout that every account can reach, also where it was cloned into root's own home.

Tests act as other accounts, who cannot run a program below a directory of mode 0700. A bind mount elsewhere shows
them the same files; a wrapper starts the command from there.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.lab.engine import LIB

HERE = Path(__file__).resolve().parents[2]
MOUNT = LIB / "checkout"
WRAPPER = LIB / "bin" / "gpujobs"


def _open_to_all(path: Path) -> bool:
    return all(directory.stat().st_mode & 0o001 for directory in (path, *path.parents))


def reachable() -> Path:
    """This checkout's directory, or a bind mount of it where others cannot reach that."""
    if HERE == MOUNT or _open_to_all(HERE):
        return HERE
    MOUNT.mkdir(mode=0o755, parents=True, exist_ok=True)
    for directory in (LIB, LIB.parent):
        directory.chmod(directory.stat().st_mode | 0o011)
    if not (MOUNT / "pyproject.toml").exists():
        subprocess.run(["mount", "--bind", HERE, MOUNT], check=True)
    return MOUNT


def program() -> Path:
    """The command ``gpujobs``, for any account."""
    root = reachable()
    if root != MOUNT:
        return root / ".venv/bin/gpujobs"
    WRAPPER.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    text = f'#!/bin/sh\nexport PYTHONPATH={root}\nexec {root}/.venv/bin/python -m gpujobs "$@"\n'
    if not WRAPPER.exists() or WRAPPER.read_text() != text:
        WRAPPER.write_text(text)
        WRAPPER.chmod(0o755)
    return WRAPPER


def release() -> None:
    """Take the bind mount away."""
    if (MOUNT / "pyproject.toml").exists():
        subprocess.run(["umount", "--lazy", MOUNT], check=True)
