"""The account database of the machine: /etc/passwd, LDAP, whatever nsswitch.conf names. These calls can block."""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import time
from collections.abc import Iterable

from gpujobs.core.accounts import Account
from gpujobs.core.errors import InvalidInput, Refused
from gpujobs.core.job import Owner

NOBODY = 65534
"""The kernel's overflow uid: whoever has no number here shows as it (kernel.org, sysctl/kernel.rst, overflowuid)."""

DAY = 86400.0
_SHADOW_BYTES = 64 << 10


class SystemAccounts:
    """The machine's accounts; see :class:`gpujobs.core.accounts.AccountSource`."""

    def by_uid(self, uid: int) -> Account:
        """The account of a uid, with all its groups."""
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            raise Refused(
                f"uid {uid} has no account on this machine", hint="Jobs run as an account of the machine."
            ) from None
        return _account(entry)

    def by_name(self, name: str) -> Account:
        """The account of a name, with all its groups."""
        try:
            entry = pwd.getpwnam(name)
        except (KeyError, ValueError):
            raise InvalidInput(f"--run-as: there is no account {name[:64]!r} on this machine") from None
        return _account(entry)

    def gids(self, names: Iterable[str]) -> dict[str, int]:
        """The numbers of groups, as far as there are such groups."""
        found = {}
        for name in names:
            try:
                found[name] = grp.getgrnam(name).gr_gid
            except (KeyError, ValueError):
                continue
        return found

    def group_names(self, owner: Owner) -> list[tuple[int, str]]:
        """The names of an account's groups."""
        names = []
        for gid in owner.groups:
            try:
                names.append((gid, grp.getgrgid(gid).gr_name))
            except KeyError:
                names.append((gid, f"g{gid}"))
        return names


def _account(entry: pwd.struct_passwd) -> Account:
    if entry.pw_uid == NOBODY:
        raise Refused(f"{entry.pw_name} (uid {NOBODY}) is nobody's account: it may not use gpujobs")
    groups = tuple(sorted({entry.pw_gid, *os.getgrouplist(entry.pw_name, entry.pw_gid)}))
    owner = Owner(uid=entry.pw_uid, gid=entry.pw_gid, groups=groups, name=entry.pw_name, home=entry.pw_dir)
    day = _expiry_day(entry.pw_name)
    return Account(owner=owner, expired=day is not None and time.time() >= day * DAY)


class _Shadow(ctypes.Structure):
    """``struct spwd`` of shadow.h; days since the epoch, -1 for none."""

    _fields_ = (
        ("name", ctypes.c_char_p), ("password", ctypes.c_char_p), ("changed", ctypes.c_long), ("min", ctypes.c_long),
        ("max", ctypes.c_long), ("warn", ctypes.c_long), ("inactive", ctypes.c_long), ("expire", ctypes.c_long),
        ("flag", ctypes.c_ulong),
    )  # fmt: skip


def _expiry_day(name: str) -> int | None:
    """The day, from the epoch, on which an account's time is over; None where none is set or it cannot be read.

    Asked of the C library, which asks what nsswitch.conf names: Python's own module for it is going away.
    """
    entry, found = _Shadow(), ctypes.POINTER(_Shadow)()
    space = ctypes.create_string_buffer(_SHADOW_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    code = libc.getspnam_r(
        name.encode(errors="surrogateescape"), ctypes.byref(entry), space, ctypes.c_size_t(len(space)),
        ctypes.byref(found),
    )  # fmt: skip
    return int(entry.expire) if code == 0 and found and entry.expire >= 0 else None
