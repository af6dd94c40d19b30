"""Dockerfiles as they are read here and as the Engine is given them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpujobs.core.dockerfile import instructions, outline, triggers_problem
from gpujobs.core.errors import InvalidInput

ID = "sha256:" + "0" * 64


def rewritten(text: str, **options: object) -> list[str]:
    plan = outline(text, **options)  # type: ignore[arg-type]
    return plan.rewritten({name: f"<{name}>" for name in plan.images}, 5001)[0].splitlines()


def test_each_instruction_is_one_line_and_each_stage_begins_with_its_owner() -> None:
    assert rewritten("""\
# syntax of nobody
from python:3.11 as Build
run a \\
  # comment
  && b \\

  && c
COPY --from=busybox:1 --chown=1:1 /x /y

FROM build
COPY --from=0 /a /b
COPY --from=BUILD /a /b
""") == [
        "FROM <python:3.11> AS build",
        "LABEL gpujobs.owner=5001",
        "RUN a   && b   && c",
        "COPY --from=<busybox:1> --chown=1:1 /x /y",
        "FROM build",
        "LABEL gpujobs.owner=5001",
        "COPY --from=0 /a /b",
        "COPY --from=BUILD /a /b",
    ]


def test_lines_of_the_rewritten_file_are_traced_to_the_users() -> None:
    _, lines = outline("FROM a\n\nRUN x \\\n y\nRUN z\n").rewritten({"a": ID}, 1)
    assert lines == (1, 1, 3, 5)


@pytest.mark.parametrize(("word", "image"), [
    ("$BASE", "b"), ("${BASE}", "b"), ("x/${BASE}:1", "x/b:1"), ("${NONE:-fall}", "fall"), ("${BASE:-fall}", "b"),
    ("${BASE:+other}", "other"), ("${NONE:-${BASE}}", "b"), ('"$BASE"', "b"), ("'busybox'", "busybox"),
    ("$GIVEN", "given"), ("$CHAIN", "b-2"),
])  # fmt: skip
def test_arguments_are_put_into_from_lines(word: str, image: str) -> None:
    text = f"ARG BASE=b GIVEN=default\nARG CHAIN=${{BASE}}-2\nARG NONE\nFROM {word}\n"
    assert outline(text, args=[("GIVEN", "given"), ("OTHER", "x")]).images == (image,)


BAD = [
    ("FROM a\nRUN --mount=type=bind x", "2: RUN --mount needs BuildKit, which is not used here; COPY the files"),
    ("FROM a\nCOPY --chmod=755 a b", "2: COPY --chmod needs BuildKit, which is not used here; use RUN chmod"),
    ("FROM a\nCOPY --frm=b a b", "Dockerfile:2: COPY --frm: it knows --chown=…, --from=…"),
    ("FROM a\nCOPY --fr\\om=b a b", "is not understood; write flags as --name=value, unquoted"),
    ("FROM a\nCOPY --from=$X a b", "Dockerfile:2: --from takes no variables; name an image, or a stage that does"),
    ("FROM a\nCOPY --from=0 a b", "Dockerfile:2: --from=0: there is no earlier stage of that number"),
    ("FROM a\nCOPY --chown=\u00e0--from=b a b", "is not understood"),
    ("FROM a\nCOPY \u00a0--from=b a b", "a space that is none of ASCII"),
    ("FROM a\nCOPY\u00a0--from=b a b", "is no instruction"),
    ("FROM a\nRUN x \\\\\nFROM b", "it ends in two backslashes"),
    ("FROM a\nRUN x\x0bFROM b", "it has a control character"),
    ("FROM a\rFROM b", "it has a control character"),
    ("#escape=`\nFROM a", "Dockerfile:1: `# escape=`` is not supported"),
    ("\n# Syntax = evil/frontend\nFROM a", "Dockerfile:2: `# syntax=evil/frontend` names a program"),
    ("FROM a AS scratch", "is no name for a stage"),
    ("FROM a AS x\nFROM b AS x", "there is a stage 'x' already"),
    ("FROM a b", "write FROM image, or FROM image AS stage"),
    ("FROM --platform=linux/arm64 a", "images are built for linux/amd64 here"),
    ("FROM $NONE", "$NONE is empty; give it a default"),
    ("FROM ${X%y}", "write ${NAME}"),
    ("FROM ../containers/x", "is not a registry"),
    ("FROM a\nONBUILD COPY --from=b a c", "ONBUILD COPY --from is not supported"),
    ("FROM a\nONBUILD FROM b", "ONBUILD needs an instruction that is none of FROM"),
    ("FROM a\nRUN cat <<EOF > /x\nFROM b\nEOF", "RUN with a here-document"),
    ("FROM a\nCOPY <<'EOF' /x\nEOF", "COPY with a here-document"),
    ("FROM a\nRUN " + "x" * 70_000, "longer than 65,000 bytes"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_what_is_not_understood_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(InvalidInput) as error:
        outline(text)
    assert words in str(error.value)


def test_a_quoted_flag_is_an_argument_as_the_engine_takes_it() -> None:
    assert outline('FROM a\nCOPY "--from=b" a b').images == ("a",)


def test_a_target_ends_the_file() -> None:
    text = "FROM a AS one\nRUN 1\nFROM b AS two\nRUN 2\nFROM c\n"
    assert outline(text, target="TWO").images == ("a", "b")
    assert rewritten(text, target="0")[-1] == "RUN 1"
    with pytest.raises(InvalidInput, match="has no stage 'tow'") as error:
        outline(text, target="tow")
    assert error.value.hint == "Did you mean two?"


def test_triggers_that_take_files_from_images_are_a_problem() -> None:
    assert triggers_problem(["RUN x", "COPY . /app"]) is None
    assert "takes files from another image" in str(triggers_problem(["COPY --from=x /a /b"]))
    assert "is not understood" in str(triggers_problem(["COPY --fr\\om=x /a /b"]))


@given(st.text(alphabet=st.sampled_from("FROMCPYfrom\\\"'-=$# \t\n\r\u00a0\u0085\u2028abc:/0<"), max_size=80))
def test_whatever_is_read_is_written_on_lines_that_do_not_run_into_each_other(text: str) -> None:
    try:
        found = list(instructions(text))
    except InvalidInput:
        return
    for instruction in found:
        line = str(instruction)
        assert "\n" not in line
        assert not line.rstrip(" \t").endswith("\\")
        again = list(instructions(line))
        assert [(i.keyword, i.flags, i.rest.strip()) for i in again] == [
            (instruction.keyword, instruction.flags, instruction.rest.strip())
        ]
