"""What an image brings along: variables, labels, health checks, volumes, users, groups, links."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest

from gpujobs.adapters.runner import DockerRunner
from tests.attacks.tools import Evil, output, shell, submitted, undefended
from tests.e2e.harness import BUSYBOX, HOSTILE, Place, Row, Server, inspect, run, wait_for
from tests.lab import images
from tests.lab.accounts import Account
from tests.lab.engine import Engine
from tests.lab.images import HOSTILE_MARK

VARIABLES = {
    "NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "all", "NVIDIA_MIG_CONFIG_DEVICES": "all",
    "NVIDIA_MIG_MONITOR_DEVICES": "all", "NVIDIA_IMEX_CHANNELS": "0", "NVIDIA_GDS": "enabled",
    "NVIDIA_MOFED": "enabled", "NVIDIA_REQUIRE_CUDA": "cuda>=11.0", "NVIDIA_DISABLE_REQUIRE": "1",
    "CUDA_MPS_PIPE_DIRECTORY": "/tmp/nvidia-mps", "LD_PRELOAD": "/proc/self/cwd/evil.so", "LD_AUDIT": "/evil.so",
    "LD_LIBRARY_PATH": "/evil", "GLIBC_TUNABLES": "glibc.malloc.check=3", "GCONV_PATH": "/evil",
    "GPUJOBS_JOB_ID": "666", "GPUJOBS_CHECKPOINT_DIR": "/evil",
}  # fmt: skip
START = "/proc/self/cwd/evil.sh"
EVIL_ENV = f"BASH_ENV={START} " + " ".join(f"{name}={value}" for name, value in VARIABLES.items())


# -- variables -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brought(evil: Callable[..., str]) -> str:
    labels = "LABEL gpujobs.server=forged gpujobs.nonce=forged gpujobs.job=666"
    return evil("variables", Evil(changes=(f"ENV {EVIL_ENV}", labels, "USER 0:0")))


@pytest.fixture(scope="module")
def plain_environment(lab: Engine, brought: str) -> dict[str, str]:
    done = undefended(lab, image=brought, command=shell("env; echo USER=$(id -u)"))
    return dict(line.partition("=")[::2] for line in done.out.decode().splitlines())


@pytest.fixture(scope="module")
def jobs_row(server: Server, alice: Account, brought: str) -> Row:
    row = submitted(server, alice, image=brought, gpus=1, command=["env"])
    assert row["state"] == "succeeded", row["message"]
    return row


@pytest.fixture(scope="module")
def engines_entries(lab: Engine, jobs_row: Row) -> list[str]:
    """The environment that the Engine has of that job's container."""
    return list(inspect(lab, jobs_row["container"]["id"])["Config"]["Env"])


@pytest.fixture(scope="module")
def inside(server: Server, jobs_row: Row) -> dict[str, str]:
    """The environment that its program had."""
    return dict(line.partition("=")[::2] for line in output(server, jobs_row).splitlines())


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_of_an_image_that_the_runtime_acts_on_does_not_reach_it(
    plain_environment: dict[str, str], engines_entries: list[str], inside: dict[str, str], name: str
) -> None:
    if name not in ("LD_PRELOAD", "NVIDIA_VISIBLE_DEVICES"):
        assert plain_environment[name] == VARIABLES[name]
    assert f"{name}={VARIABLES[name]}" not in engines_entries
    assert inside.get(name) != VARIABLES[name]


# What runc does with a hook of NVIDIA's toolkit: it runs it as root of the host in the container's mount namespace,
# with the container's environment.
HOOKED = {"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "hostname": "hooked",
          "process": {"user": {"uid": 5001, "gid": 5001}, "cwd": "/", "args": ["/bin/true"], "noNewPrivileges": True},
          "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
          "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]}}  # fmt: skip


def hooked(place: Place, name: str, root: Path, hook: list[str], environment: list[str]) -> str:
    """Run a container whose runtime has a createContainer hook; what its making left in the mark's file."""
    bundle = place.path / name
    bundle.mkdir()
    (bundle / "rootfs").symlink_to(root)
    bundle.joinpath("config.json").write_text(json.dumps({
        **HOOKED, "process": {**HOOKED["process"], "env": environment},  # type: ignore[dict-item]
        "root": {"path": str(root)}, "hooks": {"createContainer": [{"path": hook[0], "args": hook}]},
    }))  # fmt: skip
    done = run(["runc", "run", "--bundle", str(bundle), f"gpujobs-attack-{name}"], {})
    assert done.code == 0, done
    try:
        return HOSTILE_MARK.read_text()
    except FileNotFoundError:
        return ""
    finally:
        HOSTILE_MARK.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def unpacked(ground: Place) -> Path:
    """The hostile image's files, as a runtime has them under its feet."""
    root = ground.path / "unpacked"
    root.mkdir()
    subprocess.run(["tar", "-x", "-C", root, "-f", images.recipes()[HOSTILE].root()], check=True)
    script = root / "evil.sh"
    script.write_text(f'echo "uid $UID shell" >> {HOSTILE_MARK}\n')
    return root


def entries_of(lab: Engine, row: Row) -> list[str]:
    """The environment that the Engine has of a job's container: what hooks of the runtime are run with."""
    entries = inspect(lab, row["container"]["id"])["Config"]["Env"]
    return [entry for entry in entries if "=" in entry]  # one without takes the image's away


GIVEN = {
    "LD_PRELOAD": "/proc/self/cwd/evil.so", "LD_AUDIT": "/proc/self/cwd/evil.so", "BASH_ENV": START,
    "LD_LIBRARY_PATH": "/evil", "GLIBC_TUNABLES": "glibc.malloc.check=3", "GCONV_PATH": "/evil", "ENV": START,
    "PYTHONPATH": "/evil", "PATH": "/evil:/bin", "CUDA_MPS_PIPE_DIRECTORY": "/evil", "TOKEN": "hunter2",
}  # fmt: skip


@pytest.fixture(scope="module")
def steered(server: Server, alice: Account) -> Row:
    """A job whose file says what hooks must not see."""
    row = submitted(server, alice, script="echo $$BASH_ENV $$LD_AUDIT", environment=GIVEN)
    assert row["state"] == "succeeded", row["message"]
    return row


def test_a_library_of_an_image_does_not_run_as_root_in_a_hook_of_the_runtime(
    place: Place, unpacked: Path, lab: Engine, brought: str, jobs_row: Row
) -> None:
    brings = json.loads(lab.docker("image", "inspect", HOSTILE))[0]["Config"]["Env"]
    assert hooked(place, "plain", unpacked, ["/bin/true"], brings).startswith("uid 0 ")
    assert hooked(place, "job", unpacked, ["/bin/true"], entries_of(lab, jobs_row)) == ""


def test_a_library_of_a_job_file_does_not_run_as_root_in_a_hook_of_the_runtime(
    place: Place, unpacked: Path, lab: Engine, steered: Row
) -> None:
    plain = [f"LD_PRELOAD={GIVEN['LD_PRELOAD']}"]
    assert hooked(place, "plain", unpacked, ["/bin/true"], plain).startswith("uid 0 ")
    assert hooked(place, "job", unpacked, ["/bin/true"], entries_of(lab, steered)) == ""


@pytest.mark.parametrize("name", GIVEN)
def test_a_variable_of_a_job_file_reaches_neither_the_runtime_nor_its_hooks(
    lab: Engine, plain_environment: dict[str, str], steered: Row, name: str
) -> None:
    """`docker run --env` gives the Engine what it is told; hooks, and MPS where it is set up, act on such names."""
    assert "LD_AUDIT" in plain_environment
    assert name not in {entry.partition("=")[0] for entry in entries_of(lab, steered)}


@pytest.mark.parametrize("whose", ["jobs_row", "steered"], ids=["of an image", "of a job file"])
def test_a_start_file_for_shells_does_not_run_as_root_in_a_hook_that_is_a_script(
    place: Place, unpacked: Path, lab: Engine, whose: str, request: pytest.FixtureRequest
) -> None:
    hook = ["/bin/bash", "-c", "true"]
    assert hooked(place, "plain", unpacked, hook, [f"BASH_ENV={START}"]).startswith("uid 0 shell")
    assert hooked(place, "job", unpacked, hook, entries_of(lab, request.getfixturevalue(whose))) == ""


def test_what_hooks_must_not_see_reaches_the_program_all_the_same(
    server: Server, jobs_row: Row, steered: Row
) -> None:
    assert output(server, steered) == f"{START} {GIVEN['LD_AUDIT']}\n"
    assert f"BASH_ENV={START}" in output(server, jobs_row).splitlines()


def test_what_a_commit_of_the_container_would_keep_has_no_value_of_a_job_file(lab: Engine, steered: Row) -> None:
    """A committed image has the variables of the container's configuration: whoever gets the image has them."""
    made = lab.docker("create", "--env", "TOKEN=hunter2", BUSYBOX, "true").strip()
    try:
        kept = json.loads(lab.docker("image", "inspect", (image := lab.docker("commit", made).strip())))
        lab.docker("image", "rm", image)
        assert kept[0]["Config"]["Env"] == inspect(lab, made)["Config"]["Env"]
        assert "TOKEN=hunter2" in kept[0]["Config"]["Env"]
    finally:
        lab.docker("rm", made)
    config = json.dumps(inspect(lab, steered["container"]["id"]))
    assert "hunter2" not in config
    assert not [name for name in GIVEN if f'"{name}=' in config]


# -- labels, user, health check, volumes -----------------------------------------------------------------------


def test_labels_of_an_image_do_not_pass_for_ours(
    lab: Engine, brought: str, jobs_row: Row, server_id: str, alice: Account
) -> None:
    (image,) = json.loads(lab.docker("image", "inspect", brought))
    assert image["Config"]["Labels"]["gpujobs.nonce"] == "forged"
    labels = inspect(lab, jobs_row["container"]["id"])["Config"]["Labels"]
    assert (labels["gpujobs.server"], labels["gpujobs.owner"]) == (server_id, str(alice.uid))
    assert labels["gpujobs.job"] == str(jobs_row["id"])
    assert labels["gpujobs.nonce"] != "forged"


def test_the_user_of_an_image_is_not_the_jobs(
    lab: Engine, plain_environment: dict[str, str], server: Server, alice: Account, jobs_row: Row
) -> None:
    assert plain_environment["USER"] == "0"
    assert inspect(lab, jobs_row["container"]["id"])["Config"]["User"] == f"{alice.uid}:{alice.gid}"
    assert "USER=gjlab1" in output(server, jobs_row).splitlines()


@pytest.fixture(scope="module")
def shadowy(ground: Place) -> Path:
    """A file that group 42 may read, as /etc/shadow is."""
    directory = ground.path / "shadowy"
    directory.mkdir(mode=0o755)
    file = directory / "file"
    file.write_text("for group 42\n")
    os.chown(file, 0, 42)
    file.chmod(0o640)
    return directory


def checks(lab: Engine, label: str, began: float) -> int:
    """How many health checks of a container's the Engine has run."""
    shown = lab.docker("events", "--since", f"{began:.3f}", "--until", f"{time.time():.3f}", "--filter",
                       "event=exec_start", "--filter", f"label={label}")  # fmt: skip
    return len(shown.splitlines())


def volumes_of(lab: Engine, container: str) -> list[str]:
    return [mount["Name"] for mount in inspect(lab, container)["Mounts"] if mount["Type"] == "volume"]


def there(lab: Engine, volume: str) -> bool:
    return volume in lab.docker("volume", "ls", "--quiet").split()


@dataclass(frozen=True)
class Plain:
    """What came of the hostile image in a container of plain Docker."""

    read: str
    group_of_exec: str
    checks: int
    left: bool


@pytest.fixture(scope="module")
def plain(lab: Engine, alice: Account, shadowy: Path) -> Plain:
    """The hostile image by `docker run`, with alice's numbers."""
    began = time.time()
    made = lab.docker("run", "--detach", "--user", f"{alice.uid}:{alice.gid}", "--volume", f"{shadowy}:/e", "--label",
                      "attack=check", HOSTILE, "sh", "-c", "cat /e/file; sleep 60").strip()  # fmt: skip
    try:
        read = wait_for(lambda: lab.docker("logs", made), "it has read the file")
        group = lab.docker("exec", "--user", str(alice.uid), made, "id", "-g")
        ran = wait_for(lambda: n if (n := checks(lab, "attack=check", began)) > 2 else 0, "the checks run")
        (volume,) = volumes_of(lab, made)
    finally:
        lab.docker("rm", "--force", made)
    left = there(lab, volume)
    lab.docker("volume", "rm", volume)
    HOSTILE_MARK.unlink(missing_ok=True)
    return Plain(read, group.strip(), ran, left)


@pytest.fixture(scope="module")
def defended(server: Server, alice: Account, shadowy: Path) -> Row:
    """The same as a job of alice's."""
    return submitted(server, alice, image=HOSTILE, script="id -G; cat /e/file; sleep 1", volumes=[f"{shadowy}:/e:ro"])


def test_a_health_check_of_an_image_does_not_keep_the_engine_busy(lab: Engine, plain: Plain, defended: Row) -> None:
    assert plain.checks > 2
    began = datetime.fromisoformat(defended["started_at"]).timestamp()
    assert checks(lab, f"gpujobs.job={defended['id']}", began - 1) == 0


async def remove(lab: Engine, container: str, ground: Place) -> None:
    """As the server does it."""
    engine = DockerRunner(lab.host, ground.path / "none", ground.path)
    try:
        await engine.remove(container)
    finally:
        engine.close()


def test_a_volume_of_an_image_goes_with_its_container(
    lab: Engine, plain: Plain, server: Server, alice: Account, ground: Place
) -> None:
    assert plain.left
    row = submitted(server, alice, image=HOSTILE, script="true")
    (anonymous,) = volumes_of(lab, row["container"]["id"])
    asyncio.run(remove(lab, row["container"]["id"], ground))
    assert not there(lab, anonymous)


# -- whose an image is ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bobs_image(lab: Engine, evil: Callable[..., str], bob: Account, ground: Place) -> Iterator[dict[str, str]]:
    """An image that bob built, labelled and without a name as builds are, by each word that the Engine takes for it."""
    base = evil("letter", Evil(files={"secret": "bob's letter\n"}))
    (context := ground.path / "bobs-context").mkdir()
    (context / "Dockerfile").write_text(f"FROM {base}\nLABEL gpujobs.owner={bob.uid}\n")
    full = lab.docker("build", "--quiet", "--rm", str(context)).strip()
    digits = full.removeprefix("sha256:")
    yield {"its id": full, "its id's digits": digits, "its id's first digits": digits[:12]}
    lab.docker("image", "rm", "--force", full)


@pytest.fixture(scope="module")
def read_by_docker(lab: Engine, bobs_image: dict[str, str]) -> bytes:
    """What is in it, for whoever asks plain Docker by the first digits of its id."""
    return undefended(lab, image=bobs_image["its id's first digits"], command=("cat", "/secret")).out


BY = ("its id", "its id's digits", "its id's first digits")


@pytest.mark.parametrize("word", BY)
def test_an_image_that_another_account_built_runs_by_no_word_for_it(
    lab: Engine, server: Server, alice: Account, bobs_image: dict[str, str], read_by_docker: bytes, word: str
) -> None:
    assert read_by_docker == b"bob's letter\n"
    found = lab.docker("image", "inspect", "--format", "{{.Id}}", bobs_image[word]).strip()
    assert found == bobs_image["its id"], "the Engine takes it"
    done = server.run(user=alice, image=bobs_image[word], script="cat /secret", timeout=120)
    assert (done.code, done.out) in ((1, b""), (2, b"")), done
    if word == BY[0]:
        assert "was built by another account" in done.words


DOCKERFILES = {
    "FROM": "FROM {id}\nCOPY Dockerfile /d\n",
    "FROM an argument": "ARG BASE={id}\nFROM $BASE\nCOPY Dockerfile /d\n",
    "FROM an argument in another": "ARG A={id}\nARG BASE=${{A}}\nFROM ${{BASE:-scratch}}\nCOPY Dockerfile /d\n",
    "COPY --from": "FROM gpujobs-lab/busybox:1\nCOPY --from={id} /secret /stolen\n",
    "COPY --from first digits": "FROM gpujobs-lab/busybox:1\nCOPY --from={digits} /secret /stolen\n",
    "ONBUILD of a base": "FROM gpujobs-attack/trap:1\n",
}


@pytest.fixture(scope="module")
def built_by_docker(
    lab: Engine, evil: Callable[..., str], bobs_image: dict[str, str], ground: Place
) -> tuple[dict[str, str], list[str]]:
    """These Dockerfiles, and which of them plain Docker builds."""
    words = {"id": bobs_image["its id"], "digits": bobs_image["its id's first digits"]}
    evil("trap", Evil(changes=(f"ONBUILD COPY --from={words['id']} /secret /stolen",)))
    files = {way: text.format(**words) for way, text in DOCKERFILES.items()}
    context, built = ground.path / "context", []
    context.mkdir()
    for way, text in files.items():
        (context / "Dockerfile").write_text(text)
        lab.docker("image", "rm", "--no-prune", lab.docker("build", "--quiet", "--rm", str(context)).strip())
        built.append(way)
    return files, built


@pytest.mark.parametrize("way", DOCKERFILES)
def test_a_build_takes_nothing_of_an_image_that_another_account_built(
    server: Server, alice: Account, volume: Path, built_by_docker: tuple[dict[str, str], list[str]], way: str
) -> None:
    files, built = built_by_docker
    assert way in built
    (volume / "Dockerfile").write_text(files[way])
    file = volume / "job.yaml"
    file.write_text("name: t\nbuild: .\ncommand: [cat, /secret, /stolen]\nmem_limit: 64m\n")
    done = server.cli("run", str(file), user=alice, timeout=120)
    assert (done.code, done.out) == (1, b""), done
    row = server.jobs()[-1]
    assert (row["state"], row["reason"], row["started_at"]) == ("failed", "image", None), row


# -- groups ----------------------------------------------------------------------------------------------------


def test_a_group_file_of_an_image_hands_out_no_group_of_the_host(plain: Plain, server: Server, defended: Row) -> None:
    """The line ``5001:x:42:`` makes group 42 of the number 5001."""
    assert plain.read == "for group 42\n"
    assert "for group 42" not in output(server, defended)
    assert "42" not in output(server, defended).split()


def test_further_groups_are_not_remapped_either(lab: Engine, server: Server, alice: Account, evil: Callable[..., str],
                                                shadowy: Path) -> None:  # fmt: skip
    gid = next(group for group in os.getgrouplist(alice.name, alice.gid) if group != alice.gid)
    image = evil("groups", Evil(files={"etc/group": f"{gid}:x:42:\n"}))
    done = undefended(lab, "--user", f"{alice.uid}:{alice.gid}", "--group-add", str(gid), "--volume",
                      f"{shadowy}:/e", image=image, command=("cat", "/e/file"))  # fmt: skip
    assert done.out == b"for group 42\n"
    row = submitted(server, alice, image=image, script="id -G; cat /e/file", volumes=[f"{shadowy}:/e:ro"])
    if row["state"] == "failed" and row["reason"] == "isolation":
        assert row["message"].startswith("its program never ran"), row
    assert "for group 42" not in output(server, row)
    assert "42" not in output(server, row).split()


def test_a_health_check_of_the_job_runs_as_the_job_and_not_with_root_as_its_group(
    plain: Plain, server: Server, alice: Account, volume: Path
) -> None:
    assert plain.group_of_exec == "0"
    row = submitted(
        server, alice, image=HOSTILE, volumes=[f"{volume}:/v"],
        script="for i in $$(seq 100); do [ -s /v/check ] && exit 0; sleep 0.1; done; exit 1",
        healthcheck={"test": "(id -u; id -G) > /v/new; mv /v/new /v/check", "interval": "1s"},
    )  # fmt: skip
    assert row["state"] == "succeeded", row["message"]
    uid, *groups = (volume / "check").read_text().split()
    assert uid == str(alice.uid)
    assert "42" not in groups
    assert "0" not in groups


# -- links -----------------------------------------------------------------------------------------------------

LINKED = {
    "a volume's target": {"home/data": "/e/planted"},
    "our own files": {"etc/passwd": "/e/planted"},
}


@pytest.mark.parametrize("what", LINKED)
def test_a_link_of_an_image_makes_nothing_in_a_directory_of_roots(
    lab: Engine, server: Server, alice: Account, evil: Callable[..., str], roots: Path, volume: Path, what: str
) -> None:
    """The runtime makes mount points as root, also where a link of the image leads into a volume."""
    image = evil(re.sub(r"\W+", "-", what.lower()), Evil(links=LINKED[what]))
    mounts = ("--volume", f"{roots}:/e", "--volume", f"{volume}:/home/data")
    if "passwd" in str(LINKED[what]):
        (volume / "passwd").touch()
        mounts += ("--volume", f"{volume}/passwd:/etc/passwd")
    done = undefended(lab, *mounts, "--user", f"{alice.uid}:{alice.gid}", image=image)
    planted = roots / "planted"
    assert planted.exists(), done
    planted.rmdir() if planted.is_dir() else planted.unlink()
    row = submitted(server, alice, image=image, script="true", volumes=[f"{roots}:/e", f"{volume}:/home/data"])
    assert (row["state"], row["started_at"]) == ("failed", None)
    assert "read-only file system" in row["message"]
    assert not planted.exists()


def test_a_link_of_an_image_leads_no_volume_over_the_init(
    lab: Engine, server: Server, alice: Account, evil: Callable[..., str], volume: Path, ground: Place
) -> None:
    """Where the init lies cannot be known before: a link to it cannot be in an image."""
    image = evil("init", Evil(links={"home/data": "/.gpujobs"}))
    (volume / "init").write_text("#!/bin/sh\necho not the init\n")
    (volume / "init").chmod(0o755)
    binds = ("--volume", f"{ground.path}:/.gpujobs:ro", "--volume", f"{volume}:/home/data")
    done = undefended(lab, *binds, "--entrypoint", "/.gpujobs/init", image=image)
    assert done.out == b"not the init\n", done
    row = submitted(server, alice, image=image, script="echo the program", volumes=[f"{volume}:/home/data"])
    assert (row["state"], output(server, row)) == ("succeeded", "the program\n")


def test_a_working_directory_of_an_image_makes_nothing_in_a_directory_of_roots(
    lab: Engine, server: Server, alice: Account, evil: Callable[..., str], roots: Path
) -> None:
    image = evil("workdir", Evil(changes=("WORKDIR /e/planted",)))
    undefended(lab, "--volume", f"{roots}:/e", "--user", f"{alice.uid}:{alice.gid}", image=image)
    (roots / "planted").rmdir()
    done = server.run(user=alice, image=image, script="true", volumes=[f"{roots}:/e"])
    assert done.code == 1
    assert "permission denied for gjlab1" in done.words
    assert not (roots / "planted").exists()


def test_a_program_of_an_image_called_like_ours_is_not_run_instead(
    lab: Engine, server: Server, alice: Account, evil: Callable[..., str]
) -> None:
    image = evil("entrypoint", Evil(changes=('ENTRYPOINT ["/bin/echo", "instead"]',)))
    assert undefended(lab, image=image).out == b"instead true\n"
    row = submitted(server, alice, image=image, command=["id", "-u"], entrypoint=[])
    assert output(server, row) == f"{alice.uid}\n"
    found = inspect(lab, row["container"]["id"])["Config"]["Entrypoint"]
    assert found[0].startswith("/.gpujobs-")
