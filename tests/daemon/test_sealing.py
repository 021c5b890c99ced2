"""The sealing pass: any split into blocks, and any part known before, gives the same digest and filled checksums."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable
from itertools import pairwise

import pytest
from awscrt.checksums import crc64nvme
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn_api.errors import ConfigurationError, InternalError, SaveFailedError
from cairnd.digests import BLOCK_BYTES, Digest, digest_of
from cairnd.records import PieceDigests, RecordTable
from cairnd.sealing import SealingPass


class _Pipe(io.RawIOBase):
    """A stream that cannot seek: zipfile then writes each CRC into a descriptor after the data, as torch does."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, chunk: object) -> int:
        view = memoryview(chunk)  # type: ignore[arg-type]  # RawIOBase leaves the buffer's type open
        self.data += view
        return len(view)


def make_zip(contents: list[bytes]) -> tuple[bytes, bytes, RecordTable]:
    """A stored zip as zipfile writes it, the same with every CRC-32 zeroed, and where those belong."""
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as archive:
        for index, content in enumerate(contents):
            archive.writestr(f"record-{index}", content)
    whole = bytes(pipe.data)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        infos = archive.infolist()
        position = archive.start_dir
    offsets, lengths, descriptors, directory = [], [], [], []
    for info in infos:
        name_bytes, extra_bytes = struct.unpack_from("<HH", whole, info.header_offset + 26)
        offset = info.header_offset + 30 + name_bytes + extra_bytes
        assert whole[offset + info.file_size :][:4] == b"PK\x07\x08"
        offsets.append(offset)
        lengths.append(info.file_size)
        descriptors.append(offset + info.file_size + 4)
        assert whole[position : position + 4] == b"PK\x01\x02"
        directory.append(position + 16)
        position += 46 + sum(struct.unpack_from("<HHH", whole, position + 28))
    zeroed = bytearray(whole)
    for field in descriptors + directory:
        zeroed[field : field + 4] = bytes(4)
    return whole, bytes(zeroed), RecordTable(offsets, lengths, descriptors, directory)


def seal(
    data: bytes,
    records: RecordTable | None,
    cuts: list[int],
    known: PieceDigests | None = None,
    rechecked: range = range(0),
) -> tuple[bytes, Digest]:
    """Run the pass over *data* cut at *cuts*; returns the bytes afterwards and the digest."""
    changed = bytearray(data)
    sealing = SealingPass(len(data), records, known, rechecked)
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, stop in pairwise(edges):
        # Each block has its own memory, as in the daemon: nothing behind the block's end can be written.
        block = bytearray(changed[start:stop])
        sealing.process(memoryview(block), start)
        changed[start:stop] = block
    return bytes(changed), sealing.finish()


@given(st.lists(st.binary(max_size=80), min_size=1, max_size=6), st.lists(st.integers(0, 5000), max_size=40))
@settings(deadline=None, max_examples=150)
def test_any_split_fills_the_same_checksums_and_gives_the_same_digest(contents: list[bytes], cuts: list[int]) -> None:
    whole, zeroed, records = make_zip(contents)
    records.validate(len(zeroed))
    sealed, digest = seal(zeroed, records, cuts)
    assert sealed == whole
    assert digest == digest_of([memoryview(whole)])


@given(st.lists(st.binary(max_size=9), min_size=1, max_size=6), st.lists(st.integers(0, 5000), max_size=40), st.data())
@settings(deadline=None, max_examples=150)
def test_fields_may_be_missing_and_in_any_order(contents: list[bytes], cuts: list[int], data: st.DataObject) -> None:
    """Records side by side, then all fields in an order of their own: not the layout that the fast path knows."""
    places = data.draw(st.permutations(range(2 * len(contents))))
    missing = data.draw(st.sets(st.sampled_from(range(2 * len(contents)))))
    offsets = [5 + sum(map(len, contents[:index])) for index in range(len(contents))]
    first = 5 + sum(map(len, contents))
    fields = [0 if number in missing else first + 4 * place for number, place in enumerate(places)]
    records = RecordTable(offsets, map(len, contents), fields[::2], fields[1::2])
    image = bytes(5) + b"".join(contents) + bytes(8 * len(contents))
    records.validate(len(image))
    expected = bytearray(image)
    for number, field in enumerate(fields):
        if field:
            struct.pack_into("<I", expected, field, zlib.crc32(contents[number // 2]))
    sealed, digest = seal(image, records, cuts)
    assert sealed == expected
    assert digest == digest_of([memoryview(expected)])


def test_a_table_is_as_good_as_one_with_the_same_columns_and_valid_for_one_size() -> None:
    ours, theirs = table((10, 5, 20, 30)), table((10, 5, 20, 30))
    ours.validate(34)
    assert ours == theirs
    assert ours != table((10, 5, 20, 31))
    with pytest.raises(ConfigurationError, match="outside the partition"):
        ours.validate(33)  # the size is part of what was checked


def test_blocks_of_one_byte_fill_fields_that_straddle_them() -> None:
    whole, zeroed, records = make_zip([b"abc", b"", b"x" * 70])
    sealed, digest = seal(zeroed, records, list(range(len(zeroed))))
    assert sealed == whole
    assert digest == digest_of([memoryview(whole)])


def test_a_sealed_zip_passes_zipfile_with_records_larger_than_a_block() -> None:
    content = [bytes(range(256)) * 4096 * 2, b"small", bytes(17 * 1024 * 1024)]
    _, zeroed, records = make_zip(content)
    with zipfile.ZipFile(io.BytesIO(zeroed)) as archive:
        assert archive.testzip() is not None  # the control: unfilled checksums are noticed
    sealed, _ = seal(zeroed, records, [BLOCK_BYTES, 300_001])
    with zipfile.ZipFile(io.BytesIO(sealed)) as archive:
        assert archive.testzip() is None
        assert zlib.crc32(content[0]) == archive.getinfo("record-0").CRC


def table(*rows: tuple[int, int, int, int]) -> RecordTable:
    return RecordTable(*(list(column) for column in zip(*rows, strict=True)))


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (table((10, 20, 0, 0), (29, 5, 0, 0)), "before the end of the one before"),
        (table((50, 5, 0, 0), (10, 5, 0, 0)), "before the end of the one before"),
        (table((90, 11, 0, 0)), "outside the partition"),
        (table((2**64 - 1, 2**64 - 1, 0, 0)), "outside the partition"),
        (table((10, 5, 12, 0)), "before the record's end"),
        (table((10, 5, 9, 0)), "before the record's end"),
        (table((10, 5, 97, 0)), "outside the partition"),
        (table((10, 5, 20, 0), (22, 5, 0, 0)), "inside the data of record 1"),
        (table((10, 5, 30, 0), (22, 11, 0, 0)), "inside the data of record 1"),
        (table((10, 5, 40, 0), (22, 5, 43, 0)), "overlaps another field"),
        (table((10, 5, 40, 40)), "overlaps another field"),
        (RecordTable([1, 2], [1], [0], [0]), "columns differ"),
    ],
)
def test_a_hostile_record_table_is_refused(records: RecordTable, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        records.validate(100)


def test_positions_beyond_64_bits_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="integer"):
        RecordTable([-1], [1], [0], [0])
    with pytest.raises(ConfigurationError, match="integer"):
        RecordTable([2**64], [1], [0], [0])


ROWS = st.lists(st.tuples(*(st.integers(0, 120) for _ in range(4))), min_size=1, max_size=5)


@given(ROWS, st.lists(st.integers(0, 100), max_size=10))
@settings(deadline=None, max_examples=400)
def test_a_table_that_is_accepted_never_alters_record_data(
    rows: list[tuple[int, int, int, int]], cuts: list[int]
) -> None:
    rows = sorted(rows)
    data = bytes(range(100, 200))
    records = table(*rows)
    try:
        records.validate(len(data))
    except ConfigurationError:
        return
    sealed, digest = seal(data, records, cuts)
    for offset, length, descriptor, directory in rows:
        assert sealed[offset : offset + length] == data[offset : offset + length]
        for field in (descriptor, directory):
            if field:
                assert sealed[field : field + 4] == zlib.crc32(data[offset : offset + length]).to_bytes(4, "little")
    assert digest == digest_of([memoryview(sealed)])


def test_gaps_and_missing_bytes_are_defects_of_the_caller() -> None:
    sealing = SealingPass(10, None)
    sealing.process(memoryview(b"01234"), 0)
    with pytest.raises(InternalError, match="after 5 of 10"):
        sealing.finish()
    with pytest.raises(InternalError):
        sealing.process(memoryview(b"01234"), 4)
    with pytest.raises(InternalError):
        sealing.process(memoryview(b"012345"), 5)


def test_a_table_without_end_is_refused() -> None:
    none = [0] * 1_000_001
    with pytest.raises(ConfigurationError, match="more than 1000000"):
        RecordTable(none, none, none, none).validate(100)


@given(
    st.lists(st.binary(max_size=20), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(-9, 9)), max_size=2),
    st.integers(-30, 5),
)
@settings(deadline=None, max_examples=300)
def test_the_quick_check_accepts_nothing_that_the_full_one_refuses(
    contents: list[bytes], changes: list[tuple[int, int, int]], longer_bytes: int
) -> None:
    _, zeroed, records = make_zip(contents)
    columns = [records.offsets, records.lengths, records.descriptor_crc_offsets, records.directory_crc_offsets]
    for column, row, change in changes:
        value = columns[column][row % len(contents)] + change
        columns[column][row % len(contents)] = max(0, value)
    size_bytes = len(zeroed) + longer_bytes
    if not changes and longer_bytes >= 0:
        assert records._as_written(size_bytes), "what zipfile and torch write is checked quickly"
    if records._as_written(size_bytes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RecordTable, "_as_written", lambda *_: False)
            records.validate(size_bytes)


def known_of(data: bytes, pieces: Iterable[tuple[int, int]]) -> PieceDigests:
    """What a client would say of pieces of *data*, given as offset and length."""
    rows = [
        (offset, length, crc64nvme(data[offset : offset + length]), zlib.crc32(data[offset : offset + length]))
        for offset, length in pieces
    ]
    return PieceDigests([number for row in rows for number in row])


@given(st.lists(st.binary(max_size=80), min_size=1, max_size=6), st.lists(st.integers(0, 5000), max_size=40), st.data())
@settings(deadline=None, max_examples=300)
def test_what_is_known_makes_no_difference(contents: list[bytes], cuts: list[int], data: st.DataObject) -> None:
    whole, zeroed, records = make_zip(contents)
    records.validate(len(zeroed))
    pieces = []
    for offset, length in zip(records.offsets, records.lengths, strict=True):
        edges = sorted(data.draw(st.sets(st.integers(0, length), max_size=3)))
        pieces += [(offset + start, stop - start) for start, stop in pairwise(edges)]
    known = known_of(zeroed, data.draw(st.permutations(pieces)))
    known.validate(len(zeroed), records)
    inside = [range(start + 1, start + length) for start, length in pieces]
    cuts = [cut for cut in (cut % (len(zeroed) + 1) for cut in cuts) if not any(cut in piece for piece in inside)]
    every = data.draw(st.integers(1, 5))
    sealed, digest = seal(zeroed, records, cuts, known, range(0, len(pieces), every))
    assert sealed == whole
    assert digest == digest_of([memoryview(whole)])


def test_a_block_may_be_known_whole_and_a_record_may_span_blocks() -> None:
    content = bytes(range(256)) * 4096 * 40  # 40 MiB
    whole, zeroed, records = make_zip([b"first", content])
    start, end = records.offsets[1], records.offsets[1] + records.lengths[1]
    edges = [start, *range(BLOCK_BYTES, end, BLOCK_BYTES), end]
    known = known_of(zeroed, [(at, stop - at) for at, stop in pairwise(edges)])
    known.validate(len(zeroed), records)
    sealed, digest = seal(zeroed, records, [BLOCK_BYTES, 2 * BLOCK_BYTES], known)
    assert sealed == whole
    assert digest == digest_of([memoryview(whole)])


def test_of_what_was_digested_before_the_chosen_pieces_are_checked() -> None:
    _, zeroed, records = make_zip([bytes(range(200))])
    start = records.offsets[0]
    known = known_of(zeroed, [(start, 100), (start + 100, 100)])
    damaged = bytearray(zeroed)
    damaged[start + 150] ^= 1
    seal(bytes(damaged), records, [], known, range(1))  # the first piece is as it was
    with pytest.raises(SaveFailedError, match="not what its client copied"):
        seal(bytes(damaged), records, [], known, range(2))


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([(10, 5, 0, 0), (14, 5, 0, 0)], "overlaps another that ends at 15"),
        ([(10, 0, 0, 0)], "empty"),
        ([(9, 5, 0, 0)], "in no record"),
        ([(35, 6, 0, 0)], "in no record"),
        ([(20, 25, 0, 0)], "in no record"),
        ([(95, 10, 0, 0)], "outside the partition"),
        ([(2**64 - 1, 2**64 - 1, 0, 0)], "outside the partition"),
        ([(10, 5, 0, 2**32)], "more than 32 bits"),
        ([(10 + number, 1, 0, 0) for number in range(5)], "more than 4,"),
    ],
)
def test_hostile_digests_are_refused(pieces: list[tuple[int, int, int, int]], reason: str) -> None:
    records = table((10, 30, 40, 0), (50, 48, 98, 0))
    with pytest.raises(ConfigurationError, match=reason):
        PieceDigests([number for piece in pieces for number in piece]).validate(100, records)


def test_a_piece_in_two_blocks_is_refused() -> None:
    records = table((0, 2 * BLOCK_BYTES, 0, 0))
    PieceDigests([1, BLOCK_BYTES - 1, 0, 0]).validate(2 * BLOCK_BYTES, records)
    with pytest.raises(ConfigurationError, match="two blocks"):
        PieceDigests([1, BLOCK_BYTES, 0, 0]).validate(2 * BLOCK_BYTES, records)


def test_digests_are_whole_rows() -> None:
    with pytest.raises(ConfigurationError, match="four numbers"):
        PieceDigests([1, 2, 3])
