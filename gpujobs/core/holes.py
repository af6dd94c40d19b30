"""Versions of what runs containers, and their known security holes.

Only holes that matter where strangers' images run beside each other. Each was looked up in the maker's own
advisory; the first mended version of each release line is given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gpujobs.core.finding import Level

Version = tuple[int, int, int, int]
"""Major, minor, patch, release candidate (:data:`RELEASED` where it is none)."""

RELEASED = 10**9

_VERSION = re.compile(r"(?<![\d.])v?(\d{1,8})\.(\d{1,8})(?:\.(\d{1,8}))?(?:[-~.]?rc\.?(\d{1,8}))?", re.ASCII)
_PACKAGED = re.compile(r"\+ds|\+dfsg|ubuntu|deb\d|\.el\d|\.fc\d|\+?azure|amzn", re.IGNORECASE)


def version_of(text: str) -> Version | None:
    """The first version number in a text, such as what a program's ``--version`` prints; None without one."""
    match = _VERSION.search(text)
    if match is None:
        return None
    major, minor, patch, candidate = match.groups()
    return int(major), int(minor), int(patch or 0), RELEASED if candidate is None else int(candidate)


def is_packaged(version: str) -> bool:
    """Whether a distribution built this: it may have mended holes without changing the number."""
    return _PACKAGED.search(version) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """A known hole.

    Attributes:
        fixed: The first mended version of each release line (major and minor), ascending; later lines never had it.
        gives: What it gives to whom.
        since: The first version that has it; empty for all.
        with_authorization: Only Engines with an authorization plugin have it.
    """

    cve: str
    fixed: tuple[str, ...]
    gives: str
    level: Level
    since: str = ""
    with_authorization: bool = False

    def concerns(self, version: Version) -> bool:
        """Whether that version has it, by its number."""
        if self.since and version < _must(self.since):
            return False
        *lines, last = map(_must, self.fixed)
        return version < last and not any(version[:2] == line[:2] and version >= line for line in lines)


def _must(text: str) -> Version:
    version = version_of(text)
    assert version is not None, text
    return version


TOOLKIT = (
    # NVIDIA's bulletin 5850 of 2026, in whose reading 1.19.1 is the first mended version, by the minimum-version
    # tables that quote it; the bulletin itself does not say in which modes. Hence no more than a warning.
    Hole(
        cve="CVE-2026-24260",
        fixed=("1.19.1",),
        gives="a race at the start may lead out of the container",
        level=Level.WARNING,
    ),
    # NVIDIA's bulletin 5659 of July 2025; CVE record: "all versions up to and including 1.17.7 (CDI mode only for
    # versions prior to 1.17.5)". An image's LD_PRELOAD reaches a hook that runs as root.
    Hole(
        cve="CVE-2025-23266",
        fixed=("1.17.8",),
        gives="an image's environment runs code as root of the host",
        level=Level.ERROR,
    ),
    # The same bulletin: the update-ldcache hook follows links of the image.
    Hole(
        cve="CVE-2025-23267",
        fixed=("1.17.8",),
        gives="an image's links write outside of the container",
        level=Level.ERROR,
    ),
    # GHSA-4hmh-pm5p-9j7j: the mending of CVE-2024-0132 was not complete.
    Hole(cve="CVE-2025-23359", fixed=("1.17.4",), gives="an image reaches the host's files", level=Level.ERROR),
    # NVIDIA's bulletin 5599 of January 2025 (its CVE-2024-0136 and -0137 need another ldconfig than the default).
    Hole(cve="CVE-2024-0135", fixed=("1.17.1",), gives="an image changes the host's programs", level=Level.ERROR),
    # NVIDIA's bulletin 5582 of September 2024; CVE record: "all versions up to and including v1.16.1".
    Hole(cve="CVE-2024-0132", fixed=("1.16.2",), gives="an image reaches the host's files", level=Level.ERROR),
)
"""The NVIDIA Container Toolkit. Any of these lets a submitter's image become root: GPU jobs should not run."""

RUNC = (
    # runc's CHANGELOG, 1.1.12, and GHSA-xr7r-f8xq-vfvv: a leaked descriptor as working directory leads out.
    Hole(
        cve="CVE-2024-21626",
        fixed=("1.1.12",),
        gives="an image's working directory reaches the host's files",
        level=Level.ERROR,
    ),
    # runc's CHANGELOG, 1.2.8, 1.3.3 and 1.4.0-rc.3. They need containers that race each other for a mount.
    Hole(
        cve="CVE-2025-31133",
        fixed=("1.2.8", "1.3.3", "1.4.0-rc.3"),
        gives="a race for a masked path leads out of the container",
        level=Level.WARNING,
    ),
    Hole(
        cve="CVE-2025-52565",
        fixed=("1.2.8", "1.3.3", "1.4.0-rc.3"),
        gives="likewise for /dev/console",
        level=Level.WARNING,
        since="1.0.0-rc3",
    ),
    Hole(
        cve="CVE-2025-52881",
        fixed=("1.2.8", "1.3.3", "1.4.0-rc.3"),
        gives="writes to /proc can be led elsewhere",
        level=Level.WARNING,
    ),
)
"""runc, which the Engine and NVIDIA's runtime start containers with."""

ENGINE = (
    # GHSA-3fwx-pjgw-3558: the data directory could be walked by any account.
    Hole(cve="CVE-2021-41091", fixed=("20.10.9",), gives="local accounts reach files of containers", level=Level.ERROR),
    # GHSA-rc4r-wh2q-q6c4.
    Hole(
        cve="CVE-2022-36109", fixed=("20.10.18",), gives="supplementary groups are set up wrongly", level=Level.WARNING
    ),
    # GHSA-xw73-rw38-6vjc: the classic builder takes a crafted image for a cached step.
    Hole(
        cve="CVE-2024-24557",
        fixed=("24.0.9", "25.0.2"),
        gives="a pulled image can poison the build cache",
        level=Level.WARNING,
    ),
    # GHSA-v23v-6jw2-98fq; the lines as in GO-2024-3005.
    Hole(
        cve="CVE-2024-41110",
        fixed=("19.03.16", "20.10.28", "23.0.15", "24.0.10", "25.0.6", "26.0.3", "26.1.5", "27.1.1"),
        gives="requests get past the authorization plugin",
        level=Level.ERROR,
        since="19.03.0",
        with_authorization=True,
    ),
    # GHSA-x744-4wpc-v9h2.
    Hole(
        cve="CVE-2026-34040",
        fixed=("29.3.1",),
        gives="requests get past the authorization plugin",
        level=Level.ERROR,
        with_authorization=True,
    ),
)
"""The Docker Engine."""


def holes(
    known: tuple[Hole, ...], version: str, mended: tuple[str, ...] = (), *, authorization: bool = False
) -> tuple[Hole, ...]:
    """The holes that a version has.

    Args:
        known: Those of the program.
        version: As the program tells it.
        mended: CVE numbers that its distribution says are mended in it.
        authorization: Whether the Engine has an authorization plugin.
    """
    number = version_of(version)
    if number is None:
        return ()
    return tuple(
        hole
        for hole in known
        if hole.concerns(number) and hole.cve not in mended and (authorization or not hole.with_authorization)
    )
