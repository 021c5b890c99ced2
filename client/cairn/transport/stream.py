"""A partition as a stream of bytes, for systems where memory cannot be shared and for states larger than the grant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cairn_api.errors import InternalError
from cairn_api.v1 import save_pb2
from cairn_api.wire import STREAM_CHUNK_BYTES

WINDOW_BYTES = 16 * STREAM_CHUNK_BYTES
"""Most memory that a streamed partition takes in this process, whatever its size."""


def chunks(windows: Iterable[memoryview | bytes]) -> Iterator[bytes]:
    """The bytes of *windows* in pieces of at most :data:`STREAM_CHUNK_BYTES`; a window may be reused once consumed."""
    for window in windows:
        view = memoryview(window).cast("B")
        for start in range(0, len(view), STREAM_CHUNK_BYTES):
            yield bytes(view[start : start + STREAM_CHUNK_BYTES])


def put_requests(header: save_pb2.PutHeader, windows: Iterable[memoryview | bytes]) -> Iterator[save_pb2.PutRequest]:
    """The messages of one ``Put``: the header, then the bytes, which must be exactly ``header.size_bytes``."""
    yield save_pb2.PutRequest(header=header)
    sent_bytes = 0
    for chunk in chunks(windows):
        sent_bytes += len(chunk)
        yield save_pb2.PutRequest(data=chunk)
    if sent_bytes != header.size_bytes:
        raise InternalError(
            f"partition {header.name!r} was planned with {header.size_bytes} bytes and came out with {sent_bytes}",
            hint="report this with the types in your state dict",
        )
