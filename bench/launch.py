"""From ``submit`` to the running program, beside the Engine's own create and start on the same machine.

    .venv/bin/python -m bench.launch [--rounds N] [--json FILE]

In each round, in turn: a job submitted to an idle gpujobs server until its program was released; a container made
and started through the Engine's API; ``docker run --rm``. Wall seconds; the ratio is what says something, since all
of them go with the machine's speed. The GPUs are the test lab's where there are none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import docker

from gpujobs.faces.client import Client, find_host
from tests.lab import __main__ as lab
from tests.lab import accounts, engine, images

ROOT = Path(__file__).resolve().parents[1]
JOB = """\
name: bench
image: {image}
command: [sleep, "60"]
gpus: 1
stop_grace_period: 1s
"""


def ours(client: Client, job: Path, user: str) -> float:
    """Seconds from the submission's first byte until the program was released."""
    began = time.monotonic()
    number = client.submit([str(job)], run_as=user)["jobs"][0]["id"]
    for row in client.watch(str(number)):
        if row["state"] == "running":
            taken = time.monotonic() - began
            client.cancel(str(number))
        elif row["state"] == "failed":
            raise RuntimeError(row["message"])
    return taken


def bare(api: docker.APIClient) -> float:
    """Seconds of a create and a start, with the runtime and the GPU that a job gets."""
    host = api.create_host_config(runtime="nvidia")
    began = time.monotonic()
    made = api.create_container(
        images.BUSYBOX, ["sleep", "60"], host_config=host, environment={"NVIDIA_VISIBLE_DEVICES": "0"}
    )
    api.start(made["Id"])
    taken = time.monotonic() - began
    api.remove_container(made["Id"], force=True)
    return taken


def docker_run(environment: dict[str, str]) -> float:
    """Seconds of ``docker run --rm IMAGE true`` as a whole."""
    words = ["docker", "run", "--rm", "--runtime", "nvidia", "-e", "NVIDIA_VISIBLE_DEVICES=0", images.BUSYBOX, "true"]
    began = time.monotonic()
    subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> int:
    """Run the rounds and print minimum, median and maximum of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if lab.up() != 0:
        return 1
    found = engine.ensure()
    user = accounts.ensure()[0].name
    with tempfile.TemporaryDirectory(prefix="gpujobs-bench-") as directory:
        environment = {
            **os.environ, **lab.environment(found),
            "GPUJOBS_HOST": f"unix://{directory}/s.sock", "GPUJOBS_STATE": f"{directory}/state",
        }  # fmt: skip
        job = Path(directory) / "job.yaml"
        job.write_text(JOB.format(image=images.BUSYBOX))
        command = [ROOT / ".venv/bin/gpujobs", "serve"]
        quiet = subprocess.DEVNULL
        serving = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=quiet, text=True)
        try:
            assert serving.stdout is not None
            if not serving.stdout.readline().startswith("listening on"):
                print("the server did not start", file=sys.stderr)
                return 1
            client = Client(find_host(environment))
            api = docker.APIClient(base_url=found.host, version="auto")
            measured: dict[str, list[float]] = {"gpujobs": [], "create+start": [], "docker run": []}
            for _ in range(options.rounds):
                measured["gpujobs"].append(ours(client, job, user))
                measured["create+start"].append(bare(api))
                measured["docker run"].append(docker_run(environment))
        finally:
            serving.terminate()
            serving.wait(timeout=30)
    middle = {name: statistics.median(values) for name, values in measured.items()}
    for name, values in measured.items():
        ratio = middle["gpujobs"] / middle[name]
        print(f"{name:13} min {min(values):.3f}  median {middle[name]:.3f}  max {max(values):.3f} s   "
              f"gpujobs takes {ratio:.2f} x")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"rounds": options.rounds, "seconds": measured}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
