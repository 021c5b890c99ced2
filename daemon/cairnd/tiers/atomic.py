"""Write, sync, rename, sync the folder: the discipline that survives a power cut, written once.

A file is complete or absent under its final name. It is written under a temporary name that the caller chose (so that
recovery knows what to sweep), synced, renamed; the rename is durable once its folder is synced, which is explicit
because many files of one version share one folder. A failed fsync condemns the file: the kernel has dropped the dirty
pages and a second fsync would report success over old data.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cairn_api.errors import InternalError
from cairnd.tiers.errors import explained
from cairnd.tiers.filesystem import FileSystem, is_folder, write_all

ALIGNMENT_BYTES = 4096
"""O_DIRECT needs file offsets, lengths and memory in multiples of the device's block; 4096 suits all."""

DATA_MODE = 0o440
"""Published data is read-only, also for its owner."""

FOLDER_MODE = 0o750
TEMPORARY_SUFFIX = ".tmp"
"""How the names of temporary files made here end; recovery may sweep them."""

_BOUNCE_BYTES = 1024 * 1024
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_NOT_SUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


def write_file(
    fs: FileSystem,
    path: Path,
    data: bytes,
    *,
    mode: int = DATA_MODE,
    token_hex: Callable[[int], str] = secrets.token_hex,
) -> None:
    """Put *data* at *path*, replacing what was there, durably when this returns. *token_hex* makes temporary names.

    A crash leaves the old file or the new one, and perhaps a file that ends in :data:`TEMPORARY_SUFFIX`. Raises the
    errors of :func:`cairnd.tiers.errors.from_os_error`, with nothing changed.
    """
    temporary = path.parent / f".{token_hex(8)}{TEMPORARY_SUFFIX}"
    write_temporary(fs, temporary, data, mode=mode)
    with explained("publish", path):
        try:
            fs.rename(temporary, path)
        except OSError:
            fs.unlink(temporary)
            raise
    sync_folder(fs, path.parent)


def write_temporary(fs: FileSystem, path: Path, data: bytes, *, mode: int = DATA_MODE) -> None:
    """A new synced file *path* with *data*, to be renamed or linked next; removed again on any failure."""
    with explained("write", path):
        fd = fs.open(path, _CREATE, 0o600)
        try:
            try:
                write_all(fs, fd, memoryview(data), 0)
                fs.chmod(fd, mode)
                fs.fsync(fd)
            finally:
                fs.close(fd)
        except BaseException:
            fs.unlink(path)
            raise


def make_folders(
    fs: FileSystem,
    root: Path,
    relative: str,
    mode: int = FOLDER_MODE,
    *,
    durable: set[str] | None = None,
    sync: bool = True,
) -> None:
    """Make each folder of *relative* below *root*, syncing the parent of each, so that all names survive a crash.

    A folder that exists may have been made a moment ago by a process that then died, so its parent is synced too,
    unless *durable* (the relative names that this process has synced; extended here) holds it. Without *sync* nothing
    is synced, for temporary files. Raises :class:`ConfigurationError` when a file or a symbolic link stands in the way.
    """
    known = durable if durable is not None else set()
    parent, name = root, ""
    for part in relative.split("/") if relative else ():
        name = f"{name}/{part}" if name else part
        path = parent / part
        if name not in known:
            with explained("make the folder", path):
                _make_folder(fs, path, mode)
                if sync:
                    fs.fsync_folder(parent)
                    known.add(name)
        parent = path


def _make_folder(fs: FileSystem, path: Path, mode: int) -> None:
    try:
        fs.mkdir(path, mode)
    except FileExistsError:
        if not is_folder(fs.lstat(path)):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None


def sync_folder(fs: FileSystem, folder: Path) -> None:
    """Make the names in *folder* durable: what was renamed, linked or removed there before."""
    with explained("sync the folder", folder):
        fs.fsync_folder(folder)


class BulkWriter:
    """One large file on its way to its final name: reserve, write blocks, finish, publish; or discard.

    Opens *temporary* (which must not exist) and reserves *size_bytes*, so that a full disk is reported before any
    data is written. Writes go around the page cache (O_DIRECT) where the file system allows it.
    """

    def __init__(self, fs: FileSystem, temporary: Path, size_bytes: int, *, mode: int = DATA_MODE) -> None:
        self.path = temporary
        self.size_bytes = size_bytes
        self._fs = fs
        self._mode = mode
        self._bounce: mmap.mmap | None = None
        self._written_bytes = 0
        self._finished = False
        with explained("create", temporary):
            self._fd, self.direct = self._open()
            try:
                self._reserve()
            except BaseException:
                self.discard()
                raise

    def write(self, block: memoryview, offset: int) -> None:
        """Write *block* at *offset*. Blocks may come in any order, each once.

        *offset* is a multiple of 4096, and so is the length unless the block reaches the end of the file. Page-aligned
        memory (any mapping) is written without a copy. Raises :class:`InternalError` for a misplaced block, else the
        errors of :func:`cairnd.tiers.errors.from_os_error`; after any of them only :meth:`discard` is allowed.
        """
        block = block.cast("B")
        end = offset + len(block)
        if offset % ALIGNMENT_BYTES or end > self.size_bytes or (end % ALIGNMENT_BYTES and end != self.size_bytes):
            raise InternalError(f"a block of {self.size_bytes} bytes was misplaced at {offset}..{end}")
        with explained("write", self.path):
            if self.direct:
                whole = len(block) - len(block) % ALIGNMENT_BYTES
                self._write_direct(block[:whole], offset)
                self._write_tail(block[whole:], offset + whole)
            else:
                write_all(self._fs, self._fd, block, offset)
        self._written_bytes += len(block)

    def finish(self) -> None:
        """Make the file durable under its temporary name and close it; then :meth:`publish` it.

        Raises :class:`InternalError` when bytes are missing. When fsync or close fails the file is condemned.
        """
        if self._written_bytes != self.size_bytes:
            raise InternalError(f"{self.path} was finished after {self._written_bytes} of {self.size_bytes} bytes")
        with explained("sync", self.path):
            if self.direct and self.size_bytes % ALIGNMENT_BYTES:
                self._fs.ftruncate(self._fd, self.size_bytes)
            self._fs.chmod(self._fd, self._mode)
            self._fs.fsync(self._fd)
            self._close()
        self._finished = True

    def publish(self, final: Path) -> None:
        """Give the finished file its final name. Durable after :func:`sync_folder` of the folder."""
        if not self._finished:
            raise InternalError(f"{self.path} was published before it was finished")
        with explained("publish", final):
            self._fs.rename(self.path, final)

    def discard(self) -> None:
        """Close and remove the temporary file; may be called at any time, also twice, and after a failure."""
        with explained("remove", self.path):
            try:
                self._close()
            finally:
                with suppress(FileNotFoundError):  # published already, or discarded before
                    self._fs.unlink(self.path)

    def _open(self) -> tuple[int, bool]:
        try:
            return self._fs.open(self.path, _CREATE | os.O_DIRECT, 0o600), True
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
        # The kernel makes the file, and checks that it is new, before it refuses the flag: this is our file.
        fd = self._fs.open(self.path, (_CREATE & ~os.O_EXCL) | os.O_TRUNC, 0o600)
        return fd, False

    def _reserve(self) -> None:
        if self.size_bytes == 0:
            return
        try:
            self._fs.fallocate(self._fd, 0, self.size_bytes)
        except OSError as error:
            # No reservation on this file system: a full disk will show while writing.
            if error.errno not in _NOT_SUPPORTED:
                raise

    def _write_direct(self, data: memoryview, offset: int) -> None:
        stalled = False
        while len(data):
            written = self._pwrite_aligned(data, offset)
            # A short write may end anywhere: go on from the last aligned place.
            written -= written % ALIGNMENT_BYTES
            if not written and stalled:
                raise OSError(errno.EIO, "writes make no progress")
            stalled = not written
            data = data[written:]
            offset += written

    def _pwrite_aligned(self, data: memoryview, offset: int) -> int:
        try:
            return self._fs.pwrite(self._fd, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        # The memory is not aligned (bytes from a stream): go through memory that is.
        part = data[:_BOUNCE_BYTES]
        return self._fs.pwrite(self._fd, self._aligned_copy(part, len(part)), offset)

    def _write_tail(self, tail: memoryview, offset: int) -> None:
        """The last, unaligned bytes: written as a whole zero-padded unit, which :meth:`finish` cuts off."""
        if len(tail):
            self._write_direct(self._aligned_copy(tail, ALIGNMENT_BYTES), offset)

    def _aligned_copy(self, data: memoryview, size_bytes: int) -> memoryview:
        if self._bounce is None:
            self._bounce = mmap.mmap(-1, _BOUNCE_BYTES)
        view = memoryview(self._bounce)[:size_bytes]
        view[: len(data)] = data
        view[len(data) :] = bytes(size_bytes - len(data))
        return view

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._fs.close(fd)
