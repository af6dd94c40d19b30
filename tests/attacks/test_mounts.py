"""Volumes: what a shell would give the same account, and no more; paths of others, of root, of the server."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.tools import output, raw, request, shell, submission, submitted, undefended
from tests.e2e.harness import Place, Server, inspect, spec
from tests.lab.accounts import Account
from tests.lab.engine import Engine


@pytest.fixture(scope="module")
def bobs(ground: Place, bob: Account) -> Path:
    """A directory that anybody might enter, were it not in one of bob's that is his alone."""
    private = ground.volume(bob, "bobs")
    (private / "below").mkdir()
    (private / "below").chmod(0o777)
    (private / "below/letter").write_text("bob's letter\n")
    return private / "below"


@pytest.fixture(scope="module")
def sealed(ground: Place) -> Path:
    """A file that is root's alone, in a directory that everybody may look into."""
    file = ground.path / "sealed"
    file.write_text("root's secret\n")
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def link(ground: Place, alice: Account, bobs: Path) -> Path:
    """A link of alice's to what is bob's."""
    found = ground.volume(alice, "links") / "link"
    found.symlink_to(bobs)
    return found


@pytest.fixture(scope="module")
def private(ground: Place) -> Path:
    """A directory that is root's alone, as /root is."""
    directory = ground.path / "private"
    directory.mkdir(mode=0o700)
    (directory / "secret").touch()
    return directory


@pytest.fixture(scope="module")
def named(lab: Engine, private: Path) -> Iterator[str]:
    """A named volume that is a directory of root's: driver options of Docker's own driver make one."""
    name = "gpujobs-attack-options"
    lab.docker("volume", "create", "--opt", "type=none", "--opt", "o=bind", "--opt", f"device={private}", name)
    yield name
    lab.docker("volume", "rm", name)


SMUGGLED = "/t:exec,suid,dev,uid=0,mode=4777"


@pytest.fixture(scope="module")
def shown(lab: Engine, bobs: Path, sealed: Path, link: Path, named: str) -> dict[str, str]:
    """What a container shows to which plain Docker gives them all: it resolves a source as root, who needs no key."""
    sources = {"below": bobs, "file": sealed, "link": link, "named": named}
    options = [part for name, source in sources.items() for part in ("--volume", f"{source}:/{name}")]
    looks = ("cat /below/letter", "cat /file", "cat /link/letter", "ls /named", "grep ' /t ' /proc/mounts")
    script = "; echo --; ".join(looks)
    done = undefended(lab, *options, "--tmpfs", SMUGGLED, command=shell(script))
    assert done.code == 0, done
    return dict(zip([*sources, "tmpfs"], done.out.decode().split("--\n"), strict=True))


def refused(server: Server, alice: Account, source: object, *words: str) -> None:
    """A job with that volume never runs, and its end says why."""
    done = server.run(user=alice, script="ls /v; cat /v/*", volumes=[f"{source}:/v:ro"])
    assert (done.code, done.out) == (1, b""), done
    assert str(source) in done.words
    assert any(word in done.words for word in words), done.words
    assert server.jobs()[-1]["started_at"] is None


def test_a_directory_below_another_accounts_private_one_is_no_volume(
    shown: dict[str, str], server: Server, alice: Account, bobs: Path
) -> None:
    assert shown["below"] == "bob's letter\n"
    refused(server, alice, bobs, "permission denied for gjlab1")


def test_a_file_of_roots_is_no_volume(shown: dict[str, str], server: Server, alice: Account, sealed: Path) -> None:
    assert shown["file"] == "root's secret\n"
    refused(server, alice, sealed, "permission denied for gjlab1")


def test_a_link_to_what_an_account_cannot_open_is_no_volume(
    shown: dict[str, str], server: Server, alice: Account, link: Path
) -> None:
    assert shown["link"] == "bob's letter\n"
    refused(server, alice, link, "permission denied for gjlab1")


def test_a_link_that_is_swapped_while_jobs_are_made_leads_nowhere_else(
    server: Server, alice: Account, bobs: Path, volume: Path
) -> None:
    """Whatever it shows at the instant: what was opened as alice is what is mounted. (The test before this shows where
    Docker goes by such a link.)
    """
    mine, swapped, over = volume / "mine", volume / "swapped", threading.Event()
    mine.mkdir()
    (mine / "letter").write_text("alice's own\n")
    swapped.symlink_to(bobs)

    def swap() -> None:
        number = 0
        while not over.wait(0.001):
            new, number = volume / "new", number + 1
            new.symlink_to(mine if number % 2 else bobs)
            new.replace(swapped)

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        jobs = [server.submit(user=alice, script="cat /v/letter", volumes=[f"{swapped}:/v:ro"]) for _ in range(2)]
        rows = [server.ended(job) for job in jobs]
    finally:
        over.set()
        swapping.join()
    for row in rows:
        told = output(server, row) if row["started_at"] else ""
        assert told in ("", "alice's own\n"), row


OURS = {
    "/dev": ("null", "the kernel's own"),
    "/proc/{pid}": ("environ", "the kernel's own"),
    "/sys": ("kernel", "the kernel's own"),
    "{state}": ("state.sqlite", "permission denied"),
    "/run/gpujobs/pins": (".", "permission denied"),
    "{socket}": ("", "socket"),
    "{engine}": ("", "socket"),
    "{data}": ("containers", "permission denied"),
}
"""What is nobody's to mount: with what is seen there by who can, and how it is refused."""


@pytest.fixture(scope="module")
def ours(lab: Engine, server: Server) -> dict[str, str]:
    root = json.loads(lab.docker("info", "--format", "{{json .DockerRootDir}}"))
    engine = lab.host.removeprefix("unix://")
    return {source: source.format(pid=server.pid, state=server.state, socket=server.socket, data=root, engine=engine)
            for source in OURS}  # fmt: skip


@pytest.fixture(scope="module")
def seen_by_docker(lab: Engine, ours: dict[str, str]) -> list[str]:
    """Which of them are in a container to which plain Docker gives all."""
    shown = [part for number, path in enumerate(ours.values()) for part in ("--volume", f"{path}:/v{number}")]
    names = [f"/v{number}/{shows}".rstrip("/") for number, (shows, _) in enumerate(OURS.values())]
    done = undefended(lab, *shown, command=("ls", "-d", *names))
    assert done.code == 0, done
    return [list(OURS)[names.index(line)] for line in done.out.decode().splitlines()]


@pytest.mark.parametrize("source", OURS)
def test_what_is_the_kernels_or_the_servers_is_no_volume(
    server: Server, alice: Account, ours: dict[str, str], seen_by_docker: list[str], source: str
) -> None:
    assert source in seen_by_docker
    refused(server, alice, ours[source], OURS[source][1], "belongs to the server itself")


KINDS = {
    "a pipe": ("pipe", lambda path: os.mkfifo(path, 0o666), "is a named pipe: only"),
    "a device": ("node", lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(195, 7)), "is a device: only"),
    "a socket": ("sock", lambda path: os.mknod(path, stat.S_IFSOCK | 0o666), "is a socket: only"),
}


@pytest.fixture(scope="module")
def kinds(ground: Place, alice: Account) -> dict[str, Path]:
    """Files of alice's that are none, and one that is not there."""
    directory = ground.volume(alice, "kinds")
    for name, make, _ in KINDS.values():
        make(directory / name)
        os.chown(directory / name, alice.uid, alice.gid)
    return {**{what: directory / name for what, (name, _, _) in KINDS.items()}, "nothing": directory / "nothing"}


@pytest.fixture(scope="module")
def taken_by_docker(lab: Engine, kinds: dict[str, Path]) -> list[str]:
    """The kinds of file that a container sees to which plain Docker gives them, and who owns what was not there."""
    shown = [part for number, path in enumerate(kinds.values()) for part in ("--volume", f"{path}:/v{number}")]
    done = undefended(lab, *shown, command=("ls", "-ldn", *(f"/v{number}" for number in range(len(kinds)))))
    assert done.code == 0, done
    made = kinds["nothing"]
    owner = made.stat().st_uid
    made.rmdir()
    return [*(line[0] for line in done.out.decode().splitlines()), str(owner)]


@pytest.mark.parametrize("what", KINDS)
def test_a_file_that_is_none_is_no_volume_also_where_it_is_ones_own(
    server: Server, alice: Account, kinds: dict[str, Path], taken_by_docker: list[str], what: str
) -> None:
    """A pipe holds up whoever opens it, a device opens what its numbers say, a socket is somebody's service."""
    assert taken_by_docker[:3] == ["p", "c", "s"]
    refused(server, alice, kinds[what], KINDS[what][2])


def test_a_source_that_is_not_there_is_not_made_as_root(
    server: Server, alice: Account, kinds: dict[str, Path], taken_by_docker: list[str]
) -> None:
    assert taken_by_docker[3:] == ["d", "0"]
    refused(server, alice, kinds["nothing"], "no such directory")
    assert not kinds["nothing"].exists()


@pytest.fixture(scope="module")
def planted_by_docker(lab: Engine, ground: Place, alice: Account) -> dict[str, int]:
    """Who owns what a container of plain Docker's left in a directory of root's: the runtime makes, as root, what is
    missing of mount points and working directories, also where a link leads there.
    """
    directory, volume = ground.path / "planted-in", ground.volume(alice, "leads")
    directory.mkdir(mode=0o755)
    (volume / "in").symlink_to("/e/by-link")
    done = undefended(
        lab, "--user", f"{alice.uid}:{alice.gid}", "--volume", f"{directory}:/e", "--volume", f"{volume}:/e/by-mount",
        "--volume", f"{volume}:/a", "--volume", f"{volume}:/a/in", "--workdir", "/e/by-workdir",
    )  # fmt: skip
    assert done.code == 0, done
    return {path.name: path.stat().st_uid for path in directory.iterdir()}


def test_a_volume_within_a_volume_makes_nothing_in_a_directory_of_roots(
    planted_by_docker: dict[str, int], server: Server, alice: Account, roots: Path, volume: Path
) -> None:
    assert planted_by_docker["by-mount"] == 0
    done = server.run(user=alice, script="true", volumes=[f"{roots}:/e", f"{volume}:/e/planted"])
    assert done.code == 1
    assert "permission denied for gjlab1" in done.words
    assert not (roots / "planted").exists()


def test_a_working_directory_makes_nothing_in_a_directory_of_roots(
    planted_by_docker: dict[str, int], server: Server, alice: Account, roots: Path
) -> None:
    assert planted_by_docker["by-workdir"] == 0
    done = server.run(user=alice, script="true", volumes=[f"{roots}:/e"], working_dir="/e/planted")
    assert done.code == 1
    assert "permission denied for gjlab1" in done.words
    assert not (roots / "planted").exists()


def test_mount_points_and_working_directories_in_ones_own_volume_are_ones_own(
    lab: Engine, server: Server, alice: Account, volume: Path
) -> None:
    row = submitted(server, alice, script="touch here; pwd", volumes=[f"{volume}:/w", f"{volume}:/w/in"],
                    working_dir="/w/new/place")  # fmt: skip
    assert (row["state"], output(server, row)) == ("succeeded", "/w/new/place\n")
    owners = {path.stat().st_uid for path in volume.rglob("*")}
    assert owners == {alice.uid}
    assert (volume / "in").is_dir()
    assert (volume / "new/place/here").exists()


def test_a_mount_point_made_by_race_in_a_directory_of_roots_is_not_made(
    planted_by_docker: dict[str, int], server: Server, alice: Account, roots: Path, volume: Path
) -> None:
    """A link in the volume, put there after the server has looked, leads the runtime into the other volume."""
    assert planted_by_docker["by-link"] == 0
    (volume / "in").symlink_to("/e/planted")
    row = submitted(server, alice, script="true", volumes=[f"{roots}:/e", f"{volume}:/a", f"{volume}:/a/in"])
    assert (row["state"], row["started_at"]) == ("failed", None), row
    assert not (roots / "planted").exists()


def test_a_named_volume_is_a_directory_of_ones_own_whatever_the_engine_has_of_that_name(
    shown: dict[str, str], lab: Engine, server: Server, alice: Account, named: str, private: Path
) -> None:
    assert shown["named"].split() == ["secret"]
    row = submitted(server, alice, script="ls -A /v; touch /v/mine", volumes=[f"{named}:/v"])
    assert row["state"] == "succeeded", row
    assert output(server, row) == ""
    mounts = inspect(lab, row["container"]["id"])["Mounts"]
    assert not [mount for mount in mounts if mount["Type"] == "volume"]
    assert not (private / "mine").exists()
    ours = alice.home / ".local/share/gpujobs/volumes" / named
    assert (ours / "mine").stat().st_uid == alice.uid
    shutil.rmtree(ours)


@pytest.mark.parametrize(
    ("volume_of", "words"),
    [
        ("../x:/v", ""),
        ("a/../../b:/v", "neither a path nor a volume's name"),
        ("a..b/../..:/v", "neither a path nor a volume's name"),
        ({"type": "volume", "source": "../../etc", "target": "/v"}, "is a path"),
        ({"type": "volume", "source": "x", "target": "/v", "volume": {"driver_opts": {"device": "/root"}}},
         "driver options are not allowed"),
        ({"type": "volume", "source": "x", "target": "/v", "external": True}, "volumes of others cannot be used"),
        ({"type": "volume", "source": "x", "target": "/v", "volume": {"subpath": "../.."}}, "not supported"),
        ({"type": "bind", "source": "/root", "target": "/v", "bind": {"create_host_path": True}}, "never created"),
        ({"type": "bind", "source": "/", "target": "/v", "bind": {"propagation": "rshared"}}, "cannot be chosen"),
        ({"type": "npipe", "source": "/root", "target": "/v"}, "type"),
        ({"type": "tmpfs", "target": "/v", "tmpfs": {"size": "1g", "mode": 0o4777}}, "owner owns the tmpfs"),
        ("/etc:/v:ro,rshared", "propagation"),
        ("/etc:/v:z", "SELinux"),
    ],
)  # fmt: skip
def test_ways_of_mounting_that_go_round_the_pins_are_refused(
    server: Server, alice: Account, volume_of: object, words: str
) -> None:
    """That Docker takes them is what ``test_a_named_volume…`` and the first tests here show."""
    done = server.run(user=alice, script="ls /v", volumes=[volume_of])
    if volume_of == "../x:/v":  # a path of the client's machine, relative to the file: opened as alice, not there
        assert done.code == 1
        assert "no such directory" in done.words
        return
    assert (done.code, done.out) == (2, b"")
    assert words in done.words, done.words


TARGETS = ("/dev", "/dev/nvidia7", "/proc/self", "/sys", "/", "/etc/passwd", "/etc/group", "/.gpujobs",
           "/etc/../etc/passwd", "//dev", "/x/../proc", "/dev/shm/x",
           "/var/run/nvidia-container-devices/all", "/run/nvidia-container-devices/0",
           "/run/../run/nvidia-container-devices/GPU-x")  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_a_place_that_is_the_kernels_the_runtimes_or_the_inits_is_no_target(
    server: Server, alice: Account, volume: Path, target: str
) -> None:
    for kind in ("bind", "tmpfs"):
        entry = {"type": kind, "target": target, **({"source": str(volume)} if kind == "bind" else {})}
        answer = raw(server, alice, request("POST", "/v1/jobs", submission({"script": "true", "volumes": [entry]})))
        assert (answer.status, answer.body["exit"]) == (400, 2), answer
        assert "mounted" in answer.text


def test_a_target_that_the_runtime_takes_for_a_request_gives_gpus_to_who_may_name_it(
    lab: Engine, server: Server, alice: Account, volume: Path
) -> None:
    with lab.toolkit("accept-nvidia-visible-devices-as-volume-mounts = true"):
        done = undefended(
            lab, "--runtime", "nvidia", "--env", "NVIDIA_VISIBLE_DEVICES=void", "--volume",
            "/dev/null:/var/run/nvidia-container-devices/all", command=shell("ls /dev | grep -c '^nvidia[0-9]'"),
        )  # fmt: skip
        assert done.out == b"8\n", done
        row = submitted(server, alice, gpus=1, script="ls /dev | grep -c '^nvidia[0-9]'")
        assert output(server, row) == "1\n"


def test_options_of_a_tmpfs_cannot_be_smuggled_in_through_its_target(
    shown: dict[str, str], server: Server, alice: Account
) -> None:
    assert "nosuid" not in shown["tmpfs"]
    row = submitted(server, alice, script="grep ' /t' /proc/mounts; touch /t*/x",
                    volumes=[{"type": "tmpfs", "target": SMUGGLED, "tmpfs": {"size": "1m"}}])  # fmt: skip
    if row["state"] == "failed":
        assert row["started_at"] is None or row["exit_code"] != 0
        return
    options = output(server, row).split()[3].split(",")
    assert {"nosuid", "nodev"} <= set(options)


def test_a_job_file_of_many_volumes_is_answered(server: Server, alice: Account, volume: Path) -> None:
    text = spec(script="true", volumes=[f"{volume}:/v{number}" for number in range(5000)])
    done = server.cli("submit", "-q", "-", user=alice, stdin=text)
    assert done.code in (2, 3), done
    assert b"Traceback" not in done.err
