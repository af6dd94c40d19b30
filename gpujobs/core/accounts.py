"""Accounts of the machine, and what the service needs of whoever knows them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from gpujobs.core.job import Owner


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One account.

    Attributes:
        owner: Who it is, with all its groups.
        expired: Whether its time is over (the eighth field of shadow(5), what ``usermod --expiredate`` sets).
    """

    owner: Owner
    expired: bool = False


class AccountSource(Protocol):
    """Where accounts come from. Called from worker threads."""

    def by_uid(self, uid: int) -> Account:
        """The account of a uid; raises Refused where there is none that may use gpujobs."""
        ...

    def by_name(self, name: str) -> Account:
        """The account of a name; raises InvalidInput where there is none, Refused where it may not use gpujobs."""
        ...

    def gids(self, names: Iterable[str]) -> dict[str, int]:
        """The numbers of groups, as far as there are such groups."""
        ...

    def group_names(self, owner: Owner) -> list[tuple[int, str]]:
        """The names of an account's groups; a group without a name is called by its number."""
        ...
