"""One run of the Engine's classic builder, under limits, with what it says made plain."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import deque
from collections.abc import Callable
from typing import Any, BinaryIO

from gpujobs.adapters import buildtar
from gpujobs.adapters.engine import Engine
from gpujobs.adapters.enginepost import posted
from gpujobs.core.dockerfile import OWNER_LABEL
from gpujobs.core.errors import GpujobsError
from gpujobs.core.job import Owner
from gpujobs.core.ports import BuildLimits, EngineAway, EngineError
from gpujobs.core.pulls import Progress
from gpujobs.core.spec import Build

BUILD_PIDS = 4096
"""Processes of one step of a build: compilers on all cores have hundreds, a fork bomb stops here."""

CPU_PERIOD = 100_000
"""Microseconds: the kernel's default period of a CPU quota."""

_EVENT_SECONDS = 0.3
"""For which an event may be late behind what it is about."""

_TAIL_LINES = 8
_STEP = re.compile(r"Step (\d+)/(\d+) : (.*)")
_RUNNING = re.compile(r" ---> Running in ([0-9a-f]{12,64})")
_CODE = re.compile(r"returned a non-zero code: (\d+)")
_LINE = re.compile(r"(dockerfile parse error (?:on )?line )(\d+)", re.IGNORECASE)
_COLOUR = re.compile(r"\x1b\[([0-9;]*)m")
_STDERR = "91"
"""The colour that the classic builder gives what a step wrote to its standard error."""


class BuildFailed(GpujobsError):
    """A step of a build did not succeed.

    Attributes:
        step: The instruction; empty where it was none of them.
        exit_code: The step's own, where it has one.
        tail: The last lines of its output.
    """

    code = "build"

    def __init__(self, message: str, *, hint: str = "", step: str = "", exit_code: int | None = None,
                 tail: tuple[str, ...] = ()) -> None:  # fmt: skip
        super().__init__(message, hint=hint)
        self.step = step
        self.exit_code = exit_code
        self.tail = tail


class Run:
    """One run of the builder."""

    def __init__(
        self, engine: Engine, build: Build, limits: BuildLimits, tell: Callable[[str | Progress], None],
        names: dict[str, str], lines: tuple[int, ...],
    ) -> None:  # fmt: skip
        self._engine = engine
        self._build = build
        self._limits = limits
        self._tell = tell
        self._names = names
        self._lines = lines
        self._partial = ""
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._complaint = ""
        self._colour = ""
        self._step = ("", "", "")
        self._container: str | None = None
        self._began = time.time()

    async def run(self, file: BinaryIO, owner: Owner, *, no_cache: bool) -> str:
        """Build; returns the image's id."""
        image: str | None = None
        labels = {**dict(self._build.labels), OWNER_LABEL: str(owner.uid)}
        query: dict[str, str | int] = {
            "version": 1,  # the classic builder
            "dockerfile": buildtar.DOCKERFILE,
            "rm": 1,
            "forcerm": 1,
            "nocache": int(no_cache),
            "memory": self._limits.memory,
            "memswap": self._limits.memory,
            "cpuperiod": CPU_PERIOD,
            "cpuquota": max(1000, round(self._limits.cpus * CPU_PERIOD)),
            "networkmode": "default",
            "buildargs": json.dumps(dict(self._build.args)),
            "labels": json.dumps(labels),
        }
        limiting: set[asyncio.Task[None]] = set()
        try:
            async with (
                asyncio.timeout(self._limits.seconds),
                posted(self._engine.host, "/build", query, body=file, kind="application/x-tar") as events,
            ):
                async for event in events:
                    if "error" in event:
                        raise _StepFailed(str(event["error"]))  # noqa: TRY301 - after the connection is closed
                    if isinstance(event.get("aux"), dict) and "ID" in event["aux"]:
                        image = str(event["aux"]["ID"])
                    for container in self._heard(str(event.get("stream") or "")):
                        limiting.add(asyncio.create_task(self._limit(container), name=f"limit {container}"))
        except TimeoutError:
            raise self._failed(
                f"it took longer than the {self._limits.seconds:g} s that builds may take", None
            ) from None
        except _StepFailed as failure:
            raise await self._explained(str(failure)) from None
        except EngineError as error:
            raise self._failed(self._in_file(str(error)), None) from error
        finally:
            await asyncio.gather(*limiting, return_exceptions=True)
        self._flush()
        if image is None:
            raise EngineAway("the Engine went away during the build", hint="Try again when it is back.")
        return image

    def _heard(self, text: str) -> list[str]:
        """Pass on whole lines; returns the containers that were begun."""
        *lines, self._partial = (self._partial + text).split("\n")
        return [begun for line in lines if (begun := self._line(line)) is not None]

    def _flush(self) -> None:
        if self._partial:
            self._line(self._partial)
            self._partial = ""

    def _line(self, line: str) -> str | None:
        line, complains = self._plain(line.rstrip("\r"))
        for image, name in self._names.items():
            line = line.replace(image, name)
        if not line.strip():
            return None
        self._tell(line)
        if (step := _STEP.fullmatch(line)) is not None:
            self._step = (step[1], step[2], step[3])
            self._tail.clear()
            self._complaint = ""
            self._tell(Progress((), f"building: step {step[1]} of {step[2]}: {step[3][:100]}"))
        elif (running := _RUNNING.match(line)) is not None:
            self._container = running[1]
            return running[1]
        elif not line.startswith((" ---> ", "Removing intermediate container")):
            self._tail.append(line)
            self._complaint = line if complains else self._complaint
        return None

    def _plain(self, line: str) -> tuple[str, bool]:
        """A line without colours, and whether the step wrote it to its standard error."""
        texts, complains = [], False
        for at, part in enumerate(_COLOUR.split(line)):
            if at % 2:
                self._colour = part
            else:
                texts.append(part)
                complains = complains or (self._colour == _STDERR and bool(part.strip()))
        return "".join(texts), complains

    async def _limit(self, container: str) -> None:
        """Bound a step's processes: the builder's own limits have none for them."""
        body = json.dumps({"PidsLimit": BUILD_PIDS}).encode()
        try:
            async with posted(self._engine.host, f"/containers/{container}/update", {}, body=body) as events:
                async for _ in events:
                    pass
        except EngineError:  # the step is over already
            return

    async def _explained(self, words: str) -> BuildFailed:
        self._flush()
        found = _CODE.search(words)
        if found is None:
            return self._failed(self._in_file(words), None)
        code = int(found[1])
        if code == 137 and await self._memory_was_full():
            return self._failed(
                f"exit {code}: killed: its memory limit of {self._limits.memory / 2**30:.3g} GiB was reached", code,
                "Let the step use less memory (fewer parallel compilers), or ask the administrator for more.",
            )  # fmt: skip
        # The two streams overtake each other: what was last may be what the step printed before its error.
        last = self._complaint or (self._tail[-1] if self._tail else "")
        return self._failed(f"exit {code}{f': {last.strip()[:300]}' if last else ''}", code)

    async def _memory_was_full(self) -> bool:
        """Whether the Engine saw the last step's container at its memory limit."""
        if self._container is None:
            return False
        container = self._container

        def look(client: Any) -> bool:
            events = client.events(
                since=int(self._began), until=f"{time.time() + _EVENT_SECONDS:.9f}", decode=True,
                filters={"type": "container", "event": "oom"},
            )  # fmt: skip
            return any(str(event.get("id", "")).startswith(container) for event in events)

        try:
            return await self._engine.call(look)
        except EngineError:
            return False

    def _failed(self, what: str, code: int | None, hint: str = "") -> BuildFailed:
        number, count, step = self._step
        where = f" at step {number} of {count}, {step[:200]}" if step else ""
        message = f"the build failed{where}: {what}"
        return BuildFailed(message, hint=hint, step=step, exit_code=code, tail=tuple(self._tail))

    def _in_file(self, words: str) -> str:
        """The Engine's sentence with the lines of the user's own file."""

        def original(match: re.Match[str]) -> str:
            number = int(match[2])
            return match[1] + str(self._lines[number - 1] if 0 < number <= len(self._lines) else number)

        for image, name in self._names.items():
            words = words.replace(image, name)
        return _LINE.sub(original, words)


class _StepFailed(Exception):
    """The builder's own word that it did not succeed."""
