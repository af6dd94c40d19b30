"""The errors that people see, and their codes, by which client and server understand each other."""

from __future__ import annotations

import inspect
import re

import pytest

from gpujobs.core import errors
from gpujobs.core.errors import (
    BY_CODE,
    GpujobsError,
    Interrupted,
    InvalidInput,
    Problem,
    Refused,
    Unavailable,
    UnknownId,
)

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, GpujobsError)]


@pytest.mark.parametrize(
    ("kind", "exit_code"), [(InvalidInput, 2), (UnknownId, 2), (Refused, 3), (Unavailable, 4), (Interrupted, 130)]
)
def test_the_exit_codes_are_those_of_the_contract(kind: type[GpujobsError], exit_code: int) -> None:
    assert kind.exit == exit_code


def test_the_tree_drawn_in_the_module_is_the_tree_that_there_is() -> None:
    drawn = re.findall(r"(\w+) +(\d+) +(\w+)", errors.__doc__ or "")
    assert {(name, int(code), word) for name, code, word in drawn if name != "GpujobsError"} == {
        (kind.__name__, kind.exit, kind.code) for kind in KINDS if kind is not GpujobsError
    }


def test_every_kind_is_found_by_its_own_code_and_no_two_share_one() -> None:
    concrete = [kind for kind in KINDS if kind is not GpujobsError]
    assert {kind.code: kind for kind in concrete} == BY_CODE
    assert len({kind.code for kind in concrete}) == len(concrete)


def test_every_kind_has_a_status_of_http_that_says_whose_fault_it_is() -> None:
    assert {kind.code: kind.status for kind in KINDS} == {
        "error": 500,
        "invalid": 400,
        "unknown": 404,
        "refused": 403,
        "unavailable": 503,
        "interrupted": 499,
    }


def test_an_unknown_id_is_an_invalid_input() -> None:
    assert issubclass(UnknownId, InvalidInput)


def test_an_error_reads_as_its_sentence_and_keeps_its_hint_and_problems() -> None:
    problem = Problem("job.yaml", 3, 7, "gpus.count", "-1 is out of range")
    error = InvalidInput("job.yaml is not valid", hint="Mend it.", problems=(problem,))
    assert (str(error), error.hint, error.problems) == ("job.yaml is not valid", "Mend it.", (problem,))


def test_a_problem_reads_as_compilers_write_it() -> None:
    assert str(Problem("job.yaml", 3, 7, "gpus.count", "wrong")) == "job.yaml:3:7: gpus.count: wrong"


def test_a_problem_of_a_whole_file_names_no_key() -> None:
    assert str(Problem("job.yaml", 1, 1, "", "it is empty")) == "job.yaml:1:1: it is empty"


def test_a_problem_of_a_text_without_a_file_says_so() -> None:
    assert str(Problem("", 2, 1, "name", "wrong")) == "<text>:2:1: name: wrong"


def test_problems_sort_by_their_place() -> None:
    late, early = Problem("a", 10, 1, "", "z"), Problem("a", 9, 80, "", "a")
    assert sorted([late, early]) == [early, late]
