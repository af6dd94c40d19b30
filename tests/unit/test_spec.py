"""Readers of single values: normal forms, and that the model needs no validator to be used."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpujobs.core import codec, forms, gpukeys, limits, mounts
from gpujobs.core.interpolate import interpolate, names, references, substitute
from gpujobs.core.spec import KEYS, SUPPORTED, GpuRequest, JobFile, JobSpec
from gpujobs.core.values import Context, Plain, SpecError, amount, duration, shown, size
from tests.unit.corpus import CONTEXT


def said(read: object, *arguments: object) -> str:
    with pytest.raises(SpecError) as caught:
        read(*arguments)  # type: ignore[operator]
    return caught.value.faults[0].message


@pytest.mark.parametrize(("text", "value"), [
    ("", None), ("~", None), ("null", None), ("true", True), ("FALSE", False), ("no", "no"), ("yes", "yes"),
    ("on", "on"),
    ("0", 0), ("-12", -12), ("+3", 3), ("010", "010"), ("0o10", 8), ("0x1F", 31), ("1_000", "1_000"), ("1.5", 1.5),
    ("1e3", 1000.0),
    (".5", 0.5), ("5.", 5.0), ("22:22", "22:22"), ("1:30:00", "1:30:00"), ("2024-01-01", "2024-01-01"), ("=", "="),
    ("<<", "<<"),
    (".inf", math.inf), ("-.INF", -math.inf), ("1e999", math.inf), ("9" * 5000, "9" * 5000), ("0b1", "0b1"),
    ("-", "-"), ("0x", "0x"),
])  # fmt: skip
def test_an_unquoted_text_has_the_value_of_yamls_core_schema(text: str, value: object) -> None:
    assert Plain(text).value == value
    assert type(Plain(text).value) is type(value)


@pytest.mark.parametrize(("text", "count"), [
    ("64g", 64 << 30), ("40GB", 40 << 30), ("512m", 512 << 20), ("1.5gib", 3 << 29), ("1 TiB", 1 << 40),
    ("2097152", 2 << 20),
    (2097152, 2 << 20), (Plain("4M"), 4 << 20), ("3kb", 3072), ("10b", 10), ("0.5k", 512),
])  # fmt: skip
def test_sizes_are_powers_of_1024_as_docker_has_them(text: object, count: int) -> None:
    assert size(text, 1) == count


@pytest.mark.parametrize("text", ["", "g", "64x", "-1g", "1e3", "1,5g", "64 g b", "nan", True, None, [], {}, 1.5,
    ".5g", "9" * 400])
def test_what_is_no_size_is_refused(text: object) -> None:
    said(size, text, 1)


@given(st.integers(1, 1 << 60))
def test_amounts_in_words_mean_the_same_bytes(count: int) -> None:
    assert size(amount(count).removesuffix(" bytes"), 1) == count


@pytest.mark.parametrize(("text", "seconds"), [
    ("12h", 43200), ("90m", 5400), ("1d12h", 129600), ("1h30m", 5400), ("1.5h", 5400), ("500ms", 0.5),
    ("2w", 1209600), (90, 90), ("90", 90),
    ("1d 12h", 129600), ("0s", 0), ("1us", 0.000001),
])  # fmt: skip
def test_durations_are_seconds(text: object, seconds: float) -> None:
    assert duration(text, 0) == seconds


@pytest.mark.parametrize(("text", "hint"), [
    ("1:30:00", "units: 1h30m"), ("0:45:00", "units: 45m"), ("2-00:00:00", "units: 2d"),
    ("22:22", "units: 22h22m or 22m22s"),
    ("0:0:0", "units: a time above 0"), ("1m1h", "such as 12h, 90m or 1d12h"), ("h", "such as"), ("", "such as"),
    (True, "such as"),
    (1.5, "such as"), ("-1s", "such as"), ("1e9s", "such as"), ("99999d", "out of range"),
])  # fmt: skip
def test_what_is_no_duration_is_answered_with_what_to_write(text: object, hint: str) -> None:
    assert hint in said(duration, text, 0)


@pytest.mark.parametrize("reference", [
    "a", "python:3.11-slim", "library/python", "localhost/a", "localhost:5000/a/b:c",
    "r.example.org/a__b/c-d.e:V1.2_3", "[::1]:5000/a",
    "a@sha256:" + "0" * 64, "a:b@sha256:" + "f" * 64, "sha256:" + "a" * 64, "127.0.0.1:5000/x",
])  # fmt: skip
def test_image_references_are_accepted(reference: str) -> None:
    assert forms.image(reference) == reference


@pytest.mark.parametrize("reference", [
    "A", "a:", ":a", "a:b:c", "a/", "/a", "a//b", "a b", "a@sha256:1", "a@md5:" + "0" * 32, "-a", "a-", "a:-b", "a." ,
    "a__" , "x" * 600,
    "sha256:" + "A" * 64, "http://a", "a:" + "b" * 129, "r.example.org:port/a", "../a", "a\n", "\u00e4",
])  # fmt: skip
def test_what_is_no_image_reference_is_refused(reference: str) -> None:
    said(forms.image, reference)


@pytest.mark.parametrize(("value", "name"), [("SIGTERM", "SIGTERM"), ("term", "SIGTERM"), (2, "SIGINT"),
    ("15", "SIGTERM"), ("SIGRTMIN+3", "SIGRTMIN+3"), (37, "SIGRTMIN+3"), (9, "SIGKILL")])
def test_signals_are_known_by_name_and_number(value: object, name: str) -> None:
    assert forms.signal_name(value) == name


@pytest.mark.parametrize(("value", "span"), [(2, (2, 2)), ("2", (2, 2)), ("1-4", (1, 4)), (Plain("3 - 8"), (3, 8)),
    (0, (0, 0))])
def test_counts_are_numbers_or_ranges(value: object, span: tuple[int, int]) -> None:
    assert gpukeys.count(value) == span


@pytest.mark.parametrize(("value", "pair"), [(">=8.0", (">=", (8, 0))), ("< 9.0", ("<", (9, 0))),
    ("==12.1", ("==", (12, 1)))])
def test_capabilities_are_operator_and_version(value: str, pair: object) -> None:
    assert gpukeys.capability(value) == pair


@pytest.mark.parametrize("value", ["1g.10gb", "3G.20GB", "1g.5gb+me", "1c.3g.20gb", "7g.80gb", "1g.10gb+me.all",
    "1g.24gb-me", "2g.35gb+gfx"])
def test_mig_profiles_are_known_by_their_form(value: str) -> None:
    assert gpukeys.mig(value) == value.lower()


def test_env_files_are_read_as_people_write_them() -> None:
    text = "\ufeff# c\r\nA=1\r\nexport B = two words  # note\nC='a # b $x'\n"
    text += "D=\"a\\n\\\"b\\\" \\$\"\nE=\nF=a#b\nG=\"x\ny\"\nTOKEN\nH=a=b\n"
    assert dict(forms.dotenv(text, CONTEXT)) == {
        "A": "1", "B": "two words", "C": "a # b $x", "D": 'a\n"b" $', "E": "", "F": "a#b", "G": "x\ny",
        "TOKEN": "s3cret", "H": "a=b"}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [
    ("A=1\nB='x", "line 2: the quote ' is not closed"),
    ("A='x' y", "line 1: 'y' follows the closing quote"),
    ("=x", "line 1: '=x' is not NAME=value"),
    ("NOPE", "line 1: NOPE has no value here and is not set in your environment; write NOPE: value, or set it"),
    ("GPUJOBS_X=1", "line 1: 'GPUJOBS_X' is set by gpujobs; choose another name"),
])  # fmt: skip
def test_mistakes_in_env_files_name_their_line(text: str, message: str) -> None:
    assert said(forms.dotenv, text, CONTEXT) == message


def test_the_environment_wins_over_env_files() -> None:
    file = JobFile(name="t", image="a", env_file=(("A", "1"), ("B", "2")), environment=(("B", "3"), ("C", "4")))
    assert file.spec("job.yaml").environment == (("A", "1"), ("B", "3"), ("C", "4"))
    assert type(file.spec("job.yaml")) is JobSpec


def test_a_value_that_the_kernel_would_refuse_is_refused_before() -> None:
    assert "the kernel takes at most 131,071" in said(forms.environment, {"A": "x" * 131_072}, CONTEXT)
    assert "the kernel takes at most 131,071" in said(forms.argv, ["x" * 131_072])


@pytest.mark.parametrize(("path", "absolute"), [
    ("~", "/home/ann"), ("~/x", "/home/ann/x"), (".", "/home/ann/project"), ("../y", "/home/ann/y"),
    ("//etc/./x/", "/etc/x"), ("a", "/home/ann/project/a"),
    ("../../../../..", "/"),
])  # fmt: skip
def test_paths_are_absolute_on_the_server(path: str, absolute: str) -> None:
    assert forms.host_path(path, CONTEXT) == absolute


def test_an_unknown_home_or_directory_is_said() -> None:
    nowhere = Context(file="", directory="", home="", variables={})
    assert said(forms.host_path, "~/x", nowhere).startswith("`~` needs your home directory, which is not known; ")
    assert "relative" in said(forms.host_path, "x", nowhere)
    assert forms.host_path("/x", nowhere) == "/x"


@pytest.mark.parametrize("path", [
    "/", "//", "/.", "/a/..", "/proc", "/proc/1", "/sys", "/dev", "/dev/nvidia0", "/dev/shm", "/.gpujobs",
    "/etc/passwd", "/etc/group", "/a/../proc",
    "//dev", "/run/nvidia-container-devices/x", "/var/run/nvidia-container-devices", "x", "",
])  # fmt: skip
def test_targets_that_would_undo_the_isolation_are_refused(path: str) -> None:
    said(mounts.target, path)


@pytest.mark.parametrize("path", ["/data", "/procs", "/device", "/etc/passwd2", "/home/x/proc", "/run/x"])
def test_targets_beside_them_are_fine(path: str) -> None:
    assert mounts.target(path) == path


def test_checks_are_read_in_composes_forms() -> None:
    assert limits.check_test(["CMD", "a", 1]) == (False, ("a", "1"))
    assert limits.check_test(["CMD-SHELL", "a | b"]) == (True, ("a | b",))
    assert limits.check_test("a | b") == (True, ("a | b",))
    assert limits.check_test(["NONE"]) == (False, ())


# ---------------------------------------------------------------------------------------------- substitution

VARIABLES = {"A": "1", "E": "", "P": "a$b${A}"}


@pytest.mark.parametrize(("text", "result"), [
    ("$A", "1"), ("${A}x", "1x"), ("$Ax", None), ("$$A", "$A"), ("$$$A", "$1"), ("${E:-d}", "d"), ("${E-d}", ""),
    ("${N:-d}", "d"), ("${N-d}", "d"),
    ("${A:+y}", "y"), ("${E:+y}", ""), ("${E+y}", "y"), ("${N+y}", ""), ("${N:-${M:-$A}}", "1"),
    ("${N:-a b}", "a b"), ("${N:-}", ""), ("$P", "a$b${A}"),
    ("${N:-{}}", "{}"), ("${N}", None), ("${N:?}", None), ("${E:?m}", None), ("${E?m}", ""), ("$", None),
    ("$1", None), ("${", None), ("${A", None),
    ("${1}", None), ("${A!x}", None), ("${}", None), ("a$", None), ("${N:-" * 20 + "}" * 20, None),
])  # fmt: skip
def test_variables_are_replaced_in_composes_forms(text: str, result: str | None) -> None:
    if result is None:
        said(interpolate, text, VARIABLES)
    else:
        assert interpolate(text, VARIABLES) == result


def test_a_small_text_cannot_grow_without_bound() -> None:
    assert "at most" in said(interpolate, "$X" * 100, {"X": "x" * 10_000})


def test_the_names_in_a_text_are_found_also_in_defaults() -> None:
    assert names("$A ${B} ${C:-$D} ${E:-${F-x}} $$G ${H:?$I} $ ${ ${J") == frozenset("ABCDEFHI")


def test_a_missing_variable_is_named_with_what_may_have_been_meant() -> None:
    assert said(interpolate, "$WANDB_KYE", {"WANDB_KEY": "x"}).endswith("did you mean `WANDB_KEY`?")


def test_braces_are_plain_substitution() -> None:
    values = {"a": "{{ b }}", "b": "2"}
    assert substitute("{{a}} {{  b  }} {{{{ a }}", values) == "{{ b }} 2 {{ a }}"
    assert references("{{ a }}{{b}} {{{{ c }}") == {"a", "b"}
    for expression in ("{{ a.b }}", "{{ a|upper }}", "{{ 7*7 }}", "{{}}", "{{ a", "{{ a }", "{{ self.__class__ }}",
    "{{\n}}"):
        said(references, expression)


@given(st.text(alphabet="${}:-?+AB x", max_size=30))
def test_any_text_with_dollars_is_replaced_or_refused(text: str) -> None:
    try:
        assert isinstance(interpolate(text, VARIABLES), str)
    except SpecError as error:
        assert error.faults[0].message  # noqa: PT017 - either outcome is right
    names(text)


@given(st.text(max_size=80))
def test_what_is_shown_holds_nothing_that_a_terminal_acts_on(text: str) -> None:
    assert all(char.isprintable() for char in shown(text))
    assert len(shown(text)) < 700


# ---------------------------------------------------------------------------------------------- the model


def test_the_model_is_read_without_validator_or_yaml() -> None:
    code = "import sys, gpujobs.core.translate; print(sorted({'pydantic', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_a_client_needs_is_known_without_the_validator() -> None:
    code = "import sys; from gpujobs import specfile; specfile.needs('name: ${A}'); print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_key_that_acts_is_a_key_of_the_file() -> None:
    assert set(KEYS) >= SUPPORTED
    assert {item.name for item in fields(JobSpec)} | {"env_file", "matrix"} == SUPPORTED


def test_a_spec_survives_the_ledgers_codec() -> None:
    gpus = GpuRequest(count=2, max_count=4, capability=(">=", (8, 0)), model=("A100",))
    spec = JobSpec(name="t", image="a", gpus=gpus, time_limit=60)
    assert codec.decode(JobSpec, codec.encode(spec)) == spec
