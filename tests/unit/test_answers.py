"""How the API sends answers: in slices, and not for ever to a client that does not read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from gpujobs.adapters.store import Store
from gpujobs.core.errors import InvalidInput, Refused
from gpujobs.core.inventory import Inventory
from gpujobs.core.job import Ended, Owner
from gpujobs.core.ports import Ledger
from gpujobs.core.spec import JobSpec
from gpujobs.service import api
from gpujobs.service.access import Asker
from gpujobs.service.quotas import Quotas
from gpujobs.settings import Settings

ASKER = Asker(Owner(uid=5001, gid=5001, groups=(5001,), name="ada", home="/home/ada"), admin=False)


class Exchange:
    """A request to one endpoint, and what comes back.

    Args:
        respond: Makes the response.
        stream: Whether the endpoint is one that goes on.
        reads: How many messages the client takes before it stops reading.
        body: Pieces of the request's body; None for one that never comes.
    """

    def __init__(
        self, respond: Callable[[Request], Awaitable[Response]], *, stream: bool = False, reads: int = 10**6,
        body: tuple[bytes | None, ...] = (b"",), gone: bool = False,
    ) -> None:  # fmt: skip
        self.messages: list[Any] = []
        self.aborted = False
        self.worked = False
        self._respond, self._reads, self._body, self._gone = respond, reads, list(body), gone
        self._stream = stream
        self.quotas = Quotas(SimpleNamespace(now=lambda: 0.0))
        self.quotas.apply(Settings())

    async def _asker(self, _: object) -> Asker:
        return ASKER

    def _abort(self) -> None:
        self.aborted = True

    async def _receive(self) -> Any:
        if self._body:
            piece = self._body.pop(0)
            if piece is not None:
                return {"type": "http.request", "body": piece, "more_body": bool(self._body)}
        return await asyncio.get_running_loop().create_future()

    async def _send(self, message: Any) -> None:
        if len(self.messages) >= self._reads:
            await asyncio.get_running_loop().create_future()
        self.messages.append(message)

    async def _handle(self, _: object, __: object, request: Request) -> Response:
        self.worked = True
        return await self._respond(request)

    def go(self, within: float = 20) -> Exchange:
        service: Any = SimpleNamespace(
            directory=SimpleNamespace(asker=self._asker), holds=SimpleNamespace(seen=lambda _: None),
            quotas=self.quotas, stopped=SimpleNamespace(is_set=lambda: False),
        )  # fmt: skip
        state = {"peer": None, "abort": self._abort, "gone": lambda: self._gone}
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b"", "state": state,
                 "asgi": {"spec_version": "2.3"}}  # fmt: skip
        endpoint = api.Endpoint(service, self._handle, stream=self._stream)
        asyncio.run(asyncio.wait_for(endpoint(scope, self._receive, self._send), within))
        return self

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])


async def large(_: Request) -> Response:
    return JSONResponse({"text": "x" * 1_000_000})


async def rows(_: Request) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b"row\n"

    return StreamingResponse(pieces())


def test_a_large_answer_is_sent_in_slices_and_whole() -> None:
    found = Exchange(large).go()
    assert json.loads(found.body) == {"text": "x" * 1_000_000}
    assert max(len(message.get("body", b"")) for message in found.messages) <= api.SLICE
    assert [message.get("more_body", False) for message in found.messages[1:]] == [True] * (len(found.messages) - 2) + [
        False
    ]


@pytest.mark.parametrize("respond", [large, rows])
def test_a_client_that_does_not_read_is_given_up(
    respond: Callable[[Request], Awaitable[Response]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "SEND_SECONDS", 0.05)
    assert Exchange(respond, reads=3).go().aborted


def test_a_stream_waits_for_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "SEND_SECONDS", 0.05)
    found = Exchange(rows, stream=True, reads=3)
    with pytest.raises(TimeoutError):
        found.go(within=0.5)
    assert not found.aborted


def test_who_has_gone_while_waiting_in_line_is_not_worked_for() -> None:
    found = Exchange(large, gone=True).go()
    assert (found.worked, found.messages) == (False, [])


def test_all_jobs_are_listed_however_many_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "READ", 4)
    store = Store(tmp_path / "state.sqlite")
    service: Any = SimpleNamespace(
        store=store, settings=Settings(), explainer=lambda **_: None, inventory=Inventory(),
        layers_of=lambda _: (), contexts=None, holds=None,
    )  # fmt: skip

    def end_some(ledger: Ledger) -> None:
        for _ in range(10):
            (job,) = ledger.submit(ASKER.owner, 1.0, "", "", [(None, JobSpec(image="busybox", name="job"))])
            ended = Ended(outcome="succeeded", attempt=1, started_at=1.0, ended_at=2.0, exit_code=0)
            ledger.set_state(replace(job, state=ended))

    async def listed(query: bytes) -> list[int]:
        request = Request({"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": query})
        response = await api.listing(service, ASKER, request)
        assert isinstance(response, StreamingResponse)
        text = b"".join([bytes(part) async for part in response.body_iterator])
        return [row["id"] for row in json.loads(text)["jobs"]]

    async def all_of_them() -> None:
        await store.change(end_some)
        assert await listed(b"all=1") == list(range(1, 11))
        assert await listed(b"all=1&limit=6") == list(range(5, 11))
        assert await listed(b"all=1&limit=8") == list(range(3, 11))
        assert await listed(b"") == []

    asyncio.run(all_of_them())
    store.close()


async def read_body(request: Request) -> Response:
    return JSONResponse(await api._body(request))


def test_a_body_in_pieces_is_one_request() -> None:
    assert json.loads(Exchange(read_body, body=(b'{"a"', b": 1}")).go().body) == {"a": 1}


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        ((b"{",), InvalidInput, "no JSON"),
        ((b"[]",), InvalidInput, "no JSON object"),
        ((b'{"a": ' + b"[" * 15 + b"]" * 15 + b"}",), None, ""),
        ((b'{"a": ' + b"[" * 16 + b"]" * 16 + b"}",), Refused, "deeper than 16 levels, which is the limit"),
        ((b"[" * 10**6,), Refused, "deeper than 16 levels"),
        ((b" " * 2**22, b" " * 2**22, b" "), Refused, "larger than 8 MiB, which is the limit"),
        ((b"{", None), InvalidInput, "did not come within 0.05 s"),
    ],
)
def test_what_is_wrong_with_a_body_is_told(
    body: tuple[bytes | None, ...], error: type | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "BODY_SECONDS", 0.05)
    found = Exchange(read_body, body=body).go()
    if error is None:
        assert found.status == 200
        return
    answer = json.loads(found.body)
    assert words in answer["message"]
    assert (found.status, answer["exit"]) == (error.status, error.exit)
    assert (b"connection", b"close") in found.messages[0]["headers"]
