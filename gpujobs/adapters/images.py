"""Images: found by name, pulled with progress, built under limits.

A name is looked up as a name: an image that somebody built is reached by its full id alone, and by its owner alone.
Pulls carry no credentials: what the account that runs the server may have logged in to is not for everybody.

Builds are made by the Engine's classic builder: BuildKit inside dockerd takes no limits. What the builder is given
is made in :mod:`gpujobs.core.dockerfile` and :mod:`gpujobs.adapters.buildtar`.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from gpujobs.adapters import buildtar
from gpujobs.adapters.buildrun import BuildFailed, Run
from gpujobs.adapters.engine import Engine, image_of, split_reference
from gpujobs.adapters.enginepost import posted
from gpujobs.core.container import Image
from gpujobs.core.dockerfile import OWNER_LABEL, Outline, outline, triggers_problem
from gpujobs.core.errors import Refused, Unavailable
from gpujobs.core.job import Owner
from gpujobs.core.ports import BuildLimits, EngineAway, EngineError, Gone
from gpujobs.core.pulls import Layers, Progress, checked, refusal
from gpujobs.core.spec import Build

__all__ = ["BuildFailed", "BuildLimits", "Images", "Shared", "Told"]

T = TypeVar("T")
R = TypeVar("R")

Told = Callable[[Progress], None]

PULLS = 4
BUILDS = 2
"""So many at a time; others wait. Both use the network and the disk, a build CPUs too."""

TELL_SECONDS = 0.2
SILENCE_SECONDS = 600.0
"""A pull of which nothing was heard for so long is given up: the Engine tells of each half megabyte."""

PLAIN_RUNTIMES = ("runc", "io.containerd.runc.v2", "crun")
"""OCI runtimes that give a container nothing of the host's GPUs by themselves."""

_ID = re.compile(r"sha256:[0-9a-f]{64}")


class Shared(Generic[T, R]):
    """One piece of work for all who want the same; it is given up when the last of them has gone.

    Args:
        work: Does it; is given what to tell its news to.
    """

    def __init__(self, work: Callable[[Callable[[T], None]], Coroutine[Any, Any, R]]) -> None:
        self._listeners: list[Callable[[T], None]] = []
        self._last: T | None = None
        self.given_up = False
        self.task = asyncio.create_task(work(self._tell))

    def _tell(self, news: T) -> None:
        self._last = news
        for listener in list(self._listeners):
            listener(news)

    async def join(self, listener: Callable[[T], None]) -> R:
        """Wait for the result, and hear the news until then."""
        self._listeners.append(listener)
        if self._last is not None:
            listener(self._last)
        try:
            return await asyncio.shield(self.task)
        finally:
            self._listeners.remove(listener)
            if not self._listeners and not self.task.done():
                self.given_up = True
                self.task.cancel()
                await asyncio.gather(self.task, return_exceptions=True)


class Images:
    """The images of one Engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pulls: dict[str, Shared[Progress, Image]] = {}
        self._builds: dict[tuple[Any, ...], Shared[str | Progress, Image]] = {}
        self._pull_turns = asyncio.Semaphore(PULLS)
        self._build_turns = asyncio.Semaphore(BUILDS)

    # -- what is there -----------------------------------------------------------------------------------------

    async def local(self, reference: str, owner: Owner) -> Image:
        """An image that is there, by a name or a full id that this account may use.

        Raises:
            Gone: There is none of that name.
            Refused: It was built by somebody else.
            InvalidInput: It is no name of an image.
        """
        return _image(reference, await self._inspected(reference, owner))

    async def _inspected(self, reference: str, owner: Owner) -> dict[str, Any]:
        reference = checked(reference)
        try:
            data: dict[str, Any] = await self._engine.call(lambda client: client.inspect_image(reference))  # type: ignore[no-untyped-call]
        except Gone:
            raise
        except EngineError as error:
            raise refusal(reference, str(error)) from error
        if not _is_called(reference, data):
            raise Gone(f"no such image: {reference}")
        builder = ((data.get("Config") or {}).get("Labels") or {}).get(OWNER_LABEL)
        # What has a name was not built by a job: somebody who may use Docker gave it that, for everybody.
        named = not _ID.fullmatch(reference) or any("<none>" not in tag for tag in data.get("RepoTags") or ())
        if not named and builder is not None and builder != str(owner.uid):
            raise Refused(f"the image {reference} was built by another account (uid {builder[:20]})",
                          hint="Build one of your own from its Dockerfile.")  # fmt: skip
        return data

    async def _names(self) -> list[str]:
        rows = await self._engine.call(lambda client: client.images())
        return sorted({tag for row in rows for tag in row.get("RepoTags") or () if "<none>" not in tag})

    # -- pulling -----------------------------------------------------------------------------------------------

    async def pull(self, reference: str, progress: Told) -> Image:
        """Fetch an image from its registry; who wants the same at the same time waits for the same pull.

        Args:
            reference: Its name, with a tag (``latest`` by default) or a digest.
            progress: Told at most five times a second.

        Returns:
            The image, with the digest by which the registry knows it.

        Raises:
            Refused: The registry has no such image, or does not give it out.
            InvalidInput: It is no name of an image.
            Unavailable: The registry or the Engine cannot be reached; the disk is full.
        """
        reference = checked(reference)
        return await _join(self._pulls, reference, partial(self._pull, reference), progress)

    async def _pull(self, reference: str, tell: Told) -> Image:
        name, tag = split_reference(reference)
        layers, paced, complete = Layers(reference), _Paced(tell), False
        async with self._pull_turns:
            tell(layers.progress())
            try:
                async with posted(
                    self._engine.host, "/images/create", {"fromImage": name, "tag": tag}, silence=SILENCE_SECONDS
                ) as events:
                    async for event in events:
                        if "error" in event:
                            raise EngineError(str(event["error"]))  # noqa: TRY301 - one place makes words of both
                        complete = complete or str(event.get("status")).startswith("Status: ")
                        layers.feed(event)
                        paced(layers.progress)
            except EngineError as error:
                raise refusal(reference, str(error), await self._names()) from error
        if not complete:
            raise EngineAway(f"the Engine went away while {reference} was pulled", hint="Try again when it is back.")
        try:
            data = await self._engine.call(lambda client: client.inspect_image(reference))  # type: ignore[no-untyped-call]
        except Gone as error:
            raise Unavailable(f"the image {reference} was removed as soon as it had been pulled",
                              hint="Try again.") from error  # fmt: skip
        tell(layers.progress())
        image = _image(reference, data)
        if image.digest is None and layers.digest:
            return replace(image, digest=f"{_repository(name)}@{layers.digest}")
        return image

    # -- building ----------------------------------------------------------------------------------------------

    async def build(
        self, context: Path, build: Build, owner: Owner, limits: BuildLimits, output: Callable[[str], None],
        progress: Told = lambda _: None,
    ) -> Image:  # fmt: skip
        """Build an image from a client's tar file; identical builds at the same time are one.

        Args:
            context: The tar file; read, never trusted.
            build: What the job file says.
            owner: Whose it is: only their own and everybody's images can be built upon, only their layers reused.
            limits: For each step and for all of it.
            output: Given each line that the builder writes, without its newline.
            progress: Told which step it is at, and how far pulls of base images are.

        Raises:
            BuildFailed: A step failed, or took too long.
            InvalidInput: The context or its Dockerfile is not valid.
            Refused: It takes an image that is not the owner's to use; this Engine must not build.
            Unavailable: The Engine or a registry cannot be reached.
        """

        def heard(news: str | Progress) -> None:
            if isinstance(news, str):
                output(news)
            else:
                progress(news)

        key = (str(context), build, owner.uid, limits)
        return await _join(self._builds, key, partial(self._build, context, build, owner, limits), heard)

    async def _build(
        self, context: Path, build: Build, owner: Owner, limits: BuildLimits, tell: Callable[[str | Progress], None]
    ) -> Image:
        platform = await self._platform()
        if self._build_turns.locked():
            tell(Progress((), "waits until another build is done"))
        async with self._build_turns:
            with tempfile.TemporaryFile(dir=context.parent) as file:
                prepared = await _in_thread(partial(buildtar.rewrite, context, file, build.dockerfile))
                plan = outline(
                    prepared.dockerfile, file=build.dockerfile, args=build.args, target=build.target, platform=platform
                )
                ids, open_cache = await self._bases(plan, owner, tell)
                text, lines = plan.rewritten(ids, owner.uid)
                await asyncio.to_thread(prepared.finish, text)
                run = Run(self._engine, build, limits, tell, {i: name for name, i in ids.items()}, lines)
                made = await run.run(file, owner, no_cache=build.no_cache or open_cache)
        return _image(made, await self._inspected(made, owner))

    async def _platform(self) -> str:
        """The machine's platform.

        Raises:
            Refused: The Engine would build with another runtime than the plain one.
        """
        info = await self._engine.call(lambda client: client.info())
        runtime = str(info.get("DefaultRuntime") or "runc")
        if runtime not in PLAIN_RUNTIMES:
            raise Refused(
                f"nothing is built here: the Engine's default runtime is {runtime}, which would run builds with GPUs",
                hint="The administrator takes `default-runtime` out of the Engine's daemon.json; jobs do not need it.",
            )
        version = await self._engine.call(lambda client: client.version())
        return f"{version.get('Os', 'linux')}/{version.get('Arch', 'amd64')}"

    async def _bases(
        self, plan: Outline, owner: Owner, tell: Callable[[str | Progress], None]
    ) -> tuple[dict[str, str], bool]:
        """The id of every image that a Dockerfile takes, and whether its cache is open to strangers' images.

        It is where a stage begins with nothing (the Engine then compares with every image that has no parent,
        CVE-2024-24557), and where a base has ONBUILD instructions, which run before the owner's label is on.
        """
        ids: dict[str, str] = {}
        open_cache = plan.from_scratch
        for reference in plan.images:
            try:
                data = await self._inspected(reference, owner)
            except Gone:
                tell(f"{reference} is not here: it is pulled")
                image = await self.pull(reference, tell)
                data = await self._inspected(image.id, owner)
                tell(f"{reference} is pulled: {image.digest or image.id}")
            triggers = (data.get("Config") or {}).get("OnBuild") or ()
            if (problem := triggers_problem(triggers)) is not None:
                raise Refused(f"the image {reference} cannot be built upon: {problem}")
            open_cache = open_cache or bool(triggers)
            ids[reference] = str(data["Id"])
        return ids, open_cache


class _Paced:
    """Passes news on, but not too often."""

    def __init__(self, tell: Told) -> None:
        self._tell = tell
        self._next = 0.0

    def __call__(self, news: Callable[[], Progress]) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._next:
            self._next = now + TELL_SECONDS
            self._tell(news())


async def _join(
    running: dict[Any, Shared[T, R]], key: Any, work: Callable[[Callable[[T], None]], Coroutine[Any, Any, R]],
    listener: Callable[[T], None],
) -> R:  # fmt: skip
    shared = running.get(key)
    if shared is None or shared.given_up or shared.task.done():
        shared = running[key] = Shared(work)

        def gone(_: object, mine: Shared[T, R] = shared) -> None:
            if running.get(key) is mine:
                del running[key]

        shared.task.add_done_callback(gone)
    return await shared.join(listener)


async def _in_thread(work: Callable[..., R]) -> R:
    """Run what asks ``cancelled`` whether to go on; it has stopped when this returns."""
    given_up = threading.Event()
    running = asyncio.ensure_future(asyncio.to_thread(work, cancelled=given_up.is_set))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        given_up.set()
        await asyncio.gather(running, return_exceptions=True)
        raise


def _repository(name: str) -> str:
    """A name without registry defaults, tag and digest, as the Engine lists it."""
    name = name.partition("@")[0]
    name = split_reference(name)[0]
    for prefix in ("index.docker.io/", "docker.io/"):
        name = name.removeprefix(prefix)
    return name.removeprefix("library/")


def _is_called(reference: str, data: dict[str, Any]) -> bool:
    """Whether an image is what a reference names: the Engine also takes the first digits of an id."""
    if _ID.fullmatch(reference):
        return str(data["Id"]) == reference
    name, at, digest = reference.partition("@")
    if at:
        return f"{_repository(name)}@{digest}" in (data.get("RepoDigests") or ())
    return f"{_repository(name)}:{split_reference(name)[1]}" in (data.get("RepoTags") or ())


def _image(reference: str, data: dict[str, Any]) -> Image:
    """The image, with the digest under the name that it was asked for by."""
    digests = [str(digest) for digest in data.get("RepoDigests") or ()]
    name = _repository(reference)
    own = next((digest for digest in digests if digest.partition("@")[0] == name), digests[0] if digests else None)
    return replace(image_of(reference, data), digest=own)
