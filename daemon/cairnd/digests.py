"""Digests of bytes: CRC-64/NVME per 16 MiB block and for the whole.

The whole's is also S3's full-object checksum, so the same number is checked at every hop. It releases the GIL while it
runs, and is taken from pieces of 4 MiB: small enough that another checksum finds in the cache what the first one
brought in, large enough that a busy Python thread, which takes 5 ms to hand the GIL back, does not stop the pass
(pieces of 256 KiB: as fast alone, ten times slower beside such a thread).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from awscrt.checksums import combine_crc64nvme, crc64nvme

from cairnd.tiers.filesystem import FileSystem, read_exactly

BLOCK_BYTES = 16 * 1024 * 1024
"""One digest per this many bytes; also the unit in which partitions are written, uploaded and read back."""

PIECE_BYTES = 4 * 1024 * 1024
"""As much as is digested at once."""


class Digest(NamedTuple):
    """What a partition must read as: its size in bytes, its CRC-64/NVME and that of each 16 MiB block in order."""

    size_bytes: int
    crc64nvme: int
    blocks: tuple[int, ...]


class Folding:
    """CRC-64/NVME of consecutive bytes, cut into blocks of 16 MiB whatever the pieces that arrive."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._blocks: list[int] = []
        self._whole = 0
        self._current = 0
        self._room_bytes = BLOCK_BYTES

    def add(self, piece: memoryview) -> None:
        """The next bytes."""
        while len(piece):
            part = piece[: self._room_bytes]
            self._current = crc64nvme(part, self._current)
            self._advance(len(part))
            piece = piece[len(part) :]

    def add_known(self, crc: int, size_bytes: int) -> None:
        """The next bytes, of which only the checksum is known; they lie within one block."""
        self._current = combine_crc64nvme(self._current, crc, size_bytes)
        self._advance(size_bytes)

    def digest(self) -> Digest:
        """Of all that was added; nothing may be added afterwards."""
        if self._room_bytes < BLOCK_BYTES:
            self._close_block()
        return Digest(self.size_bytes, self._whole, tuple(self._blocks))

    def _advance(self, size_bytes: int) -> None:
        self.size_bytes += size_bytes
        self._room_bytes -= size_bytes
        if self._room_bytes == 0:
            self._close_block()

    def _close_block(self) -> None:
        self._whole = combine_crc64nvme(self._whole, self._current, BLOCK_BYTES - self._room_bytes)
        self._blocks.append(self._current)
        self._current = 0
        self._room_bytes = BLOCK_BYTES


def digest_of(blocks: Iterable[memoryview]) -> Digest:
    """The digest of consecutive *blocks* of any sizes."""
    folding = Folding()
    for block in blocks:
        folding.add(block.cast("B"))
    return folding.digest()


def digest_file(fs: FileSystem, source: str | os.PathLike[str] | int) -> Digest:
    """Read a file (a path, or an open descriptor, which stays open) and return its digest.

    Errors of the file system pass through unchanged; a file that shrinks meanwhile raises :class:`VersionError`.
    """
    if not isinstance(source, int):
        fd = fs.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return digest_file(fs, fd)
        finally:
            fs.close(fd)
    return digest_of(_blocks_of(fs, source))


def _blocks_of(fs: FileSystem, fd: int) -> Iterator[memoryview]:
    size_bytes = fs.fstat(fd).st_size
    buffer = memoryview(bytearray(min(PIECE_BYTES, size_bytes)))
    for offset in range(0, size_bytes, PIECE_BYTES):
        part = buffer[: min(PIECE_BYTES, size_bytes - offset)]
        read_exactly(fs, fd, part, offset)
        yield part
