"""How an attempt ended, in the contract's words and in a sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpujobs.core.container import INIT_REFUSED
from gpujobs.core.endings import Ending, ending_of, signal_name, size

GIB = 2**30


def ended(
    code: int, *, oom: bool = False, memory: int = 8 * GIB, released: bool = True, stop: tuple[str, str] | None = None
) -> Ending:
    return ending_of(code, oom=oom, memory=memory, released=released, stop=stop)


def test_exit_0_is_a_success_and_needs_no_words() -> None:
    assert ended(0) == Ending(outcome="succeeded", reason="", message="")


def test_the_memory_limit_is_told_with_its_size() -> None:
    assert ended(137, oom=True) == Ending(
        outcome="failed", reason="oom", message="exit 137: killed: the 8 GiB memory limit was reached (peak 8 GiB): "
        "raise `mem_limit`, or hold less in memory at once"
    )


def test_a_program_that_survived_the_killing_of_a_child_and_ended_well_succeeded() -> None:
    assert ended(0, oom=True).outcome == "succeeded"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (1, "exit 1"),
        (2, "exit 2"),
        (126, "exit 126: the command could not be run"),
        (127, "exit 127: the command was not found in the image"),
        (128, "exit 128"),
        (130, "exit 130: ended by SIGINT"),
        (134, "exit 134: ended by SIGABRT"),
        (137, "exit 137: ended by SIGKILL"),
        (139, "exit 139: ended by SIGSEGV"),
        (143, "exit 143: ended by SIGTERM"),
        (192, "exit 192: ended by SIGRTMAX"),
        (193, "exit 193"),
        (255, "exit 255"),
    ],
)
def test_an_exit_code_is_told_in_words(code: int, message: str) -> None:
    assert ended(code) == Ending(outcome="failed", reason="exit", message=message)


def test_what_the_server_stopped_ended_for_the_servers_reason_whatever_its_code() -> None:
    for code in (0, 1, 137, 143):
        assert ended(code, stop=("time-limit", "its time limit of 60 s was reached")) == Ending(
            outcome="failed", reason="time-limit", message="its time limit of 60 s was reached"
        )


def test_a_cancelled_job_is_cancelled_and_not_failed() -> None:
    assert ended(143, stop=("cancelled", "cancelled by ada")) == Ending(
        outcome="cancelled", reason="cancelled", message="cancelled by ada"
    )


def test_an_init_that_refused_ends_the_job_as_isolation() -> None:
    found = ended(INIT_REFUSED, released=False)
    assert (found.outcome, found.reason) == ("failed", "isolation")
    assert "its program never ran" in found.message


@pytest.mark.parametrize("code", [0, 137, 143])
def test_a_container_that_ended_before_its_release_is_no_success_and_no_failed_program(code: int) -> None:
    assert ended(code, released=False) == Ending(
        outcome="failed",
        reason="server",
        message=f"its program never ran: its container ended before it was released (exit {code})",
    )


def test_a_program_that_itself_exits_as_the_init_would_is_only_a_failed_program() -> None:
    assert ended(INIT_REFUSED) == Ending(outcome="failed", reason="exit", message="exit 125")


@given(st.integers(0, 255), st.booleans(), st.booleans())
def test_every_end_but_a_success_has_a_reason_of_one_word_and_a_sentence(code: int, oom: bool, released: bool) -> None:
    found = ended(code, oom=oom, released=released)
    assert (found.outcome == "succeeded") is (not found.reason) is (not found.message)
    assert " " not in found.reason


@pytest.mark.parametrize(
    ("value", "words"), [(8 * GIB, "8 GiB"), (3 * GIB // 2, "1.5 GiB"), (512 * 2**20, "512 MiB"), (6 * 2**20, "6 MiB")]
)
def test_sizes_are_for_people(value: int, words: str) -> None:
    assert size(value) == words


def test_a_signal_without_a_name_is_called_by_its_number() -> None:
    assert (signal_name(9), signal_name(40)) == ("SIGKILL", "signal 40")
