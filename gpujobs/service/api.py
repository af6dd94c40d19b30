"""The HTTP API on the unix socket: reads requests, asks the service, writes answers. The routes are in gpujobs.wire."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from gpujobs import __version__, specfile, wire
from gpujobs.core.errors import GpujobsError, InvalidInput, Refused, UnknownId
from gpujobs.core.job import Ended, Job, JobId, Owner
from gpujobs.core.spec import JobSpec
from gpujobs.logwire import GAP, LogRecord, encode_frame
from gpujobs.service import rows
from gpujobs.service.access import Asker
from gpujobs.service.loop import Service

logger = logging.getLogger("gpujobs")

MAX_ROWS = 100_000
MAX_PLANS = 100

MAX_DEPTH = 16
"""Lists and objects within each other in a request; the deepest of ours has 4."""

BODY_SECONDS = 30.0
"""In which the body of a request has to come, and each piece of one that is a file."""

SEND_SECONDS = 60.0
"""In which a client has to read some of an answer; only streams wait for their readers for ever."""

SLICE = 64 << 10
"""Bytes of an answer that are written at a time: what a client does not read takes no more memory than this."""

PAGE = 200
"""Rows of a listing that are made before others have a turn."""

READ = 1000
"""Rows of a listing that are read of the ledger at a time."""

Handler = Callable[[Service, Asker, Request], Awaitable[Response]]

CLOSE = {"connection": "close"}


class Endpoint:
    """One route: finds out who asks, keeps them within their limits, and turns errors into answers.

    Args:
        service: The server.
        handler: Answers a request.
        stream: It goes on for long: it is counted, and has no turn that it could hold up.
    """

    def __init__(self, service: Service, handler: Handler, *, stream: bool) -> None:
        self._service = service
        self._handler = handler
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        request = Request(scope, receive, send)
        service = self._service
        try:
            asker = await service.directory.asker(request.state.peer)
            service.holds.seen(asker.uid)
            if self._stream:
                with service.quotas.stream(asker.uid):
                    response = await self._handler(service, asker, request)
                    await response(scope, receive, send)
            else:
                async with service.quotas.turn(asker.uid):
                    if request.state.gone():
                        return  # nobody waits for it any more
                    response = await self._handler(service, asker, request)
                    await self._send(response, scope, receive, send)
        except GpujobsError as error:
            # What is left of the request is not read.
            await JSONResponse(wire.error_body(error), error.status, CLOSE)(scope, receive, send)
        except ClientDisconnect:
            return
        except asyncio.CancelledError:
            if not service.stopped.is_set():
                raise
            request.state.abort()  # the server ends, and has waited for its clients long enough

    async def _send(self, response: Response, scope: Scope, receive: Receive, send: Send) -> None:
        """Send an answer in slices, as far as the client reads them in time."""

        async def sliced(message: Message) -> None:
            body = memoryview(message.get("body", b""))
            async with asyncio.timeout(SEND_SECONDS):
                while len(body) > SLICE:
                    await send({**message, "body": bytes(body[:SLICE]), "more_body": True})
                    body = body[SLICE:]
                await send({**message, "body": bytes(body)} if "body" in message else message)

        try:
            await response(scope, receive, sliced)
        except TimeoutError:
            Request(scope).state.abort()  # it does not read


def application(service: Service) -> Starlette:
    """The ASGI application of a service."""

    async def failed(_: Request, error: Exception) -> Response:
        logger.error("a request failed", exc_info=error)
        body = GpujobsError("the server made a mistake; its log says which", hint="Please tell the administrator.")
        return JSONResponse(wire.error_body(body), 500)

    async def missing(request: Request, _: Exception) -> Response:
        error = InvalidInput(f"{request.method} {request.url.path}: this server has no such thing",
                             hint=f"It is gpujobs {__version__}; is the client newer?")  # fmt: skip
        return JSONResponse(wire.error_body(error), 404)

    short: list[tuple[str, str, Handler]] = [
        ("GET", "/v1/server", server),
        ("POST", "/v1/jobs", submit),
        ("POST", "/v1/plan", plan),
        ("GET", "/v1/jobs", listing),
        ("GET", "/v1/jobs/{id}", show),
        ("POST", "/v1/jobs/{id}/cancel", cancel),
        ("POST", "/v1/jobs/{id}/rerun", rerun),
        ("GET", "/v1/gpus", gpus),
    ]
    long: list[tuple[str, str, Handler]] = [
        ("GET", "/v1/jobs/{id}/watch", watch),
        ("GET", "/v1/jobs/{id}/logs", logs),
        ("PUT", "/v1/jobs/{id}/context/{key}", context),
    ]
    made = Starlette(
        routes=[
            Route(path, Endpoint(service, handler, stream=table is long), methods=[method])
            for table in (short, long)
            for method, path, handler in table
        ],
        exception_handlers={404: missing, 405: missing, Exception: failed},
    )
    made.router.redirect_slashes = False  # an id with a slash in it is no id; it is not to be asked for elsewhere
    return made


# -- reading requests ----------------------------------------------------------------------------------------------


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """The body of a request, each piece of it in time."""
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise InvalidInput(f"nothing came of the request's body for {BODY_SECONDS:g} s") from None
        yield piece


async def _body(request: Request) -> dict[str, Any]:
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > wire.MAX_REQUEST_BYTES:
                    raise Refused(f"the request is larger than {wire.MAX_REQUEST_BYTES >> 20} MiB, which is the limit")
    except TimeoutError:
        raise InvalidInput(f"the request's body did not come within {BODY_SECONDS:g} s") from None
    try:
        data = json.loads(content)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise InvalidInput("the request is no JSON") from error
    if not isinstance(data, dict):
        raise InvalidInput("the request is no JSON object")
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        level = [item for held in level for item in (held.values() if isinstance(held, dict) else held)
                 if isinstance(item, dict | list)]  # fmt: skip
        if not level:
            return data
    raise _too_deep()


def _too_deep() -> Refused:
    return Refused(f"the request is nested deeper than {MAX_DEPTH} levels, which is the limit")


def _texts(data: dict[str, Any], name: str) -> dict[str, str]:
    value = data.get(name) or {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise InvalidInput(f"{name}: names and texts were expected")
    return value


def _text(data: dict[str, Any], name: str, default: str = "") -> str:
    value = data.get(name, default)
    if not isinstance(value, str) or "\0" in value or (not value.isascii() and _has_surrogates(value)):
        raise InvalidInput(f"{name}: a text was expected")
    return value


def _has_surrogates(text: str) -> bool:
    """Whether a text cannot be written as UTF-8: JSON can spell half of a character."""
    return any("\ud800" <= char <= "\udfff" for char in text)


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) > most:
        raise InvalidInput(f"{name}: a number from 0 to {most} was expected, not {text[:40]!r}")
    return int(text)


async def server(service: Service, _: Asker, __: Request) -> Response:
    """Who answers."""
    return JSONResponse(
        {"version": __version__, "api": wire.API, "server": service.id, "pid": os.getpid(), "uid": os.getuid(),
         "simulated": service.inventory.simulated, "notes": service.notes}
    )  # fmt: skip


async def submit(service: Service, asker: Asker, request: Request) -> Response:
    """Validate files and take their jobs in: all of them, or none."""
    service.quotas.submission(asker.uid)
    owner, parsed, values = await _submission(service, asker, request)
    made = await service.submit(owner, parsed, values)
    submissions = {jobs[0].id.number: len(jobs) for jobs in made}
    answer: dict[str, Any] = {
        "jobs": [{"id": number, "elements": count} for number, count in submissions.items()],
        "contexts": service.contexts.rows(submissions),
        "notes": service.notes,
    }
    return JSONResponse(answer, 201)


async def plan(service: Service, asker: Asker, request: Request) -> Response:
    """What would happen to each job of the files now; nothing is done."""
    owner, parsed, _ = await _submission(service, asker, request)
    specs = [spec for _, _, elements in parsed for _, spec in elements]
    discreet = rows.discreet(service, asker)
    plans = [await service.plan(owner, spec, discreet=discreet) for spec in specs[:MAX_PLANS]]
    return JSONResponse({**plans[0], "jobs": len(specs), "others": plans[1:]})


async def _submission(
    service: Service, asker: Asker, request: Request
) -> tuple[Owner, list[tuple[str, str, list[tuple[int | None, JobSpec]]]], list[dict[str, bytes]]]:
    """Whose jobs the files of a request would be; what they say: (name, text, elements); their secrets' values."""
    data = await _body(request)
    run_as = data.get("run_as")
    if run_as is not None and not isinstance(run_as, str):
        raise InvalidInput("run_as: an account's name was expected")
    owner = await service.directory.submitter(asker, run_as)
    files = data.get("files")
    if not isinstance(files, list) or not files or not all(isinstance(entry, dict) for entry in files):
        raise InvalidInput("files: a list of job files was expected")
    uuids = tuple(gpu.uuid for gpu in service.inventory.gpus)
    parsed, secrets = [], []
    for entry in files:
        found, values = _secrets(entry)
        secrets.append(values)
        text = _text(entry, "text")
        context = specfile.Context(
            file=_text(entry, "file", "<stdin>"),
            directory=_text(entry, "directory", "/"),
            home=owner.home if run_as is not None else _text(data, "home", owner.home),
            variables=_texts(data, "variables"),
            working_directory=_text(data, "working_directory", "/"),
            env_files=_texts(data, "env_files"),
            uuids=uuids,
            secrets=found,
        )
        elements = await asyncio.to_thread(specfile.parse, text, context)
        parsed.append((context.file, text, [(element.index, element.spec) for element in elements]))
    specs = [spec for _, _, elements in parsed for _, spec in elements]
    if run_as is not None and any(spec.secrets for spec in specs):
        raise Refused("--run-as: secrets are read by whoever submits, which is not the job's user then",
                      hint=f"{owner.name} can submit the file.")  # fmt: skip
    await service.check_allowed(owner, specs)
    return owner, parsed, secrets


def _secrets(entry: dict[str, Any]) -> tuple[dict[str, str], dict[str, bytes]]:
    """What a client found of a file's secrets, by their names: why it has none of one, or nothing; and the values."""
    data = entry.get("secrets") or {}
    if not isinstance(data, dict) or not all(isinstance(item, dict) for item in data.values()):
        raise InvalidInput("secrets: names and what was found of them were expected")
    values = {}
    for name, item in data.items():
        if (text := _text(item, "value")) != "":
            try:
                values[name] = base64.b64decode(text, validate=True)
            except ValueError:
                raise InvalidInput("secrets: a value is not in base 64") from None
    return {name: _text(item, "problem") for name, item in data.items()}, values


async def listing(service: Service, asker: Asker, request: Request) -> Response:
    """The jobs that have not ended, or with ``all=1`` the latest of all, as far as the asker may see them."""
    limit = _number(request, "limit", MAX_ROWS, MAX_ROWS)
    if request.query_params.get("all", "0") == "1":
        found = await _latest(service, limit)
    else:
        found = await service.store.read(lambda ledger: ledger.page(every=False, limit=limit))
    shown, others = rows.visible(service, asker, found)
    return StreamingResponse(_listed(service, asker, shown, others), media_type="application/json")


async def _latest(service: Service, limit: int) -> list[Job]:
    """The latest jobs, oldest first, read a part at a time: what the loop wants to read comes between."""
    parts: list[list[Job]] = []
    before: JobId | None = None
    while limit > 0:
        wanted = min(READ, limit)
        part = await service.store.read(lambda ledger: ledger.page(every=True, limit=wanted, before=before))  # noqa: B023 - it is awaited here
        parts.append(part)
        if len(part) < wanted:
            break
        before, limit = part[0].id, limit - wanted
    return [job for part in reversed(parts) for job in part]


async def _listed(
    service: Service, asker: Asker, shown: list[Job], others: dict[str, int] | None
) -> AsyncIterator[bytes]:
    """The answer's JSON, a page at a time: a long queue must not hold up everybody else."""
    explainer = service.explainer(discreet=rows.discreet(service, asker))
    before = b'{"jobs": ['
    for start in range(0, len(shown), PAGE):
        page = [json.dumps(rows.row(service, job, explainer, asker)) for job in shown[start : start + PAGE]]
        yield before + ", ".join(page).encode()
        before = b", "
        await asyncio.sleep(0)
    head = before if not shown else b""
    counted = b"" if others is None else b', "others": ' + json.dumps(others).encode()
    yield head + b"]" + counted + b"}"


async def _named(service: Service, asker: Asker, request: Request) -> list[Job]:
    """The jobs that a request's id stands for, as far as the asker may see that there are such.

    Raises:
        UnknownId: There are none.
    """
    text = request.path_params["id"]
    found = await service.named(text)
    shown, _ = rows.visible(service, asker, found)
    if len(shown) < len(found):
        raise UnknownId(f"there is no job {text[:40]}", hint="`gpujobs ps --all` lists all of them.")
    return found


def _require(service: Service, asker: Asker, job: Job, what: str) -> None:
    """Refuse what only a job's owner and administrators may do."""
    if not asker.may_act(job):
        whose = "somebody else" if rows.discreet(service, asker) else job.owner.name
        raise Refused(f"job {job.id} is {whose}'s: only they and administrators may {what}")


async def show(service: Service, asker: Asker, request: Request) -> Response:
    """Everything about a job, or about each element of an array; the inside only to who may see it."""
    explainer = service.explainer(discreet=rows.discreet(service, asker))
    found = await _named(service, asker, request)
    answer = []
    for job in found:
        attempts = await service.store.read(lambda ledger, job=job: ledger.attempts(job.id))  # type: ignore[misc]
        answer.append(rows.details(service, job, explainer, attempts, asker))
    return JSONResponse({"jobs": answer})


async def watch(service: Service, asker: Asker, request: Request) -> Response:
    """Rows as JSON lines, one at each change, until all jobs of the id have ended and their logs are stored."""
    text = request.path_params["id"]
    number = (await _named(service, asker, request))[0].id.number

    async def lines() -> AsyncIterator[bytes]:
        told: dict[Any, str] = {}
        event = service.watchers.watch(number)
        try:
            while True:
                event.clear()
                found = await service.named(text)
                explainer = service.explainer(discreet=rows.discreet(service, asker))
                for job in found:
                    line = json.dumps(rows.row(service, job, explainer, asker))
                    if told.get(job.id) != line:
                        told[job.id] = line
                        yield line.encode() + b"\n"
                if all(service.settled(job) for job in found):
                    return
                await event.wait()
        finally:
            service.watchers.unwatch(number, event)

    return StreamingResponse(lines(), media_type=wire.LINES_MEDIA_TYPE)


async def cancel(service: Service, asker: Asker, request: Request) -> Response:
    """End a job or an array; answered once that is recorded."""
    found = await _named(service, asker, request)
    for job in found:
        _require(service, asker, job, "cancel it")
    message = "cancelled" if len({job.owner.uid for job in found} - {asker.uid}) == 0 else f"cancelled by {asker.name}"
    changed = [await service.stop(job.id, "cancelled", message) for job in found]
    explainer = service.explainer(discreet=rows.discreet(service, asker))
    return JSONResponse({"jobs": [rows.row(service, job, explainer, asker) for job in changed]})


async def rerun(service: Service, asker: Asker, request: Request) -> Response:
    """Submit a job or an array again: the same specification, the same image by its digest."""
    service.quotas.submission(asker.uid)
    found = await _named(service, asker, request)
    for job in found:
        _require(service, asker, job, "run it again")
    given = asker.owner if asker.uid == found[0].owner.uid else found[0].owner
    made = await service.rerun(found, given)
    number = made[0].id.number
    answer = {
        "jobs": [{"id": number, "elements": len(made)}],
        "contexts": service.contexts.rows([number]),
        "notes": service.notes,
    }
    return JSONResponse(answer, 201)


async def context(service: Service, asker: Asker, request: Request) -> Response:
    """Take in the tar file of a build context that a submission asked for, by its key; answered once it is on disk."""
    found = await _named(service, asker, request)
    _require(service, asker, found[0], "send its build context")
    number = found[0].id.number
    await service.contexts.receive(number, request.path_params["key"], _pieces(request))
    await service.context_came(number)
    return JSONResponse({"jobs": [{"id": number, "elements": len(found)}]})


async def logs(service: Service, asker: Asker, request: Request) -> Response:
    """The frames of a job's log: of its last attempt, or of the one named."""
    found = await _named(service, asker, request)
    if len(found) != 1:
        raise InvalidInput(f"{request.path_params['id']} is an array: its elements' logs are asked for one by one")
    job = found[0]
    _require(service, asker, job, "read its log")
    follow = request.query_params.get("follow", "0") == "1"
    wanted = _number(request, "attempt", 0, 10**6)
    tail_text = request.query_params.get("tail", "")
    tail = _number(request, "tail", 0, 10**9) if tail_text else None
    since_text = request.query_params.get("since", "")
    try:
        since = float(since_text) if since_text else None
    except ValueError:
        since = -1.0
    if since is not None and not 0 <= since < 2**33:
        raise InvalidInput(f"since: seconds since the epoch were expected, not {since_text[:40]!r}")
    skip = _number(request, "skip", 0, 10**12)
    return StreamingResponse(_frames(service, job, wanted, follow, tail, since, skip), media_type=wire.LOG_MEDIA_TYPE)


async def _frames(
    service: Service, job: Job, wanted: int, follow: bool, tail: int | None, since: float | None, skip: int
) -> AsyncIterator[bytes]:
    event = service.watchers.watch(job.id.number)
    try:
        while True:
            event.clear()
            job = await service.job(job.id)
            attempt = wanted or getattr(job.state, "attempt", 0)
            if (found := service.logs.reader(job.id, attempt)) is not None:
                reader, written = found
                since_ns = None if since is None else round(since * 1e9)
                async for batch in reader.batches(since_ns=since_ns, tail=tail, follow=follow and written):
                    kept, skip = _after(batch, skip) if skip else (batch, 0)
                    if kept:
                        yield b"".join(map(encode_frame, kept))
                return
            if not follow or isinstance(job.state, Ended):
                return
            await event.wait()
    finally:
        service.watchers.unwatch(job.id.number, event)


def _after(batch: list[LogRecord], skip: int) -> tuple[list[LogRecord], int]:
    """A batch without its first records of the program, and how many are still to be left out; marks do not count."""
    for position, record in enumerate(batch):
        if not skip:
            return batch[position:], 0
        skip -= record.stream != GAP
    return [], skip


async def gpus(service: Service, asker: Asker, __: Request) -> Response:
    """The GPUs and who has what of them, as far as the asker may see it."""
    await service.gpus.look()
    return JSONResponse(rows.inventory(service, asker))
