"""From the wire to the daemon's own values, and nothing else.

An enum value that this release does not know stops the command: it never shows a version as something that it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import grpc

from cairn_api.errors import ERRORS, CairnError, ConfigurationError, InternalError, OverloadedError, UnavailableError
from cairn_api.names import VersionId
from cairn_api.v1 import types_pb2 as pb
from cairn_api.wire import ERROR_METADATA
from cairnd.digests import Digest
from cairnd.model import Copy, CopyState, Partition, Tier, Version, VersionState

START_DAEMON = "start cairnd (systemctl start cairnd), or give the right --runtime-dir; --store reads without a daemon"

_Value = TypeVar("_Value")
_STATES: Mapping[int, VersionState] = {
    pb.VersionState.Value(f"VERSION_STATE_{state.name}"): state for state in VersionState
}
_COPY_STATES: Mapping[int, CopyState] = {pb.CopyState.Value(f"COPY_STATE_{state.name}"): state for state in CopyState}
_TIERS: Mapping[int, Tier] = {pb.Tier.Value(f"TIER_{tier.name}"): tier for tier in Tier}

_BY_STATUS: Mapping[grpc.StatusCode, type[CairnError]] = {
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: UnavailableError,
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: UnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNIMPLEMENTED: ConfigurationError,
}
"""For failures that gRPC itself reports; what the daemon raised on purpose names its class."""

_HINTS: Mapping[grpc.StatusCode, str] = {
    grpc.StatusCode.UNAVAILABLE: START_DAEMON,
    grpc.StatusCode.CANCELLED: "run the command again; `cairn status` says whether the daemon answers",
    grpc.StatusCode.DEADLINE_EXCEEDED: "see with `cairn status` what keeps the daemon busy, and try again",
    grpc.StatusCode.UNAUTHENTICATED: "run the command again",
    grpc.StatusCode.UNIMPLEMENTED: "run the `cairn` command of the daemon's own release",
}


def error_from_call(error: grpc.RpcError) -> CairnError:
    """What to raise for a failed call."""
    call: Any = error  # every RpcError of a call is also a grpc.Call, which the stubs do not say
    for key, value in call.trailing_metadata() or ():
        if key == ERROR_METADATA:
            info = pb.ErrorInfo.FromString(value)
            return error_from_fields(info.error_class, info.message, info.hint, info.context)
    code: grpc.StatusCode = call.code()
    return _BY_STATUS.get(code, InternalError)(
        f"the call to the daemon failed: {code.name}: {call.details() or 'no details'}",
        hint=_HINTS.get(code, "see the daemon's log (journalctl -u cairnd)"),
    )


def error_from_fields(name: str, message: str, hint: str, context: Mapping[str, Any]) -> CairnError:
    """The daemon's error, to be raised again here; a class of a newer release becomes :class:`InternalError`."""
    return ERRORS.get(name, InternalError)(message, hint=hint, context=dict(context))


def version_id(message: pb.VersionId) -> VersionId:
    """The id; the daemon checked its grammar."""
    return VersionId(message.epoch, message.sequence, message.tag)


def tier(value: int) -> Tier:
    """The tier."""
    return _known(_TIERS, value, "tier")


def version(message: pb.Version) -> Version:
    """A version with whatever partitions came along. Without them, only ``message.size_bytes`` tells its size."""
    return Version(
        job=message.job, id=version_id(message.id), state=_known(_STATES, message.state, "state"),
        world_size=message.world_size, nonce=message.nonce, save_dir=message.save_dir, persist=message.persist,
        file_marks=message.file_marks, created_s=message.created_s, ranks=frozenset(message.ranks),
        pinned=message.pinned, passed_over=message.passed_over, reason=message.reason,
        attributes=dict(message.attributes),
        partitions=tuple(_partition(item) for item in message.partitions),
        copies={tier(item.tier): _copy(item) for item in message.copies},
    )  # fmt: skip


def _copy(message: pb.Copy) -> Copy:
    return Copy(_known(_COPY_STATES, message.state, "copy state"), message.error, message.damaged)


def _partition(message: pb.Partition) -> Partition:
    # Zero means "not yet known"; a partition whose CRC really is 0 is then shown, and exported, without one.
    digest = Digest(message.size_bytes, message.crc64nvme, ()) if message.crc64nvme else None
    return Partition(message.name, message.path, message.rank, message.size_bytes, digest, tuple(message.globals))


def _known(values: Mapping[int, _Value], value: int, what: str) -> _Value:
    if value not in values:
        raise ConfigurationError(
            f"the daemon speaks of a {what} ({value}) that this command does not know",
            hint="run the `cairn` command of the daemon's own release",
        )
    return values[value]
