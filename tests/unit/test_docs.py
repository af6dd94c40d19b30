"""The documentation agrees with the program: each key is described, each described key exists, each file is valid."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gpujobs import specfile
from gpujobs.core.spec import KEYS, SUPPORTED
from tests.unit.corpus import CONTEXT

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/job-file.md"
BLOCK = re.compile(r"^```yaml(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def sections() -> dict[str, str]:
    """The text under each heading that is a key."""
    parts = re.split(r"^(#{2,3} .*)$", PAGE.read_text(), flags=re.MULTILINE)
    return {
        match[1]: body
        for heading, body in zip(parts[1::2], parts[2::2], strict=True)
        if (match := re.fullmatch(r"### `([a-z_]+)`", heading))
    }


def nested(schema: object) -> Iterator[str]:
    """The names of all properties within a schema, however deep."""
    if isinstance(schema, Mapping):
        for key, item in schema.items():
            if key == "properties":
                yield from item
                for inner in item.values():
                    yield from nested(inner)
            elif key not in {"if", "then", "else"}:
                yield from nested(item)
    elif isinstance(schema, list):
        for item in schema:
            yield from nested(item)


def test_every_key_has_its_section_and_every_section_its_key() -> None:
    assert set(sections()) == set(specfile.schema()["properties"]) == SUPPORTED


@pytest.mark.parametrize("key", sorted(SUPPORTED))
def test_every_key_within_it_is_in_its_table_and_nothing_else(key: str) -> None:
    cells = re.findall(r"^\| (`[^|]*) \|", sections()[key], re.MULTILINE)
    described = [name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)]
    assert set(described) == set(nested(specfile.schema()["properties"][key]))
    assert len(described) == len(set(described))


def test_the_keys_that_are_refused_are_named() -> None:
    _, _, text = PAGE.read_text().partition("## What is refused")
    known = text.partition("The keys ")[2].partition("are known, and refused")[0]
    assert set(re.findall(r"`([a-z_]+)`", known)) == set(KEYS) - SUPPORTED


@pytest.mark.parametrize(
    ("info", "text"),
    [
        pytest.param(match["info"].strip(), match["text"], id=f"{page}:{text[:match.start()].count(chr(10)) + 1}")
        for page in ("README.md", "docs/job-file.md")
        for text in [(ROOT / page).read_text()]
        for match in BLOCK.finditer(text)
    ],
)
def test_every_job_file_in_the_documentation_is_valid(info: str, text: str) -> None:
    """``yaml fragment`` marks a part of a file."""
    assert info in {"", "fragment"}
    if info == "fragment":
        text += "name: t\n" + ("" if "\nbuild:" in f"\n{text}" else "image: a\n")
    context = specfile.Context(
        file="doc", directory=CONTEXT.directory, home=CONTEXT.home,
        variables={**CONTEXT.variables, "WANDB_API_KEY": "k"}, env_files=CONTEXT.env_files, secrets=CONTEXT.secrets,
    )  # fmt: skip
    assert specfile.parse(text, context)


def test_the_schema_beside_the_page_is_the_one_that_the_command_prints() -> None:
    path = ROOT / "docs/job-file.schema.json"
    printed = json.dumps(specfile.schema(), indent=2) + "\n"
    assert path.read_text() == printed, "gpujobs schema > docs/job-file.schema.json"


def test_links_to_files_lead_somewhere() -> None:
    for page in (PAGE, ROOT / "examples/README.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
        for anchor in re.findall(r"\]\(#([^)]+)\)", page.read_text()):
            titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
