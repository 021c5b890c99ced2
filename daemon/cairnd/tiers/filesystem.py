"""Every system call through which Cairn makes something durable, behind one interface.

The file system comes in through the constructor, so that a test can crash at any call, shorten any write or fail any
fsync. Methods are thin: they raise ``OSError`` as the system does. Meaning lives in :mod:`cairnd.tiers.atomic`.
"""

# This module is the one place that makes the bare calls:
# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108, PTH115, PTH116, PTH211

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from typing import NamedTuple, Protocol

from cairn_api.errors import VersionError
from cairn_api.wire import PAGE_BYTES

AnyPath = str | os.PathLike[str]

# linux/fs.h; the numbers are those of every architecture that encodes an ioctl's direction in its top two bits.
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_IMMUTABLE_FL = 0x00000010


class FolderEntry(NamedTuple):
    """One name in a folder. A symbolic link is neither a folder nor a file, whatever it points to."""

    name: str
    is_folder: bool
    is_file: bool


class FileSystem(Protocol):
    """The calls, named as in :mod:`os`. Offsets and sizes are bytes. All raise ``OSError``."""

    def open(self, path: AnyPath, flags: int, mode: int = 0o600) -> int:
        """Open *path*; the descriptor is closed by :meth:`close` only."""

    def close(self, fd: int) -> None:
        """Close; an error means that earlier writes may be lost."""

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """One write, which may be short; returns the bytes written."""

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        """One read, which may be short; returns the bytes read, 0 at the end of the file."""

    def fallocate(self, fd: int, offset: int, size_bytes: int) -> None:
        """Reserve space; afterwards writing there cannot run out of it."""

    def ftruncate(self, fd: int, size_bytes: int) -> None:
        """Set the file's size."""

    def lock(self, fd: int) -> None:
        """Take the file for this process, or raise ``BlockingIOError``; the lock ends with the descriptor."""

    def fsync(self, fd: int) -> None:
        """Make data and size durable. After a failure the file is lost: never call it again on this descriptor."""

    def fsync_folder(self, path: AnyPath) -> None:
        """Make the names in a folder durable."""

    def rename(self, source: AnyPath, target: AnyPath) -> None:
        """Move *source* over *target* in one step."""

    def link(self, source: AnyPath, target: AnyPath) -> None:
        """A second name for a file; fails when *target* exists."""

    def symlink(self, points_to: AnyPath, path: AnyPath) -> None:
        """A symbolic link at *path*."""

    def readlink(self, path: AnyPath) -> str:
        """What a symbolic link points to."""

    def unlink(self, path: AnyPath) -> None:
        """Remove a file or a symbolic link."""

    def mkdir(self, path: AnyPath, mode: int) -> None:
        """Make one folder."""

    def rmdir(self, path: AnyPath) -> None:
        """Remove one empty folder."""

    def scandir(self, path: AnyPath) -> list[FolderEntry]:
        """The entries of a folder, by name."""

    def lstat(self, path: AnyPath) -> os.stat_result:
        """Of the name itself, never of what a link points to."""

    def stat(self, path: AnyPath) -> os.stat_result:
        """Of what a name leads to."""

    def fstat(self, fd: int) -> os.stat_result:
        """Of an open file."""

    def statvfs(self, path: AnyPath) -> os.statvfs_result:
        """Of the file system that holds *path*."""

    def access(self, path: AnyPath, mode: int) -> bool:
        """Whether this process may use *path* as *mode* says (``os.W_OK``, ...)."""

    def chmod(self, target: AnyPath | int, mode: int) -> None:
        """Of a path or an open descriptor."""

    def chown(self, target: AnyPath | int, uid: int, gid: int) -> None:
        """Of a path (a link itself, not its target) or an open descriptor; -1 leaves one as it is."""

    def set_immutable(self, path: AnyPath, *, immutable: bool) -> bool:
        """Set or clear the immutable flag of a file or folder, best effort; returns whether it now is as asked.

        False where the file system has no such flag or the daemon lacks ``CAP_LINUX_IMMUTABLE``.
        """


class OsFileSystem:
    """The machine's own file system."""

    def open(self, path: AnyPath, flags: int, mode: int = 0o600) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, fd: int) -> None:
        os.close(fd)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def fallocate(self, fd: int, offset: int, size_bytes: int) -> None:
        os.posix_fallocate(fd, offset, size_bytes)

    def ftruncate(self, fd: int, size_bytes: int) -> None:
        os.ftruncate(fd, size_bytes)

    def lock(self, fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def fsync_folder(self, path: AnyPath) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: AnyPath, target: AnyPath) -> None:
        os.rename(source, target)

    def link(self, source: AnyPath, target: AnyPath) -> None:
        os.link(source, target, follow_symlinks=False)

    def symlink(self, points_to: AnyPath, path: AnyPath) -> None:
        os.symlink(points_to, path)

    def readlink(self, path: AnyPath) -> str:
        return os.readlink(os.fspath(path))

    def unlink(self, path: AnyPath) -> None:
        os.unlink(path)

    def mkdir(self, path: AnyPath, mode: int) -> None:
        os.mkdir(path, mode)

    def rmdir(self, path: AnyPath) -> None:
        os.rmdir(path)

    def scandir(self, path: AnyPath) -> list[FolderEntry]:
        with os.scandir(path) as entries:
            return sorted(
                FolderEntry(entry.name, entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False))
                for entry in entries
            )

    def lstat(self, path: AnyPath) -> os.stat_result:
        return os.lstat(path)

    def stat(self, path: AnyPath) -> os.stat_result:
        return os.stat(path)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def statvfs(self, path: AnyPath) -> os.statvfs_result:
        return os.statvfs(path)

    def access(self, path: AnyPath, mode: int) -> bool:
        return os.access(path, mode)

    def chmod(self, target: AnyPath | int, mode: int) -> None:
        os.chmod(target, mode)

    def chown(self, target: AnyPath | int, uid: int, gid: int) -> None:
        if isinstance(target, int):
            os.fchown(target, uid, gid)
        else:
            os.lchown(target, uid, gid)

    def set_immutable(self, path: AnyPath, *, immutable: bool) -> bool:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            (flags,) = struct.unpack("L", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, struct.pack("L", 0)))
            wanted = flags | _FS_IMMUTABLE_FL if immutable else flags & ~_FS_IMMUTABLE_FL
            if wanted != flags:
                fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("L", wanted))
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EINVAL):
                raise
            return False
        finally:
            os.close(fd)
        return True


def write_all(fs: FileSystem, fd: int, data: memoryview, offset: int) -> None:
    """Write all of *data* at *offset*, however short the single writes are."""
    while len(data):
        written = fs.pwrite(fd, data, offset)
        if written <= 0:
            raise OSError(errno.EIO, "a write accepted no bytes")
        data = data[written:]
        offset += written


def read_exactly(fs: FileSystem, fd: int, buffer: memoryview, offset: int) -> None:
    """Fill *buffer* from *offset*; raises :class:`VersionError` when the file ends before."""
    while len(buffer):
        count = fs.pread_into(fd, buffer, offset)
        if count <= 0:
            raise VersionError(
                f"a file ends at {offset}, {len(buffer)} bytes before its expected end",
                hint="run `cairn verify` on the version",
            )
        buffer = buffer[count:]
        offset += count


def read_direct(fs: FileSystem, fd: int, buffer: memoryview, offset: int, size_bytes: int) -> None:
    """Read *size_bytes* at *offset* into *buffer* from a file that was opened with O_DIRECT.

    The buffer is page-aligned and has whole pages, and *offset* is a multiple of their size. Raises
    :class:`VersionError` when the file ends before.
    """
    filled = 0
    while filled < size_bytes:
        count = fs.pread_into(fd, buffer[filled : -(-size_bytes // PAGE_BYTES) * PAGE_BYTES], offset + filled)
        if count < min(PAGE_BYTES, size_bytes - filled):
            raise VersionError(
                f"a file ends at {offset + filled + count}, before its expected end",
                hint="run `cairn verify` on the version",
            )
        filled += count
        if filled < size_bytes:
            filled -= filled % PAGE_BYTES  # a short read may end anywhere


def is_folder(result: os.stat_result) -> bool:
    """Whether an ``lstat`` result is that of a real folder."""
    return stat.S_ISDIR(result.st_mode)


def is_file(result: os.stat_result) -> bool:
    """Whether an ``lstat`` result is that of a real file."""
    return stat.S_ISREG(result.st_mode)
