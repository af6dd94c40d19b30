"""Laying the Engine's answers over the stored log: nothing twice, nothing lost without a mark."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpujobs.adapters.logalign import Aligner, State, index
from gpujobs.adapters.logfile import LogReader, LogWriter
from gpujobs.adapters.lognewlines import Newlines
from gpujobs.logwire import LogRecord

runs = st.lists(st.tuples(st.sampled_from([1, 2]), st.sampled_from([b"a\n", b"b"]), st.integers(1, 5)), max_size=8)


def messages(shape: list[tuple[int, bytes, int]]) -> list[LogRecord]:
    """Runs of equal messages, each run with a time of its own: the pieces of one line share theirs."""
    return [LogRecord(100 + n, s, text) for n, (s, text, count) in enumerate(shape) for _ in range(count)]


def stored(path: object) -> list[LogRecord]:
    async def everything() -> list[LogRecord]:
        return [r for batch in [b async for b in LogReader(path).batches()] for r in batch]  # type: ignore[arg-type]

    return asyncio.run(everything())


@settings(max_examples=300, deadline=None)
@given(runs, st.data())
def test_any_resume_with_any_overlap_gives_the_truth(
    tmp_path_factory: pytest.TempPathFactory, shape: list[tuple[int, bytes, int]], data: st.DataObject
) -> None:
    truth = messages(shape)
    path = tmp_path_factory.mktemp("log")
    log = LogWriter(path)
    had = data.draw(st.integers(0, len(truth)))
    missing = data.draw(st.integers(0, had))
    upto = data.draw(st.integers(missing, had))
    if (
        not missing
        or len({*truth[missing:upto]} & {*truth[upto:had]})
        or len({*truth[:missing]} & {*truth[missing:upto]})
    ):
        upto = missing  # holes are of whole files, never at the start, and not looked for within a run
    for record in truth[:missing] + truth[upto:had]:
        log.append([record])
    length = data.draw(st.integers(0, len(truth)))
    for tail in (length, len(truth)):
        answer = truth[len(truth) - tail :]
        whole = tail == len(truth)
        if not whole and not log.end:
            continue
        aligner = Aligner(log, asyncio.run(index(log, 0)), whole=whole)
        pieces = iter(answer)
        for record in pieces:
            log.append(aligner.feed([record]))
            if aligner.state is State.TOO_LATE:
                break
        assert not aligner.lost
    log.close()
    assert stored(path) == truth


def test_an_answer_that_begins_after_the_stored_end_is_known_by_its_first_message(tmp_path: object) -> None:
    truth = [LogRecord(n, 1, b"%d\n" % n) for n in range(100)]
    log = LogWriter(tmp_path)  # type: ignore[arg-type]
    log.append(truth[:50])
    aligner = Aligner(log, asyncio.run(index(log, 0)), whole=False)
    assert aligner.feed(truth[60:61]) == []
    assert aligner.state is State.TOO_LATE
    whole = Aligner(log, asyncio.run(index(log, 0)), whole=True)
    assert whole.feed(truth[60:]) == truth[60:]
    assert whole.lost
    log.close()


def test_pieces_of_an_old_unfinished_line_are_not_taken_for_stored_ones(tmp_path: object) -> None:
    """All pieces bear the first one's time, while the other stream goes on."""
    truth = []
    for n in range(30):
        truth += [LogRecord(1, 1, b"%3d%%\r" % n), LogRecord(10 + n, 2, b"warning %d\n" % n)]
    log = LogWriter(tmp_path)  # type: ignore[arg-type]
    log.append(truth[:21])
    aligner = Aligner(log, asyncio.run(index(log, 0)), whole=False)
    log.append(aligner.feed(truth[10:]))
    log.close()
    assert stored(tmp_path) == truth


def test_records_before_a_dropped_middle_are_not_aligned_with_those_after_it(tmp_path: object) -> None:
    truth = [LogRecord(n, 1, b"line %06d\n" % n) for n in range(5000)]
    log = LogWriter(tmp_path, head_limit=3000, tail_limit=20_000)  # type: ignore[arg-type]
    for start in range(0, 4000, 50):
        log.append(truth[start : start + 50])
    end = log.end
    made = asyncio.run(index(log, 0))
    assert 0 < len(made) < 4000
    aligner = Aligner(log, made, whole=True)
    fresh = aligner.feed(truth)
    assert fresh == truth[4000:]
    assert log.end == end
    log.close()


def test_a_message_that_is_later_than_the_last_stored_ones_but_before_them_is_not_taken_for_new(
    tmp_path: object,
) -> None:
    """A long line's pieces bear its first piece's time, and may be all that the indexed end holds."""
    line = [LogRecord(5, 2, b"w" * 16384)] * 30
    truth = [*line[:10], LogRecord(7, 1, b"later\n"), *line[10:], LogRecord(5, 2, b"end\n")]
    log = LogWriter(tmp_path)  # type: ignore[arg-type]
    log.append(truth)
    made = asyncio.run(index(log, log.end - (64 << 10)))
    assert len(made) < 25
    assert Aligner(log, made, whole=False).feed(truth) == []
    log.close()
    assert stored(tmp_path) == truth


def test_a_newline_that_was_put_in_is_not_looked_for_in_the_answer(tmp_path: object) -> None:
    """Even where what it ends is no longer within the indexed end of the log."""
    lines = [LogRecord(10 + n, 1, b"line %d\n" % n) for n in range(20_000)]
    truth = [LogRecord(5, 2, b"w" * 16384), LogRecord(5, 2, b"rest"), *lines, LogRecord(90_000, 2, b"end\n")]
    log = LogWriter(tmp_path)  # type: ignore[arg-type]
    log.append(Newlines(log).restore(truth))
    made = asyncio.run(index(log, log.end - 1000))
    assert len(made) < 20_000
    assert Aligner(log, made, whole=False).feed(truth) == []
    log.close()
    again = stored(tmp_path)
    assert b"".join(r.payload for r in again if r.stream == 2) == b"w" * 16384 + b"rest\nend\n"
    assert {r.stream for r in again} == {1, 2}


def test_our_own_words_at_a_logs_beginning_part_nothing(tmp_path: object) -> None:
    """A build's output is stored before the container's; only a mark of a loss makes what follows uncertain."""
    truth = [LogRecord(7, 1, b"ran\n")]
    log = LogWriter(tmp_path)  # type: ignore[arg-type]
    log.append_gap("Step 1/2 : FROM busybox", 5)
    log.append(truth)
    aligner = Aligner(log, asyncio.run(index(log, 0)), whole=True)
    assert aligner.feed(truth) == []
    assert aligner.state is State.MATCH
    log.close()
