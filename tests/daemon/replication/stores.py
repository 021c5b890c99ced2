"""A store that answers badly: loses replies, or is away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from cairn_api.errors import UnavailableError
from cairnd.tiers.object_store import BinarySource, Capabilities, ObjectInfo, ObjectStore


class LosesReplies:
    """Passes calls on. The next call named by :meth:`lose` is carried out and then reported as failed."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._lost: list[str] = []
        self.calls: list[str] = []
        self.away = False

    def lose(self, call: str) -> None:
        """Lose the reply to the next *call*."""
        self._lost.append(call)

    def _begin(self, call: str) -> None:
        self.calls.append(call)
        if self.away:
            raise UnavailableError("the bucket is away", hint="wait")

    def _end(self, call: str) -> None:
        if call in self._lost:
            self._lost.remove(call)
            raise UnavailableError("the reply got lost", hint="wait")

    @property
    def capabilities(self) -> Capabilities:
        return self._store.capabilities

    def probe(self, key: str) -> Capabilities:
        self._begin("probe")
        return self._store.probe(key)

    def put(self, key: str, data: bytes) -> None:
        self._begin("put")
        self._store.put(key, data)
        self._end("put")

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._begin("put_if_absent")
        created = self._store.put_if_absent(key, data)
        self._end("put_if_absent")
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
        self._begin(f"upload {key}")
        self._store.upload(key, source, progress=progress, cancelled=cancelled, deadline_s=deadline_s)
        self._end("upload")

    def get(self, key: str, max_bytes: int) -> bytes:
        self._begin("get")
        return self._store.get(key, max_bytes)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._begin("read_into")
        self._store.read_into(key, offset, buffer)

    def info(self, key: str) -> ObjectInfo | None:
        self._begin("info")
        return self._store.info(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._begin("list")
        return self._store.list(prefix)

    def list_folders(self, prefix: str) -> Sequence[str]:
        self._begin("list_folders")
        return self._store.list_folders(prefix)

    def delete(self, key: str) -> None:
        self._begin("delete")
        self._store.delete(key)
        self._end("delete")

    def abort_stale_uploads(self, prefix: str, older_than_s: float) -> int:
        return self._store.abort_stale_uploads(prefix, older_than_s)

    @property
    def uploads(self) -> tuple[str, ...]:
        """Keys of uploads that were begun."""
        return tuple(call.removeprefix("upload ") for call in self.calls if call.startswith("upload "))
