"""The container init: a small static C program, built when the package is installed."""

import os
from pathlib import Path


def binary() -> Path:
    """Return the installed ``gpujobs-init``, the static program that every container starts with.

    Returns:
        The absolute path of the executable, beside this file.

    Raises:
        FileNotFoundError: It is not there or not executable; the message says how to build it.
    """
    path = Path(__file__).resolve().with_name("gpujobs-init")
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise FileNotFoundError(
            f"the container init {path} is not built: install the packages gcc and libc6-dev,"
            " then run `make install` in the checkout (or `pip install` the package again)"
        )
    return path
