"""``docker run`` lines that people have become job files that the parser takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpujobs import specfile
from gpujobs.core import dockerrun
from gpujobs.core.errors import InvalidInput
from gpujobs.core.spec import JobSpec, Port, Ulimit, Volume
from gpujobs.core.translate import from_docker
from gpujobs.core.values import Plain
from gpujobs.core.yamltext import document
from tests.unit.corpus import CONTEXT

VALUES = ["1", "0", "-1", "8g", "a=b", "/x:/y", "./x:/y:ro", "x:/x:ro,z", "80:80", "80", "A", "A=$HOME", "$X",
    "${X}/y:/z", "type=bind,src=/a,dst=/b",
          "type=tmpfs,dst=/t,tmpfs-size=1g", "/t:size=1m", "nofile=1:2", "core=0", "device=0,1", "all", "none", "INT",
          "5s", "é {{ x }}", "a: b # c",
          "NVIDIA_VISIBLE_DEVICES=1", "", "host", "~/a:/a", "'", '"', "- x", "&a", "*a", "!x", "%", "@", "\n", "\x1b",
          "\U0001f332", "yes", "0x1", "1:2:3"]  # fmt: skip


class Everything(dict[str, str]):
    """The text of any env_file."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> str:
        return "FROM_FILE=1\n"


CONTEXT = replace(
    CONTEXT,
    variables={"HOME": "/home/ann", "PWD": "/home/ann/project", "TOKEN": "s3cret", "X": "x", **dict.fromkeys(VALUES,
    "x")},
    env_files=Everything(),
)


def translated(line: str | list[str]) -> tuple[JobSpec, tuple[str, ...], str]:
    result = from_docker(line)
    (element,) = specfile.parse(result.text, CONTEXT)
    for note in result.notes:
        assert f"#   {note}\n" in result.text
    return element.spec, result.notes, result.text


def test_a_training_line_becomes_this_file() -> None:
    _, _, text = translated(
        "docker run --gpus all -it --rm -v $PWD:/workspace -v $HOME/data:/data:ro --ipc=host --ulimit memlock=-1 \\\n"
        "  --ulimit stack=67108864 nvcr.io/nvidia/pytorch:24.07-py3 python train.py --lr 0.1"
    )
    assert text == """\
# From a `docker run` line by `gpujobs from-docker`.
# Left out or changed:
#   --interactive: a job has no standard input; `gpujobs exec` runs a command in it
#   --tty: a job has no terminal; `gpujobs shell` opens one in it
#   --rm: the server removes ended containers by itself
#   --ipc host: a job has a /dev/shm of its own, a quarter of its memory; write shm_size: for more
#   --gpus all: a job says how many GPUs it needs: 1 is written, change it
name: pytorch
image: nvcr.io/nvidia/pytorch:24.07-py3
command: [python, train.py, --lr, "0.1"]
gpus: 1
volumes: [.:/workspace, "${HOME}/data:/data:ro"]
ulimits: {memlock: -1, stack: 67108864}
"""


def test_what_can_be_kept_is_kept() -> None:
    spec, notes, _ = translated(
        "docker container run --name=my_job --gpus 2 --shm-size 8g -m 32g --cpus=4 -w /src -e A=1 -e 'B=two words' "
        "-e TOKEN --env-file a.env -p 127.0.0.1:8888:80 --label team=vision --stop-signal INT --stop-timeout 30 "
        "--tmpfs /scratch:rw,size=1g --mount type=bind,source=$(pwd)/src,target=/src,readonly "
        "--mount type=volume,src=cache,dst=/cache --ulimit nofile=1024:65536 --entrypoint tini "
        "--health-cmd 'curl -f localhost' --health-interval 10s "
        "reg.example.org:5000/a/b:v1 -- python train.py"
    )
    assert notes == ()
    assert (spec.name, spec.image) == ("my_job", "reg.example.org:5000/a/b:v1")
    assert (spec.gpus.count, spec.shm_size, spec.mem_limit, spec.cpus) == (2, 8 << 30, 32 << 30, 4.0)
    assert spec.environment == (("FROM_FILE", "1"), ("A", "1"), ("B", "two words"), ("TOKEN", "s3cret"))
    assert spec.ports == (Port(target=80, published=8888),)
    assert (spec.labels, spec.stop_signal, spec.stop_grace_period) == ((("team", "vision"),), "SIGINT", 30)
    assert spec.volumes == (
        Volume(type="tmpfs", target="/scratch", size=1 << 30),
        Volume(source="/home/ann/project/src", target="/src", read_only=True),
        Volume(type="volume", source="cache", target="/cache"),
    )
    assert spec.ulimits == (Ulimit(name="nofile", soft=1024, hard=65536),)
    assert (spec.entrypoint, spec.command) == (("tini",), ("--", "python", "train.py"))
    assert spec.healthcheck is not None
    assert (spec.healthcheck.test, spec.healthcheck.interval) == (("curl -f localhost",), 10)


HOST = (
    "--network host: a job is on a network of its own; publish with ports:, or write network_mode: host where the "
    "settings allow it"
)
MORE_OF_THE_DRIVER = (
    "compute and utility of the driver are there; write driver_capabilities: where the settings allow more"
)
NOT_THERE = "nothing can be mounted at '/dev/shm'; write another path, such as /data"


@pytest.mark.parametrize(("line", "note"), [
    ("docker run --rm a", "--rm: the server removes ended containers by itself"),
    ("docker run -d a", "--detach: `gpujobs submit` returns at once, `gpujobs run` follows the job"),
    ("docker run -u 1000:1000 a", "--user 1000:1000: a job runs as the one who submits it, with their groups"),
    ("docker run --net=host a", HOST),
    ("docker run --network host a", HOST),
    ("docker run --network mine a", "--network mine: a job is on a network of its own; publish with ports:"),
    ("docker run --runtime=runsc a",
     "--runtime runsc: the server chooses the runtime; write runtime: runsc where the settings allow it"),
    ("docker run --cap-add CAP_SYS_PTRACE a",
     "--cap-add CAP_SYS_PTRACE: a job has no capabilities; write cap_add: [SYS_PTRACE] where the settings allow it"),
    ("docker run --network none -p 80 a", "--publish: it means nothing with network_mode: none"),
    ("docker run --runtime=nvidia a", "--runtime nvidia: the server chooses the runtime by gpus:"),
    ("docker run --privileged a", "--privileged: no job is privileged; GPUs come by gpus:"),
    ("docker run --cap-add SYS_ADMIN a", "--cap-add SYS_ADMIN: a job has no capabilities"),
    ("docker run --device=/dev/nvidia0 a", "--device /dev/nvidia0: devices are not passed; GPUs come by gpus:"),
    ("docker run --restart always a", "--restart always: an ended job stays ended; `gpujobs rerun` starts it again"),
    ("docker run -h node1 a", "--hostname node1: the host's name in the container is the server's choice"),
    ("docker run --security-opt seccomp=unconfined a",
     "--security-opt seccomp=unconfined: jobs have no-new-privileges and the Engine's own profiles"),
    ("docker run -p 8888:8888 a",
     "-p 8888:8888: it is published on 127.0.0.1; write 0.0.0.0: before it for all addresses"),
    ("docker run -v /data a", "-v /data: '/data' has no target; write source:target, such as ~/data:/data:ro"),
    ("docker run -v /dev/shm:/dev/shm a",
     f"-v /dev/shm:/dev/shm: {NOT_THERE}; did you mean `shm_size`?"),
    ("docker run -v /var/run/docker.sock:/var/run/docker.sock a",
     "-v /var/run/docker.sock:/var/run/docker.sock: who reaches the Engine's socket is root; a job does not get it"),
    ("docker run -v .:/w:z,ro a", "-v .:/w:z,ro: mode z is left out: it has no meaning here or cannot be chosen"),
    ("docker run -v a:/w -v b:/w a", "-v b:/w: '/w' is mounted twice (also by volumes[0]); keep one"),
    ("docker run -e NVIDIA_DRIVER_CAPABILITIES=all a",
     f"-e NVIDIA_DRIVER_CAPABILITIES=all: {MORE_OF_THE_DRIVER}"),
    ("docker run --cpuset-cpus 0-7 a",
     "--cpuset-cpus 0-7: the server chooses the CPUs, near the GPUs; cpus: says how many"),
    ("docker run -m 64 a",
     "--memory 64: 64 is only 64 bytes; write at least 6 MiB, such as 64g or 512m; did you mean 64g?"),
    ("docker run -v ${PWD%/*}:/w a", "${PWD%/*}: it is not run here; write its result"),
    ("sudo -u ann docker run a", "sudo: a job runs as the one who submits it"),
    ("sudo -E docker run a", "sudo: a job runs as the one who submits it"),
    ("docker -H tcp://x run a", "-H: the job goes to the gpujobs server; see GPUJOBS_HOST"),
    ("docker run a | tee log", "| tee log: only one command is translated, without redirections"),
    ("docker run a > log 2>&1", "> log 2>&1: only one command is translated, without redirections"),
    ("docker run -e A=$(hostname) a", "$(hostname): it is not run here; write its result"),
    ("docker run -l gpujobs.job=1 a", "-l gpujobs.job=1: 'gpujobs.job' is set by gpujobs; choose another key"),
    ("docker run --health-interval 5s a",
     "--health-interval and the like: they mean nothing without --health-cmd; write healthcheck: test:"),
])  # fmt: skip
def test_what_is_left_out_is_said_with_the_reason(line: str, note: str) -> None:
    _, notes, _ = translated(line)
    assert note in notes


BY_INDEX = (
    ": GPUs are not chosen by index, which changes; any {} will do, or write UUIDs: gpus: {{uuid: [GPU-…]}}, "
    "`gpujobs gpus` shows them"
)


@pytest.mark.parametrize(("line", "count", "note"), [
    ("docker run --gpus all a", 1, "--gpus all: a job says how many GPUs it needs: 1 is written, change it"),
    ("nvidia-docker run a", 1, "the nvidia runtime: a job says how many GPUs it needs: 1 is written, change it"),
    ("docker run --gpus=4 a", 4, None),
    ("docker run --gpus count=3,capabilities=utility a", 3,
     "--gpus capabilities=utility: compute and utility of the driver are there"),
    ("docker run --device /dev/nvidia0 --device=/dev/nvidia2:/dev/nvidia0 --device /dev/nvidiactl a", 2,
     "--device" + BY_INDEX.format(2)),
    ("podman run --device nvidia.com/gpu=all a", 1,
     "--device: a job says how many GPUs it needs: 1 is written, change it"),
    ("podman run --device nvidia.com/gpu=1 a", 1, "--device" + BY_INDEX.format(1)),
    ("""docker run --gpus '"device=0,2"' a""", 2, '--gpus "device=0,2"' + BY_INDEX.format(2)),
    ("docker run --gpus device=1 a", 1, "--gpus device=1" + BY_INDEX.format(1)),
    ("docker run --runtime nvidia -e NVIDIA_VISIBLE_DEVICES=0,1,2 a", 3,
     "-e NVIDIA_VISIBLE_DEVICES=0,1,2: GPUs are asked for with gpus:"),
    ("docker run --runtime nvidia -e NVIDIA_VISIBLE_DEVICES=void a", 0, None),
    ("docker run --gpus all -e CUDA_VISIBLE_DEVICES=2,3 a", 2,
     "-e CUDA_VISIBLE_DEVICES=2,3: a job's GPUs are numbered from 0; it sees no others"),
    ("NV_GPU=0,1 nvidia-docker run a", 2, None),
    ("docker run a", 0, None),
])  # fmt: skip
def test_gpus_in_every_way_docker_has_them(line: str, count: int, note: str | None) -> None:
    spec, notes, _ = translated(line)
    assert spec.gpus.count == count
    if note is not None:
        assert note in notes


def test_gpus_by_uuid_stay_these() -> None:
    spec, _, _ = translated(
        "docker run --gpus '\"device=GPU-11111111-0000-0000-0000-000000000000,"
        "GPU-22222222-0000-0000-0000-000000000000\"' a"
    )
    assert spec.gpus.uuid == (
        "GPU-11111111-0000-0000-0000-000000000000",
        "GPU-22222222-0000-0000-0000-000000000000",
    )


@pytest.mark.parametrize("line", [
    "docker run -itd -p80:80 -e=A=b --env C=d -v/x:/y a ls",
    "docker run -it -d -p 80:80 -eA=b -e C=d --volume=/x:/y a ls",
    "docker run --interactive --tty=true --detach --publish=80:80 --env=A=b -e C=d -v /x:/y -- a ls",
])  # fmt: skip
def test_options_are_read_in_every_spelling(line: str) -> None:
    spec, _, _ = translated(line)
    assert spec.environment == (("A", "b"), ("C", "d"))
    assert spec.volumes == (Volume(source="/x", target="/y"),)
    assert spec.ports == (Port(target=80, published=80),)
    assert spec.command == ("ls",)


def test_what_the_shell_would_not_replace_is_literal() -> None:
    spec, _, text = translated(r"""docker run -e 'A=$HOME {{ x }}' -e "B=$X" -e C=\$X a bash -c 'echo "$HOME" | wc' """)
    assert spec.environment == (("A", "$HOME {{ x }}"), ("B", "x"), ("C", "$X"))
    assert spec.command == ("bash", "-c", 'echo "$HOME" | wc')
    assert '"$$HOME {{{{ x }}"' in text


def test_words_are_taken_as_they_are() -> None:
    spec, notes, _ = translated(["docker", "run", "-e", "A=$HOME", "a", "echo", "a;b", "${X}", "line\none", "é\x1b"])
    assert spec.environment == (("A", "$HOME"),)
    assert spec.command == ("echo", "a;b", "${X}", "line\none", "é\x1b")
    assert notes == ()


@pytest.mark.parametrize(("line", "message"), [
    ("", "'' is not docker"),
    ("ls -l", "'ls' is not docker"),
    ("docker", "only docker run can be translated; the line has nothing"),
    ("docker ps", "only docker run can be translated; the line has 'ps'"),
    ("docker run", "the command line names no image"),
    ("docker run --rm", "the command line names no image"),
    ("docker run --gpu all a", "docker run has no option --gpu; did you mean `--gpus`?"),
    ("docker run -X a", "docker run has no option -X"),
    ("docker run -v", "option -v has no value"),
    ("docker run --volume", "option --volume has no value"),
    ("docker run 'a", "the command line has a quote ' that is not closed"),
    ("docker run A/B", "image: 'A/B' is not an image; image names are lower case; did you mean `a/b`?"),
    ("docker run a\0b", "the command line contains a NUL character"),
])  # fmt: skip
def test_what_is_no_docker_run_is_refused_in_words(line: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        from_docker(line)
    assert caught.value.message == message


def test_a_note_cannot_break_out_of_its_comment() -> None:
    spec, notes, text = translated(["docker", "run", "--hostname", "x\nimage: evil\n\x1b[31m", "a"])
    assert spec.image == "a"
    assert all(char.isprintable() for char in "".join(notes))
    assert text.count("\nimage:") == 1


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(dockerrun.VALUED)), st.sampled_from(VALUES)), max_size=8),
       st.lists(st.sampled_from(VALUES) | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]),
       max_size=8), max_size=4))  # fmt: skip
def test_whatever_is_written_can_be_parsed(options: list[tuple[str, str]], arguments: list[str]) -> None:
    """With an environment in which every name is set: that one is not is the client's matter."""
    words = ["docker", "run", *(f"--{name}={value}" for name, value in options), "a/b:c", *arguments]
    spec, _, _ = translated(words)
    assert spec.command == (tuple(arguments) if arguments else None)


SHELL = ["run ", "-v ", "-e ", "--gpus ", "a ", "'", '"', "$", "$(", ")", "`", "\\", "\n", "|", "#", "="]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*SHELL, *VALUES]), max_size=14))
def test_any_line_is_translated_or_refused(pieces: list[str]) -> None:
    try:
        result = from_docker("docker run " + "".join(pieces))
    except InvalidInput as error:
        assert error.message  # noqa: PT017 - either outcome is right
        return
    assert result.text.startswith("# From")


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=30))
def test_the_writer_quotes_so_that_a_text_comes_back(text: str) -> None:
    from gpujobs.yamltree import read

    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        return
    value = read(document({"key": text, "list": [text, {"inner": text}]})).value
    assert value == {"key": text, "list": [text, {"inner": text}]}
    assert isinstance(value, dict)
    assert not isinstance(value["key"], Plain) or value["key"].value == text


def test_modes_that_a_job_file_has_are_kept() -> None:
    spec, notes, _ = translated("docker run --network none --ipc=none --shm-size 1g a")
    assert (spec.network_mode, spec.ipc, spec.shm_size) == ("none", "none", None)
    assert notes == ("--shm-size: it means nothing with ipc: none",)


@pytest.mark.parametrize("here", ["$PWD", "${PWD}", "$(pwd)", "`pwd`", "$(pwd -P)", "$(realpath .)"])
def test_the_directory_of_the_line_is_the_files(here: str) -> None:
    spec, _, _ = translated(f"""docker run -v "{here}/x":/w --mount '"type=bind,src=./y,dst=/v"' a""")
    assert [volume.source for volume in spec.volumes] == [f"{CONTEXT.directory}/x", f"{CONTEXT.directory}/y"]
