import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gpujobs import simulated
from gpujobs.core.errors import InvalidInput
from gpujobs.core.inventory import Health, Link
from gpujobs.core.place import NoPlacement, Placement, place
from gpujobs.core.spec import GpuRequest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "simulated").glob("*.yaml"))
GIB = 1 << 30

GOOD = """\
gpus:
  - {model: NVIDIA A100, memory: 40GB}
cpus: 8
memory: 64GB
"""


def test_the_named_machines_are_there():
    assert {path.stem for path in FILES} == {
        "dgx-a100",
        "dgx-h100",
        "two-rtx4090",
        "mixed",
        "mig-a100",
        "one-t4",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_named_machine_says_that_it_is_simulated_and_can_be_placed_on(path):
    machine = simulated.load(path)
    inventory = simulated.SimulatedGpus(machine, clock=lambda: 7.0).snapshot()

    assert machine.name == path.stem
    assert (inventory.simulated, inventory.taken_at, inventory.problem) == (True, 7.0, "")
    assert {gpu.health for gpu in inventory.gpus} == {Health.SIMULATED}
    assert [gpu.index for gpu in inventory.gpus] == list(range(len(inventory.gpus)))
    assert all(gpu.capability and gpu.memory_bytes > GIB for gpu in inventory.gpus)
    whole = sum(not gpu.mig_enabled for gpu in inventory.gpus)
    assert isinstance(place(GpuRequest(count=whole, max_count=whole), {}, {}, inventory), Placement)
    more = place(GpuRequest(count=whole + 1, max_count=whole + 1), {}, {}, inventory)
    assert isinstance(more, NoPlacement)
    assert not more.possible_later


def test_links_are_those_of_the_file():
    inventory = simulated.load(ROOT / "configs/simulated/dgx-a100.yaml").inventory
    uuids = [gpu.uuid for gpu in inventory.gpus]
    assert inventory.nvlink_count(uuids[0], uuids[7]) == 12
    assert inventory.pcie_path(uuids[2], uuids[3]) is Link.MULTI_SWITCH
    assert inventory.pcie_path(uuids[1], uuids[2]) is Link.SYSTEM
    inventory = simulated.load(ROOT / "configs/simulated/mixed.yaml").inventory
    uuids = [gpu.uuid for gpu in inventory.gpus]
    assert [inventory.nvlink_count(uuids[0], u) for u in uuids[1:]] == [12, 0, 0, 0]
    assert inventory.link(uuids[0], uuids[2]) is Link.HOST_BRIDGE


def test_mig_devices_are_those_of_the_file():
    gpus = simulated.load(ROOT / "configs/simulated/mig-a100.yaml").inventory.gpus
    assert [[mig.profile for mig in gpu.mig] for gpu in gpus] == [
        ["3g.20gb", "2g.10gb", "1g.5gb", "1g.5gb"],
        ["1g.5gb"] * 7,
        [],
    ]
    assert gpus[0].mig[0].memory_bytes == 20 * GIB
    assert [gpu.mig_enabled for gpu in gpus] == [True, True, False]
    assert len({mig.uuid for gpu in gpus for mig in gpu.mig}) == 11


def test_what_may_be_missing_has_a_default(tmp_path):
    path = tmp_path / "lab.yaml"
    path.write_text(GOOD)
    machine = simulated.load(path)
    (gpu,) = machine.inventory.gpus
    assert (machine.name, machine.cpus, machine.memory_bytes) == ("lab", 8, 64 * GIB)
    assert (gpu.capability, gpu.numa, gpu.mig_enabled, gpu.memory_bytes) == (None, 0, False, 40 * GIB)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["m.yaml:1:1: the file is empty; it needs the keys gpus, cpus and memory"]),
        ("gpus: [", ["m.yaml:2:1: not valid YAML: brackets do not match"]),
        ("gpus: \x01", [r"m.yaml:1:7: control character \x01 in the file"]),
        (b"gpus: \xff\n", ["m.yaml:1:7: byte 0xff is not UTF-8"]),
        ("gpus: " + "[" * 100_000, ["m.yaml:1:30: lists and mappings are nested more than 24 deep"]),
        ("gpus:\n\t- model: T4\n", ["m.yaml:2:1: a tab indents this line; indent with spaces"]),
        (GOOD + "---\na: 1\n", ["m.yaml:5:1: a second document begins; a file is one machine"]),
        (GOOD.replace("cpus: 8", "cpus: !!int 8"), ["m.yaml:3:7: tag '!!int' is not allowed; leave it out"]),
        (
            "gpsu: 1\n",
            [
                "m.yaml:1:1: cpus: is missing",
                "m.yaml:1:1: gpsu: unknown key; allowed are name, gpus, links, cpus, memory",
                "m.yaml:1:1: gpus: is missing",
                "m.yaml:1:1: memory: is missing",
            ],
        ),
        ("[]", ["m.yaml:1:1: expected keys (name, gpus, links, cpus, memory)"]),
        (GOOD + "cpus: 9\n", ["m.yaml:5:1: cpus: the key is given twice (also in line 3); keep one"]),
        (GOOD.replace("cpus: 8", "cpus: 0"), ["m.yaml:3:7: cpus: expected a whole number from 1 to 4096"]),
        (
            GOOD.replace("64GB", "-1"),
            ["m.yaml:4:9: memory: expected a size such as 40GB, 81559MiB or a number"],
        ),
        (GOOD.replace("40GB", "40XB"), ["m.yaml:2:34: gpus[0].memory: expected a size"]),
        (GOOD.replace("model: NVIDIA A100, ", ""), ["m.yaml:2:5: gpus[0].model: is missing"]),
        (GOOD.replace("NVIDIA A100", "[a]"), ["m.yaml:2:13: gpus[0].model: expected a text"]),
        (
            GOOD.replace("40GB}", "40GB, capability: 8}"),
            ['gpus[0].capability: expected major.minor, such as "8.0"'],
        ),
        (GOOD.replace("40GB}", "40GB, count: 3, numa: [0, 1]}"), ["gpus[0].numa: 2 numbers for 3 GPUs"]),
        (
            GOOD.replace("40GB}", "40GB, mig: [half]}"),
            ["gpus[0].mig[0]: expected a MIG profile, such as 3g.20gb"],
        ),
        (
            GOOD.replace("40GB}", "40GB, mig: [4g.20gb, 4g.20gb, 1g.5gb]}"),
            [
                "gpus[0].mig: 45 GB in sum, the GPU has 40.0 GiB",
                "gpus[0].mig: 9 compute slices in sum, a GPU has 7",
            ],
        ),
        (
            GOOD.replace("40GB}", "40GB, count: 257}"),
            ["gpus[0].count: expected a whole number from 1 to 256"],
        ),
        (
            GOOD.replace("cpus: 8", "  - {model: X, memory: 1g, count: 256}\ncpus: 8"),
            ["m.yaml:2:3: gpus: 257 GPUs, at most 256"],
        ),
        (GOOD + "links: {pairs: [[0, 1]]}\n", ["links.pairs[0]: expected [index, index, number of NVLinks]"]),
        (GOOD + "links: {pairs: [[0, 0, 4]]}\n", ["links.pairs[0]: a GPU has no link to itself"]),
        (GOOD + "links: {pairs: [[0, 5, 4]]}\n", ["links.pairs[0][1]: expected a whole number from 0 to 0"]),
        (
            GOOD + "links: {same_numa: FAST}\n",
            ["links.same_numa: expected one of SYS, NODE, PHB, PXB, PIX, PSB"],
        ),
        (GOOD + "links: {groups: [{gpus: [0]}]}\n", ["links.groups[0]: expected gpus (indexes) and path"]),
        (GOOD + "links: {nvlink: many}\n", ["links.nvlink: expected a whole number from 0 to 64"]),
        (
            GOOD + "links: 3\n",
            ["m.yaml:5:8: links: expected keys (nvlink, pairs, same_numa, other_numa, groups)"],
        ),
        (GOOD.replace("  - {", "  {").replace("}", "}"), ["m.yaml:2:3: gpus: expected a list"]),
    ],
)
def test_every_mistake_is_told_with_its_position(text, problems):
    with pytest.raises(InvalidInput) as caught:
        simulated.parse(text, "m.yaml")

    told = [str(problem) for problem in caught.value.problems]
    assert len(told) == len(problems), told
    for expected, line in zip(problems, told, strict=True):
        assert expected in line
        assert line.startswith("m.yaml:")
    assert caught.value.exit == 2
    assert caught.value.message.endswith("in the machine file")


def test_a_file_that_cannot_be_read_is_an_error_in_words(tmp_path):
    with pytest.raises(InvalidInput, match="No such file"):
        simulated.load(tmp_path / "none.yaml")
    for path in (tmp_path / "big.yaml", Path("/dev/zero")):
        (tmp_path / "big.yaml").write_bytes(b"#" * 10_000_000)
        with pytest.raises(InvalidInput) as caught:
            simulated.load(path)
        assert "at most 1,048,576" in str(caught.value.problems[0])


def test_entries_may_share_what_an_anchor_names():
    text = "x-card: &card {model: NVIDIA A100, memory: 40GB}\ngpus: [{<<: *card, numa: 1}, *card]\n"
    text += "cpus: 8\nmemory: 64GB\n"
    gpus = simulated.parse(text).inventory.gpus
    assert [(gpu.memory_bytes, gpu.numa) for gpu in gpus] == [(40 << 30, 1), (40 << 30, 0)]


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["8.0", "40GB", "3g.20gb", "PIX"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [*simulated.MACHINE_KEYS, *simulated.GPU_KEYS, *simulated.LINK_KEYS, "path", "x"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=30,
)


@settings(max_examples=200, deadline=None)
@given(JUNK)
def test_whatever_is_in_a_file_there_is_a_machine_or_words(junk):
    text = yaml.safe_dump(junk, allow_unicode=True)
    with contextlib.suppress(InvalidInput):
        assert simulated.parse(text, "junk.yaml").inventory.simulated


def test_the_documented_example_is_valid_and_every_key_is_documented():
    page = (ROOT / "docs" / "simulated-machines.md").read_text()
    example = page.split("```yaml\n")[1].split("```")[0]
    machine = simulated.parse(example, "example.yaml")
    assert len(machine.inventory.gpus) == 3
    for key in (*simulated.MACHINE_KEYS, *simulated.GPU_KEYS, *simulated.LINK_KEYS, "path"):
        assert f"{key}:" in example
    for word in simulated.LEVELS:
        assert f"`{word}`" in page
