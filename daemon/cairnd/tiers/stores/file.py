"""``file://``: an object store in a folder, local or shared (the embedded default).

An object is written under a temporary name beside its final one, synced, and then renamed (put, upload) or linked (put
if absent: ``link`` fails when the name exists, on every POSIX file system). Names are synced before success is told.

An upload is one pass around the page cache: read, compare with the digest, write. Having the kernel copy or share the
blocks (``copy_file_range``, reflinks) would leave the bytes unread, so a rotten source would become a rotten object; on
file systems without reflinks it also goes through the page cache, which costs several times the processor time.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from cairn_api.errors import ConfigurationError, UnavailableError, VersionError
from cairn_api.wire import PAGE_BYTES
from cairnd.digests import digest_of
from cairnd.tiers import atomic
from cairnd.tiers.errors import NotFoundError, UploadCancelledError, explained
from cairnd.tiers.filesystem import FileSystem, is_file, is_folder, read_exactly
from cairnd.tiers.keys import check_key, check_prefix
from cairnd.tiers.object_store import BinarySource, Capabilities, ObjectInfo
from cairnd.tiers.uncached import UncachedFile

_TEMPORARY_PREFIX = ".upload-"
_COPY_BYTES = 8 * 1024 * 1024
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_KEEPS_FOLDER = (
    errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EBUSY,  # it is used, gone, or no folder
    errno.EROFS, errno.EACCES, errno.EPERM,  # an empty folder more does no harm
)  # fmt: skip
_FOLDER_ATTEMPTS = 5
_Made = TypeVar("_Made")
_Read = Callable[[memoryview, int, int], None]


class FileStore:
    """Objects as files below *root*, which is made when the first object is put."""

    def __init__(self, fs: FileSystem, root: Path) -> None:
        self._fs = fs
        self._root = root
        self._identity: tuple[int, int] | None = None
        """Of the root, once it was used: its inode, and what its file system says of itself."""
        self._capabilities = Capabilities("file", conditional_put=True, ranged_reads=True, checks_source=True)

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def probe(self, key: str) -> Capabilities:
        try:
            created = self.put_if_absent(key, b"1")
            excluded = not self.put_if_absent(key, b"2") and self.get(key, 1) == b"1"
        finally:
            self.delete(key)
        # Where links do not work, put_if_absent itself has taken this capability away.
        self._capabilities = self._capabilities._replace(
            conditional_put=self._capabilities.conditional_put and created and excluded
        )
        return self._capabilities

    def put(self, key: str, data: bytes) -> None:
        with self._staged(key, lambda path: atomic.write_temporary(self._fs, path, data)) as (_, temporary, final):
            self._fs.rename(temporary, final)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        created = True
        with self._staged(key, lambda path: atomic.write_temporary(self._fs, path, data)) as (_, temporary, final):
            try:
                self._fs.link(temporary, final)
            except FileExistsError:
                # The folder is synced also then: the other writer may not have come to that yet.
                created = False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                self._capabilities = self._capabilities._replace(conditional_put=False)
                created = self.info(key) is None
                if created:
                    self._fs.rename(temporary, final)
        return created

    def upload(
        self,
        key: str,
        source: BinarySource,
        *,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
        deadline_s: float,
    ) -> None:
        until_s = time.monotonic() + deadline_s

        def go_on() -> None:
            if cancelled():
                raise UploadCancelledError(f"the upload of {key} was cancelled")
            if time.monotonic() > until_s:
                raise UnavailableError(
                    f"the upload of {key} was not done after {deadline_s:g} s",
                    hint="look at the speed of the file system that holds persistent_storage_path",
                )

        with (
            self._opened(source) as read,
            self._staged(key, lambda path: atomic.BulkWriter(self._fs, path, source.size_bytes)) as (writer, _, final),
        ):
            try:
                digest = digest_of(_copied(source.size_bytes, read, writer, progress, go_on))
                if source.digest is not None and digest != source.digest:
                    raise VersionError(
                        f"what was to become {key} does not match its digest", hint="run `cairn verify` on the version"
                    )
                writer.finish()
                writer.publish(final)
            except BaseException:
                writer.discard()
                raise

    def get(self, key: str, max_bytes: int) -> bytes:
        with self._reading(key) as fd:
            size_bytes = self._fs.fstat(fd).st_size
            if size_bytes > max_bytes:
                raise VersionError(f"{key} has {size_bytes} bytes where at most {max_bytes} are expected")
            data = bytearray(size_bytes)
            read_exactly(self._fs, fd, memoryview(data), 0)
        return bytes(data)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        with self._reading(key) as fd:
            read_exactly(self._fs, fd, buffer, offset)

    def info(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        with explained("look at", path):
            try:
                found = self._fs.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                self._check_root()
                return None
        return ObjectInfo(key, found.st_size, found.st_mtime) if is_file(found) else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        keys = sorted(key for key, name in self._walk(check_prefix(prefix)) if self._is_object(name))
        for key in keys:
            found = self.info(key)
            if found is not None:
                yield found

    def list_folders(self, prefix: str) -> Sequence[str]:
        self._check_root()
        path = self._root / check_prefix(prefix)
        with explained("list", path):
            try:
                entries = self._fs.scandir(path)
            except (FileNotFoundError, NotADirectoryError):
                return []
        # Empty folders are nothing to a store; of what lies below the others, the first object is enough.
        below = {entry.name: self._walk(f"{prefix}{entry.name}/") for entry in entries if entry.is_folder}
        return [folder for folder, found in below.items() if any(self._is_object(name) for _, name in found)]

    def delete(self, key: str) -> None:
        path = self._path(key)
        with explained("delete", path):
            try:
                self._fs.unlink(path)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return  # a folder is no object
            self._sync_nearest(path.parent)
            self._remove_empty(path.parent)

    def unfinished_uploads(self, older_than_s: float) -> Sequence[str]:
        """What :meth:`abort_stale_uploads` would remove: names of temporary files, below the root."""
        return list(self._stale_uploads("", older_than_s))

    def abort_stale_uploads(self, prefix: str, older_than_s: float) -> int:
        count = 0
        for key in tuple(self._stale_uploads(check_prefix(prefix), older_than_s)):
            path = self._root / key
            with explained("delete", path), suppress(FileNotFoundError):
                self._fs.unlink(path)
                self._remove_empty(path.parent)
                count += 1
        return count

    def _stale_uploads(self, prefix: str, older_than_s: float) -> Iterator[str]:
        before_s: float | None = None
        for key, name in self._walk(prefix):
            path = self._root / key
            if self._is_object(name):
                continue
            with explained("look at", path), suppress(FileNotFoundError):
                before_s = self._now_s(path.parent) - older_than_s if before_s is None else before_s
                if self._fs.lstat(path).st_mtime <= before_s:
                    yield key

    def _now_s(self, folder: Path) -> float:
        """The present by the clock that wrote the times of uploads too: this machine's may be wrong by days."""
        path = folder / f"{_TEMPORARY_PREFIX}{secrets.token_hex(16)}"
        fd = self._fs.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            return self._fs.fstat(fd).st_mtime
        finally:
            self._fs.close(fd)
            self._fs.unlink(path)

    @staticmethod
    def _is_object(name: str) -> bool:
        return not name.startswith(_TEMPORARY_PREFIX)

    def _path(self, key: str) -> Path:
        if not all(self._is_object(part) for part in check_key(key).split("/")):
            raise ConfigurationError(f"the key {key!r} has a part that is reserved", hint="report this as a bug")
        return self._root / key

    @contextmanager
    def _staged(self, key: str, create: Callable[[Path], _Made]) -> Iterator[tuple[_Made, Path, Path]]:
        """What *create* made of a temporary path, that path, and the final one beside it.

        Afterwards the folder is synced if the block succeeded, and the temporary file is gone in any case. Making the
        folder and the file in it is repeated: another process may remove the folder, being empty, in between.
        """
        final = self._path(key)
        temporary = final.parent / f"{_TEMPORARY_PREFIX}{secrets.token_hex(16)}"
        try:
            made = self._create(key, temporary, create)
            with explained("publish", final):
                yield made, temporary, final
                self._sync_nearest(final.parent)
        except BaseException:
            with suppress(OSError):  # what went wrong first is what tells; a temporary file left behind is swept later
                self._fs.unlink(temporary)
            with suppress(OSError):
                self._remove_empty(final.parent)
            raise
        with explained("remove", temporary):
            with suppress(FileNotFoundError):
                self._fs.unlink(temporary)
            self._remove_empty(final.parent)

    def _create(self, key: str, temporary: Path, create: Callable[[Path], _Made]) -> _Made:
        for _ in range(_FOLDER_ATTEMPTS - 1):
            with suppress(NotFoundError):
                self._make_root()
                atomic.make_folders(self._fs, self._root, key.rpartition("/")[0])
                return create(temporary)
        self._make_root()
        atomic.make_folders(self._fs, self._root, key.rpartition("/")[0])
        return create(temporary)

    def _make_root(self) -> None:
        if self._find_root():
            return
        existing = next(folder for folder in self._root.parents if folder.is_dir())
        atomic.make_folders(self._fs, existing, self._root.relative_to(existing).as_posix())
        self._find_root()

    def _check_root(self) -> None:
        """Before something is called missing: it is not, if the whole bucket is gone."""
        if self._identity is not None:
            self._find_root()

    def _find_root(self) -> bool:
        """Whether the root is there; raises :class:`UnavailableError` if it was, and is not or is another folder now.

        A file system that has been unmounted leaves an empty folder, or none: what is put there is not in the bucket.
        Each ext4's root has inode 2, so file systems are told apart too: by the id that they state (``f_fsid``, 0 for
        none), and not by ``st_dev``, which those of a network may change when they are mounted again.
        """
        known = self._identity  # before the look: another thread may make it meanwhile
        with explained("look at", self._root):
            try:
                found = self._fs.stat(self._root)
                identity = (found.st_ino, self._fs.statvfs(self._root).f_fsid)
            except FileNotFoundError:
                identity = None
            else:
                if not is_folder(found):
                    raise OSError(errno.ENOTDIR, "not a folder")
        if known not in (None, identity):
            now = "gone" if identity is None else "another one"
            raise UnavailableError(
                f"the bucket's folder {self._root} is {now} since it was used",
                hint="mount again what was mounted there. If it was mounted only after cairnd had started, restart "
                "cairnd: it persists again what tier 1 still holds, and the rest lies under the mount; copy it from "
                "there",
            )
        self._identity = identity or self._identity
        return identity is not None

    @contextmanager
    def _opened(self, source: BinarySource) -> Iterator[_Read]:
        """What reads the source, which is checked to have the size that it says, around the page cache if possible."""
        # A descriptor is opened anew: the flag belongs to whoever opened it, and this one is not ours.
        path = source.file if isinstance(source.file, Path) else Path(f"/proc/self/fd/{source.file}")
        name = os.fspath(source.file) if isinstance(source.file, Path) else f"descriptor {source.file}"
        with explained("read", name):
            file = UncachedFile(self._fs, path)

        def read(buffer: memoryview, offset: int, size_bytes: int) -> None:
            try:
                file.read(buffer, offset, size_bytes)
            except OSError as error:
                raise VersionError(f"{name} cannot be read: {error}", hint="look at its disk") from error

        try:
            size_bytes = self._fs.fstat(file.fd).st_size
            if size_bytes != source.size_bytes:
                raise VersionError(f"{name} has {size_bytes} bytes instead of {source.size_bytes}")
            yield read
        finally:
            file.close()

    @contextmanager
    def _reading(self, key: str) -> Iterator[int]:
        path = self._path(key)
        with explained("read", path):
            try:
                fd = self._fs.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            except FileNotFoundError:
                self._check_root()
                raise
            try:
                if not is_file(self._fs.fstat(fd)):
                    raise NotFoundError(f"there is no object {key} in {self._root}")
                yield fd
            finally:
                self._fs.close(fd)

    def _walk(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Key and last name of every file below *prefix*, temporary ones too, in no order."""
        self._check_root()
        folders = [prefix]
        while folders:
            folder = folders.pop()
            path = self._root / folder
            with explained("list", path):
                try:
                    entries = self._fs.scandir(path)
                except (FileNotFoundError, NotADirectoryError):
                    continue
            for entry in entries:
                if entry.is_folder:
                    folders.append(f"{folder}{entry.name}/")
                elif entry.is_file:
                    yield folder + entry.name, entry.name

    def _sync_nearest(self, folder: Path) -> None:
        """Sync *folder*; where another process removed it, being empty by now, the nearest folder above it."""
        while True:
            try:
                self._fs.fsync_folder(folder)
            except FileNotFoundError:
                if folder == self._root:
                    raise
                folder = folder.parent
            else:
                return

    def _remove_empty(self, folder: Path) -> None:
        """Remove *folder* and those above it, below the root, as long as they are empty."""
        while folder != self._root:
            try:
                self._fs.rmdir(folder)
            except OSError as error:
                if error.errno in _KEEPS_FOLDER:
                    return
                raise
            folder = folder.parent


def _copied(
    size_bytes: int,
    read: _Read,
    writer: atomic.BulkWriter,
    progress: Callable[[int], None],
    go_on: Callable[[], None],
) -> Iterator[memoryview]:
    """Copy block by block; each is given out when it is written."""
    if not size_bytes:
        return
    # Not closed by hand: an error that is being reported still holds views of it.
    buffer = memoryview(mmap.mmap(-1, min(_COPY_BYTES, -(-size_bytes // PAGE_BYTES) * PAGE_BYTES)))
    for offset in range(0, size_bytes, _COPY_BYTES):
        go_on()
        length = min(_COPY_BYTES, size_bytes - offset)
        read(buffer, offset, length)
        writer.write(buffer[:length], offset)
        yield buffer[:length]
        progress(offset + length)
