"""The inventory through the real pynvml, with the lab's library in the place of the driver's."""

import ctypes
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpujobs.adapters import nvmlsession, procfs
from gpujobs.adapters.nvml import Nvml
from gpujobs.core.inventory import Health, Link, is_stranger
from tests.lab import nvml as lab

MIB = 2**20


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    directory = lab.build(tmp_path_factory.mktemp("nvml"))
    # Once it is in the process, the loader finds it by its soname for pynvml, as it would by LD_LIBRARY_PATH.
    ctypes.CDLL(str(directory / lab.SONAME), mode=ctypes.RTLD_GLOBAL)
    return directory


@pytest.fixture
def state(library, tmp_path, monkeypatch):
    path = tmp_path / "machine"
    monkeypatch.setenv("LAB_NVML_STATE", str(path))
    return path


@pytest.fixture
def nvml(state):
    source = Nvml(clock=lambda: 12.0)
    yield source
    source.close()


def test_every_field_of_a_healthy_gpu_is_read(state, nvml):
    machine = lab.dgx_a100()
    gpu = machine.gpus[5]
    gpu.minor, gpu.serial, gpu.temperature, gpu.utilization, gpu.memory_utilization = 2, "1322", 61, 97, 40
    gpu.power, gpu.power_limit, gpu.energy = 312_500, 400_000, 7_250_000
    gpu.ecc_corrected, gpu.ecc_uncorrected = (3, 30), (1, 10)
    gpu.memory_used, gpu.memory_reserved, gpu.cpus = 9 * MIB, 5 * MIB, "64-66,192"
    machine.write(state)

    inventory = nvml.snapshot()

    seen = inventory.gpus[5]
    assert (seen.uuid, seen.index, seen.minor, seen.model) == (gpu.uuid, 5, 2, "NVIDIA A100-SXM4-40GB")
    assert (seen.memory_bytes, seen.memory_used_bytes, seen.memory_reserved_bytes) == (
        40960 * MIB,
        9 * MIB,
        5 * MIB,
    )
    assert (seen.health, seen.capability, seen.serial) == (Health.OK, (8, 0), "1322")
    assert (seen.utilisation_percent, seen.memory_utilisation_percent, seen.temperature_c) == (97, 40, 61)
    assert (seen.power_w, seen.power_limit_w, seen.energy_joules) == (312.5, 400.0, 7250.0)
    assert (seen.ecc_corrected, seen.ecc_uncorrected) == (3, 1)
    assert (seen.pci, seen.numa, seen.cpus) == (gpu.pci, 1, (64, 65, 66, 192))
    assert (inventory.driver, inventory.cuda, inventory.taken_at) == ("535.183.01", (12, 2), 12.0)
    assert (inventory.problem, inventory.simulated, len(inventory.gpus)) == ("", False, 8)


METRICS = [
    "Name", "MinorNumber", "Serial", "PciInfo", "CudaComputeCapability", "MemoryInfo", "MemoryInfo_v2",
    "UtilizationRates", "Temperature", "TemperatureV", "PowerUsage", "EnforcedPowerLimit",
    "TotalEnergyConsumption", "TotalEccErrors", "ComputeRunningProcesses", "GraphicsRunningProcesses",
    "MPSComputeRunningProcesses", "MigMode", "CpuAffinity", "MemoryAffinity", "NvLinkState",
    "TopologyCommonAncestor",
]  # fmt: skip


@pytest.mark.parametrize("code", [lab.NOT_SUPPORTED, lab.NO_PERMISSION, lab.UNKNOWN, lab.INVALID_ARGUMENT])
def test_metrics_that_fail_are_gaps_and_the_gpu_is_listed(state, nvml, code):
    machine = lab.dgx_a100()
    machine.gpus[0].answers.update(dict.fromkeys(METRICS, code))
    machine.write(state)

    for _ in range(3):
        broken, *others = nvml.snapshot().gpus

        assert broken.uuid == machine.gpus[0].uuid
        assert broken.health is Health.OK
        assert (broken.temperature_c, broken.power_w, broken.memory_used_bytes, broken.numa) == (None,) * 4
        assert (broken.model, broken.memory_bytes, broken.cpus, broken.capability) == ("", 0, (), None)
        assert all(gpu.temperature_c == 33 and gpu.memory_bytes for gpu in others)


def test_a_metric_that_begins_to_fail_does_not_restart_the_library_again_and_again(state, nvml):
    machine = lab.Machine.uniform(2)
    machine.write(state)
    nvml.snapshot()
    machine.gpus[1].answers["PowerUsage"] = lab.UNKNOWN
    machine.write(state)

    assert nvml.snapshot().gpus[1].power_w is None
    generation = nvml._nvml.generation
    assert nvml.snapshot().gpus[1].power_w is None
    assert nvml._nvml.generation == generation


@pytest.mark.parametrize("handle_fails", [False, True])
def test_a_lost_gpu_keeps_its_name_and_the_rest_stands(state, nvml, handle_fails):
    machine = lab.dgx_a100()
    machine.lost_handle_fails = handle_fails
    machine.gpus[3].processes.append(lab.Process(4711, MIB))
    machine.write(state)
    before = nvml.snapshot()
    machine.gpus[3].lost = True
    machine.write(state)

    after = nvml.snapshot()

    lost = after.gpus[3]
    assert (lost.uuid, lost.model, lost.memory_bytes) == (
        machine.gpus[3].uuid,
        "NVIDIA A100-SXM4-40GB",
        40960 * MIB,
    )
    assert (lost.health, lost.temperature_c, lost.processes) == (Health.LOST, None, ())
    assert [gpu.health for gpu in after.gpus].count(Health.OK) == 7
    assert after.nvlinks == before.nvlinks

    machine.gpus[3].lost = False
    machine.write(state)
    assert nvml.snapshot().gpus[3].health is Health.OK


def test_a_gpu_that_was_lost_before_the_first_look_is_listed_by_its_index(state, nvml):
    machine = lab.Machine.uniform(4)
    machine.gpus[2].lost = True
    machine.write(state)

    lost = nvml.snapshot().gpus[2]

    assert (lost.uuid, lost.index, lost.health, lost.minor) == ("lost-2", 2, Health.LOST, None)


def test_a_gpu_whose_handle_is_unknown_counts_as_lost(state, nvml):
    machine = lab.Machine.uniform(2)
    machine.gpus[0].answers["HandleByIndex"] = lab.UNKNOWN
    machine.write(state)

    assert [gpu.health for gpu in nvml.snapshot().gpus] == [Health.LOST, Health.OK]


def test_when_all_gpus_are_lost_they_are_listed_so(state, nvml):
    machine = lab.Machine.uniform(2)
    machine.write(state)
    nvml.snapshot()
    for gpu in machine.gpus:
        gpu.lost = True
    machine.write(state)

    for _ in range(2):
        inventory = nvml.snapshot()
        assert [(gpu.uuid, gpu.health) for gpu in inventory.gpus] == [
            (gpu.uuid, Health.LOST) for gpu in machine.gpus
        ]
        assert inventory.problem == ""


def test_a_driver_that_goes_away_and_comes_back_is_survived(state, nvml):
    machine = lab.Machine.uniform(3)
    machine.write(state)
    assert len(nvml.snapshot().gpus) == 3
    machine.unload_driver()
    machine.write(state)

    away = nvml.snapshot()
    assert (away.gpus, away.problem) == ((), "The NVIDIA kernel driver is not loaded.")
    assert nvml.snapshot().problem == away.problem

    machine.load_driver()
    machine.gpus.reverse()
    for gpu in machine.gpus:
        gpu.temperature = 50
    machine.write(state)
    back = nvml.snapshot()
    assert [gpu.uuid for gpu in back.gpus] == [gpu.uuid for gpu in machine.gpus]
    assert {gpu.temperature_c for gpu in back.gpus} == {50}


def test_a_driver_loaded_anew_between_two_looks_is_noticed_and_indexes_may_have_moved(state, nvml):
    machine = lab.Machine.uniform(3)
    machine.write(state)
    nvml.snapshot()
    machine.load_driver()
    del machine.gpus[0]
    machine.gpus[1].lost = True
    machine.driver_version = "550.54.15"
    machine.write(state)

    inventory = nvml.snapshot()

    assert inventory.problem == ""
    assert inventory.driver == "550.54.15"
    # Index 1 was the GPU that is index 0 now: what is lost there cannot be told.
    assert [gpu.uuid for gpu in inventory.gpus] == [machine.gpus[0].uuid, "lost-1"]


def test_a_driver_of_another_version_than_the_library_is_told(state, nvml):
    machine = lab.Machine.uniform(1)
    machine.driver = "mismatch"
    machine.write(state)

    assert "different versions" in nvml.snapshot().problem


def test_processes_are_named_with_owner_and_listed_once(state, nvml):
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        user=65534,
        group=65534,
        extra_groups=[],
    )
    try:
        machine = lab.Machine.uniform(1)
        machine.gpus[0].processes += [
            lab.Process(child.pid, 100 * MIB, "graphics"),
            lab.Process(child.pid, 300 * MIB, "compute"),
            lab.Process(4_000_001, None, "graphics", name="/usr/lib/xorg/Xorg"),
            lab.Process(4_000_002, 5 * MIB, "mps", name="worker"),
        ]
        machine.write(state)
        seen = nvml.snapshot().gpus[0].processes
    finally:
        child.kill()
        child.wait()

    real, desktop, worker = seen
    assert (real.pid, real.kind, real.memory_bytes) == (child.pid, "compute", 300 * MIB)
    assert (real.name, real.uid, real.user) == (sys.executable, 65534, "nobody")
    assert (desktop.name, desktop.kind, desktop.uid, desktop.memory_bytes) == (
        "/usr/lib/xorg/Xorg",
        "graphics",
        None,
        None,
    )
    assert (worker.name, worker.kind) == ("worker", "mps")
    assert [is_stranger(process) for process in seen] == [True, False, True]


def test_processes_in_containers_get_their_job(state, nvml, monkeypatch):
    ours, theirs, outer = ("a" * 64, "b" * 64, "c" * 64)
    held = {
        11: procfs.Facts("python", 1001, "alice", (ours,)),
        12: procfs.Facts("python", 1002, "bob", (theirs,)),
        13: procfs.Facts("python", 1003, "carol", (outer, ours)),
    }
    monkeypatch.setattr(procfs, "facts", held.__getitem__)
    machine = lab.Machine.uniform(1)
    machine.gpus[0].processes += [lab.Process(pid, MIB) for pid in held]
    machine.write(state)

    seen = nvml.snapshot({ours: "12_3"}.get).gpus[0].processes

    assert [(p.container, p.job) for p in seen] == [(ours, "12_3"), (theirs, None), (ours, "12_3")]
    assert [is_stranger(p) for p in seen] == [False, True, False]


def test_a_process_whose_name_is_no_utf_8_is_listed(state, nvml):
    name = b"\xff\xfe\x01hostile"
    child = subprocess.Popen(["/bin/sleep", "60"], executable="/bin/sleep")
    try:
        while not Path(f"/proc/{child.pid}/cmdline").read_bytes():
            time.sleep(0.01)  # the kernel lets go of the parent before the child has its arguments
        machine = lab.Machine.uniform(1)
        machine.gpus[0].processes.append(lab.Process(child.pid, MIB, name="PLACEHOLDER"))
        state.write_bytes(machine.render().encode().replace(b"PLACEHOLDER", name))
        seen = nvml.snapshot().gpus[0].processes
    finally:
        child.kill()
        child.wait()

    assert [(p.pid, p.name) for p in seen] == [(child.pid, "/bin/sleep")]


def test_mig_devices_are_listed_with_profile_and_processes(state, nvml):
    machine = lab.mig_a100()
    first, _, last = machine.gpus[0].mig_devices
    machine.gpus[0].processes += [
        lab.Process(4_000_001, 7 * MIB, "compute", last.gpu_instance, 0, "python"),
        lab.Process(4_000_002, MIB, "compute", name="nv-hostengine"),
    ]
    machine.write(state)

    divided, whole = nvml.snapshot().gpus

    assert (divided.mig_enabled, whole.mig_enabled, whole.mig) == (True, False, ())
    assert [(m.uuid, m.profile, m.gpu_instance, m.compute_instance) for m in divided.mig] == [
        (m.uuid, m.profile, m.gpu_instance, 0) for m in machine.gpus[0].mig_devices
    ]
    assert divided.mig[0].memory_bytes == first.memory
    assert divided.mig[2].memory_used_bytes == 7 * MIB
    assert [[p.pid for p in m.processes] for m in divided.mig] == [[], [], [4_000_001]]
    assert [p.pid for p in divided.processes] == [4_000_002]
    assert divided.utilisation_percent is None


def test_a_mig_profile_is_put_together_where_the_name_does_not_tell_it(state, nvml):
    machine = lab.mig_a100()
    machine.gpus[0].answers["Name"] = lab.NOT_SUPPORTED
    machine.write(state)

    assert [m.profile for m in nvml.snapshot().gpus[0].mig] == ["3g.20gb", "2g.10gb", "1g.5gb"]


def test_an_nvswitch_joins_all_with_all(state, nvml):
    lab.dgx_a100().write(state)

    inventory = nvml.snapshot()

    uuids = [gpu.uuid for gpu in inventory.gpus]
    assert all(inventory.nvlink_count(a, b) == 12 for a in uuids for b in uuids if a != b)
    assert inventory.link(uuids[0], uuids[7]) is Link.NVLINK
    paths = [inventory.pcie_path(uuids[0], other) for other in (uuids[1], uuids[2], uuids[4])]
    assert paths == [Link.MULTI_SWITCH, Link.NODE, Link.SYSTEM]


def test_switch_links_that_are_down_count_for_the_pairs_of_that_gpu_only(state, nvml):
    machine = lab.dgx_h100()
    for link in machine.gpus[2].links[:5]:
        link.active = False
    machine.write(state)

    inventory = nvml.snapshot()

    uuids = [gpu.uuid for gpu in inventory.gpus]
    assert inventory.nvlink_count(uuids[0], uuids[1]) == 18
    assert inventory.nvlink_count(uuids[0], uuids[2]) == 13


def test_direct_links_are_counted_for_each_pair(state, nvml):
    machine = lab.dgx1_volta()
    machine.write(state)

    inventory = nvml.snapshot()

    uuids = [gpu.uuid for gpu in inventory.gpus]
    counts = [inventory.nvlink_count(uuids[0], other) for other in uuids[1:]]
    assert counts == [1, 1, 2, 2, 0, 0, 0]
    assert inventory.pcie_path(uuids[0], uuids[1]) is Link.SINGLE_SWITCH


def test_links_to_a_lost_gpu_are_not_taken_for_links_to_a_switch(state, nvml):
    machine = lab.dgx1_volta()
    machine.gpus[0].lost = True
    machine.write(state)

    inventory = nvml.snapshot()

    uuids = [gpu.uuid for gpu in inventory.gpus]
    assert inventory.nvlink_count(uuids[3], uuids[4]) == 0
    assert inventory.nvlink_count(uuids[1], uuids[2]) == 2


def test_snapshots_share_their_links_as_long_as_nothing_changes(state, nvml):
    machine = lab.dgx_a100()
    machine.write(state)
    first = nvml.snapshot()
    machine.gpus[0].temperature = 70
    machine.write(state)

    second = nvml.snapshot()

    assert second.gpus[0].temperature_c == 70
    assert second.links is first.links
    assert second.nvlinks is first.nvlinks


def test_an_xid_error_is_told_once_and_stays_with_its_gpu(state, nvml):
    machine = lab.Machine.uniform(2)
    machine.write(state)
    assert nvml.wait_event(0.0) is None
    machine.xid(1, 31)
    machine.write(state)

    event = nvml.wait_event(5.0)

    assert event is not None
    assert (event.uuid, event.xid, event.is_application) == (machine.gpus[1].uuid, 31, True)
    assert nvml.wait_event(0.0) is None
    assert [gpu.xid for gpu in nvml.snapshot().gpus] == [None, 31]


def test_the_xid_error_of_a_gpu_that_falls_off_the_bus_is_told(state, nvml):
    machine = lab.Machine.uniform(2)
    machine.write(state)
    nvml.snapshot()
    nvml.wait_event(0.0)
    machine.xid(0, 79)
    machine.gpus[0].lost = True
    machine.write(state)

    event = nvml.wait_event(5.0)

    assert event is not None
    assert (event.uuid, event.xid, event.is_application) == (machine.gpus[0].uuid, 79, False)
    lost = nvml.snapshot().gpus[0]
    assert (lost.health, lost.xid) == (Health.LOST, 79)


def test_waiting_for_events_with_a_lost_gpu_is_no_busy_loop(state, nvml):
    machine = lab.Machine.uniform(2)
    machine.lost_wait_fails = True
    machine.write(state)
    nvml.wait_event(0.0)
    machine.gpus[0].lost = True
    machine.write(state)
    start = time.monotonic()

    assert nvml.wait_event(0.3) is None
    assert nvml.wait_event(0.3) is None

    assert time.monotonic() - start >= 0.55
    machine.xid(1, 48)
    machine.write(state)
    event = nvml.wait_event(5.0)
    assert event is not None
    assert event.uuid == machine.gpus[1].uuid


def test_waiting_for_events_without_a_driver_takes_its_time(state, nvml):
    machine = lab.Machine()
    machine.unload_driver()
    machine.write(state)
    start = time.monotonic()

    assert nvml.wait_event(0.2) is None

    assert time.monotonic() - start >= 0.2


def test_events_are_told_again_after_the_driver_was_loaded_anew(state, nvml):
    machine = lab.Machine.uniform(1)
    machine.write(state)
    nvml.wait_event(0.0)
    machine.load_driver()
    machine.write(state)
    nvml.snapshot()
    nvml.wait_event(0.0)
    machine.xid(0, 94)
    machine.write(state)

    event = nvml.wait_event(5.0)

    assert event is not None
    assert event.xid == 94


SHOW = (
    "from gpujobs.adapters.nvml import Nvml; n = Nvml(); i = n.snapshot(); n.close();"
    "print(i.problem or [(g.model, g.memory_bytes, g.memory_reserved_bytes) for g in i.gpus])"
)


def run(environment, ask=SHOW):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", ask]
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_the_library_is_found_by_its_soname_in_ld_library_path(library, tmp_path):
    machine = lab.one_t4()
    state = machine.write(tmp_path / "machine")

    shown = run(lab.environment(library, state))

    assert shown == repr([("Tesla T4", machine.gpus[0].memory, machine.gpus[0].memory_reserved)])


def test_a_library_older_than_the_newest_calls_serves(tmp_path):
    missing = ["nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetMPSComputeRunningProcesses_v3"]
    library = lab.build(tmp_path / "old", without=missing)
    machine = lab.one_t4()
    state = machine.write(tmp_path / "machine")

    assert run(lab.environment(library, state)) == repr([("Tesla T4", machine.gpus[0].memory, None)])


@pytest.mark.parametrize("newest", ["_v2", ""])
def test_a_driver_that_has_only_older_process_lists_still_shows_strangers(tmp_path, newest):
    kinds = ("Compute", "Graphics", "MPSCompute")
    versions = ["_v3", "_v2"] if newest == "" else ["_v3"]
    missing = [f"nvmlDeviceGet{kind}RunningProcesses{version}" for kind in kinds for version in versions]
    library = lab.build(tmp_path / "old", without=missing)
    machine = lab.Machine.uniform(2)
    machine.gpus[1].processes += [
        lab.Process(4_000_001, 300 * MIB, "compute", name="python"), lab.Process(4_000_002, None, "mps", name="worker"),
        lab.Process(4_000_003, 5 * MIB, "graphics", name="game"),
    ]  # fmt: skip
    state = machine.write(tmp_path / "machine")
    ask = ("from gpujobs.adapters.nvml import Nvml; n = Nvml(); i = n.snapshot(); n.close();"
           "print([[(p.pid, p.kind, p.name, p.memory_bytes) for p in g.processes] for g in i.gpus])")  # fmt: skip

    shown = run(lab.environment(library, state), ask)

    assert shown == repr([[], [(4_000_001, "compute", "python", 300 * MIB), (4_000_002, "mps", "worker", None),
                               (4_000_003, "graphics", "game", 5 * MIB)]])  # fmt: skip


def test_without_the_library_the_inventory_says_so(tmp_path):
    (tmp_path / lab.SONAME).write_text("no library, wherever this machine may have a real one")

    assert run({**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}) == nvmlsession.PROBLEMS[12]


CID = hashlib.sha256(b"one").hexdigest()
INNER = hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize(
    ("cgroup", "expected"),
    [
        (f"12:devices:/docker/{CID}\n1:name=systemd:/docker/{CID}\n0::/system.slice/x.service\n", (CID,)),
        (f"0::/docker/{CID}\n", (CID,)),
        (f"0::/system.slice/docker-{CID}.scope\n", (CID,)),
        (f"5:cpu,cpuacct:/gpujobs.slice/docker-{CID}.scope/init\n", (CID,)),
        (f"0::/docker/{CID}/docker/{INNER}/worker\n", (CID, INNER)),
        (f"0::/system.slice/docker-{CID}.scope/system.slice/docker-{INNER}.scope\n", (CID, INNER)),
        (f"0::/machine.slice/libpod-{CID}.scope/container\n", (CID,)),
        ("0::/user.slice/user-1000.slice/session-3.scope\n", ()),
        (f"0::/home/{CID[:60]}\n", ()),
        (f"0::/x/{CID}0\n", ()),
        ("", ()),
    ],
)  # fmt: skip
def test_container_ids_are_found_in_every_spelling_of_cgroups(cgroup, expected):
    assert procfs.containers(cgroup) == expected


def test_facts_of_a_process_that_is_gone_are_empty(tmp_path):
    assert procfs.facts(1, proc=tmp_path) == procfs.Facts()


def test_the_uid_of_an_account_without_a_name_is_shown_as_a_number(tmp_path):
    process = tmp_path / "9"
    process.mkdir()
    (process / "status").write_text("Name:\tx\nUid:\t3999999\t0\t0\t0\n")
    (process / "comm").write_text("x\n")

    assert procfs.facts(9, proc=tmp_path) == procfs.Facts("x", 3999999, "3999999", ())
