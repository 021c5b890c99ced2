"""Between the wire's messages and the daemon's values. Translation only."""

from __future__ import annotations

import math
from array import array
from typing import Any

from cairn_api.errors import ConfigurationError
from cairn_api.names import VersionId, check_tag, parse_version
from cairn_api.v1 import save_pb2
from cairn_api.v1 import types_pb2 as pb
from cairn_api.wire import unpack_column
from cairnd.model import CopyState, Tier, Version, VersionState
from cairnd.records import PieceDigests, RecordTable

_STATES: dict[VersionState, Any] = {
    state: pb.VersionState.Value(f"VERSION_STATE_{state.name}") for state in VersionState
}
_TIERS: dict[Tier, Any] = {tier: pb.Tier.Value(f"TIER_{tier.name}") for tier in Tier}
_COPIES: dict[CopyState, Any] = {state: pb.CopyState.Value(f"COPY_STATE_{state.name}") for state in CopyState}


def state_to(state: VersionState) -> Any:
    return _STATES[state]


def tier_to(tier: Tier) -> Any:
    return _TIERS[tier]


def id_to(version: VersionId) -> pb.VersionId:
    return pb.VersionId(epoch=version.epoch, sequence=version.sequence, tag=version.tag)


def id_from(message: pb.VersionId) -> VersionId:
    """Raises :class:`ConfigurationError` for a name that could not be one."""
    if message.epoch < 1 or message.sequence < 1:
        raise ConfigurationError("epoch and sequence count from 1", hint="claim an epoch before creating a version")
    version = VersionId(message.epoch, message.sequence, check_tag(message.tag))
    return parse_version(str(version))  # what could not be read back from a folder's name is not written there


def seconds_from(value: float, longest_s: float = 24 * 3600.0) -> float:
    """A duration that a client named, at most *longest_s*; what is not a number would upset every timer here."""
    if math.isnan(value):
        raise ConfigurationError("a duration is a number of seconds", hint="pass 0 or more")
    return min(max(value, 0.0), longest_s)


def records_from(message: save_pb2.RecordTable) -> RecordTable:
    columns = (message.offsets, message.lengths, message.descriptor_crc_offsets, message.directory_crc_offsets)
    return RecordTable(*map(_column_from, columns))


def digests_from(packed: bytes) -> PieceDigests:
    """Raises :class:`ConfigurationError` for what is no array of rows."""
    return PieceDigests(_column_from(packed))


def _column_from(packed: bytes) -> array[int]:
    try:
        return unpack_column(packed)
    except ValueError as error:
        raise ConfigurationError(
            "a column of the record table is not a packed array of 64-bit numbers",
            hint="save again with a client of the daemon's version; report a bug if it is",
        ) from error


def version_to(version: Version, *, partitions: bool) -> pb.Version:
    message = pb.Version(
        job=version.job,
        id=id_to(version.id),
        state=_STATES[version.state],
        save_dir=version.save_dir,
        nonce=version.nonce,
        world_size=version.world_size,
        ranks=sorted(version.ranks),
        persist=version.wants_tier2,
        pinned=version.pinned,
        created_s=version.created_s,
        size_bytes=version.size_bytes,
        reason=version.reason,
        file_marks=version.file_marks,
        attributes=version.attributes,
        passed_over=version.passed_over,
    )
    for tier, copy in version.copies.items():
        message.copies.add(tier=_TIERS[tier], state=_COPIES[copy.state], error=copy.error, damaged=copy.damaged)
    if partitions:
        for item in version.partitions:
            message.partitions.add(
                name=item.name,
                path=item.path,
                rank=item.rank,
                size_bytes=item.size_bytes,
                crc64nvme=item.digest.crc64nvme if item.digest is not None else 0,
                globals=item.globals,
            )
    return message
