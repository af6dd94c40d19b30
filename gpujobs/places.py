"""Where things are: sockets, state and settings, for the server and its clients alike. Standard library only.

    the server of uid 0      /run/gpujobs/gpujobs.sock               /var/lib/gpujobs
    any other uid's server   $XDG_RUNTIME_DIR/gpujobs/gpujobs.sock   $XDG_STATE_HOME/gpujobs
                             (in the state directory if unset)       (~/.local/state/gpujobs if unset)

``GPUJOBS_STATE`` moves the state, ``GPUJOBS_HOST`` the socket.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gpujobs.core.errors import InvalidInput

SYSTEM_RUN = Path("/run/gpujobs")
SYSTEM_STATE = Path("/var/lib/gpujobs")
SYSTEM_SETTINGS = Path("/etc/gpujobs/server.yaml")
GROUP = "gpujobs"
"""The members of this group may use the system's server."""

SOCKET_NAME = "gpujobs.sock"

MAX_SOCKET_PATH = 107
"""Bytes that ``sun_path`` holds besides its terminating zero (unix(7))."""


def system_socket() -> Path:
    """The socket of the server of uid 0."""
    return SYSTEM_RUN / SOCKET_NAME


def home(environ: Mapping[str, str]) -> Path:
    """The home directory: ``HOME`` where it is absolute, else what the account database gives, else ``/``."""
    named = environ.get("HOME", "")
    if named.startswith("/"):
        return Path(named)
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return Path("/")


def user_state(environ: Mapping[str, str]) -> Path:
    """The state directory of an account's own server.

    A relative ``XDG_STATE_HOME`` is ignored, as the XDG Base Directory Specification asks.
    """
    if given := environ.get("GPUJOBS_STATE"):
        return Path(given).absolute()
    base = environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else home(environ) / ".local/state") / "gpujobs"


def user_socket(environ: Mapping[str, str]) -> Path:
    """The socket of an account's own server."""
    base = environ.get("XDG_RUNTIME_DIR", "")
    if base.startswith("/"):
        return Path(base) / "gpujobs" / SOCKET_NAME
    return user_state(environ) / SOCKET_NAME


def server_state(environ: Mapping[str, str]) -> Path:
    """The state directory of a server that this process would be."""
    if os.geteuid() == 0 and not environ.get("GPUJOBS_STATE"):
        return SYSTEM_STATE
    return user_state(environ)


def server_socket(environ: Mapping[str, str]) -> Path:
    """The socket of a server that this process would be, where ``GPUJOBS_HOST`` names none."""
    return system_socket() if os.geteuid() == 0 else user_socket(environ)


def socket_of(host: str) -> Path:
    """The path that a ``GPUJOBS_HOST`` such as ``unix:///run/gpujobs/gpujobs.sock`` names.

    Raises:
        InvalidInput: It is no ``unix://`` address with an absolute path.
    """
    if host.startswith("ssh://"):
        raise InvalidInput(
            "GPUJOBS_HOST: ssh:// addresses are not supported by this version",
            hint="Log in there and run gpujobs on the server itself.",
        )
    path = host.removeprefix("unix://")
    if path == host or not path.startswith("/") or "\0" in path or path.endswith("/"):
        raise InvalidInput(
            f"GPUJOBS_HOST: {host!r} is no address of a server",
            hint="It looks like unix:///run/gpujobs/gpujobs.sock, with an absolute path.",
        )
    return Path(path)


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name of ``path`` that fits a socket address, to bind or connect to while the context is open.

    A path that is too long is reached through its opened directory, ``/proc/self/fd/N/name``.

    Raises:
        InvalidInput: The last part of the path alone is too long.
        OSError: The directory cannot be opened.
    """
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        yield str(path)
        return
    if len(os.fsencode(path.name)) > MAX_SOCKET_PATH - len("/proc/self/fd/1000000/"):
        raise InvalidInput(f"the socket's name is too long: {path.name!r}", hint="Give it a shorter name.")
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
