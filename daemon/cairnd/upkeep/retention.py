"""Which versions a tier may let go: a pure function of what is known. No clock, no I/O, commit order only.

Never chosen: a pinned or leased version; the floor (the newest version verified on all ranks in one tier; one that is
passed over only if all are) and anything newer, but for what is passed over when a tier is at its limit; in tier 1, a
version that still waits for tier 2; the last restorable version of a job, whatever the policy says. Damaged copies are
none of these: when tier 1 is at its limit they go first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cairn_api.errors import ConfigurationError
from cairn_api.names import VersionId


@dataclass(frozen=True, slots=True)
class Policy:
    """What a tier keeps of one job. ``keep_last`` newest always; the others add to it; 0 switches a rule off."""

    keep_last: int
    keep_every: int = 0
    keep_period_s: float = 0.0

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigurationError(
                "a retention policy that keeps nothing is refused", hint="set num_of_version_in_retention to 1 or more"
            )


@dataclass(frozen=True, slots=True)
class Held:
    """A copy in the tier in question.

    ``waiting``: it has to stay until tier 2 has it. ``passed_over``: automatic resume does not take it, so it is not
    one of the newest that a policy counts; it stays as long as the oldest of those.
    """

    id: VersionId
    size_bytes: int
    created_s: float
    protected: bool = False
    waiting: bool = False
    passed_over: bool = False


@dataclass(frozen=True, slots=True)
class Eviction:
    """One copy that may go, and why."""

    id: VersionId
    size_bytes: int
    reason: str


def plan(held: Iterable[Held], policy: Policy, floor: VersionId | None) -> list[Eviction]:
    """Copies that *policy* lets go, oldest first.

    *floor* is the newest version that all ranks hold verified in one tier; without one nothing may go, because nothing
    is known to be restorable.
    """
    newest_first = sorted(held, key=lambda item: item.id, reverse=True)
    if floor is None:
        return []
    kept_by_rule = _kept(newest_first, policy)
    evictions = [
        Eviction(item.id, item.size_bytes, f"older than the newest {policy.keep_last}")
        for item in newest_first
        if item.id not in kept_by_rule and item.id < floor and not item.protected and not item.waiting
    ]
    return evictions[::-1]


def _kept(newest_first: Sequence[Held], policy: Policy) -> set[VersionId]:
    counted = [item.id for item in newest_first if not item.passed_over][: policy.keep_last]
    kept = {item.id for item in newest_first if len(counted) < policy.keep_last or item.id >= counted[-1]}
    if policy.keep_every:
        kept |= {item.id for item in newest_first if item.id.sequence % policy.keep_every == 0}
    if policy.keep_period_s:
        periods: dict[int, VersionId] = {}
        for item in newest_first:  # the oldest of each period stays: it was chosen first and so never changes
            periods[int(item.created_s // policy.keep_period_s)] = item.id
        kept |= set(periods.values())
    return kept


def damaged_first(damaged: Iterable[Held], excess_bytes: int) -> list[Eviction]:
    """Which *damaged* copies go when tier 1 is *excess_bytes* too large, before any intact one: the oldest first.

    They may be newer than the floor, or there may be none because all are damaged: else they could keep every save from
    its place, for ever.
    """
    evictions: list[Eviction] = []
    for item in sorted(damaged, key=lambda item: item.id):
        if excess_bytes <= 0:
            break
        if not item.protected:
            evictions.append(Eviction(item.id, item.size_bytes, "damaged, and tier 1 is at its limit"))
            excess_bytes -= item.size_bytes
    return evictions


def over_limit(
    held: Iterable[Held], excess_bytes: int, floor: VersionId | None
) -> tuple[list[Eviction], list[VersionId]]:
    """What must go when tier 1 is *excess_bytes* too large: ``(evictions, claims lost)``, oldest first.

    First copies that do not wait for tier 2, whatever the policy would keep; then the oldest waiting ones lose their
    claim. The newest complete version (the floor), anything newer, pins and explicit requests stay. What is newer than
    a floor that is not passed over, and is passed over itself, may go: else it could keep every save from its place.
    """
    evictions: list[Eviction] = []
    lost: list[VersionId] = []
    by_age = sorted(held, key=lambda item: item.id)
    last_resort = any(item.passed_over for item in by_age if item.id == floor)
    candidates = [
        item
        for item in by_age
        if floor is not None
        and (item.id < floor or (item.passed_over and item.id > floor and not last_resort))
        and not item.protected
    ]
    for waiting in (False, True):
        for item in candidates:
            if excess_bytes <= 0:
                return evictions, lost
            if item.waiting is waiting:
                evictions.append(Eviction(item.id, item.size_bytes, "tier 1 is at its limit"))
                excess_bytes -= item.size_bytes
                if waiting:
                    lost.append(item.id)
    return evictions, lost
