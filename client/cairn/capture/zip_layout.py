"""The zip archive that ``torch.save`` writes, as arithmetic: which bytes are fixed, and where each tensor goes.

An archive is laid out from the lengths of its records alone. Records with known content become part of the *ribs*, the
fixed bytes; records without content leave a *hole* for the caller to fill. Ribs and holes alternate::

    rib 0 | hole 0 | rib 1 | hole 1 | ... | rib n

The bytes equal those of torch's own writer (caffe2's ``PyTorchStreamWriter`` over miniz) for the same records in the
same order, except that every CRC-32 field is zero: whoever next reads the whole image fills them from the
:class:`RecordTable`. ``torch.load`` does not look at them; ``zipfile`` and ``unzip -t`` do.

All records are stored, never compressed. Sizes and positions at or above 4 GiB use the zip64 forms.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from operator import add
from struct import Struct
from typing import NamedTuple

ALIGNMENT_BYTES = 64
"""Every record's content starts on a multiple of this, as in ``torch.save``."""

_LIMIT_32 = 0xFFFFFFFF
_LIMIT_16 = 0xFFFF

_LOCAL_HEADER = Struct("<IHHHHHIIIHH")
_DIRECTORY_ENTRY = Struct("<IHHHHHHIIIHHHHHII")
_DESCRIPTOR_32 = Struct("<IIII")
_DESCRIPTOR_64 = Struct("<IIQQ")
_EXTRA_HEADER = Struct("<HH")
_PADDING_HEADER = Struct("<2sH")
_END_64 = Struct("<IQHHIIQQQQ")
_END_64_LOCATOR = Struct("<IIQI")
_END = Struct("<IHHHHIIH")

_UTF8_NAME = 0x0800
_CRC_IN_DESCRIPTOR = 0x0008
_ZIP64_EXTRA = 1
# miniz writes these two version fields into the zip64 end record whatever the archive holds.
_MADE_BY = 798
_NEEDED = 45

_CRC_IN_DESCRIPTOR_OFFSET_BYTES = 4
_CRC_IN_DIRECTORY_OFFSET_BYTES = 16


class Record(NamedTuple):
    """One file of the archive. ``content`` is None for a hole of ``length_bytes`` that the caller fills."""

    name: str
    length_bytes: int
    content: bytes | None = None

    @classmethod
    def of(cls, name: str, content: bytes) -> Record:
        """A record whose bytes are known already."""
        return cls(name, len(content), content)


@dataclass(frozen=True, slots=True)
class RecordTable:
    """Where each record lies and where its CRC-32 belongs; parallel arrays of unsigned 64-bit byte positions.

    ``descriptor_crc_offsets`` and ``directory_crc_offsets`` name the two little-endian 32-bit fields that are still
    zero. A record of length 0 has no descriptor (its position is 0) and its CRC of zero is already right.
    """

    offsets: array[int]
    lengths: array[int]
    descriptor_crc_offsets: array[int]
    directory_crc_offsets: array[int]

    @classmethod
    def empty(cls) -> RecordTable:
        """The table of an image whose CRC-32 fields are already true."""
        return cls(array("Q"), array("Q"), array("Q"), array("Q"))

    def __len__(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True, slots=True)
class Layout:
    """Positions and fixed bytes of one archive.

    ``ribs`` is all fixed bytes end to end. Rib *i* is the ``rib_lengths[i]`` bytes at ``rib_starts[i]`` of ``ribs``,
    and belongs at ``rib_offsets[i]`` of the image; hole *i* lies between rib *i* and the next, so there is one rib more
    than there are holes. Holes come in record order, those of length 0 left out.
    """

    size_bytes: int
    records: RecordTable
    ribs: bytearray
    rib_starts: array[int]
    rib_offsets: array[int]
    rib_lengths: array[int]

    @property
    def hole_offsets(self) -> array[int]:
        """Where in the image each hole begins."""
        return array("Q", map(add, self.rib_offsets[:-1], self.rib_lengths))


class Archive:
    """An archive that is being laid out record by record, under the folder *name*.

    A copy goes on independently: an archive whose records differ only at the end is laid out from a kept beginning.
    """

    def __init__(self, name: str = "archive") -> None:
        self._name = name
        self._position = 0  # in the image
        self._ribs = bytearray()
        self._rib_starts = array("Q", [0])
        self._rib_offsets = array("Q", [0])
        self._rib_lengths = array("Q")
        self._directory = bytearray()
        self._crc_in_directory = array("Q")
        self._table = RecordTable.empty()

    def copy(self) -> Archive:
        """Another archive with the same records so far."""
        twin = Archive(self._name)
        twin._position = self._position
        twin._ribs = self._ribs[:]
        twin._rib_starts, twin._rib_offsets = self._rib_starts[:], self._rib_offsets[:]
        twin._rib_lengths = self._rib_lengths[:]
        twin._directory, twin._crc_in_directory = self._directory[:], self._crc_in_directory[:]
        table = self._table
        twin._table = RecordTable(
            table.offsets[:], table.lengths[:], table.descriptor_crc_offsets[:], table.directory_crc_offsets[:]
        )
        return twin

    def add(self, record: Record) -> None:
        """Lay *record* out behind those that were added before."""
        name = f"{self._name}/{record.name}".encode()
        length, header_at = record.length_bytes, self._position
        header = _local_header(name, length, header_at)
        content_at = header_at + len(header)
        self._ribs += header
        if record.content is not None:
            self._ribs += record.content
        elif length:
            self._rib_lengths.append(len(self._ribs) - self._rib_starts[-1])
            self._rib_starts.append(len(self._ribs))
            self._rib_offsets.append(content_at + length)
        descriptor = _descriptor(length, header_at)
        self._ribs += descriptor
        self._position = content_at + length + len(descriptor)

        table = self._table
        table.offsets.append(content_at)
        table.lengths.append(length)
        table.descriptor_crc_offsets.append(content_at + length + _CRC_IN_DESCRIPTOR_OFFSET_BYTES if length else 0)
        self._crc_in_directory.append(len(self._directory) + _CRC_IN_DIRECTORY_OFFSET_BYTES)
        self._directory += _directory_entry(name, length, header_at)

    def finish(self) -> Layout:
        """Close the archive with its directory. Nothing may be added afterwards; copy it before, if need be."""
        position, directory, table = self._position, self._directory, self._table
        table.directory_crc_offsets.extend(map(add, repeat(position), self._crc_in_directory))
        end = _end_of_archive(len(table), position, len(directory))
        self._ribs += directory
        self._ribs += end
        self._rib_lengths.append(len(self._ribs) - self._rib_starts[-1])
        return Layout(
            position + len(directory) + len(end),
            table,
            self._ribs,
            self._rib_starts,
            self._rib_offsets,
            self._rib_lengths,
        )


def lay_out(records: Iterable[Record], name: str = "archive") -> Layout:
    """Lay out *records* in the given order under the folder *name*."""
    archive = Archive(name)
    for record in records:
        archive.add(record)
    return archive.finish()


def _flags(length: int) -> int:
    return _UTF8_NAME | _CRC_IN_DESCRIPTOR if length else _UTF8_NAME


def _local_header(name: bytes, length: int, header_at: int) -> bytes:
    extra = b""
    if length >= _LIMIT_32 or header_at >= _LIMIT_32:
        # The second number is the compressed size, which miniz has not yet counted when it writes this header.
        sizes = [length, 0] if length >= _LIMIT_32 else []
        positions = [header_at] if header_at >= _LIMIT_32 else []
        extra = _zip64_extra(sizes + positions)
    unpadded = header_at + _LOCAL_HEADER.size + len(name) + len(extra) + _PADDING_HEADER.size
    padding_length = -unpadded % ALIGNMENT_BYTES
    padding = _PADDING_HEADER.pack(b"FB", padding_length) + b"Z" * padding_length
    fixed = _LOCAL_HEADER.pack(0x04034B50, 0, _flags(length), 0, 0, 0, 0, 0, 0, len(name), len(extra) + len(padding))
    return fixed + name + extra + padding


def _descriptor(length: int, header_at: int) -> bytes:
    if not length:
        return b""
    wide = length >= _LIMIT_32 or header_at >= _LIMIT_32
    return (_DESCRIPTOR_64 if wide else _DESCRIPTOR_32).pack(0x08074B50, 0, length, length)


def _directory_entry(name: bytes, length: int, header_at: int) -> bytes:
    extra = b""
    if length >= _LIMIT_32 or header_at >= _LIMIT_32:
        sizes = [length, length] if length >= _LIMIT_32 else []
        positions = [header_at] if header_at >= _LIMIT_32 else []
        extra = _zip64_extra(sizes + positions)
    shown_length = min(length, _LIMIT_32)
    fixed = _DIRECTORY_ENTRY.pack(
        0x02014B50, 0, 0, _flags(length), 0, 0, 0, 0, shown_length, shown_length,
        len(name), len(extra), 0, 0, 0, 0, min(header_at, _LIMIT_32),
    )  # fmt: skip
    return fixed + name + extra


def _zip64_extra(numbers: list[int]) -> bytes:
    return _EXTRA_HEADER.pack(_ZIP64_EXTRA, 8 * len(numbers)) + b"".join(n.to_bytes(8, "little") for n in numbers)


def _end_of_archive(count: int, directory_at: int, directory_length: int) -> bytes:
    """The end records. torch's writer adds the zip64 pair to every archive, however small."""
    wide = _END_64.pack(
        0x06064B50, _END_64.size - 12, _MADE_BY, _NEEDED, 0, 0, count, count, directory_length, directory_at
    )
    locator = _END_64_LOCATOR.pack(0x07064B50, 0, directory_at + directory_length, 1)
    shown_count = min(count, _LIMIT_16)
    end = _END.pack(
        0x06054B50, 0, 0, shown_count, shown_count,
        min(directory_length, _LIMIT_32), min(directory_at, _LIMIT_32), 0,
    )  # fmt: skip
    return wide + locator + end
