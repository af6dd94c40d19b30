"""Pulls from real registries and builds by a real Engine: what is shown, what is refused, what is bounded."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gpujobs.adapters.engine import Engine
from gpujobs.adapters.images import BuildFailed, Images
from gpujobs.core.container import Image
from gpujobs.core.errors import InvalidInput, Refused, Unavailable
from gpujobs.core.job import Owner
from gpujobs.core.ports import BuildLimits, EngineAway, Gone
from gpujobs.core.pulls import Progress
from gpujobs.core.spec import Build
from tests.e2e.harness import wait_for
from tests.lab import engine as lab
from tests.lab import images as lab_images
from tests.lab.registry import registry

BASE = lab_images.BUSYBOX
LIMITS = BuildLimits(memory=256 << 20, cpus=1.0, seconds=60.0)


def account(uid: int) -> Owner:
    return Owner(uid=uid, gid=uid, groups=(uid,), name=f"u{uid}", home=f"/home/u{uid}")


ALICE, BOB = account(59001), account(59002)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab.Daemon]:
    """An Engine of this module's own: whatever is built and pulled is gone with it."""
    made = lab.Engine.private(tmp_path_factory.mktemp("engine"))
    lab_images.ensure(made.engine, BASE)
    yield made
    made.destroy()


@pytest.fixture(scope="module")
def docker(daemon: lab.Daemon) -> Callable[..., str]:
    return daemon.engine.docker


@dataclass
class Builder:
    """Builds from a dictionary of files; keeps what was said."""

    daemon: lab.Daemon
    directory: Path
    lines: list[str] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)

    def context(self, dockerfile: str, files: dict[str, bytes] | None = None) -> Path:
        path = self.directory / "context.tar"
        with tarfile.open(path, "w") as archive:
            for name, data in {"Dockerfile": dockerfile.encode(), **(files or {})}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return path

    def __call__(
        self, text: str, files: dict[str, bytes] | None = None, *, owner: Owner = ALICE,
        limits: BuildLimits = LIMITS, **build: Any,
    ) -> Image:
        context = self.context(text, files)
        return self.on_loop(
            lambda images: images.build(
                context, Build(context="/c", **build), owner, limits, self.lines.append, self.progress.append
            )
        )

    def on_loop(self, work: Callable[[Images], Coroutine[Any, Any, Any]]) -> Any:
        """Run what is done with an Engine of the loop's own."""
        self.lines.clear()
        self.progress.clear()

        async def run() -> Any:
            engine = Engine(self.daemon.host)
            try:
                return await work(Images(engine))
            finally:
                engine.close()

        return asyncio.run(run())

    def output(self) -> str:
        return "\n".join(self.lines)

    def cached_steps(self) -> int:
        return sum(line == " ---> Using cache" for line in self.lines)

    def containers(self) -> list[str]:
        return [line.split()[-1] for line in self.lines if line.startswith(" ---> Running in ")]

    def inside(self, image: Image, *command: str) -> str:
        return self.daemon.engine.docker("run", "--rm", "--network=none", image.id, *command)


@pytest.fixture
def builder(daemon: lab.Daemon, tmp_path: Path) -> Builder:
    return Builder(daemon, tmp_path)


def gone(daemon: lab.Daemon, container: str) -> bool:
    return not daemon.engine.docker("ps", "--all", "--quiet", "--filter", f"id={container}").strip()


# --- builds -------------------------------------------------------------------------------------------------


def test_a_build_gives_an_untagged_image_of_its_owner_and_streams_its_output(builder: Builder, docker: Any) -> None:
    image = builder(
        "# comment\nARG TAG=1\nFROM gpujobs-lab/busybox:${TAG} AS base\nCOPY data.txt /data\n"
        "RUN echo out of \\\n   # in between\n    the step && echo err >&2\nLABEL x=y\nENV A=b\n"
        'CMD ["cat", "/data"]\n',
        {"data.txt": b"content\n"}, labels=(("team", "vision"),),
    )
    assert "out of the step" in builder.lines
    assert "err" in builder.lines
    assert builder.inside(image) == "content\n"
    data = json.loads(docker("inspect", image.id))[0]
    assert data["RepoTags"] == []
    assert data["Config"]["Labels"]["gpujobs.owner"] == str(ALICE.uid)
    assert (data["Config"]["Labels"]["x"], data["Config"]["Labels"]["team"]) == ("y", "vision")
    assert image.id.startswith("sha256:")
    assert image.command == ("cat", "/data")
    assert image.digest is None
    assert not any(line for line in builder.lines if "sha256:" in line and line.startswith("Step"))
    assert builder.progress[-1].text.startswith("building: step ")
    assert all(gone(builder.daemon, container) for container in builder.containers())


def test_an_owners_layers_are_reused_by_the_owner_and_by_nobody_else(builder: Builder) -> None:
    dockerfile = f"FROM {BASE}\nRUN cat /proc/sys/kernel/random/uuid > /secret\n"
    first = builder(dockerfile, owner=ALICE)
    secret = builder.inside(first, "cat", "/secret")
    again = builder(dockerfile, owner=ALICE)
    assert builder.cached_steps() == 3  # the label, the step, the label at the end
    assert builder.inside(again, "cat", "/secret") == secret
    others = builder(dockerfile, owner=BOB)
    assert builder.cached_steps() == 0
    assert builder.inside(others, "cat", "/secret") != secret
    forged = builder(f"FROM {BASE}\nLABEL gpujobs.owner={ALICE.uid}\nRUN cat /proc/sys/kernel/random/uuid > /secret\n",
                     owner=BOB)  # fmt: skip
    assert builder.inside(forged, "cat", "/secret") != secret


def test_the_owner_label_of_the_result_cannot_be_changed_by_the_file(builder: Builder, docker: Any) -> None:
    image = builder(f"FROM {BASE}\nLABEL gpujobs.owner={BOB.uid}\n", owner=ALICE)
    assert json.loads(docker("inspect", image.id))[0]["Config"]["Labels"]["gpujobs.owner"] == str(ALICE.uid)


def test_what_another_account_built_is_no_base_and_no_source_and_no_image_of_a_job(builder: Builder) -> None:
    secret = builder(f"FROM {BASE}\nRUN echo alice > /secret\n", owner=ALICE)
    for dockerfile in (
        f"FROM {secret.id}\n",
        f"FROM {BASE}\nCOPY --from={secret.id} /secret /s\n",
        f"ARG X={secret.id}\nFROM {BASE}\nFROM $X\n",
        f"FROM scratch AS a\nCOPY Dockerfile /\nFROM {BASE}\nCOPY --from={secret.id} /secret /s\n",
    ):
        with pytest.raises(Refused, match="was built by another account"):
            builder(dockerfile, owner=BOB)
    with pytest.raises(Refused, match="was built by another account"):
        builder.on_loop(lambda images: images.local(secret.id, BOB))
    mine = builder(f"FROM {secret.id}\nCOPY --from={secret.id} /secret /s\n", owner=ALICE)
    assert builder.inside(mine, "cat", "/s") == "alice\n"


def test_the_first_digits_of_an_id_name_no_image(builder: Builder) -> None:
    secret = builder(f"FROM {BASE}\nRUN echo short > /secret\n", owner=ALICE)
    short = secret.id.removeprefix("sha256:")[:12]
    for owner in (ALICE, BOB):
        with pytest.raises(Gone):
            builder.on_loop(lambda images, owner=owner: images.local(short, owner))


def test_a_step_whose_flag_the_engine_would_read_otherwise_is_refused(builder: Builder) -> None:
    secret = builder(f"FROM {BASE}\nRUN echo hidden > /secret\n", owner=ALICE)
    for flag in (f"--fr\\om={secret.id}", f'"--from={secret.id}"', f"--chown=\u00e0--from={secret.id}",
                 f"\u00a0--from={secret.id}", f"--from='{secret.id}'"):  # fmt: skip
        with pytest.raises((InvalidInput, BuildFailed)):
            builder(f"FROM {BASE}\nCOPY {flag} /secret /s\n", owner=BOB)


def test_a_base_whose_onbuild_takes_files_from_another_image_is_refused(
    builder: Builder, docker: Any, tmp_path: Path
) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {BASE}\nONBUILD COPY --from={BASE} /bin/busybox /b\n")
    docker("build", "--tag", "trap:1", str(tmp_path))
    (tmp_path / "Dockerfile").write_text(f"FROM {BASE}\nONBUILD RUN cat /proc/sys/kernel/random/uuid > /u\n")
    docker("build", "--tag", "triggers:1", str(tmp_path))
    with pytest.raises(Refused, match="trap:1 cannot be built upon: its ONBUILD 'COPY --from"):
        builder("FROM trap:1\n")
    # Triggers run before the owner's label is on: nothing of them may come from a cache.
    first = builder("FROM triggers:1\n", owner=ALICE)
    second = builder("FROM triggers:1\n", owner=BOB)
    assert builder.cached_steps() == 0
    assert builder.inside(first, "cat", "/u") != builder.inside(second, "cat", "/u")


def test_a_build_from_scratch_takes_nothing_from_the_cache(builder: Builder) -> None:
    for _ in range(2):
        builder("FROM scratch\nCOPY Dockerfile /d\n")
        assert builder.cached_steps() == 0


def test_a_failing_step_is_named_with_its_code_and_last_words(builder: Builder) -> None:
    with pytest.raises(BuildFailed) as failure:
        builder(f"FROM {BASE}\nRUN true\nRUN echo before; cat /nowhere; exit 3\n")
    assert failure.value.exit_code == 3
    assert failure.value.step == "RUN echo before; cat /nowhere; exit 3"
    assert set(failure.value.tail) == {"before", "cat: can't open '/nowhere': No such file or directory"}
    assert str(failure.value) == (
        "the build failed at step 4 of 5, RUN echo before; cat /nowhere; exit 3: exit 3: "
        "cat: can't open '/nowhere': No such file or directory"
    )
    assert all(gone(builder.daemon, container) for container in builder.containers())


def test_the_engines_word_about_a_line_names_the_line_of_the_users_file(builder: Builder) -> None:
    with pytest.raises(BuildFailed, match=r"line 6.*STOPSIGNAL|Unknown.*line 6|line 6"):
        builder(f"FROM {BASE}\n\n# one\nRUN true && \\\n  true\nSTOPSIGNAL\n")


def test_a_step_beyond_the_memory_limit_is_ended_and_told_as_that(builder: Builder) -> None:
    with pytest.raises(BuildFailed, match=r"exit 137: killed: its memory limit of 0.0625 GiB was reached") as failure:
        builder(f"FROM {BASE}\nRUN dd if=/dev/zero of=/dev/null bs=300M count=1\n",
                limits=BuildLimits(memory=64 << 20, cpus=1.0, seconds=60.0))  # fmt: skip
    assert failure.value.exit_code == 137


def test_a_step_has_the_cpus_and_processes_of_its_limits(builder: Builder) -> None:
    builder(
        f"FROM {BASE}\nRUN set -e; cd /sys/fs/cgroup; if [ -e cpu.max ]; then p=pids.max; c=cpu.max; "
        "else p=pids/pids.max; c=cpu/cpu.cfs_quota_us; fi; "
        "echo cpu $(cat $c); until [ $(cat $p) = 4096 ]; do usleep 20000; done; echo pids $(cat $p)\n",
        limits=BuildLimits(memory=256 << 20, cpus=0.5, seconds=30.0),
    )
    assert any(line.startswith("cpu 50000") for line in builder.lines)
    assert "pids 4096" in builder.lines


def test_a_build_that_takes_too_long_is_ended_with_its_container(builder: Builder) -> None:
    with pytest.raises(BuildFailed, match=r"step 3 of 4, RUN sleep 600: it took longer than the 2 s that builds"):
        builder(f"FROM {BASE}\nRUN sleep 600\n", limits=BuildLimits(memory=64 << 20, cpus=1.0, seconds=2.0))
    container = builder.containers()[-1]
    wait_for(lambda: gone(builder.daemon, container), f"{container} is gone")


def test_a_cancelled_build_ends_with_its_container(builder: Builder) -> None:
    context = builder.context(f"FROM {BASE}\nRUN echo begun; sleep 601\n")

    async def work(images: Images) -> None:
        begun = asyncio.Event()

        def output(line: str) -> None:
            builder.lines.append(line)
            if line == "begun":
                begun.set()

        task = asyncio.create_task(images.build(context, Build(context="/c"), ALICE, LIMITS, output))
        await asyncio.wait_for(begun.wait(), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        container = builder.containers()[-1]
        await asyncio.to_thread(wait_for, lambda: gone(builder.daemon, container), "its container is gone")

    builder.on_loop(work)


def test_equal_builds_at_the_same_time_are_one(builder: Builder) -> None:
    context = builder.context(f"FROM {BASE}\nRUN echo once; cat /proc/sys/kernel/random/uuid > /u; sleep 1\n")

    async def work(images: Images) -> tuple[Image, Image, Image]:
        async def build(owner: Owner) -> Image:
            return await images.build(context, Build(context="/c", no_cache=True), owner, LIMITS, builder.lines.append)

        return await asyncio.gather(build(ALICE), build(ALICE), build(BOB))

    first, second, other = builder.on_loop(work)
    assert first.id == second.id != other.id
    assert builder.lines.count("once") == 3  # two builds, of which Alice's is heard twice
    assert len(set(builder.containers())) == 6


def test_what_leads_out_of_the_context_or_into_buildkit_is_refused(builder: Builder) -> None:
    for dockerfile, words in (
        (f"# syntax=docker/dockerfile:1\nFROM {BASE}\n", r"Dockerfile:1: `# syntax=docker/dockerfile:1` names"),
        (f"FROM {BASE}\nRUN --mount=type=cache,target=/x true\n", r"Dockerfile:2: RUN --mount needs BuildKit"),
        (f"FROM {BASE}\nRUN <<EOF\nFROM x\nEOF\n", r"Dockerfile:2: RUN with a here-document"),
        ("RUN true\n", r"Dockerfile:1: RUN before the first FROM"),
        (f"FROM {BASE}\nFORM x\n", r"'FORM' is no instruction; did you mean FROM\?"),
        ("", r"Dockerfile has no FROM"),
    ):
        with pytest.raises(InvalidInput, match=words):
            builder(dockerfile)
    with pytest.raises(InvalidInput, match="there is no other/Dockerfile in the build context"):
        builder(f"FROM {BASE}\n", dockerfile="other/Dockerfile")


def test_the_dockerfile_that_the_engine_is_given_is_not_in_the_image(builder: Builder) -> None:
    dockerfile = f"FROM {BASE}\nCOPY . /all\n"
    image = builder(dockerfile, {"a": b"1", "skip.log": b"2", ".dockerignore": b"*.log"})
    assert builder.inside(image, "sh", "-c", "cd /all; find . -type f | sort").split() == [
        "./.dockerignore", "./Dockerfile", "./a", "./skip.log",
    ]  # fmt: skip
    assert builder.inside(image, "cat", "/all/Dockerfile") == dockerfile
    bare = builder(dockerfile, {"a": b"1"})
    assert builder.inside(bare, "sh", "-c", "cd /all; find . -type f | sort").split() == ["./Dockerfile", "./a"]
    hidden = builder(dockerfile, {"a": b"1", ".dockerignore": b"Dockerfile\n.dockerignore\n"})
    assert builder.inside(hidden, "sh", "-c", "cd /all; find . -type f | sort").split() == ["./a"]


def test_a_named_stage_is_built_and_no_later_one(builder: Builder) -> None:
    dockerfile = (
        f"FROM {BASE} AS one\nRUN echo 1 > /n\nFROM {BASE} AS two\nCOPY --from=one /n /m\nFROM nowhere.invalid/x\n"
    )
    image = builder(dockerfile, target="two")
    assert builder.inside(image, "cat", "/m") == "1\n"
    assert builder.inside(builder(dockerfile, target="0"), "cat", "/n") == "1\n"
    with pytest.raises(InvalidInput, match="no stage 'tow'"):
        builder(f"FROM {BASE} AS two\n", target="tow")


def test_an_engine_whose_default_runtime_gives_gpus_builds_nothing(builder: Builder, daemon: lab.Daemon) -> None:
    config = daemon.home / "daemon.json"
    before = config.read_text()

    def runtime(name: str) -> bool:
        return daemon.engine.docker("info", "--format", "{{.DefaultRuntime}}").strip() == name

    def change(text: str, name: str) -> None:
        config.write_text(text)
        os.kill(daemon.pid or 0, signal.SIGHUP)
        wait_for(lambda: runtime(name), f"the default runtime is {name}")

    try:
        change(json.dumps({**json.loads(before), "default-runtime": "nvidia"}), "nvidia")
        with pytest.raises(Refused, match="the Engine's default runtime is nvidia"):
            builder(f"FROM {BASE}\nRUN true\n")
        assert builder.containers() == []
    finally:
        change(json.dumps({**json.loads(before), "default-runtime": "runc"}), "runc")


# --- pulls --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """A registry with an image of four layers, of which the Engine of the tests has none."""

    address: str
    image: str
    digest: str
    storage: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("registry")
    source = lab.ensure()
    lab_images.ensure(source, BASE)
    with registry(directory) as address:
        name = f"{address}/lab/layers:1"
        context = directory / "context"
        context.mkdir()
        for number in range(3):
            (context / f"f{number}").write_bytes(random.Random(number).randbytes(12 << 20))
        (context / "Dockerfile").write_text(f"FROM {BASE}\nCOPY f0 /\nCOPY f1 /\nCOPY f2 /\n")
        source.docker("build", "--tag", name, "--tag", f"{address}/lab/other:1", str(context))
        said = source.docker("push", name) + source.docker("push", f"{address}/lab/other:1")
        digest = next(line for line in said.splitlines() if "digest: " in line).split("digest: ")[1].split()[0]
        source.docker("rmi", name, f"{address}/lab/other:1")
        yield Served(address, name, digest, directory / "storage")


@pytest.fixture
def absent(served: Served, docker: Any) -> Served:
    """The served image, not in the Engine."""
    for line in docker("images", "--quiet", "--filter", f"reference={served.address}/*/*").split():
        docker("rmi", "--force", line)
    return served


def test_a_pull_tells_of_each_layer_and_records_the_digest(absent: Served, builder: Builder) -> None:
    image = builder.on_loop(lambda images: images.pull(absent.image, builder.progress.append))
    assert image.digest == f"{absent.image.rpartition(':')[0]}@{absent.digest}"
    assert image.reference == absent.image
    last = builder.progress[-1]
    assert last.text == f"pulling {absent.image}: 4 of 4 layers, 100 %"
    assert [layer.status for layer in last.layers] == ["Pull complete"] * 4
    assert any(layer.total and layer.total > 12 << 20 for news in builder.progress for layer in news.layers)
    percents = [int(p.text.split()[-2]) for p in builder.progress if p.layers]
    assert percents == sorted(percents)
    by_digest = builder.on_loop(lambda images: images.local(image.digest, ALICE))
    assert by_digest.id == image.id


def test_pulls_of_one_image_at_the_same_time_are_one(absent: Served, builder: Builder, docker: Any) -> None:
    heard: list[list[Progress]] = [[], [], []]

    async def work(images: Images) -> list[Image]:
        return await asyncio.gather(*(images.pull(absent.image, told.append) for told in heard))

    before = f"{time.time():.9f}"
    pulled = builder.on_loop(work)
    assert len({image.id for image in pulled}) == 1
    assert heard[0] == heard[1] == heard[2]
    assert len(heard[0]) > 1
    until = f"{time.time() + 0.2:.9f}"
    events = docker("events", "--since", before, "--until", until, "--filter", "event=pull").splitlines()
    assert len(events) == 1


def test_a_pull_goes_on_while_one_of_those_who_wait_is_left_and_stops_after_the_last(
    absent: Served, builder: Builder, docker: Any
) -> None:
    async def work(images: Images) -> None:
        begun = asyncio.Event()

        def told(progress: Progress) -> None:
            if progress.layers:
                begun.set()

        first = asyncio.create_task(images.pull(absent.image, told))
        second = asyncio.create_task(images.pull(absent.image, told))
        await asyncio.wait_for(begun.wait(), 30)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (await second).digest is not None

        docker("rmi", absent.image)
        begun.clear()
        third = asyncio.create_task(images.pull(absent.image, told))
        await asyncio.wait_for(begun.wait(), 30)
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third
        with pytest.raises(Gone):
            await images.local(absent.image, ALICE)

    builder.on_loop(work)


def test_a_base_that_is_not_there_is_pulled_for_the_build(absent: Served, builder: Builder) -> None:
    image = builder(f"FROM {absent.image}\nRUN test -s /f2\n")
    assert f"{absent.image} is not here: it is pulled" in builder.lines
    assert any(news.text.startswith("pulling ") and news.layers for news in builder.progress)
    assert image.id


def failing_pull(builder: Builder, reference: str) -> tuple[type[Exception], str, str]:
    with pytest.raises((Refused, Unavailable, InvalidInput)) as failure:
        builder.on_loop(lambda images: images.pull(reference, builder.progress.append))
    return type(failure.value), failure.value.message, failure.value.hint


def test_a_registry_that_is_not_there_is_told_as_that(builder: Builder) -> None:
    kind, message, hint = failing_pull(builder, "registry.nowhere.invalid/team/image:1")
    assert kind is Unavailable
    assert message == (
        "the registry registry.nowhere.invalid of the image registry.nowhere.invalid/team/image:1 is not found: "
        "no such host"
    )
    assert "DNS" in hint
    kind, message, hint = failing_pull(builder, "127.0.0.1:9/team/image:1")
    assert (kind, message) == (
        Unavailable,
        "nobody answers at the registry 127.0.0.1:9 of the image 127.0.0.1:9/team/image:1: connection refused",
    )  # fmt: skip


def test_an_image_that_a_registry_has_not_is_told_with_what_may_be_meant(served: Served, builder: Builder) -> None:
    builder.on_loop(lambda images: images.pull(served.image, builder.progress.append))
    for wrong in (f"{served.address}/lab/layers:2", f"{served.address}/lab/layer:1"):
        kind, message, hint = failing_pull(builder, wrong)
        assert (kind, message) == (Refused, f"the registry {served.address} has no image {wrong}")
        assert hint == f"Did you mean {served.image}?"


def test_an_invalid_name_is_told_without_asking_anybody(builder: Builder) -> None:
    for wrong in ("Team/Image:1", "a//b", "x:" + "t" * 200, "../containers/abc", "x?y=1"):
        kind, message, _ = failing_pull(builder, wrong)
        assert kind is InvalidInput
        assert "is not a" in message
        with pytest.raises(InvalidInput):
            builder.on_loop(lambda images, wrong=wrong: images.local(wrong, ALICE))
        with pytest.raises(InvalidInput, match=r"^Dockerfile:"):
            builder(f"FROM {wrong}\n")


def test_a_registry_that_wants_a_login_is_told_as_that(builder: Builder, tmp_path: Path) -> None:
    with registry(tmp_path / "locked", login=True) as address:
        kind, message, hint = failing_pull(builder, f"{address}/team/image:1")
    assert kind is Refused
    assert message == (
        f"the registry {address} does not give out the image {address}/team/image:1: it does not exist there, "
        "or needs a login"
    )
    assert "gpujobs logs in nowhere" in hint


def address_of(interface: str) -> str:
    """An address of this machine that is not loopback: an Engine trusts no plain http there."""
    found = json.loads(subprocess.check_output(["ip", "-j", "-4", "address", "show", "dev", interface]))
    return str(found[0]["addr_info"][0]["local"])


def test_registries_that_the_engine_does_not_trust_are_told_with_the_remedy(
    builder: Builder, daemon: lab.Daemon, tmp_path: Path
) -> None:
    host = address_of(daemon.bridge)
    with registry(tmp_path / "plain", host=host) as address:
        kind, message, hint = failing_pull(builder, f"{address}/team/image:1")
        assert (kind, "speaks plain http" in message, "insecure-registries" in hint) == (Refused, True, True), message
    with registry(tmp_path / "tls", host=host, tls=True) as address:
        kind, message, hint = failing_pull(builder, f"{address}/team/image:1")
        assert (kind, "certificate that the Engine does not trust" in message) == (Refused, True), message
        assert f"/etc/docker/certs.d/{address}/ca.crt" in hint


def test_a_full_disk_is_told_as_that(served: Served, tmp_path: Path) -> None:
    home = tmp_path / "small"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(home)], check=True)
    try:
        small = lab.Engine.private(home)
        try:
            builder = Builder(small, tmp_path)
            kind, message, _ = failing_pull(builder, served.image)
            assert (kind, message) == (
                Unavailable, f"there is no space left on the Engine's disk for the image {served.image}",
            )  # fmt: skip
        finally:
            small.destroy()
    finally:
        subprocess.run(["umount", "--lazy", str(home)], check=True)


def test_an_engine_that_goes_away_is_told_as_that(tmp_path: Path) -> None:
    engine = Engine(f"unix://{tmp_path}/none.sock")

    async def pull() -> None:
        await Images(engine).pull("x:1", lambda _: None)

    with pytest.raises(Unavailable, match="does not answer"):
        asyncio.run(pull())
    engine.close()


def test_a_build_of_an_engine_that_is_killed_is_told_as_that(tmp_path: Path) -> None:
    """The server then waits for the Engine and builds again: it must not take it for a failed step."""
    home = tmp_path / "home"
    home.mkdir()
    killed = lab.Engine.private(home)
    try:
        lab_images.ensure(killed.engine, BASE)
        builder = Builder(killed, tmp_path)
        context = builder.context(f"FROM {BASE}\nRUN echo begun; sleep 600\n")

        async def work(images: Images) -> None:
            begun = asyncio.Event()

            def output(line: str) -> None:
                if line == "begun":
                    begun.set()

            task = asyncio.create_task(images.build(context, Build(context="/c"), ALICE, LIMITS, output))
            await asyncio.wait_for(begun.wait(), 30)
            await asyncio.to_thread(killed.kill)
            with pytest.raises(EngineAway, match=r"went away during the build|does not answer"):
                await task

        builder.on_loop(work)
    finally:
        killed.destroy()
