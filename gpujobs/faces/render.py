"""How the API's rows look: pure functions from JSON to tables and lines, every foreign text made harmless."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gpujobs.faces.client import has_ended, id_of
from gpujobs.faces.grid import Cell, Column, Grid
from gpujobs.faces.words import GAP, clean, duration, local_time, seconds_of, size

STATE_STYLES = {
    "queued": "yellow", "pulling": "cyan", "starting": "cyan", "running": "green", "stopping": "magenta",
    "succeeded": "dim", "failed": "red", "cancelled": "dim",
}  # fmt: skip

NARROW = 120
"""On a terminal of fewer columns reasons stand below their jobs."""


def ps(rows: Sequence[Mapping[str, Any]], now: float, width: int | None = None) -> Grid:
    """The list of jobs.

    Args:
        rows: Of ``GET /v1/jobs``.
        now: Seconds since the epoch, for how long they have been in their state.
        width: The terminal's columns; None for a pipe. Where it is narrow, reasons stand below their jobs.
    """
    narrow = width is not None and width < NARROW
    titles = (Column("ID"), Column("NAME", fold=True), Column("OWNER", fold=True), Column("STATE"),
              Column("GPUS"), Column("TIME", right=True), Column("REASON", fold=True))  # fmt: skip
    grid = Grid(titles[:-1] if narrow else titles)
    for row in rows:
        state = clean(row.get("state"))
        cells: list[Cell | str] = [
            Cell(clean(id_of(row)), "bold"),
            clean(row.get("name") or ""),
            clean(row.get("owner") or GAP),
            Cell(state, STATE_STYLES.get(state, "")),
            held_gpus(row),
            duration(_time_in_state(row, now)),
        ]
        if narrow:
            grid.add(*cells, below=Cell(_why(row), "dim"))
        else:
            grid.add(*cells, _why(row))
    return grid


def held_gpus(row: Mapping[str, Any]) -> str:
    """The GPUs of a row: how many, and, where the server tells their indices, which: ``4 (0-2,5)``."""
    held = row.get("gpus") or []
    if not held:
        return clean(row.get("gpu_count") or GAP)
    indices = row.get("gpu_indices") or []
    return f"{len(held)} ({_ranges(indices)})" if len(indices) == len(held) else str(len(held))


def _ranges(indices: Sequence[object]) -> str:
    """Numbers such as ``0-3,7``; MIG devices have indices that are no numbers, and stay as they are."""
    parts: list[list[int]] = []
    for number in sorted(i for i in indices if isinstance(i, int)):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    told = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    return ",".join(told + [clean(i) for i in indices if not isinstance(i, int)])


def _time_in_state(row: Mapping[str, Any], now: float) -> float | None:
    """Seconds that it has waited, run, or ran."""
    submitted, started, ended = (seconds_of(row.get(f"{name}_at")) for name in ("submitted", "started", "ended"))
    if ended is not None:
        return None if started is None else ended - started
    since = started if started is not None else submitted
    return None if since is None else now - since


def _why(row: Mapping[str, Any]) -> str:
    """The reason and the sentence, without saying the same twice."""
    reason, message = clean(row.get("reason") or ""), clean(row.get("message") or "")
    if reason and message and reason not in message:
        message = f"{reason}: {message}"
    text = message or reason
    if row.get("state") == "queued" and row.get("estimated_start"):
        text += f" (start about {local_time(row['estimated_start'])})"
    return text


def state_line(row: Mapping[str, Any]) -> str:
    """One change of a job as ``run`` tells it: the state, why it waits, where it runs."""
    state = clean(row.get("state"))
    if state == "running":
        held, indices = row.get("gpus") or [], row.get("gpu_indices") or []
        if held and len(indices) == len(held):
            return f"running on GPU {_ranges(indices)}"
        return "running" + (f" on {len(held)} GPU{'s' * (len(held) > 1)}" if held else "")
    why = _why(row)
    if state == "pulling" and why.startswith(("pulling ", "building")):
        return why
    return f"{state}: {why}" if why else state


def show(row: Mapping[str, Any], now: float) -> str:
    """One job in full, a line for each fact."""
    facts = [
        ("Job", clean(id_of(row))),
        ("Name", clean(row.get("name") or GAP)),
        ("Owner", clean(row.get("owner") or GAP)),
        ("State", clean(row.get("state"))),
        ("Why", _why(row)),
        ("Submitted", local_time(row.get("submitted_at"))),
        ("Started", local_time(row.get("started_at"))),
        ("Ended", local_time(row.get("ended_at"))),
        ("Time", duration(_time_in_state(row, now))),
        ("Exit code", GAP if row.get("exit_code") is None else str(row["exit_code"])),
        *[("GPUs" if n == 0 else "", line) for n, line in enumerate(_gpu_facts(row))],
        ("Attempt", str(row.get("attempt") or GAP)),
        *_container_facts(row.get("container")),
        *_spec_facts(row.get("spec") or {}),
        *[("Attempts" if n == 0 else "", line) for n, line in enumerate(_attempt_lines(row))],
    ]
    kept = [(title, value) for title, value in facts if value not in ("", GAP)]
    return "".join(f"{title + ':' if title else '':<13}{value}\n" for title, value in kept)


def _gpu_facts(row: Mapping[str, Any]) -> list[str]:
    """A line for each GPU that it holds or held."""
    held = [clean(uuid) for uuid in row.get("gpus") or []]
    indices = row.get("gpu_indices") or []
    if len(indices) == len(held):
        held = [f"{uuid} (index {clean(index)})" for uuid, index in zip(held, indices, strict=True)]
    if not held and row.get("gpu_count") and not has_ended(row):
        return [f"asks for {clean(row['gpu_count'])}"]
    return held


def _container_facts(container: object) -> list[tuple[str, str]]:
    """A container is its name, or an object with ``name``, ``id`` and ``image``."""
    if not isinstance(container, Mapping):
        return [("Container", clean(container or ""))]
    name, identity = clean(container.get("name") or ""), clean(container.get("id") or "")
    facts = [("Container", f"{name} ({identity[:12]})" if name and identity else name or identity)]
    if digest := container.get("image"):
        facts.append(("Runs image", clean(digest)))
    return facts


def _spec_facts(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The parts of a specification that people look for; sizes in bytes and times in seconds come in."""
    command = spec.get("command")
    limit = spec.get("time_limit")
    memory, shared = spec.get("mem_limit"), spec.get("shm_size")
    facts = [
        ("Image", clean(spec.get("image") or "")),
        ("Command", clean(shlex.join(command) if isinstance(command, list) else command or "")),
        ("Directory", clean(spec.get("working_dir") or "")),
        ("Asks for", _request(spec.get("gpus"))),
        ("CPUs", "" if spec.get("cpus") is None else f"{spec['cpus']:g}"),
        ("Memory", "" if memory is None else size(memory)),
        ("Shared mem.", "" if shared is None else size(shared)),
        ("Time limit", "" if limit is None else duration(limit)),
    ]
    facts += [("Mount", _mount(volume)) for volume in spec.get("volumes") or []]
    facts += [("Port", _port(port)) for port in spec.get("ports") or []]
    return facts


def _request(gpus: object) -> str:
    """What a job asks of the GPUs."""
    if not isinstance(gpus, Mapping) or not gpus:
        return "" if gpus in (None, {}) else f"{clean(gpus)} GPUs"
    count, most = gpus.get("count", 0), gpus.get("max_count", 0)
    parts = [f"{count}-{most}" if most and most > count else str(count)]
    parts[0] += " GPU" if parts[0] == "1" else " GPUs"
    parts += [f"{key} {size(gpus[key])}" for key in ("memory", "share") if gpus.get(key)]
    if model := gpus.get("model"):
        parts.append("model " + " or ".join(clean(name) for name in model))
    if gpus.get("capability"):
        operator, (major, minor) = gpus["capability"]
        parts.append(f"capability {clean(operator)}{major}.{minor}")
    parts += [f"{key} {clean(gpus[key])}" for key in ("link", "mig") if gpus.get(key) not in (None, "any")]
    parts += [clean(uuid) for uuid in gpus.get("uuid") or []]
    return ", ".join(parts)


def _mount(volume: Mapping[str, Any]) -> str:
    source = clean(volume.get("source") or volume.get("type") or "")
    mode = " (read only)" if volume.get("read_only") else ""
    return f"{source} -> {clean(volume.get('target'))}{mode}"


def _port(port: Mapping[str, Any]) -> str:
    published = port.get("published")
    host = f"{clean(port.get('host_ip', '127.0.0.1'))}:{'(chosen)' if published is None else published}"
    return f"{host} -> {port.get('target')}/{clean(port.get('protocol', 'tcp'))}"


def _attempt_lines(row: Mapping[str, Any]) -> list[str]:
    lines = []
    for attempt in row.get("attempts") or []:
        started, ended = seconds_of(attempt.get("started_at")), seconds_of(attempt.get("ended_at"))
        ran = duration(ended - started) if started is not None and ended is not None else ""
        code = attempt.get("exit_code")
        message = clean(attempt.get("message") or attempt.get("reason") or "")
        words = [
            f"{clean(attempt.get('attempt', attempt.get('number', '')))}:",
            local_time(attempt.get("started_at")),
            ran and f"ran {ran}",
            "" if code is None or message.startswith("exit ") else f"exit {code}",
            message,
        ]
        lines.append("  ".join(word for word in words if word))
        refused = Counter(
            clean(choice.get("reason")) for choice in attempt.get("choices") or [] if not choice.get("chosen")
        )
        lines += [f"   {count} GPU{'s' * (count > 1)} not taken: {reason}" for reason, count in refused.items()]
    return lines


def summary(rows: Sequence[Mapping[str, Any]], now: float, width: int | None) -> tuple[str, Grid]:
    """An array in one line, and its elements."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[clean(row.get("state"))] = counts.get(clean(row.get("state")), 0) + 1
    ended = sum(has_ended(row) for row in rows)
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f"{len(rows)} jobs, {ended} ended: {told}\n", ps(rows, now, width)
