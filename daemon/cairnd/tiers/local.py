"""Tier 1: files below one local folder, published by the discipline of :mod:`cairnd.tiers.atomic`."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from cairn_api.errors import VersionError
from cairnd.tiers import atomic
from cairnd.tiers.errors import NotFoundError, explained, from_os_error
from cairnd.tiers.filesystem import FileSystem, FolderEntry, is_file, is_folder, read_exactly
from cairnd.tiers.keys import check_key
from cairnd.tiers.uncached import UncachedFile

_Done = TypeVar("_Done")

SMALL_BYTES = 256 * 1024 * 1024
"""The most that :meth:`LocalTier.read_small` reads unless told otherwise: far above any manifest."""


class FileIdentity(NamedTuple):
    """If none of these changed, neither did the bytes (published files are never written again)."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int


class LocalTier:
    """Files under *root* (which exists) by key. Thread-safe: it keeps no state but which folders are known durable.

    All methods raise what :func:`cairnd.tiers.errors.from_os_error` makes of a failure:
    :class:`~cairnd.tiers.errors.NotFoundError` for a missing key, ``OverloadedError`` for a full disk,
    ``UnavailableError`` for one that reports errors, ``ConfigurationError`` for a missing permission, for a key that
    would leave the root, and for a symbolic link where a file or folder of Cairn's belongs.
    """

    def __init__(self, fs: FileSystem, root: Path, token_hex: Callable[[int], str] = secrets.token_hex) -> None:
        """*token_hex* makes a random name of so many bytes."""
        self._fs = fs
        self.root = root
        self.token_hex = token_hex
        self._durable_folders: set[str] = set()

    def begin(self, key: str, temp_key: str, size_bytes: int) -> atomic.BulkWriter:
        """Start a large file that will become *key*, at *temp_key*; makes the folders of both, reserves the space.

        Training waits for this, and a temporary file need not survive a power cut: the folders are synced by
        :meth:`make_folders_of` or :meth:`publish`.
        """

        def begin() -> atomic.BulkWriter:
            self._make_folder_of(key, sync=False)
            self._make_folder_of(temp_key, sync=False)
            return atomic.BulkWriter(self._fs, self._path(temp_key), size_bytes)

        return self._in_folders(begin)

    def make_folders_of(self, keys: Iterable[str]) -> None:
        """Make the folders in which *keys* will lie, durably: what is published there later need not wait for that."""
        for key in keys:
            self._in_folders(partial(self._make_folder_of, key))

    def mark(self, key: str) -> None:
        """Make the empty file *key*, if it is not there: not durable, but there after a crash of the daemon alone."""
        path = self._path(key)
        with explained("create", path):
            self._fs.close(self._fs.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))

    def publish(self, writer: atomic.BulkWriter, key: str) -> None:
        """Rename a finished file to *key*, whose folders are made if need be. Durable after :meth:`sync_folders`."""

        def publish() -> None:
            self._make_folder_of(key)  # a partition's name may have folders of its own
            writer.publish(self._path(key))

        self._in_folders(publish)

    def sync_folders(self, keys: Iterable[str]) -> None:
        """Make it durable that *keys* were published: syncs each folder that holds one of them, once."""
        for folder in sorted({self._path(key).parent for key in keys}):
            atomic.sync_folder(self._fs, folder)

    def put_small(self, key: str, data: bytes) -> None:
        """Put *data* at *key*, replacing what was there; durable when this returns."""

        def put() -> None:
            self._make_folder_of(key)
            atomic.write_file(self._fs, self._path(key), data, token_hex=self.token_hex)

        self._in_folders(put)

    def read_small(self, key: str, max_bytes: int = SMALL_BYTES) -> bytes:
        """The bytes of *key*; raises :class:`VersionError` when there are more than *max_bytes*."""
        path = self._path(key)
        fd = self.open_read(key)
        try:
            with explained("read", path):
                size_bytes = self._fs.fstat(fd).st_size
                if size_bytes > max_bytes:
                    raise VersionError(f"{path} has {size_bytes} bytes where at most {max_bytes} are expected")
                data = bytearray(size_bytes)
                read_exactly(self._fs, fd, memoryview(data), 0)
        finally:
            self._fs.close(fd)
        return bytes(data)

    def open_read(self, key: str) -> int:
        """A descriptor of the file *key*, for reading; whoever calls closes it, with :meth:`close` for one."""
        path = self._path(key)
        with explained("open", path):
            # O_NONBLOCK: a planted named pipe must not hang the daemon.
            fd = self._fs.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            if not is_file(self._fs.fstat(fd)):
                self._fs.close(fd)
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            return fd

    def close(self, fd: int) -> None:
        """Close what :meth:`open_read` or :meth:`lock` opened."""
        self._fs.close(fd)

    def lock(self, key: str) -> int:
        """Take the file *key*, made if need be, for this process: a descriptor that holds the lock until it is closed.

        Its folder exists. Raises ``BlockingIOError`` when another process has it.
        """
        path = self._path(key)
        with explained("open", path):
            fd = self._fs.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            self._fs.lock(fd)
        except OSError:
            self._fs.close(fd)
            raise
        return fd

    def open_uncached(self, key: str) -> UncachedFile:
        """The file *key*, to be read around the page cache; the caller closes it."""
        path = self._path(key)
        with explained("open", path):
            file = UncachedFile(self._fs, path, os.O_NOFOLLOW | os.O_NONBLOCK)
            if not is_file(self._fs.fstat(file.fd)):
                file.close()
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            return file

    def identity(self, key: str) -> FileIdentity:
        """Who the file *key* is now."""
        path = self._path(key)
        with explained("look at", path):
            found = self._fs.lstat(path)
            if not is_file(found):
                raise OSError(errno.EISDIR if is_folder(found) else errno.ELOOP, "not a file")
        return FileIdentity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def exists(self, key: str) -> bool:
        """Whether there is anything under *key*."""
        path = self._path(key)
        with explained("look at", path):
            try:
                self._fs.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def list_folder(self, key: str) -> list[FolderEntry]:
        """What lies directly in the folder *key*, by name; the empty key is the root."""
        path = self._path(key) if key else self.root
        with explained("list", path):
            if not is_folder(self._fs.lstat(path)):
                raise OSError(errno.ENOTDIR, "not a folder")
            return self._fs.scandir(path)

    def delete(self, key: str) -> None:
        """Remove the file (or symbolic link) *key*, if it is there; durable when this returns."""
        path = self._path(key)
        with explained("delete", path):
            try:
                self._unlink(path)
            except FileNotFoundError:
                return
            self._fs.fsync_folder(path.parent)

    def delete_tree(self, key: str, *, sync: bool = True) -> None:
        """Remove *key* and all below it, files before folders; links are removed, not followed.

        Idempotent, also after a crash half-way; durable when this returns, unless *sync* is false.
        """
        path = self._path(key)
        self._forget_folders(key)
        with explained("delete", path):
            try:
                found = self._fs.lstat(path)
            except FileNotFoundError:
                return
            if is_folder(found):
                self._delete_folder(path)
            else:
                self._unlink(path)
            if sync:
                self._fs.fsync_folder(path.parent)

    def move(self, key: str, target: str) -> None:
        """Rename a file or a whole folder; durable when this returns."""
        self._in_folders(partial(self._move, key, target))
        self._forget_folders(key)

    def hand_to_group(self, key: str, gid: int, *, everything: bool = False) -> bool:
        """Let group *gid* read the folder *key* (and with *everything* all below it); False if that is not permitted.

        A daemon that is neither root nor in that group cannot. Its files then stay readable through descriptors that it
        passes, only not by name.
        """
        path = self._path(key)
        with explained("hand over", path):
            try:
                self._hand_over(path, gid, everything=everything)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EACCES, errno.EINVAL):  # EINVAL: a group unknown here
                    raise
                return False
        return True

    def open_to_all(self, key: str) -> None:
        """Make the folder *key* if need be, and let everybody pass through it."""
        atomic.make_folders(self._fs, self.root, key, durable=self._durable_folders)
        path = self._path(key)
        with explained("open", path):
            self._fs.chmod(path, 0o755)

    def set_immutable(self, key: str) -> bool:
        """Keep even root from overwriting the file *key* until it is deleted through here; False if not possible."""
        path = self._path(key)
        with explained("protect", path):
            return self._fs.set_immutable(path, immutable=True)

    def free_bytes(self) -> int:
        """What the daemon's user may still write to this file system."""
        with explained("ask for the free space of", self.root):
            found = self._fs.statvfs(self.root)
        return found.f_bavail * found.f_frsize

    def total_bytes(self) -> int:
        """How large this file system is."""
        with explained("ask for the size of", self.root):
            found = self._fs.statvfs(self.root)
        return found.f_blocks * found.f_frsize

    def _path(self, key: str) -> Path:
        """Where *key* lies; refuses a key that leaves the root by its text or through a linked folder."""
        path = os.fspath(self.root)  # joined as text: recovery comes here several times for each of 10,000 versions
        *folders, name = check_key(key).split("/")
        try:
            for folder in folders:
                path = f"{path}/{folder}"
                if not is_folder(self._fs.lstat(path)):
                    raise OSError(errno.ENOTDIR, "not a folder")
        except FileNotFoundError:
            pass  # nothing below it either
        except OSError as error:
            raise from_os_error(error, "enter the folder", path) from error
        return self.root.joinpath(*folders, name)

    def _make_folder_of(self, key: str, *, sync: bool = True) -> None:
        folder = check_key(key).rpartition("/")[0]
        atomic.make_folders(self._fs, self.root, folder, durable=self._durable_folders, sync=sync)

    def _in_folders(self, act: Callable[[], _Done]) -> _Done:
        """Do *act*, which makes its folders; once more, and believing in no folder, where one was missing.

        Folders that are known are not made again, and somebody may have removed one by hand while the daemon ran.
        """
        try:
            return act()
        except NotFoundError:
            self._durable_folders.clear()
            return act()

    def _move(self, key: str, target: str) -> None:
        self._make_folder_of(target)
        source, destination = self._path(key), self._path(target)
        with explained("move", source):
            try:
                self._fs.rename(source, destination)
            except PermissionError:
                # An immutable file keeps its name. Whoever may set that flag may clear it.
                if not self._fs.set_immutable(source, immutable=False):
                    raise
                self._fs.rename(source, destination)
            self._fs.fsync_folder(destination.parent)
            self._fs.fsync_folder(source.parent)

    def _hand_over(self, path: Path, gid: int, *, everything: bool) -> None:
        found = self._fs.lstat(path)
        if found.st_gid != gid:
            self._fs.chown(path, -1, gid)
        if everything and is_folder(found):
            for entry in self._fs.scandir(path):
                self._hand_over(path / entry.name, gid, everything=True)

    def _forget_folders(self, key: str) -> None:
        for folder in list(self._durable_folders):
            if folder == key or folder.startswith(f"{key}/"):
                self._durable_folders.discard(folder)

    def _delete_folder(self, path: Path) -> None:
        entries = self._fs.scandir(path)
        for entry in sorted(entries, key=lambda entry: entry.is_folder):
            if entry.is_folder:
                self._delete_folder(path / entry.name)
            else:
                self._unlink(path / entry.name)
        self._fs.rmdir(path)

    def _unlink(self, path: Path) -> None:
        try:
            self._fs.unlink(path)
        except PermissionError:
            # Published files may be immutable. Whoever may set that flag may clear it.
            if not is_file(self._fs.lstat(path)) or not self._fs.set_immutable(path, immutable=False):
                raise
            self._fs.unlink(path)
