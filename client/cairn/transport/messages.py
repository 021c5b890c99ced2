"""What client and daemon tell each other, as plain values. Generated messages are known in this package only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from cairn.transport.connection import error_from, understood
from cairn_api.errors import CairnError
from cairn_api.names import VersionId
from cairn_api.v1 import save_pb2, types_pb2
from cairn_api.wire import pack_column


class Records(Protocol):
    """Where the zip members of a partition lie; see ``RecordTable`` in ``save.proto``. Each is array-like of ints."""

    @property
    def offsets(self) -> Iterable[int]: ...
    @property
    def lengths(self) -> Iterable[int]: ...
    @property
    def descriptor_crc_offsets(self) -> Iterable[int]: ...
    @property
    def directory_crc_offsets(self) -> Iterable[int]: ...


@dataclass(frozen=True, slots=True)
class PartitionPlan:
    """One partition as it is handed over: its name, its length, its zip members and the globals in its pickle.

    ``digests`` is what was digested while it was copied, as ``SealRequest.digests`` has it: rows of four numbers.
    """

    name: str
    size_bytes: int
    records: Records
    globals: tuple[str, ...]
    digests: Sequence[int] = ()

    def digested(self, digests: Sequence[int]) -> PartitionPlan:
        """The same with what is known of its bytes, once they are copied."""
        return replace(self, digests=digests)


@dataclass(frozen=True, slots=True)
class Opening:
    """All that a daemon has to know to open a version; kept by the client to tell it to a restarted one."""

    version: VersionId
    world_size: int
    nonce: str
    save_dir: str
    persist: bool
    floor: VersionId | None
    file_marks: bool
    attributes: Mapping[str, str] = field(default_factory=dict)
    node_ranks: tuple[int, ...] = ()
    """The ranks that save to the same daemon as this one."""


@dataclass(frozen=True, slots=True)
class Joined:
    """The daemon's answer to a rank that announced itself. See ``JoinReply``."""

    node: str
    max_epoch: int
    lease_s: float
    tier1_path: str
    persistent_storage_path: str
    tier2_reachable: bool
    tier2_error: str
    memory_limit_bytes: int
    memory_free_bytes: int
    files_protected: bool
    daemon_version: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """See ``ClaimEpochReply``."""

    taken: bool
    max_epoch: int
    provisional: bool


@dataclass(frozen=True, slots=True)
class Reserved:
    """Whether a buffer is free, and what ``create`` decides from. See ``ReserveReply``."""

    available: bool
    free_segments: tuple[str, ...]
    tier1: tuple[VersionId, ...]
    tier2: tuple[VersionId, ...]
    last_persist_age_s: float | None
    persist_lost: bool
    failures: tuple[CairnError, ...]


@dataclass(frozen=True, slots=True)
class Alive:
    """See ``KeepAliveReply``."""

    failures: tuple[CairnError, ...]
    settled: tuple[VersionId, ...]
    token: str
    lease_s: float


@dataclass(frozen=True, slots=True)
class Near:
    """A partition that a fetch has brought near, and verified."""

    path: str
    tier: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a fetch has come. ``from_tier`` is where the bytes come from."""

    done_bytes: int
    total_bytes: int
    from_tier: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a finished fetch leaves: a lease under which partitions can be opened."""

    lease: str
    ready: Mapping[str, Near]
    from_tier: str
    digested_bytes: int = 0
    """What had to be hashed for it, because the daemon had not checked it since it started."""
    digest_s: float = 0.0


def state_name(value: int) -> str:
    """``sealed`` for VERSION_STATE_SEALED, and so on."""
    with understood():  # a newer daemon may know more of them
        return types_pb2.VersionState.Name(value).removeprefix("VERSION_STATE_").lower()


def tier_name(value: int) -> str:
    """``tier1`` for TIER_TIER1, and so on."""
    with understood():
        return types_pb2.Tier.Name(value).removeprefix("TIER_").lower()


def version_to_wire(version: VersionId) -> types_pb2.VersionId:
    return types_pb2.VersionId(epoch=version.epoch, sequence=version.sequence, tag=version.tag)


def version_from_wire(version: types_pb2.VersionId) -> VersionId:
    return VersionId(version.epoch, version.sequence, version.tag)


def versions_from_wire(versions: Iterable[types_pb2.VersionId]) -> tuple[VersionId, ...]:
    return tuple(version_from_wire(version) for version in versions)


def records_to_wire(records: Records) -> save_pb2.RecordTable:
    return save_pb2.RecordTable(
        offsets=pack_column(records.offsets),
        lengths=pack_column(records.lengths),
        descriptor_crc_offsets=pack_column(records.descriptor_crc_offsets),
        directory_crc_offsets=pack_column(records.directory_crc_offsets),
    )


def error_from_wire(info: types_pb2.ErrorInfo) -> CairnError:
    """The error that an ``ErrorInfo`` stands for."""
    return error_from(
        {"class": info.error_class, "message": info.message, "hint": info.hint, "context": dict(info.context)}
    )


def errors_from_wire(infos: Iterable[types_pb2.ErrorInfo]) -> tuple[CairnError, ...]:
    return tuple(error_from_wire(info) for info in infos)


def inventory_from_wire(version: types_pb2.Version) -> dict[str, Any]:
    """A version as the JSON value that ranks gather; see ``cairn.choice`` for its meaning."""
    held = any(copy.state == types_pb2.COPY_STATE_VERIFIED for copy in version.copies)
    return {
        "version": str(version_from_wire(version.id)),
        "nonce": version.nonce,
        "state": state_name(version.state),
        "world_size": version.world_size,
        "ranks": sorted(version.ranks),
        "save_dir": version.save_dir,
        "file_marks": version.file_marks,
        "held": held,
        "passed_over": version.passed_over,
        "tiers": [tier_name(copy.tier) for copy in version.copies if copy.state == types_pb2.COPY_STATE_VERIFIED],
        "partitions": [[part.path, part.name, part.rank, part.size_bytes] for part in version.partitions],
    }
