"""`build:` and pulls through the command line, as an account: the id first, the output, the end, and what fails."""

from __future__ import annotations

import http.client
import json
import os
import pty
import re
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import BUSYBOX, GPUJOBS, ROOT, Done, Place, Server, wait_for
from tests.lab import checkout, images
from tests.lab.accounts import Account, command_as
from tests.lab.engine import Engine
from tests.lab.registry import registry

VENV_BASE = "gpujobs-lab/python-venv:1"
PYTHON = str(checkout.reachable() / ".venv/bin/python")


def client_of(server: Server) -> dict[str, str]:
    """The environment of a client program of any account."""
    return {"GPUJOBS_HOST": server.host, "PYTHONPATH": str(checkout.reachable())}



@pytest.fixture
def project(place: Place, alice: Account) -> Callable[..., Path]:
    """A directory of Alice's with these files, and a job file that builds it."""

    def make(dockerfile: str, files: Mapping[str, bytes] | None = None, name: str = "project", **keys: Any) -> Path:
        directory = place.volume(alice, name)
        given = {"name": "built", "build": ".", "mem_limit": "64m", "stop_grace_period": "2s", **keys}
        contents = {"Dockerfile": dockerfile.encode(), "job.yaml": json.dumps(given).encode(), **(files or {})}
        for path, data in contents.items():
            target = directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        for path in directory.rglob("*"):
            os.chown(path, alice.uid, alice.gid, follow_symlinks=False)
        return directory

    return make


@pytest.fixture(scope="module", autouse=True)
def _clean_images(lab: Engine, alice: Account) -> Iterator[None]:
    """Images that the tests build go with them."""
    yield
    lab.docker("image", "prune", "--force", "--filter", f"label=gpujobs.owner={alice.uid}")
    if lab.docker("images", "--quiet", VENV_BASE):
        lab.docker("rmi", VENV_BASE)


def contexts(server: Server) -> list[str]:
    return sorted(path.name for path in (server.state / "contexts").iterdir())


def put(server: Server, path: str, body: bytes) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("localhost", timeout=30)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.connect(str(server.socket))
    try:
        connection.request("PUT", f"/v1{path}", body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def send(server: Server, entry: Any, user: Account) -> subprocess.CompletedProcess[bytes]:
    """Send a context by the API alone, as an account."""
    script = (
        "import json, os, sys; from gpujobs.faces.client import *; "
        "Client(find_host(os.environ)).send_context(json.loads(sys.argv[1]))"
    )
    argv = command_as(user, [PYTHON, "-c", script, json.dumps(entry)], client_of(server))
    return subprocess.run(argv, capture_output=True, check=False, cwd="/")


def submission(server: Server, directory: Path, user: Account) -> Any:
    """Submit by the API alone, as an account: nothing is sent after it."""
    script = (
        "import json, os, sys; from gpujobs.faces.client import *; "
        "print(json.dumps(Client(find_host(os.environ)).submit([sys.argv[1]])))"
    )
    argv = command_as(user, [PYTHON, "-c", script, str(directory / "job.yaml")], client_of(server))
    done = subprocess.run(argv, capture_output=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_run_builds_the_directory_of_an_account_and_runs_it_as_the_account(
    server: Server, project: Callable[..., Path], alice: Account
) -> None:
    directory = project(
        f"FROM {BUSYBOX}\nCOPY data /data\nRUN echo built by $(id -u)\n"
        'CMD ["sh", "-c", "cat /data/a; id -u; ls /data"]\n',
        {"data/a": b"hello\n", "data/b.log": b"", ".dockerignore": b"*/*.log\n"},
    )
    done = server.cli("run", str(directory / "job.yaml"), user=alice)
    assert done.code == 0, done
    assert done.out.decode().split() == ["hello", str(alice.uid), "a"]
    job = re.search(r"job (\d+): sending its build context", done.words)
    assert job is not None, done.words
    assert f"job {job[1]}: Step 1/" in done.words
    assert f"job {job[1]}: built by 0" in done.words
    assert done.words.index("sending its build context") < done.words.index("Step 1/") < done.words.index("running")
    row = server.job(job[1])
    assert (row["state"], row["exit_code"]) == ("succeeded", 0)
    assert row["container"]["image"].startswith("sha256:")
    assert contexts(server) == []
    logs = server.cli("logs", job[1], user=alice)
    assert logs.out == done.out
    assert "Step 1/" in logs.words
    assert "gap:" not in logs.words


def test_submit_prints_the_id_first_and_the_same_build_again_comes_from_the_accounts_cache(
    server: Server, project: Callable[..., Path], alice: Account
) -> None:
    directory = project(f"FROM {BUSYBOX}\nRUN cat /proc/sys/kernel/random/uuid > /u\nCMD [\"cat\", \"/u\"]\n")
    found = []
    for _ in range(2):
        done = server.cli("submit", "--quiet", str(directory / "job.yaml"), user=alice)
        assert done.code == 0, done
        server.ended(done.out.decode().strip())
        found.append(server.cli("logs", done.out.decode().strip(), user=alice).out)
    assert found[0] == found[1] != b""


def test_a_failing_build_fails_the_job_with_the_step_and_its_words(
    server: Server, project: Callable[..., Path], alice: Account
) -> None:
    directory = project(f"FROM {BUSYBOX}\nRUN cat /missing; echo about to fail; exit 1\n")
    done = server.cli("run", str(directory / "job.yaml"), user=alice)
    assert done.code == 1
    (row,) = [row for row in server.jobs() if row["state"] == "failed"][-1:]
    assert row["reason"] == "image"
    assert row["message"] == (
        "the build failed at step 3 of 4, RUN cat /missing; echo about to fail; exit 1: exit 1: "
        "cat: can't open '/missing': No such file or directory"
    )
    assert "about to fail" in done.words
    assert contexts(server) == []


def test_a_directory_that_cannot_be_packed_cancels_the_job_and_says_why(
    server: Server, project: Callable[..., Path], alice: Account
) -> None:
    directory = project(f"FROM {BUSYBOX}\n", {"secret": b"x"})
    os.chown(directory / "secret", 0, 0)
    (directory / "secret").chmod(0o600)
    done = server.cli("run", str(directory / "job.yaml"), user=alice)
    assert done.code == 2
    assert "secret: Permission denied" in done.words
    assert "was cancelled: its build context was not sent" in done.words
    assert server.jobs()[-1]["state"] == "cancelled"


def test_elements_of_an_array_share_one_context(server: Server, project: Callable[..., Path], alice: Account) -> None:
    directory = project(
        f"FROM {BUSYBOX}\nARG N\nRUN echo $N > /n\nCMD [\"cat\", \"/n\"]\n",
        matrix={"n": [1, 2, 3]}, build={"context": ".", "args": {"N": "{{ n }}"}},
    )  # fmt: skip
    done = server.cli("run", str(directory / "job.yaml"), user=alice, timeout=120)
    assert done.code == 0, done
    assert done.words.count("sending its build context") == 1
    assert sorted(line.split(b" | ")[1] for line in done.out.splitlines()) == [b"1", b"2", b"3"]
    assert contexts(server) == []


def test_a_job_waits_outside_the_queue_until_its_context_is_sent_by_who_may(
    server: Server, project: Callable[..., Path], alice: Account, bob: Account
) -> None:
    directory = project(f"FROM {BUSYBOX}\nCMD [\"true\"]\n")
    answer = submission(server, directory, alice)
    (entry,) = answer["contexts"]
    job = str(answer["jobs"][0]["id"])
    assert (entry["id"], entry["context"], entry["dockerfile"]) == (int(job), str(directory), "Dockerfile")
    row = server.job(job)
    assert (row["state"], row["reason"], row["message"]) == ("queued", "image", "waits for its build context")
    behind = server.run(script="true")  # it stands in nobody's way
    assert behind.code == 0
    status, body = put(server, f"/jobs/{job}/context/{'0' * 32}", b"x")
    assert (status, body["code"]) == (404, "unknown")
    (bob.home / "Dockerfile").write_text("FROM scratch\n")
    denied = send(server, {**entry, "context": str(bob.home)}, bob)
    (bob.home / "Dockerfile").unlink()
    assert b"only they and administrators may send its build context" in denied.stderr
    sent = send(server, entry, alice)
    assert sent.returncode == 0, sent.stderr
    assert server.ended(job)["state"] == "succeeded"


def test_a_restart_forgets_neither_what_is_waited_for_nor_what_has_come(
    server: Server, project: Callable[..., Path], alice: Account
) -> None:
    waiting = submission(server, project(f"FROM {BUSYBOX}\nCMD [\"echo\", \"late\"]\n"), alice)
    slow = project(f"FROM {BUSYBOX}\nRUN echo begun; sleep 3\nCMD [\"echo\", \"slow\"]\n", name="slow")
    building = server.cli("submit", "--quiet", str(slow / "job.yaml"), user=alice).out.decode().strip()
    server.until(building, "pulling")
    wait_for(lambda: "begun" in server.cli("logs", building).words, "the build has begun")
    server.kill()
    server.start()
    job = str(waiting["jobs"][0]["id"])
    assert server.job(job)["message"] == "waits for its build context"
    assert server.ended(building)["state"] == "succeeded"
    logs = server.cli("logs", building)
    assert (logs.out, "gap:" in logs.words) == (b"slow\n", False)
    assert send(server, waiting["contexts"][0], alice).returncode == 0
    assert server.ended(job)["state"] == "succeeded"
    assert contexts(server) == []


def test_a_context_that_never_comes_fails_the_job(
    server: Server, project: Callable[..., Path], alice: Account
) -> None:
    job = str(submission(server, project(f"FROM {BUSYBOX}\n"), alice)["jobs"][0]["id"])
    assert server.stop() == 0
    with closing(sqlite3.connect(server.state / "state.sqlite")) as ledger, ledger:
        (left,) = ledger.execute("SELECT deadline - submitted_at FROM contexts JOIN submissions USING (number) "
                                 "WHERE number = ?", (job,)).fetchone()  # fmt: skip
        ledger.execute("UPDATE contexts SET deadline = submitted_at FROM submissions "
                       "WHERE submissions.number = contexts.number AND contexts.number = ?", (job,))  # fmt: skip
    assert left == pytest.approx(600)
    server.start()
    row = server.until(job, "failed")
    assert (row["reason"], row["message"]) == ("image", "its build context did not come within 10 minutes")


def test_cancelling_a_build_ends_its_container(
    server: Server, project: Callable[..., Path], alice: Account, lab: Engine
) -> None:
    directory = project(f"FROM {BUSYBOX}\nRUN echo begun; sleep 606\n")
    job = server.cli("submit", "--quiet", str(directory / "job.yaml"), user=alice).out.decode().strip()

    def begun() -> str | None:
        said = server.cli("logs", job, user=alice).words
        return said if f"job {job}: begun" in said else None

    words = wait_for(begun, "the build has begun")
    container = re.findall(r"---> Running in ([0-9a-f]+)", words)[-1]
    assert server.cli("cancel", job, user=alice).code == 0
    assert server.ended(job)["state"] == "cancelled"
    wait_for(lambda: not lab.docker("ps", "--all", "--quiet", "--filter", f"id={container}"), "its container is gone")


@pytest.fixture
def pulled(lab: Engine, tmp_path: Path) -> Iterator[str]:
    """An image that is in a registry and not in the Engine."""
    with registry(tmp_path / "registry") as address:
        name = f"{address}/e2e/pulled:1"
        context = tmp_path / "context"
        context.mkdir()
        with (context / "big").open("wb") as big:  # so much that its pull is seen on the way
            for _ in range(16):
                big.write(os.urandom(12 << 20))
        (context / "Dockerfile").write_text(f"FROM {BUSYBOX}\nCOPY big /\n")
        lab.docker("build", "--tag", name, str(context))
        lab.docker("push", name)
        lab.docker("rmi", name)
        yield name
        subprocess.run(["docker", "rmi", "--force", name], env=lab.environment(), check=False, capture_output=True)


def test_a_pull_is_told_in_lines_and_recorded_with_its_digest(server: Server, pulled: str) -> None:
    done = server.run(image=pulled, script="test -s /big")
    assert done.code == 0, done
    lines = [line for line in done.words.splitlines() if f"pulling {pulled}" in line]
    assert 1 <= len(lines) <= 10
    row = server.jobs()[-1]
    full = server.job(str(row["id"]))
    assert re.fullmatch(r"127\.0\.0\.1:\d+/e2e/pulled@sha256:[0-9a-f]{64}", full["container"]["digest"])
    assert full["progress"] is None
    again = server.run(image=pulled.replace("pulled:1", "puled:1"), script="true")
    assert again.code == 1
    assert f"has no image {pulled.replace('pulled:1', 'puled:1')}. Did you mean {pulled}?" in again.words


def test_a_pull_on_a_terminal_has_a_bar_for_each_layer(server: Server, pulled: str) -> None:
    leader, follower = pty.openpty()
    job = json.dumps({"name": "e2e", "image": pulled, "command": ["true"], "mem_limit": "64m"})
    path = server.directory / "pull.yaml"
    path.write_text(job)
    process = subprocess.Popen(
        [GPUJOBS, "run", "--run-as", server.runner.name, path], stdin=follower, stdout=subprocess.PIPE, stderr=follower,
        env={"PATH": os.environ["PATH"], "HOME": "/root", "GPUJOBS_HOST": server.host, "TERM": "xterm",
             "COLUMNS": "100"},
    )  # fmt: skip
    os.close(follower)
    seen = b""
    try:
        while data := os.read(leader, 65536):
            seen += data
    except OSError:  # EIO: the other end is closed
        pass
    assert process.wait(60) == 0
    assert process.stdout is not None
    process.stdout.close()
    os.close(leader)
    text = seen.decode()
    layers = r"  [0-9a-f]{12} (Waiting|Downloading|Verifying Checksum|Download complete|Extracting|Already exists|Pull)"
    assert re.search(layers, text), text
    assert "\u2501" in text or "\u2578" in text, text
    assert "of 2 layers" in text


def test_dockerfile_cuda_builds_on_a_local_base_and_runs_as_the_submitter(
    server: Server, place: Place, alice: Account, lab: Engine
) -> None:
    images.ensure(lab, images.PYTHON)
    # What Debian's python3-venv adds to python3: the build then needs no network.
    base = place.path / "base"
    shutil.copytree("/usr/lib/python3.11/ensurepip", base / "ensurepip")
    shutil.copytree("/usr/share/python-wheels", base / "wheels")
    (base / "Dockerfile").write_text(
        f"FROM {images.PYTHON}\nCOPY ensurepip /usr/lib/python3.11/ensurepip\nCOPY wheels /usr/share/python-wheels\n"
    )
    lab.docker("build", "--tag", VENV_BASE, str(base))
    directory = place.volume(alice, "cuda")
    shutil.copy(ROOT / "Dockerfile.cuda", directory)
    (directory / "requirements.txt").write_text("")
    (directory / "train.py").write_text("print('trained')\n")
    (directory / "job.yaml").write_text(json.dumps({
        "name": "cuda", "mem_limit": "256m",
        "build": {"context": ".", "dockerfile": "Dockerfile.cuda", "args": {"BASE": VENV_BASE}},
        "command": ["python3", "-c", "import os, numpy, getpass; print(os.getuid(), getpass.getuser(), os.listdir())"],
    }))  # fmt: skip
    for path in (directory, *directory.iterdir()):
        os.chown(path, alice.uid, alice.gid)
    done: Done = server.cli("run", str(directory / "job.yaml"), user=alice, timeout=240)
    assert done.code == 0, done
    uid, name, _ = done.out.decode().split(maxsplit=2)
    assert (uid, name) == (str(alice.uid), alice.name)
    assert "train.py" in done.out.decode()
    assert "BuildKit" not in done.words
    image = server.job(str(server.jobs()[-1]["id"]))["container"]["image"]
    assert json.loads(lab.docker("inspect", image))[0]["Config"]["User"] not in ("", "0", "root", "0:0")
    default = server.cli("run", "--run-as", alice.name, "-", stdin=json.dumps(
        {"name": "again", "image": image, "mem_limit": "256m"}).encode())  # fmt: skip
    assert default.out == b"trained\n", default
