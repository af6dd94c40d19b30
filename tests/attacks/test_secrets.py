"""Secrets of jobs: who may read them, where they stay, and what a job file could have root read or write for it."""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.attacks.tools import Evil, output, raw, request, submitted, undefended
from tests.e2e.harness import BUSYBOX, Place, Row, Server, inspect, run, spec, wait_for
from tests.lab.accounts import Account, command_as
from tests.lab.engine import Engine

VALUE = "hunter2-of-alice"
FORMS = (VALUE.encode(), base64.b64encode(VALUE.encode())[:20])


@pytest.fixture
def key(place: Place, alice: Account) -> Path:
    """A file that alice alone can read."""
    path = place.volume(alice, "keys") / "key"
    path.write_text(VALUE)
    os.chown(path, alice.uid, alice.gid)
    path.chmod(0o600)
    return path


@pytest.fixture
def waiting(server: Server, alice: Account, key: Path) -> Iterator[Row]:
    """A job of alice's that runs with a secret until the test is over."""
    job = server.submit(user=alice, cpus=0.1, secrets={"key": {"file": str(key), "variable": "TOKEN"}}, name="alices",
                        script="while [ ! -e /tmp/end ]; do sleep 0.2; done")  # fmt: skip
    yield server.until(job, "running")
    server.cli("cancel", job)
    server.ended(job)


def has(content: bytes) -> bool:
    return any(form in content for form in FORMS)


def first_process(lab: Engine, row: Row) -> int:
    pid = int(inspect(lab, row["container"]["id"])["State"]["Pid"])
    wait_for(lambda: Path(f"/proc/{pid}/root/run/secrets/key").exists(), "the secret is there")
    return pid


# -- where they stay -------------------------------------------------------------------------------------------------


def test_a_secret_is_not_in_the_engines_configuration_where_a_variable_is(lab: Engine, waiting: Row) -> None:
    found = lab.docker("create", "--env", f"TOKEN={VALUE}", BUSYBOX).strip()
    assert has(lab.docker("inspect", found).encode())
    lab.docker("rm", found)
    assert not has(lab.docker("inspect", waiting["container"]["id"]).encode())


def test_a_secret_is_not_in_an_image_that_is_committed_where_a_file_in_the_layer_is(
    lab: Engine, waiting: Row, committed_by_a_test: set[str]
) -> None:
    found = lab.docker("create", BUSYBOX, "sh", "-c", f"mkdir -p /run/secrets; echo {VALUE[:8]}$0 > /run/secrets/key",
                       VALUE[8:]).strip()  # fmt: skip
    lab.docker("start", "--attach", found)

    def committed(container: str) -> bool:
        image = lab.docker("commit", container).strip()
        made = lab.docker("create", image).strip()
        done = run(["docker", "export", made], {"DOCKER_HOST": lab.host})
        lab.docker("rm", made)
        lab.docker("image", "rm", image)
        return has(done.out)

    assert committed(found)
    lab.docker("rm", found)
    first_process(lab, waiting)
    committed_by_a_test.add(waiting["container"]["name"])
    assert not committed(waiting["container"]["id"])


def test_an_image_that_leads_their_place_into_a_volume_gets_none_of_them(
    server: Server, lab: Engine, evil: Callable[..., str], alice: Account, key: Path, volume: Path
) -> None:
    """Else whoever else may read the volume has them, and they outlive the job."""
    image = evil("secrets-link", Evil(links={"/run/secrets": "/v"}))
    done = undefended(lab, f"--volume={volume}:/v", image=image,
                      command=("sh", "-c", f"echo {VALUE} > /run/secrets/key"))  # fmt: skip
    assert done.code == 0, done
    assert has((volume / "key").read_bytes())
    (volume / "key").unlink()
    row = submitted(server, alice, image=image, secrets={"key": {"file": str(key)}}, volumes=[f"{volume}:/v"],
                    command=["true"])  # fmt: skip
    assert list(volume.iterdir()) == []
    assert (row["state"], row["exit_code"]) == ("failed", 125), row


def test_a_volume_in_their_place_is_refused(server: Server, lab: Engine, alice: Account, volume: Path) -> None:
    done = undefended(lab, f"--volume={volume}:/run/secrets", command=("sh", "-c", f"echo {VALUE} > /run/secrets/key"))
    assert done.code == 0, done
    assert has((volume / "key").read_bytes())
    for target in ("/run/secrets", "/run//secrets/key", "/var/run/secrets", "/run/x/../secrets"):
        text = spec(secrets=["HOME"], volumes=[f"{volume}:{target}"])
        done = server.cli("submit", "-", user=alice, stdin=text)
        assert (done.code, done.out) == (2, b""), done
        assert "the secrets are at /run/secrets" in done.words


def test_nothing_that_the_server_shows_or_says_has_the_value(
    server: Server, alice: Account, waiting: Row, key: Path
) -> None:
    """A variable of `environment` is shown to its owner; a secret to nobody."""
    job = server.submit(user=alice, environment={"TOKEN": VALUE}, script="true", cpus=0.1)
    assert has(server.cli("show", job, "--json", user=alice).out)
    number = str(waiting["id"])
    for path in (f"/v1/jobs/{number}", "/v1/jobs?all=1", f"/v1/jobs/{number}/logs", "/v1/gpus", "/v1/server"):
        answer = raw(server, None, request("GET", path))
        assert answer.status == 200, answer
        assert not has(answer.text.encode()), path
    text = spec(secrets={"key": {"file": str(key)}})
    assert not has(server.cli("plan", "--json", "-", user=alice, stdin=text).out)
    assert not has(server.said.encode())
    server.ended(job)


# -- who may read them -----------------------------------------------------------------------------------------------


def test_another_account_reads_no_secret_of_a_job_that_runs(
    server: Server, lab: Engine, alice: Account, bob: Account, waiting: Row
) -> None:
    open_to_all = subprocess.Popen(command_as(alice, ["sh", "-c", "umask 0; cat > /tmp/gpujobs-attack-open; sleep 60"]),
                                   stdin=subprocess.PIPE)  # fmt: skip
    assert open_to_all.stdin is not None
    open_to_all.stdin.write(VALUE.encode())
    open_to_all.stdin.close()
    try:
        assert wait_for(lambda: run(["cat", "/tmp/gpujobs-attack-open"], {}, user=bob).out, "it is there")
    finally:
        open_to_all.kill()
        open_to_all.wait()
        Path("/tmp/gpujobs-attack-open").unlink()
    pid = first_process(lab, waiting)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    places = [f"/proc/{p}/{name}" for p in (str(pid), *children) for name in ("root/run/secrets/key", "environ", "mem")]
    places += [str(path) for path in server.state.rglob("secrets")]
    places += [str(path) for path in (server.state / "secrets").iterdir()]
    assert len(places) >= 8
    for path in places:
        assert Path(path).exists()
        done = run(["cat", path], {}, user=bob)
        assert (done.code, done.out) == (1, b""), (path, done)
    assert not has(server.cli("show", str(waiting["id"]), "--json", user=bob).out)


def test_a_job_cannot_mount_what_another_jobs_init_is_handed(
    server: Server, lab: Engine, bob: Account, waiting: Row
) -> None:
    (handed,) = [path for path in (server.state / "attempts").glob("*/secrets") if path.is_file()]
    done = undefended(lab, f"--volume={handed.parent}:/v", command=("cat", "/v/secrets"))
    assert has(done.out)
    row = submitted(server, bob, volumes=[f"{handed.parent}:/v"], script="cat /v/secrets")
    assert row["state"] == "failed"
    assert not has(output(server, row).encode())


def test_a_job_of_somebody_elses_is_not_run_again_with_their_secrets(
    server: Server, bob: Account, waiting: Row
) -> None:
    answer = raw(server, bob, request("POST", f"/v1/jobs/{waiting['id']}/rerun", {}))
    assert answer.status == 403, answer
    answer = raw(server, None, request("POST", f"/v1/jobs/{waiting['id']}/rerun", {}))
    assert (answer.status, answer.body["exit"]) == (403, 3), answer
    assert "has secrets, which are not kept for another job" in answer.body["message"]


# -- what a job file could have others read and write ----------------------------------------------------------------


def test_a_file_of_roots_is_no_secret(server: Server, lab: Engine, alice: Account, roots: Path) -> None:
    """Compose has its daemon, which is root, mount the file: it is read whoever asks."""
    done = undefended(lab, f"--volume={roots}/secret:/run/secrets/key", command=("cat", "/run/secrets/key"))
    assert done.out == b"root's secret\n"
    done = server.cli("submit", "-", user=alice, stdin=spec(secrets={"key": {"file": f"{roots}/secret"}}))
    assert (done.code, done.out) == (2, b""), done
    assert f"{roots}/secret: Permission denied" in done.words


def test_roots_client_reads_no_file_for_a_job_file_of_somebody_elses(
    server: Server, alice: Account, roots: Path
) -> None:
    """``--run-as`` takes a job file that its user may have written."""
    assert run(["cat", f"{roots}/secret"], {}).out == b"root's secret\n"
    text = spec(secrets={"key": {"file": f"{roots}/secret"}})
    done = server.cli("submit", "--run-as", alice.name, "-", stdin=text)
    assert (done.code, done.out) == (2, b""), done
    assert "with --run-as there are none" in done.words
    entry = {"text": text.decode(), "directory": "/", "secrets": {"key": {"value": "eA=="}}}
    answer = raw(server, None, request("POST", "/v1/jobs", {"files": [entry], "run_as": alice.name}))
    assert (answer.status, answer.body["exit"]) == (403, 3), answer


@pytest.mark.parametrize("name", ["../../tmp/x", "..", ".", "/etc/x", "a/b", ""])
def test_a_name_of_a_secret_makes_no_path_elsewhere(server: Server, alice: Account, name: str) -> None:
    """A reader that trusted it would write there: the init does so as the user, the server as root."""
    assert Path(os.path.normpath(f"/run/secrets/{name}")).parent != Path("/run/secrets")
    entries = ({name: {"environment": "HOME"}}, {"a": {"environment": "HOME", "target": name}})
    for secrets in entries:
        body = {"files": [{"text": spec(secrets=secrets).decode(), "directory": "/",
                           "secrets": {key: {"value": "eA=="} for key in secrets}}]}  # fmt: skip
        answer = raw(server, alice, request("POST", "/v1/jobs", body))
        assert (answer.status, answer.body["exit"]) == (400, 2), answer


@pytest.mark.parametrize(
    ("secrets", "status"),
    [
        ({"key": {"value": base64.b64encode(b"x" * ((256 << 10) + 1)).decode()}}, 403),
        ({"key": {"value": "no base 64!"}}, 400),
        ({"key": {"value": 5}}, 400),
        ({"key": {"value": {}}}, 400),
        ({"key": "eA=="}, 400),
        (["key"], 400),
        ({"key": {}}, 403),
        ({}, 400),
        ({"other": {"value": "eA=="}}, 400),
    ],
)
def test_what_no_client_of_ours_sends_is_refused(
    server: Server, alice: Account, secrets: object, status: int
) -> None:
    text = spec(secrets={"key": {"file": "/k"}}, script="true", cpus=0.1).decode()
    good = {"text": text, "directory": "/", "secrets": {"key": {"value": "eA=="}}}
    answer = raw(server, alice, request("POST", "/v1/jobs", {"files": [good]}))
    assert answer.status == 201, answer
    server.ended(str(answer.body["jobs"][0]["id"]))
    before = {path.name for path in (server.state / "secrets").iterdir()}
    answer = raw(server, alice, request("POST", "/v1/jobs", {"files": [{**good, "secrets": secrets}]}))
    assert answer.status == status, answer
    assert {path.name for path in (server.state / "secrets").iterdir()} <= before
