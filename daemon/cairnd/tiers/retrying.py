"""A store that tries again: every call of the contract may be repeated, so every one is, a bounded number of times."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from cairn_api.errors import UnavailableError
from cairnd.tiers.errors import UploadCancelledError
from cairnd.tiers.object_store import BinarySource, Capabilities, ObjectInfo, ObjectStore

_Answer = TypeVar("_Answer")


class RetryPolicy(NamedTuple):
    """How often, and how long to pause in between: a random part of a doubling limit, so that nodes spread out."""

    attempts: int = 4
    first_pause_s: float = 0.5
    longest_pause_s: float = 15.0


class RetryingStore:
    """The wrapped *store*; a call that raises ``UnavailableError`` is repeated as *policy* says.

    Cancelled uploads are not. An upload's deadline covers all its attempts. ``put_if_absent`` is repeated too: its
    contract has the caller compare when it returns False, and that also covers an earlier attempt whose reply got lost.
    """

    def __init__(
        self,
        store: ObjectStore,
        policy: RetryPolicy = RetryPolicy(),  # noqa: B008  (immutable)
        *,
        sleep: Callable[[float], None] = time.sleep,
        monotonic_s: Callable[[], float] = time.monotonic,
        fraction: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._policy = policy
        self._sleep = sleep
        self._monotonic_s = monotonic_s
        self._fraction = fraction

    @property
    def capabilities(self) -> Capabilities:
        return self._store.capabilities

    def probe(self, key: str) -> Capabilities:
        return self._retried(lambda: self._store.probe(key))

    def put(self, key: str, data: bytes) -> None:
        self._retried(lambda: self._store.put(key, data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._retried(lambda: self._store.put_if_absent(key, data))

    def upload(
        self,
        key: str,
        source: BinarySource,
        *,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
        deadline_s: float,
    ) -> None:
        until_s = self._monotonic_s() + deadline_s

        def attempt() -> None:
            left_s = until_s - self._monotonic_s()
            self._store.upload(key, source, progress=progress, cancelled=cancelled, deadline_s=left_s)

        self._retried(attempt, until_s)

    def get(self, key: str, max_bytes: int) -> bytes:
        return self._retried(lambda: self._store.get(key, max_bytes))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._retried(lambda: self._store.read_into(key, offset, buffer))

    def info(self, key: str) -> ObjectInfo | None:
        return self._retried(lambda: self._store.info(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        # As a whole: a listing that went on after a failure could show an object twice or not at all.
        yield from self._retried(lambda: tuple(self._store.list(prefix)))

    def list_folders(self, prefix: str) -> Sequence[str]:
        return self._retried(lambda: self._store.list_folders(prefix))

    def delete(self, key: str) -> None:
        self._retried(lambda: self._store.delete(key))

    def abort_stale_uploads(self, prefix: str, older_than_s: float) -> int:
        return self._retried(lambda: self._store.abort_stale_uploads(prefix, older_than_s))

    def _retried(self, call: Callable[[], _Answer], until_s: float = float("inf")) -> _Answer:
        limit_s = self._policy.first_pause_s
        for _ in range(self._policy.attempts - 1):
            try:
                return call()
            except UploadCancelledError:
                raise
            except UnavailableError:
                pause_s = limit_s * self._fraction()
                if self._monotonic_s() + pause_s >= until_s:
                    raise
            self._sleep(pause_s)
            limit_s = min(2 * limit_s, self._policy.longest_pause_s)
        return call()
