"""The contract's JSON of jobs and GPUs, made from the service's values."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gpujobs.core import codec
from gpujobs.core.explain import Explainer
from gpujobs.core.inventory import Gpu, MigDevice, Process
from gpujobs.core.job import Active, Ended, Job, Queued, name_of
from gpujobs.wire import rfc3339

if TYPE_CHECKING:
    from gpujobs.service.loop import Service

Row = dict[str, Any]


def row(service: Service, job: Job, explainer: Explainer) -> Row:
    """One row of ``ps``."""
    state = job.state
    reason, message = getattr(state, "reason", ""), getattr(state, "message", "")
    if isinstance(state, Queued) and service.contexts.awaits(job):
        reason, message = "image", "waits for its build context"
    elif isinstance(state, Queued):
        wait = explainer.why(job.id)
        reason, message = wait.reason, wait.message
    elif not isinstance(state, Ended) and not message:
        message = service.note_of(job.id)
    gpus = state.allocation.gpus if isinstance(state, Active) else getattr(state, "gpus", ())
    return {
        "id": job.id.number,
        "index": job.id.index,
        "name": job.spec.name,
        "owner": job.owner.name,
        "state": name_of(state),
        "reason": reason or None,
        "message": message or None,
        "gpus": list(gpus),
        "gpu_count": job.spec.gpus.count,
        "gpu_indices": [gpu.index for uuid in gpus if (gpu := service.inventory.by_uuid(uuid)) is not None],
        "submitted_at": rfc3339(job.submitted_at),
        "started_at": rfc3339(getattr(state, "started_at", None)),
        "ended_at": rfc3339(getattr(state, "ended_at", None)),
        "exit_code": getattr(state, "exit_code", None),
        "attempt": getattr(state, "attempt", 0),
        "estimated_start": None,
        "progress": [
            {"layer": layer.id, "status": layer.status, "current": layer.current, "total": layer.total}
            for layer in service.layers_of(job.id)
        ]
        or None,
    }


def details(service: Service, job: Job, explainer: Explainer, attempts: list[Row], *, inside: bool) -> Row:
    """``show``: the row, and for who may see it the specification, the container and every attempt."""
    answer = row(service, job, explainer)
    last = attempts[-1] if attempts else None
    answer["spec"] = codec.encode(job.spec) if inside else None
    answer["container"] = None
    if last is not None and inside:
        answer["container"] = {
            "id": last["container"],
            "name": last["name"],
            "image": last["image"] or None,
            "digest": last["digest"],
            "removed": bool(last["removed"]),
        }
    answer["attempts"] = [
        {
            "attempt": item["attempt"],
            "container": item["name"],
            "gpus": json.loads(item["allocation"]).get("gpus", []),
            "choices": [{"uuid": u, "chosen": c, "reason": r} for u, c, r in json.loads(item["choices"])],
            "decided_at": rfc3339(item["decided_at"]),
            "started_at": rfc3339(item["started_at"]),
            "ended_at": rfc3339(item["ended_at"]),
            "exit_code": item["exit_code"],
            "reason": item["reason"] or None,
            "message": item["message"] or None,
            "log_complete": bool(item["log_closed"]),
        }
        for item in (attempts if inside else ())
    ]
    return answer


def inventory(service: Service) -> Row:
    """``gpus``: every GPU, who holds it, which processes are on it."""
    found = service.inventory
    held: dict[str, list[Row]] = {}
    for job in service.view().queue.active.values():
        for uuid in job.allocation.gpus:
            entry = {"job": job.id.number, "index": job.id.index, "owner": job.user, "memory_bytes": job.share}
            held.setdefault(uuid, []).append(entry)
    avoid = service.view().avoid
    return {
        "simulated": found.simulated,
        "driver": found.driver,
        "cuda": None if found.cuda is None else ".".join(map(str, found.cuda)),
        "problem": found.problem or None,
        "gpus": [_gpu(gpu, held, avoid.get(gpu.uuid)) for gpu in found.gpus],
        "links": [
            {"a": a, "b": b, "link": link.name.lower().replace("_", "-"), "nvlinks": found.nvlinks.get((a, b), 0)}
            for (a, b), link in sorted(found.links.items())
        ],
    }


def _gpu(gpu: Gpu, held: dict[str, list[Row]], avoided: str | None) -> Row:
    allocations = [dict(entry) for entry in held.get(gpu.uuid, ())]
    for entry in allocations:
        entry["memory_bytes"] = entry["memory_bytes"] or gpu.memory_bytes
    mig = [_mig(device, held) for device in gpu.mig]
    for device in mig:
        allocations += device["allocations"]
    return {
        "uuid": gpu.uuid,
        "index": gpu.index,
        "minor": gpu.minor,
        "model": gpu.model,
        "memory_bytes": gpu.memory_bytes,
        "health": str(gpu.health),
        "allocations": allocations,
        "processes": [_process(process) for process in gpu.processes],
        "memory_used_bytes": gpu.memory_used_bytes,
        "memory_reserved_bytes": gpu.memory_reserved_bytes,
        "utilisation_percent": gpu.utilisation_percent,
        "memory_utilisation_percent": gpu.memory_utilisation_percent,
        "temperature_c": gpu.temperature_c,
        "power_w": gpu.power_w,
        "power_limit_w": gpu.power_limit_w,
        "energy_joules": gpu.energy_joules,
        "capability": None if gpu.capability is None else ".".join(map(str, gpu.capability)),
        "pci": gpu.pci,
        "numa": gpu.numa,
        "ecc_corrected": gpu.ecc_corrected,
        "ecc_uncorrected": gpu.ecc_uncorrected,
        "xid": gpu.xid,
        "avoided": avoided,
        "mig_enabled": gpu.mig_enabled,
        "mig": mig,
    }


def _mig(device: MigDevice, held: dict[str, list[Row]]) -> Row:
    allocations = [dict(entry) for entry in held.get(device.uuid, ())]
    for entry in allocations:
        entry["memory_bytes"] = device.memory_bytes
    return {
        "uuid": device.uuid,
        "profile": device.profile,
        "memory_bytes": device.memory_bytes,
        "memory_used_bytes": device.memory_used_bytes,
        "allocations": allocations,
        "processes": [_process(process) for process in device.processes],
    }


def _process(process: Process) -> Row:
    return {
        "pid": process.pid,
        "user": process.user,
        "name": process.name,
        "memory_bytes": process.memory_bytes,
        "container": process.container,
        "job": process.job,
        "kind": process.kind,
    }
