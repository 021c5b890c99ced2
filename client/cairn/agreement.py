"""What ranks conclude from what they gathered. Pure: every rank computes the same from the same list.

An error crosses the ranks as JSON and is raised on **every** rank, with the first failing rank's reason: a training in
which one rank raises and the others go on hangs in its next collective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cairn_api.errors import ERRORS, CairnError, ConfigurationError, InternalError, OverloadedError
from cairn_api.names import VersionId, parse_version


def error_to_json(error: BaseException | None) -> dict[str, Any] | None:
    """*error* as a JSON value; one that is not Cairn's own becomes an :class:`InternalError` naming its type."""
    if error is None:
        return None
    if not isinstance(error, CairnError):
        return {"class": "InternalError", "message": f"{type(error).__name__}: {error}", "hint": "", "context": {}}
    name = next((cls.__name__ for cls in type(error).__mro__ if cls.__name__ in ERRORS), "InternalError")
    return {"class": name, "message": error.message, "hint": error.hint, "context": error.context}


def first_error(gathered: Sequence[Mapping[str, Any]], key: str = "error") -> CairnError | None:
    """The error of the lowest rank that has one under *key*, saying which rank that is when there are several ranks."""
    for rank, item in enumerate(gathered):
        fields = item.get(key)
        if fields is not None:
            where = f"rank {rank}: " if len(gathered) > 1 else ""
            cls = ERRORS.get(fields["class"], InternalError)
            return cls(where + fields["message"], hint=fields["hint"], context={**fields["context"], "rank": rank})
    return None


def check_same(gathered: Sequence[Mapping[str, Any]], key: str, what: str) -> None:
    """Raise :class:`ConfigurationError` naming who said what, unless all ranks have the same value under *key*."""
    said: dict[str, list[int]] = {}
    for rank, item in enumerate(gathered):
        said.setdefault(repr(item[key]), []).append(rank)
    if len(said) > 1:
        opinions = "; ".join(f"{_ranks(ranks)} {value}" for value, ranks in said.items())
        raise ConfigurationError(
            f"the ranks disagree about the {what}: {opinions}", hint=f"use the same {what} on every rank"
        )


def _ranks(ranks: Sequence[int], most: int = 4) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:most]) + (", …" if len(ranks) > most else "")
    return f"rank {shown}:" if len(ranks) == 1 else f"ranks {shown} ({len(ranks)}):"


@dataclass(frozen=True, slots=True)
class CreateAgreement:
    """What all ranks do in one ``create``. ``skip`` leaves the save out on every rank."""

    skip: bool
    version: VersionId
    persist: bool
    save_dir: str
    file_marks: bool
    floor: VersionId | None
    lacking: tuple[int, ...]
    """Ranks without a free buffer."""


def agree_on_create(gathered: Sequence[Mapping[str, Any]], epoch: int, *, skip_allowed: bool) -> CreateAgreement:
    """The outcome of a ``create``.

    Each rank gives ``tag``, ``available``, ``tier1`` and ``tier2`` (version names, newest first), ``persist_lost``
    and ``error``; rank 0 also ``sequence``, ``persist``, ``save_dir`` and ``file_marks``. Raises the first rank's
    error, :class:`ConfigurationError` when tags differ and :class:`OverloadedError` when a rank has no buffer and
    skipping is not allowed.
    """
    if (error := first_error(gathered)) is not None:
        raise error
    check_same(gathered, "tag", "tag")
    lacking = tuple(rank for rank, item in enumerate(gathered) if not item["available"])
    lead = gathered[0]
    version = VersionId(epoch, lead["sequence"], lead["tag"])
    if lacking and not skip_allowed:
        raise OverloadedError(
            f"no capture buffer became free for {_ranks(lacking).rstrip(':')}: earlier saves are still being written",
            hint='save less often, raise `buffers` or `buffer_wait_s`, or set when_no_buffer = "skip"',
            context={"version": version},
        )
    return CreateAgreement(
        skip=bool(lacking),
        version=version,
        persist=lead["persist"] or any(item["persist_lost"] for item in gathered),
        save_dir=lead["save_dir"],
        file_marks=lead["file_marks"],
        floor=floor(gathered),
        lacking=lacking,
    )


def floor(gathered: Sequence[Mapping[str, Any]]) -> VersionId | None:
    """The newest version that every rank has in tier 1, or every rank in tier 2, whichever is newer."""
    common: set[str] = set()
    for tier in ("tier1", "tier2"):
        common |= set.intersection(*(set(item[tier]) for item in gathered))
    return max((parse_version(name) for name in common), default=None)


def shared_names(names_by_rank: Sequence[Sequence[str]]) -> list[tuple[str, int]]:
    """``(name, rank)`` for every use of a name by a rank other than the lowest that uses it: stored below by-rank/."""
    taken: set[str] = set()
    shared = []
    for rank, names in enumerate(names_by_rank):
        shared += [(name, rank) for name in sorted(names) if name in taken]
        taken |= set(names)
    return shared
