"""The GPUs at a glance: who has what, how busy, how warm; and how they are linked. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpujobs.core.inventory import Process, is_stranger
from gpujobs.faces.grid import Cell, Column, Grid
from gpujobs.faces.words import GAP, clean, columns, size

HEALTH_STYLES = {"ok": "green", "lost": "bold red", "quarantined": "red", "simulated": "magenta"}

_EIGHTHS = " ▏▎▍▌▋▊▉█"

WIDE = 150
"""From so many columns on there is room for UUIDs and longer bars; below ``NARROW`` bars are short."""
NARROW = 110

SHORT = 11
"""Who is on a GPU stands beside it on a narrow terminal where it takes no more columns than this."""


def bar(share: float | None, width: int) -> str:
    """A bar of so many columns for a share from 0 to 1, in eighths of a column; empty for a gap."""
    if share is None:
        return "·" * width
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[part] if part else "")).ljust(width, "░")


def header(answer: Mapping[str, Any]) -> str:
    """One line on the machine: driver, CUDA, how many GPUs, how many are free; SIMULATED where they are."""
    gpus = answer.get("gpus") or []
    versions = [
        f"{title} {clean(_version(answer[key]))}" for key, title in (("driver", "driver"), ("cuda", "CUDA"))
        if answer.get(key)
    ]  # fmt: skip
    free = sum(_is_free(gpu) for gpu in gpus)
    parts = [f"{len(gpus)} GPU{'' if len(gpus) == 1 else 's'}, {free} free", *versions]
    if problem := answer.get("problem"):
        parts.append(clean(problem))
    return ("SIMULATED  " if answer.get("simulated") else "") + " · ".join(parts)


def _version(value: object) -> str:
    return ".".join(str(part) for part in value) if isinstance(value, list) else str(value)


def _is_free(gpu: Mapping[str, Any]) -> bool:
    busy = gpu.get("allocations") or any(_stranger(p) for p in gpu.get("processes") or [])
    held = any(mig.get("allocations") for mig in gpu.get("mig") or [])
    return not busy and not held and not gpu.get("avoided") and gpu.get("health") in ("ok", "simulated")


def glance(answer: Mapping[str, Any], width: int | None) -> Grid:
    """The table of GPUs, MIG devices below theirs.

    Args:
        answer: Of ``GET /v1/gpus``.
        width: The terminal's columns; None for a pipe: everything, without bars.
    """
    plain, wide = width is None, width is None or width >= WIDE
    narrow = width is not None and width < NARROW
    length = 0 if plain else 3 if narrow else 12 if wide else 8
    titles = [Column("GPU", right=True), Column("MODEL", fold=not plain)]
    if wide:
        titles.append(Column("UUID"))
    titles += [Column("MEMORY", right=plain), Column("UTIL", right=plain), Column("TEMP", right=True),
               Column("POWER", right=True), Column("HEALTH"), Column("WHO", fold=True)]  # fmt: skip
    grid = Grid(tuple(titles))
    for gpu in answer.get("gpus") or []:
        cells = [Cell(clean(gpu.get("index")), "bold"), Cell(model_name(gpu.get("model")))]
        if wide:
            cells.append(Cell(clean(gpu.get("uuid")), "dim"))
        cells += [_memory(gpu, length), _utilisation(gpu, length), _temperature(gpu)]
        _add(grid, [*cells, _power(gpu, brief=not wide), _health(gpu)], _who(gpu), narrow=narrow)
        for mig in gpu.get("mig") or []:
            cells = [Cell(""), Cell(f"└ {'' if narrow else 'MIG '}{clean(mig.get('profile'))}")]
            if wide:
                cells.append(Cell(clean(mig.get("uuid")), "dim"))
            cells += [_memory(mig, length), Cell(""), Cell(""), Cell(""), Cell("")]
            _add(grid, cells, _who(mig), narrow=narrow)
    return grid


def _add(grid: Grid, cells: list[Cell], who: Cell, *, narrow: bool) -> None:
    """Add a row; who is on it goes below where there is no room beside."""
    if narrow and columns(who.text) > SHORT:
        grid.add(*cells, "", below=who)
    else:
        grid.add(*cells, who)


def model_name(value: object) -> str:
    """NVIDIA's name without the word that all of them begin with."""
    return clean(value or GAP).removeprefix("NVIDIA ").removeprefix("GeForce ")


def _memory(gpu: Mapping[str, Any], length: int) -> Cell:
    total, used = gpu.get("memory_bytes"), gpu.get("memory_used_bytes")
    share = used / total if total and used is not None else None
    text = size(total) if used is None else f"{size(used).split()[0]}/{size(total)}"
    if used is None and length:
        text = f"{GAP}/{text}"
    elif used and not size(used).endswith("GiB"):
        text = f"{size(used)}/{size(total)}"
    return Cell(
        f"{bar(share, length)} {text}" if length else text,
        "dim" if share is None else "red" if share > 0.97 else "cyan",
    )


def _utilisation(gpu: Mapping[str, Any], length: int) -> Cell:
    percent = gpu.get("utilisation_percent")
    share = None if percent is None else percent / 100
    text = GAP if percent is None else f"{percent}%"
    return Cell(f"{bar(share, length)} {text}" if length else text, "green" if percent else "dim")


def _temperature(gpu: Mapping[str, Any]) -> Cell:
    degrees = gpu.get("temperature_c")
    if degrees is None:
        return Cell(GAP, "dim")
    return Cell(f"{degrees}°C", "red" if degrees >= 85 else "")


def _power(gpu: Mapping[str, Any], *, brief: bool) -> Cell:
    now, limit = gpu.get("power_w"), gpu.get("power_limit_w")
    if now is None:
        return Cell(GAP, "dim")
    return Cell(f"{now:.0f}/{limit:.0f} W" if limit and not brief else f"{now:.0f}W")


def _health(gpu: Mapping[str, Any]) -> Cell:
    health = clean(gpu.get("health") or GAP)
    return Cell(health.upper() if health == "simulated" else health, HEALTH_STYLES.get(health, ""))


def _who(gpu: Mapping[str, Any]) -> Cell:
    """Jobs with their owners, then whoever else is on it with the command."""
    # A GPU in MIG mode lists what its devices hold and who is on them; that is told at the devices.
    elsewhere = [process for mig in gpu.get("mig") or [] for process in mig.get("processes") or []]
    total = gpu.get("memory_bytes")
    texts = [_allocation(allocation, total) for allocation in gpu.get("allocations") or [] if not gpu.get("mig")]
    strangers = [p for p in gpu.get("processes") or [] if p not in elsewhere and _stranger(p)]
    texts += [_process(p) for p in strangers]
    problem = gpu.get("problem") or gpu.get("avoided")
    if problem and not strangers:
        texts.append(clean(problem))
    if not texts and gpu.get("health") in (None, "ok", "simulated"):
        return Cell("" if gpu.get("mig") else "free", "dim")
    return Cell("; ".join(texts), "red" if strangers else "")


def _allocation(allocation: Mapping[str, Any], total: int | None) -> str:
    if allocation.get("job") is None:  # others' jobs are only counted
        return "a job of somebody else's"
    job, index = clean(allocation.get("job")), allocation.get("index")
    name = job if index is None or "_" in job else f"{job}_{index}"
    share = allocation.get("memory_bytes")
    part = f" ({size(share)})" if share and share != total else ""
    return f"job {name} {clean(allocation.get('owner') or GAP)}{part}"


def _stranger(process: Mapping[str, Any]) -> bool:
    return is_stranger(
        Process(
            pid=int(process.get("pid") or 0),
            kind=str(process.get("kind") or "compute"),
            name=str(process.get("name") or ""),
            job=None if process.get("job") is None else str(process["job"]),
        )
    )


def _process(process: Mapping[str, Any]) -> str:
    name = clean(str(process.get("name") or "a process").rsplit("/", 1)[-1])
    memory = f", {size(process['memory_bytes'])}" if process.get("memory_bytes") else ""
    user = clean(process.get("user") or "unknown user")
    return f"no job: {user} {name} (pid {process.get('pid')}{memory})"


def topology(answer: Mapping[str, Any]) -> tuple[Grid, str]:
    """How the GPUs reach each other, as a matrix, and a legend of what occurs in it.

    Args:
        answer: Of ``GET /v1/gpus``; its ``links`` are objects of ``a``, ``b`` (UUIDs), ``link``, ``nvlinks``.
    """
    gpus: Sequence[Mapping[str, Any]] = answer.get("gpus") or []
    links: dict[frozenset[str], str] = {}
    for link in answer.get("links") or []:
        links[frozenset((str(link.get("a")), str(link.get("b"))))] = _link_word(link)
    grid = Grid((Column(""), *(Column(f"GPU{clean(gpu.get('index'))}") for gpu in gpus), Column("NUMA")))
    for gpu in gpus:
        cells = [Cell(f"GPU{clean(gpu.get('index'))}", "bold")]
        for other in gpus:
            same = gpu is other
            word = "X" if same else links.get(frozenset((str(gpu.get("uuid")), str(other.get("uuid")))), GAP)
            cells.append(Cell(word, "dim" if same else "green" if word.startswith("NV") else ""))
        numa = gpu.get("numa")
        grid.add(*cells, GAP if numa is None else str(numa))
    used = {"NV#" if word.startswith("NV") else word for word in links.values()}
    return grid, "".join(f"{word:<5}{text}\n" for word, text in _LEGEND.items() if word in used)


_LINK_WORDS = {
    "SYSTEM": "SYS", "NODE": "NODE", "HOST_BRIDGE": "PHB", "MULTI_SWITCH": "PXB", "SINGLE_SWITCH": "PIX",
    "BOARD": "PSB", "NVLINK": "NV",
}  # fmt: skip

_LEGEND = {
    "NV#": "that many NVLinks",
    "PSB": "one board",
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "one PCIe host bridge",
    "NODE": "several host bridges of one NUMA node",
    "SYS": "across NUMA nodes",
}
"""The words of ``nvidia-smi topo -m``, and what they mean."""


def _link_word(link: Mapping[str, Any]) -> str:
    """The word of ``nvidia-smi topo -m`` for a link, given by that word, the class's name, or its NVLinks."""
    if link.get("nvlinks"):
        return f"NV{link['nvlinks']}"
    name = str(link.get("link") or GAP).upper().replace("-", "_")
    return clean(_LINK_WORDS.get(name, name))
