"""The NVML stand-in, asked by the real pynvml in a process of its own."""

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.lab import nvml
from tests.lab.nvml import GIB, MIB, Link, Machine, Process, Sample

ROOT = Path(__file__).resolve().parents[2]

# What every script begins with.  `code` gives the number of the error that a call raises, 0 for none.
PRELUDE = """
import ctypes, json, os, threading, time
from pathlib import Path
import pynvml as p
from tests.lab.nvml import *
from tests.lab import nvml as lab
state = Path(os.environ["LAB_NVML_STATE"])

def code(call, *arguments):
    try:
        call(*arguments)
    except p.NVMLError as error:
        return error.value
    return 0

def answer(value):
    print(json.dumps(value))

gpu = p.nvmlDeviceGetHandleByIndex
"""

Ask = Callable[..., Any]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def ask(library: Path, tmp_path: Path) -> Ask:
    """Runs a script against a machine and gives what it passed to `answer`."""

    def run(script: str, machine: Machine | None, *, init: bool = True, with_library: Path = library) -> Any:
        state = tmp_path / "state"
        if machine is not None:
            machine.write(state)
        text = PRELUDE + ("p.nvmlInit()\n" if init else "") + textwrap.dedent(script)
        done = subprocess.run(
            [sys.executable, "-c", text],
            env=nvml.environment(with_library, state),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


# ---------------------------------------------------------------- the library itself


def test_a_second_build_leaves_the_library_as_it_is(tmp_path: Path) -> None:
    library = nvml.build(tmp_path) / nvml.SONAME
    before = library.stat()
    nvml.build(tmp_path)
    assert (library.stat().st_ino, library.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_changed_source_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "standin.c"
    source.write_text(nvml.SOURCE.read_text())
    monkeypatch.setattr(nvml, "SOURCE", source)
    library = nvml.build(tmp_path / "out") / nvml.SONAME
    before = library.stat().st_ino
    source.write_text(source.read_text() + "/* changed */\n")
    nvml.build(tmp_path / "out")
    assert library.stat().st_ino != before


def test_two_processes_that_build_at_once_both_get_a_whole_library(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.lab.nvml", "build", str(tmp_path)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert outputs == [str(tmp_path)] * 3
    assert (tmp_path / nvml.SONAME).read_bytes()[:4] == b"\x7fELF"


def test_a_source_that_gcc_refuses_is_told_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "standin.c"
    source.write_text("int f(void) { return missing; }\n")
    monkeypatch.setattr(nvml, "SOURCE", source)
    with pytest.raises(RuntimeError, match="missing"):
        nvml.build(tmp_path / "out")


def test_the_library_has_the_soname_by_which_pynvml_finds_it(library: Path) -> None:
    told = subprocess.run(
        ["readelf", "-d", str(library / nvml.SONAME)], capture_output=True, text=True, check=True
    ).stdout
    assert "Library soname: [libnvidia-ml.so.1]" in told


def test_pynvml_loads_the_library_of_ld_library_path(ask: Ask, library: Path) -> None:
    loaded = ask(
        """
        answer(sorted({line.split()[-1] for line in open("/proc/self/maps") if "libnvidia-ml" in line}))
        """,
        nvml.one_t4(),
    )
    assert loaded == [str(library / nvml.SONAME)]


def test_a_symbol_left_out_is_function_not_found_for_that_call_only(ask: Ask, tmp_path: Path) -> None:
    older = nvml.build(tmp_path / "older", without=["nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetNumaNodeId"])
    told = ask(
        """
        answer([code(p.nvmlDeviceGetMemoryInfo, gpu(0), p.nvmlMemory_v2), code(p.nvmlDeviceGetNumaNodeId,
            gpu(0)),
                code(p.nvmlDeviceGetMemoryInfo, gpu(0))])
        """,
        nvml.one_t4(),
        with_library=older,
    )
    assert told == [13, 13, 0]


def test_a_function_that_the_stand_in_does_not_have_is_function_not_found(ask: Ask) -> None:
    assert ask("answer(code(p.nvmlDeviceGetFanSpeed, gpu(0)))", nvml.one_t4()) == 13


# ---------------------------------------------------------------- initialisation and the driver


def test_versions_are_those_of_the_machine(ask: Ask) -> None:
    machine = nvml.one_t4()
    machine.driver_version, machine.cuda_version = "550.54.15", 12040
    told = ask(
        """
        answer([p.nvmlSystemGetDriverVersion(), p.nvmlSystemGetNVMLVersion(),
            p.nvmlSystemGetCudaDriverVersion_v2(),
                p.nvmlSystemGetCudaDriverVersion()])
        """,
        machine,
    )
    assert told == ["550.54.15", "12.550.54.15", 12040, 12040]


def test_queries_before_init_and_after_shutdown_are_uninitialized(ask: Ask) -> None:
    told = ask(
        """
        p._LoadNvmlLibrary()
        before = [code(p.nvmlDeviceGetCount), code(p.nvmlShutdown)]
        p.nvmlInit(); p.nvmlInit(); handle = gpu(0)
        p.nvmlShutdown(); counted = code(p.nvmlDeviceGetUUID, handle)
        p.nvmlShutdown()
        answer([before, counted, code(p.nvmlDeviceGetUUID, handle), code(p.nvmlDeviceGetCount)])
        """,
        nvml.one_t4(),
        init=False,
    )
    assert told == [[1, 1], 0, 1, 1]


def test_init_without_a_state_file_says_that_no_driver_is_loaded(ask: Ask) -> None:
    assert ask("answer(code(p.nvmlInit))", None, init=False) == 9


def test_init_says_that_the_driver_is_absent_or_another_version(ask: Ask) -> None:
    told = ask(
        """
        machine, told = one_t4(), []
        for machine.driver in ("absent", "mismatch", "loaded"):
            machine.write(state)
            told.append(code(p.nvmlInit))
        answer(told)
        """,
        nvml.one_t4(),
        init=False,
    )
    assert told == [9, 18, 0]


def test_a_machine_without_gpus_initialises_and_counts_none(ask: Ask) -> None:
    assert ask("answer([p.nvmlDeviceGetCount(), code(gpu, 0)])", Machine()) == [0, 2]


def test_a_driver_that_goes_and_comes_back_needs_shutdown_and_init(ask: Ask) -> None:
    told = ask(
        """
        machine = dgx_a100()
        old = gpu(0)
        machine.unload_driver(); machine.write(state)
        away = [code(p.nvmlDeviceGetCount), code(p.nvmlDeviceGetUUID, old)]
        machine.load_driver(); machine.write(state)
        back = [code(p.nvmlDeviceGetCount), code(p.nvmlDeviceGetUUID, old), code(gpu, 0), code(p.nvmlInit)]
        still = code(p.nvmlDeviceGetCount)
        p.nvmlShutdown(); p.nvmlShutdown(); p.nvmlInit()
        fresh = [p.nvmlDeviceGetCount(), code(p.nvmlDeviceGetUUID, gpu(0)), code(p.nvmlDeviceGetUUID, old)]
        answer([away, back, still, fresh])
        """,
        nvml.dgx_a100(),
    )
    assert told == [[9, 9], [1, 1, 1, 0], 1, [8, 0, 2]]


def test_a_reload_that_no_query_saw_kills_the_handles_too(ask: Ask) -> None:
    told = ask(
        """
        machine = one_t4()
        old = gpu(0)
        machine.load_driver(); machine.write(state)
        answer(code(p.nvmlDeviceGetName, old))
        """,
        nvml.one_t4(),
    )
    assert told == 1


def test_a_file_that_is_not_understood_is_an_unknown_error_and_said_on_stderr(
    library: Path, tmp_path: Path
) -> None:
    state = nvml.one_t4().write(tmp_path / "state")
    good = state.read_text()
    for broken in (
        good.replace("minor 0", "minor x"),
        good.replace("\nend\n", "\n"),
        "",
        good + "\n",
        "wrong\n",
    ):
        state.write_text(broken)
        script = PRELUDE + "answer(code(p.nvmlInit))"
        done = subprocess.run(
            [sys.executable, "-c", script], env=nvml.environment(library, state), cwd=ROOT,
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        whole = broken == good + "\n"  # what follows the end is not read
        assert json.loads(done.stdout) == (0 if whole else 999)
        assert ("NVML stand-in" in done.stderr) is not whole


def test_error_strings_are_nvmls(ask: Ask) -> None:
    told = ask("answer([p.nvmlErrorString(n) for n in (0, 3, 9, 15, 18, 12345)])", nvml.one_t4())
    assert told == [
        "Success", "Not Supported", "Driver Not Loaded", "GPU is lost", "Driver/library version mismatch",
        "Unknown Error",
    ]  # fmt: skip


# ---------------------------------------------------------------- identity


def test_each_gpu_says_who_it_is(ask: Ask) -> None:
    machine = nvml.mixed()
    told = ask(
        """
        rows = []
        for i in range(p.nvmlDeviceGetCount()):
            h = gpu(i); pci = p.nvmlDeviceGetPciInfo(h)
            rows.append([p.nvmlDeviceGetUUID(h), p.nvmlDeviceGetName(h), p.nvmlDeviceGetIndex(h),
                         p.nvmlDeviceGetMinorNumber(h), list(p.nvmlDeviceGetCudaComputeCapability(h)),
                         pci.busId, pci.busIdLegacy, pci.domain, pci.bus, pci.device, pci.pciDeviceId])
        answer(rows)
        """,
        machine,
    )
    assert told == [
        [
            g.uuid,
            g.name,
            index,
            g.minor,
            list(g.capability),
            g.pci,
            g.pci[4:],
            0,
            7 + 8 * index,
            0,
            g.pci_device,
        ]
        for index, g in enumerate(machine.gpus)
    ]
    assert [row[3] for row in told] == [2, 3, 0, 1]


def test_handles_are_found_by_uuid_and_by_pci_bus_id(ask: Ask) -> None:
    machine = nvml.dgx_a100()
    told = ask(
        """
        m = dgx_a100(); third = m.gpus[3]
        by_uuid = p.nvmlDeviceGetHandleByUUID(third.uuid)
        by_pci = [p.nvmlDeviceGetHandleByPciBusId(b) for b in (third.pci, third.pci[4:], third.pci[9:],
            third.pci.lower())]
        answer([p.nvmlDeviceGetIndex(by_uuid), [p.nvmlDeviceGetIndex(h) for h in by_pci],
                code(p.nvmlDeviceGetHandleByUUID, third.uuid.upper()), code(p.nvmlDeviceGetHandleByUUID,
                    "GPU-0"),
                code(p.nvmlDeviceGetHandleByPciBusId, "00000000:FE:00.0"),
                    code(p.nvmlDeviceGetHandleByPciBusId, "x"),
                code(gpu, 8)])
        """,
        machine,
    )
    assert told == [3, [3, 3, 3, 3], 6, 6, 6, 2, 2]


def test_a_made_up_handle_is_an_invalid_argument(ask: Ask) -> None:
    told = ask("answer(code(p.nvmlDeviceGetUUID, ctypes.cast(0x1234, p.c_nvmlDevice_t)))", nvml.one_t4())
    assert told == 2


def test_a_serial_number_is_given_where_the_product_has_one(ask: Ask) -> None:
    told = ask(
        "answer([p.nvmlDeviceGetSerial(gpu(0)), code(p.nvmlDeviceGetSerial, gpu(2))])",
        machine := nvml.mixed(),
    )
    assert told == [machine.gpus[0].serial, 3]
    assert machine.gpus[0].serial.isdigit()
    assert len(machine.gpus[0].serial) == 13


def test_handles_follow_their_gpu_when_indexes_move(ask: Ask) -> None:
    told = ask(
        """
        machine = dgx_a100(); last = gpu(7)
        del machine.gpus[2]; machine.levels.clear()
        machine.write(state)
        answer([p.nvmlDeviceGetCount(), p.nvmlDeviceGetIndex(last), p.nvmlDeviceGetMinorNumber(last)])
        """,
        nvml.dgx_a100(),
    )
    assert told == [7, 6, 7]


# ---------------------------------------------------------------- metrics


def test_memory_of_version_2_tells_the_reserved_part_apart(ask: Ask) -> None:
    machine = Machine.uniform(1, memory=40 * GIB)
    machine.gpus[0].memory_reserved, machine.gpus[0].memory_used = 600 * MIB, 5 * GIB
    told = ask(
        """
        h = gpu(0); one = p.nvmlDeviceGetMemoryInfo(h); two = p.nvmlDeviceGetMemoryInfo(h, p.nvmlMemory_v2)
        answer([[one.total, one.free, one.used], [two.total, two.reserved, two.free, two.used],
                code(p.nvmlDeviceGetMemoryInfo, h, 0x01000028)])
        """,
        machine,
    )
    free = 40 * GIB - 600 * MIB - 5 * GIB
    assert told == [[40 * GIB, free, 40 * GIB - free], [40 * GIB, 600 * MIB, free, 5 * GIB], 25]


def test_memory_used_is_the_sum_over_processes_unless_told(ask: Ask) -> None:
    machine = Machine.uniform(1)
    machine.gpus[0].processes = [Process(11, 3 * GIB), Process(12, None), Process(13, GIB, "graphics")]
    assert ask("answer(p.nvmlDeviceGetMemoryInfo(gpu(0), p.nvmlMemory_v2).used)", machine) == 4 * GIB


def test_every_metric_is_what_the_machine_says(ask: Ask) -> None:
    machine = Machine.uniform(1)
    g = machine.gpus[0]
    g.utilization, g.memory_utilization, g.temperature = 87, 41, 71
    g.power, g.power_limit, g.energy = 312_500, 400_000, 2**40 + 7
    g.compute_mode, g.persistence = 3, False
    g.ecc_corrected, g.ecc_uncorrected = (5, 50), (1, 2**33)
    told = ask(
        """
        h = gpu(0); u = p.nvmlDeviceGetUtilizationRates(h)
        energy, links = p.nvmlDeviceGetFieldValues(h, [p.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION,
            p.NVML_FI_DEV_MEMORY_TEMP])
        answer([u.gpu, u.memory, p.nvmlDeviceGetTemperature(h, p.NVML_TEMPERATURE_GPU),
                p.nvmlDeviceGetTemperatureV(h, p.NVML_TEMPERATURE_GPU), p.nvmlDeviceGetPowerUsage(h),
                p.nvmlDeviceGetEnforcedPowerLimit(h), p.nvmlDeviceGetPowerManagementLimit(h),
                p.nvmlDeviceGetTotalEnergyConsumption(h), p.nvmlDeviceGetComputeMode(h),
                    p.nvmlDeviceGetPersistenceMode(h),
                p.nvmlDeviceGetEccMode(h), [[p.nvmlDeviceGetTotalEccErrors(h, e, c) for c in (0,
                    1)] for e in (0, 1)],
                energy.value.ullVal, energy.nvmlReturn, links.nvmlReturn])
        """,
        machine,
    )
    assert told == [
        87, 41, 71, 71, 312_500, 400_000, 400_000, 2**40 + 7, 3, 0, [1, 1], [[5, 50], [1, 2**33]],
        2**40 + 7, 0, 3,
    ]  # fmt: skip


def test_a_product_without_ecc_does_not_support_the_questions(ask: Ask) -> None:
    told = ask(
        "answer([code(p.nvmlDeviceGetEccMode, gpu(0)), code(p.nvmlDeviceGetTotalEccErrors, gpu(0), 1, 0)])",
        nvml.two_rtx4090(),
    )
    assert told == [3, 3]


def test_any_single_metric_can_be_not_supported_and_the_rest_stands(ask: Ask) -> None:
    machine = nvml.one_t4()
    machine.gpus[0].unsupported(
        "MemoryInfo_v2", "UtilizationRates", "Temperature", "PowerUsage", "EnforcedPowerLimit",
        "TotalEnergyConsumption", "ComputeMode", "PersistenceMode", "TotalEccErrors",
            "ComputeRunningProcesses",
        "GraphicsRunningProcesses", "MPSComputeRunningProcesses", "ProcessUtilization",
            "TopologyCommonAncestor",
        "CpuAffinity", "MemoryAffinity", "RegisterEvents", "MinorNumber", "CudaComputeCapability",
    )  # fmt: skip
    told = ask(
        """
        h = gpu(0); s = p.nvmlEventSetCreate()
        answer([code(p.nvmlDeviceGetMemoryInfo, h, p.nvmlMemory_v2), code(p.nvmlDeviceGetUtilizationRates, h),
                code(p.nvmlDeviceGetTemperature, h, 0), code(p.nvmlDeviceGetPowerUsage, h),
                code(p.nvmlDeviceGetEnforcedPowerLimit, h), code(p.nvmlDeviceGetTotalEnergyConsumption, h),
                code(p.nvmlDeviceGetComputeMode, h), code(p.nvmlDeviceGetPersistenceMode, h),
                code(p.nvmlDeviceGetTotalEccErrors, h, 0, 0), code(p.nvmlDeviceGetComputeRunningProcesses, h),
                code(p.nvmlDeviceGetGraphicsRunningProcesses, h),
                    code(p.nvmlDeviceGetMPSComputeRunningProcesses, h),
                code(p.nvmlDeviceGetProcessUtilization, h, 0), code(p.nvmlDeviceGetTopologyCommonAncestor,
                    h, h),
                code(p.nvmlDeviceGetCpuAffinity, h, 2), code(p.nvmlDeviceGetMemoryAffinity, h, 2, 0),
                code(p.nvmlDeviceRegisterEvents, h, 8, s), code(p.nvmlDeviceGetMinorNumber, h),
                code(p.nvmlDeviceGetCudaComputeCapability, h)])
        """,
        machine,
    )
    assert told == [3] * 19
    assert ask("answer([p.nvmlDeviceGetName(gpu(0)), code(p.nvmlDeviceGetMemoryInfo, gpu(0))])", machine) == [
        "Tesla T4",
        0,
    ]


def test_any_other_code_can_be_prescribed(ask: Ask) -> None:
    machine = nvml.one_t4()
    machine.gpus[0].answers = {"UUID": nvml.UNKNOWN, "PowerUsage": nvml.NO_PERMISSION, "HandleByIndex": 17}
    told = ask(
        f"""
        h = p.nvmlDeviceGetHandleByUUID("{machine.gpus[0].uuid}")
        answer([code(p.nvmlDeviceGetUUID, h), code(p.nvmlDeviceGetPowerUsage, h), code(gpu, 0)])
        """,
        machine,
    )
    assert told == [999, 4, 17]


# ---------------------------------------------------------------- processes


def test_the_process_probe_answers_insufficient_size_and_the_number(ask: Ask) -> None:
    machine = Machine.uniform(2)
    machine.gpus[0].processes = [Process(100 + n, n * MIB) for n in range(3)]
    told = ask(
        """
        lib = p.nvmlLib; out = []
        for index in (0, 1):
            count = ctypes.c_uint(0)
            out.append([lib.nvmlDeviceGetComputeRunningProcesses_v3(gpu(index), ctypes.byref(count), None),
                count.value])
        count = ctypes.c_uint(2)
        array = (p.c_nvmlProcessInfo_v3_t * 2)()
        out.append([lib.nvmlDeviceGetComputeRunningProcesses_v3(gpu(0), ctypes.byref(count), array),
            count.value])
        answer(out)
        """,
        machine,
    )
    assert told == [[7, 3], [0, 0], [7, 3]]


def test_processes_are_told_by_kind_with_their_memory(ask: Ask) -> None:
    machine = Machine.uniform(1)
    machine.gpus[0].processes = [
        Process(11, 3 * GIB, name="python train.py"),
        Process(12, None),
        Process(13, 300 * MIB, "graphics", name="/usr/lib/xorg/Xorg"),
        Process(14, GIB, "mps"),
    ]
    told = ask(
        """
        def rows(call):
            return [[r.pid, r.usedGpuMemory, r.gpuInstanceId, r.computeInstanceId] for r in call(gpu(0))]
        answer([rows(p.nvmlDeviceGetComputeRunningProcesses), rows(p.nvmlDeviceGetComputeRunningProcesses_v2),
                rows(p.nvmlDeviceGetGraphicsRunningProcesses),
                    rows(p.nvmlDeviceGetMPSComputeRunningProcesses),
                p.nvmlSystemGetProcessName(11), p.nvmlSystemGetProcessName(13)])
        """,
        machine,
    )
    none = 0xFFFFFFFF
    compute = [[11, 3 * GIB, none, none], [12, None, none, none]]
    assert told == [
        compute, compute, [[13, 300 * MIB, none, none]], [[14, GIB, none, none]], "python train.py",
        "/usr/lib/xorg/Xorg",
    ]  # fmt: skip


def test_a_process_that_the_file_does_not_name_is_named_from_proc(ask: Ask) -> None:
    told = ask(
        "answer([p.nvmlSystemGetProcessName(os.getpid()), code(p.nvmlSystemGetProcessName, 2**22 + 1)])",
        nvml.one_t4(),
    )
    assert told == [sys.executable, 6]


def test_with_reap_a_process_leaves_its_gpu_when_it_ends(ask: Ask) -> None:
    told = ask(
        """
        import subprocess
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        machine = one_t4(); machine.reap = True
        machine.gpus[0].processes = [Process(child.pid, 7 * MIB), Process(os.getpid(), MIB)]
        machine.gpus[0].samples = [Sample(child.pid, 50)]
        machine.write(state)
        def seen():
            return [[r.pid == child.pid for r in p.nvmlDeviceGetComputeRunningProcesses(gpu(0))],
                    p.nvmlDeviceGetMemoryInfo(gpu(0), p.nvmlMemory_v2).used // MIB,
                    code(p.nvmlDeviceGetProcessUtilization, gpu(0), 0)]
        before = seen()
        child.communicate()
        answer([before, seen()])
        """,
        nvml.one_t4(),
    )
    assert told == [[[True, False], 8, 0], [[False], 1, 6]]


def test_utilisation_samples_newer_than_asked_are_given_and_none_is_not_found(ask: Ask) -> None:
    machine = Machine.uniform(2)
    machine.gpus[0].samples = [Sample(11, 90, 40, 3, 4, timestamp=1000), Sample(12, 10, timestamp=2000)]
    machine.gpus[1].samples = [Sample(13, 55)]
    told = ask(
        """
        def rows(index, since):
            return [[s.pid, s.smUtil, s.memUtil, s.encUtil,
                s.decUtil] for s in p.nvmlDeviceGetProcessUtilization(gpu(index), since)]
        now = time.time_ns() // 1000
        answer([rows(0, 0), rows(0, 1000), code(p.nvmlDeviceGetProcessUtilization, gpu(0), 2000), rows(1,
            now - 1)])
        """,
        machine,
    )
    assert told == [[[11, 90, 40, 3, 4], [12, 10, 0, 0, 0]], [[12, 10, 0, 0, 0]], 6, [[13, 55, 0, 0, 0]]]


# ---------------------------------------------------------------- MIG


def test_mig_devices_are_listed_by_slot_and_empty_slots_are_not_found(ask: Ask) -> None:
    machine = nvml.mig_a100()
    told = ask(
        """
        parent = gpu(0); rows = []
        for slot in range(p.nvmlDeviceGetMaxMigDeviceCount(parent)):
            try:
                h = p.nvmlDeviceGetMigDeviceHandleByIndex(parent, slot)
            except p.NVMLError as error:
                rows.append(error.value)
                continue
            a = p.nvmlDeviceGetAttributes(h); m = p.nvmlDeviceGetMemoryInfo(h, p.nvmlMemory_v2)
            rows.append([p.nvmlDeviceGetUUID(h), p.nvmlDeviceGetName(h), p.nvmlDeviceGetIndex(h),
                         p.nvmlDeviceGetGpuInstanceId(h), p.nvmlDeviceGetComputeInstanceId(h), m.total,
                             m.reserved,
                         a.multiprocessorCount, a.gpuInstanceSliceCount, a.computeInstanceSliceCount,
                             a.memorySizeMB,
                         p.nvmlDeviceIsMigDeviceHandle(h).value,
                         p.nvmlDeviceGetIndex(p.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(h)),
                         list(p.nvmlDeviceGetCudaComputeCapability(h))])
        answer([rows, p.nvmlDeviceGetMigMode(parent), code(p.nvmlDeviceGetMigDeviceHandleByIndex, parent, 7)])
        """,
        machine,
    )
    rows, mode, beyond = told
    devices = {device.slot: device for device in machine.gpus[0].mig_devices}
    assert [row if isinstance(row, int) else row[2] for row in rows] == [0, 1, 6, 3, 6, 6, 6]
    for row in (row for row in rows if isinstance(row, list)):
        d = devices[row[2]]
        assert row == [
            d.uuid, f"NVIDIA A100-SXM4-40GB MIG {d.profile}", d.slot, d.gpu_instance, 0, d.memory, 0,
            d.multiprocessors, d.slices, d.slices, d.memory // MIB, 1, 0, [8, 0],
        ]  # fmt: skip
    assert (mode, beyond) == ([1, 1], 2)


def test_a_gpu_with_mig_off_has_no_mig_devices_and_another_product_no_mig(ask: Ask) -> None:
    machine = nvml.mixed()
    machine.gpus[0].mig_pending = True
    told = ask(
        """
        a100, t4 = gpu(0), gpu(3)
        answer([p.nvmlDeviceGetMigMode(a100), p.nvmlDeviceGetMaxMigDeviceCount(a100),
            p.nvmlDeviceGetMaxMigDeviceCount(t4),
                code(p.nvmlDeviceGetMigDeviceHandleByIndex, a100, 0), code(p.nvmlDeviceGetMigMode, t4),
                p.nvmlDeviceIsMigDeviceHandle(a100).value, code(p.nvmlDeviceGetGpuInstanceId, a100),
                code(p.nvmlDeviceGetAttributes, a100), code(p.nvmlDeviceGetDeviceHandleFromMigDeviceHandle,
                    a100)])
        """,
        machine,
    )
    assert told == [[0, 1], 0, 0, 3, 3, 0, 3, 2, 2]


def test_utilisation_is_not_supported_in_mig_mode(ask: Ask) -> None:
    machine = nvml.mig_a100()
    machine.gpus[0].samples = [Sample(1, 99)]
    told = ask(
        """
        mig = p.nvmlDeviceGetMigDeviceHandleByIndex(gpu(0), 0)
        answer([code(p.nvmlDeviceGetUtilizationRates, gpu(0)), code(p.nvmlDeviceGetUtilizationRates, mig),
                code(p.nvmlDeviceGetProcessUtilization, gpu(0), 0), code(p.nvmlDeviceGetPowerUsage, gpu(0)),
                code(p.nvmlDeviceGetPowerUsage, mig), code(p.nvmlDeviceGetMinorNumber, mig)])
        """,
        machine,
    )
    assert told == [3, 3, 3, 0, 3, 3]


def test_processes_on_mig_devices_carry_their_instances(ask: Ask) -> None:
    machine = nvml.mig_a100()
    one, two, _ = machine.gpus[0].mig_devices
    machine.gpus[0].processes = [
        Process(21, 5 * GIB, gpu_instance=one.gpu_instance, compute_instance=0),
        Process(22, GIB, gpu_instance=two.gpu_instance, compute_instance=0),
    ]
    told = ask(
        """
        def rows(h):
            return [[r.pid, r.gpuInstanceId,
                r.computeInstanceId] for r in p.nvmlDeviceGetComputeRunningProcesses(h)]
        migs = [p.nvmlDeviceGetMigDeviceHandleByIndex(gpu(0), s) for s in (0, 1, 3)]
        answer([rows(gpu(0)), [rows(m) for m in migs], [p.nvmlDeviceGetMemoryInfo(m).used for m in migs],
                p.nvmlDeviceGetMemoryInfo(gpu(0), p.nvmlMemory_v2).used])
        """,
        machine,
    )
    first, second = [21, one.gpu_instance, 0], [22, two.gpu_instance, 0]
    assert told == [[first, second], [[first], [second], []], [5 * GIB, GIB, 0], 6 * GIB]


def test_a_mig_device_is_found_by_uuid_until_it_is_destroyed(ask: Ask) -> None:
    machine = nvml.mig_a100()
    told = ask(
        """
        machine = mig_a100(); device = machine.gpus[0].mig_devices[1]
        h = p.nvmlDeviceGetHandleByUUID(device.uuid)
        before = p.nvmlDeviceGetIndex(h)
        machine.gpus[0].mig_devices.remove(device); machine.write(state)
        answer([before, code(p.nvmlDeviceGetUUID, h), code(p.nvmlDeviceGetHandleByUUID, device.uuid),
                code(p.nvmlDeviceGetMigDeviceHandleByIndex, gpu(0), 1)])
        """,
        machine,
    )
    assert told == [1, 2, 6, 6]


def test_a_mig_profile_that_is_not_known_must_be_described() -> None:
    with pytest.raises(ValueError, match=r"5g\.1gb"):
        nvml.MigDevice("5g.1gb", "MIG-0", 1)
    assert (
        nvml.MigDevice("1g.6gb", "MIG-0", 1, memory=6 * GIB, slices=1, multiprocessors=14).memory == 6 * GIB
    )


# ---------------------------------------------------------------- a lost GPU

EVERY_QUERY = """
def every(h, other):
    s = p.nvmlEventSetCreate()
    return {name: code(getattr(p, "nvmlDevice" + name), h, *more) for name, *more in [
        ("GetUUID",), ("GetName",), ("GetIndex",), ("GetMinorNumber",), ("GetSerial",), ("GetPciInfo",),
        ("GetCudaComputeCapability",), ("GetMemoryInfo",), ("GetMemoryInfo", p.nvmlMemory_v2),
            ("GetUtilizationRates",),
        ("GetTemperature", 0), ("GetPowerUsage",), ("GetEnforcedPowerLimit",), ("GetTotalEnergyConsumption",),
        ("GetComputeMode",), ("GetPersistenceMode",), ("GetTotalEccErrors", 0, 0),
            ("GetComputeRunningProcesses",),
        ("GetGraphicsRunningProcesses",), ("GetMPSComputeRunningProcesses",), ("GetProcessUtilization", 0),
        ("GetMigMode",), ("GetMaxMigDeviceCount",), ("GetMigDeviceHandleByIndex", 0),
        ("GetDeviceHandleFromMigDeviceHandle",), ("GetGpuInstanceId",), ("GetComputeInstanceId",),
            ("GetAttributes",),
        ("IsMigDeviceHandle",), ("GetTopologyCommonAncestor", other), ("GetTopologyNearestGpus", 50),
        ("GetP2PStatus", other, 2), ("GetNvLinkState", 0), ("GetNvLinkRemotePciInfo", 0),
            ("GetCpuAffinity", 2),
        ("GetMemoryAffinity", 2, 0), ("GetNumaNodeId",), ("RegisterEvents", 8, s)]}
"""


def test_a_lost_gpu_answers_lost_to_everything_and_the_others_stand(ask: Ask) -> None:
    machine = nvml.dgx_a100()
    machine.gpus[3].lost = True
    told = ask(
        EVERY_QUERY
        + """
lost = every(gpu(3), gpu(0))
m = dgx_a100()
answer([p.nvmlDeviceGetCount(), sorted(set(lost.values())), len(lost),
        code(p.nvmlDeviceGetHandleByUUID, m.gpus[3].uuid), code(p.nvmlDeviceGetHandleByPciBusId,
            m.gpus[3].pci),
        code(p.nvmlDeviceGetTopologyCommonAncestor, gpu(0), gpu(3)),
            [p.nvmlDeviceGetIndex(gpu(i)) for i in (2, 4)]])
""",
        machine,
    )
    assert told == [8, [15], 37, 15, 15, 15, [2, 4]]


def test_a_gpu_is_lost_under_a_handle_that_was_given_before(ask: Ask) -> None:
    told = ask(
        """
        machine = mig_a100(); h = gpu(0); mig = p.nvmlDeviceGetMigDeviceHandleByIndex(h, 0)
        before = [code(p.nvmlDeviceGetUUID, h), code(p.nvmlDeviceGetUUID, mig)]
        machine.gpus[0].lost = True; machine.write(state)
        answer([before, code(p.nvmlDeviceGetUUID, h), code(p.nvmlDeviceGetUUID, mig)])
        """,
        nvml.mig_a100(),
    )
    assert told == [[0, 0], 15, 15]


def test_a_lost_gpu_can_refuse_already_its_handle(ask: Ask) -> None:
    machine = nvml.dgx_a100()
    machine.gpus[3].lost = machine.lost_handle_fails = True
    assert ask("answer([p.nvmlDeviceGetCount(), code(gpu, 3), code(gpu, 4)])", machine) == [8, 15, 0]


def test_nvlinks_to_a_lost_gpu_are_down(ask: Ask) -> None:
    machine = nvml.two_socket_rtx()
    machine.gpus[3].lost = True
    told = ask(
        """
        h = gpu(0)
        answer([p.nvmlDeviceGetNvLinkState(h, 0), code(p.nvmlDeviceGetNvLinkRemotePciInfo, h, 0)])
        """,
        machine,
    )
    assert told == [0, 3]


# ---------------------------------------------------------------- topology

TOPOLOGY = """
def table(call):
    n = p.nvmlDeviceGetCount()
    return [[None if a == b else call(gpu(a), gpu(b)) for b in range(n)] for a in range(n)]

def direct(a, b):
    there = p.nvmlDeviceGetPciInfo(b).busId
    found = 0
    for link in range(p.NVML_NVLINK_MAX_LINKS):
        try:
            if p.nvmlDeviceGetNvLinkState(a, link) and p.nvmlDeviceGetNvLinkRemotePciInfo(a,
                link).busId == there:
                found += 1
        except (p.NVMLError_NotSupported, p.NVMLError_InvalidArgument):
            pass
    return found
"""


def test_direct_links_are_counted_by_the_other_gpus_pci_id(ask: Ask) -> None:
    told = ask(TOPOLOGY + "answer(table(direct))", nvml.dgx1_volta())
    assert told == [
        [None, 1, 1, 2, 2, 0, 0, 0],
        [1, None, 2, 1, 0, 2, 0, 0],
        [1, 2, None, 2, 0, 0, 1, 0],
        [2, 1, 2, None, 0, 0, 0, 1],
        [2, 0, 0, 0, None, 1, 1, 2],
        [0, 2, 0, 0, 1, None, 2, 1],
        [0, 0, 1, 0, 1, 2, None, 2],
        [0, 0, 0, 1, 2, 1, 2, None],
    ]


def test_the_cards_of_two_sockets_are_bridged_across(ask: Ask) -> None:
    told = ask(
        TOPOLOGY + "answer([table(direct), table(p.nvmlDeviceGetTopologyCommonAncestor)])",
        nvml.two_socket_rtx(),
    )
    x, n, s = None, nvml.SAME_NODE, nvml.ACROSS_SOCKETS
    assert told == [
        [[x, 0, 0, 2], [0, x, 2, 0], [0, 2, x, 0], [2, 0, 0, x]],
        [[x, n, s, s], [n, x, s, s], [s, s, x, n], [s, s, n, x]],
    ]


def test_links_through_switches_name_the_switch_and_peer_access_tells_the_pair(ask: Ask) -> None:
    told = ask(
        TOPOLOGY
        + """
h = gpu(0)
answer([table(direct), table(lambda a, b: p.nvmlDeviceGetP2PStatus(a, b, p.NVML_P2P_CAPS_INDEX_NVLINK)),
        [p.nvmlDeviceGetNvLinkState(h, n) for n in range(12)],
        {p.nvmlDeviceGetNvLinkRemoteDeviceType(h,
            n) for n in range(12)} == {p.NVML_NVLINK_DEVICE_TYPE_SWITCH},
        len({p.nvmlDeviceGetNvLinkRemotePciInfo(h, n).busId for n in range(12)}),
        code(p.nvmlDeviceGetNvLinkState, h, 12), code(p.nvmlDeviceGetNvLinkState, h, 99),
        p.nvmlDeviceGetFieldValues(h, [p.NVML_FI_DEV_NVLINK_LINK_COUNT])[0].value.uiVal])
""",
        nvml.dgx_a100(),
    )
    zeros = [[None if a == b else 0 for b in range(8)] for a in range(8)]
    assert told == [zeros, zeros, [1] * 12, True, 6, 2, 2, 12]


def test_a_link_that_is_down_does_not_join(ask: Ask) -> None:
    machine = Machine.uniform(2)
    machine.gpus[0].links = [Link(0, peer=1, active=False), Link(1, peer=1)]
    machine.gpus[1].links = [Link(0, peer=0, active=False), Link(1, peer=0)]
    told = ask(
        TOPOLOGY + "answer([table(direct), p.nvmlDeviceGetNvLinkRemoteDeviceType(gpu(0), 1)])", machine
    )
    assert told == [[[None, 1], [1, None]], 0]


def test_cards_without_nvlink_do_not_support_the_question_nor_peer_access(ask: Ask) -> None:
    told = ask(
        """
        a, b = gpu(0), gpu(1)
        answer([code(p.nvmlDeviceGetNvLinkState, a, 0), p.nvmlDeviceGetP2PStatus(a, b,
            p.NVML_P2P_CAPS_INDEX_NVLINK),
                p.nvmlDeviceGetP2PStatus(a, b, p.NVML_P2P_CAPS_INDEX_WRITE),
                p.nvmlDeviceGetTopologyCommonAncestor(a, b), p.nvmlDeviceGetTopologyCommonAncestor(a, a)])
        """,
        nvml.two_rtx4090(),
    )
    assert told == [3, 5, 2, nvml.HOST_BRIDGE, nvml.INTERNAL]


def test_peer_access_over_pcie_ends_at_the_host_bridge(ask: Ask) -> None:
    machine = Machine.uniform(3, sockets=1)
    machine.levels = {(0, 1): nvml.SINGLE_SWITCH, (0, 2): nvml.ACROSS_SOCKETS}
    told = ask(
        """
        answer([p.nvmlDeviceGetP2PStatus(gpu(0), gpu(n), p.NVML_P2P_CAPS_INDEX_WRITE) for n in (1, 2)]
               + [code(p.nvmlDeviceGetP2PStatus, gpu(0), gpu(0), 1)])
        """,
        machine,
    )
    assert told == [0, 3, 2]


def test_the_nearest_gpus_are_those_at_the_level(ask: Ask) -> None:
    told = ask(
        """
        answer([[p.nvmlDeviceGetIndex(h) for h in p.nvmlDeviceGetTopologyNearestGpus(gpu(0),
            level)] for level in (20, 40, 50, 10)])
        """,
        nvml.dgx_a100(),
    )
    assert told == [[1], [2, 3], [4, 5, 6, 7], []]


def test_affinities_tell_the_near_cpus_and_the_numa_node(ask: Ask) -> None:
    machine = nvml.dgx_a100()
    machine.gpus[1].cpus = "0-2,64,130-131"
    machine.gpus[2].cpus, machine.gpus[2].numa_node = "", None
    machine.gpus[3].own_numa_node = 9
    told = ask(
        """
        def bits(words):
            return [64 * i + b for i, w in enumerate(words) for b in range(64) if w >> b & 1]
        answer([bits(p.nvmlDeviceGetCpuAffinity(gpu(0), 4)) == list(range(128)),
                bits(p.nvmlDeviceGetCpuAffinity(gpu(7), 4)) == list(range(128, 256)),
                bits(p.nvmlDeviceGetCpuAffinity(gpu(1), 4)), bits(p.nvmlDeviceGetCpuAffinity(gpu(1), 1)),
                bits(p.nvmlDeviceGetCpuAffinityWithinScope(gpu(1), 4, 0)),
                [bits(p.nvmlDeviceGetMemoryAffinity(gpu(i), 1, 0)) for i in (0, 7)],
                code(p.nvmlDeviceGetCpuAffinity, gpu(2), 4), code(p.nvmlDeviceGetMemoryAffinity, gpu(2), 1,
                    0),
                code(p.nvmlDeviceGetNumaNodeId, gpu(0)), p.nvmlDeviceGetNumaNodeId(gpu(3))])
        """,
        machine,
    )
    some = [0, 1, 2, 64, 130, 131]
    assert told == [True, True, some, [0, 1, 2], some, [[0], [1]], 3, 3, 3, 9]


# ---------------------------------------------------------------- events


def test_each_event_after_the_registration_is_given_once_in_order(ask: Ask) -> None:
    machine = nvml.dgx_a100()
    machine.xid(0, 13)
    told = ask(
        """
        machine = dgx_a100(); machine.xid(0, 13)
        s = p.nvmlEventSetCreate()
        for i in range(8):
            p.nvmlDeviceRegisterEvents(gpu(i), p.nvmlEventTypeXidCriticalError, s)
        before = code(p.nvmlEventSetWait_v2, s, 0)
        machine.xid(2, 31); machine.xid(5, 79); machine.xid(2, 43); machine.write(state)
        def one():
            e = p.nvmlEventSetWait_v2(s, 1000)
            return [p.nvmlDeviceGetIndex(e.device), e.eventType, e.eventData, e.gpuInstanceId,
                e.computeInstanceId]
        got = [one() for _ in range(3)]
        answer([before, got, code(p.nvmlEventSetWait_v2, s, 0)])
        """,
        machine,
    )
    none = 0xFFFFFFFF
    assert told == [10, [[2, 8, 31, none, none], [5, 8, 79, none, none], [2, 8, 43, none, none]], 10]


def test_a_wait_sleeps_until_the_event_comes_or_the_time_is_up(ask: Ask) -> None:
    told = ask(
        """
        machine = one_t4(); s = p.nvmlEventSetCreate()
        p.nvmlDeviceRegisterEvents(gpu(0), 8, s)
        t, cpu = time.monotonic(), time.process_time()
        timed_out = code(p.nvmlEventSetWait_v2, s, 300)
        waited, spent = time.monotonic() - t, time.process_time() - cpu
        machine.xid(0, 48)
        later = threading.Timer(0.2, machine.write, [state]); later.start()
        event = p.nvmlEventSetWait_v2(s, 30000)
        later.join()
        answer([timed_out, waited, spent, event.eventData])
        """,
        nvml.one_t4(),
    )
    timed_out, waited, spent, number = told
    assert (timed_out, number) == (10, 48)
    assert 0.3 <= waited < 5
    assert spent < 0.15


def test_two_event_sets_both_get_an_event_and_other_gpus_events_are_not_given(ask: Ask) -> None:
    told = ask(
        """
        machine = dgx_a100(); sets = [p.nvmlEventSetCreate(), p.nvmlEventSetCreate()]
        for s in sets:
            p.nvmlDeviceRegisterEvents(gpu(1), 8, s)
        machine.xid(0, 31); machine.xid(1, 94); machine.write(state)
        got = [p.nvmlEventSetWait_v2(s, 100).eventData for s in sets]
        rest = [code(p.nvmlEventSetWait_v2, s, 0) for s in sets]
        p.nvmlEventSetFree(sets[0])
        answer([got, rest, code(p.nvmlEventSetWait_v2, sets[0], 0), code(p.nvmlEventSetFree, sets[0])])
        """,
        nvml.dgx_a100(),
    )
    assert told == [[94, 94], [10, 10], 2, 2]


def test_events_that_a_product_does_not_have_cannot_be_registered(ask: Ask) -> None:
    told = ask(
        """
        s = p.nvmlEventSetCreate(); a100, geforce = gpu(0), gpu(2)
        answer([p.nvmlDeviceGetSupportedEventTypes(a100), p.nvmlDeviceGetSupportedEventTypes(geforce),
                code(p.nvmlDeviceRegisterEvents, geforce, 0x2, s), code(p.nvmlDeviceRegisterEvents, a100,
                    0x8000, s),
                code(p.nvmlDeviceRegisterEvents, a100, 0x2 | 0x8, s)])
        """,
        nvml.mixed(),
    )
    assert told == [0x1F, 0x1C, 3, 3, 0]


def test_a_wait_ends_when_the_driver_goes(ask: Ask) -> None:
    told = ask(
        """
        machine = one_t4(); s = p.nvmlEventSetCreate()
        p.nvmlDeviceRegisterEvents(gpu(0), 8, s)
        machine.unload_driver()
        later = threading.Timer(0.1, machine.write, [state]); later.start()
        away = code(p.nvmlEventSetWait_v2, s, 30000)
        later.join()
        machine.load_driver(); machine.write(state)
        answer([away, code(p.nvmlEventSetWait_v2, s, 30000), code(p.nvmlEventSetFree, s)])
        """,
        nvml.one_t4(),
    )
    assert told == [9, 1, 0]


def test_a_wait_on_a_lost_gpu_gives_its_events_first_and_goes_on_or_fails(ask: Ask) -> None:
    told = ask(
        """
        machine = one_t4(); s = p.nvmlEventSetCreate()
        p.nvmlDeviceRegisterEvents(gpu(0), 8, s)
        machine.gpus[0].lost = True; machine.xid(0, 79); machine.write(state)
        got = [p.nvmlEventSetWait_v2(s, 1000).eventData, code(p.nvmlEventSetWait_v2, s, 50)]
        machine.lost_wait_fails = True; machine.write(state)
        answer([got, code(p.nvmlEventSetWait_v2, s, 30000)])
        """,
        nvml.one_t4(),
    )
    assert told == [[79, 10], 15]


# ---------------------------------------------------------------- the state file


def test_the_next_call_sees_every_change_however_quick(ask: Ask) -> None:
    told = ask(
        """
        machine = one_t4(); h = gpu(0); wrong = 0
        for n in range(300):
            machine.gpus[0].temperature = 30 + n % 10
            machine.write(state)
            wrong += p.nvmlDeviceGetTemperature(h, 0) != 30 + n % 10
        answer([wrong, sorted(f.name for f in state.parent.iterdir())])
        """,
        nvml.one_t4(),
    )
    assert told == [0, ["state"]]


def test_threads_may_ask_while_the_machine_changes(ask: Ask) -> None:
    told = ask(
        """
        machine = dgx_a100(); codes = set(); stop = threading.Event()
        s = p.nvmlEventSetCreate(); p.nvmlDeviceRegisterEvents(gpu(0), 8, s); got = []
        def query():
            while not stop.is_set():
                for i in range(8):
                    h = gpu(i)
                    codes.add(code(p.nvmlDeviceGetName, h))
                    codes.add(code(p.nvmlDeviceGetComputeRunningProcesses, h))
                    codes.add(code(p.nvmlDeviceGetNvLinkRemotePciInfo, h, 3))
        def wait():
            while len(got) < 40:
                try:
                    got.append(p.nvmlEventSetWait_v2(s, 5000).eventData)
                except p.NVMLError_Timeout:
                    return
        threads = [threading.Thread(target=query) for _ in range(3)] + [threading.Thread(target=wait)]
        for t in threads:
            t.start()
        for n in range(40):
            machine.gpus[n % 8].lost = n % 3 == 0
            machine.gpus[1].processes = [Process(1 + k) for k in range(n % 5)]
            machine.xid(0, n); machine.write(state)
        threads[-1].join(); stop.set()
        for t in threads:
            t.join()
        answer([sorted(codes), got == list(range(40))])
        """,
        nvml.dgx_a100(),
    )
    codes, in_order = told
    assert set(codes) <= {0, 15}
    assert 0 in codes
    assert in_order


def test_a_text_with_a_line_break_cannot_get_into_the_state_file() -> None:
    machine = nvml.one_t4()
    machine.gpus[0].name = "T4\nlost 1"
    with pytest.raises(ValueError, match="line break"):
        machine.render()


# ---------------------------------------------------------------- machines


@pytest.mark.parametrize("name", sorted(nvml.MACHINES))
def test_every_named_machine_is_understood_whole(ask: Ask, name: str) -> None:
    machine = nvml.MACHINES[name]()
    told = ask(
        """
        answer([[p.nvmlDeviceGetUUID(gpu(i)),
            p.nvmlDeviceGetMinorNumber(gpu(i))] for i in range(p.nvmlDeviceGetCount())])
        """,
        machine,
    )
    assert told == [[g.uuid, g.minor] for g in machine.gpus]
    assert len({g.uuid for g in machine.gpus}) == len({g.pci for g in machine.gpus}) == len(machine.gpus)


def test_uuids_are_the_same_every_time_and_differ_between_machines() -> None:
    once, again = nvml.dgx_a100(), nvml.dgx_a100()
    assert once.render() == again.render()
    everyone = [g.uuid for make in nvml.MACHINES.values() for g in make().gpus]
    assert len(set(everyone)) == len(everyone)
    assert all(len(u) == 40 and u.startswith("GPU-") for u in everyone)


def test_a_uniform_machine_is_as_asked() -> None:
    machine = Machine.uniform(4, "Test GPU", 8 * GIB, sockets=2, cpus=16)
    assert [g.numa_node for g in machine.gpus] == [0, 0, 1, 1]
    assert [g.cpus for g in machine.gpus] == ["0-7", "0-7", "8-15", "8-15"]
    assert {g.memory for g in machine.gpus} == {8 * GIB}
    assert machine.levels == {(0, 1): nvml.SAME_NODE, (2, 3): nvml.SAME_NODE}
    with pytest.raises(ValueError, match="Test GPU"):
        Machine.uniform(1, "Test GPU")
    assert len({g.pci for g in Machine.uniform(40).gpus}) == 40


def test_the_command_line_writes_a_machine_near_this_hosts_cpus(tmp_path: Path, ask: Ask) -> None:
    state = tmp_path / "state"
    command = [sys.executable, "-m", "tests.lab.nvml", "write", "dgx-a100", str(state), "--count", "3"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    told = ask("answer([p.nvmlDeviceGetCount(), list(p.nvmlDeviceGetCpuAffinity(gpu(0), 8))])", None)
    cpus = [64 * n + b for n, word in enumerate(told[1]) for b in range(64) if word >> b & 1]
    assert told[0] == 3
    assert cpus
    assert max(cpus) < (os.cpu_count() or 1)


def test_the_lab_does_not_import_the_product() -> None:
    script = "import sys, tests.lab.nvml; print([m for m in sys.modules if m.split('.')[0] == 'gpujobs'])"
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert told.strip() == "[]"


def test_many_writers_leave_one_whole_file(tmp_path: Path, ask: Ask) -> None:
    state = tmp_path / "state"
    machines = [Machine.uniform(n, name=f"writer-{n}") for n in range(1, 5)]
    ends = time.monotonic() + 0.3

    def write(machine: Machine) -> None:
        while time.monotonic() < ends:
            machine.write(state)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, machines))
    assert 1 <= ask("answer(p.nvmlDeviceGetCount())", None) <= 4
