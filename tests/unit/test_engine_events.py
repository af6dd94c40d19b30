"""The Engine's events as they are read: each once, whatever times they bear."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from gpujobs.adapters.streams import engine_events
from gpujobs.core.ports import EngineEvent


def event(seconds: int, action: str) -> bytes:
    actor = {"ID": "c1", "Attributes": {}}
    return json.dumps({"Type": "container", "Action": action, "timeNano": seconds * 10**9, "Actor": actor}).encode()


def test_what_happens_after_the_machines_clock_was_set_back_is_told_too_and_once(tmp_path: Path) -> None:
    first = [event(2000, "create"), event(2000, "start"), event(1000, "die")]
    answers = [first, [*first, event(1001, "destroy")]]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\nServer: Docker/20.10.24 (linux)\r\n\r\n")
        await writer.drain()
        writer.write(b"\n".join(answers.pop(0)) + b"\n")
        await writer.drain()
        writer.close()

    async def read() -> list[str]:
        told: list[str] = []
        async with await asyncio.start_unix_server(answer, tmp_path / "engine.sock"):
            async for found in engine_events(f"unix://{tmp_path}/engine.sock", 1999.0, {}):
                if isinstance(found, EngineEvent):
                    told.append(found.action)
                if "destroy" in told:
                    break
        return told

    assert asyncio.run(asyncio.wait_for(read(), 20)) == ["create", "start", "die", "destroy"]
