"""Digests of a partition, and the pass that makes its zip checksums true.

A partition's digest is CRC-64/NVME per 16 MiB block and for the whole (also S3's full-object checksum, so the same
number is checked at every hop). The client lays a zip file out without touching tensor bytes and therefore leaves the
zip's own CRC-32 fields empty; :class:`SealingPass` fills them while the bytes are on their way to disk.

Both checksums release the GIL while they run, and both are taken from pieces of 4 MiB: small enough that the second one
finds in the cache what the first one brought in, large enough that a busy Python thread, which takes 5 ms to hand the
GIL back, does not stop the pass (pieces of 256 KiB: as fast alone, ten times slower beside such a thread).
"""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice, repeat
from operator import add, le, sub
from typing import NamedTuple

from awscrt.checksums import combine_crc64nvme, crc64nvme
from isal.isal_zlib import crc32

from cairn_api.errors import ConfigurationError, InternalError
from cairnd.tiers.filesystem import FileSystem, read_exactly

BLOCK_BYTES = 16 * 1024 * 1024
"""One digest per this many bytes; also the unit in which partitions are written, uploaded and read back."""

MAX_RECORDS = 1_000_000
"""Per partition: ten times what the largest states have, and few enough to be checked in a moment."""

_PIECE_BYTES = 4 * 1024 * 1024
_CRC32_BYTES = 4
_CRC32_FIELD = struct.Struct("<I")


class Digest(NamedTuple):
    """What a partition must read as: its size in bytes, its CRC-64/NVME and that of each 16 MiB block in order."""

    size_bytes: int
    crc64nvme: int
    blocks: tuple[int, ...]


class RecordTable:
    """Where a zip's records lie and where their CRC-32 belongs; four arrays of the same length, in bytes.

    A record is one stored (uncompressed) member: ``lengths[i]`` bytes of data at ``offsets[i]``. Its CRC-32 goes, as
    four little-endian bytes, to ``descriptor_crc_offsets[i]`` and ``directory_crc_offsets[i]``; position 0 means that
    the record has no such field. The table comes from a client: call :meth:`validate` before using it.
    """

    __slots__ = (
        "_in_order",
        "_valid_for_bytes",
        "descriptor_crc_offsets",
        "directory_crc_offsets",
        "lengths",
        "offsets",
    )

    def __init__(
        self,
        offsets: Iterable[int],
        lengths: Iterable[int],
        descriptor_crc_offsets: Iterable[int],
        directory_crc_offsets: Iterable[int],
    ) -> None:
        try:
            self.offsets = array("Q", offsets)
            self.lengths = array("Q", lengths)
            self.descriptor_crc_offsets = array("Q", descriptor_crc_offsets)
            self.directory_crc_offsets = array("Q", directory_crc_offsets)
        except (OverflowError, TypeError) as error:
            raise _refuse("every position and length is an integer from 0 to 2**64 - 1") from error
        self._valid_for_bytes = -1
        self._in_order = False

    def __len__(self) -> int:
        return len(self.offsets)

    def __eq__(self, other: object) -> bool:
        """Whether the columns are the same; what was found out about them does not count."""
        return isinstance(other, RecordTable) and self._columns() == other._columns()

    __hash__ = None  # type: ignore[assignment]  # equal by contents that are held in arrays

    def _columns(self) -> tuple[array[int], ...]:
        return self.offsets, self.lengths, self.descriptor_crc_offsets, self.directory_crc_offsets

    def validate(self, size_bytes: int) -> None:
        """Check the table against a partition of *size_bytes*.

        Raises :class:`ConfigurationError` unless records ascend without overlapping, everything lies inside, and each
        CRC-32 field lies after its own record's data, outside all record data and apart from all other fields. With
        that, filling a field can never alter data whose checksum was already taken. The answer is remembered: a
        table that serves several saves is checked once.
        """
        if self._valid_for_bytes != size_bytes:
            self._check(size_bytes)
            self._valid_for_bytes = size_bytes

    def _check(self, size_bytes: int) -> None:
        count = len(self.offsets)
        if not count == len(self.lengths) == len(self.descriptor_crc_offsets) == len(self.directory_crc_offsets):
            raise _refuse("its four columns differ in length")
        if count > MAX_RECORDS:
            raise _refuse(f"it has {count} records, more than {MAX_RECORDS}")
        self._in_order = self._as_written(size_bytes)
        if self._in_order:
            return
        end = 0
        ends = array("Q")
        for index, (offset, length) in enumerate(zip(self.offsets, self.lengths, strict=True)):
            if offset < end:
                raise _refuse(f"record {index} begins at {offset}, before the end of the one before it ({end})")
            end = offset + length
            if end > size_bytes:
                raise _refuse(f"record {index} ends at {end}, outside the partition of {size_bytes} bytes")
            ends.append(end)
        previous_end = 0
        for position, index in self.fields():
            if position < ends[index]:
                raise _refuse(f"the CRC field of record {index} lies at {position}, before the record's end")
            if position + _CRC32_BYTES > size_bytes:
                raise _refuse(f"the CRC field of record {index} lies outside the partition of {size_bytes} bytes")
            if position < previous_end:
                raise _refuse(f"the CRC field of record {index} overlaps another field at {position}")
            previous_end = position + _CRC32_BYTES
            # Ends ascend, so the last record that begins before the field's end reaches furthest.
            before = bisect_left(self.offsets, previous_end) - 1
            if before >= 0 and ends[before] > position:
                raise _refuse(f"the CRC field of record {index} lies inside the data of record {before}")

    def _as_written(self, size_bytes: int) -> bool:
        """Whether the table is of the usual form, in which all rules hold; several times faster than checking each.

        The usual form is what torch writes: each record is followed by its descriptor, and all by the directory.
        """
        if not self.offsets:
            return True
        ends = list(map(add, self.offsets, self.lengths))
        descriptors, directory = self.descriptor_crc_offsets, self.directory_crc_offsets
        after_descriptors = [position + _CRC32_BYTES for position in descriptors]
        after_directory = [position + _CRC32_BYTES for position in directory]
        return (
            all(map(le, ends, descriptors))
            and all(map(le, after_descriptors, islice(self.offsets, 1, None)))
            and after_descriptors[-1] <= directory[0]
            and all(map(le, after_directory, islice(directory, 1, None)))
            and after_directory[-1] <= size_bytes
        )

    def sealing_order(self) -> tuple[array[int], array[int], array[int]]:
        """What a pass reads: the end of each record; all fields' positions, ascending; the record of each field."""
        ends = array("Q", map(add, self.offsets, self.lengths))
        if self._in_order:
            return ends, self.descriptor_crc_offsets + self.directory_crc_offsets, array("Q", range(len(self))) * 2
        fields = self.fields()
        return ends, array("Q", [position for position, _ in fields]), array("Q", [index for _, index in fields])

    def fields(self) -> list[tuple[int, int]]:
        """All CRC-32 fields as ``(position, record index)``, by position."""
        return sorted(
            (position, index)
            for column in (self.descriptor_crc_offsets, self.directory_crc_offsets)
            for index, position in enumerate(column)
            if position
        )


def _refuse(rule: str) -> ConfigurationError:
    return ConfigurationError(
        f"the record table of a partition is not usable: {rule}",
        hint="save again with a client of the daemon's version; report a bug if it is",
    )


class _Folding:
    """CRC-64/NVME of consecutive bytes, cut into blocks of 16 MiB whatever the pieces that arrive."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._blocks: list[int] = []
        self._whole = 0
        self._current = 0
        self._room_bytes = BLOCK_BYTES

    def add(self, piece: memoryview) -> None:
        while len(piece):
            part = piece[: self._room_bytes]
            self._current = crc64nvme(part, self._current)
            self.size_bytes += len(part)
            self._room_bytes -= len(part)
            if self._room_bytes == 0:
                self._close_block()
            piece = piece[len(part) :]

    def digest(self) -> Digest:
        if self._room_bytes < BLOCK_BYTES:
            self._close_block()
        return Digest(self.size_bytes, self._whole, tuple(self._blocks))

    def _close_block(self) -> None:
        self._whole = combine_crc64nvme(self._whole, self._current, BLOCK_BYTES - self._room_bytes)
        self._blocks.append(self._current)
        self._current = 0
        self._room_bytes = BLOCK_BYTES


class SealingPass:
    """The one pass over a partition's bytes: fills the zip's CRC-32 fields, then computes the digest.

    *records* must have passed :meth:`RecordTable.validate` with the same *size_bytes*; ``None`` means that the bytes
    are final as they are. A record, and even one CRC field, may straddle blocks of any size.
    """

    def __init__(self, size_bytes: int, records: RecordTable | None) -> None:
        self._size_bytes = size_bytes
        self._folding = _Folding()
        records = records if records is not None else RecordTable((), (), (), ())
        self._starts = records.offsets
        self._ends, self._positions, self._owners = records.sealing_order()
        self._next_field = 0
        self._record = 0  # the record that is being read
        self._crc32 = 0  # of what was read of it
        self._crc32s = array("I", bytes(4 * len(records)))
        self._carry = b""  # the end of a CRC field that began in the last block

    def process(self, block: memoryview, offset: int) -> None:
        """Take the next bytes, *block* at *offset*. The block may be changed until this returns, and not afterwards.

        Blocks are consecutive and, where there is a record table, writable. Raises :class:`InternalError` for a gap
        or for bytes beyond the size: both are defects of the caller.
        """
        block = block.cast("B")
        end = offset + len(block)
        if offset != self._folding.size_bytes or end > self._size_bytes:
            raise InternalError(
                f"a sealing pass of {self._size_bytes} bytes was given {offset}..{end} after {self._folding.size_bytes}"
            )
        self._fill_carry(block)
        for start in range(offset, end, _PIECE_BYTES):
            stop = min(start + _PIECE_BYTES, end)
            self._take_crc32(block, offset, start, stop)
            self._fill_fields(block, offset, stop)
            self._folding.add(block[start - offset : stop - offset])

    def finish(self) -> Digest:
        """The digest of all bytes. Raises :class:`InternalError` when some have not been processed."""
        if self._folding.size_bytes != self._size_bytes:
            raise InternalError(f"a sealing pass ended after {self._folding.size_bytes} of {self._size_bytes} bytes")
        return self._folding.digest()

    def _take_crc32(self, block: memoryview, offset: int, start: int, stop: int) -> None:
        """CRC-32 of the record data in ``start..stop``; a record is complete when its end has been read."""
        first = self._record
        if first < len(self._starts) and self._starts[first] < start:  # begun in an earlier piece
            end = self._ends[first]
            self._crc32 = crc32(block[start - offset : min(end, stop) - offset], self._crc32)
            if end > stop:
                return
            self._crc32s[first] = self._crc32
            first += 1
        last = bisect_right(self._ends, stop, first)
        if first < last:  # one chain of C functions: with small records, a loop here takes longer than the checksums
            starts = map(sub, self._starts[first:last], repeat(offset))
            ends = map(sub, self._ends[first:last], repeat(offset))
            self._crc32s[first:last] = array("I", map(crc32, map(block.__getitem__, map(slice, starts, ends))))
        self._record, self._crc32 = last, 0
        if last < len(self._starts) and self._starts[last] < stop:
            self._crc32 = crc32(block[self._starts[last] - offset : stop - offset])

    def _fill_fields(self, block: memoryview, offset: int, stop: int) -> None:
        """Write all fields that begin before *stop*: their records are complete, for a field follows its record."""
        first = self._next_field
        last = self._next_field = bisect_left(self._positions, stop, first)
        if first == last:
            return
        values = [self._crc32s[record] for record in self._owners[first:last]]
        overhang = self._positions[last - 1] + _CRC32_BYTES - (offset + len(block))
        if overhang > 0:  # the rest of this field lies in the next block
            last -= 1
            value = values[-1].to_bytes(_CRC32_BYTES, "little")
            block[len(block) + overhang - _CRC32_BYTES :] = value[:-overhang]
            self._carry = value[-overhang:]
        places = map(sub, self._positions[first:last], repeat(offset))
        deque(map(_CRC32_FIELD.pack_into, repeat(block), places, values), maxlen=0)

    def _fill_carry(self, block: memoryview) -> None:
        if not self._carry:
            return  # and without a record table the block may be read-only
        room = min(len(self._carry), len(block))
        block[:room] = self._carry[:room]
        self._carry = self._carry[room:]


def digest_of(blocks: Iterable[memoryview]) -> Digest:
    """The digest of consecutive *blocks* of any sizes."""
    folding = _Folding()
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
    buffer = memoryview(bytearray(min(_PIECE_BYTES, size_bytes)))
    for offset in range(0, size_bytes, _PIECE_BYTES):
        part = buffer[: min(_PIECE_BYTES, size_bytes - offset)]
        read_exactly(fs, fd, part, offset)
        yield part
