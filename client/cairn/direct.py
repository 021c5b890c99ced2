"""Reading a file that is not in the page cache past the cache: whole blocks with O_DIRECT, scattered as they arrive.

Through the cache the kernel allocates a page, fills it and copies it for every 4 KiB, and on a fast disk that takes
longer than the disk does. Here the disk fills one block while another is copied to where its bytes belong.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import threading
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from ctypes import addressof, c_char

from cairn.capture import native
from cairn.reading import Piece, unreadable

BLOCK_BYTES = 16 * 1024 * 1024
_BLOCKS = 3
"""Two being read and one being copied."""
_ALIGNMENT_BYTES = 4096
_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)
_PROBES = 64
_LEAST_BYTES = 4 * BLOCK_BYTES
"""Of less than this the cache costs little, and the next reader has it."""


def is_cold(fd: int, size_bytes: int) -> bool:
    """Whether most of the first *size_bytes* of a large file are not in the page cache; *fd* is for this caller alone.

    Asked by reading single bytes without waiting: ``mincore`` answers the file's owner only. The places are random,
    because asking may bring them in.
    """
    if size_bytes < _LEAST_BYTES:
        return False
    missing = 0
    byte = bytearray(1)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # else every question reads ahead
    try:
        for _ in range(_PROBES):
            try:
                os.preadv(fd, [byte], random.randrange(size_bytes), os.RWF_NOWAIT)  # noqa: S311 - only places
            except BlockingIOError:
                missing += 1
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise unreadable(str(error)) from error
                return False  # a file system that cannot say is read as usual
    finally:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)
    return missing > _PROBES // 2


def read_directly(fd: int, pieces: Sequence[Piece]) -> bool:
    """As :func:`cairn.reading.read_pieces`, past the page cache; *fd* is for this caller alone.

    False when that cannot be done here, and then some of the memory may have been written. Raises
    :class:`UnavailableError` when the file ends too early or cannot be read; no thread reads any longer then.
    """
    if not native.available():
        return False
    blocks = iter(_cut(pieces))
    lock = threading.Lock()
    failed = threading.Event()

    def work() -> None:
        with _buffer() as buffer:
            while not failed.is_set():
                with lock:
                    parts = next(blocks, [])
                if not parts:
                    return
                try:
                    _read_block(fd, parts, buffer)
                except BaseException:
                    failed.set()
                    raise

    try:
        with _past_the_cache(fd), ThreadPoolExecutor(_BLOCKS, "cairn-direct") as pool:
            workers = [pool.submit(work) for _ in range(_BLOCKS)]
        for worker in workers:
            worker.result()
    except OSError as error:
        if error.errno in _NO_DIRECT:
            return False  # refused by the file system, here or at a read
        raise unreadable(str(error)) from error
    return True


@contextmanager
def _past_the_cache(fd: int) -> Iterator[None]:
    """A descriptor that came from another process is given the flag: to open the file anew may not be permitted."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
    try:
        yield
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


@contextmanager
def _buffer() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, BLOCK_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as buffer:
        with suppress(OSError):  # a kernel without huge pages
            buffer.madvise(mmap.MADV_HUGEPAGE)
        yield buffer


def _cut(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """What lies in each block of the file, in the order of the file."""
    blocks: dict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        done = 0
        while done < piece.size_bytes:
            number, within = divmod(piece.offset + done, BLOCK_BYTES)
            length = min(piece.size_bytes - done, BLOCK_BYTES - within)
            blocks[number].append(Piece(piece.offset + done, piece.address + done, length))
            done += length
    return [blocks[number] for number in sorted(blocks)]


def _read_block(fd: int, parts: Sequence[Piece], buffer: mmap.mmap) -> None:
    """Read what *parts*, all in one block, need of it, and copy it to them."""
    start = min(part.offset for part in parts) // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES
    end = max(part.offset + part.size_bytes for part in parts)
    length = -(-(end - start) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES  # beyond the end of the file: less is read then
    with memoryview(buffer) as view:
        done = 0
        while start + done < end:
            with view[done:length] as rest:
                count = os.preadv(fd, [rest], start + done)
            if count == 0 or ((done + count) % _ALIGNMENT_BYTES and start + done + count < end):
                raise unreadable(f"it ends at {start + done + count}")
            done += count
    first = c_char.from_buffer(buffer)
    address = addressof(first)
    native.copy(
        array("Q", (part.address for part in parts)),
        array("Q", (address + part.offset - start for part in parts)),
        array("Q", (part.size_bytes for part in parts)),
    )
