"""A store that counts: operations, bytes, seconds and failures of the one it wraps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from cairn_api.errors import CairnError
from cairnd.tiers.object_store import BinarySource, Capabilities, ObjectInfo, ObjectStore


class StoreRecorder(Protocol):
    """Takes the counts; called once per operation, from any thread."""

    def record(self, operation: str, *, size_bytes: int, duration_s: float, failure: str) -> None:
        """*operation* is the method's name; *failure* the error class's name, empty when it succeeded.

        *size_bytes* is what was moved: for a failed upload what was sent before, for calls without data 0.
        """


class MeteredStore:
    """The wrapped *store*, with every call told to *recorder*."""

    def __init__(
        self, store: ObjectStore, recorder: StoreRecorder, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._recorder = recorder
        self._monotonic_s = monotonic_s

    @property
    def capabilities(self) -> Capabilities:
        return self._store.capabilities

    def probe(self, key: str) -> Capabilities:
        with self._measured("probe"):
            return self._store.probe(key)

    def put(self, key: str, data: bytes) -> None:
        with self._measured("put") as moved:
            self._store.put(key, data)
            moved.size_bytes = len(data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._measured("put_if_absent") as moved:
            created = self._store.put_if_absent(key, data)
            moved.size_bytes = len(data) if created else 0
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
        with self._measured("upload") as moved:

            def note(sent_bytes: int) -> None:
                moved.size_bytes = sent_bytes
                progress(sent_bytes)

            self._store.upload(key, source, progress=note, cancelled=cancelled, deadline_s=deadline_s)

    def get(self, key: str, max_bytes: int) -> bytes:
        with self._measured("get") as moved:
            data = self._store.get(key, max_bytes)
            moved.size_bytes = len(data)
        return data

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        with self._measured("read_into") as moved:
            self._store.read_into(key, offset, buffer)
            moved.size_bytes = buffer.nbytes

    def info(self, key: str) -> ObjectInfo | None:
        with self._measured("info"):
            return self._store.info(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        # Includes what the consumer does between entries, which is why nobody should do much there.
        with self._measured("list"):
            yield from self._store.list(prefix)

    def list_folders(self, prefix: str) -> Sequence[str]:
        with self._measured("list_folders"):
            return self._store.list_folders(prefix)

    def delete(self, key: str) -> None:
        with self._measured("delete"):
            self._store.delete(key)

    def abort_stale_uploads(self, prefix: str, older_than_s: float) -> int:
        with self._measured("abort_stale_uploads"):
            return self._store.abort_stale_uploads(prefix, older_than_s)

    @contextmanager
    def _measured(self, operation: str) -> Iterator[_Moved]:
        moved = _Moved()
        started_s = self._monotonic_s()
        failure = ""
        try:
            yield moved
        except CairnError as error:
            failure = type(error).__name__
            raise
        finally:
            duration_s = self._monotonic_s() - started_s
            self._recorder.record(operation, size_bytes=moved.size_bytes, duration_s=duration_s, failure=failure)


class _Moved:
    """The bytes that one operation moved so far."""

    size_bytes = 0
