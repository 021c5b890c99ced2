"""What a checkpoint is to the daemon: versions, partitions, copies, their states and the legal moves between them.

Pure values: no I/O, no clock, no locks. A version's state and the state of its copy in a tier are two machines; "is it
in the bucket?" is a question about a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cairn_api.errors import InternalError
from cairn_api.names import VersionId
from cairnd.digests import Digest


class VersionState(StrEnum):
    OPEN = "open"
    SEALED = "sealed"
    PREPARED = "prepared"
    """This node's manifest is durable; whether every other node's is, is not known here."""
    COMMITTED = "committed"
    DELETING = "deleting"
    ABORTED = "aborted"


MOVES: Mapping[VersionState, frozenset[VersionState]] = {
    VersionState.OPEN: frozenset({VersionState.SEALED, VersionState.ABORTED}),
    VersionState.SEALED: frozenset({VersionState.PREPARED, VersionState.COMMITTED, VersionState.ABORTED}),
    VersionState.PREPARED: frozenset({VersionState.COMMITTED, VersionState.ABORTED, VersionState.DELETING}),
    VersionState.COMMITTED: frozenset({VersionState.DELETING}),
    VersionState.DELETING: frozenset(),
    VersionState.ABORTED: frozenset(),
}


class Tier(StrEnum):
    MEMORY = "memory"
    TIER1 = "tier1"
    PEER = "peer"
    TIER2 = "tier2"


class CopyState(StrEnum):
    ABSENT = "absent"
    COPYING = "copying"
    VERIFIED = "verified"
    FAILED = "failed"
    EVICTED = "evicted"


@dataclass(frozen=True, slots=True)
class Partition:
    """One named, opaque byte sequence saved by one rank. ``digest`` is None until its bytes were read once."""

    name: str
    path: str
    rank: int
    size_bytes: int
    digest: Digest | None = None
    globals: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Copy:
    """Where one version stands in one tier. ``damaged``: its bytes were read, and are not what its manifest says."""

    state: CopyState
    error: str = ""
    damaged: bool = False


ABSENT = Copy(CopyState.ABSENT)
VERIFIED = Copy(CopyState.VERIFIED)


@dataclass(slots=True)
class Version:
    """One attempt at a tag, as far as this daemon knows it. Owned and changed by the catalog's methods only."""

    job: str
    id: VersionId
    state: VersionState
    world_size: int
    nonce: str
    save_dir: str = ""
    persist: bool = False
    file_marks: bool = False
    created_s: float = 0.0
    uid: int = 0
    gid: int = 0
    ranks: frozenset[int] = frozenset()
    partitions: tuple[Partition, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    copies: dict[Tier, Copy] = field(default_factory=dict)
    pinned: bool = False
    requested: bool = False
    by_itself: bool = False
    """Requested by the daemon, when a job's ranks were gone or it stopped, and by nobody else."""
    passed_over: str = ""
    """Why automatic resume passes it over, if it does: its bytes may be intact."""
    reason: str = ""
    reserved_bytes: int = 0
    """Set aside in tier 1 for what is being saved; meaningful until the version is in tier 1."""

    def __str__(self) -> str:
        return f"{self.job}/{self.id}"

    @property
    def size_bytes(self) -> int:
        """Bytes of all partitions known here."""
        return sum(partition.size_bytes for partition in self.partitions)

    @property
    def complete(self) -> bool:
        """Whether the partitions of every rank of its world are known here."""
        return len(self.ranks) == self.world_size  # all of them lie in it: checked where they come in

    @property
    def wants_tier2(self) -> bool:
        """Flagged at ``create``, or requested later; the flag only rises."""
        return self.persist or self.requested

    @property
    def requested_and_waiting(self) -> bool:
        """Someone asked for it to be persisted and it is not yet: not even the byte limit takes its place away."""
        return self.requested and not self.by_itself and not self.has(Tier.TIER2)

    @property
    def restorable(self) -> bool:
        """Whether its bytes may be offered to a restore."""
        return self.state in (VersionState.SEALED, VersionState.PREPARED, VersionState.COMMITTED)

    def copy(self, tier: Tier) -> Copy:
        """The state of the copy in *tier*."""
        return self.copies.get(tier, ABSENT)

    def has(self, tier: Tier) -> bool:
        """Whether *tier* holds a verified copy."""
        return self.copy(tier).state is CopyState.VERIFIED

    def holds(self, tier: Tier) -> bool:
        """Whether *tier* holds a copy, intact or damaged. A version is forgotten with its last: so is its damage."""
        return self.has(tier) or self.copy(tier).damaged

    def move(self, state: VersionState, reason: str = "") -> None:
        """Change state; an illegal move is a defect and raises :class:`InternalError`."""
        if state not in MOVES[self.state]:
            raise InternalError(f"{self} cannot go from {self.state} to {state}", context={"version": self.id})
        self.state = state
        if reason:
            self.reason = reason

    def partition(self, path: str) -> Partition | None:
        """The partition stored at *path*, or None."""
        return next((item for item in self.partitions if item.path == path), None)
