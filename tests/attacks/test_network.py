"""The network: jobs of different accounts, containers by hand, ports."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.attacks.tools import output, shell, submitted, undefended
from tests.e2e.harness import BUSYBOX, Row, Server, inspect, run
from tests.lab.accounts import Account
from tests.lab.engine import Engine

LOW = 1023
"""A port that only root may take."""

BIND = f"import socket; socket.socket().bind(('127.0.0.1', {LOW}))"

LISTEN = "while true; do echo from a stranger | nc -l -p 5000; done"
ASK = "nc -w 2 {address} 5000 < /dev/null"


def address_of(lab: Engine, container: str) -> str:
    (network,) = inspect(lab, container)["NetworkSettings"]["Networks"].values()
    return str(network["IPAddress"])


@pytest.fixture(scope="module")
def bobs_container(server: Server, bob: Account) -> Iterator[str]:
    """A job of bob's that listens and publishes its port."""
    job = server.submit(user=bob, script=LISTEN, ports=["5000"], cpus=0.1)
    yield server.until(job, "running")["container"]["id"]
    assert server.cli("cancel", job, user=bob).code == 0
    server.ended(job)


@pytest.fixture(scope="module")
def bobs_service(lab: Engine, bobs_container: str) -> str:
    """Its address."""
    return address_of(lab, bobs_container)


@pytest.fixture(scope="module")
def container_by_hand(lab: Engine) -> Iterator[str]:
    """A container on the Engine's default network, made without gpujobs, that listens and publishes two ports."""
    ports = ("--publish", "5000", "--publish", f"127.0.0.1:{LOW}:5001")
    made = lab.docker("run", "--detach", *ports, BUSYBOX, *shell(LISTEN)).strip()
    yield made
    lab.docker("rm", "--force", made)


@pytest.fixture(scope="module")
def by_hand(lab: Engine, container_by_hand: str) -> str:
    """Its address."""
    return address_of(lab, container_by_hand)


@pytest.fixture(scope="module")
def published_by_docker(lab: Engine, container_by_hand: str) -> dict[str, list[Row]]:
    """Where Docker publishes ports for whoever asks."""
    return dict(inspect(lab, container_by_hand)["NetworkSettings"]["Ports"])


@pytest.fixture(scope="module")
def strangers_look(lab: Engine, by_hand: str, bobs_service: str) -> list[str]:
    """What a container by hand hears from another one, and from a job of bob's."""
    script = f"{ASK.format(address=by_hand)}; echo $?; {ASK.format(address=bobs_service)}; echo $?"
    return undefended(lab, command=shell(script)).out.decode().splitlines()


def test_containers_on_the_default_network_reach_each_other(strangers_look: list[str]) -> None:
    """What jobs would be on without a network of their own."""
    assert strangers_look[:2] == ["from a stranger", "0"]


@pytest.fixture(scope="module")
def alices_look(server: Server, alice: Account, by_hand: str, bobs_service: str) -> list[str]:
    """What a job of alice's hears from a job of bob's and from a container by hand."""
    script = f"{ASK.format(address=bobs_service)}; echo $$?; {ASK.format(address=by_hand)}; echo $$?; ip -6 address"
    row = submitted(server, alice, script=script)
    return output(server, row).splitlines()


def test_a_job_does_not_reach_another_accounts_job(
    lab: Engine, alices_look: list[str], bobs_service: str, server: Server
) -> None:
    assert "from a stranger" not in alices_look
    assert alices_look[0] == "1"


def test_a_job_does_not_reach_containers_of_other_networks(alices_look: list[str]) -> None:
    assert alices_look[1] == "1"


def test_a_job_has_no_address_of_the_other_protocol_that_no_rule_is_about(alices_look: list[str]) -> None:
    assert not [line for line in alices_look[2:] if "fe80" in line]


def test_a_container_by_hand_does_not_reach_a_job(strangers_look: list[str]) -> None:
    assert strangers_look[2:] == ["1"]


def test_the_network_of_jobs_lets_nobody_talk(lab: Engine, bobs_service: str) -> None:
    (found,) = json.loads(lab.docker("network", "inspect", "gpujobs"))
    assert found["Options"] == {"com.docker.network.bridge.enable_icc": "false"}


def test_a_port_is_on_loopback_unless_it_is_allowed_otherwise(
    lab: Engine, bobs_container: str, published_by_docker: dict[str, list[Row]]
) -> None:
    assert "0.0.0.0" in {binding["HostIp"] for binding in published_by_docker["5000/tcp"]}
    bindings = inspect(lab, bobs_container)["NetworkSettings"]["Ports"]["5000/tcp"]
    assert {binding["HostIp"] for binding in bindings} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("port", "words"),
    [("0.0.0.0:5000:5000", "ports beyond 127.0.0.1"), ("[::]:5000:5000", "ports beyond 127.0.0.1"),
     (f"{LOW}:5000", "the machine's own below 1024"), (f"127.0.0.1:{LOW - 1}-{LOW + 1}:5000-5002", "below 1024")],
)  # fmt: skip
def test_a_port_that_a_shell_could_not_take_or_that_others_reach_is_not_published(
    server: Server, alice: Account, published_by_docker: dict[str, list[Row]], port: str, words: str
) -> None:
    """Docker publishes as root: what listens there would pass for a service of the machine's."""
    assert published_by_docker["5001/tcp"] == [{"HostIp": "127.0.0.1", "HostPort": str(LOW)}]
    shells = run(["/usr/bin/python3", "-c", BIND], {}, user=alice)
    assert "PermissionError" in shells.words
    done = server.run(user=alice, script="true", ports=[port])
    assert (done.code, done.out) == (3, b""), done
    assert words in done.words
    assert "The administrator decides" in done.words
