"""docs/operations.md quotes the product: its sentences are the product's, its table of differences the module's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from gpujobs.core import reconcile

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/operations.md").read_text()
FAILURES = PAGE[PAGE.index("## What failures look like") : PAGE.index("## When what is recorded")]
NO_SENTENCES = {"code", "reason", "what it is", "what it is, and what to do"}
"""Columns that quote nothing."""


def said() -> str:
    """Every text of the product's, parts of formatted ones one after the other."""
    found = []
    for path in (ROOT / "gpujobs").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("\0".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[a-z]", "\0", node.value))
    return "\n".join(found)


SAID = said()


def quoted() -> list[str]:
    sentences, heads = [], []
    for line in FAILURES.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            heads = []
        elif not heads:
            heads = cells
        else:
            for head, cell in zip(heads, cells, strict=True):
                if head not in NO_SENTENCES:
                    sentences += [text for text in re.findall(r"`([^`]+)`", cell) if " " in text]
    return sentences


@pytest.mark.parametrize("sentence", quoted())
def test_a_sentence_that_the_page_quotes_is_one_of_the_products(sentence: str) -> None:
    for part in filter(None, (part.strip(" :,()") for part in sentence.split("…"))):
        assert part in SAID, part


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_of_differences_is_the_modules() -> None:
    """As :mod:`gpujobs.core.reconcile` has it at its head; its tests have one for each row."""
    assert reconcile.__doc__ is not None
    lines = reconcile.__doc__[reconcile.__doc__.index("\u2500\n") + 2 :].splitlines()
    table = [re.split(r"\s{2,}", line.strip()) for line in lines if line.strip()]
    page = rows(PAGE[PAGE.index("## When what is recorded") : PAGE.index("*Active* is")])[2:]
    assert len(table) > 8
    assert [[cell for cell in row if cell] for row in page] == table
