"""Whether an image's CUDA runs with the host's driver, by what the image itself says.

``NVIDIA_REQUIRE_CUDA`` is a list of alternatives (blank) of conditions that all must hold (comma), such as
``cuda>=12.4 brand=tesla,driver>=535,driver<536``: the syntax and its meaning are NVIDIA's container toolkit's. We
take the variable away from the container (an image must not steer the toolkit), so its question is answered here.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

from gpujobs.core.container import Image
from gpujobs.core.inventory import Inventory

Version = tuple[int, ...]

_CONDITION = re.compile(r"([a-z]+)(>=|<=|!=|=|>|<)([^\s,]+)", re.ASCII)
_COMPARE: dict[str, Callable[[Version, Version], bool]] = {
    ">=": operator.ge, "<=": operator.le, "=": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


def needs_newer_driver(image: Image, inventory: Inventory) -> str | None:
    """The sentence that says why an image's CUDA will not run here; None where it will, or nothing is known.

    Where the image only has CUDA_VERSION, a newer minor version is no obstacle: CUDA 11 and later run with any
    driver of the same major version (CUDA Compatibility, "Minor Version Compatibility").
    """
    if inventory.cuda is None:
        return None
    variables = dict(entry.partition("=")[::2] for entry in image.environment)
    required = variables.get("NVIDIA_REQUIRE_CUDA", "")
    if required:
        if any(_holds(alternative, inventory) for alternative in required.split()):
            return None
        needed = next((m[3] for m in _CONDITION.finditer(required) if m[1] == "cuda"), required[:60])
    else:
        needed = variables.get("CUDA_VERSION", "")
        version = _version(needed)
        if not version or version[0] <= inventory.cuda[0]:
            return None
    have = ".".join(map(str, inventory.cuda))
    driver = f"this machine's driver {inventory.driver} supports up to {have}"
    return f"the image {image.reference} needs CUDA {needed}; {driver}"


def _holds(alternative: str, inventory: Inventory) -> bool:
    conditions = _CONDITION.findall(alternative)
    return bool(conditions) and all(_true(name, sign, value, inventory) for name, sign, value in conditions)


def _true(name: str, sign: str, value: str, inventory: Inventory) -> bool:
    if name == "brand":  # NVML's brand of the first GPU; data-centre cards are those without a GeForce or RTX name
        tesla = bool(inventory.gpus) and not re.search(
            r"geforce|quadro|titan|\brtx\b", inventory.gpus[0].model, re.IGNORECASE
        )
        return (value in ("tesla", "unknown", "nvidia")) == tesla if sign == "=" else True
    have: Version
    if name == "cuda" and inventory.cuda is not None:
        have = inventory.cuda
    elif name == "driver" and inventory.driver:
        have = _version(inventory.driver)
    else:
        return True  # a condition that cannot be judged here does not keep a job from trying
    wanted = _version(value)
    length = max(len(have), len(wanted))
    return _COMPARE[sign](_padded(have, length), _padded(wanted, length))


def _version(text: str) -> Version:
    match = re.match(r"[0-9]+(?:\.[0-9]+)*", text, re.ASCII)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _padded(version: Version, length: int) -> Version:
    return version + (0,) * (length - len(version))
