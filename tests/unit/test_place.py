import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpujobs.core import fits, topology
from gpujobs.core.inventory import Gpu, Health, Inventory, Link, Process, pair
from gpujobs.core.place import Holding, NoPlacement, Placement, place, strangers
from gpujobs.core.spec import GpuRequest
from gpujobs.simulated import assemble
from gpujobs.testing import (
    GIB,
    MIB,
    FakeGpus,
    MachineBuilder,
    dgx1_p100,
    dgx1_v100,
    dgx_a100,
    dgx_h100,
    mig_a100,
    mixed,
    one_t4,
    two_socket_rtx,
)

SCORE = {
    Link.SYSTEM: 10,
    Link.NODE: 20,
    Link.HOST_BRIDGE: 30,
    Link.MULTI_SWITCH: 40,
    Link.SINGLE_SWITCH: 50,
    Link.BOARD: 60,
}


def ask(count=1, most=None, **more):
    return GpuRequest(count=count, max_count=most or count, **more)


def taken(machine, *indexes, job="9"):
    return {machine.gpus[i].uuid: (Holding(job),) for i in indexes}


def indexes(machine, outcome):
    assert isinstance(outcome, Placement), outcome
    order = {gpu.uuid: gpu.index for gpu in machine.gpus}
    return [order[uuid] for uuid in outcome.uuids]


def reasons(outcome):
    return {choice.uuid: choice.reason for choice in outcome.choices}


def pair_score(machine, a, b):
    """What a pair is worth, told without the code under test."""
    key = pair(machine.gpus[a].uuid, machine.gpus[b].uuid)
    path = machine.pcie.get(key)
    return 100 * machine.nvlinks.get(key, 0) + (0 if path is None else SCORE[path])


def set_score(machine, members):
    return sum(pair_score(machine, a, b) for a, b in itertools.combinations(sorted(members), 2))


def oracle(machine, free, eligible, size):
    """The best set by looking at every one."""
    return max(
        itertools.combinations(sorted(eligible), size),
        key=lambda chosen: (
            set_score(machine, chosen),
            set_score(machine, set(free) - set(chosen)),
            -sum(machine.gpus[i].memory_bytes // MIB for i in chosen),
            [-i for i in chosen],
        ),
        default=None,
    )


def random_machine(seed, count, *, models=1):
    rnd = random.Random(seed)
    machine = MachineBuilder(f"random-{seed}")
    for index in range(count):
        machine.gpu("NVIDIA Test", rnd.choice([16, 24, 40][:models]) * GIB, (8, 0), numa=index * 2 // count)
    for a, b in itertools.combinations(range(count), 2):
        machine.nvlink(a, b, rnd.choice([0, 0, 1, 2, 4])).path(a, b, rnd.choice(list(SCORE)))
    return machine.build()


# ---------------------------------------------------------------- published cases of NVIDIA's go-gpuallocator


PUBLISHED_CHOICES = [
    # besteffort_test.go, TestBestEffortAllocate on the Volta DGX-1: what is free, how many, what it chooses
    ([0, 2, 4, 5], 2, [4, 5]),
    ([0, 4, 5, 6], 2, [5, 6]),
    ([0, 1, 3], 2, [0, 3]),
    ([0, 1, 4], 2, [0, 4]),
]


@pytest.mark.parametrize(("free", "size", "theirs"), PUBLISHED_CHOICES)
def test_published_choices_are_met_or_bettered(free, size, theirs):
    machine = dgx1_v100()
    held = taken(machine, *(set(range(8)) - set(free)))

    outcome = place(ask(size), held, {}, machine)

    ours = indexes(machine, outcome)
    assert set(ours) <= set(free)
    assert outcome.link_sum == set_score(machine, ours) >= set_score(machine, theirs)


PUBLISHED_SEQUENCES = [
    # besteffort_test.go and staticdgx_test.go: one allocation after another, until nothing is left
    (two_socket_rtx, 1, [[0], [1], [2], [3]]),
    (two_socket_rtx, 2, [[0, 3], [1, 2]]),
    (two_socket_rtx, 4, [[0, 1, 2, 3]]),
    (dgx1_p100, 1, [[i] for i in range(8)]),
    (dgx1_p100, 2, [[0, 2], [1, 3], [4, 6], [5, 7]]),
    (dgx1_p100, 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    (dgx1_p100, 8, [list(range(8))]),
    (dgx1_v100, 1, [[i] for i in range(8)]),
    (dgx1_v100, 2, [[0, 3], [1, 2], [4, 7], [5, 6]]),
    (dgx1_v100, 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    (dgx1_v100, 8, [list(range(8))]),
]


@pytest.mark.parametrize(("build", "size", "theirs"), PUBLISHED_SEQUENCES)
def test_published_sequences_are_met_or_bettered_in_sum_at_every_step(build, size, theirs):
    machine = build()
    held, ours = {}, []
    for step in range(len(theirs)):
        chosen = indexes(machine, place(ask(size), held, {}, machine))
        ours.append(chosen)
        held |= taken(machine, *chosen)
        so_far = [sum(set_score(machine, s) for s in sets) for sets in (ours, theirs[: step + 1])]
        assert so_far[0] >= so_far[1]

    assert isinstance(place(ask(1), held, {}, machine), NoPlacement)
    assert sorted(itertools.chain(*ours)) == list(range(len(machine.gpus)))


@pytest.mark.parametrize(("build", "size", "theirs"), PUBLISHED_SEQUENCES)
def test_from_each_published_state_the_own_link_sum_is_as_good_or_better(build, size, theirs):
    machine = build()
    for step, chosen in enumerate(theirs):
        held = taken(machine, *itertools.chain(*theirs[:step]))
        outcome = place(ask(size), held, {}, machine)
        assert outcome.link_sum >= set_score(machine, chosen)


# ------------------------------------------------------------------ against looking at every set


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 8),
    models=st.integers(1, 3),
    busy=st.sets(st.integers(0, 7)),
    small=st.booleans(),
    data=st.data(),
)
def test_the_choice_is_the_best_of_all_sets(seed, count, models, busy, small, data):
    machine = random_machine(seed, count, models=models)
    free = set(range(count)) - busy
    eligible = {i for i in free if not small or machine.gpus[i].memory_bytes > 20 * GIB}
    size = data.draw(st.integers(1, count))
    request = ask(size, memory=24 * GIB if small else None)

    outcome = place(request, taken(machine, *(busy & set(range(count)))), {}, machine)

    best = oracle(machine, free, eligible, size)
    if best is None:
        assert isinstance(outcome, NoPlacement)
    else:
        assert tuple(indexes(machine, outcome)) == best
        assert outcome.link_sum == set_score(machine, best)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [2, 5])
def test_twelve_gpus_are_searched_exactly(seed, size):
    machine = random_machine(seed, 12)

    assert tuple(indexes(machine, place(ask(size), {}, {}, machine))) == oracle(
        machine, range(12), range(12), size
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 8), size=st.integers(2, 8))
def test_pairwise_nvlink_finds_a_set_exactly_where_there_is_one(seed, count, size):
    machine = random_machine(seed, count)
    cliques = [
        members
        for members in itertools.combinations(range(count), size)
        if all(
            machine.nvlink_count(machine.gpus[a].uuid, machine.gpus[b].uuid)
            for a, b in itertools.combinations(members, 2)
        )
    ]

    outcome = place(ask(size, link="nvlink"), {}, {}, machine)

    if cliques:
        chosen = tuple(indexes(machine, outcome))
        assert chosen in cliques
        assert outcome.link_sum == max(set_score(machine, clique) for clique in cliques)
    else:
        assert isinstance(outcome, NoPlacement)
        assert not outcome.possible_later


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 8), size=st.integers(1, 4))
def test_same_numa_stays_on_the_best_node(seed, count, size):
    machine = random_machine(seed, count)
    nodes = {}
    for gpu in machine.gpus:
        nodes.setdefault(gpu.numa, []).append(gpu.index)
    best = [oracle(machine, range(count), members, size) for members in nodes.values()]
    best = [chosen for chosen in best if chosen]

    outcome = place(ask(size, link="same-numa"), {}, {}, machine)

    if best:
        chosen = indexes(machine, outcome)
        if size > 1:
            assert len({machine.gpus[i].numa for i in chosen}) == 1
        assert outcome.link_sum == max(set_score(machine, s) for s in best)
    else:
        assert isinstance(outcome, NoPlacement)


# ------------------------------------------------------------------ machines with more than 16 GPUs


def boards(count, each, links):
    machine = MachineBuilder(f"boards-{count}-{each}")
    for index in range(count * each):
        machine.gpu("NVIDIA Test", 80 * GIB, (9, 0), numa=index // each)
    for a, b in itertools.combinations(range(count * each), 2):
        if a // each == b // each:
            machine.nvlink(a, b, links)
    return machine.sockets().build()


@pytest.mark.parametrize("size", [1, 2, 4, 7, 8])
def test_on_64_gpus_a_set_that_fits_one_board_stays_on_one(size):
    machine = boards(8, 8, 6)
    held = taken(machine, 0, 1, 2, 9, 10)

    chosen = indexes(machine, place(ask(size), held, {}, machine))

    assert len({i // 8 for i in chosen}) == 1


@pytest.mark.parametrize(("size", "fewest"), [(9, 2), (16, 2), (20, 3), (24, 3), (60, 8)])
def test_on_64_gpus_a_larger_set_takes_as_few_boards_as_possible(size, fewest):
    machine = boards(8, 8, 6)

    chosen = indexes(machine, place(ask(size), {}, {}, machine))

    per_board = Counter(i // 8 for i in chosen)
    assert len(per_board) == fewest
    assert sum(count == 8 for count in per_board.values()) == size // 8


def test_within_one_switch_of_72_gpus_equals_are_taken_in_order():
    machine = boards(1, 72, 18)

    assert indexes(machine, place(ask(40), taken(machine, 3), {}, machine)) == [
        i for i in range(41) if i != 3
    ]


def test_a_domain_of_up_to_sixteen_is_exact_also_on_a_large_machine():
    rnd = random.Random(7)
    machine = MachineBuilder("four-domains")
    for index in range(40):
        machine.gpu("NVIDIA Test", 80 * GIB, (9, 0), numa=index // 10)
    for a, b in itertools.combinations(range(40), 2):
        if a // 10 == b // 10:
            machine.nvlink(a, b, rnd.randrange(1, 5))
    machine = machine.sockets().build()
    best = max(
        set_score(machine, chosen)
        for domain in range(4)
        for chosen in itertools.combinations(range(10 * domain, 10 * domain + 10), 5)
    )

    assert place(ask(5), {}, {}, machine).link_sum >= best


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 4))
def test_on_18_unordered_gpus_no_exchange_of_one_would_be_better(seed, size):
    machine = random_machine(seed, 18)

    chosen = indexes(machine, place(ask(size), {}, {}, machine))

    own = set_score(machine, chosen)
    for out in chosen:
        for into in set(range(18)) - set(chosen):
            assert set_score(machine, {*chosen, into} - {out}) <= own


def test_a_large_machine_with_shares_prefers_what_is_shared_already():
    machine = boards(1, 20, 18)
    held = {machine.gpus[13].uuid: (Holding("4", 10 * GIB),)}

    assert indexes(machine, place(ask(1, share=20 * GIB), held, {}, machine)) == [13]
    assert indexes(machine, place(ask(2, share=20 * GIB), held, {}, machine)) == [0, 13]


# ------------------------------------------------------------------ named hardware


def test_pairs_go_where_the_links_are_and_leave_the_rest_linked():
    machine = dgx1_v100()
    first = indexes(machine, place(ask(2), {}, {}, machine))
    assert set_score(machine, first) == 250
    second = indexes(machine, place(ask(4), taken(machine, *first), {}, machine))
    assert second == [4, 5, 6, 7]


def test_one_gpu_does_not_break_a_bridged_pair_where_another_is_free():
    machine = two_socket_rtx()

    chosen = indexes(machine, place(ask(1), taken(machine, 0), {}, machine))

    assert chosen == [3]


def test_on_a_switched_machine_equals_are_taken_in_order():
    for build in (dgx_a100, dgx_h100):
        machine = build()
        assert indexes(machine, place(ask(4), {}, {}, machine))[0] == 0
        assert place(ask(8, link="nvlink"), {}, {}, machine).uuids == tuple(g.uuid for g in machine.gpus)


def test_on_the_mesh_all_eight_are_not_joined_pairwise():
    machine = dgx1_v100()

    outcome = place(ask(8, link="nvlink"), {}, {}, machine)

    assert not outcome.possible_later
    assert outcome.message == "8 GPUs asked, and no 8 on this machine are joined pairwise by NVLink"
    assert indexes(machine, place(ask(4, link="nvlink"), {}, {}, machine)) == [0, 1, 2, 3]


def test_a_request_for_one_node_waits_for_that_node():
    machine = dgx_h100()

    outcome = place(ask(4, link="same-numa"), taken(machine, 0, 5), {}, machine)

    assert outcome.possible_later
    assert outcome.message == "4 GPUs asked, 6 free, but not 4 on one NUMA node: 2 taken"
    assert outcome.reasons == {"link": 6, "taken": 2}


# ------------------------------------------------------------------ filters


def test_the_smallest_gpu_that_fits_is_taken():
    machine = mixed()
    flat = replace(machine, links={}, nvlinks={}, pcie={})

    assert indexes(flat, place(ask(1), {}, {}, flat)) == [3]
    assert indexes(flat, place(ask(1, memory=24 * GIB), {}, {}, flat)) == [2]
    assert indexes(flat, place(ask(1, memory=40 * GIB), {}, {}, flat)) == [0]


@pytest.mark.parametrize(
    ("gib", "reported_mib", "fits_it"),
    [
        (40, 40960, True),  # A100-SXM4-40GB
        (40, 40536, True),  # the same under older drivers
        (16, 15360, True),  # T4, ECC on
        (24, 23028, True),  # A10, ECC on
        (24, 24564, True),  # RTX 4090
        (48, 46068, True),  # L40S
        (80, 81559, True),  # H100
        (40, 24576, False),
        (80, 40960, False),
        (48, 40960, False),
        (24, 16384, False),
        (12, 11264, False),  # RTX 2080 Ti: 11 GB
        (16, 12288, False),
    ],
)
def test_memory_is_asked_by_the_size_that_a_card_is_sold_with(gib, reported_mib, fits_it):
    machine = MachineBuilder("one").gpu("NVIDIA Test", reported_mib * MIB, (8, 0)).build()

    assert isinstance(place(ask(1, memory=gib * GIB), {}, {}, machine), Placement) is fits_it


@pytest.mark.parametrize(
    ("wanted", "model", "matches"),
    [
        ("A100", "NVIDIA A100-SXM4-40GB", True),
        ("a100", "NVIDIA A100-SXM4-40GB", True),
        ("A10", "NVIDIA A100-SXM4-40GB", False),
        ("A10", "NVIDIA A10", True),
        ("A10", "NVIDIA A10G", False),
        ("A10*", "NVIDIA A10G", True),
        ("*A100*", "NVIDIA A100-SXM4-40GB", True),
        ("a100-sxm?-*", "NVIDIA A100-SXM4-40GB", True),
        ("A100-PCIE", "NVIDIA A100-SXM4-40GB", False),
        ("RTX 4090", "NVIDIA GeForce RTX 4090", True),
        ("4090", "NVIDIA GeForce RTX 4090", True),
        ("409", "NVIDIA GeForce RTX 4090", False),
        ("RTX 40[789]0", "NVIDIA GeForce RTX 4090", True),
        ("geforce*", "NVIDIA GeForce RTX 4090", True),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090", True),
        ("H100", "NVIDIA H100 80GB HBM3", True),
        ("T4", "Tesla T4", True),
        ("(", "Tesla T4", False),
        ("*", "Tesla T4", True),
    ],
)
def test_models_are_names_or_globs_in_any_case(wanted, model, matches):
    assert fits.matches_model(wanted, model) is matches


def test_any_of_several_models_serves():
    machine = mixed()
    assert indexes(machine, place(ask(3, model=("A100", "RTX*")), {}, {}, machine)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("sign", "version", "expected"),
    [
        (">=", (8, 0), [0, 1, 2]),
        (">", (8, 0), [2]),
        ("==", (7, 5), [3, 4]),
        ("<", (8, 0), [3, 4]),
        ("<=", (8, 0), [0, 1, 3, 4]),
        (">=", (7, 10), [0, 1, 2]),
    ],
)
def test_capabilities_are_compared_as_versions(sign, version, expected):
    machine = mixed()
    request = ask(1, 5, capability=(sign, version))
    assert indexes(machine, place(request, {}, {}, machine)) == expected


def test_a_range_takes_as_many_as_there_are():
    machine = dgx_a100()
    assert len(place(ask(1, 4), {}, {}, machine).uuids) == 4
    assert len(place(ask(1, 4), taken(machine, *range(5)), {}, machine).uuids) == 3
    assert len(place(ask(2, 16), {}, {}, machine).uuids) == 8
    outcome = place(ask(4, 6), taken(machine, *range(5)), {}, machine)
    assert outcome.message == "4-6 GPUs asked, 3 free: 5 taken"


def test_a_range_stays_within_what_its_links_allow():
    machine = dgx_h100()
    assert len(place(ask(2, 8, link="same-numa"), {}, {}, machine).uuids) == 4


def test_uuids_limit_the_choice():
    machine = dgx_a100()
    wanted = (machine.gpus[6].uuid, machine.gpus[1].uuid)

    outcome = place(ask(2, uuid=wanted), {}, {}, machine)
    assert indexes(machine, outcome) == [1, 6]
    assert reasons(outcome)[machine.gpus[0].uuid] == "not among the UUIDs asked for"

    waiting = place(ask(2, uuid=wanted), taken(machine, 6), {}, machine)
    assert waiting.possible_later
    never = place(ask(1, uuid=("GPU-of-another-machine",)), {}, {}, machine)
    assert not never.possible_later


def test_no_gpu_asked_is_a_placement_of_none():
    assert place(GpuRequest(), {}, {}, Inventory(problem="no driver")) == Placement(())


def test_without_gpus_a_request_can_never_start_and_the_problem_is_told():
    outcome = place(ask(1), {}, {}, Inventory(problem="The NVIDIA kernel driver is not loaded."))

    assert outcome == NoPlacement(
        False, "1 GPU asked, and this machine has no GPU: The NVIDIA kernel driver is not loaded."
    )


# ------------------------------------------------------------------ health, strangers, reservations


def test_lost_and_quarantined_gpus_are_not_given_and_may_come_back():
    source = FakeGpus(dgx_a100())
    source.lose(source.inventory.gpus[0].uuid)
    source.change(source.inventory.gpus[1].uuid, health=Health.QUARANTINED, xid=48)
    machine = source.inventory

    assert indexes(machine, place(ask(1, 8), {}, {}, machine)) == [2, 3, 4, 5, 6, 7]
    outcome = place(ask(7), {}, {}, machine)
    assert outcome.possible_later
    assert outcome.message == "7 GPUs asked, 6 free: 1 lost, 1 quarantined"
    assert reasons(outcome)[machine.gpus[1].uuid] == "quarantined after XID 48"


def test_a_gpu_that_was_never_seen_whole_may_be_what_is_asked():
    unknown = Gpu(uuid="lost-0", index=0, minor=None, model="", memory_bytes=0, health=Health.LOST)
    machine = Inventory(gpus=(unknown, *one_t4().gpus))

    assert place(ask(2), {}, {}, machine).possible_later
    assert place(ask(1, model=("H100",)), {}, {}, machine).possible_later
    assert not place(ask(2, model=("H100",)), {}, {}, machine).possible_later
    assert not place(ask(3), {}, {}, machine).possible_later


def test_simulated_gpus_are_given():
    machine = one_t4()
    machine = replace(machine, gpus=tuple(replace(g, health=Health.SIMULATED) for g in machine.gpus))
    assert indexes(machine, place(ask(1), {}, {}, machine)) == [0]


def test_strangers_are_avoided_and_named_and_system_services_are_not():
    source = FakeGpus(dgx_a100())
    gpus = source.inventory.gpus
    source.occupy(
        gpus[0].uuid,
        Process(pid=77, name="/usr/bin/python", user="alice", uid=1001),
        Process(pid=78, name="/usr/bin/python", user="bob", uid=1002),
    )
    source.occupy(
        gpus[1].uuid,
        Process(pid=5, name="/usr/lib/xorg/Xorg", kind="graphics", user="root"),
        Process(pid=6, name="/usr/bin/nv-hostengine", user="root"),
    )
    source.occupy(gpus[2].uuid, Process(pid=9, name="python", job="3", user="carol"))
    machine = source.inventory
    avoid = strangers(machine)

    assert avoid == {gpus[0].uuid: "stranger: python of alice (pid 77) and 1 more"}
    outcome = place(ask(8), taken(machine, 2, job="3"), avoid, machine)
    assert outcome.message == "8 GPUs asked, 6 free: 1 in use by python of alice, 1 taken"
    assert outcome.reasons == {"stranger": 1, "taken": 1}
    assert reasons(outcome)[gpus[0].uuid] == "stranger: python of alice (pid 77) and 1 more"
    assert reasons(outcome)[gpus[2].uuid] == "taken by job 3"
    assert reasons(place(ask(8), {}, {gpus[0].uuid: "stranger"}, machine))[gpus[0].uuid].startswith(
        "stranger: py"
    )


@pytest.mark.parametrize(
    ("why", "word", "phrase"),
    [
        ("reserved", "reserved", "1 reserved"),
        ("reserved: for carol until Monday", "reserved", "1 reserved"),
        ("held by container 0123456789ab", "avoided", "1 held by container 0123456789ab"),
        ("held by container x: made by hand", "avoided", "1 held by container x: made by hand"),
    ],
)
def test_what_is_avoided_is_told_with_the_reason_given(why, word, phrase):
    machine = dgx_a100()
    outcome = place(ask(8), {}, {machine.gpus[4].uuid: why}, machine)

    assert outcome.message == f"8 GPUs asked, 7 free: {phrase}"
    assert outcome.reasons == {word: 1}
    assert reasons(outcome)[machine.gpus[4].uuid] == why


# ------------------------------------------------------------------ shares


def test_shares_are_packed_where_they_leave_least():
    machine = dgx_a100()
    held = {
        machine.gpus[2].uuid: (Holding("1", 10 * GIB),),
        machine.gpus[5].uuid: (Holding("2", 20 * GIB), Holding("3", 5 * GIB)),
    }

    assert indexes(machine, place(ask(1, share=10 * GIB), held, {}, machine)) == [5]
    assert indexes(machine, place(ask(1, share=16 * GIB), held, {}, machine)) == [2]
    # Both are too full: a free one whose neighbour behind the PCIe switch is shared already.
    assert indexes(machine, place(ask(1, share=31 * GIB), held, {}, machine)) == [3]
    # Links come before packing: 4 and 5 share a PCIe switch, 2 and 5 do not.
    assert indexes(machine, place(ask(2, share=10 * GIB), held, {}, machine)) == [4, 5]


def test_a_shared_gpu_is_not_given_whole_and_a_whole_one_not_shared():
    machine = one_t4()
    uuid = machine.gpus[0].uuid
    shared = {uuid: (Holding("1", GIB), Holding("2", GIB))}

    whole = place(ask(1), shared, {}, machine)
    assert reasons(whole)[uuid] == "shared by job 1 and 2"
    share = place(ask(1, share=GIB), taken(machine, 0), {}, machine)
    assert (reasons(share)[uuid], share.possible_later) == ("taken by job 9", True)
    assert share.message == "a share of 1 GiB asked, 0 free: 1 taken"


def test_shares_never_exceed_the_memory_less_what_the_driver_and_the_desktop_use():
    source = FakeGpus(MachineBuilder("x").gpu("X", 24 * GIB, (8, 0), reserved_bytes=GIB).build())
    uuid = source.inventory.gpus[0].uuid
    source.occupy(uuid, Process(pid=5, name="Xorg", kind="graphics", memory_bytes=GIB))
    held = {uuid: (Holding("1", 12 * GIB),)}

    assert isinstance(place(ask(1, share=10 * GIB), held, {}, source.inventory), Placement)
    full = place(ask(1, share=11 * GIB), held, {}, source.inventory)
    assert full.message == "a share of 11 GiB asked, 0 free: 1 without enough memory left"
    assert reasons(full)[uuid] == "10 GiB left, 11 GiB asked"
    assert not place(ask(1, share=24 * GIB), {}, {}, source.inventory).possible_later


@settings(max_examples=60, deadline=None)
@given(requests=st.lists(st.sampled_from([0, 0, 2, 5, 9, 14, 16]), max_size=30), seed=st.integers(0, 99))
def test_no_gpu_is_given_twice_and_no_share_overflows(requests, seed):
    machine = random_machine(seed, 5, models=2)
    memory = {gpu.uuid: gpu.memory_bytes for gpu in machine.gpus}
    held = {}
    for number, gib in enumerate(requests):
        share = gib * GIB or None
        outcome = place(ask(1, share=share), held, {}, machine)
        if isinstance(outcome, Placement):
            (uuid,) = outcome.uuids
            held = {**held, uuid: (*held.get(uuid, ()), Holding(str(number), share))}
        else:
            assert len(outcome.choices) == 5
            assert all(choice.word for choice in outcome.choices)
    for uuid, holdings in held.items():
        if any(holding.share is None for holding in holdings):
            assert len(holdings) == 1
        else:
            assert sum(holding.share for holding in holdings) <= memory[uuid]


# ------------------------------------------------------------------ MIG


def test_a_gpu_in_mig_mode_is_never_given_whole():
    machine = mig_a100()

    assert indexes(machine, place(ask(1), {}, {}, machine)) == [2]
    outcome = place(ask(2), {}, {}, machine)
    assert not outcome.possible_later
    assert outcome.message == "2 GPUs asked, and only 1 of this machine can ever fit: 2 in MIG mode"
    assert isinstance(place(ask(1, share=GIB), taken(machine, 2), {}, machine), NoPlacement)


def test_a_mig_device_of_the_profile_is_given_from_the_busiest_gpu():
    machine = mig_a100()
    first, second = machine.gpus[:2]

    assert place(ask(1, mig="3g.20gb"), {}, {}, machine).uuids == (first.mig[0].uuid,)
    assert place(ask(1, mig="1G.5GB"), {}, {}, machine).uuids == (first.mig[2].uuid,)
    held = {second.mig[0].uuid: (Holding("5"),)}
    assert place(ask(1, mig="1g.5gb"), held, {}, machine).uuids == (second.mig[1].uuid,)
    many = place(ask(9, mig="1g.5gb"), {}, {}, machine)
    assert len(set(many.uuids)) == 9


def test_each_mig_device_that_is_not_given_has_its_reason():
    machine = mig_a100()
    first = machine.gpus[0].mig
    held = {first[0].uuid: (Holding("8"),)}

    outcome = place(ask(1, mig="3g.20gb"), held, {}, machine)

    assert outcome.possible_later
    told = reasons(outcome)
    assert told[first[0].uuid] == "taken by job 8"
    assert told[first[1].uuid] == "2g.10gb, 3g.20gb asked"
    assert told[machine.gpus[2].uuid] == "not in MIG mode"
    assert outcome.message == (
        "1 MIG device 3g.20gb asked, 0 free: 10 of another profile, 1 taken, 1 without MIG devices"
    )
    never = place(ask(1, mig="7g.40gb"), {}, {}, machine)
    assert not never.possible_later
    assert "none of this machine can ever fit" in never.message


def test_a_holding_of_the_gpu_covers_its_mig_devices():
    machine = mig_a100()
    held = taken(machine, 0, 1)

    assert isinstance(place(ask(1, mig="1g.5gb"), held, {}, machine), NoPlacement)


def test_mig_devices_are_asked_for_by_uuid_too():
    machine = mig_a100()
    wanted = machine.gpus[1].mig[4].uuid

    assert place(ask(1, uuid=(wanted,)), {}, {}, machine).uuids == (wanted,)


def test_a_stranger_on_one_mig_device_leaves_the_others():
    machine = mig_a100()
    gpu = machine.gpus[0]
    there = replace(gpu.mig[2], processes=(Process(pid=7, name="python", user="eve"),))
    machine = replace(machine, gpus=(replace(gpu, mig=(*gpu.mig[:2], there, gpu.mig[3])), *machine.gpus[1:]))
    avoid = strangers(machine)

    assert avoid == {there.uuid: "stranger: python of eve (pid 7)"}
    assert place(ask(1, mig="1g.5gb"), {}, avoid, machine).uuids == (gpu.mig[3].uuid,)


def test_mig_devices_are_not_joined_by_nvlink():
    machine = mig_a100()

    assert isinstance(place(ask(1, mig="1g.5gb", link="nvlink"), {}, {}, machine), Placement)
    assert not place(ask(2, mig="1g.5gb", link="nvlink"), {}, {}, machine).possible_later


# ------------------------------------------------------------------ properties of every answer


def shuffled(mapping, rnd):
    items = list(mapping.items())
    rnd.shuffle(items)
    return dict(items)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 8),
    size=st.integers(1, 9),
    spread=st.integers(0, 3),
    share=st.sampled_from([None, 4, 30]),
    link=st.sampled_from(["any", "same-numa", "nvlink"]),
    busy=st.dictionaries(st.integers(0, 7), st.sampled_from(["whole", "share", "reserved"])),
)
def test_answers_are_complete_lawful_and_independent_of_order(seed, count, size, spread, share, link, busy):
    machine = random_machine(seed, count, models=3)
    busy = {machine.gpus[i].uuid: what for i, what in busy.items() if i < count}
    held = {
        u: (Holding("1", 3 * GIB if what == "share" else None),)
        for u, what in busy.items()
        if what != "reserved"
    }
    avoid = {u: what for u, what in busy.items() if what == "reserved"}
    request = ask(size, size + spread, share=share and share * GIB, link=link)

    outcome = place(request, held, avoid, machine)

    rnd = random.Random(seed)
    mirrored = replace(
        machine,
        links=shuffled(machine.links, rnd),
        nvlinks=shuffled(machine.nvlinks, rnd),
        pcie=shuffled(machine.pcie, rnd),
    )
    assert place(request, shuffled(held, rnd), shuffled(avoid, rnd), mirrored) == outcome
    assert [choice.uuid for choice in outcome.choices] == [gpu.uuid for gpu in machine.gpus]
    assert all(choice.reason for choice in outcome.choices)
    if isinstance(outcome, Placement):
        assert size <= len(outcome.uuids) == len(set(outcome.uuids)) <= size + spread
        assert tuple(c.uuid for c in outcome.choices if c.chosen) == outcome.uuids
        assert not avoid.keys() & set(outcome.uuids)
        for uuid in outcome.uuids:
            assert uuid not in held or (share and held[uuid][0].share)
    else:
        assert not any(choice.chosen for choice in outcome.choices)
        assert sum(outcome.reasons.values()) == sum(bool(c.word) for c in outcome.choices)
        if not busy:
            assert not outcome.possible_later
        if outcome.possible_later:
            assert isinstance(place(request, {}, {}, machine), Placement)


def test_each_gpu_left_out_says_what_would_have_been_worse():
    machine = two_socket_rtx()
    pair_told = reasons(place(ask(2), {}, {}, machine))
    assert pair_told[machine.gpus[1].uuid] == "another set has faster links"
    one_told = reasons(place(ask(1), taken(machine, 0), {}, machine))
    assert one_told[machine.gpus[1].uuid] == "left free: the others would stay less well linked without it"
    even = dgx_a100()
    assert (
        reasons(place(ask(1), {}, {}, even))[even.gpus[7].uuid] == "an equal one with a lower index was taken"
    )
    unlinked = replace(mixed(), links={}, nvlinks={}, pcie={})
    small = reasons(place(ask(1), {}, {}, unlinked))
    assert small[unlinked.gpus[0].uuid] == "left free: a smaller GPU serves"
    flat = replace(dgx_a100(), links={}, nvlinks={}, pcie={})
    held = {flat.gpus[1].uuid: (Holding("1", GIB),), flat.gpus[2].uuid: (Holding("2", 2 * GIB),)}
    shares = reasons(place(ask(1, share=GIB), held, {}, flat))
    assert shares[flat.gpus[0].uuid] == "left whole: another GPU is shared already"
    assert shares[flat.gpus[1].uuid] == "another GPU has less left over"
    assert shares[flat.gpus[2].uuid] == "has 1 GiB to share"
    numa = dgx_h100()
    nodes = reasons(place(ask(4, link="same-numa"), {}, {}, numa))
    assert nodes[numa.gpus[7].uuid] == "on another NUMA node"
    mesh = dgx1_v100()
    apart = reasons(place(ask(4, link="nvlink"), {}, {}, mesh))
    assert apart[mesh.gpus[7].uuid] == "not linked to the chosen"


def test_the_filters_say_what_the_gpu_has_and_what_was_asked():
    machine = mixed()
    request = ask(1, memory=48 * GIB)
    outcome = place(request, {}, {}, machine)
    assert reasons(outcome)[machine.gpus[2].uuid] == "24 GiB, 48 GiB asked"
    assert outcome.message == "1 GPU asked, and none of this machine can ever fit: 5 too small"
    model = place(ask(4, model=("A100", "H100")), {}, {}, machine)
    assert reasons(model)[machine.gpus[3].uuid] == "Tesla T4, A100 or H100 asked"
    assert model.message == "4 GPUs asked, and only 2 of this machine can ever fit: 3 of another model"
    capability = place(ask(3, capability=(">=", (8, 0))), taken(machine, 0), {}, machine)
    assert reasons(capability)[machine.gpus[4].uuid] == "capability 7.5, >=8.0 asked"
    assert capability.possible_later


def test_the_scores_of_a_snapshot_are_computed_once():
    machine = dgx_a100()
    later = replace(machine, taken_at=5.0, gpus=tuple(replace(g, temperature_c=60) for g in machine.gpus))

    assert topology.topology_of(later) is topology.topology_of(machine)
    lost = replace(machine, gpus=machine.gpus[1:])
    assert len(topology.topology_of(lost).score) == 7


def test_a_pair_without_nvlinks_has_no_nvlink_score():
    gpus = dgx_a100().gpus[:2]
    machine = assemble(gpus, {(0, 1): 0}, {(0, 1): Link.SYSTEM}, simulated=False)

    assert place(ask(2), {}, {}, machine).link_sum == 10
    assert machine.link(gpus[0].uuid, gpus[1].uuid) is Link.SYSTEM
