"""Who may do what: accounts in settings, gated features, images, rates, and what others' jobs show."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpujobs.core.container import control_file, create_request, differences, environment_of
from gpujobs.core.errors import InvalidInput, Refused
from gpujobs.core.rules import (
    CAPABILITY_BITS,
    FEATURES,
    Bucket,
    Rules,
    among,
    asked,
    capability_mask,
    check,
    discreet,
    groups_in,
    image_matches,
    take,
)
from gpujobs.core.spec import GpuRequest, JobSpec, Port
from gpujobs.settings import Settings
from gpujobs.settings import read as read_settings
from tests.unit.test_container import order
from tests.unit.values import owner

ADA = owner()
EVE = owner("eve", 5002, (5002,))
GIDS = {"hpc": 44, "none": 999}
RUNTIMES = ("nvidia", "runc", "runsc")


def job(**more: object) -> JobSpec:
    return JobSpec(**{"name": "t", "image": "python:3.12", **more})  # type: ignore[arg-type]


def refusal(spec: JobSpec, rules: Rules, who: object = ADA, runtimes: tuple[str, ...] = RUNTIMES) -> str:
    with pytest.raises(Refused) as caught:
        check(spec, who, rules, GIDS, runtimes)  # type: ignore[arg-type]
    return f"{caught.value.message}. {caught.value.hint}"


# -- accounts in lists ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accounts", "inside"),
    [(("ada",), True), (("@hpc",), True), (("*",), True), (("eve", "@hpc"), True), ((), False), (("eve",), False),
     (("@none",), False), (("@nowhere",), False), (("hpc",), False), (("@ada",), False), (("ADA",), False)],
)  # fmt: skip
def test_an_account_is_in_a_list_by_its_name_or_by_one_of_its_groups(accounts: tuple[str, ...], inside: bool) -> None:
    assert among(ADA, accounts, GIDS) is inside


def test_the_groups_that_are_looked_up_are_those_that_lists_name() -> None:
    assert groups_in([("ada", "@hpc"), ("*", "@web", "@hpc")]) == {"hpc", "web"}


# -- gated features ------------------------------------------------------------------------------------------------

GATED = {
    ("ipc", "host"): job(ipc="host"),
    ("network_mode", "host"): job(network_mode="host"),
    ("runtime", "runsc"): job(runtime="runsc"),
    ("ports", "any"): job(ports=(Port(target=80, host_ip="0.0.0.0"),)),
    ("ports", "low"): job(ports=(Port(target=8888, published=1023),)),
    **{("cap_add", name): job(cap_add=(name,)) for name in FEATURES["cap_add"]},
    **{("driver_capabilities", name): job(driver_capabilities=("compute", name)) for name in
       FEATURES["driver_capabilities"]},
}  # fmt: skip


def test_every_feature_that_can_be_allowed_is_tried_here() -> None:
    assert {(key, value) for key, values in FEATURES.items() for value in values} == set(GATED)


@pytest.mark.parametrize("feature", GATED, ids="-".join)
def test_a_feature_is_off_until_the_settings_allow_it_to_the_owner_or_a_group(feature: tuple[str, str]) -> None:
    spec = GATED[feature]
    assert asked(spec) == [feature]
    words = refusal(spec, Rules(allow={}))
    assert "not allowed to ada here" in words
    assert f"`allow: {{{feature[0]}: {{{feature[1]}: [ada]}}}}`" in words
    assert refusal(spec, Rules(allow={feature: ("eve", "@none")}))
    for accounts in (("ada",), ("@hpc",), ("*",)):
        check(spec, ADA, Rules(allow={feature: accounts}), GIDS, RUNTIMES)
        if accounts != ("*",):
            assert refusal(spec, Rules(allow={feature: accounts}), EVE)


@pytest.mark.parametrize(
    "spec",
    [job(), job(ipc="none"), job(network_mode="none"), job(driver_capabilities=("utility",)),
     job(ports=(Port(target=80), Port(target=81, host_ip="::1"), Port(target=82, published=1024)))],
)  # fmt: skip
def test_what_takes_nothing_away_needs_nobody(spec: JobSpec) -> None:
    assert asked(spec) == []
    check(spec, ADA, Rules(allow={}), {}, ())


def test_a_capability_that_is_a_way_to_root_cannot_be_allowed() -> None:
    for name in ("SYS_ADMIN", "DAC_READ_SEARCH", "CHOWN", "SETUID", "MKNOD", "SYS_MODULE"):
        assert refusal(job(cap_add=(name,)), Rules(allow={}))
        assert name not in CAPABILITY_BITS
        with pytest.raises(InvalidInput) as caught:
            read_settings(f"allow: {{cap_add: {{{name}: ['*']}}}}", "s")
        assert "no setting can allow this" in str(caught.value.problems[0])


def test_the_network_of_the_machine_is_not_given_with_rights_over_it() -> None:
    rules = Rules(allow={("network_mode", "host"): ("*",), ("cap_add", "NET_ADMIN"): ("*",)})
    assert "together" in refusal(job(network_mode="host", cap_add=("NET_ADMIN",)), rules)


def test_gvisor_is_for_jobs_without_gpus_and_where_it_is_registered() -> None:
    rules = Rules(allow={("runtime", "runsc"): ("*",)})
    assert "has no runtime runsc" in refusal(job(runtime="runsc"), rules, runtimes=("runc",))
    with_gpu = job(runtime="runsc", gpus=GpuRequest(count=1))
    assert "without GPUs" in refusal(with_gpu, rules)
    check(with_gpu, ADA, replace(rules, runsc_gpus=True), GIDS, RUNTIMES)


# -- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "glob", "matches"),
    [
        ("python:3.12", "python", True),
        ("python:3.12", "python:3.*", True),
        ("python:3.12", "python:2.*", False),
        ("python", "python:latest", True),
        ("docker.io/library/python:3.12", "python", True),
        ("pytorch/pytorch:2.4", "pytorch/*", True),
        ("docker.io/pytorch/pytorch", "pytorch/pytorch", True),
        ("nvcr.io/nvidia/pytorch:24.01-py3", "nvcr.io/nvidia/*", True),
        ("nvcr.io/evil/pytorch", "nvcr.io/nvidia/*", False),
        ("evil.io/library/python:3.12", "python", False),
        ("evil/python", "python", False),
        ("localhost:5000/x:1", "localhost:5000/*", True),
        ("python@sha256:" + "a" * 64, "python", True),
        ("python@sha256:" + "a" * 64, "python:3.12", False),
        ("sha256:" + "a" * 64, "*", False),
        ("sha256:" + "a" * 64, "sha256:a*", True),
        ("python", "*", True),
        ("ghcr.io/a/b", "*", True),
        ("build", "build", True),
        ("build", "*", False),
        ("python", "build", False),
    ],
)
def test_an_image_is_matched_by_its_full_name(reference: str, glob: str, matches: bool) -> None:
    assert image_matches(reference, glob) is matches


def test_listed_images_are_all_that_run_each_for_its_accounts() -> None:
    rules = Rules(allow={}, images=(("python", ("*",)), ("nvcr.io/*", ("@hpc",)), ("build", ("eve",))))
    check(job(), EVE, rules, GIDS, ())
    check(job(image="nvcr.io/nvidia/cuda"), ADA, rules, GIDS, ())
    words = refusal(job(image="nvcr.io/nvidia/cuda"), rules, EVE)
    assert words == ("image: nvcr.io/nvidia/cuda is not among the images that eve may run here. "
                     "Allowed are python, build.")  # fmt: skip
    check(job(image=None), EVE, rules, GIDS, ())
    assert "build: images of one's own are not" in refusal(job(image=None), rules)


# -- what the Engine is asked for ----------------------------------------------------------------------------------


def test_an_allowed_capability_is_kept_by_the_init_and_everything_else_given_up() -> None:
    one = order(spec=job(cap_add=("SYS_PTRACE", "NET_RAW"), command=("x",)))
    request = create_request(one)
    assert request["User"] == "0:0"
    assert request["HostConfig"]["CapDrop"] == ["ALL"]
    assert request["HostConfig"]["CapAdd"] == [
        "CAP_NET_RAW", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_PTRACE",
    ]  # fmt: skip
    mask = capability_mask(("SYS_PTRACE", "NET_RAW"))
    assert mask == 1 << 19 | 1 << 13
    records = control_file(one).split(b"\0")
    assert f"caps={mask:x}".encode() in records
    assert f"keep={mask:x}".encode() in records
    assert f"uid={one.owner.uid}".encode() in records
    found = {"Config": request, "HostConfig": request["HostConfig"]}
    assert differences(one, found) == []
    found["HostConfig"] = {**request["HostConfig"], "CapAdd": [*request["HostConfig"]["CapAdd"], "CAP_SYS_ADMIN"]}
    assert "added capabilities" in differences(one, found)[0]


def test_modes_reach_the_engine_and_a_container_with_others_is_found_out() -> None:
    one = order(spec=job(ipc="host", network_mode="host", command=("x",)), network="jobs")
    host = create_request(one)["HostConfig"]
    assert (host["IpcMode"], host["NetworkMode"]) == ("host", "host")
    plain = order(network="jobs")
    request = create_request(plain)
    assert (request["HostConfig"]["IpcMode"], request["HostConfig"]["NetworkMode"]) == ("private", "jobs")
    found = {"Config": request, "HostConfig": {**request["HostConfig"], "IpcMode": "host", "NetworkMode": "host"}}
    assert [line.partition(" is ")[0] for line in differences(plain, found)] == ["IPC mode", "network mode"]


def test_driver_capabilities_take_the_place_of_the_default() -> None:
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in environment_of(order())[0]
    one = order(spec=job(driver_capabilities=("compute", "video"), command=("x",)))
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,video" in environment_of(one)[0]


def test_gvisor_is_the_runtime_of_who_asks_for_it() -> None:
    one = order(spec=job(runtime="runsc", command=("x",)))
    assert create_request(one)["HostConfig"]["Runtime"] == "runsc"


# -- settings ------------------------------------------------------------------------------------------------------


def test_settings_say_what_is_allowed_to_whom() -> None:
    found = read_settings(
        "allow: {ipc: {host: ['@hpc']}, cap_add: {NET_RAW: [ada]}}\nimages: [python, 'nvcr.io/*']\nrunsc_gpus: true",
        "s",
    )
    assert found.rules == Rules(
        allow={("ipc", "host"): ("@hpc",), ("cap_add", "NET_RAW"): ("ada",)},
        images=(("python", ("*",)), ("nvcr.io/*", ("*",))), runsc_gpus=True,
    )  # fmt: skip
    assert read_settings("images: {python: [ada, '@hpc']}", "s").images == (("python", ("ada", "@hpc")),)
    assert Settings().rules == Rules(allow={})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("admins: ['*']", "would make everybody an administrator"),
        ("users: ['@']", "a group has no name"),
        ("allow: {ipcs: {host: []}}", "allow.ipcs: unknown key"),
        ("allow: {ipc: {hosts: [ada]}}", "allow.ipc.hosts: no setting can allow this; allowed are host"),
        ("allow: {ipc: [ada]}", "allow.ipc: a list is not a mapping"),
        ("allow: {ipc: {host: ada}}", "allow.ipc.host: 'ada' is not a list of accounts"),
        ("allow: [ipc]", "allow: a list is not a mapping"),
        ("images: python", "images: 'python' is not a list of images"),
        ("images: {python: ada}", "images.python: 'ada' is not a list of accounts"),
        ("queue_visibility: none", "queue_visibility: 'none' is not how much"),
        ("streams: 0", "streams: 0 is out of range"),
        ("layer_size: 5", "layer_size: 5 is only 5 bytes"),
        ("runsc_gpus: 1", "runsc_gpus: 1 is not true or false"),
    ],
)
def test_each_mistake_in_them_is_told(text: str, sentence: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_settings(text, "s")
    assert sentence in str(caught.value.problems[0])


def test_no_limit_on_layers_is_zero() -> None:
    assert read_settings("layer_size: 0", "s").layer_size == 0
    assert read_settings("layer_size: 2g", "s").layer_size == 2 << 30


# -- rates ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 1000), st.lists(st.floats(-1000, 1000), max_size=200))
def test_no_more_is_taken_than_the_allowance_and_what_came_back(per_minute: int, steps: list[float]) -> None:
    bucket: Bucket | None = None
    now, forward, taken = 0.0, 0.0, 0
    for step in steps:
        forward += max(0.0, step)
        now += step
        bucket, wait = take(bucket, now, per_minute)
        taken += not wait
        assert (wait > 0) == (bucket.tokens < 1 and wait > 0)
    assert taken <= per_minute + forward * per_minute / 60 + 1e-6


def test_the_wait_is_until_there_is_one_again() -> None:
    bucket, wait = take(None, 100.0, 1)
    assert wait == 0
    bucket, wait = take(bucket, 130.0, 1)
    assert wait == pytest.approx(30)
    _, wait = take(bucket, 160.0, 1)
    assert wait == 0


# -- what others see -----------------------------------------------------------------------------------------------


def test_clauses_without_names_name_nobody() -> None:
    shown = discreet(
        {
            "a": "stranger: python of bob (pid 77)",
            "b": "a container that was not started by gpujobs (bobs-secret)",
            "c": "job 4 of another gpujobs server (gpujobs-x-4-1)",
            "d": "reserved: for carol",
            "e": "lost",
        }
    )
    assert shown == {
        "a": "in use by a process that belongs to no job",
        "b": "in use by something that is no job of this server",
        "c": "in use by something that is no job of this server",
        "d": "reserved",
        "e": "lost",
    }
