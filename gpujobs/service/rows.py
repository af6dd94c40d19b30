"""The contract's JSON of jobs and GPUs, made from the service's values."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gpujobs.core import codec
from gpujobs.core.explain import Explainer
from gpujobs.core.inventory import Gpu, MigDevice, Process
from gpujobs.core.job import Active, Ended, Job, JobId, Queued, name_of
from gpujobs.core.queue import ActiveJob
from gpujobs.core.rules import discreet as without_names
from gpujobs.service import holds
from gpujobs.wire import rfc3339

if TYPE_CHECKING:
    from gpujobs.service.access import Asker
    from gpujobs.service.loop import Service

Row = dict[str, Any]


def discreet(service: Service, asker: Asker) -> bool:
    """Whether nothing that names others is shown to this asker."""
    return service.settings.queue_visibility != "all" and not asker.admin


def visible(service: Service, asker: Asker, found: Sequence[Job]) -> tuple[list[Job], dict[str, int] | None]:
    """The jobs that an asker may see one by one, and how many others there are in each state.

    The counts are None where there is nothing that is only counted.
    """
    if service.settings.queue_visibility != "counts" or asker.admin:
        return list(found), None
    mine = [job for job in found if asker.may_act(job)]
    counts: dict[str, int] = {}
    for job in found:
        if not asker.may_act(job) and not isinstance(job.state, Ended):
            counts[name_of(job.state)] = counts.get(name_of(job.state), 0) + 1
    return mine, counts


def row(service: Service, job: Job, explainer: Explainer, asker: Asker) -> Row:
    """One row of ``ps``, as far as this asker may see it.

    Of others' jobs it says why they wait, but not what became of them in words: these are of their paths, images and
    logs. One that was read as waiting and has started since is shown as it is now.
    """
    if isinstance(job.state, Queued):
        job = service.active.get(job.id, job)
    state = job.state
    reason, message = getattr(state, "reason", ""), getattr(state, "message", "")
    inside, named = asker.may_act(job), not discreet(service, asker)
    if isinstance(state, Queued) and service.contexts.awaits(job):
        reason, message = "image", "waits for its build context"
    elif isinstance(state, Queued) and (held := service.holds.reason(job)):
        reason, message = holds.REASON, held if inside else "its account cannot be used now"
    elif isinstance(state, Queued):
        wait = explainer.why(job.id)
        reason, message = wait.reason, wait.message
    elif not inside:
        message = ""
    elif not isinstance(state, Ended) and not message:
        message = service.note_of(job.id)
    gpus = state.allocation.gpus if isinstance(state, Active) else getattr(state, "gpus", ())
    return {
        "id": job.id.number,
        "index": job.id.index,
        "name": job.spec.name if inside or named else None,
        "owner": job.owner.name if inside or named else None,
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
            for layer in (service.layers_of(job.id) if inside else ())
        ]
        or None,
    }


def details(service: Service, job: Job, explainer: Explainer, attempts: list[Row], asker: Asker) -> Row:
    """``show``: the row, and for who may see it the specification, the container and every attempt."""
    inside = asker.may_act(job)
    answer = row(service, job, explainer, asker)
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


def inventory(service: Service, asker: Asker) -> Row:
    """``gpus``: every GPU, who holds it, which processes are on it, as far as this asker may see it."""
    found = service.inventory
    hidden = discreet(service, asker)
    held: dict[str, list[Row]] = {}
    for job in service.view().queue.active.values():
        for uuid in job.allocation.gpus:
            held.setdefault(uuid, []).append(_allocation(service, job, asker))
    avoid = service.view().avoid
    if hidden:
        avoid = without_names(avoid)
    mine = {str(job.id) for job in service.view().queue.active.values() if job.uid == asker.uid}

    def processes(listed: Sequence[Process]) -> list[Row]:
        return [
            _process(process) if not hidden or process.uid == asker.uid or process.job in mine else _nameless(process)
            for process in listed
        ]

    return {
        "simulated": found.simulated,
        "driver": found.driver,
        "cuda": None if found.cuda is None else ".".join(map(str, found.cuda)),
        "problem": found.problem or None,
        "gpus": [_gpu(gpu, held, avoid.get(gpu.uuid), processes) for gpu in found.gpus],
        "links": [
            {"a": a, "b": b, "link": link.name.lower().replace("_", "-"), "nvlinks": found.nvlinks.get((a, b), 0)}
            for (a, b), link in sorted(found.links.items())
        ],
    }


def _allocation(service: Service, job: ActiveJob, asker: Asker) -> Row:
    """What a job holds of a GPU."""
    shown = job.uid == asker.uid or not discreet(service, asker)
    counted = not shown and service.settings.queue_visibility == "counts"
    return {
        "job": None if counted else job.id.number,
        "index": None if counted else job.id.index,
        "owner": job.user if shown else None,
        "memory_bytes": job.share,
    }


def _gpu(
    gpu: Gpu, held: dict[str, list[Row]], avoided: str | None, processes: Callable[[Sequence[Process]], list[Row]]
) -> Row:
    allocations = [dict(entry) for entry in held.get(gpu.uuid, ())]
    for entry in allocations:
        entry["memory_bytes"] = entry["memory_bytes"] or gpu.memory_bytes or None
    mig = [_mig(device, held, processes) for device in gpu.mig]
    on_it = processes(gpu.processes)
    for device in mig:
        allocations += device["allocations"]
        on_it += device["processes"]
    return {
        "uuid": gpu.uuid,
        "index": gpu.index,
        "minor": gpu.minor,
        "model": gpu.model or None,
        "memory_bytes": gpu.memory_bytes or None,  # no card has none: NVML did not tell
        "health": str(gpu.health),
        "allocations": allocations,
        "processes": on_it,
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


def _mig(
    device: MigDevice, held: dict[str, list[Row]], processes: Callable[[Sequence[Process]], list[Row]]
) -> Row:
    allocations = [dict(entry) for entry in held.get(device.uuid, ())]
    for entry in allocations:
        entry["memory_bytes"] = device.memory_bytes or None
    return {
        "uuid": device.uuid,
        "profile": device.profile or None,
        "memory_bytes": device.memory_bytes or None,
        "memory_used_bytes": device.memory_used_bytes,
        "allocations": allocations,
        "processes": processes(device.processes),
    }


def _process(process: Process) -> Row:
    job = None if process.job is None else JobId.parse(process.job)
    return {
        "pid": process.pid,
        "user": process.user,
        "name": process.name,
        "memory_bytes": process.memory_bytes,
        "container": process.container,
        "job": job and job.number,
        "index": job and job.index,
        "kind": process.kind,
    }


def _nameless(process: Process) -> Row:
    """A process of somebody else's where names are hidden: that there is one, and what it takes."""
    return {**_process(process), "user": None, "name": None, "container": None, "job": None, "index": None}
