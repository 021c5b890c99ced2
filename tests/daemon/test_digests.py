"""The sealing pass: any split into blocks gives the same digest and the same filled checksums."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn_api.errors import ConfigurationError, InternalError, VersionError
from cairnd.digests import BLOCK_BYTES, Digest, RecordTable, SealingPass, digest_file, digest_of
from cairnd.tiers.filesystem import OsFileSystem

KNOWN_ANSWER = 0xAE8B14860A799888
"""CRC-64/NVME of the digits 1 to 9, the check value that the algorithm's definition publishes."""


def reference_crc64(data: bytes) -> int:
    """CRC-64/NVME bit by bit, from its definition: reflected polynomial, all ones in and out."""
    crc = (1 << 64) - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x9A6C9329AC4BC9B5 if crc & 1 else 0)
    return crc ^ ((1 << 64) - 1)


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


def seal(data: bytes, records: RecordTable | None, cuts: list[int]) -> tuple[bytes, Digest]:
    """Run the pass over *data* cut at *cuts*; returns the bytes afterwards and the digest."""
    changed = bytearray(data)
    sealing = SealingPass(len(data), records)
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, stop in pairwise(edges):
        # Each block has its own memory, as in the daemon: nothing behind the block's end can be written.
        block = bytearray(changed[start:stop])
        sealing.process(memoryview(block), start)
        changed[start:stop] = block
    return bytes(changed), sealing.finish()


@pytest.mark.parametrize("data", [b"", b"123456789", bytes(range(256)) * 5])
def test_the_whole_digest_is_crc64_nvme(data: bytes) -> None:
    digest = digest_of([memoryview(data)])
    assert digest.crc64nvme == reference_crc64(data)
    assert digest.size_bytes == len(data)
    assert len(digest.blocks) == (1 if data else 0)
    if data == b"123456789":
        assert digest.crc64nvme == KNOWN_ANSWER


def test_each_block_of_16_mib_has_its_own_digest_and_the_whole_is_their_combination() -> None:
    data = bytes(range(251)) * (2 * BLOCK_BYTES // 251 + 9)
    digest = digest_of(memoryview(data)[at : at + 999_983] for at in range(0, len(data), 999_983))
    starts = range(0, len(data), BLOCK_BYTES)
    assert len(starts) == 3
    assert digest.blocks == tuple(digest_of([memoryview(data)[at : at + BLOCK_BYTES]]).crc64nvme for at in starts)
    assert digest == seal(data, None, [5, BLOCK_BYTES + 1])[1]


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


def test_a_file_is_digested_by_path_and_by_descriptor(tmp_path: Path) -> None:
    fs = OsFileSystem()
    data = bytes(range(256)) * 20_000
    path = tmp_path / "file"
    path.write_bytes(data)
    expected = digest_of([memoryview(data)])
    assert digest_file(fs, path) == expected
    with path.open("rb") as file:
        assert digest_file(fs, file.fileno()) == expected
    with path.open("r+b") as file:
        file.seek(3_000_000)
        file.write(b"\xff")
    assert digest_file(fs, path) != expected


class _Shrinking(OsFileSystem):
    """A file that ends earlier than its size said."""

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        return super().pread_into(fd, buffer[:1000], offset) if offset < 2000 else 0


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(5000))
    with pytest.raises(VersionError, match="ends at 2000"):
        digest_file(_Shrinking(), path)


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
