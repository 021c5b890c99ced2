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

    ``ribs`` is all fixed bytes end to end; ``rib_lengths`` cuts them, one more entry than there are holes. Holes come
    in record order, those of length 0 left out.
    """

    size_bytes: int
    records: RecordTable
    ribs: bytearray
    rib_lengths: list[int]


def lay_out(records: Iterable[Record], archive: str = "archive") -> Layout:
    """Lay out *records* in the given order under the folder *archive*."""
    ribs = bytearray()
    rib_lengths: list[int] = []
    directory = bytearray()
    table = RecordTable.empty()
    crc_in_directory: list[int] = []
    position = 0  # in the image
    rib_start = 0  # in ``ribs``

    for record in records:
        name = f"{archive}/{record.name}".encode()
        length, header_at = record.length_bytes, position
        header = _local_header(name, length, header_at)
        content_at = position + len(header)
        ribs += header
        if record.content is not None:
            ribs += record.content
        elif length:
            rib_lengths.append(len(ribs) - rib_start)
            rib_start = len(ribs)
        descriptor = _descriptor(length, header_at)
        ribs += descriptor
        position = content_at + length + len(descriptor)

        table.offsets.append(content_at)
        table.lengths.append(length)
        table.descriptor_crc_offsets.append(content_at + length + _CRC_IN_DESCRIPTOR_OFFSET_BYTES if length else 0)
        crc_in_directory.append(len(directory) + _CRC_IN_DIRECTORY_OFFSET_BYTES)
        directory += _directory_entry(name, length, header_at)

    table.directory_crc_offsets.extend(position + offset for offset in crc_in_directory)
    end = _end_of_archive(len(table), position, len(directory))
    ribs += directory
    ribs += end
    rib_lengths.append(len(ribs) - rib_start)
    return Layout(position + len(directory) + len(end), table, ribs, rib_lengths)


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
