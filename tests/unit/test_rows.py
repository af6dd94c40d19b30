"""The contract's JSON of GPUs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from gpujobs import testing
from gpujobs.core.inventory import Gpu, Health, Inventory, Process
from gpujobs.core.job import Allocation, JobId, Owner
from gpujobs.core.queue import QueueState
from gpujobs.service import rows
from gpujobs.service.access import Asker
from gpujobs.settings import Settings

ADA = Asker(Owner(uid=5001, gid=5001, groups=(5001,), name="ada", home="/home/ada"), admin=False)


def told(inventory: Inventory, held: dict[str, Any] | None = None) -> Any:
    active = held or {}
    service: Any = SimpleNamespace(
        inventory=inventory, settings=Settings(),
        view=lambda: SimpleNamespace(queue=replace(QueueState(), active=active), avoid={}),
    )  # fmt: skip
    return rows.inventory(service, ADA)


def test_what_nvml_does_not_tell_of_a_gpu_is_null_and_no_zero_and_no_empty_text() -> None:
    bare = Gpu(uuid="GPU-1", index=0, minor=None, model="", memory_bytes=0)
    lost = replace(bare, uuid="lost-1", index=1, health=Health.LOST)
    job = SimpleNamespace(id=JobId(7), allocation=Allocation(gpus=("GPU-1",)), uid=5001, user="ada", share=None)
    first, second = told(Inventory(gpus=(bare, lost)), {"7": job})["gpus"]
    for gpu in (first, second):
        assert (gpu["model"], gpu["memory_bytes"], gpu["minor"], gpu["utilisation_percent"]) == (None,) * 4
    assert (first["health"], second["health"]) == ("ok", "lost")
    assert first["allocations"] == [{"job": 7, "index": None, "owner": "ada", "memory_bytes": None}]


def test_a_gpu_has_the_keys_of_the_contract() -> None:
    answer = told(testing.dgx_a100())
    assert answer["simulated"] is False
    for gpu in answer["gpus"]:
        assert gpu.keys() >= {"uuid", "index", "minor", "model", "memory_bytes", "health", "allocations", "processes"}
        assert gpu["memory_bytes"] > 0


def test_a_gpu_in_mig_mode_lists_the_processes_of_its_devices_as_its_own() -> None:
    inventory = testing.mig_a100()
    position = next(i for i, gpu in enumerate(inventory.gpus) if gpu.mig)
    gpu = inventory.gpus[position]
    there = Process(pid=77, name="python", user="ada")
    split = replace(gpu, mig=(replace(gpu.mig[0], processes=(there,)), *gpu.mig[1:]))
    gpus = tuple(split if i == position else other for i, other in enumerate(inventory.gpus))
    shown = told(replace(inventory, gpus=gpus))["gpus"][position]
    assert [process["pid"] for process in shown["processes"]] == [77]
    assert shown["processes"] == shown["mig"][0]["processes"]
