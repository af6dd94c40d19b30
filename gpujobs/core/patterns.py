"""Regular expressions of the JSON Schema: numbers between bounds, words in any case.

A schema sees the text of a size, a port or a count, not its value: bounds have to be spelled out in digits, so
that an editor refuses what the parser refuses. All of them are of the dialect that ECMA 262 and Python share.
"""

from __future__ import annotations

import re


def between(low: int, high: int) -> str:
    """A pattern of the whole numbers from ``low`` to ``high``, both at least 0, without leading zeros."""
    found: list[str] = []
    while low <= high:
        free = 0  # digits at the end of `low` that can be anything
        while low % 10 ** (free + 1) == 0 and low > 0 and low + 10 ** (free + 1) - 1 <= high:
            free += 1
        first, last = low // 10**free, low // 10**free
        while last % 10 < 9 and (last + 2) * 10**free - 1 <= high:
            last += 1
        found.append((str(first // 10) if first >= 10 else "") + _digits(first % 10, last % 10) + _any(free))
        low = (last + 1) * 10**free
    return f"({_joined('|'.join(found))})"


def _digits(first: int, last: int) -> str:
    return str(first) if first == last else f"[{first}-{last}]"


def _any(digits: int) -> str:
    return "" if digits == 0 else f"[0-9]{{{digits}}}"


def _joined(pattern: str) -> str:
    """``[1-9]|[1-9][0-9]{1}|[1-9][0-9]{2}`` as ``[1-9][0-9]{0,2}``."""
    run = re.search(r"(?:(?<=^)|(?<=\|))\[1-9\](?:\[0-9\]\{(\d+)\})?(?:\|\[1-9\]\[0-9\]\{\d+\})+(?=\||$)", pattern)
    if run is None:
        return pattern
    lengths = re.findall(r"\{(\d+)\}", run[0])
    return f"{pattern[: run.start()]}[1-9][0-9]{{{run[1] or 0},{lengths[-1]}}}{pattern[run.end() :]}"


def whole(low: int, high: int) -> str:
    """A pattern of a whole number from ``low`` to ``high`` as the parser reads it from a text."""
    signed = [rf"\+?{between(max(low, 0), high)}"]
    if low <= 0:
        signed.append("-0")
    if low < 0:
        signed.append(f"-{between(1, -low)}")
    return rf"^\s*({'|'.join(signed)}|0o[0-7]{{1,30}}|0x[0-9a-fA-F]{{1,30}})\s*$"


def any_case(words: str) -> str:
    """A pattern of some words in upper, lower or mixed case; what is no letter stays as it is."""
    return "".join(f"[{char.lower()}{char.upper()}]" if char.isalpha() else char for char in words)


def sizes(least: int, most: int) -> str:
    """A pattern of a number of bytes or of units, from ``least`` bytes to about ``most``.

    Fractions just below ``least`` and numbers with as many digits as ``most`` pass: only the parser computes.
    """
    found = []
    for power, unit in enumerate(("", "k", "m", "g", "t", "p", "e")):
        one = 1024**power
        high = most // one if power > 3 else 10 ** len(str(most // one)) - 1
        number = rf"0*{between(max(1, -(-least // one)), high)}(\.[0-9]{{1,10}})?"
        if least < one:
            number = rf"({number}|0+\.[0-9]{{0,9}}[1-9][0-9]{{0,9}})"
        found.append(number + rf"\s*{any_case(unit)}{'([iI]?[bB])?' if unit else '[bB]?'}")
    return rf"^\s*({'|'.join(found)})\s*$"
