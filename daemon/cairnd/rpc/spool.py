"""From the messages of a ``Put`` to a temporary file: digested and written while the next bytes arrive.

The bytes are copied once, from the message that gRPC delivered into memory that can be written past the page cache. Two
such blocks per stream take turns: the event loop fills one while a worker thread digests and writes the other.
"""

from __future__ import annotations

import asyncio
import mmap
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from google.protobuf.message import DecodeError

from cairn_api.errors import ConfigurationError, OverloadedError, UnavailableError
from cairn_api.framing import unframed
from cairn_api.v1 import save_pb2 as pb
from cairn_api.wire import SLOWEST_STREAM_BYTES_PER_S
from cairnd.rpc.status import unreadable
from cairnd.sealing import SealingPass
from cairnd.tiers.atomic import BulkWriter
from cairnd.workers import Workers, to_the_end

SILENCE_TIMEOUT_S = 120.0
"""Longest wait for the next message."""

_BLOCK_BYTES = 4 * 1024 * 1024
_STREAMS = 8
"""At once; more wait. With two blocks each this bounds the memory, and a disk is not faster with more."""
_STREAMS_PER_CLIENT = 4


class StreamSlots:
    """How many streams may run at once, in all and per client."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(_STREAMS)
        self._of_client: Counter[int] = Counter()

    @asynccontextmanager
    async def taken(self, client: int) -> AsyncIterator[None]:
        """Holds one of them, waiting until there is one. Raises :class:`OverloadedError` if *client* has its share."""
        if self._of_client[client] >= _STREAMS_PER_CLIENT:
            raise OverloadedError(
                f"this client has {_STREAMS_PER_CLIENT} streams running", hint="send one partition after the other"
            )
        self._of_client[client] += 1
        try:
            async with self._free:
                yield
        finally:
            self._of_client[client] -= 1
            self._of_client += Counter()  # forgets who has none


def parsed(message: bytes) -> pb.PutRequest:
    """Raises :class:`ConfigurationError` for bytes that are no ``PutRequest``."""
    try:
        return pb.PutRequest.FromString(message)
    except DecodeError as error:
        raise unreadable(error) from error


async def pieces(messages: AsyncIterator[bytes], size_bytes: int) -> AsyncIterator[memoryview]:
    """The bytes of *messages*, which together are *size_bytes*, none of them copied.

    Raises :class:`ConfigurationError` when they are too many or too few or come in another kind of message, and
    :class:`UnavailableError` when the stream falls silent or is far too slow.
    """
    loop = asyncio.get_running_loop()
    end_s = loop.time() + SILENCE_TIMEOUT_S + size_bytes / SLOWEST_STREAM_BYTES_PER_S
    received_bytes = 0
    while True:
        try:
            async with asyncio.timeout_at(min(end_s, loop.time() + SILENCE_TIMEOUT_S)):
                message = await anext(messages, None)
        except TimeoutError:
            raise UnavailableError(
                f"a stream fell silent, or was too slow, after {received_bytes} of {size_bytes} bytes",
                hint="see whether the trainer hangs; save again",
            ) from None
        if message is None:
            break
        data = _data(message)
        received_bytes += len(data)
        if not data or received_bytes > size_bytes:
            raise ConfigurationError("the stream does not match its header", hint="send exactly size_bytes of data")
        yield data
    if received_bytes != size_bytes:
        raise ConfigurationError(f"the stream ended after {received_bytes} of {size_bytes} bytes")


def _data(message: bytes) -> memoryview:
    """What a message carries; nothing if it is of another kind."""
    data = unframed(pb.PutRequest.DATA_FIELD_NUMBER, message)
    return memoryview(parsed(message).data) if data is None else data


async def spool(
    arriving: AsyncIterator[memoryview],
    writer: BulkWriter,
    sealing: SealingPass,
    workers: Workers,
    *,
    on_block: Callable[[], object],
) -> None:
    """Digest and write what is *arriving*, which is exactly ``writer.size_bytes``; calls *on_block* now and then.

    No thread uses *writer* any more when this returns or raises. Raises what *arriving*, *on_block*, *sealing* and
    *writer* raise.
    """
    size_bytes = writer.size_bytes
    blocks = [_aligned(min(_BLOCK_BYTES, size_bytes)) for _ in range(2)]
    writing: asyncio.Task[None] | None = None
    offset = filled = 0

    def write(block: memoryview, at: int) -> None:
        sealing.process(block, at)
        writer.write(block, at)

    try:
        async for piece in arriving:
            taken = 0
            while taken < len(piece):
                part = piece[taken : taken + len(blocks[0]) - filled]
                blocks[0][filled : filled + len(part)] = part
                filled += len(part)
                taken += len(part)
                if filled == len(blocks[0]) or offset + filled == size_bytes:
                    if writing is not None:
                        await asyncio.shield(writing)
                    on_block()
                    writing = asyncio.ensure_future(workers.run(write, blocks[0][:filled], offset))
                    offset, filled = offset + filled, 0
                    blocks.reverse()
    finally:
        if writing is not None:
            await to_the_end(_ended(writing))


def _aligned(size_bytes: int) -> memoryview:
    """Memory to write from past the page cache, of huge pages where the system has them: the disk takes those faster.

    It goes with the view, and is not closed: an error on its way up may still hold a part of it.
    """
    memory = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


async def _ended(writing: asyncio.Task[None]) -> None:
    await writing
