"""The Restore service, as methods with plain values."""

from __future__ import annotations

import logging
import mmap
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import grpc

from cairn.transport.calls import CALL_TIMEOUT_S, LEAVE_TIMEOUT_S, RESOLVE_TIMEOUT_S, Caller, listen, translate
from cairn.transport.connection import Connection, understood
from cairn.transport.messages import (
    Fetched,
    Near,
    Progress,
    inventory_from_wire,
    tier_name,
    version_from_wire,
    version_to_wire,
)
from cairn.transport.stream import BulkStub, receive
from cairn_api.errors import CairnError, InternalError
from cairn_api.names import VersionId
from cairn_api.v1 import restore_pb2, restore_pb2_grpc
from cairn_api.wire import BRIEF_BYTES

log = logging.getLogger("cairn")

_SERVICE = restore_pb2_grpc.RestoreStub


@dataclass(frozen=True, slots=True)
class Opened:
    """A descriptor (owned by the receiver) of a fetched partition of *size_bytes*; the file behind it may be longer."""

    fd: int
    size_bytes: int
    tier: str
    path_hint: str | None
    hold: str | None
    """Set if the descriptor's memory may be mapped as long as it likes: see :meth:`RestoreCalls.end_hold_with`."""

    @property
    def mappable(self) -> bool:
        """Whether the bytes stay what they are: a published file is never written to, a buffer unless it is held."""
        return self.tier != "memory" or self.hold is not None


class RestoreCalls:
    """What a rank asks while loading. Every method raises as :class:`cairn.transport.calls.Caller` says."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._job = caller.job
        self._ended: _Ended = queue.SimpleQueue()
        self._ender: threading.Thread | None = None
        self._lock = threading.Lock()
        self._fetch_ended = False

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
            for last in self._fetching(connection, request):
                if last.from_tier:
                    from_tier = tier_name(last.from_tier)
                progress(Progress(last.done_bytes, last.total_bytes, from_tier))
            if last is None or not last.lease:
                raise InternalError("the daemon ended a fetch without naming its lease", hint="see the daemon's log")
            ready = {part.path: Near(part.path, tier_name(part.tier), part.size_bytes) for part in last.ready}
            # A daemon that brought nothing from elsewhere may leave out where it was: it is where it lies.
            from_tier = from_tier or max((part.tier for part in ready.values()), default="")
            return Fetched(last.lease, ready, from_tier, last.digested_bytes, last.digest_s)

        return self._caller.repeat(attempt)

    def _fetching(
        self, connection: Connection, request: restore_pb2.FetchRequest
    ) -> Iterator[restore_pb2.FetchProgress]:
        """The answers to a fetch: one on the side socket when all is near, else those of the stream."""
        if "Fetch" in connection.welcome.calls and request.ByteSize() <= BRIEF_BYTES:
            packed = connection.call("Fetch", request.SerializeToString())
            if packed is not None:
                with understood():
                    only = restore_pb2.FetchProgress.FromString(packed)
                yield only
                return
        yield from listen(self._caller.stub(connection, _SERVICE, "Fetch")(request))

    def open(self, lease: str, path: str, *, hold: bool = False) -> Opened:
        """A descriptor of a fetched partition. Not repeated: the lease dies with the connection.

        With *hold* a buffer of the memory tier may be mapped as long as the caller likes, if the daemon can spare it.
        """
        request = {"op": "open", "lease": lease, "path": path, "hold": hold}
        reply, fds = self._caller.current().request(request)
        if not fds:
            raise InternalError("the daemon sent no descriptor", hint="see the daemon's log", context={"path": path})
        hint, held = reply.get("path_hint"), reply.get("hold")
        try:
            with understood():
                return Opened(
                    fds[0],
                    int(reply["size"]),
                    str(reply["tier"]),
                    None if hint is None else str(hint),
                    None if held is None else str(held),
                )
        except InternalError:
            os.close(fds[0])
            raise

    def end_hold_with(self, memory: mmap.mmap, hold: str) -> None:
        """End *hold* soon after *memory* is gone, which may be at any moment and in any thread."""
        self._start_ender()
        weakref.finalize(memory, self._ended.put, partial(_end_hold, hold=hold)).atexit = False

    def end_fetch(self, lease: str) -> None:
        """End the protection that :meth:`fetch` gave, soon: nobody waits for that. Raises nothing."""
        self._start_ender()
        self._ended.put(partial(_end_fetch, lease=lease))
        self._fetch_ended = True

    def note_resume(self, version: VersionId, attempt: str) -> int:
        """Say that this launch goes on from *version*; returns how many launches before it died on that in a row."""
        request = restore_pb2.NoteResumeRequest(job=self._job, id=version_to_wire(version), attempt=attempt)
        reply = self._caller.unary(_SERVICE, "NoteResume", restore_pb2.NoteResumeReply, request, CALL_TIMEOUT_S)
        return int(reply.died_in_a_row)

    def note_good_end(self) -> None:
        """Say that this launch ends without an error."""
        request = restore_pb2.NoteResumeRequest(job=self._job, ended=True)
        self._caller.unary(_SERVICE, "NoteResume", restore_pb2.NoteResumeReply, request, LEAVE_TIMEOUT_S)

    def settle(self) -> None:
        """Wait until the fetches that ended so far protect nothing any more: no save is to be left out for them."""
        if self._fetch_ended:
            self._fetch_ended = False
            settled = threading.Event()
            self._ended.put(lambda _: settled.set())
            settled.wait(CALL_TIMEOUT_S)

    def close(self) -> None:
        """Nothing more has to be ended: the daemon takes what is left with the connection."""
        self._ended.put(None)

    def _start_ender(self) -> None:
        with self._lock:
            if self._ender is None:
                # It knows the queue and the caller only, so that it ends with this object.
                self._ender = threading.Thread(
                    target=_end_all, args=(self._ended, self._caller), name="cairn-restore", daemon=True
                )
                self._ender.start()
                weakref.finalize(self, self._ended.put, None).atexit = False

    def read(self, lease: str, path: str, size_bytes: int) -> mmap.mmap:
        """The *size_bytes* bytes of a fetched partition, as a stream. Not repeated, as :meth:`open`."""
        request = restore_pb2.ReadRequest(lease=lease, path=path)
        try:
            replies = self._caller.stub(self._caller.current(), BulkStub, "Read")(request)
            try:
                return receive(listen(replies), size_bytes, path)
            finally:
                replies.cancel()  # does nothing to one that has ended
        except grpc.RpcError as error:
            raise translate(error) from error


def _end_hold(caller: Caller, hold: str) -> None:
    caller.current().request({"op": "end_hold", "hold": hold})


def _end_fetch(caller: Caller, lease: str) -> None:
    request = restore_pb2.EndFetchRequest(lease=lease)
    caller.unary(_SERVICE, "EndFetch", restore_pb2.EndFetchReply, request, CALL_TIMEOUT_S)


_Ended: TypeAlias = "queue.SimpleQueue[Callable[[Caller], None] | None]"


def _end_all(ended: _Ended, caller: Caller) -> None:
    while (end := ended.get()) is not None:
        try:
            end(caller)
        except CairnError as error:
            log.info("what a restore held could not be given back, the daemon takes it with the connection: %s", error)
