"""``make demo``: sets everything up and runs the main job as a user would; the GPUs are real where there are some."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.lab import __main__ as lab
from tests.lab import accounts, engine

ROOT = Path(__file__).resolve().parents[2]
GPUJOBS = ROOT / ".venv/bin/gpujobs"
STATE = engine.LIB / "demo"
SOCKET = engine.RUN / "demo.sock"


def say(text: str) -> None:
    """Print a line of the demo's own."""
    print(f"\n== {text}", flush=True)


def gpujobs(*arguments: str, environment: dict[str, str]) -> int:
    """Run a command as it would be typed, showing it first."""
    print(f"\n$ gpujobs {' '.join(arguments)}", flush=True)
    return subprocess.run([GPUJOBS, *arguments], env=environment, check=False, cwd=ROOT).returncode


def _copied(user: accounts.Account) -> Path:
    """The example in the account's own home, where it can be read: this checkout may lie in root's."""
    target = user.home / "train"
    shutil.copytree(ROOT / "examples/train", target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (target, *target.rglob("*")):
        os.chown(path, user.uid, user.gid)
    return target


def main() -> int:
    """Set up, serve, submit, watch; 0 when the job succeeded."""
    if os.geteuid() != 0:
        print("make demo needs root: it starts a Docker Engine and a server for all accounts.", file=sys.stderr)
        return 1
    was_there = engine.find() is not None
    if lab.up() != 0:
        return 1
    found = engine.ensure()
    if found.simulated:
        say("SIMULATED: this machine has no GPU. NVML and the nvidia runtime are stand-ins; the Engine, the\n"
            "== containers, the isolation of devices and the training are real. No figure here is a GPU's.")
    places = {"GPUJOBS_HOST": f"unix://{SOCKET}", "GPUJOBS_STATE": str(STATE)}
    environment = {**os.environ, **lab.environment(found), **places}
    user = accounts.ensure()[0]
    pipe = subprocess.PIPE
    serving = subprocess.Popen([GPUJOBS, "serve"], env=environment, stdout=pipe, stderr=pipe, text=True)
    assert serving.stdout is not None
    assert serving.stderr is not None
    try:
        if not serving.stdout.readline().startswith("listening on"):
            print(serving.stderr.read(), file=sys.stderr)
            return 1
        say(f"a server runs; a job is submitted for the account {user.name}, which is in no docker group")
        code = gpujobs("run", "--run-as", user.name, str(_copied(user) / "job.yaml"), environment=environment)
        gpujobs("gpus", environment=environment)
        gpujobs("ps", "--all", environment=environment)
    finally:
        serving.terminate()
        serving.wait(timeout=30)
        if not was_there:
            engine.stop()
    simulated = " (SIMULATED GPUs)" if found.simulated else ""
    say(f"finished{simulated}" if code == 0 else f"the job ended with code {code}")
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except engine.LabError as error:
        sys.exit(f"\nlab: {error}")
