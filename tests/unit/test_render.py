# ruff: noqa: RUF001 - the en dash is the sign of a gap

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from gpujobs.faces import gpuview, render
from gpujobs.faces.grid import Cell, Column, Grid, fold
from gpujobs.faces.words import clean, columns, duration, end_sentence, local_time, seconds_of, size
from tests.unit.fakeserver import row

GIB = 2**30
NOW = seconds_of("2026-01-02T04:00:00Z")
assert NOW is not None


@pytest.fixture(autouse=True)
def in_utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


# --- foreign text

HOSTILE = [
    ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
    ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
    ("\x1b]52;c;aGk=\x1b\\", "\\x1b]52;c;aGk=\\x1b\\"),
    ("\x9b31mc1", r"\x9b31mc1"),
    ("a\nb\tc\rd\0e", r"a\x0ab\x09c\x0dd\x00e"),
    ("\u202egnp.exe", r"\u202egnp.exe"),
    ("a\u2066b\u2069", r"a\u2066b\u2069"),
    ("zero\u200bwidth\u200d\ufeff", r"zero\u200bwidth\u200d\ufeff"),
    ("line\u2028para\u2029", r"line\u2028para\u2029"),
    ("no-break\u00a0space", r"no-break\xa0space"),
    ("tag\U000e0041", r"tag\U000e0041"),
    ("lone\udcff", r"lone\udcff"),
    ("filler\u3164", r"filler\u3164"),
    ("\x7f", r"\x7f"),
]


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_foreign_text_is_shown_and_never_obeyed(text, shown):
    assert clean(text) == shown
    assert clean(clean(text)) == clean(text)


@pytest.mark.parametrize("text", ["", "resnet-lr0.1", "größe", "训练", "a b", "[bold]not markup[/bold]", ":smile:"])
def test_harmless_text_stays_as_it_is(text):
    assert clean(text) == text


def shown_on_terminal(grid: Grid, width: int) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, highlight=False, markup=False, emoji=False,
                      color_system="truecolor", legacy_windows=False)  # fmt: skip
    console.print(grid.rich(width), end="")
    return out.getvalue()


def test_no_hostile_string_of_any_field_reaches_a_terminal():
    evil = "".join(text for text, _ in HOSTILE)
    jobs = [
        row(12, "queued", name=evil, owner=evil, reason=evil, message=evil, gpu_count=evil),
        row(13, "running", name=evil, gpus=[evil, evil], gpu_indices=[evil, 1]),
        row(14, evil),
    ]
    machine = {
        "driver": evil, "cuda": evil, "problem": evil, "links": [{"a": evil, "b": "u", "link": evil}],
        "gpus": [
            {"uuid": evil, "index": 0, "model": evil, "health": evil, "avoided": evil,
             "allocations": [{"job": evil, "owner": evil}],
             "processes": [{"pid": 1, "user": evil, "name": evil}]},
            {"uuid": "u", "index": 1, "mig": [{"uuid": evil, "profile": evil}]},
        ],
    }  # fmt: skip
    spec = {
        "image": evil, "command": [evil], "working_dir": evil, "gpus": {"count": 1, "model": [evil], "mig": evil},
        "volumes": [{"source": evil, "target": evil}], "ports": [{"target": 1, "host_ip": evil}],
    }  # fmt: skip
    attempts = [{"attempt": 1, "message": evil, "choices": [{"uuid": evil, "chosen": False, "reason": evil}]}]
    full = row(12, "failed", name=evil, message=evil, spec=spec, container={"name": evil, "id": evil, "image": evil})
    topology, legend = gpuview.topology(machine)
    texts = [
        render.ps(jobs, NOW).plain(), shown_on_terminal(render.ps(jobs, NOW, 80), 80),
        shown_on_terminal(render.ps(jobs, NOW, 200), 200), render.show(full | {"attempts": attempts}, NOW),
        *[render.state_line(job) for job in jobs], end_sentence(full, "12"), gpuview.header(machine),
        gpuview.glance(machine, None).plain(), shown_on_terminal(gpuview.glance(machine, 80), 80),
        shown_on_terminal(gpuview.glance(machine, 200), 200), topology.plain(), legend,
    ]  # fmt: skip
    for text in texts:
        for ours in ("\n", "\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[36m",
                     "\x1b[1;31m", "\x1b[35m"):  # fmt: skip
            text = text.replace(ours, "")
        assert text.isprintable(), [c for c in text if not c.isprintable()]


# --- words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0, "0s"), (-3, "0s"), (59.9, "59s"), (187, "3m07s"), (3599, "59m59s"), (11520, "3h12m"),
     (183600, "2d03h"), (float("nan"), "–")],
)  # fmt: skip
def test_durations_are_as_people_say_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1.5 * GIB, "1.5 GiB"), (40 * GIB, "40 GiB"),
     (512 * 2**20, "512 MiB"), (1024 * GIB - 1, "1 TiB"), (2**60, "1024 PiB")],
)  # fmt: skip
def test_sizes_are_in_binary_units(count, text):
    assert size(count) == text


def test_times_that_are_none_are_gaps():
    assert local_time("2026-01-02T03:04:05.123456Z") == "2026-01-02 03:04:05 UTC"
    assert [local_time(text) for text in (None, "soon", 5, "")] == ["–"] * 4


def test_an_end_is_one_sentence():
    oom = row(12, "failed", exit_code=137, message="exit 137: killed: the 8 GiB memory limit was reached")
    assert end_sentence(oom, "12") == (
        "job 12 failed after 10m00s: exit 137: killed: the 8 GiB memory limit was reached"
    )
    assert end_sentence(row(12, "failed", exit_code=3), "12") == "job 12 failed after 10m00s: exit 3"
    assert end_sentence(row(12, "succeeded"), "12") == "job 12 succeeded after 10m00s"
    assert end_sentence(row(12, "cancelled", started_at=None), "12") == "job 12 cancelled"


# --- tables


def test_plain_columns_are_aligned_and_nothing_is_cut_off():
    grid = Grid((Column("ID"), Column("N", right=True), Column("LAST", fold=True)))
    grid.add("1", "5", "x" * 300)
    grid.add("训练", "123", "")
    assert grid.plain() == "ID      N  LAST\n1       5  " + "x" * 300 + "\n训练  123\n"


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_lost(width):
    grid = Grid((Column("ID"), Column("NAME", fold=True), Column("WHY", fold=True)))
    words = [f"word{n}" for n in range(30)]
    grid.add("12", "a-very-long-name-without-any-space" * 3, " ".join(words), below=Cell(" ".join(words)))
    lines = ["".join(text for text, _ in line) for line in grid.lines(width)]
    assert max(columns(line) for line in lines) <= width
    joined = " ".join(lines).split()
    assert all(joined.count(word) == 2 for word in words)


def test_text_is_folded_between_words_and_within_only_where_it_must_be():
    assert fold("one two three", 7) == ["one two", "three"]
    assert fold("abcdefghij", 4) == ["abcd", "efgh", "ij"]
    assert fold("训练训练", 5) == ["训练", "训练"]
    assert fold("", 5) == [""]
    assert fold("anything at all", None) == ["anything at all"]


def test_ps_tells_who_has_what_since_when_and_why_not():
    jobs = [
        row(7, "running", gpus=["GPU-a", "GPU-b", "GPU-c"], gpu_indices=[0, 1, 3]),
        row(9, "running", index=3, gpus=["GPU-a"]),
        row(12, "queued", gpu_count=4, reason="resources", message="4 GPUs are asked for and 1 is free"),
    ]
    assert render.ps(jobs, NOW).plain() == (
        "ID   NAME    OWNER  STATE    GPUS         TIME  REASON\n"
        "7    resnet  alice  running  3 (0-1,3)  55m55s\n"
        "9_3  resnet  alice  running  1          55m55s\n"
        "12   resnet  alice  queued   4           1h00m  resources: 4 GPUs are asked for and 1 is free\n"
    )


def test_on_80_columns_reasons_stand_below_and_ids_are_whole():
    jobs = [row(123456, "queued", index=99999, name="n" * 60, owner="o" * 40, message="because " * 30)]
    lines = ["".join(text for text, _ in line) for line in render.ps(jobs, NOW, 80).lines(80)]
    assert lines[1].startswith("123456_99999  ")
    assert max(len(line) for line in lines) <= 80
    assert " ".join(lines).count("because") == 30


def test_show_tells_what_runs_with_what():
    spec = {
        "image": "pytorch:2.4", "command": ["python", "train.py", "--name", "a b"], "cpus": 8.0,
        "mem_limit": 64 * GIB, "time_limit": 43200.0, "volumes": [
            {"source": "/srv/data", "target": "/data", "read_only": True}, {"type": "tmpfs", "target": "/tmp"}],
        "gpus": {"count": 2, "max_count": 4, "memory": 40 * GIB, "capability": [">=", [8, 0]], "link": "nvlink"},
    }  # fmt: skip
    attempts = [
        {"attempt": 1, "started_at": "2026-01-02T03:04:05Z", "ended_at": None, "exit_code": None, "message": None,
         "choices": [{"uuid": "GPU-aaaaaaaa-1", "chosen": True, "reason": ""},
                     {"uuid": "GPU-bbbbbbbb-1", "chosen": False, "reason": "job 9 holds it"}]}
    ]  # fmt: skip
    container = {"name": "gpujobs-s-12-1", "id": "0123456789abcdef", "image": "pytorch:2.4"}
    told = render.show(
        row(12, gpus=["GPU-aaaaaaaa-1"], spec=spec, container=container, attempts=attempts), NOW
    ).splitlines()
    for line in (
        "Job:         12",
        "GPUs:        GPU-aaaaaaaa-1",
        "Container:   gpujobs-s-12-1 (0123456789ab)",
        "Command:     python train.py --name 'a b'",
        "Asks for:    2-4 GPUs, memory 40 GiB, capability >=8.0, link nvlink",
        "Memory:      64 GiB",
        "Time limit:  12h00m",
        "Mount:       /srv/data -> /data (read only)",
        "Mount:       tmpfs -> /tmp",
        "Attempts:    1:  2026-01-02 03:04:05 UTC",
        "                1 GPU not taken: job 9 holds it",
    ):
        assert line in told


def test_show_of_a_job_whose_inside_is_not_ours_to_see_works():
    told = render.show(row(12, "queued", spec=None, container=None, attempts=[], gpu_count=2), NOW)
    assert "GPUs:        asks for 2" in told
    assert "Image" not in told


def test_a_change_of_state_says_why_or_where():
    assert render.state_line(row(state="running", gpus=["GPU-8f3a2c41-x"])) == "running on 1 GPU"
    assert render.state_line(row(state="running", gpus=["G", "H"], gpu_indices=[5, 4])) == ("running on GPU 4-5")
    assert render.state_line(row(state="queued", reason="priority", message="after job 3")) == (
        "queued: priority: after job 3"
    )
    assert render.state_line(row(state="pulling")) == "pulling"


# --- GPUs


def gpu(index: int, **more) -> dict:
    plain = {
        "uuid": f"GPU-{index}", "index": index, "minor": index, "model": "NVIDIA A100-SXM4-80GB",
        "memory_bytes": 80 * GIB, "health": "ok", "allocations": [], "processes": [], "mig": [],
        "memory_used_bytes": GIB, "utilisation_percent": 3, "temperature_c": 34, "power_w": 58.3,
        "power_limit_w": 400.0, "numa": 0,
    }  # fmt: skip
    return plain | more


MACHINE = {
    "simulated": False, "driver": "550.54", "cuda": "12.4", "problem": None,
    "links": [{"a": "GPU-0", "b": "GPU-1", "link": "nvlink", "nvlinks": 12},
              {"a": "GPU-0", "b": "GPU-2", "link": "host-bridge", "nvlinks": 0}],
    "gpus": [
        gpu(0, allocations=[{"job": 12, "index": 3, "owner": "alice", "memory_bytes": 80 * GIB}]),
        gpu(1, processes=[{"pid": 99, "user": "carol", "name": "/usr/bin/python3", "memory_bytes": 2 * GIB,
                           "job": None, "kind": "compute"}]),
        gpu(2, health="lost", memory_used_bytes=None, utilisation_percent=None, temperature_c=None, power_w=None,
            avoided="XID 79"),
        gpu(3, processes=[{"pid": 7, "user": "root", "name": "/usr/lib/xorg/Xorg", "kind": "graphics"}]),
    ],
}  # fmt: skip


def test_gpus_tells_jobs_strangers_lost_ones_and_gaps():
    assert gpuview.header(MACHINE) == "4 GPUs, 1 free · driver 550.54 · CUDA 12.4"
    assert gpuview.glance(MACHINE, None).plain() == (
        "GPU  MODEL           UUID     MEMORY  UTIL  TEMP     POWER  HEALTH  WHO\n"
        "  0  A100-SXM4-80GB  GPU-0  1/80 GiB    3%  34°C  58/400 W  ok      job 12_3 alice\n"
        "  1  A100-SXM4-80GB  GPU-1  1/80 GiB    3%  34°C  58/400 W  ok      no job: carol python3 (pid 99, 2 GiB)\n"
        "  2  A100-SXM4-80GB  GPU-2    80 GiB     –     –         –  lost    XID 79\n"
        "  3  A100-SXM4-80GB  GPU-3  1/80 GiB    3%  34°C  58/400 W  ok      free\n"
    )


@pytest.mark.parametrize("width", [80, 120, 200])
def test_gpus_fits_the_terminal(width):
    lines = ["".join(text for text, _ in line) for line in gpuview.glance(MACHINE, width).lines(width)]
    assert max(columns(line) for line in lines) <= width
    joined = "\n".join(lines)
    assert "carol python3 (pid 99, 2 GiB)" in joined
    assert "█" in gpuview.bar(1, 4)
    assert "░" in joined


def test_a_models_name_is_broken_at_its_dashes():
    assert fold("A100-SXM4-80GB", 13) == ["A100-SXM4-", "80GB"]
    assert fold("H100 PCIe-a-very-long-word", 9) == ["H100", "PCIe-a-", "very-", "long-word"]
    assert fold("x" * 12, 5) == ["xxxxx", "xxxxx", "xx"]


def test_simulated_gpus_say_so_twice():
    machine = MACHINE | {"simulated": True, "gpus": [gpu(0, health="simulated")]}
    assert gpuview.header(machine).startswith("SIMULATED  1 GPU, 1 free")
    assert "SIMULATED" in gpuview.glance(machine, None).plain()


def test_mig_devices_stand_below_their_gpu_with_their_own_jobs():
    holding = [{"job": 5, "index": None, "owner": "bob", "memory_bytes": 20 * GIB}]
    stranger = {"pid": 77, "user": "eve", "name": "python", "memory_bytes": None, "container": None, "job": None}
    mig = [
        {"uuid": "MIG-1", "profile": "3g.20gb", "memory_bytes": 20 * GIB, "allocations": holding, "processes": []},
        {"uuid": "MIG-2", "profile": "1g.5gb", "memory_bytes": 5 * GIB, "allocations": [], "processes": [stranger]},
        {"uuid": "MIG-3", "profile": "1g.5gb", "memory_bytes": 5 * GIB, "allocations": [], "processes": []},
    ]
    machine = {"gpus": [gpu(0, mig=mig, allocations=holding, processes=[stranger])]}
    told = gpuview.glance(machine, None).plain().splitlines()
    assert told[1].endswith("ok")
    assert "└ MIG 3g.20gb" in told[2]
    assert told[2].endswith("job 5 bob")
    assert told[3].endswith("no job: eve python (pid 77)")
    assert told[4].endswith("free")


def test_a_shared_gpu_names_each_with_its_part():
    shared = [
        {"job": 5, "index": None, "owner": "bob", "memory_bytes": 10 * GIB},
        {"job": 6, "index": 0, "owner": "alice", "memory_bytes": 12 * GIB},
    ]
    told = gpuview.glance({"gpus": [gpu(0, allocations=shared)]}, None).plain()
    assert "job 5 bob (10 GiB); job 6_0 alice (12 GiB)" in told


def test_a_machine_without_gpus_says_why():
    assert gpuview.header({"gpus": [], "problem": "NVML is not installed"}) == (
        "0 GPUs, 0 free · NVML is not installed"
    )
    assert gpuview.glance({"gpus": []}, None).plain().startswith("GPU")


def test_the_topology_is_a_matrix_with_a_legend():
    grid, legend = gpuview.topology(MACHINE)
    assert grid.plain() == (
        "      GPU0  GPU1  GPU2  GPU3  NUMA\n"
        "GPU0  X     NV12  PHB   –     0\n"
        "GPU1  NV12  X     –     –     0\n"
        "GPU2  PHB   –     X     –     0\n"
        "GPU3  –     –     –     X     0\n"
    )
    assert legend == "NV#  that many NVLinks\nPHB  one PCIe host bridge\n"


@pytest.mark.parametrize(
    ("share", "text"), [(None, "····"), (0, "░░░░"), (1, "████"), (0.5, "██░░"), (2, "████"), (0.01, "░░░░"),
                        (0.04, "▏░░░")]
)  # fmt: skip
def test_bars_show_eighths(share, text):
    assert gpuview.bar(share, 4) == text
