"""A partition as a stream of bytes, for systems where memory cannot be shared and for states larger than the grant.

One stream per partition, in messages that are framed without protobuf (:mod:`cairn_api.framing`): gRPC alone carries
those nearly twice as fast. Larger frames, look-ahead and buffers of HTTP/2, a server with threads, and two streams at
once, on one channel or on two, did not help.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import grpc

from cairn_api.errors import InternalError
from cairn_api.framing import framed, unframed
from cairn_api.v1 import restore_pb2, save_pb2
from cairn_api.wire import STREAM_CHUNK_BYTES

WINDOW_BYTES = STREAM_CHUNK_BYTES
"""Bytes that are gathered at once: one message's worth, still in the processor's cache when it is framed."""

_MESSAGES_AHEAD = 2
"""That wait to be sent. With them, the window and the message being sent a stream takes five times the window."""

_SAVE = save_pb2.DESCRIPTOR.services_by_name["Save"].full_name
_RESTORE = restore_pb2.DESCRIPTOR.services_by_name["Restore"].full_name


class BulkStub:
    """``Save.Put`` and ``Restore.Read`` with the messages of their streams as bytes; ``Put`` returns a future."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.Put: Any = channel.stream_unary(
            f"/{_SAVE}/Put", request_serializer=None, response_deserializer=save_pb2.PutReply.FromString
        ).future
        self.Read: Any = channel.unary_stream(
            f"/{_RESTORE}/Read",
            request_serializer=restore_pb2.ReadRequest.SerializeToString,
            response_deserializer=None,
        )


def put(
    start: Callable[[Iterator[bytes]], Any], header: save_pb2.PutHeader, windows: Iterable[memoryview | bytes]
) -> None:
    """Make one ``Put``, which *start* begins and returns as a future: the header, then the bytes of *windows*.

    The windows are made here, on the caller's thread, while gRPC sends the messages before on its own; a window may be
    reused once the next one is asked for. Raises what *windows* raises, :class:`InternalError` when they are not
    exactly ``header.size_bytes``, and :class:`grpc.RpcError`.
    """
    ahead = _Ahead()
    call = start(iter(ahead.take, None))
    call.add_done_callback(lambda _: ahead.end())
    try:
        for message in put_messages(header, windows):
            if not ahead.add(message):
                break  # the call has ended, its result says why
        ahead.finish()
        call.result()
    except grpc.FutureCancelledError:
        raise call from None  # as every other end of a call
    finally:
        call.cancel()  # does nothing to one that has ended


def put_messages(header: save_pb2.PutHeader, windows: Iterable[memoryview | bytes]) -> Iterator[bytes]:
    """The messages of one ``Put``."""
    yield save_pb2.PutRequest(header=header).SerializeToString()
    sent_bytes = 0
    for window in windows:
        view = memoryview(window).cast("B")
        sent_bytes += len(view)
        for start in range(0, len(view), STREAM_CHUNK_BYTES):
            yield framed(save_pb2.PutRequest.DATA_FIELD_NUMBER, view[start : start + STREAM_CHUNK_BYTES])
    if sent_bytes != header.size_bytes:
        raise InternalError(
            f"partition {header.name!r} was planned with {header.size_bytes} bytes and came out with {sent_bytes}",
            hint="report this with the types in your state dict",
        )


class _Ahead:
    """Messages that are made and not sent yet: few, in order, from one thread to another."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._messages: deque[bytes | None] = deque()
        self._ended = False

    def add(self, message: bytes) -> bool:
        """Wait for room; False when nobody takes messages any more."""
        with self._changed:
            while len(self._messages) >= _MESSAGES_AHEAD and not self._ended:
                self._changed.wait()
            self._messages.append(message)
            self._changed.notify_all()
            return not self._ended

    def finish(self) -> None:
        """There are no more messages."""
        with self._changed:
            self._messages.append(None)
            self._changed.notify_all()

    def end(self) -> None:
        """Nobody takes messages any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def take(self) -> bytes | None:
        """The next message, None after the last one."""
        with self._changed:
            while not self._messages and not self._ended:
                self._changed.wait()
            message = None if self._ended else self._messages.popleft()
            self._changed.notify_all()
            return message


def receive(messages: Iterable[bytes], size_bytes: int, what: str) -> mmap.mmap:
    """The bytes of *messages*, the replies of a ``Read`` of *what*, in new memory of exactly *size_bytes* (at least 1).

    Each byte is copied once; huge pages are used where the system has them. Raises :class:`InternalError` when there
    are more or fewer bytes.
    """
    memory = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    end = 0
    with memoryview(memory) as target:
        for message in messages:
            data = unframed(restore_pb2.ReadReply.DATA_FIELD_NUMBER, message)
            if data is None:
                data = memoryview(restore_pb2.ReadReply.FromString(message).data)
            start, end = end, end + len(data)
            if end > size_bytes:
                break
            target[start:end] = data
    if end != size_bytes:
        raise InternalError(
            f"the daemon sent {'more' if end > size_bytes else 'fewer'} than the {size_bytes} bytes of {what}",
            hint="see the daemon's log (journalctl -u cairnd)",
        )
    return memory
