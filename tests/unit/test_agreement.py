"""Parser and JSON Schema on many values, each for each key: they agree, or it is known why."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jsonschema import Draft202012Validator

from gpujobs import specfile
from gpujobs.core.errors import InvalidInput
from gpujobs.core.patterns import between, sizes
from gpujobs.core.spec import SUPPORTED
from gpujobs.core.values import DURATION_MAX, SIZE_MAX, SpecError, duration, duration_schema, size
from gpujobs.yamltree import TextError, read
from tests.unit.corpus import CONTEXT, HERE
from tests.unit.test_specfile import SCHEMA, plain

WORDS = (HERE / "values.txt").read_text().splitlines()

FRAMES = [
    *(f"{key}: %s" for key in sorted(SUPPORTED - {"matrix"})),
    *(f"gpus: {{{key}: %s}}" for key in ("count", "memory", "model", "capability", "link", "mig", "share", "uuid")),
    *(f"build: {{context: ., {key}: %s}}" for key in ("dockerfile", "args", "target", "labels", "no_cache")),
    "build: {context: %s}",
    "healthcheck: {test: %s}",
    "healthcheck: {disable: %s}",
    *(f"healthcheck: {{test: x, {key}: %s}}" for key in ("interval", "timeout", "retries", "start_period")),
    "ulimits: {nofile: %s}",
    "ulimits: {nofile: {soft: 1, hard: %s}}",
    "volumes: [%s]",
    "volumes: [{type: %s, source: data, target: /data}]",
    "volumes: [{type: bind, source: %s, target: /data}]",
    "volumes: [{type: volume, source: %s, target: /data}]",
    "volumes: [{type: volume, source: a, target: %s}]",
    "volumes: [{type: volume, source: a, target: /a, read_only: %s}]",
    "volumes: [{type: bind, source: /a, target: /a, bind: {create_host_path: %s}}]",
    "volumes: [{type: tmpfs, target: /a, tmpfs: {size: %s}}]",
    "ports: [%s]",
    *(f"ports: [{{target: 80, {key}: %s}}]" for key in ("published", "host_ip", "protocol")),
    "ports: [{target: %s}]",
    "environment: [%s]",
    "labels: [%s]",
    "environment: {A: %s}",
    "labels: {a: %s}",
    "env_file: [%s]",
    "env_file: [{path: settings.env, required: %s}]",
    "cap_add: [%s]",
    "driver_capabilities: [%s]",
    "command: [%s]",
    "matrix: {a: %s}",
    "matrix: {a: [%s]}",
    "matrix: {include: [{a: %s}]}",
]
"""One value in one place each."""

KNOWN = {
    "cannot be read": "the client's files",
    "has no value here": "the client's variables",
    "is set by gpujobs: ask": "the client's files",
    "its value was not sent": "the client's variables",
    "is not a variable; write ${": "substitution",
    "names no axis": "substitution",
    "cannot be split into words": "shell quoting",
    "publishes 3 ports for": "one range against another",
    "ends before it begins": "one range against another",
    "is above hard": "one value against another",
    "named by uuid; leave count out": "one value against another",
    "8.0 is not": "JSON takes 8.0 for the whole number 8",
    "1e3 is not": "JSON takes 1e3 for the whole number 1000",
    "1,024 ports": "the length of a range",
    "2,000 ports": "the length of a range",
    "'1:30:00' is not an IP": "addresses",
    "'22:22' is not an IP": "addresses",
    "matrix.a[1]: ": "one item against another: JSON takes 1 and 1.0 for the same",
    "1E-3": "below the least, as a fraction",
    "is out of range; write 1 s to": "sums and fractions of durations",
    "is out of range; write 0 s to 1 d": "sums of durations",
    "0.001e": "fractions of sizes",
    "is not used; write": "substitution",
    "{{ y }}": "substitution",
    "no matrix name": "substitution",
}
"""What is said of a file that only the parser refuses, and why a schema cannot know it."""


def files() -> Iterator[str]:
    for frame in FRAMES:
        key = frame.partition(":")[0]
        head = ("" if key == "name" else "name: t\n") + ("" if key in {"image", "build"} else "image: a\n")
        tail = "environment: ['X={{ a }}']\n" if key == "matrix" else ""
        for word in WORDS:
            yield f"{head}{frame % word}\n{tail}"


def test_parser_and_schema_agree_on_every_value_for_every_key() -> None:
    asked, differ = 0, []
    for text in files():
        try:
            tree = read(text)
        except TextError:
            continue
        asked += 1
        accepted = SCHEMA.is_valid(plain(tree.value))
        substituted = "$" in text or "{{{{" in text
        try:
            specfile.parse(text, CONTEXT)
        except InvalidInput as error:
            said = str(error.problems[0])
            if accepted and not tree.notes and not substituted and not any(words in said for words in KNOWN):
                differ.append(("the parser alone refuses", text, said))
        else:
            if not accepted:
                differ.append(("the schema alone refuses", text, ""))
    assert asked > 15_000
    assert differ == []


RANGES = [(0, 0), (0, 9), (1, 64), (7, 123), (1, 65535), (0, 1024), (99, 100), (1, 2**63 - 1)]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_a_pattern_of_numbers_has_exactly_those(low: int, high: int) -> None:
    schema = Draft202012Validator({"pattern": f"^{between(low, high)}$"})
    near = {low + step for step in range(-20, 200)} | {high + step for step in range(-200, 20)}
    near |= {value * scale for value in (low, high) for scale in (2, 10, 100)} | {high // 10, high // 2, high // 3}
    for value in near - {value for value in near if value < 0}:
        assert schema.is_valid(str(value)) == (low <= value <= high), value
    assert not schema.is_valid("")
    assert not schema.is_valid(f"0{high}")


def test_patterns_refuse_nothing_that_can_be_read() -> None:
    numbers = [0, 1, 5, 6, 63, 64, 1023, 1024, 6143, 6144, 65535, 65536, 6291456, 10**18]
    units = ("", "b", "k", "MB", "GiB", "t", "p", "e")
    more = ("", "1ms", "0us", "999999us", "1000ms")
    for least in (64 << 10, 1 << 20, 6 << 20):
        schema = Draft202012Validator({"pattern": sizes(least, SIZE_MAX)})
        for text in (f"{n}{f}{u}" for n in numbers for f in ("", ".0", ".5") for u in units):
            try:
                size(text, least)
            except SpecError:
                continue
            assert schema.is_valid(text), text
    for least, most in ((1, DURATION_MAX), (0, 86400), (1, 86400)):
        spans = Draft202012Validator(duration_schema(least, most))
        for text in (f"{n}{u}{m}" for n in numbers[:9] for u in "wdhms" for m in more):
            try:
                duration(text, least, most)
            except SpecError:
                continue
            assert spans.is_valid(text), text
