"""docs/security.md names tests: each of them exists, and none of the attacks is missing there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/security.md").read_text()
NAMED = re.findall(r"`((?:attacks|e2e|integration|unit)/\w+\.py)::(\w+)`", PAGE)


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {function.name for function in functions if function.name.startswith("test_")}


def test_every_test_that_the_page_names_exists() -> None:
    assert len(NAMED) > 60
    missing = [f"{file}::{name}" for file, name in NAMED if name not in names_in(ROOT / "tests" / file)]
    assert missing == []


SHOWING = {
    # that an attack works where nothing is defended, or that what is defended is still of use
    "test_nothing_that_the_probe_tried_is_left_untested",
    "test_what_a_job_left_in_root_and_read_only_directories_is_nothing",
    "test_containers_on_the_default_network_reach_each_other",
    "test_the_network_of_jobs_lets_nobody_talk",
    "test_a_shell_acts_on_such_a_text",
    "test_a_database_acts_on_such_a_text",
    "test_a_reader_that_trusts_its_input_falls_over_the_same_bytes",
}


def test_every_attack_is_on_the_page() -> None:
    named = {name for _, name in NAMED}
    attacks = {name for path in (ROOT / "tests/attacks").glob("test_*.py") for name in names_in(path)}
    assert attacks - named - SHOWING == set()


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
