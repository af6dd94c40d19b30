"""``python -m tests.lab up|down|status|env``: what tests and the demo run on, set up or taken down."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.lab import accounts, checkout, engine, images, nvml

LIBRARY_DIR = engine.CACHE / "nvml"


@contextmanager
def step(what: str) -> Iterator[Callable[[str], None]]:
    """Print what is being done, then what came of it and the seconds that it took."""
    began, outcome = time.monotonic(), ["done"]
    print(f"lab: {what} ...", end=" ", flush=True)
    yield lambda text: outcome.__setitem__(0, text)
    print(f"{outcome[0]} ({time.monotonic() - began:.1f} s)", flush=True)


def environment(found: engine.Engine) -> dict[str, str]:
    """Return the variables under which programs find the lab's Engine and, where they stand in, its GPUs."""
    variables = {"DOCKER_HOST": found.host}
    if found.simulated:
        before = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
        others = [path for path in before if path != str(LIBRARY_DIR)]
        variables["LD_LIBRARY_PATH"] = ":".join([str(LIBRARY_DIR), *others])
        variables["LAB_NVML_STATE"] = str(engine.NVML_STATE)
    return variables


def up(*, tests: bool = False) -> int:
    """Set everything up, with ``tests`` also what only they need; what is there already is left as it is."""
    began = time.monotonic()
    with step("Debian packages") as tell:
        installed = engine.install_packages(engine.PACKAGES | (engine.TEST_PACKAGES if tests else {}))
        tell(f"installed {' '.join(installed)}" if installed else "all there")
    with step("device nodes /dev/nvidia*"):
        engine.make_device_nodes()
    with step("NVML library"):
        nvml.build(LIBRARY_DIR)
    with step("machine of 8 GPUs (stand-ins)") as tell:
        engine.RUN.mkdir(parents=True, exist_ok=True)
        if engine.NVML_STATE.exists():
            tell(f"{engine.NVML_STATE} kept")
        else:
            nvml.dgx_a100().fit_host().write(engine.NVML_STATE)
            tell(str(engine.NVML_STATE))
    with step("Docker Engine") as tell:
        found = engine.ensure()
        tell(f"{found.host}{f', pid {found.pid}' if found.pid else ', was there'}")
    with step("images") as tell:
        made = images.ensure(found)
        tell(f"made {' '.join(made)}" if made else "all there")
    with step("accounts") as tell:
        tell(" ".join(account.name for account in accounts.ensure()))
    print(f"lab: ready in {time.monotonic() - began:.1f} s", flush=True)
    return 0


def down(*, purge: bool) -> int:
    """End the lab's Engine; with ``purge`` its images and the cache go too. Accounts and packages stay."""
    checkout.release()  # before anything is removed: it shows this checkout
    with step("Docker Engine") as tell:
        tell("stopped" if engine.stop() else "did not run")
    engine.NVML_STATE.unlink(missing_ok=True)
    if purge:
        with step("data"):
            shutil.rmtree(engine.LIB, ignore_errors=True)
            images.clear_cache()
    return 0


def status() -> int:
    """Print what is there; 0 when the lab is ready, else 1."""
    missing = engine.missing_packages(engine.PACKAGES | engine.TEST_PACKAGES)
    found = engine.find()
    built = (LIBRARY_DIR / "libnvidia-ml.so.1").exists()
    lines = [("packages", f"missing: {' '.join(missing)}" if missing else "all there"),
             ("NVML library", str(LIBRARY_DIR) if built else "not built"),
             ("machine", str(engine.NVML_STATE) if engine.NVML_STATE.exists() else "none"),
             ("Engine", f"{found.host}, pid {found.pid or 'not ours'}, "
              f"{'stand-in' if found.simulated else 'real'} nvidia runtime" if found else "none")]
    absent = [] if missing or not found else [
        name for name, image in images.recipes().items() if not images.present(found, image)]
    there = "all there" if found else "no Engine"
    lines.append(("images", f"missing: {' '.join(absent)}" if absent else there))
    for name, text in lines:
        print(f"{name + ':':14}{text}")
    return 0 if found and not missing and not absent else 1


def env() -> int:
    """Print the exports for a shell: ``eval "$(python -m tests.lab env)"``."""
    found = engine.find()
    if found is None:
        print("no Engine: run 'python -m tests.lab up' first", file=sys.stderr)
        return 1
    for name, value in environment(found).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def main() -> int:
    """Carry out one command."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    parser.add_argument("command", choices=("up", "down", "status", "env", "checkout"))
    parser.add_argument("--purge", action="store_true", help="down: remove images and cache too")
    options = parser.parse_args()
    try:
        if options.command == "checkout":
            print(checkout.reachable())
            return 0
        if options.command == "down":
            return down(purge=options.purge)
        if options.command == "up":
            return up(tests=True)
        return {"status": status, "env": env}[options.command]()
    except engine.LabError as error:
        print(f"\nlab: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
