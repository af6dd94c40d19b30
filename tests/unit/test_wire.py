"""The messages between client and server: times, errors, the variables that a file names."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpujobs import wire
from gpujobs.core.errors import BY_CODE, GpujobsError, InvalidInput, Problem, Refused


def test_a_time_is_written_in_utc_with_a_z_and_microseconds() -> None:
    assert wire.rfc3339(1700000000.5) == "2023-11-14T22:13:20.500000Z"


def test_a_time_that_is_not_known_stays_a_gap() -> None:
    assert wire.rfc3339(None) is None


@given(st.floats(min_value=0, max_value=4e9, allow_nan=False))
def test_a_time_comes_back_to_the_microsecond(seconds: float) -> None:
    text = wire.rfc3339(seconds)
    assert text is not None
    assert abs(wire.from_rfc3339(text) - seconds) <= 1e-6
    assert datetime.fromisoformat(text).utcoffset() == timedelta(0)


def test_times_are_read_with_any_offset() -> None:
    assert wire.from_rfc3339("2023-11-15T00:13:20+02:00") == wire.from_rfc3339("2023-11-14T22:13:20Z") == 1700000000


@pytest.mark.parametrize("text", ["", "yesterday", "2023-13-01T00:00:00Z", "1700000000"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        wire.from_rfc3339(text)


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_comes_over_the_wire_as_it_was(code: str) -> None:
    problems = (Problem("job.yaml", 3, 7, "gpus.count", "wrong"), Problem("job.yaml", 0, 0, "", "worse"))
    error = BY_CODE[code]("a sentence", hint="do this", problems=problems)
    read = wire.error_of(json.loads(json.dumps(wire.error_body(error))))
    assert type(read) is BY_CODE[code]
    assert (read.message, read.hint, read.problems) == ("a sentence", "do this", problems)


def test_the_body_of_an_error_has_the_contracts_keys_and_exit_code() -> None:
    body = wire.error_body(Refused("no"))
    assert list(body) == ["code", "exit", "message", "hint", "problems"]
    assert (body["code"], body["exit"]) == ("refused", 3)


def test_an_error_of_an_unknown_code_is_still_an_error_with_its_sentence() -> None:
    read = wire.error_of({"code": "of-the-future", "message": "something new"})
    assert type(read) is GpujobsError
    assert (read.message, read.exit) == ("something new", 1)


def test_an_answer_without_a_sentence_gets_one() -> None:
    assert wire.error_of({}).message == "the server answered in an unknown way"


def test_an_invalid_input_without_problems_has_none() -> None:
    assert wire.error_of(wire.error_body(InvalidInput("x"))).problems == ()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("image: ${IMAGE}", {"IMAGE"}),
        ("a: $HOME/x and ${DATA:-/data}", {"HOME", "DATA"}),
        ("a: ${A?needed} ${B+set} ${C-c}", {"A", "B", "C"}),
        ("price: $$HOME", set()),
        ("$$$REAL", {"REAL"}),
        ("${}, $1, $, $-", set()),
        ("{{ lr }}", set()),
    ],
)
def test_the_variables_that_a_file_names_are_found(text: str, names: set[str]) -> None:
    assert wire.variables_in(text) == names


def test_the_messages_need_the_standard_library_alone() -> None:
    code = (
        "import sys, gpujobs.wire, gpujobs.logwire, gpujobs.places\n"
        "print(*sorted({n.partition('.')[0] for n in sys.modules} - set(sys.stdlib_module_names)))"
    )
    out = subprocess.run([sys.executable, "-S", "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert [name for name in out.stdout.split() if not name.startswith("__")] == ["gpujobs"]
