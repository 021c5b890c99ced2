"""The archive's arithmetic against the two authorities: torch's own writer, and readers that check every field."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import zipfile
import zlib
from bisect import bisect_right
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.capture.zip_layout import ALIGNMENT_BYTES, Layout, Record, lay_out
from tests.client.capture.images import fill_crcs, image_of

GIB = 1 << 30


def test_same_records_give_the_bytes_of_torch_save() -> None:
    state = {f"t{i}": torch.arange(i, dtype=torch.float64) for i in range(40)} | {"text": "x" * 100_000}
    sink = io.BytesIO()
    torch.save(state, sink)
    theirs = bytearray(sink.getvalue())
    with zipfile.ZipFile(sink) as archive:
        records = [Record.of(info.filename.removeprefix("archive/"), archive.read(info)) for info in archive.infolist()]
    layout = lay_out(records)
    ours = layout.ribs
    fill_crcs(ours, layout.records)
    assert list(layout.rib_lengths) == [len(ours)]
    assert ours == theirs


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([5 * GIB, 100, 0, 7], id="one record beyond 4 GiB"),
        pytest.param([100, 3 * GIB, 3 * GIB, 64, 0], id="positions beyond 4 GiB"),
        pytest.param([2**32 - 2, 8], id="last length of the 32-bit form"),
        pytest.param([2**32 - 1, 8], id="first length of the 64-bit form"),
        pytest.param([2**32 - 1000, 100, 100, 100, 100, 100, 100, 100, 100, 100], id="around the 4 GiB position"),
        pytest.param([1] * 70_000, id="more records than 16 bits count"),
    ],
)
def test_fixed_bytes_equal_those_of_torch_for_large_archives(lengths: list[int], tmp_path: Path) -> None:
    # torch leaves tensor bytes out under skip_data, so the file is sparse and only its fixed bytes are compared.
    path = tmp_path / "archive.pt"
    state = [torch.empty(length, dtype=torch.uint8) for length in lengths]
    with torch.serialization.skip_data():
        torch.save(state, path)
    del state
    with zipfile.ZipFile(path) as archive:
        records = [
            Record(name, info.file_size) if name.startswith("data/") else Record.of(name, archive.read(info))
            for info in archive.infolist()
            for name in [info.filename.removeprefix("archive/")]
        ]
    layout = lay_out(records)
    assert layout.size_bytes == path.stat().st_size
    for record, table_offset in zip(records, layout.records.offsets, strict=True):
        assert table_offset % ALIGNMENT_BYTES == 0, record.name

    _fill_rib_crcs(layout, records)
    with path.open("rb") as file:
        rib_at = image_at = 0
        holes = [record.length_bytes for record in records if record.content is None and record.length_bytes]
        for rib_length, hole in zip(layout.rib_lengths, [*holes, 0], strict=True):
            file.seek(image_at)
            assert file.read(rib_length) == layout.ribs[rib_at : rib_at + rib_length], f"rib at {image_at}"
            rib_at += rib_length
            image_at += rib_length + hole
    assert image_at == layout.size_bytes


def _fill_rib_crcs(layout: Layout, records: list[Record]) -> None:
    """torch knows the CRC of the records it was given, and of no tensor: fill those fields in the ribs."""
    rib_starts, bytes_missing = [], []  # in the image; of holes before it
    missing = image_at = 0
    holes = [record.length_bytes for record in records if record.content is None and record.length_bytes]
    for rib_length, hole in zip(layout.rib_lengths, [*holes, 0], strict=True):
        rib_starts.append(image_at)
        bytes_missing.append(missing)
        missing += hole
        image_at += rib_length + hole

    table = layout.records
    for index, record in enumerate(records):
        if record.content:
            crc = zlib.crc32(record.content).to_bytes(4, "little")
            for position in (table.descriptor_crc_offsets[index], table.directory_crc_offsets[index]):
                at = position - bytes_missing[bisect_right(rib_starts, position) - 1]
                layout.ribs[at : at + 4] = crc


def test_zipfile_reads_a_layout_beyond_4_gib(tmp_path: Path) -> None:
    records = [Record("data/0", 5 * GIB), Record("data/1", 8), Record.of("data.pkl", b"pickle")]
    layout = lay_out(records)
    path = tmp_path / "sparse.zip"
    with path.open("wb") as file:
        rib_at = 0
        for rib_length, hole in zip(layout.rib_lengths, [5 * GIB, 8, 0], strict=True):
            file.write(layout.ribs[rib_at : rib_at + rib_length])
            file.seek(hole, io.SEEK_CUR)
            rib_at += rib_length
    assert path.stat().st_size == layout.size_bytes
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        assert [info.file_size for info in infos] == [5 * GIB, 8, 6]
        with archive.open("archive/data/1") as far:
            far._expected_crc = None  # type: ignore[attr-defined]  # not filled in a layout
            assert far.read() == bytes(8)


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(
        st.tuples(st.text("abcdefghij/.", min_size=1, max_size=80), st.binary(max_size=300), st.booleans()),
        max_size=12,
        unique_by=lambda record: record[0],
    )
)
def test_any_records_read_back(records: list[tuple[str, bytes, bool]]) -> None:
    layout = lay_out([Record(n, len(c), None) if hole else Record.of(n, c) for n, c, hole in records])
    holes = [content for _, content, hole in records if hole and content]
    image = bytearray()
    rib_at = 0
    for rib_length, hole in zip(layout.rib_lengths, [*holes, b""], strict=True):
        image += layout.ribs[rib_at : rib_at + rib_length] + hole
        rib_at += rib_length
    assert len(image) == layout.size_bytes
    for (_, content, _), offset, length in zip(records, layout.records.offsets, layout.records.lengths, strict=True):
        assert offset % ALIGNMENT_BYTES == 0
        assert image[offset : offset + length] == content
    fill_crcs(image, layout.records)
    with zipfile.ZipFile(io.BytesIO(image)) as archive:
        assert archive.testzip() is None
        assert {info.filename: archive.read(info) for info in archive.infolist()} == {
            f"archive/{name}": content for name, content, _ in records
        }


def test_command_line_tools_verify_an_image(tmp_path: Path) -> None:
    path = tmp_path / "image.pt"
    path.write_bytes(image_of({"weight": torch.randn(1000), "empty": torch.empty(0), "step": 3}))
    subprocess.run([sys.executable, "-m", "zipfile", "-t", path], check=True, capture_output=True)
    if unzip := shutil.which("unzip"):
        subprocess.run([unzip, "-t", path], check=True, capture_output=True)
