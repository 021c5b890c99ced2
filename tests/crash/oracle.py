"""The judge of every crash test: what tier 1 holds, read by recovery's scan and the verifier, never by the write path.

A *promise* is a line that a trainer appended to its diary, which lies on a disk that is never cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cairn_api.names import VersionId, parse_version
from cairnd.model import VersionState
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.upkeep import recovery, verifier
from tests.crash.trainer import PARTITIONS


@dataclass(frozen=True, slots=True)
class Found:
    """What a scan of tier 1 says. ``torn``: has a manifest and is not what was saved, with the reason."""

    listed: tuple[VersionId, ...]
    torn: dict[str, str]
    unfinished: tuple[str, ...]
    """Keys without a manifest, which recovery sweeps."""


@dataclass(slots=True)
class Diary:
    """What trainers wrote down: versions they began, and those that they were promised, in the order of events."""

    tried: set[VersionId] = field(default_factory=set)
    promised: set[VersionId] = field(default_factory=set)
    loaded: list[VersionId] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Diary:
        """The diary at *path*; empty if nobody has written yet."""
        diary = cls()
        written = path.read_text() if path.exists() else ""
        for line in written[: written.rfind("\n") + 1].splitlines():  # the last one may still be being written
            word, _, rest = line.partition(" ")
            if word == "tried":
                diary.tried.add(parse_version(rest))
            elif word == "promised":
                diary.promised.add(parse_version(rest))
            elif word == "loaded":
                diary.loaded.append(parse_version(rest))
            elif word == "wrong":
                diary.wrong.append(rest)
            elif word == "failed":
                diary.failed.append(rest)
            else:
                raise AssertionError(f"a trainer wrote {line!r}")
        return diary


def examine(tier1_path: Path, job: str, tried: Iterable[VersionId] | None = None) -> Found:
    """Scan tier 1 and read every byte of every listed version of *job*; changes nothing.

    With *tried*, a version that no trainer began, or that lacks one of its partitions, is torn too.
    """
    fs = OsFileSystem()
    tier = LocalTier(fs, tier1_path)
    scanned = recovery.scan(tier)
    torn = dict(scanned.quarantined)
    begun = None if tried is None else set(tried)
    listed = []
    for version in scanned.versions:
        if version.job != job:
            continue
        listed.append(version.id)
        problems = [
            f"{finding.path}: {finding.problem}"
            for finding in verifier.check_tier1(tier, fs, version, deep=True, progress=lambda _: None)
        ]
        if begun is not None:
            if version.id not in begun:
                problems.append("nobody began it")
            if version.state is not VersionState.COMMITTED or {item.name for item in version.partitions} != PARTITIONS:
                problems.append(f"it is {version.state} with {[item.name for item in version.partitions]}")
        if problems:
            torn[str(version.id)] = "; ".join(problems)
    return Found(tuple(sorted(listed)), torn, tuple(scanned.swept))


def lost(promised: Iterable[VersionId], found: Found, keep: int) -> set[VersionId]:
    """Promised versions that are gone although retention, which keeps the newest *keep*, had no right to delete them.

    Deletion begins only after newer versions are durable, so a version may be missing only when *keep* newer ones are
    there.
    """
    listed = sorted(found.listed)
    present = set(listed)
    return {
        version for version in promised if version not in present and sum(newer > version for newer in listed) < keep
    }
