"""The pass that makes a partition's zip checksums true and digests it.

The client lays a zip file out without touching tensor bytes and therefore leaves the zip's own CRC-32 fields empty.
:class:`SealingPass` fills them while the bytes are on their way to disk, and takes their digest. Of pieces that the
client digested while it copied, it reads only a few, to check them: training pays for every byte that is read here.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from itertools import repeat
from operator import sub

from awscrt.checksums import crc64nvme
from isal.isal_zlib import crc32, crc32_combine

from cairn_api.errors import InternalError, SaveFailedError
from cairnd.digests import PIECE_BYTES, Digest, Folding
from cairnd.records import PieceDigest, PieceDigests, RecordTable

_CRC32_BYTES = 4
_CRC32_FIELD = struct.Struct("<I")


class SealingPass:
    """The one pass over a partition's bytes: fills the zip's CRC-32 fields, then computes the digest.

    *records* must have passed :meth:`RecordTable.validate` with the same *size_bytes*; ``None`` means that the bytes
    are final as they are. A record, and even one CRC field, may straddle blocks of any size.

    *known*, which must have been validated too, is not read but believed, except the pieces whose numbers are in
    *rechecked*. None of its pieces may straddle two blocks that are given to :meth:`process`.
    """

    def __init__(
        self,
        size_bytes: int,
        records: RecordTable | None,
        known: PieceDigests | None = None,
        rechecked: range = range(0),
    ) -> None:
        self._size_bytes = size_bytes
        self._folding = Folding()
        records = records if records is not None else RecordTable((), (), (), ())
        self._starts = records.offsets
        self._ends, self._positions, self._owners = records.sealing_order()
        self._next_field = 0
        self._record = 0  # the record that is being read
        self._crc32 = 0  # of what was read of it
        self._crc32s = array("I", bytes(4 * len(records)))
        self._carry = b""  # the end of a CRC field that began in the last block
        self._known = known.pieces if known is not None else []
        self._next_known = 0
        self._rechecked = rechecked

    def process(self, block: memoryview, offset: int) -> None:
        """Take the next bytes, *block* at *offset*. The block may be changed until this returns, and not afterwards.

        Blocks are consecutive and, where there is a record table, writable. Raises :class:`InternalError` for a gap
        or for bytes beyond the size: both are defects of the caller. Raises :class:`SaveFailedError` when the bytes are
        not what the client copied.
        """
        block = block.cast("B")
        end = offset + len(block)
        if offset != self._folding.size_bytes or end > self._size_bytes:
            raise InternalError(
                f"a sealing pass of {self._size_bytes} bytes was given {offset}..{end} after {self._folding.size_bytes}"
            )
        self._fill_carry(block)
        start = offset
        while self._next_known < len(self._known) and (piece := self._known[self._next_known]).offset < end:
            self._take(block, offset, start, piece.offset)
            if self._next_known in self._rechecked:
                _recheck(piece, block[piece.offset - offset : piece.offset - offset + piece.length])
            self._take_known(piece)
            self._next_known += 1
            start = piece.offset + piece.length
        self._take(block, offset, start, end)

    def finish(self) -> Digest:
        """The digest of all bytes. Raises :class:`InternalError` when some have not been processed."""
        if self._folding.size_bytes != self._size_bytes:
            raise InternalError(f"a sealing pass ended after {self._folding.size_bytes} of {self._size_bytes} bytes")
        return self._folding.digest()

    def _take(self, block: memoryview, offset: int, first: int, last: int) -> None:
        """Read ``first..last`` and fill its fields."""
        for start in range(first, last, PIECE_BYTES):
            stop = min(start + PIECE_BYTES, last)
            self._take_crc32(block, offset, start, stop)
            self._fill_fields(block, offset, stop)
            self._folding.add(block[start - offset : stop - offset])

    def _take_known(self, piece: PieceDigest) -> None:
        """Go on behind *piece*, which lies within a record and holds no field."""
        record = bisect_right(self._ends, piece.offset, self._record)
        before = self._crc32 if record == self._record else 0  # else empty records came between
        whole = crc32_combine(before, piece.crc32, piece.length)
        if piece.offset + piece.length == self._ends[record]:
            self._crc32s[record] = whole
            record, whole = record + 1, 0
        self._record, self._crc32 = record, whole
        self._folding.add_known(piece.crc64nvme, piece.length)

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


def _recheck(piece: PieceDigest, content: memoryview) -> None:
    if (crc64nvme(content), crc32(content)) != (piece.crc64nvme, piece.crc32):
        raise SaveFailedError(
            f"{piece.length} bytes at {piece.offset} of a capture buffer are not what its client copied there",
            hint="this node's memory may be failing, or something else in the training process writes to the buffer; "
            "earlier versions are intact",
        )
