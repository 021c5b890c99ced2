"""The one table between error classes and gRPC status codes, and how an error travels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import grpc

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


def to_proto(error: CairnError) -> pb.ErrorInfo:
    """*error* as it travels."""
    return pb.ErrorInfo(
        error_class=public_class(error).__name__, message=error.message, hint=error.hint, context=error.context
    )


def unforeseen(error: BaseException, where: str) -> InternalError:
    """Wrap and log what nobody foresaw: a defect must reach both the log and the caller."""
    log.error("unforeseen error in %s", where, exc_info=error)
    return InternalError(
        f"{where} failed unexpectedly: {type(error).__name__}: {error}",
        hint="report this with the daemon's log (journalctl -u cairnd)",
    )


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: CairnError) -> None:
    """End the call with *error*; does not return."""
    await context.abort(
        CODES[public_class(error)], error.message, ((ERROR_METADATA, to_proto(error).SerializeToString()),)
    )
