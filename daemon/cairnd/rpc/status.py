"""The one table between error classes and gRPC status codes, and how an error travels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cairn_api.errors import (
    CairnError,
    ConfigurationError,
    InternalError,
    OverloadedError,
    SaveFailedError,
    UnavailableError,
    VersionError,
)
from cairn_api.v1 import types_pb2 as pb
from cairn_api.wire import ERROR_METADATA

_TEXT_BYTES = 1500
_CONTEXT_BYTES = 200
_DETAILS_LENGTH = 1000
"""What errors quote may be long. Cut to this, one always fits into the 8 KiB of metadata that gRPC lets through."""

log = logging.getLogger("cairnd.rpc")

CODES: Mapping[type[CairnError], grpc.StatusCode] = {
    # ABORTED and not UNAVAILABLE: gRPC itself uses the latter for a daemon that is gone.
    UnavailableError: grpc.StatusCode.ABORTED,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ConfigurationError: grpc.StatusCode.FAILED_PRECONDITION,
    VersionError: grpc.StatusCode.NOT_FOUND,
    SaveFailedError: grpc.StatusCode.DATA_LOSS,
    InternalError: grpc.StatusCode.INTERNAL,
}


def public_class(error: CairnError) -> type[CairnError]:
    """The class that the wire knows: *error*'s own, or the nearest base in the closed set."""
    return next(cls for cls in type(error).__mro__ if cls in CODES)


def fields_of(error: CairnError) -> dict[str, Any]:
    """*error* as it travels on the side socket."""
    return {
        "class": public_class(error).__name__,
        "message": _cut(error.message, _TEXT_BYTES),
        "hint": _cut(error.hint, _TEXT_BYTES),
        "context": {key: _cut(value, _CONTEXT_BYTES) for key, value in error.context.items()},
    }


def to_proto(error: CairnError) -> pb.ErrorInfo:
    """*error* as it travels by gRPC."""
    told = fields_of(error)
    return pb.ErrorInfo(error_class=told["class"], message=told["message"], hint=told["hint"], context=told["context"])


def _cut(text: str, size_bytes: int) -> str:
    packed = text[:size_bytes].encode(errors="backslashreplace")  # JSON and file names bring surrogates, UTF-8 has none
    if len(text) <= size_bytes and len(packed) <= size_bytes:
        return packed.decode()
    return f"{packed[: size_bytes - 3].decode(errors='ignore')}..."


def unforeseen(error: BaseException, where: str) -> InternalError:
    """Wrap and log what nobody foresaw: a defect must reach both the log and the caller."""
    log.error("unforeseen error in %s", where, exc_info=error)
    return InternalError(
        f"{where} failed unexpectedly: {type(error).__name__}: {error}",
        hint="report this with the daemon's log (journalctl -u cairnd)",
    )


def unreadable(error: DecodeError) -> ConfigurationError:
    """The error for bytes that are not the message they should be."""
    return ConfigurationError(
        f"the request cannot be read: {error}", hint="use a client of the daemon's version; report a bug if it is"
    )


def without_traces(error: CairnError) -> CairnError:
    """*error* without the frames that it passed, whose variables are the request; for :func:`abort`.

    A context keeps what it was aborted with, and that keeps its own frame, with the context: until the collector next
    looks at all there is, which may be never. Requests have up to 32 MB; refused ones stayed with the daemon.
    """
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: CairnError) -> None:
    """End the call with *error*; does not return."""
    # The details travel with three bytes for each that is not ASCII; Cairn's own clients read the metadata.
    details = error.message[:_DETAILS_LENGTH].encode("ascii", "replace").decode()
    await context.abort(CODES[public_class(error)], details, ((ERROR_METADATA, to_proto(error).SerializeToString()),))
