"""What the machine itself needs for the same bytes: the references of every ratio."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable

import torch

from tests.perf.contender import Place
from tests.perf.page_cache import PageCache

BLOCK_BYTES = 16 << 20
_ALIGNMENT_BYTES = 4096


class Floors:
    """One rank's floors for *size_bytes*; with more ranks all of them measure at the same moment."""

    def __init__(self, place: Place, size_bytes: int) -> None:
        self._place = place
        self._size_bytes = size_bytes
        self._padded_bytes = -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._source = torch.ones(self._padded_bytes, dtype=torch.uint8)
        fd = os.memfd_create("floor")
        try:
            os.posix_fallocate(fd, 0, self._padded_bytes)
            self._memory = mmap.mmap(fd, self._padded_bytes)
        finally:
            os.close(fd)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._file = place.folder / f"floor-{place.rank}"
        self._copy()
        place.folder.mkdir(parents=True, exist_ok=True)
        with self._file.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self._padded_bytes)
        self._direct(os.pwritev)  # from here on its extents are written ones: only then is a write no metadata change

    def measure(self, cache: PageCache) -> dict[str, float]:
        """Seconds of each floor."""
        return {"memcpy": self._place.timed(self._copy), "direct_write": self.write(), "direct_read": self.read(cache)}

    def write(self) -> float:
        """Seconds of writing and syncing the bytes past the page cache."""
        return self._place.timed(lambda: self._direct(os.pwritev))

    def read(self, cache: PageCache) -> float:
        """Seconds of reading them past the page cache."""
        cache.drop([self._file])
        return self._place.timed(lambda: self._direct(os.preadv))

    def close(self) -> None:
        """Remove the file."""
        self._file.unlink(missing_ok=True)

    def _copy(self) -> None:
        ctypes.memmove(self._address, self._source.data_ptr(), self._size_bytes)

    def _direct(self, move: Callable[[int, list[memoryview], int], int]) -> None:
        fd = os.open(self._file, os.O_RDWR | os.O_DIRECT)
        try:
            with memoryview(self._memory) as view:
                done = 0
                while done < self._padded_bytes:
                    with view[done : done + BLOCK_BYTES] as block:
                        done += move(fd, [block], done)
            os.fsync(fd)
        finally:
            os.close(fd)
