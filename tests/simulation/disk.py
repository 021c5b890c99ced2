"""A disk that loses what was not synced: :class:`cairnd.tiers.filesystem.FileSystem` in memory.

What is written lies in the page cache first. A file's bytes and size are durable after ``fsync`` of it, a name after
``fsync_folder`` of the folder that holds it; neither makes the other durable. At a power cut each write, size,
creation, rename and removal that was not synced survives or not, in any combination that keeps the order of changes to
one name; a write may survive in part. Journals of real file systems leave fewer states; POSIX allows these.
"""

# ruff: noqa: ARG002 - the signatures are those of the protocol

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from cairnd.tiers.filesystem import AnyPath, FolderEntry
from tests.simulation.kernel import Process

_SECTOR_BYTES = 512
_BLOCK_BYTES = 4096
_FIRST_FD = 1_000_000
"""Far above the descriptors of this process: one that is given to the real system fails."""


@dataclass(slots=True, eq=False)
class _File:
    number: int
    data: bytearray = field(default_factory=bytearray)
    disk: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Changes since the last sync: bytes at an offset, or (None) the size."""
    links: int = 1
    opened: int = 0
    mode: int = 0o600
    mtime_ns: int = 0
    locked: bool = False


@dataclass(slots=True, eq=False)
class _Folder:
    number: int
    entries: dict[str, _Inode] = field(default_factory=dict)
    disk: dict[str, _Inode] = field(default_factory=dict)
    mode: int = 0o700


_Inode = _File | _Folder


class _Slot(NamedTuple):
    folder: _Folder
    name: str
    inode: _Inode | None


@dataclass(slots=True, eq=False)
class _Open:
    file: _File
    path: str
    direct: bool


class _Stat(NamedTuple):
    st_mode: int
    st_ino: int
    st_dev: int
    st_size: int
    st_mtime_ns: int
    st_uid: int = 0
    st_gid: int = 0


@dataclass(slots=True)
class DiskFaults:
    """How likely a call fails, and how many bytes there are. A full disk refuses to reserve, to write and to create."""

    sync_error: float = 0.0
    folder_sync_error: float = 0.0
    write_error: float = 0.0
    read_error: float = 0.0
    short: float = 0.0
    capacity_bytes: int = 1 << 40


class Disk:
    """What one machine's disk holds, in cache and in truth. It outlives the processes that use it."""

    def __init__(self, chance: random.Random, *, direct: bool) -> None:
        self.faults = DiskFaults()
        self.direct = direct
        self.on_unlink: Callable[[str], None] = lambda _path: None
        self.failed = False
        """Whether a call has failed here, as a disk's do."""
        self._chance = chance
        self._inodes = 1
        self._changes: list[tuple[_Slot, ...]] = []
        self._used_bytes = 0
        self._root = _Folder(0)

    # What the simulation itself looks at and does

    def power_cut(self) -> None:
        """Forget what was not synced, as far as the seed wants."""
        self._lose_names()
        self._used_bytes = 0
        for file in self.files().values():
            file.opened, file.locked = 0, False
            file.data[:] = self._survivors(file)
            file.disk = bytes(file.data)
            file.pending.clear()
            self._used_bytes += _blocks(file)

    def kill(self) -> None:
        """The process that used it is gone; the page cache stays."""
        for file in self.files().values():
            file.opened, file.locked = 0, False

    def files(self) -> dict[str, _File]:
        """All files by path, in a stable order."""
        found: dict[str, _File] = {}

        def walk(folder: _Folder, path: str) -> None:
            for name in sorted(folder.entries):
                inode = folder.entries[name]
                if isinstance(inode, _Folder):
                    walk(inode, f"{path}/{name}")
                else:
                    found[f"{path}/{name}"] = inode

        walk(self._root, "")
        return found

    def contents(self, path: str) -> bytes | None:
        """What a process would read at *path*; None if there is no such file."""
        try:
            inode = self._at(path)
        except OSError:
            return None
        return bytes(inode.data) if isinstance(inode, _File) else None

    def rot(self, path: str) -> None:
        """Flip one bit of a file, in cache and on the disk."""
        file = self._at(path)
        assert isinstance(file, _File)
        assert not file.pending, "only what lies on the disk rots"
        at, bit = self._chance.randrange(len(file.data)), self._chance.randrange(8)
        file.data[at] ^= 1 << bit
        file.disk = bytes(file.data)

    def rotten_candidates(self) -> list[str]:
        """Paths of synced files with bytes in them."""
        return [path for path, file in self.files().items() if file.data and not file.pending]

    def _lose_names(self) -> None:
        style = self._chance.choice(("all", "none", "some", "prefix"))
        cut = self._chance.randrange(len(self._changes) + 1)
        lost: set[tuple[int, str]] = set()
        for number, change in enumerate(self._changes):
            survives = {"all": True, "none": False, "prefix": number < cut}.get(style, self._chance.random() < 0.5)
            slots = {(slot.folder.number, slot.name) for slot in change}
            if survives and not slots & lost:
                _apply(change)
            else:
                lost |= slots
        self._changes.clear()

        def settle(folder: _Folder) -> None:
            folder.entries = dict(folder.disk)
            for inode in folder.entries.values():
                if isinstance(inode, _Folder):
                    settle(inode)

        settle(self._root)

    def _survivors(self, file: _File) -> bytearray:
        image = bytearray(file.disk)
        style = self._chance.choice(("all", "none", "some")) if file.pending else "all"
        for offset, data in file.pending:
            if style == "all" or (style == "some" and self._chance.random() < 0.5):
                _change(image, offset, self._torn(data) if style == "some" else data)
        return image

    def _torn(self, data: bytes | None) -> bytes | None:
        if data is None or self._chance.random() < 0.7:
            return data
        return data[: self._chance.randrange(-(-len(data) // _SECTOR_BYTES) + 1) * _SECTOR_BYTES]

    # The tree

    def _at(self, path: AnyPath) -> _Inode:
        inode: _Inode = self._root
        for part in os.fspath(path).split("/"):
            if part in ("", "."):
                continue
            if not isinstance(inode, _Folder):
                raise _error(errno.ENOTDIR)
            found = inode.entries.get(part)
            if found is None:
                raise _error(errno.ENOENT)
            inode = found
        return inode

    def _slot(self, path: AnyPath) -> tuple[_Folder, str]:
        parent, _, name = os.fspath(path).rstrip("/").rpartition("/")
        folder = self._at(parent)
        if not isinstance(folder, _Folder):
            raise _error(errno.ENOTDIR)
        return folder, name

    def _change(self, *slots: _Slot) -> None:
        for slot in slots:
            if slot.inode is None:
                slot.folder.entries.pop(slot.name, None)
            else:
                slot.folder.entries[slot.name] = slot.inode
        self._changes.append(slots)

    def _sync_names(self, folder: _Folder) -> None:
        """Apply what touches *folder*, and what that depends on."""
        wanted: set[tuple[int, str]] = set()
        chosen: list[tuple[_Slot, ...]] = []
        left: list[tuple[_Slot, ...]] = []
        for change in reversed(self._changes):
            slots = {(slot.folder.number, slot.name) for slot in change}
            if slots & wanted or any(slot.folder is folder for slot in change):
                wanted |= slots
                chosen.append(change)
            else:
                left.append(change)
        for change in reversed(chosen):
            _apply(change)
        self._changes = left[::-1]

    def _grow(self, file: _File, size_bytes: int) -> None:
        more = max(0, _rounded(size_bytes) - _blocks(file))
        self._need(more)
        self._used_bytes += more

    def _need(self, size_bytes: int) -> None:
        if self._used_bytes + size_bytes > self.faults.capacity_bytes:
            self.failed = True
            raise _error(errno.ENOSPC)

    def _drop(self, file: _File) -> None:
        if not file.links and not file.opened:
            self._used_bytes -= _blocks(file)

    @property
    def free_bytes(self) -> int:
        """What may still be written."""
        return max(0, self.faults.capacity_bytes - self._used_bytes)

    def _new_number(self) -> int:
        self._inodes += 1
        return self._inodes


class MountedDisk:
    """:class:`cairnd.tiers.filesystem.FileSystem`: a disk as one process sees it. Its calls are steps."""

    def __init__(self, disk: Disk, process: Process) -> None:
        self._disk = disk
        self._process = process
        self._chance = process.loop.chance
        self._fds: dict[int, _Open] = {}
        self._next_fd = _FIRST_FD

    def open(self, path: AnyPath, flags: int, mode: int = 0o600) -> int:
        self._call("open", path)
        folder, name = self._disk._slot(path)
        inode = folder.entries.get(name)
        if inode is None:
            if not flags & os.O_CREAT:
                raise _error(errno.ENOENT)
            self._disk._need(_BLOCK_BYTES)
            inode = _File(self._disk._new_number(), mode=mode, mtime_ns=self._mtime_ns())
            self._disk._change(_Slot(folder, name, inode))
        elif flags & os.O_CREAT and flags & os.O_EXCL:
            raise _error(errno.EEXIST)
        if not isinstance(inode, _File):
            raise _error(errno.EISDIR)
        if flags & os.O_DIRECT and not self._disk.direct:
            raise _error(errno.EINVAL)  # as the kernel does: after it has made the file
        if flags & os.O_TRUNC and inode.data:
            self._resize(inode, 0)
        self._next_fd += 1
        inode.opened += 1
        self._fds[self._next_fd] = _Open(inode, os.fspath(path), bool(flags & os.O_DIRECT))
        return self._next_fd

    def close(self, fd: int) -> None:
        self._process.check()
        file = self._fds.pop(fd).file
        file.opened -= 1
        file.locked = False
        self._disk._drop(file)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        opened = self._file(fd)
        self._call("pwrite", opened.path)
        if opened.direct and (offset % _BLOCK_BYTES or len(data) % _BLOCK_BYTES):
            raise _error(errno.EINVAL)
        self._may_fail(self._disk.faults.write_error, errno.EIO)
        length, unit = len(data), _BLOCK_BYTES if opened.direct else 1
        if length > unit and self._happens(self._disk.faults.short):
            length = unit * self._chance.randrange(1, length // unit)
        file, written = opened.file, bytes(data[:length])
        self._disk._grow(file, offset + length)
        _change(file.data, offset, written)
        file.pending.append((offset, written))
        file.mtime_ns = self._mtime_ns()
        return length

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        opened = self._file(fd)
        self._call("pread", opened.path)
        self._may_fail(self._disk.faults.read_error, errno.EIO)
        found = opened.file.data[offset : offset + len(buffer)]
        if len(found) > 1 and not opened.direct and self._happens(self._disk.faults.short):
            found = found[: self._chance.randrange(1, len(found))]
        buffer[: len(found)] = found
        return len(found)

    def fallocate(self, fd: int, offset: int, size_bytes: int) -> None:
        opened = self._file(fd)
        self._call("fallocate", opened.path)
        self._disk._grow(opened.file, offset + size_bytes)
        if offset + size_bytes > len(opened.file.data):
            self._resize(opened.file, offset + size_bytes)

    def ftruncate(self, fd: int, size_bytes: int) -> None:
        opened = self._file(fd)
        self._call("ftruncate", opened.path)
        self._disk._grow(opened.file, size_bytes)
        self._resize(opened.file, size_bytes)

    def lock(self, fd: int) -> None:
        file = self._file(fd).file
        if file.locked:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        file.locked = True

    def fsync(self, fd: int) -> None:
        opened = self._file(fd)
        self._call("fsync", opened.path)
        file = opened.file
        if self._happens(self._disk.faults.sync_error):
            # The kernel marks the pages clean: they never reach the disk, and the next fsync says that all is well.
            file.pending.clear()
            if self._chance.random() < 0.5:
                file.data[:] = file.disk
            self._disk.failed = True
            raise _error(errno.EIO)
        image = bytearray(file.disk)
        for offset, data in file.pending:
            _change(image, offset, data)
        file.disk = bytes(image)
        file.pending.clear()

    def fsync_folder(self, path: AnyPath) -> None:
        self._call("fsync folder", path)
        folder = self._disk._at(path)
        if not isinstance(folder, _Folder):
            raise _error(errno.ENOTDIR)
        self._may_fail(self._disk.faults.folder_sync_error, errno.EIO)
        self._disk._sync_names(folder)

    def rename(self, source: AnyPath, target: AnyPath) -> None:
        self._call("rename", target)
        (from_folder, from_name), (to_folder, to_name) = self._disk._slot(source), self._disk._slot(target)
        inode = from_folder.entries.get(from_name)
        if inode is None:
            raise _error(errno.ENOENT)
        replaced = to_folder.entries.get(to_name)
        if isinstance(replaced, _Folder):
            raise _error(errno.ENOTEMPTY)
        self._disk._change(_Slot(from_folder, from_name, None), _Slot(to_folder, to_name, inode))
        if replaced is not None:
            self._unlinked(replaced)

    def link(self, source: AnyPath, target: AnyPath) -> None:
        raise NotImplementedError("tier 1 makes no links")

    def symlink(self, points_to: AnyPath, path: AnyPath) -> None:
        raise NotImplementedError("tier 1 makes no links")

    def readlink(self, path: AnyPath) -> str:
        raise NotImplementedError("tier 1 makes no links")

    def unlink(self, path: AnyPath) -> None:
        self._call("unlink", path)
        folder, name = self._disk._slot(path)
        inode = folder.entries.get(name)
        if inode is None:
            raise _error(errno.ENOENT)
        if not isinstance(inode, _File):
            raise _error(errno.EISDIR)
        self._disk.on_unlink(os.fspath(path))
        self._disk._change(_Slot(folder, name, None))
        self._unlinked(inode)

    def mkdir(self, path: AnyPath, mode: int) -> None:
        self._call("mkdir", path)
        folder, name = self._disk._slot(path)
        if name in folder.entries:
            raise _error(errno.EEXIST)
        self._disk._need(_BLOCK_BYTES)
        self._disk._change(_Slot(folder, name, _Folder(self._disk._new_number(), mode=mode)))

    def rmdir(self, path: AnyPath) -> None:
        self._call("rmdir", path)
        folder, name = self._disk._slot(path)
        found = self._disk._at(path)
        if not isinstance(found, _Folder):
            raise _error(errno.ENOTDIR)
        if found.entries:
            raise _error(errno.ENOTEMPTY)
        self._disk._change(_Slot(folder, name, None))

    def scandir(self, path: AnyPath) -> list[FolderEntry]:
        self._process.check()
        folder = self._disk._at(path)
        if not isinstance(folder, _Folder):
            raise _error(errno.ENOTDIR)
        return sorted(
            FolderEntry(name, isinstance(inode, _Folder), isinstance(inode, _File))
            for name, inode in folder.entries.items()
        )

    # These take no time: the daemon also makes them on the thread of its loop, and while it holds a lock.

    def lstat(self, path: AnyPath) -> os.stat_result:
        self._process.check()
        return _stat_of(self._disk._at(path))

    stat = lstat

    def fstat(self, fd: int) -> os.stat_result:
        self._process.check()
        return _stat_of(self._file(fd).file)

    def statvfs(self, path: AnyPath) -> os.statvfs_result:
        self._process.check()
        free = self._disk.free_bytes // _BLOCK_BYTES
        return os.statvfs_result((_BLOCK_BYTES, _BLOCK_BYTES, 1 << 20, free, free, 1 << 20, 1 << 20, 1 << 20, 0, 255))

    def access(self, path: AnyPath, mode: int) -> bool:
        self._process.check()
        return True

    def chmod(self, target: AnyPath | int, mode: int) -> None:
        self._process.check()
        inode = self._file(target).file if isinstance(target, int) else self._disk._at(target)
        inode.mode = mode

    def chown(self, target: AnyPath | int, uid: int, gid: int) -> None:
        self._process.check()

    def set_immutable(self, path: AnyPath, *, immutable: bool) -> bool:
        return False

    def path_of(self, fd: int) -> str:
        """Under which name a descriptor was opened."""
        return self._file(fd).path

    def _call(self, what: str, path: AnyPath) -> None:
        # One call in three lets the others run meanwhile, most for less than a millisecond and some for very long.
        duration_s = 0.0
        if self._chance.random() < 0.35:
            duration_s = self._chance.random() * (0.001 if self._chance.random() < 0.98 else 3.0)
        self._process.call(f"{what} {os.fspath(path)}", duration_s)

    def _happens(self, likelihood: float) -> bool:
        return likelihood > 0.0 and self._chance.random() < likelihood

    def _may_fail(self, likelihood: float, number: int) -> None:
        if self._happens(likelihood):
            self._disk.failed = True
            raise _error(number)

    def _file(self, fd: int) -> _Open:
        self._process.check()
        opened = self._fds.get(fd)
        if opened is None:
            raise _error(errno.EBADF)
        return opened

    def _resize(self, file: _File, size_bytes: int) -> None:
        before = _blocks(file)
        _change(file.data, size_bytes, None)
        self._disk._used_bytes += min(0, _blocks(file) - before)
        file.pending.append((size_bytes, None))
        file.mtime_ns = self._mtime_ns()

    def _unlinked(self, file: _File) -> None:
        file.links -= 1
        self._disk._drop(file)

    def _mtime_ns(self) -> int:
        return int(self._process.loop.time() * 1e9) + self._process.loop.trace.steps


def _apply(change: tuple[_Slot, ...]) -> None:
    for slot in change:
        if slot.inode is None:
            slot.folder.disk.pop(slot.name, None)
        else:
            slot.folder.disk[slot.name] = slot.inode


def _change(image: bytearray, offset: int, data: bytes | None) -> None:
    """Write *data* at *offset*, or make *offset* the size."""
    end = offset if data is None else offset + len(data)
    if end > len(image):
        image.extend(bytes(end - len(image)))
    if data is None:
        del image[offset:]
    else:
        image[offset:end] = data


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _blocks(file: _File) -> int:
    return _rounded(len(file.data))


def _stat_of(inode: _Inode) -> os.stat_result:
    if isinstance(inode, _File):
        found = _Stat(stat.S_IFREG | inode.mode, inode.number, 1, len(inode.data), inode.mtime_ns)
    else:
        found = _Stat(stat.S_IFDIR | inode.mode, inode.number, 1, 0, 0)
    return cast(os.stat_result, found)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
