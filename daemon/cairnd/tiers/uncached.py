"""Reading a file around the page cache, so that what is only looked at does not push out what training needs."""

from __future__ import annotations

import errno
import mmap
import os

from cairn_api.wire import PAGE_BYTES
from cairnd.tiers.filesystem import AnyPath, FileSystem, read_direct, read_exactly

_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


class UncachedFile:
    """An open file that is read with O_DIRECT, or through the page cache where the file system refuses that.

    Raises ``OSError`` as the system does, and :class:`VersionError` when the file ends before what is asked for.
    ``close`` it.
    """

    def __init__(self, fs: FileSystem, path: AnyPath, flags: int = 0) -> None:
        self._fs = fs
        self._path = path
        self._flags = os.O_RDONLY | flags
        try:
            self.fd, self._direct = fs.open(path, self._flags | os.O_DIRECT), True
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
            self.fd, self._direct = fs.open(path, self._flags), False

    def read(self, buffer: memoryview, offset: int, size_bytes: int) -> None:
        """Read *size_bytes* at *offset*, a multiple of the page size, into *buffer*: aligned, of whole pages."""
        if self._direct:
            try:
                read_direct(self._fs, self.fd, buffer, offset, size_bytes)
                return
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    raise
            # Some file systems, of FUSE and of NFS, accept the flag and refuse to read with it.
            refusing, self.fd, self._direct = self.fd, self._fs.open(self._path, self._flags), False
            self._fs.close(refusing)
        read_exactly(self._fs, self.fd, buffer[:size_bytes], offset)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill *buffer*, which is aligned and may end within a page, from *offset*, a multiple of the page size."""
        whole = len(buffer) // PAGE_BYTES * PAGE_BYTES
        self.read(buffer[:whole], offset, whole)
        if whole < len(buffer):
            page = memoryview(mmap.mmap(-1, PAGE_BYTES))
            self.read(page, offset + whole, len(buffer) - whole)
            buffer[whole:] = page[: len(buffer) - whole]

    def close(self) -> None:
        """Close it."""
        self._fs.close(self.fd)
