"""The job file, by its corpus: what is accepted, and exactly what is said about what is not."""

from __future__ import annotations

import os
import random
import resource
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from gpujobs import specfile
from gpujobs.core.errors import InvalidInput
from gpujobs.core.interpolate import substitute
from gpujobs.core.spec import Port, Ulimit, Volume
from gpujobs.core.values import typed
from gpujobs.yamltree import TextError, read
from tests.unit.corpus import CONTEXT, UUIDS, Case, load

BAD = load("bad.txt")
GOOD = load("good.txt")
FUZZ = int(os.environ.get("GPUJOBS_FUZZ", "2000"))


def problems(text: bytes | str, context: specfile.Context = CONTEXT) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        specfile.parse(text, context)
    assert caught.value.exit == 2
    assert caught.value.problems == tuple(sorted(caught.value.problems))
    return [str(problem) for problem in caught.value.problems]


def one(text: str) -> specfile.JobSpec:
    (element,) = specfile.parse(text, CONTEXT)
    assert element.index is None
    return element.spec


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.title)
def test_each_bad_file_is_refused_with_exactly_these_messages(case: Case) -> None:
    assert case.expected
    assert problems(case.text) == [f"job.yaml:{line}" for line in case.expected]


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.title)
def test_each_good_file_is_accepted(case: Case) -> None:
    assert specfile.parse(case.text, CONTEXT)
    assert specfile.parse(case.text.encode(), CONTEXT) == specfile.parse(case.text, CONTEXT)


def test_the_corpus_is_large_enough_to_mean_something() -> None:
    assert len(BAD) >= 90
    assert len(GOOD) >= 30
    assert len({case.title for case in BAD + GOOD}) >= len(BAD) + len(GOOD) - 1


# ---------------------------------------------------------------------------------------------- schema

SCHEMA = Draft202012Validator(specfile.schema())


def plain(value: object) -> object:
    """JSON values of what a file holds."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return typed(value) if type(value) is not str else value


def schema_accepts(text: str) -> bool:
    try:
        tree = read(text)
    except TextError:
        return False
    return SCHEMA.is_valid(plain(tree.value))


def test_the_schema_is_a_valid_one() -> None:
    Draft202012Validator.check_schema(specfile.schema())


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.title)
def test_the_schema_accepts_what_the_parser_accepts(case: Case) -> None:
    errors = [error.message for error in SCHEMA.iter_errors(plain(read(case.text).value))]
    assert errors == []


@pytest.mark.parametrize("case", [case for case in BAD if not case.parser_only], ids=lambda case: case.title)
def test_the_schema_refuses_what_the_parser_refuses(case: Case) -> None:
    assert not schema_accepts(case.text)


KNOWN_TO_THE_PARSER = [case for case in BAD if case.parser_only and case.parser_only != "parser only: YAML"]


@pytest.mark.parametrize("case", KNOWN_TO_THE_PARSER, ids=lambda case: case.title)
def test_what_only_the_parser_can_know_is_marked_so_rightly(case: Case) -> None:
    assert schema_accepts(case.text), "the schema refuses it too: the mark has to go"


def test_the_schema_offers_no_key_that_is_not_supported() -> None:
    from gpujobs.core.spec import SUPPORTED

    assert set(specfile.schema()["properties"]) == SUPPORTED
    assert all("description" in item for item in specfile.schema()["properties"].values())


# ---------------------------------------------------------------------------------------------- bytes, limits


def test_a_byte_order_mark_is_passed_over() -> None:
    assert specfile.parse(b"\xef\xbb\xbfname: t\nimage: a\n", CONTEXT)


@pytest.mark.parametrize(("text", "message"), [
    (b"name: t\nimage: \xff\n", "2:8: byte 0xff is not UTF-8; save the file as UTF-8"),
    ("name: b\u00e4\nimage: ä".encode("latin-1"), "1:8: byte 0xe4 is not UTF-8; save the file as UTF-8"),
    ("name: t".encode("utf-16"), "1:1: the file is UTF-16; save it as UTF-8"),
    (b"name: t\nimage: a\x00b\n", r"2:9: a NUL character in the file; remove it (in double quotes \x00)"),
    (b"name: \x1b[31m\n", r"1:7: control character \x1b in the file; remove it (in double quotes \x1b)"),
    ("name: \x9b31m\n", "1:7: character U+009B in the file; remove it"),
    ("name: \ud800\n", "1:7: character U+D800 in the file; remove it"),
    (b"", "1:1: the file is empty; write at least image: or build:"),
    (b"\n\n  \n", "1:1: the file is empty; write at least image: or build:"),
    (b"#" * 10_000_000, "1:1: the file has 10,000,000 bytes; at most 1,048,576 (1 MiB) are allowed"),
    ("ä" * 600_000, "1:1: the file has 1,200,000 bytes; at most 1,048,576 (1 MiB) are allowed"),
    ("a: " + "[" * 30, "1:27: lists and mappings are nested more than 24 deep"),
    ("[" * 1_000_000, "1:25: lists and mappings are nested more than 24 deep"),
    ("a: [" + "a," * 60_000 + "]", "1:99999: the file has more than 50,000 values (aliases count each time)"),
])  # fmt: skip
def test_a_text_that_cannot_be_read_is_answered_at_once(text: bytes | str, message: str) -> None:
    start = time.perf_counter()
    assert problems(text) == [f"job.yaml:{message}"]
    assert time.perf_counter() - start < 5


def test_a_bomb_of_aliases_does_not_go_off() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    (problem,) = problems("\n".join(lines))
    assert problem.endswith("the file has more than 50,000 values (aliases count each time)")


def test_a_chain_of_aliases_is_not_deeper_than_what_is_written_out() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 40)]
    (problem,) = problems("\n".join(lines))
    assert problem.endswith("lists and mappings are nested more than 24 deep")


def test_a_merge_does_not_bring_in_what_is_given() -> None:
    spec = one("x-b: &b {cpus: 1, mem_limit: 1g}\nname: t\nimage: a\n<<: *b\ncpus: 2\n")
    assert (spec.cpus, spec.mem_limit) == (2.0, 1 << 30)


def test_columns_are_counted_in_characters() -> None:
    (problem,) = problems('name: t\nimage: a\nenvironment: {A: "äöü🌲", B: [1]}\n')
    assert problem.startswith("job.yaml:3:29: environment.B: ")


def test_not_more_than_a_hundred_mistakes_are_told() -> None:
    text = "name: t\nimage: a\nenvironment:\n" + "".join(f"  A{n}: [1]\n" for n in range(500))
    assert len(problems(text)) == 100


def test_an_unprintable_character_is_shown_escaped() -> None:
    (problem,) = problems('name: "a\\u202eb"\nimage: a\n')
    assert "\u202e" not in problem
    assert r"'a\u202eb'" in problem


# ---------------------------------------------------------------------------------------------- normal forms


def test_all_values_are_in_normal_form() -> None:
    spec = one(next(case.text for case in GOOD if case.title == "every key that acts"))
    assert spec.command == ("python", "train.py", "--name", "two words")
    assert spec.entrypoint == ("tini", "--")
    assert dict(spec.environment) == {
        "LR": "0.10", "NAME": "a b", "TEXT": "x\ny", "TOKEN": "s3cret", "P": "a$b", "FLAG": "no", "EMPTY": "",
        "N": "1e3", "T": "true",
    }  # fmt: skip
    assert spec.volumes == (
        Volume(target="/data", source="/home/ann/data", read_only=True),
        Volume(target="/cache", source="cache", type="volume"),
        Volume(target="/scratch", type="tmpfs", size=1 << 30),
        Volume(target="/src", source="/home/ann/project/src", read_only=True),
    )
    assert spec.ports == (
        Port(target=8888),
        Port(target=80, published=8080),
        Port(target=6006, published=6006),
        Port(target=22, published=2222, host_ip="0.0.0.0"),
    )
    assert spec.ulimits == (Ulimit(name="memlock", soft=-1, hard=-1), Ulimit(name="nofile", soft=1024, hard=65536))
    assert (spec.cpus, spec.mem_limit, spec.shm_size) == (0.5, 3 << 29, 16 << 30)
    assert (spec.time_limit, spec.stop_grace_period, spec.stop_signal) == (36 * 3600, 90, "SIGINT")
    assert spec.labels == (("project", "vision"), ("empty", ""))
    assert (spec.gpus.count, spec.gpus.max_count) == (1, 4)
    assert spec.healthcheck is not None
    assert (spec.healthcheck.test, spec.healthcheck.shell, spec.healthcheck.interval) == (
        ("curl", "-f", "localhost"), False, 30)  # fmt: skip


def test_what_older_yaml_would_change_stays_text() -> None:
    spec = one(next(case.text for case in GOOD if case.title == "texts that older YAML would change"))
    assert dict(spec.environment) == {
        "A": "no", "B": "22:22", "C": "010", "D": "2024-01-01", "E": "1_000", "F": "0x1F", "G": "~x"}  # fmt: skip
    assert spec.ports == (Port(target=22, published=22),)


def test_arguments_keep_the_files_text() -> None:
    assert one("name: t\nimage: a\ncommand: [0.10, 1e3, True, 007, '']\n").command == ("0.10", "1e3", "True", "007", "")


def test_port_ranges_are_expanded() -> None:
    spec = one(next(case.text for case in GOOD if case.title == "port ranges"))
    assert [(port.published, port.target, port.host_ip, port.protocol) for port in spec.ports] == [
        (None, 3000, "127.0.0.1", "tcp"), (None, 3001, "127.0.0.1", "tcp"), (None, 3002, "127.0.0.1", "tcp"),
        (9090, 8080, "127.0.0.1", "tcp"), (9091, 8081, "127.0.0.1", "tcp"), (6060, 6060, "127.0.0.1", "udp"),
        (80, 80, "::1", "tcp"), (None, 90, "127.0.0.1", "tcp"),
    ]  # fmt: skip


def test_uuids_say_how_many() -> None:
    gpus = one(next(case.text for case in GOOD if case.title == "exactly these")).gpus
    assert (gpus.count, gpus.max_count, len(gpus.uuid)) == (2, 2, 2)


def test_a_mapping_for_gpus_means_one_unless_it_says_more() -> None:
    gpus = one("name: t\nimage: a\ngpus: {memory: 40g}\n").gpus
    assert (gpus.count, gpus.max_count, gpus.memory, gpus.link) == (1, 1, 40 << 30, "any")


def test_indices_are_answered_with_the_uuids_to_write() -> None:
    (problem,) = problems("name: t\nimage: a\ngpus: 1,0\n")
    assert f"{{uuid: [{UUIDS[1]}, {UUIDS[0]}]}}" in problem
    (problem,) = problems("name: t\nimage: a\ngpus: 1,0\n", replace(CONTEXT, uuids=()))
    assert problem.endswith("write UUIDs instead, `gpujobs gpus` shows them")


def test_variables_are_replaced_as_compose_does() -> None:
    spec = one(next(case.text for case in GOOD if case.title == "variables"))
    assert spec.name == "ann-t"
    assert spec.image == "pytorch/pytorch:latest"
    assert spec.command == ("echo", "$HOME", "ann", "x", "set")
    assert (spec.cpus, spec.gpus.count) == (4.0, 2)
    assert spec.volumes[0].source == "/home/ann/data"


def test_what_the_client_has_to_send_is_told_without_validation() -> None:
    text = """
    name: ${A}-$B
    command: [x, '${C:-${D}}', '$$E', '${F:?no}']
    environment: [G, H=1]
    build: {context: ., args: {I: , J: 1}}
    env_file: [a.env, '${K}/b.env', {path: c.env}]
    # ${NOT}
    """
    assert specfile.variables(text) == set("ABCDFGIK")
    assert specfile.needs(text, {"K": "/k"}).env_files == ("a.env", "/k/b.env", "c.env")
    assert specfile.variables("a: [") == frozenset()


# ---------------------------------------------------------------------------------------------- matrix


def test_a_matrix_expands_in_its_order() -> None:
    elements = specfile.parse(next(case.text for case in GOOD if case.title == "a matrix of numbers"), CONTEXT)
    assert [element.index for element in elements] == [0, 1, 2, 3]
    assert [element.spec.name for element in elements] == ["t-1-8", "t-2-8", "t-2-16", "t-4-64"]
    assert [element.spec.gpus.count for element in elements] == [1, 2, 2, 4]
    assert elements[3].axes == (("n", "4"), ("m", "64"))
    assert elements[3].spec.mem_limit == 64 << 30
    assert elements[0].spec.command == ("1", "{{ n }}", '{"a": {"b": 1}}')


def test_what_a_value_brings_in_is_not_replaced_again() -> None:
    context = replace(CONTEXT, variables={"X": "${Y}", "Y": "no"})
    (element,) = specfile.parse("name: t\nimage: a\nenvironment: {A: '${X}{{ b }}'}\nmatrix: {b: [$$Y]}\n", context)
    assert element.spec.environment == (("A", "${Y}$Y"),)
    assert substitute("{{ a }}", {"a": "{{ b }}", "b": "no"}) == "{{ b }}"


def test_ten_thousand_elements_are_expanded_quickly() -> None:
    axis = ", ".join(map(str, range(100)))
    text = "name: t-{{ a }}\nimage: a\ncommand: [x, '{{ a }}', '{{ b }}']\n"
    text += f"matrix: {{a: [{axis}], b: [{axis}]}}\n"
    start = time.perf_counter()
    elements = specfile.parse(text, CONTEXT)
    assert len(elements) == 10_000
    assert elements[-1].axes == (("a", "99"), ("b", "99"))
    assert time.perf_counter() - start < 20


AXIS = ", ".join(map(str, range(100)))
GROWING = [
    ("${T} many times", "command: [" + "$T," * 49_000 + "]"),
    ("an alias many times in many elements", "command: [" + "*a," * 50 + f"]\nmatrix: {{a: [{AXIS}], b: [{AXIS}]}}"),
    ("one long value many times", "command: '" + "{{a}}" * 100_000 + "'\nmatrix: {a: ['" + "x" * 400_000 + "']}"),
]


@pytest.mark.parametrize("body", [body for _, body in GROWING], ids=[title for title, _ in GROWING])
def test_a_small_file_does_not_grow_into_a_large_one(body: str) -> None:
    context = replace(CONTEXT, variables={"T": "x" * 100_000})
    text = "x-a: &a '" + "y" * 10_000 + "{{ a }}{{ b }}'\nname: t\nimage: a\n" + body
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = problems(text, context)
    assert "the file grows to more than 64 MiB of text" in found[0] or "characters after {{ }}" in found[0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_thousands_of_mistakes_are_answered_quickly() -> None:
    start = time.perf_counter()
    assert len(problems("name: t\nimage: a\n" + "".join(f"nane{n}: x\n" for n in range(20_000)))) == 100
    assert time.perf_counter() - start < 10


# ---------------------------------------------------------------------------------------------- fuzzing

PIECES = [
    "{", "}", "[", "]", ":", ": ", "- ", "\n", "\n  ", "\t", "'", '"', "|", ">", "&a ", "*a", "<<: *a", "!!str ",
    "? ", "# ",
    "${", "${X:-", "$$", "$", "}}", "{{", "{{ lr }}", "~", "null", "true", "no", "0", "-1", "1e999", ".nan", "010",
    "99999999999999999999",
    "\x00", "\x1b", "\ud800", "\u202e", "\ufeff", "\x85", "\u2028", "é", "🌲", "%YAML 1.1\n", "---\n", "...\n",
    ",", "=", "/", "..", "1:30:00",
]  # fmt: skip
LINES = sorted({line for case in BAD + GOOD for line in case.text.split("\n")})


def mutated(chance: random.Random) -> str:
    text = chance.choice(chance.choice([BAD, GOOD])).text
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, len(text))
        end = min(len(text), at + chance.randint(0, 12))
        text = chance.choice([
            text[:at] + chance.choice(PIECES) + text[at:],
            text[:at] + chance.choice(PIECES) + text[end:],
            text[:at] + text[end:],
            text[:at] + "\n" + chance.choice(LINES) + "\n" + text[at:],
            text[:end] + text[at:end] * chance.randint(1, 40) + text[end:],
            text + chance.choice(BAD + GOOD).text,
        ])  # fmt: skip
    return text


def answered(text: bytes | str) -> bool:
    """Whether it is accepted; anything but a proper refusal fails."""
    try:
        assert specfile.parse(text, CONTEXT)
    except InvalidInput as error:
        assert error.problems  # noqa: PT017 - either outcome is right
        for problem in error.problems:
            assert problem.line >= 1
            assert problem.column >= 1
            assert problem.message
            assert all(char.isprintable() for char in str(problem)), ascii(str(problem))
            assert len(str(problem)) < 2000
        return False
    return True


def test_mutations_of_the_corpus_are_answered_or_accepted() -> None:
    chance = random.Random(20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted, slowest = 0, 0.0
    for _ in range(FUZZ):
        text = mutated(chance)
        start = time.perf_counter()
        good = answered(text)
        slowest = max(slowest, time.perf_counter() - start)
        accepted += good
        assert not good or schema_accepts(text), text
        specfile.needs(text)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{FUZZ} files, {accepted} accepted, slowest {slowest:.3f} s, {(peak - before) / 1024:.0f} MiB more")
    assert 0 < accepted < FUZZ
    assert slowest < 20
    assert peak - before < 100 * 1024


@settings(max_examples=max(100, FUZZ // 10), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=300) | st.text(max_size=300) | st.lists(st.sampled_from(PIECES + LINES)).map("".join))
def test_any_bytes_are_answered(text: bytes | str) -> None:
    answered(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(PIECES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=max(200, FUZZ // 10), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_value_of_any_key_is_answered(data: st.DataObject) -> None:
    import json

    from gpujobs.core.spec import KEYS

    keys = data.draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=5))
    body = {"name": "t", "image": "a", **{key: data.draw(VALUES) for key in keys}}
    answered(json.dumps(body))


@pytest.mark.parametrize(("file", "name"), [
    ("job.yaml", "job"), ("sweeps/train.v2.yaml", "train"), ("-", "job"), ("/x/_fine tune.yml", "fine-tune"),
    ("Grüße.yaml", "Gr--e"), (".yaml", "job"), ("a" * 200, "a" * 128),
])  # fmt: skip
def test_a_job_without_a_name_is_called_like_its_file(file: str, name: str) -> None:
    (element,) = specfile.parse("image: a\n", replace(CONTEXT, file=file))
    assert element.spec.name == name
