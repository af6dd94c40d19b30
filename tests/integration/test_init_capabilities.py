"""The init's record ``keep=``: a program has the capabilities that were granted, all of them and no other."""

from __future__ import annotations

import subprocess

import pytest

from gpujobs.core.rules import capability_mask
from tests.integration.test_init import AS_PID_1, CAP_STATUS, GOOD, Box, box, record

__all__ = ["box"]

NET_RAW = f"{capability_mask(['NET_RAW']):x}"
KEEP = record(keep=NET_RAW)[:-1]
SETS = ("Inh", "Prm", "Eff", "Bnd", "Amb")
HELD = {"bounding": "-all,+net_raw", "inheritable": "-all,+net_raw", "ambient": "+net_raw"}


def status_of(text: str) -> dict[str, str]:
    return dict(line.split(":\t") for line in text.splitlines())


@pytest.mark.parametrize("mode", ["run", "exec"])
def test_the_program_has_the_kept_capability_in_every_set_and_no_other(box: Box, mode: str) -> None:
    box.control(KEEP, groups="42", caps=NET_RAW)
    done = box.as_root(mode, *CAP_STATUS)
    assert done.returncode == 0, done.stderr
    status = status_of(done.stdout)
    assert (status["Uid"], status["Gid"]) == ("\t".join(["5001"] * 4),) * 2
    assert status["Groups"].split() == ["42"]
    assert {status[f"Cap{name}"] for name in SETS} == {"0000000000002000"}
    assert status["NoNewPrivs"] == "1"


def test_what_the_program_starts_has_it_too(box: Box) -> None:
    box.control(KEEP, caps=NET_RAW)
    done = box.as_root("run", "sh", "-c", f"sh -c '{' '.join(CAP_STATUS[:2])} \"{CAP_STATUS[2]}\" {CAP_STATUS[3]}'")
    assert done.returncode == 0, done.stderr
    assert status_of(done.stdout)["CapEff"] == "0000000000002000"


def test_several_are_kept_together_and_the_bounding_set_may_hold_more(box: Box) -> None:
    keep = capability_mask(["NET_RAW", "SYS_PTRACE"])
    box.control(record(keep=f"{keep:x}")[:-1], caps=f"{keep | capability_mask(['SYS_NICE']):x}")
    status = status_of(box.as_root("run", *CAP_STATUS).stdout)
    assert {int(status[f"Cap{name}"], 16) for name in SETS if name != "Bnd"} == {keep}
    assert int(status["CapBnd"], 16) == keep | capability_mask(["SYS_NICE"])


def test_a_kept_capability_is_of_use(box: Box) -> None:
    """Without it the same call is refused: a process of uid 5001 may not open a raw socket."""
    program = ["/usr/bin/python3", "-c", "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"]
    box.control(caps=NET_RAW)
    assert "PermissionError" in box.as_root("run", *program).stderr
    box.control(KEEP, caps=NET_RAW)
    done = box.as_root("run", *program)
    assert done.returncode == 0, done.stderr


def test_it_is_kept_behind_the_gate_as_pid_1(box: Box) -> None:
    box.control(KEEP, caps=NET_RAW, nogate=False)
    process = subprocess.Popen(
        [*AS_PID_1, box.init, "--dir", box.path, "run", *CAP_STATUS], stdout=subprocess.PIPE, text=True
    )
    with box.gate.open("wb", buffering=0) as gate:
        gate.write(b"g")
    out, _ = process.communicate(timeout=30)
    assert status_of(out)["CapEff"] == "0000000000002000"


def test_who_holds_exactly_it_already_passes(box: Box) -> None:
    """A command executed in a running job: the Engine gives it what the container has."""
    box.control(KEEP, caps=NET_RAW)
    done = box.run("exec", *CAP_STATUS, **HELD)
    assert done.returncode == 0, done.stderr
    assert {status_of(done.stdout)[f"Cap{name}"] for name in SETS} == {"0000000000002000"}


@pytest.mark.parametrize("mode", ["run", "exec"])
@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({}, "capabilities: expected 2000, is effective 0, permitted 0, inheritable 0, ambient 0"),
        (
            {"bounding": "-all,+net_raw", "inheritable": "-all,+net_raw"},
            "capabilities: expected 2000, is effective 0, permitted 0, inheritable 2000, ambient 0",
        ),
        (
            {
                "bounding": "-all,+net_raw,+net_admin",
                "inheritable": "-all,+net_raw,+net_admin",
                "ambient": "+net_raw,+net_admin",
            },
            "capabilities: expected 2000, is effective 3000, permitted 3000, inheritable 3000, ambient 3000",
        ),
        ({**HELD, "bounding": "-all,+net_raw,+net_admin"}, "expected a bounding set within 2000, is 3000"),
    ],
)
def test_fewer_or_more_than_it_are_refused(box: Box, mode: str, identity: dict[str, str], message: str) -> None:
    box.control(KEEP, caps=NET_RAW)
    done = box.run(mode, "echo", "ran", **identity)
    assert (done.returncode, done.stdout) == (125, "")
    assert message in done.stderr


@pytest.mark.parametrize(
    ("bounding", "message"),
    [
        ("-all,+setuid,+setgid,+setpcap", "capset: Operation not permitted"),  # the Engine did not add it
        ("-all,+setuid,+setgid,+net_raw", "expected a bounding set within 2000, is 20c0"),  # cannot drop: no setpcap
    ],
)
def test_root_that_cannot_keep_it_alone_is_refused(box: Box, bounding: str, message: str) -> None:
    box.control(KEEP, caps=NET_RAW)
    done = box.run("run", "echo", "ran", uid=0, gid=0, bounding=bounding)
    assert (done.returncode, done.stdout) == (125, "")
    assert message in done.stderr


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (record(keep="2000"), "control file: keep= is not within caps="),
        (record(caps="1000", keep="2000"), "control file: keep= is not within caps="),
        (record(caps="2000", keep="3000"), "control file: keep= is not within caps="),
        (record(caps="2000", keep="2000") + record(keep="0"), "control file: keep is given twice"),
        (record(caps="2000", keep=""), "control file: keep= is not a number in range"),
        (record(caps="2000", keep="NET_RAW"), "control file: keep=NET_RAW is not a number in range"),
        (record(caps="ffffffffffffffff", keep="8000000000000000"), "Invalid argument"),  # no kernel has that one
    ],
)
def test_a_record_that_asks_for_more_than_there_is_is_refused(box: Box, data: bytes, message: str) -> None:
    box.raw(GOOD + data)
    done = box.as_root("run", "echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert message in done.stderr


def test_an_empty_record_keeps_none(box: Box) -> None:
    box.control(record(keep="0")[:-1], caps=NET_RAW)
    status = status_of(box.as_root("run", *CAP_STATUS).stdout)
    assert {status[f"Cap{name}"] for name in SETS if name != "Bnd"} == {"0" * 16}
