"""The stored log of an attempt: format, limits, reading in every way, repairs."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpujobs.adapters import logfile
from gpujobs.adapters.logfile import LogReader, LogWriter
from gpujobs.core import errors
from gpujobs.logwire import GAP, STDERR, STDOUT, LogRecord, decode_frames, encode_frame


def numbered(count: int, stream: int = STDOUT, start: int = 0) -> list[LogRecord]:
    return [LogRecord(10**18 + n, stream, b"line %06d\n" % n) for n in range(start, start + count)]


async def collect(reader: LogReader, **how: object) -> list[LogRecord]:
    return [record for batch in [b async for b in reader.batches(**how)] for record in batch]  # type: ignore[arg-type]


def read(path: Path, **how: object) -> list[LogRecord]:
    return asyncio.run(collect(LogReader(path), **how))


async def until(condition: object) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - any condition  # type: ignore[operator]
            await asyncio.sleep(0.005)


def test_what_is_appended_is_read_back_record_by_record(tmp_path: Path) -> None:
    records = [LogRecord(5, STDOUT, b"a\n"), LogRecord(4, STDERR, b""), LogRecord(6, STDOUT, b"\0\r\xff" * 5000)]
    log = LogWriter(tmp_path / "log")
    log.append(records)
    log.append_gap("gap: lost", 7)
    log.close()
    assert read(tmp_path / "log") == [*records, LogRecord(7, GAP, b"gap: lost")]
    assert LogWriter(tmp_path / "log").payload == sum(len(r.payload) for r in records) + len("gap: lost")


def test_a_record_longer_than_a_block_is_read_in_both_directions(tmp_path: Path) -> None:
    records = [LogRecord(1, STDOUT, b"a\n"), LogRecord(2, STDOUT, os.urandom(1 << 20)), LogRecord(3, STDOUT, b"b\n")]
    log = LogWriter(tmp_path / "log")
    log.append(records)
    assert [r for batch in log.backward() for _, r in batch] == records[::-1]
    log.close()
    assert read(tmp_path / "log") == records


@pytest.mark.parametrize("cut", [1, 3, 5, 17, 20, 30])
def test_a_torn_last_record_is_cut_off_at_open_and_the_log_goes_on(tmp_path: Path, cut: int) -> None:
    log = LogWriter(tmp_path / "log")
    log.append(numbered(3))
    log.close()
    (segment,) = (tmp_path / "log").glob("*.seg")
    os.truncate(segment, segment.stat().st_size - cut)
    whole = numbered(2)
    assert read(tmp_path / "log")[:2] == numbered(3)[: 2 if cut < 30 else 1] + read(tmp_path / "log")[1:2][: cut >= 30]
    log = LogWriter(tmp_path / "log")
    log.append(numbered(1, start=7))
    log.close()
    assert read(tmp_path / "log") == (whole if cut < 29 else whole[:1]) + numbered(1, start=7)


def test_a_segment_torn_at_birth_is_replaced(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "log")
    log.append(numbered(3))
    (tmp_path / "log" / f"{log.end:020d}.seg").write_bytes(b"GJ")
    log.close()
    log = LogWriter(tmp_path / "log")
    log.append(numbered(1, start=3))
    log.close()
    assert read(tmp_path / "log") == numbered(4)


def test_a_full_disk_stores_nothing_of_a_batch_and_the_log_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LogWriter(tmp_path / "log")
    log.append(numbered(2))
    real, calls = os.write, []

    def full(fd: int, data: bytes) -> int:
        calls.append(fd)
        if len(calls) == 1:
            return real(fd, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logfile.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        log.append(numbered(5, start=2))
    monkeypatch.undo()
    log.append(numbered(1, start=2))
    log.close()
    assert read(tmp_path / "log") == numbered(3)


def test_head_and_tail_are_kept_and_the_dropped_middle_is_counted_exactly(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "log", head_limit=20_000, tail_limit=20_000)
    for start in range(0, 20_000, 100):
        log.append(numbered(100, start=start))
    log.close()
    used = sum(file.stat().st_size for file in (tmp_path / "log").iterdir())
    assert used < 60_000
    records = read(tmp_path / "log")
    (at,) = (n for n, record in enumerate(records) if record.stream == GAP)
    head, tail = records[:at], records[at + 1 :]
    assert head == numbered(len(head))
    assert tail == numbered(len(tail), start=20_000 - len(tail))
    dropped = (20_000 - len(head) - len(tail)) * len(b"line 000000\n")
    assert records[at].payload.startswith(b"gap: " + format(dropped, ",").encode() + b" bytes")
    assert LogWriter(tmp_path / "log").payload == 20_000 * 12


def test_a_slow_reader_of_a_dropped_middle_is_told_and_goes_on(tmp_path: Path) -> None:
    async def scenario() -> list[LogRecord]:
        log = LogWriter(tmp_path / "log", head_limit=1000, tail_limit=20_000)
        log.append(numbered(100))
        batches = log.reader().batches(follow=True)
        got = await anext(batches)
        for start in range(100, 20_000, 100):
            log.append(numbered(100, start=start))
        log.close()
        async for batch in batches:
            got = got + batch
        return got

    records = asyncio.run(scenario())
    assert [r.stream for r in records].count(GAP) == 1
    assert records[0] == numbered(1)[0]
    assert records[-1] == numbered(1, start=19_999)[0]


def test_since_gives_records_from_that_time_on(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "log", tail_limit=20_000)
    for start in range(0, 3000, 100):
        log.append(numbered(100, start=start))
    log.close()
    assert len(list((tmp_path / "log").iterdir())) > 5
    for since in (0, 1, 1499, 2999, 3000):
        assert read(tmp_path / "log", since_ns=10**18 + since) == numbered(3000 - since, start=since)


def _tail_by_definition(records: list[LogRecord], lines: int) -> list[LogRecord]:
    """Each record belongs to a line, lines end at a newline or with the log; the last lines by their ends."""
    line_of: list[int] = [0] * len(records)
    ends: list[int] = []
    pending: dict[int, list[int]] = {STDOUT: [], STDERR: []}
    for n, record in enumerate(records):
        pending[record.stream].append(n)
        if record.payload.endswith(b"\n"):
            ends.append(n)
            for member in pending[record.stream]:
                line_of[member] = n
            pending[record.stream] = []
    for members in pending.values():
        if members:
            ends.append(members[-1])
            for member in members:
                line_of[member] = members[-1]
    chosen = set(sorted(ends)[len(ends) - min(lines, len(ends)) :])
    return [record for n, record in enumerate(records) if line_of[n] in chosen]


pieces = st.tuples(st.sampled_from([STDOUT, STDERR]), st.sampled_from([b"piece", b"end\n", b"\n", b"x"]))


@settings(max_examples=150, deadline=None)
@given(st.lists(pieces, max_size=30), st.integers(0, 12))
def test_tail_gives_the_last_lines_of_the_whole_log_with_all_their_pieces(
    tmp_path_factory: pytest.TempPathFactory, what: list[tuple[int, bytes]], lines: int
) -> None:
    path = tmp_path_factory.mktemp("tail")
    records = [LogRecord(n, stream, payload) for n, (stream, payload) in enumerate(what)]
    log = LogWriter(path, tail_limit=400)
    for record in records:
        log.append([record])
    log.close()
    assert read(path, tail=lines) == _tail_by_definition(records, lines)


def test_a_follower_is_woken_by_each_append_and_ends_with_the_writer(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = LogWriter(tmp_path / "log")
        got: list[LogRecord] = []

        async def follow() -> None:
            async for batch in log.reader().batches(follow=True):
                got.extend(batch)

        task = asyncio.create_task(follow())
        for n in range(20):
            log.append(numbered(1, start=n))
            await until(lambda n=n: len(got) == n + 1)
        await log.finish()
        await asyncio.wait_for(task, 5)
        assert got == numbered(20)
        assert await collect(LogReader(tmp_path / "log"), follow=True) == numbered(20)
        assert await collect(log.reader(), follow=True, tail=2) == numbered(2, start=18)

    asyncio.run(scenario())


def test_a_follower_waits_without_polling(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = LogWriter(tmp_path / "log")
        reader = log.reader()
        task = asyncio.ensure_future(anext(reader.batches(follow=True, tail=0)))
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        assert not loop._scheduled, "a waiting reader must hold no timer"  # type: ignore[attr-defined]
        log.append(numbered(1))
        assert await asyncio.wait_for(task, 5) == numbered(1)
        log.close()

    asyncio.run(scenario())


def test_records_put_in_later_reach_new_readers_and_old_ones_are_told_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = LogWriter(tmp_path / "log")
        log.append(numbered(10))
        log.append(numbered(5, start=20))
        ahead, behind = log.reader().batches(follow=True), log.reader().batches(follow=True)
        got = await anext(ahead)
        missed_at = log.end - sum(13 + 12 + 4 for _ in range(5))
        log.rewind(missed_at)
        task = asyncio.ensure_future(anext(ahead))
        log.append(numbered(10, start=10))
        await asyncio.sleep(0)
        assert not task.done()
        log.resynced()
        log.append(numbered(2, start=20))
        await asyncio.sleep(0)
        assert not task.done(), "what this reader has had already must be back first"
        log.append(numbered(3, start=22))
        got += await asyncio.wait_for(task, 5)
        log.append(numbered(1, start=25))
        log.close()
        got += [record async for batch in ahead for record in batch]
        assert [r for r in got if r.stream != GAP] == numbered(10) + numbered(6, start=20)
        (note,) = [r for r in got if r.stream == GAP]
        assert note.payload.startswith(b"gap: 120 bytes of output came late")
        assert [record async for batch in behind for record in batch] == numbered(26)
        assert LogWriter(tmp_path / "log").payload == 26 * 12

    asyncio.run(scenario())


def test_a_log_of_60_megabytes_is_read_and_followed_in_little_memory(tmp_path: Path) -> None:
    async def scenario() -> tuple[int, int]:
        log = LogWriter(tmp_path / "log")
        batch = [LogRecord(1, STDOUT, b"x" * 1023 + b"\n")] * 512
        for _ in range(120):
            log.append(batch)
        tracemalloc.start()
        total = 0
        async for frames in log.reader().frames():
            total += len(frames)
        log.close()
        async for frames in LogReader(tmp_path / "log").frames(tail=1000):
            total += len(frames)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return total, peak

    total, peak = asyncio.run(scenario())
    assert total == (120 * 512 + 1000) * (1024 + 13)
    assert peak < 12 << 20


def test_frames_survive_being_split_anywhere() -> None:
    records = [LogRecord(random.getrandbits(60), STDERR, os.urandom(n)) for n in (0, 1, 100, 17_000)]
    wire = b"".join(map(encode_frame, records))
    for size in (1, 7, 4096, len(wire)):
        got, rest = [], b""
        for start in range(0, len(wire), size):
            new, rest = decode_frames(rest + wire[start : start + size])
            got += new
        assert (got, rest) == (records, b"")
    with pytest.raises(ValueError, match="not a log frame"):
        decode_frames(b"HTTP/1.1 500 Oh no, an error page")


def test_a_log_that_is_not_there_is_an_unknown_id(tmp_path: Path) -> None:
    with pytest.raises(errors.UnknownId):
        LogReader(tmp_path / "none")
