"""What a client says of a partition's bytes: where its zip records lie, and the checksums that it took while copying.

Both come from outside: each has a ``validate`` that is to be called first.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import add, le
from typing import NamedTuple

from cairn_api.errors import ConfigurationError
from cairnd.digests import BLOCK_BYTES, PIECE_BYTES

MAX_RECORDS = 1_000_000
"""Per partition: ten times what the largest states have, and few enough to be checked in a moment."""

_HEADERS_BYTES = 76
"""What a zip spends on a member at least: its own header and its entry in the directory."""
_RECORDS_OF_SMALL = 256
"""Let through whatever the partition's size, for what is nearly empty."""

_CRC32_BYTES = 4
_MAX_CRC32 = 0xFFFFFFFF
_COLUMNS = 4


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
        # A table is kept as long as its buffer: without this, one page of granted memory would hold 32 MB of it.
        if count > max(_RECORDS_OF_SMALL, size_bytes // _HEADERS_BYTES):
            raise _refuse(f"it has {count} records, more than a zip of {size_bytes} bytes can have")
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


class PieceDigest(NamedTuple):
    """The checksums of ``length`` bytes at ``offset`` of a partition."""

    offset: int
    length: int
    crc64nvme: int
    crc32: int


class PieceDigests:
    """The checksums of some pieces of a partition. Made from rows of four numbers, in any order.

    ``pieces`` are by position once :meth:`validate` was called. Raises :class:`ConfigurationError` when there are no
    whole rows.
    """

    __slots__ = ("pieces",)

    def __init__(self, numbers: Sequence[int] = ()) -> None:
        if len(numbers) % _COLUMNS:
            raise _refuse("a digest of a piece is four numbers")
        columns = (numbers[column::_COLUMNS] for column in range(_COLUMNS))
        self.pieces = list(map(PieceDigest._make, zip(*columns, strict=True)))

    def validate(self, size_bytes: int, records: RecordTable) -> None:
        """Check the pieces against a partition of *size_bytes* with *records*, which were validated before.

        Raises :class:`ConfigurationError` unless each lies inside, within one record and one block of 16 MiB, and none
        overlaps another.
        """
        most = 2 * len(records) + size_bytes // PIECE_BYTES
        if len(self.pieces) > most:
            raise _refuse(f"{len(self.pieces)} digested pieces are more than {most}, which its records can have")
        self.pieces.sort()
        end = 0
        for piece in self.pieces:
            if piece.offset < end or not piece.length:
                raise _refuse(f"the digested piece at {piece.offset} is empty or overlaps another that ends at {end}")
            end = piece.offset + piece.length
            if end > size_bytes:
                raise _refuse(f"the digested piece at {piece.offset} ends outside the partition of {size_bytes} bytes")
            if piece.offset // BLOCK_BYTES != (end - 1) // BLOCK_BYTES:
                raise _refuse(f"the digested piece at {piece.offset} lies in two blocks")
            record = bisect_right(records.offsets, piece.offset) - 1
            if record < 0 or end > records.offsets[record] + records.lengths[record]:
                raise _refuse(f"the digested piece at {piece.offset} lies in no record")
            if piece.crc32 > _MAX_CRC32:
                raise _refuse(f"the CRC-32 of the digested piece at {piece.offset} has more than 32 bits")


def _refuse(rule: str) -> ConfigurationError:
    return ConfigurationError(
        f"the record table of a partition is not usable: {rule}",
        hint="save again with a client of the daemon's version; report a bug if it is",
    )
