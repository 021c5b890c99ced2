"""``memory://`` (tests), ``gs://`` and ``az://``: what fsspec offers alike for all of them.

Exclusive creation is fsspec's ``mode="create"``, which is atomic in gcsfs (``ifGenerationMatch=0``) and adlfs
(``If-None-Match: *``) but only check-then-write elsewhere. ``gs`` and ``az`` have not been run against a real service:
:meth:`FsspecStore.probe` decides what to believe.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from cairn_api.errors import InternalError, UnavailableError, VersionError
from cairnd.tiers.errors import NotFoundError, UploadCancelledError, from_os_error
from cairnd.tiers.keys import check_key, check_prefix
from cairnd.tiers.object_store import BinarySource, Capabilities, ObjectInfo
from cairnd.tiers.stores.remote_errors import translate

_ATOMIC_CREATE = frozenset({"gs", "gcs", "az", "abfs"})
_READ_BYTES = 4 * 1024 * 1024
_TIME_FIELDS = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")

# memory:// lives in one process, so a lock of the process makes its exclusive creation atomic.
_memory_lock = threading.Lock()


class FsspecStore:
    """Objects below *root* (bucket and prefix) of the fsspec file system named *scheme*."""

    def __init__(self, scheme: str, root: str, options: Mapping[str, str]) -> None:
        self._where = f"{scheme}://{root}"
        self._root = root
        self._in_memory = scheme == "memory"
        self._capabilities = Capabilities(
            scheme, conditional_put=self._in_memory or scheme in _ATOMIC_CREATE, ranged_reads=True
        )
        with self._translated("open", ""):
            self._fs: Any = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def probe(self, key: str) -> Capabilities:
        try:
            created = self.put_if_absent(key, b"1")
            excluded = not self.put_if_absent(key, b"2") and self.get(key, 1) == b"1"
        finally:
            self.delete(key)
        self._capabilities = self._capabilities._replace(
            conditional_put=self._capabilities.conditional_put and created and excluded
        )
        return self._capabilities

    def put(self, key: str, data: bytes) -> None:
        with self._translated("put", key):
            self._fs.pipe_file(self._path(key), data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._translated("put", key), _memory_lock:
            try:
                self._fs.pipe_file(self._path(key), data, mode="create")
            except FileExistsError:
                return False
        return True

    def upload(
        self,
        key: str,
        source: BinarySource,
        *,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
        deadline_s: float,
    ) -> None:
        watch = _Watch(key, progress, cancelled, time.monotonic() + deadline_s)
        path = source.file if isinstance(source.file, Path) else Path(f"/proc/self/fd/{source.file}")
        try:
            size_bytes = path.stat().st_size
        except OSError as error:
            raise from_os_error(error, "read", path) from error
        if size_bytes != source.size_bytes:
            raise VersionError(f"a file to upload has {size_bytes} bytes instead of {source.size_bytes}")
        watch.check()
        with self._translated("upload", key):
            if self._in_memory:
                self._fs.pipe_file(self._path(key), _read_watched(path, watch))
            else:
                self._fs.put_file(os.fspath(path), self._path(key), callback=watch)
        found = self.info(key)
        if found is None or found.size_bytes != source.size_bytes:
            self.delete(key)
            raise VersionError(f"{key} arrived incomplete in {self._where}", hint="retry")
        progress(source.size_bytes)

    def get(self, key: str, max_bytes: int) -> bytes:
        found = self._require(key)
        if found.size_bytes > max_bytes:
            raise VersionError(f"{key} has {found.size_bytes} bytes where at most {max_bytes} are expected")
        with self._translated("get", key):
            return bytes(self._fs.cat_file(self._path(key)))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        buffer = buffer.cast("B")
        with self._translated("read", key):
            data = self._fs.cat_file(self._path(key), start=offset, end=offset + len(buffer))
        if len(data) != len(buffer):
            raise VersionError(
                f"{key} in {self._where} has {len(data)} bytes from {offset} instead of {len(buffer)}",
                hint="run `cairn verify` on the version",
            )
        buffer[:] = data

    def info(self, key: str) -> ObjectInfo | None:
        with self._translated("look at", key):
            try:
                found = self._fs.info(self._path(key))
            except FileNotFoundError:
                return None
        return ObjectInfo(key, int(found["size"]), _modified_s(found)) if found["type"] == "file" else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        base = f"{self._root}/"
        with self._translated("list", prefix):
            found = self._fs.find(base + check_prefix(prefix), detail=True)
        for name, entry in sorted(found.items()):
            if entry["type"] == "file":
                yield ObjectInfo(name.lstrip("/").removeprefix(base), int(entry["size"]), _modified_s(entry))

    def list_folders(self, prefix: str) -> Sequence[str]:
        below = (entry.key[len(prefix) :] for entry in self.list(prefix))
        return sorted({key.partition("/")[0] for key in below if "/" in key})

    def delete(self, key: str) -> None:
        with self._translated("delete", key):
            try:
                self._fs.rm_file(self._path(key))
            except FileNotFoundError:
                return

    def abort_stale_uploads(self, prefix: str, older_than_s: float) -> int:  # noqa: ARG002
        """Always 0: these services drop unfinished uploads by themselves, and offer no list of them."""
        check_prefix(prefix)
        return 0

    def _require(self, key: str) -> ObjectInfo:
        found = self.info(key)
        if found is None:
            raise NotFoundError(f"there is no {key} in {self._where}")
        return found

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    @contextmanager
    def _translated(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise translate(error, action, key, self._where) from error


class _Watch(Callback):  # type: ignore[misc]  # fsspec has no annotations
    """Progress, cancellation and deadline of one upload, called by fsspec from time to time."""

    def __init__(
        self, key: str, progress: Callable[[int], None], cancelled: Callable[[], bool], until_s: float
    ) -> None:
        super().__init__()
        self._key = key
        self._progress = progress
        self._cancelled = cancelled
        self._until_s = until_s

    def check(self) -> None:
        if self._cancelled():
            raise UploadCancelledError(f"the upload of {self._key} was cancelled")
        if time.monotonic() > self._until_s:
            raise UnavailableError(
                f"the upload of {self._key} was not done in time", hint="check the bandwidth to the store"
            )

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:  # noqa: ARG002  (fsspec's signature)
        self.check()
        self._progress(int(self.value))


def _read_watched(path: Path, watch: _Watch) -> bytes:
    data = bytearray()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            data += chunk
            watch.absolute_update(len(data))
    return bytes(data)


def _modified_s(entry: Mapping[str, Any]) -> float:
    """When an entry was written; services differ in the field's name and form."""
    for field in _TIME_FIELDS:
        value = entry.get(field)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
    raise InternalError(f"the store names no time for {entry.get('name')}", hint="report this with the daemon's log")
