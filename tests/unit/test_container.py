"""What the Engine is asked for: every line of the request that a rule of security stands behind."""

from __future__ import annotations

import copy
import shlex
from dataclasses import replace

import pytest
import yaml
from hypothesis import given

from gpujobs.core import export
from gpujobs.core.container import (
    INIT_REFUSED,
    MINIMUM_SHM,
    Image,
    Mount,
    Order,
    argv_of,
    config_hash,
    container_name,
    control_file,
    control_path,
    cpus_near,
    create_request,
    differences,
    environment_of,
    group_file,
    passwd_file,
    ranges,
    runtime_hint,
    shm_size_of,
)
from gpujobs.core.errors import Refused
from gpujobs.core.inventory import Gpu
from gpujobs.core.job import Allocation, JobId
from gpujobs.core.secrets import MEMORY, Secret, handed_over
from gpujobs.core.spec import GpuRequest, Healthcheck, JobSpec, Port, Ulimit
from tests.unit.values import GIB, owner, specs

IMAGE = Image(
    id="sha256:1234",
    reference="busybox",
    entrypoint=("/entry",),
    command=("serve",),
    environment=("PATH=/bin",),
    working_dir="/srv",
)
HELD = Allocation(gpus=("GPU-a", "GPU-b"), cpus=2.5, memory=8 * GIB)


def spec(**more: object) -> JobSpec:
    return JobSpec(name="train", image="busybox", **{"command": ("python", "train.py"), **more})  # type: ignore[arg-type]


def order(**more: object) -> Order:
    given = {
        "server": "5e4ae7f0",
        "job": JobId(12, 3),
        "attempt": 2,
        "nonce": "n0nce",
        "owner": owner(),
        "spec": spec(),
        "allocation": HELD,
        "image": IMAGE,
        "control": "/state/attempts/x",
        "home": "/home/ada",
        "visible": "GPU-a,GPU-b",
    }
    return Order(**{**given, **more})  # type: ignore[arg-type]


def host(**more: object) -> dict[str, object]:
    return create_request(order(**more))["HostConfig"]


def variables(one: Order) -> dict[str, str]:
    entries, inside = environment_of(one)
    return {**dict(inside), **dict(entry.partition("=")[::2] for entry in entries if "=" in entry)}


def dropped(one: Order) -> list[str]:
    return [entry for entry in environment_of(one)[0] if "=" not in entry]


# -- names and what is run ------------------------------------------------------------------------------------


def test_the_name_follows_from_server_job_and_attempt_alone() -> None:
    assert container_name("5e4ae7f0", JobId(12), 1) == "gpujobs-5e4ae7f0-12-1"
    assert container_name("5e4ae7f0", JobId(12, 3), 2) == "gpujobs-5e4ae7f0-12_3-2"


@pytest.mark.parametrize(
    ("command", "entrypoint", "argv"),
    [
        (None, None, ("/entry", "serve")),
        (("train",), None, ("/entry", "train")),
        (None, ("sh",), ("sh",)),
        (("train",), ("sh", "-c"), ("sh", "-c", "train")),
        (("train",), (), ("train",)),
        ((), None, ("/entry",)),
    ],
)
def test_command_and_entry_point_go_together_as_compose_has_it(
    command: tuple[str, ...] | None, entrypoint: tuple[str, ...] | None, argv: tuple[str, ...]
) -> None:
    assert argv_of(spec(command=command, entrypoint=entrypoint), IMAGE) == argv


@pytest.mark.parametrize("more", [{"command": None}, {"command": (), "entrypoint": ()}])
def test_where_neither_file_nor_image_says_what_to_run_the_job_is_refused(more: dict[str, object]) -> None:
    with pytest.raises(Refused, match="the image busybox has no command of its own"):
        argv_of(spec(**more), Image(id="x", reference="busybox"))


def test_the_first_program_is_our_init_and_the_jobs_program_its_argument() -> None:
    request = create_request(order())
    control = control_path("n0nce")
    assert request["Entrypoint"] == [f"{control}/init", "--dir", control, "run"]
    assert request["Cmd"] == ["/entry", "python", "train.py"]


def test_the_container_is_made_from_the_images_id_whatever_its_name_comes_to_mean() -> None:
    assert create_request(order())["Image"] == "sha256:1234"


def test_where_the_init_lies_cannot_be_known_before_the_container_runs() -> None:
    paths = {control_path(nonce) for nonce in ("n0nce", "n0ncf", "")}
    assert len(paths) == 3
    assert all(path.startswith("/.gpujobs-") and len(path) == len("/.gpujobs-") + 16 for path in paths)
    assert "n0nce" not in control_path("n0nce")


def test_the_working_directory_is_the_files_then_the_images_then_the_root() -> None:
    assert create_request(order(spec=spec(working_dir="/work")))["WorkingDir"] == "/work"
    assert create_request(order())["WorkingDir"] == "/srv"
    assert create_request(order(image=replace(IMAGE, working_dir="")))["WorkingDir"] == "/"


# -- who it is ------------------------------------------------------------------------------------------------


def test_the_user_is_always_a_number_and_its_group_too() -> None:
    assert create_request(order())["User"] == "5001:5001"


def test_the_owners_other_groups_are_given_by_number() -> None:
    assert host(owner=owner(groups=(44, 5001, 6000)))["GroupAdd"] == ["44", "6000"]


def test_the_container_has_no_capability_and_can_gain_none() -> None:
    found = host()
    assert (found["Privileged"], found["CapDrop"], found["CapAdd"]) == (False, ["ALL"], [])
    assert found["SecurityOpt"] == ["no-new-privileges:true"]


def test_the_control_file_tells_the_init_who_it_must_be() -> None:
    records = control_file(order(owner=owner(groups=(6000, 44, 5001, 44)))).split(b"\0")
    assert records[:4] == [b"uid=5001", b"gid=5001", b"groups=44,5001,6000", b"caps=0"]
    assert all(record.startswith(b"env=") for record in records[4:-1])


def test_variables_of_image_and_user_reach_the_program_by_the_init_and_the_engine_has_ours_alone() -> None:
    environment = (("LD_PRELOAD", "/home/ada/x.so"), ("GLIBC_TUNABLES", "a=b"), ("BASH_ENV", "/x"), ("A", "1"))
    one = order(spec=spec(environment=environment), image=replace(IMAGE, environment=("PATH=/opt/bin", "A=0")))
    records = control_file(one).split(b"\0")
    assert {b"env=LD_PRELOAD=/home/ada/x.so", b"env=GLIBC_TUNABLES=a=b", b"env=BASH_ENV=/x", b"env=A=1",
            b"env=PATH=/opt/bin"} <= set(records)  # fmt: skip
    assert b"env=A=0" not in records
    assert dropped(one) == ["A", "PATH"]
    assert all(entry.startswith(("NVIDIA_", "GPUJOBS_")) for entry in environment_of(one)[0] if "=" in entry)


def test_variables_of_an_image_that_have_no_name_are_not_told_to_the_engine() -> None:
    environment, inside = environment_of(order(image=replace(IMAGE, environment=("=x", "", "A=1", "BARE"))))
    assert [entry for entry in environment if entry.partition("=")[0] in ("", "A", "BARE")] == ["A", "BARE"]
    assert ("A", "1") in inside
    assert "" not in dict(inside)


def test_an_environment_that_the_init_cannot_read_is_refused_before() -> None:
    large = tuple((f"A{number}", "x" * 100_000) for number in range(11))
    with pytest.raises(Refused, match="at most 1,048,576 are possible"):
        control_file(order(spec=spec(environment=large)))


def test_bytes_that_are_no_text_pass_through_the_control_file_unchanged() -> None:
    one = order(spec=spec(environment=(("LD_LIBRARY_PATH", "/home/\udcff"),)))
    assert b"env=LD_LIBRARY_PATH=/home/\xff\0" in control_file(one)


def test_the_passwd_file_names_the_owner_and_the_group_file_its_groups() -> None:
    assert b"ada:x:5001:5001:ada:/inside:/bin/sh\n" in passwd_file(owner(), "/inside")
    assert group_file(owner(), [(5001, "ada"), (44, "video"), (0, "root")]).decode().splitlines() == [
        "root:x:0:",
        "nogroup:x:65534:",
        "ada:x:5001:ada",
        "video:x:44:ada",
    ]


# -- GPUs -----------------------------------------------------------------------------------------------------


def test_a_gpu_job_sees_exactly_its_uuids_under_the_gpu_runtime() -> None:
    assert host()["Runtime"] == "nvidia"
    assert variables(order())["NVIDIA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert variables(order())["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"


def test_the_gpu_runtimes_name_is_a_setting() -> None:
    assert host(runtime="nvidia-legacy")["Runtime"] == "nvidia-legacy"


def test_a_job_without_gpus_runs_under_plain_runc_with_the_variable_set_to_void() -> None:
    one = order(allocation=Allocation(memory=GIB), visible="void")
    assert create_request(one)["HostConfig"]["Runtime"] == "runc"
    assert variables(one)["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert "NVIDIA_DRIVER_CAPABILITIES" not in variables(one)


def test_simulated_gpus_are_plain_runc_and_void_too() -> None:
    one = order(visible="void")
    assert create_request(one)["HostConfig"]["Runtime"] == "runc"
    assert variables(one)["NVIDIA_VISIBLE_DEVICES"] == "void"


def test_every_way_round_the_variable_is_closed() -> None:
    assert (host()["Devices"], host()["DeviceRequests"]) == ([], [])


def test_the_variables_of_an_image_that_steer_runtime_and_loader_are_taken_away() -> None:
    image = replace(
        IMAGE,
        environment=(
            "PATH=/bin",
            "NVIDIA_REQUIRE_CUDA=cuda>=12.4",
            "NVIDIA_VISIBLE_DEVICES=all",
            "NVIDIA_MIG_CONFIG_DEVICES=all",
            "LD_PRELOAD=/x",
            "LD_LIBRARY_PATH=/usr/local/cuda/lib64",
            "GLIBC_TUNABLES=x",
            "GCONV_PATH=/x",
            "GPUJOBS_JOB_ID=1",
            "CUDA_VERSION=12.4",
            "LDX=1",
        ),
    )
    one = order(image=image)
    assert set(dropped(one)) == {entry.partition("=")[0] for entry in image.environment} - {
        "NVIDIA_VISIBLE_DEVICES", "GPUJOBS_JOB_ID"}  # fmt: skip
    of_the_image = {name: value for name, value in environment_of(one)[1] if name not in ("HOME", "USER", "LOGNAME")}
    assert of_the_image == {"PATH": "/bin", "CUDA_VERSION": "12.4", "LDX": "1"}
    assert variables(one)["NVIDIA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert variables(one)["GPUJOBS_JOB_ID"] == "12_3"


@given(specs)
def test_whatever_a_file_says_the_variable_is_set_last_and_to_what_was_allocated(any_spec: JobSpec) -> None:
    entries, _ = environment_of(order(spec=any_spec))
    last = {entry.partition("=")[0]: entry.partition("=")[2] for entry in entries}
    assert last["NVIDIA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"


@given(specs.filter(lambda one: one.command or one.entrypoint))
def test_whatever_a_file_says_the_request_gives_no_privilege_and_no_device(any_spec: JobSpec) -> None:
    found = create_request(order(spec=any_spec))
    inside = found["HostConfig"]
    assert (inside["Privileged"], inside["CapDrop"], inside["CapAdd"], inside["Devices"], inside["DeviceRequests"]) == (
        False,
        ["ALL"],
        [],
        [],
        [],
    )
    assert (found["User"], inside["IpcMode"], inside["NetworkMode"], inside["RestartPolicy"]) == (
        "5001:5001",
        "private",
        "bridge",
        {"Name": "no"},
    )
    assert not {
        "Binds",
        "VolumesFrom",
        "PidMode",
        "UTSMode",
        "UsernsMode",
        "CgroupParent",
        "Links",
        "Sysctls",
        "Dns",
    } & set(inside)
    assert found["Entrypoint"][0] == f"{control_path('n0nce')}/init"


# -- the environment ------------------------------------------------------------------------------------------


def test_the_program_is_told_which_job_it_is_and_where_its_checkpoints_go() -> None:
    found = variables(order())
    assert (found["GPUJOBS_JOB_ID"], found["GPUJOBS_ATTEMPT"], found["GPUJOBS_ARRAY_INDEX"]) == ("12_3", "2", "3")
    assert found["GPUJOBS_CHECKPOINT_DIR"] == "/home/ada/checkpoints/5e4ae7f0-12_3"
    assert "GPUJOBS_ARRAY_INDEX" not in variables(order(job=JobId(12)))


def test_all_attempts_of_a_job_share_their_checkpoints() -> None:
    assert (
        variables(order(attempt=1))["GPUJOBS_CHECKPOINT_DIR"] == variables(order(attempt=2))["GPUJOBS_CHECKPOINT_DIR"]
    )


def test_home_user_and_time_zone_are_the_owners_unless_the_file_says_otherwise() -> None:
    found = variables(order(timezone="Europe/Berlin"))
    assert (found["HOME"], found["USER"], found["LOGNAME"], found["TZ"]) == ("/home/ada", "ada", "ada", "Europe/Berlin")
    assert variables(order(timezone="Europe/Berlin", spec=spec(environment=(("TZ", "UTC"),))))["TZ"] == "UTC"
    assert "TZ" not in variables(order())


# -- limits ---------------------------------------------------------------------------------------------------


def test_memory_cpus_and_processes_are_always_limited() -> None:
    found = host()
    assert found["Memory"] == found["MemorySwap"] == 8 * GIB
    assert found["NanoCpus"] == 2_500_000_000
    assert found["PidsLimit"] > 0


def test_an_allocation_without_cpus_sets_no_limit_of_cpus() -> None:
    assert "NanoCpus" not in host(allocation=replace(HELD, cpus=0.0))


def test_shared_memory_is_a_quarter_of_the_limit_and_never_less_than_dockers() -> None:
    assert shm_size_of(order()) == 2 * GIB
    assert shm_size_of(order(spec=spec(shm_size=GIB))) == GIB
    assert shm_size_of(order(allocation=replace(HELD, memory=6 << 20))) == MINIMUM_SHM


def limits(**more: object) -> dict[str, tuple[int, int]]:
    return {entry["Name"]: (entry["Soft"], entry["Hard"]) for entry in host(**more)["Ulimits"]}  # type: ignore[attr-defined]


def test_deep_learning_gets_locked_memory_a_large_stack_and_no_core_files() -> None:
    assert limits() == {"memlock": (-1, -1), "stack": (64 << 20, 64 << 20), "core": (0, 0)}


def test_limits_that_the_engine_cannot_raise_stay_below_its_own() -> None:
    assert limits(ceilings={"memlock": 1 << 20, "stack": 1 << 30}) == {
        "memlock": (1 << 20, 1 << 20),
        "stack": (64 << 20, 64 << 20),
        "core": (0, 0),
    }


def test_the_files_own_limits_win_over_the_defaults() -> None:
    found = limits(spec=spec(ulimits=(Ulimit(name="nofile", soft=10, hard=20), Ulimit(name="core", soft=1, hard=1))))
    assert (found["nofile"], found["core"]) == ((10, 20), (1, 1))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((), ""), ((3,), "3"), ((0, 1, 2, 3, 8), "0-3,8"), ((8, 1, 0, 1), "0-1,8"), ((0, 2, 4), "0,2,4")],
)
def test_cpus_are_written_as_the_kernel_lists_them(numbers: tuple[int, ...], text: str) -> None:
    assert ranges(numbers) == text


def gpu(*cpus: int) -> Gpu:
    return Gpu(uuid="GPU-x", index=0, minor=0, model="x", memory_bytes=1, cpus=cpus)


@pytest.mark.parametrize(
    ("gpus", "wanted", "near"),
    [
        ([gpu(0, 1), gpu(2, 3)], 2.0, (0, 1, 2, 3)),
        ([gpu(0, 1)], 3.0, ()),
        ([gpu(0, 1), gpu()], 1.0, ()),
        ([gpu(*range(8))], 1.0, ()),
        ([gpu(6, 7, 64)], 1.0, (6, 7)),
        ([], 1.0, ()),
    ],
)
def test_a_job_is_bound_to_the_cpus_near_its_gpus_where_they_are_known_and_enough(
    gpus: list[Gpu], wanted: float, near: tuple[int, ...]
) -> None:
    assert cpus_near(gpus, wanted, 8) == near


def test_the_cpus_it_is_bound_to_are_asked_for() -> None:
    assert host(near=(0, 1, 4))["CpusetCpus"] == "0-1,4"
    assert "CpusetCpus" not in host()


# -- mounts, ports, checks, labels ----------------------------------------------------------------------------


def test_the_control_directory_passwd_and_group_are_mounted_read_only_before_the_users_mounts() -> None:
    mounts = host(mounts=(Mount(source="/pins/1", target="/data", read_only=False),))["Mounts"]
    assert [(m["Source"], m["Target"], m["ReadOnly"]) for m in mounts] == [  # type: ignore[attr-defined]
        ("/state/attempts/x", control_path("n0nce"), True),
        ("/state/attempts/x/passwd", "/etc/passwd", True),
        ("/state/attempts/x/group", "/etc/group", True),
        ("/pins/1", "/data", False),
    ]
    assert all(m["Type"] == "bind" and m["BindOptions"] == {"Propagation": "rprivate"} for m in mounts)  # type: ignore[attr-defined]


def test_ports_are_published_where_the_file_says() -> None:
    ports = (
        Port(target=8888),
        Port(target=80, published=8080, host_ip="0.0.0.0"),
        Port(target=8888, published=1, protocol="tcp"),
    )
    request = create_request(order(spec=spec(ports=ports)))
    assert request["ExposedPorts"] == {"8888/tcp": {}, "80/tcp": {}}
    assert request["HostConfig"]["PortBindings"] == {
        "8888/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}, {"HostIp": "127.0.0.1", "HostPort": "1"}],
        "80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}],
    }


@pytest.mark.parametrize("check", [None, Healthcheck(test=())])
def test_an_images_own_health_check_is_off(check: Healthcheck | None) -> None:
    assert create_request(order(spec=spec(healthcheck=check)))["Healthcheck"] == {"Test": ["NONE"]}


def test_a_files_health_check_runs_through_the_init_as_the_program_does() -> None:
    control = control_path("n0nce")
    check = Healthcheck(test=("curl", "localhost"), interval=5.0, timeout=1.5, retries=2)
    found = create_request(order(spec=spec(healthcheck=check)))["Healthcheck"]
    assert found["Test"] == ["CMD", f"{control}/init", "--dir", control, "exec", "curl", "localhost"]
    assert (found["Interval"], found["Timeout"], found["Retries"]) == (5_000_000_000, 1_500_000_000, 2)
    shell = create_request(order(spec=spec(healthcheck=replace(check, test=("a | b",), shell=True))))["Healthcheck"]
    assert shell["Test"][4:] == ["exec", "/bin/sh", "-c", "a | b"]


def test_all_labels_are_always_set_and_none_of_the_file_passes_for_ours() -> None:
    labels = create_request(order(spec=spec(labels=(("team", "vision"), ("gpujobs.owner", "0")))))["Labels"]
    assert labels.pop("gpujobs.config")
    assert labels == {
        "team": "vision",
        "gpujobs.server": "5e4ae7f0",
        "gpujobs.job": "12_3",
        "gpujobs.attempt": "2",
        "gpujobs.owner": "5001",
        "gpujobs.gpus": "GPU-a,GPU-b",
        "gpujobs.nonce": "n0nce",
    }
    assert create_request(order(allocation=Allocation(memory=GIB)))["Labels"]["gpujobs.gpus"] == ""


# -- the hash by which a container is adopted -----------------------------------------------------------------


def test_the_same_order_always_has_the_same_hash() -> None:
    assert create_request(order()) == create_request(order())
    assert create_request(order())["Labels"]["gpujobs.config"] == config_hash(create_request(order()))


@pytest.mark.parametrize(
    "more",
    [
        {"visible": "GPU-a"},
        {"nonce": "other"},
        {"owner": owner(uid=5002)},
        {"image": replace(IMAGE, id="sha256:5678")},
        {"mounts": (Mount(source="/etc", target="/x", read_only=False),)},
        {"spec": spec(labels=(("a", "1"),))},
        {"allocation": replace(HELD, memory=GIB)},
        {"attempt": 3},
    ],
)
def test_whatever_differs_changes_the_hash(more: dict[str, object]) -> None:
    assert (
        create_request(order(**more))["Labels"]["gpujobs.config"] != create_request(order())["Labels"]["gpujobs.config"]
    )


def test_the_hash_does_not_depend_on_the_order_of_keys() -> None:
    request = create_request(order())
    assert config_hash(dict(reversed(request.items()))) == config_hash(request)


# -- what came of it ------------------------------------------------------------------------------------------


def inspected(one: Order) -> dict[str, dict[str, object]]:
    request = copy.deepcopy(create_request(one))
    inside = request.pop("HostConfig")
    return {"Config": request, "HostConfig": inside}


def test_a_container_that_is_as_asked_for_has_no_differences() -> None:
    found = inspected(order())
    found["HostConfig"].update(Devices=None, DeviceRequests=None, CapAdd=None)  # how an Engine writes "none"
    assert differences(order(), found) == []


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("Config", "Env", ["NVIDIA_VISIBLE_DEVICES=all"], "NVIDIA_VISIBLE_DEVICES is"),
        (
            "Config",
            "Env",
            ["NVIDIA_VISIBLE_DEVICES=GPU-a,GPU-b", "NVIDIA_VISIBLE_DEVICES=all"],
            "NVIDIA_VISIBLE_DEVICES is",
        ),
        ("Config", "Env", None, "NVIDIA_VISIBLE_DEVICES is"),
        ("Config", "User", "0:0", "user is '0:0'"),
        ("Config", "Entrypoint", ["/bin/sh"], "entry point is"),
        ("HostConfig", "Runtime", "runc", "runtime is 'runc'"),
        ("HostConfig", "Devices", [{"PathOnHost": "/dev/nvidia0"}], "devices is"),
        ("HostConfig", "DeviceRequests", [{"Count": -1}], "device requests is"),
        ("HostConfig", "Privileged", True, "privileged is True"),
        ("HostConfig", "CapAdd", ["SYS_ADMIN"], "added capabilities is"),
    ],
)
def test_each_difference_that_decides_about_gpus_or_privilege_is_told(
    part: str, key: str, value: object, words: str
) -> None:
    found = inspected(order())
    found[part][key] = value
    (told,) = differences(order(), found)
    assert told.startswith(words)
    assert "was asked for" in told


def test_the_inits_own_exit_code_is_none_that_a_shell_gives() -> None:
    assert INIT_REFUSED not in {0, 1, 2, 126, 127, *range(128, 256)}


def test_a_request_for_gpus_is_no_part_of_the_container_without_an_allocation() -> None:
    asked = spec(gpus=GpuRequest(count=8, max_count=8))
    assert host(spec=asked, allocation=Allocation(memory=GIB), visible="void")["Runtime"] == "runc"


# -- secrets

SECRETS = (
    Secret(name="wandb", target="wandb.key", file="/home/ann/it's k"),
    Secret(name="hf", target="hf", environment="HF", variable="HF_TOKEN"),
)


def test_secrets_are_a_file_system_in_memory_that_is_the_owners_alone() -> None:
    with_secrets = order(spec=spec(secrets=SECRETS), tmpfs={"/scratch": "rw"})
    request = create_request(with_secrets)
    options = request["HostConfig"]["Tmpfs"].pop("/run/secrets").split(",")
    assert set(options) == {"rw", "nosuid", "nodev", "noexec", f"uid={owner().uid}", f"gid={owner().gid}", "mode=0700",
                            f"size={MEMORY}"}  # fmt: skip
    request["Labels"].pop("gpujobs.config")
    plain = create_request(order(tmpfs={"/scratch": "rw"}))
    plain["Labels"].pop("gpujobs.config")
    assert request == plain, "nothing else of the request tells of them"


def test_the_init_is_told_that_there_are_secrets() -> None:
    assert b"secrets=1\0" in control_file(order(spec=spec(secrets=SECRETS)))
    assert b"secrets" not in control_file(order())


def test_a_container_whose_secrets_would_be_in_its_layer_is_not_what_was_asked_for() -> None:
    with_secrets = order(spec=spec(secrets=SECRETS))
    request = create_request(with_secrets)
    made = {"Config": {k: v for k, v in request.items() if k != "HostConfig"}, "HostConfig": request["HostConfig"]}
    assert differences(with_secrets, made) == []
    made["HostConfig"] = {**made["HostConfig"], "Tmpfs": {}}
    (difference,) = differences(with_secrets, made)
    assert difference.startswith("file systems in memory is {}")


def test_what_the_init_is_handed_is_read_back_by_its_lengths() -> None:
    content = handed_over(SECRETS, {"wandb": b"a\0b", "hf": b"", "other": b"x"})
    assert content == b"wandb.key\0\0003\0a\0b\0" + b"hf\0HF_TOKEN\0000\0\0"


def test_other_launchers_are_told_where_the_secrets_are_and_not_what_they_are() -> None:
    with_secrets = order(spec=spec(secrets=SECRETS))
    words = shlex.split(export.docker_run(with_secrets))
    assert "type=bind,source=/home/ann/it's k,target=/run/secrets/wandb.key,readonly" in words
    assert not [word for word in words if "HF" in word]
    text = export.compose(with_secrets)
    assert yaml.safe_load(text)["secrets"] == {"wandb": {"file": "/home/ann/it's k"}, "hf": {"environment": "HF"}}
    assert yaml.safe_load(text)["services"]["job"]["secrets"] == [
        {"source": "wandb", "target": "wandb.key"}, {"source": "hf", "target": "hf"}]  # fmt: skip


def test_a_gvisor_that_is_older_than_the_kernel_is_told_with_what_to_do() -> None:
    """As runsc 0.0~20221219 answers on Linux 6.18, also to plain ``docker run``."""
    said = (
        'OCI runtime start failed: starting container: setting up network: creating interfaces from net namespace '
        '"/proc/22403/ns/net": cannot run with network enabled in root network namespace: unknown'
    )
    assert "older than the machine's kernel" in runtime_hint(said)
    assert "--network=none" in runtime_hint(said)
    assert runtime_hint("permission denied") == ""
