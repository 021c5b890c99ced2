"""Digests of bytes that lie somewhere already: a file's or a buffer's, by a few threads side by side.

A cold disk wants several requests in flight, and a warm file is hashed as fast as cores allow. Everybody has only a few
blocks in the queue, so that a restore need not wait for a far larger verification. Files are read through the page
cache on purpose: whoever asked for the digest is about to map the file, and finds its pages there. A read around the
cache would have to be followed by a second one, or by a copy into memory that costs more than the read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from queue import SimpleQueue

from awscrt.checksums import combine_crc64nvme, crc64nvme

from cairnd.digests import BLOCK_BYTES, Digest
from cairnd.tiers.filesystem import FileSystem, read_exactly

READERS = 3
"""Blocks that are read or hashed at once, of all files together."""

_AHEAD = 2 * READERS
"""Blocks of one file that wait or run: enough to keep all readers busy, and whoever comes next waits for no more."""

_PIECE_BYTES = 4 * 1024 * 1024
"""As much as is hashed at once (see :mod:`cairnd.digests`)."""

Progress = Callable[[int], None]


class Hashing:
    """Shared by all who hash. Its methods block; thread-safe. Takes :data:`READERS` x 4 MiB of memory.

    *pools* makes a pool of so many threads with a name.
    """

    def __init__(self, fs: FileSystem, pools: Callable[[int, str], Executor] = ThreadPoolExecutor) -> None:
        self._fs = fs
        self._pool = pools(READERS, "cairnd-hash")
        self._buffers: SimpleQueue[bytearray] = SimpleQueue()
        for _ in range(READERS):
            self._buffers.put(bytearray())

    def of_file(self, fd: int, size_bytes: int, progress: Progress) -> Digest:
        """The digest of the first *size_bytes* of an open file; *progress* is told how many bytes were hashed.

        Errors of the file system pass through unchanged; a file that shrinks meanwhile raises :class:`VersionError`.
        """

        def block(offset: int, length: int) -> int:
            with self._buffer() as buffer:
                crc = 0
                for start in range(offset, offset + length, _PIECE_BYTES):
                    with buffer[: min(_PIECE_BYTES, offset + length - start)] as piece:
                        read_exactly(self._fs, fd, piece, start)
                        crc = crc64nvme(piece, crc)
                return crc

        return self._digest(block, size_bytes, progress)

    def of_memory(self, view: memoryview, progress: Progress) -> Digest:
        """The digest of *view*, which is kept as long as this runs."""

        def block(offset: int, length: int) -> int:
            crc = 0
            for start in range(offset, offset + length, _PIECE_BYTES):
                with view[start : min(start + _PIECE_BYTES, offset + length)] as piece:
                    crc = crc64nvme(piece, crc)
            return crc

        return self._digest(block, len(view), progress)

    def close(self) -> None:
        """Accept no more work."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _digest(self, block: Callable[[int, int], int], size_bytes: int, progress: Progress) -> Digest:
        spans = ((at, min(BLOCK_BYTES, size_bytes - at)) for at in range(0, size_bytes, BLOCK_BYTES))
        ahead: deque[tuple[Future[int], int, int]] = deque()

        def submit(count: int) -> None:
            ahead.extend((self._pool.submit(block, *span), *span) for span in islice(spans, count))

        crcs: list[int] = []
        whole = 0
        try:
            submit(_AHEAD)
            while ahead:
                future, offset, length = ahead[0]
                crcs.append(future.result())
                ahead.popleft()
                submit(1)
                whole = combine_crc64nvme(whole, crcs[-1], length)
                progress(offset + length)
        finally:
            _over([future for future, _, _ in ahead])  # the file is closed, and the buffer given back, on return
        return Digest(size_bytes, whole, tuple(crcs))

    @contextmanager
    def _buffer(self) -> Iterator[memoryview]:
        buffer = self._buffers.get()
        try:
            if not buffer:
                buffer = bytearray(_PIECE_BYTES)
            with memoryview(buffer) as view:
                yield view
        finally:
            self._buffers.put(buffer)


def _over(futures: list[Future[int]]) -> None:
    """None of *futures* runs any more."""
    for future in futures:
        future.cancel()
    for future in futures:
        if not future.cancelled():
            future.exception()
