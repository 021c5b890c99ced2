"""Digests taken side by side are those taken in one go, and nothing of them is left running."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cairn_api.errors import VersionError
from cairnd.catalog.hashing import READERS, Hashing
from cairnd.digests import BLOCK_BYTES, digest_of
from cairnd.tiers.filesystem import OsFileSystem


@pytest.fixture
def hashing() -> Iterator[Hashing]:
    made = Hashing(OsFileSystem())
    yield made
    made.close()


@pytest.mark.parametrize("size_bytes", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 12345])
def test_a_file_and_a_buffer_have_the_digest_of_their_bytes(tmp_path: Path, hashing: Hashing, size_bytes: int) -> None:
    data = os.urandom(size_bytes)
    path = tmp_path / "file"
    path.write_bytes(data)
    told: list[int] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        assert hashing.of_file(fd, size_bytes, told.append) == digest_of([memoryview(data)])
    finally:
        os.close(fd)
    assert told == sorted(told)
    assert told[-1:] == ([size_bytes] if size_bytes else [])
    assert hashing.of_memory(memoryview(data), told.append) == digest_of([memoryview(data)])


def test_a_file_that_ends_early_is_told_and_no_reader_goes_on(tmp_path: Path) -> None:
    calls: list[int] = []

    class Watched(OsFileSystem):
        def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
            calls.append(offset)
            return super().pread_into(fd, buffer, offset)

    path = tmp_path / "file"
    path.write_bytes(bytes(BLOCK_BYTES))
    hashing = Hashing(Watched())
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(VersionError, match="ends at"):
        hashing.of_file(fd, 400 * BLOCK_BYTES, lambda _: None)
    os.close(fd)
    before = len(calls)
    hashing._pool.shutdown(wait=True)
    assert len(calls) == before
    assert hashing._buffers.qsize() == READERS, "every buffer was given back"


def test_a_small_digest_does_not_wait_for_all_of_a_large_one() -> None:
    blocks: list[int] = []

    class Watched(OsFileSystem):
        def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:  # noqa: ARG002 - of zeros
            if offset % BLOCK_BYTES == 0:
                blocks.append(offset)
            return len(buffer)

    hashing = Hashing(Watched())
    read_before: list[int] = []

    def meanwhile(_: int) -> None:
        if not read_before:
            hashing.of_memory(memoryview(b"small"), lambda _: None)
            read_before.append(len(blocks))

    hashing.of_file(-1, 60 * BLOCK_BYTES, meanwhile)
    hashing.close()
    assert len(blocks) == 60
    assert read_before[0] <= 3 * READERS, "only what was in the queue before it"
