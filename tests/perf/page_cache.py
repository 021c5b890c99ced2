"""Control over the page cache: what "warm" and "cold" mean in the tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

_CHUNK_BYTES = 16 << 20


class PageCache:
    """For all ranks together: each call returns when every rank has done its part. *meet* waits for the others."""

    def __init__(self, meet: Callable[[], None], rank: int) -> None:
        self._meet = meet
        self._first = rank == 0

    def read(self, files: Iterable[Path]) -> None:
        """Have *files* in the page cache."""
        buffer = bytearray(_CHUNK_BYTES)
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        self._meet()

    def drop(self, files: Iterable[Path]) -> None:
        """Have nothing of *files* in the page cache; as root, nothing of any file."""
        for path in files:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        self._meet()
        if self._first and os.geteuid() == 0:
            Path("/proc/sys/vm/drop_caches").write_text("1")
        self._meet()
