"""Who may use which image, with an Engine's answers written by hand."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from gpujobs.adapters.images import Images
from gpujobs.core.errors import Refused
from gpujobs.core.job import Owner

ADA = Owner(uid=5001, gid=5001, groups=(5001,), name="ada", home="/home/ada")
ID = "sha256:" + "1" * 64


def looked_up(reference: str, tags: list[str], label: str) -> str:
    data = {"Id": ID, "RepoTags": tags, "RepoDigests": [], "Config": {"Labels": {"gpujobs.owner": label}}}

    async def call(action: Any) -> Any:
        return action(SimpleNamespace(inspect_image=lambda _: data))

    async def look() -> str:
        engine: Any = SimpleNamespace(call=call)
        return (await Images(engine).local(reference, ADA)).id

    return asyncio.run(look())


@pytest.mark.parametrize("reference", ["team/base:1", ID])
def test_a_label_that_an_image_brings_along_takes_it_from_nobody(reference: str) -> None:
    assert looked_up(reference, ["team/base:1"], "0") == ID


@pytest.mark.parametrize("tags", [[], ["<none>:<none>"]])
def test_what_a_job_has_built_has_no_name_and_is_its_owners_alone(tags: list[str]) -> None:
    assert looked_up(ID, tags, "5001") == ID
    with pytest.raises(Refused, match=r"built by another account \(uid 5002\)"):
        looked_up(ID, tags, "5002")
