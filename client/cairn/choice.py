"""Which version all ranks load. Pure: every rank computes the same choice from the same gathered inventories.

An *inventory* is what one rank's daemon answered to ``Resolve``: ``claimed_epoch``, ``resumed_from`` (a version name
or None), ``tier2_error``, ``unhealthy`` (version names) and ``versions``, each with ``version``, ``nonce``, ``state``,
``world_size``, ``ranks``, ``save_dir``, ``file_marks``, ``held`` (whether some tier has a verified copy) and
``partitions`` (lists of path, name, rank, size) and ``passed_over`` (why it should not be taken, or empty). The newest
version that *every* rank can read is chosen; no rank falls back alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeAlias

from cairn_api.errors import ConfigurationError, UnavailableError, VersionError
from cairn_api.names import VersionId, parse_version

Inventory: TypeAlias = Mapping[str, Any]
Key: TypeAlias = tuple[VersionId, str]
"""A version and the nonce of the launch that wrote it: two launches can have made the same name."""

_MOST_REASONS = 5
_NO_COPY = "no copy can be read"


@dataclass(frozen=True, slots=True)
class Part:
    """One partition as known to some daemon."""

    path: str
    name: str
    rank: int
    size_bytes: int


@dataclass(slots=True)
class Candidate:
    """A version as all inventories together know it."""

    version: VersionId
    nonce: str
    world_size: int
    save_dir: str
    file_marks: bool
    states: set[str] = field(default_factory=set)
    ranks: set[int] = field(default_factory=set)
    parts: dict[str, Part] = field(default_factory=dict)
    held: dict[int, set[str]] = field(default_factory=dict)
    """Paths that the daemon of each (present) rank can read."""
    passed_over: str = ""
    """Why automatic resume should not take it, if it is not the last resort."""

    @property
    def key(self) -> Key:
        """What tells it from all others."""
        return self.version, self.nonce

    def path_of(self, name: str, rank: int) -> str | None:
        """Where *rank* finds partition *name*: its own if it saved one, else the one stored under its plain name."""
        own = next((part.path for part in self.parts.values() if part.name == name and part.rank == rank), None)
        return own if own is not None else (name if name in self.parts else None)


Reads: TypeAlias = Callable[[Candidate, int], Iterable[str]]
"""The paths that a rank will read of a candidate. A path that the version does not have rules it out."""


def every_partition(candidate: Candidate, rank: int) -> Iterable[str]:  # noqa: ARG001 - the signature of Reads
    """Every rank may read everything: the choice when nothing is known about who reads what."""
    return candidate.parts


@dataclass(frozen=True, slots=True)
class Choice:
    """The version to load and, for the log, why newer ones were passed over."""

    candidate: Candidate
    passed_over: tuple[str, ...]

    @property
    def version(self) -> VersionId:
        """The chosen version."""
        return self.candidate.version


def parse_request(text: str) -> tuple[str, VersionId | None]:
    """A user's ``version`` argument as (tag, version): a full version name is that version, anything else a tag."""
    try:
        version = parse_version(text)
    except ConfigurationError:
        return text, None
    return version.tag, version


def choose(
    inventories: Sequence[Inventory],
    *,
    tag: str | None = None,
    exactly: VersionId | None = None,
    save_dir: str | None = None,
    reads: Reads = every_partition,
    bad: frozenset[Key] = frozenset(),
) -> Choice | None:
    """The newest version that every rank can read, or None when no version exists anywhere.

    With *tag* only versions of that tag count, with *exactly* only that one, with *save_dir* only those saved from
    there. Without either, versions of earlier epochs that are newer than the one the newest launch resumed from are
    left aside: that launch has written the job's history anew from there; and those that are marked are taken only if
    no other can be loaded. *bad* were found damaged just now.

    Raises :class:`VersionError` when versions are known but none can be read by all ranks, or the tag is not there,
    and :class:`UnavailableError` when nothing is known and a bucket could not be asked: "nothing" must be certain.
    """
    known = [item for item in merge(inventories) if save_dir is None or item.save_dir == save_dir]
    asked = [item for item in known if tag in (None, item.version.tag) and exactly in (None, item.version)]
    asked.sort(key=lambda item: item.key, reverse=True)
    automatic = tag is None and exactly is None
    superseded = _superseded(inventories) if automatic else None
    unhealthy = sorted(
        (
            version
            for version in {parse_version(name) for inventory in inventories for name in inventory["unhealthy"]}
            if tag in (None, version.tag) and exactly in (None, version)
        ),
        reverse=True,
    )
    reasons: list[str] = []
    for item in sorted(asked, key=lambda item: automatic and bool(item.passed_over)):
        reason = _obstacle(item, len(inventories), reads, bad, superseded)
        if reason is None:
            marked = [other for other in asked if automatic and other.passed_over and other.key > item.key]
            unread = [f"{version}: {_NO_COPY}" for version in unhealthy if version > item.version]
            return Choice(item, (*unread, *(f"{other.version}: {other.passed_over}" for other in marked), *reasons))
        reasons.append(f"{item.version}: {reason}")
    reasons += [f"{version}: {_NO_COPY}" for version in unhealthy]
    tier2_error = next((item["tier2_error"] for item in inventories if item["tier2_error"]), "")
    _refuse(reasons, tier2_error, str(exactly) if exactly else tag, known)
    return None


def merge(inventories: Sequence[Inventory]) -> list[Candidate]:
    """One candidate per version, with what each rank's daemon holds of it."""
    candidates: dict[Key, Candidate] = {}
    for reader, inventory in enumerate(inventories):
        for entry in inventory["versions"]:
            version = parse_version(entry["version"])
            item = candidates.setdefault(
                (version, entry["nonce"]),
                Candidate(version, entry["nonce"], entry["world_size"], entry["save_dir"], entry["file_marks"]),
            )
            item.states.add(entry["state"])
            item.ranks.update(entry["ranks"])
            item.passed_over = item.passed_over or entry["passed_over"]
            parts = [Part(*fields) for fields in entry["partitions"]]
            item.parts.update((part.path, part) for part in parts)
            if entry["held"]:
                item.held.setdefault(reader, set()).update(part.path for part in parts)
    return list(candidates.values())


def _superseded(inventories: Sequence[Inventory]) -> Callable[[VersionId], bool]:
    """Whether a version belongs to the history that the newest launch has left behind."""
    newest = max(inventories, key=lambda item: (item["claimed_epoch"], item["resumed_from"] or ""))
    epoch: int = newest["claimed_epoch"]
    if newest["resumed_from"] is None:
        return lambda version: False  # noqa: ARG005 - it resumed from nothing, so it left nothing behind
    resumed_from = parse_version(newest["resumed_from"])
    return lambda version: version.epoch < epoch and version[:2] > resumed_from[:2]


def _obstacle(
    item: Candidate,
    readers: int,
    reads: Reads,
    bad: frozenset[Key],
    superseded: Callable[[VersionId], bool] | None,
) -> str | None:
    """Why *item* cannot be loaded by all ranks, or None."""
    if item.key in bad:
        return "found damaged"
    if superseded is not None and superseded(item.version):
        return "an earlier launch went on from an older version; load it by its tag if you want it"
    missing_ranks = sorted(set(range(item.world_size)) - item.ranks)
    if missing_ranks:
        return f"the partitions of rank {missing_ranks[0]} are not known to any reachable daemon"
    for reader in range(readers):
        absent = sorted(set(reads(item, reader)) - item.held.get(reader, set()))
        if absent:
            if absent[0] not in item.parts:
                return f"it has no partition {absent[0]!r} (it has {', '.join(sorted(item.parts)[:_MOST_REASONS])})"
            return f"rank {reader} cannot reach partition {absent[0]!r}"
    return None


def _refuse(reasons: Sequence[str], tier2_error: str, wanted: str | None, known: Sequence[Candidate]) -> None:
    bucket = f"; tier 2 could not be read ({tier2_error})" if tier2_error else ""
    if reasons:
        more = f" (and {len(reasons) - _MOST_REASONS} more)" if len(reasons) > _MOST_REASONS else ""
        raise VersionError(
            f"no version{f' of {wanted!r}' if wanted else ''} can be loaded: "
            f"{'; '.join(reasons[:_MOST_REASONS])}{more}{bucket}",
            hint="run `cairn list`, and `cairn verify` for what is damaged",
        )
    if tier2_error:
        raise UnavailableError(
            f"no version{f' of {wanted!r}' if wanted else ''} is known here, and tier 2 could not be read "
            f"({tier2_error})",
            hint="make the bucket reachable and repeat, or set enable_load = false to start without it",
        )
    if wanted is not None:
        tags = sorted({item.version.tag for item in known})
        near = get_close_matches(wanted, tags, n=3) or tags[-3:]
        raise VersionError(
            f"there is no version of {wanted!r}" + (f"; there are: {', '.join(near)}" if near else ""),
            hint="run `cairn list`",
            context={"tag": wanted},
        )
