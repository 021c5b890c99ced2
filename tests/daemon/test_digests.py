"""Digests of bytes in memory and in files."""

from __future__ import annotations

from pathlib import Path

import pytest

from cairn_api.errors import VersionError
from cairnd.digests import BLOCK_BYTES, digest_file, digest_of
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
