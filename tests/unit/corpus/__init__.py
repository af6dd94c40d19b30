"""Job files and what is said about them.

``bad.txt`` and ``good.txt`` hold many small files each::

    === what it shows
    name: t
    image: A
    >>> 2:8: image: 'A' is not an image; image names are lower case; did you mean `a`?
    --- parser only: why a JSON Schema cannot know it

``##`` begins a heading. Lines after ``>>>`` are exact messages without the file's name; ``---`` is there for those
that only the parser can refuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpujobs.specfile import Context

HERE = Path(__file__).parent
UUIDS = ("GPU-11111111-0000-0000-0000-000000000000", "GPU-22222222-0000-0000-0000-000000000000")
CONTEXT = Context(
    file="job.yaml",
    directory="/home/ann/project",
    home="/home/ann",
    variables={"HOME": "/home/ann", "USER": "ann", "CPUS": "4", "TOKEN": "s3cret", "EMPTY": ""},
    working_directory="/home/ann",
    env_files={
        "settings.env": "# settings\nLR=0.1\nexport NAME='a b'\nTEXT=\"x\\ny\"\nTOKEN\nP=a$b # comment\n",
        "bad.env": "A=1\nthis is no line\n",
        "gpus.env": "NVIDIA_VISIBLE_DEVICES=all\n",
    },
    secrets={"wandb": "", "hf": "", "db": "", "TOKEN": "", "gone": "/home/ann/gone: No such file or directory"},
    uuids=UUIDS,
)


@dataclass(frozen=True)
class Case:
    """One file of the corpus."""

    title: str
    text: str
    expected: tuple[str, ...]
    parser_only: str = ""


def load(name: str) -> list[Case]:
    """The cases of one file."""
    cases = []
    for block in ("\n" + (HERE / name).read_text()).split("\n=== ")[1:]:
        title, *lines = block.split("\n")
        text = [line for line in lines if not line.startswith((">>> ", "--- ", "## "))]
        expected = tuple(line[4:] for line in lines if line.startswith(">>> "))
        reason = "".join(line[4:] for line in lines if line.startswith("--- "))
        cases.append(Case(title, "\n".join(text).rstrip("\n") + "\n", expected, reason))
    return cases
