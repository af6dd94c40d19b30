"""What holds of the project as a whole: its layers, its weight, and that its documentation is complete and true."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from gpujobs import settings as configuration
from gpujobs.adapters import enginelock
from gpujobs.core.errors import GpujobsError
from gpujobs.service.faults import POINTS, fault
from gpujobs.settings import Settings
from tests.arch import commands

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gpujobs"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# -- layers ---------------------------------------------------------------------------------------------------


def test_the_import_rules_hold() -> None:
    found = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stdout[-3000:]
    assert " 0 broken." in found.stdout


def test_the_rules_cover_every_module_and_every_forbidden_import() -> None:
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layered = [contract for contract in contracts if contract["type"] == "layers"]
    assert {name for contract in layered for name in contract["containers"]} == {"gpujobs", "gpujobs.service"}
    assert all(contract["exhaustive"] for contract in layered)
    pure = next(contract for contract in contracts if contract.get("source_modules") == ["gpujobs.core"])
    assert {"docker", "pynvml", "sqlite3", "subprocess", "socket", "asyncio", "threading", "pydantic", "yaml"} <= set(
        pure["forbidden_modules"]
    )


# -- weight ---------------------------------------------------------------------------------------------------

HEAVY = {"pydantic", "docker", "yaml", "starlette", "uvicorn", "pynvml", "sqlite3", "requests", "rich"}

LOADED = """
import sys
from gpujobs.__main__ import main
sys.argv = ["gpujobs", *sys.argv[1:]]
code = main()
print(code, *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["ps"], 4),
        (["ps", "--json"], 4),
        (["gpus"], 4),
        (["cancel", "12"], 4),
        (["run", "--help"], 0),
    ],
)
def test_a_command_that_only_asks_a_server_loads_nothing_heavy(argv: list[str], code: int, tmp_path: Path) -> None:
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "GPUJOBS_HOST": f"unix://{tmp_path}/none.sock"}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *argv],
        cwd=ROOT,
        env=environ,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    told, *modules = done.stderr.splitlines()[-1].split()
    assert int(told) == code, done.stderr
    assert not HEAVY & set(modules)


def test_the_commands_that_read_job_files_load_nothing_of_the_server(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("name: x\nimage: busybox\n")
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, "check", str(job)],
        cwd=ROOT,
        env=environ,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    told, *modules = done.stderr.splitlines()[-1].split()
    assert int(told) == 0, done.stderr
    assert not {"docker", "starlette", "uvicorn", "sqlite3", "pynvml"} & set(modules)


# -- size -----------------------------------------------------------------------------------------------------

MOST_LINES = 520

LONGER = {
    "gpujobs/core/spec.py": "the one model of the job file: its length is the number of keys",
    "gpujobs/testing/engine.py": "the fake Engine, with everything that the service reads of the real one",
    "gpujobs/service/loop.py": "all that changes the server's state, in one place and one thread",
    "gpujobs/service/attempts.py": "the steps of one attempt, in the order in which they are gone through",
    "gpujobs/service/doctor.py": "one gatherer of facts after another, none of which knows the others",
    "gpujobs/core/checkup.py": "one judgement after another, none of which knows the others",
}
"""Modules that are longer, each with the reason."""


def test_no_module_is_longer_than_one_can_keep_in_mind_but_for_those_with_a_reason() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    long = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert set(long) <= set(LONGER), {name: count for name, count in long.items() if name not in LONGER}
    assert max(lines.values()) <= 900, "a reason is no licence"


def test_every_module_says_what_it_is() -> None:
    assert [str(path) for path in SOURCES if not path.read_text().lstrip().startswith(('"""', 'r"""'))] == []


# -- fault points ---------------------------------------------------------------------------------------------


def used_points() -> Counter[str]:
    return Counter(name for path in SOURCES for name in re.findall(r'\bfault\("([^"]+)"\)', path.read_text()))


def test_every_fault_point_is_passed_at_exactly_one_place() -> None:
    assert used_points() == dict.fromkeys(POINTS, 1)


def test_a_point_that_is_not_listed_cannot_be_passed() -> None:
    with pytest.raises(KeyError, match="unheard-of"):
        fault("unheard-of")


@pytest.mark.parametrize(
    ("wanted", "passed", "dies"),
    [("released", 1, True), ("released:3", 2, False), ("released:3", 3, True), ("other", 5, False)],
)
def test_the_server_dies_at_the_named_point_and_time_and_nowhere_else(wanted: str, passed: int, dies: bool) -> None:
    code = (
        f"from gpujobs.service.faults import fault\nfault('decision-made')\nfor _ in range({passed}): fault('released')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"GPUJOBS_FAULT": wanted}, check=False, timeout=60
    )
    assert done.returncode == (-9 if dies else 0)


# -- documentation --------------------------------------------------------------------------------------------

OPERATIONS = (ROOT / "docs" / "operations.md").read_text()


def rows(heading: str) -> dict[str, list[str]]:
    """The rows of the table whose header begins with that word, by their first cell."""
    table = re.search(rf"^\| {heading} \|.*\n\|[ -|]+\n((?:\|.*\n)+)", OPERATIONS, re.MULTILINE)
    assert table is not None, heading
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[1].splitlines()]
    return {re.sub(r"^`([^`]+)`$", r"\1", row[0]): row[1:] for row in cells}


def test_operations_lists_every_fault_point_and_what_is_true_there() -> None:
    assert {name: cells[0] for name, cells in rows("point").items()} == POINTS


def test_operations_lists_every_setting_and_its_default() -> None:
    listed = {name: cells[0].strip("`") for name, cells in rows("setting").items()}
    assert list(listed) == [item.name for item in fields(Settings)]
    assert configuration.read("".join(f"{name}: {value}\n" for name, value in listed.items()), "doc") == Settings()


def test_operations_says_which_settings_wait_for_a_restart() -> None:
    assert {name for name, cells in rows("setting").items() if cells[1] == "at a restart"} == configuration.RESTART
    assert {cells[1] for cells in rows("setting").values()} == {"at a restart", "at a reload"}


def test_the_annotated_settings_are_the_defaults_and_each_is_explained() -> None:
    path = ROOT / "configs" / "server.yaml"
    assert configuration.load(path) == Settings()
    text = path.read_text()
    assert list(yaml.safe_load(text)) == [item.name for item in fields(Settings)]
    for item in fields(Settings):
        assert re.search(rf"^# .*\n(?:\w+: .*\n)*{item.name}:", text, re.MULTILINE), item.name


def test_operations_names_every_variable_that_the_server_reads() -> None:
    read = set()
    for path in (*PACKAGE.glob("*.py"), *(PACKAGE / "service").glob("*.py"), *(PACKAGE / "adapters").glob("*.py")):
        read |= set(re.findall(r'environ(?:\.get\(|\[)"([A-Z_]+)"', path.read_text()))
    known_elsewhere = {"HOME", "PATH", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"}
    assert {name for name in read - known_elsewhere if f"`{name}`" not in OPERATIONS} == set()


def test_every_command_is_documented_as_it_is() -> None:
    assert commands.PATH.read_text() == commands.page(), "run: python -m tests.arch.commands"


def test_every_command_says_what_it_does_and_shows_how_it_is_used() -> None:
    for name, command in commands.commands().items():
        assert command.help, name
        assert f"gpujobs {name}" in str(command.epilog), name
        for param in command.params:
            assert param.help, f"{name} {param.name}"


def test_no_page_links_to_what_is_not_there() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_error_class_is_told_with_its_exit_code() -> None:
    exits = {kind.exit for kind in GpujobsError.__subclasses__()}
    assert all(re.search(rf"\b{code}\b", commands.INTRO) for code in exits)


def test_the_locks_volume_is_documented_by_its_name() -> None:
    assert enginelock._NAME.fullmatch("gpujobs-lock-1")
    assert "`gpujobs-lock-N`" in OPERATIONS
