"""The Restore service, as methods with plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from cairn.transport.calls import CALL_TIMEOUT_S, RESOLVE_TIMEOUT_S, Caller, listen, translate
from cairn.transport.connection import Connection
from cairn.transport.messages import (
    Fetched,
    Near,
    Progress,
    inventory_from_wire,
    tier_name,
    version_from_wire,
    version_to_wire,
)
from cairn_api.errors import InternalError
from cairn_api.names import VersionId
from cairn_api.v1 import restore_pb2, restore_pb2_grpc

_SERVICE = restore_pb2_grpc.RestoreStub


@dataclass(frozen=True, slots=True)
class Opened:
    """A descriptor (owned by the receiver) of a fetched partition of *size_bytes*; the file behind it may be longer."""

    fd: int
    size_bytes: int
    tier: str
    path_hint: str | None


class RestoreCalls:
    """What a rank asks while loading. Every method raises as :class:`cairn.transport.calls.Caller` says."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._job = caller.job

    def resolve(self, source: str = "", tag: str = "", *, local_only: bool = False) -> dict[str, Any]:
        """Everything this daemon could restore, as the JSON value that ranks gather (see ``cairn.choice``)."""
        request = restore_pb2.ResolveRequest(job=self._job, source=source, tag=tag, local_only=local_only)
        reply = self._caller.unary(_SERVICE, "Resolve", restore_pb2.ResolveReply, request, RESOLVE_TIMEOUT_S)
        resumed = version_from_wire(reply.resumed_from) if reply.HasField("resumed_from") else None
        return {
            "claimed_epoch": reply.claimed_epoch,
            "resumed_from": None if resumed is None else str(resumed),
            "tier2_error": reply.tier2_error,
            "unhealthy": [str(version_from_wire(version)) for version in reply.unhealthy],
            "versions": [inventory_from_wire(version) for version in reply.versions],
        }

    def fetch(
        self, version: VersionId, paths: Sequence[str], source: str, progress: Callable[[Progress], None]
    ) -> Fetched:
        """Bring *paths* of *version* near, verified and protected until :meth:`end_fetch`."""
        request = restore_pb2.FetchRequest(job=self._job, id=version_to_wire(version), paths=paths, source=source)

        def attempt(connection: Connection) -> Fetched:
            last: restore_pb2.FetchProgress | None = None
            from_tier = ""
            for last in listen(self._caller.stub(connection, _SERVICE, "Fetch")(request)):
                if last.from_tier:
                    from_tier = tier_name(last.from_tier)
                progress(Progress(last.done_bytes, last.total_bytes, from_tier))
            if last is None or not last.lease:
                raise InternalError("the daemon ended a fetch without naming its lease", hint="see the daemon's log")
            ready = {part.path: Near(part.path, tier_name(part.tier), part.size_bytes) for part in last.ready}
            # A daemon that brought nothing from elsewhere may leave out where it was: it is where it lies.
            return Fetched(last.lease, ready, from_tier or max((part.tier for part in ready.values()), default=""))

        return self._caller.repeat(attempt)

    def open(self, lease: str, path: str) -> Opened:
        """A descriptor of a fetched partition. Not repeated: the lease dies with the connection."""
        reply, fds = self._caller.current().request({"op": "open", "lease": lease, "path": path})
        if not fds:
            raise InternalError("the daemon sent no descriptor", hint="see the daemon's log", context={"path": path})
        hint = reply.get("path_hint")
        return Opened(fds[0], int(reply["size"]), str(reply["tier"]), None if hint is None else str(hint))

    def read(self, lease: str, path: str) -> Iterator[bytes]:
        """The bytes of a fetched partition, in order. Not repeated, as :meth:`open`."""
        request = restore_pb2.ReadRequest(lease=lease, path=path)
        try:
            for reply in listen(self._caller.stub(self._caller.current(), _SERVICE, "Read")(request)):
                yield reply.data
        except grpc.RpcError as error:
            raise translate(error) from error

    def end_fetch(self, lease: str) -> None:
        """End the protection that :meth:`fetch` gave."""
        request = restore_pb2.EndFetchRequest(lease=lease)
        self._caller.unary(_SERVICE, "EndFetch", restore_pb2.EndFetchReply, request, CALL_TIMEOUT_S)
