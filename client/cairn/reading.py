"""Reading many pieces of a file to where they belong in memory: a few threads, none of them holding the GIL.

``preadv`` copies from the page cache, or from a capture buffer, straight to its target. Mapping the file first would
cost a page fault per 4 KiB, which takes longer than the copy itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from cairn_api.errors import UnavailableError

_THREADS = 4
_SHARE_BYTES = 16 * 1024 * 1024
"""What a thread reads at once: enough to be worth a thread, little enough that the last ones end together."""
_VECTORS = 512
"""Pieces per system call; the kernel takes 1024 vectors, and between two pieces there may be a gap to skip."""
_GAP_BYTES = 4096
"""Up to this much between two pieces is read along and thrown away, rather than beginning a new call."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.preadv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong)
_libc.preadv.restype = ctypes.c_ssize_t


class Piece(NamedTuple):
    """*size_bytes* of the file at *offset*, and the address in this process where they go."""

    offset: int
    address: int
    size_bytes: int


def read_pieces(fd: int, pieces: Sequence[Piece]) -> None:
    """Read all *pieces*, which do not overlap in memory; whoever calls keeps the memory alive.

    Raises :class:`UnavailableError` when the file ends too early or cannot be read.
    """
    shares = list(_shares(sorted(pieces)))
    threads = min(_THREADS, len(os.sched_getaffinity(0)), len(shares))
    if threads <= 1:
        for share in shares:
            _read(fd, share)
        return
    with ThreadPoolExecutor(threads, "cairn-read") as pool:
        for _ in pool.map(lambda share: _read(fd, share), shares):
            pass


def _shares(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """*pieces* in order, large ones cut and small ones put together, each share for one system call."""
    share: list[Piece] = []
    share_bytes = end = 0
    for piece in pieces:
        for start in range(0, piece.size_bytes, _SHARE_BYTES):
            part = Piece(piece.offset + start, piece.address + start, min(_SHARE_BYTES, piece.size_bytes - start))
            full = share_bytes + part.size_bytes > _SHARE_BYTES or len(share) == _VECTORS
            if share and (full or not 0 <= part.offset - end <= _GAP_BYTES):
                yield share
                share, share_bytes = [], 0
            share.append(part)
            share_bytes += part.size_bytes
            end = part.offset + part.size_bytes
    if share:
        yield share


def _read(fd: int, share: Sequence[Piece]) -> None:
    """One system call for a whole share; what it leaves is read piece by piece."""
    scrap = ctypes.create_string_buffer(_GAP_BYTES) if len(share) > 1 else None
    vectors = array("Q")
    end = share[0].offset
    for piece in share:
        if scrap is not None and piece.offset > end:
            vectors.extend((ctypes.addressof(scrap), piece.offset - end))
        vectors.extend((piece.address, piece.size_bytes))
        end = piece.offset + piece.size_bytes
    if _preadv(fd, vectors, share[0].offset) < end - share[0].offset:
        for piece in share:
            done = 0
            while done < piece.size_bytes:
                rest = array("Q", (piece.address + done, piece.size_bytes - done))
                count = _preadv(fd, rest, piece.offset + done)
                if count == 0:
                    raise unreadable(f"it ends at {piece.offset + done}")
                done += count


def _preadv(fd: int, vectors: array[int], offset: int) -> int:
    """Bytes read; 0 at the end of the file."""
    while (count := int(_libc.preadv(fd, vectors.buffer_info()[0], len(vectors) // 2, offset))) < 0:
        if (code := ctypes.get_errno()) != errno.EINTR:
            raise unreadable(os.strerror(code))
    return count


def unreadable(reason: str) -> UnavailableError:
    """The error for a file that lost or withholds bytes after it was verified."""
    return UnavailableError(
        f"a fetched partition cannot be read: {reason}", hint="run `cairn verify` on the version, then load again"
    )
