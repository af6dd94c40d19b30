"""Unix accounts for tests: ordinary people with homes of their own and no access to Docker."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FIRST_UID = 5001
COUNT = 5


@dataclass(frozen=True)
class Account:
    """One account of the lab: a name, a uid that is also its primary gid, and a home of mode 0700."""

    name: str
    uid: int
    gid: int
    home: Path


def _look_up(name: str) -> Account:
    entry = pwd.getpwnam(name)
    return Account(name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))


def ensure(count: int = COUNT) -> tuple[Account, ...]:
    """Create ``gjlab1`` to ``gjlab<count>`` where they are missing; root only.

    Returns:
        The accounts in order. Their uids are 5001 and up; homes exist, are theirs, and have mode 0700.

    Raises:
        RuntimeError: when one of the names or uids belongs to somebody else.
    """
    accounts = []
    for number in range(1, count + 1):
        name, uid = f"gjlab{number}", FIRST_UID + number - 1
        if name not in {entry.pw_name for entry in pwd.getpwall()}:
            for command in (
                ["groupadd", "--gid", str(uid), name],
                ["useradd", "--uid", str(uid), "--gid", str(uid), "--no-user-group", "--create-home",
                 "--home-dir", f"/home/{name}", "--shell", "/bin/sh", name],
            ):
                done = subprocess.run(command, check=False, capture_output=True, text=True)
                if done.returncode != 0:
                    raise RuntimeError(f"{command[0]} for {name}: {done.stderr.strip()}")
        account = _look_up(name)
        if account.uid != uid:
            raise RuntimeError(f"account {name} exists with uid {account.uid}; the lab needs uid {uid}")
        account.home.mkdir(exist_ok=True)
        os.chown(account.home, account.uid, account.gid)
        account.home.chmod(0o700)
        accounts.append(account)
    return tuple(accounts)


def command_as(account: Account, argv: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
    """Return the command line that runs ``argv`` as the account.

    The environment is the account's own (HOME, USER, SHELL, a standard PATH) plus ``env``; nothing of the
    caller's comes through, so that a test cannot pass by an accident of root's environment.
    """
    settings = [f"{key}={value}" for key, value in (env or {}).items()]
    return ["setpriv", f"--reuid={account.uid}", f"--regid={account.gid}", "--init-groups", "--reset-env",
            "env", *settings, *argv]


def run_as(
    account: Account,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
    timeout: float = 60.0,
) -> subprocess.CompletedProcess[str]:
    """Run ``argv`` as the account and wait for it.

    Args:
        account: who runs it.
        argv: the command.
        env: variables added to the account's own environment.
        cwd: working directory, the account's home by default.
        stdin: text for its standard input; empty by default.
        timeout: seconds after which the whole process group is killed.

    Raises:
        subprocess.TimeoutExpired: when the time is over.
    """
    with subprocess.Popen(
        command_as(account, argv, env), cwd=cwd or account.home, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(stdin or "", timeout=timeout)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(list(argv), process.returncode, out, err)
