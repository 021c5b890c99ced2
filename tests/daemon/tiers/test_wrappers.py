"""The wrappers of a store: counting and trying again, without changing what the store means."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cairn_api.errors import CairnError, ConfigurationError, UnavailableError
from cairnd.tiers.errors import UploadCancelledError
from cairnd.tiers.metered import MeteredStore
from cairnd.tiers.object_store import BinarySource, Capabilities, ObjectInfo, ObjectStore
from cairnd.tiers.retrying import RetryingStore, RetryPolicy
from cairnd.tiers.stores import open_store


class FlakyStore:
    """A real store in memory whose next calls raise what *failures* holds, before or after having done the work."""

    def __init__(self) -> None:
        self.inner = open_store(f"memory://flaky-{uuid.uuid4().hex}", {})
        self.failures: list[CairnError] = []
        self.lose_replies = False
        self.deadlines_s: list[float] = []

    def _do(self, call: Callable[[], Any]) -> Any:
        if self.failures and not self.lose_replies:
            raise self.failures.pop(0)
        answer = call()
        if self.failures:
            raise self.failures.pop(0)
        return answer

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    def probe(self, key: str) -> Capabilities:
        found: Capabilities = self._do(lambda: self.inner.probe(key))
        return found

    def put(self, key: str, data: bytes) -> None:
        self._do(lambda: self.inner.put(key, data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return bool(self._do(lambda: self.inner.put_if_absent(key, data)))

    def upload(
        self,
        key: str,
        source: BinarySource,
        *,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
        deadline_s: float,
    ) -> None:
        self.deadlines_s.append(deadline_s)
        self._do(lambda: self.inner.upload(key, source, progress=progress, cancelled=cancelled, deadline_s=deadline_s))

    def get(self, key: str, max_bytes: int) -> bytes:
        return bytes(self._do(lambda: self.inner.get(key, max_bytes)))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._do(lambda: self.inner.read_into(key, offset, buffer))

    def info(self, key: str) -> ObjectInfo | None:
        found: ObjectInfo | None = self._do(lambda: self.inner.info(key))
        return found

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        first = True
        for entry in self.inner.list(prefix):
            if not first:
                self._do(lambda: None)  # a listing fails between two pages
            first = False
            yield entry

    def list_folders(self, prefix: str) -> Sequence[str]:
        found: Sequence[str] = self._do(lambda: self.inner.list_folders(prefix))
        return found

    def delete(self, key: str) -> None:
        self._do(lambda: self.inner.delete(key))

    def abort_stale_uploads(self, prefix: str, older_than_s: float) -> int:
        return int(self._do(lambda: self.inner.abort_stale_uploads(prefix, older_than_s)))


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept_s: list[float] = []

    def monotonic_s(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.slept_s.append(duration_s)
        self.now_s += duration_s


@pytest.fixture
def flaky() -> FlakyStore:
    return FlakyStore()


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
def store(flaky: FlakyStore, clock: Time) -> RetryingStore:
    policy = RetryPolicy(attempts=4, first_pause_s=1.0, longest_pause_s=3.0)
    return RetryingStore(flaky, policy, sleep=clock.sleep, monotonic_s=clock.monotonic_s, fraction=lambda: 0.5)


@pytest.fixture
def source(tmp_path: Path) -> BinarySource:
    (tmp_path / "source").write_bytes(bytes(1000))
    return BinarySource(tmp_path / "source", 1000)


def unavailable(count: int) -> list[CairnError]:
    return [UnavailableError(f"down {number}") for number in range(count)]


def test_unavailable_stores_are_asked_again_after_growing_pauses(
    store: RetryingStore, flaky: FlakyStore, clock: Time
) -> None:
    flaky.failures = unavailable(3)
    store.put("a", b"x")
    assert clock.slept_s == [0.5, 1.0, 1.5]
    assert flaky.inner.get("a", 1) == b"x"


def test_the_number_of_attempts_is_bounded(store: RetryingStore, flaky: FlakyStore) -> None:
    flaky.failures = unavailable(9)
    with pytest.raises(UnavailableError, match="down 3"):
        store.get("a", 1)
    assert len(flaky.failures) == 5


@pytest.mark.parametrize("error", [ConfigurationError("wrong"), UploadCancelledError("cancelled")])
def test_what_retrying_cannot_help_is_raised_at_once(
    store: RetryingStore, flaky: FlakyStore, clock: Time, source: BinarySource, error: CairnError
) -> None:
    flaky.failures = [error]
    with pytest.raises(type(error)):
        store.upload("a", source, progress=lambda _: None, cancelled=lambda: False, deadline_s=10)
    assert clock.slept_s == []


def test_a_lost_reply_to_ones_own_creation_shows_as_false_for_the_caller_to_compare(
    store: RetryingStore, flaky: FlakyStore
) -> None:
    flaky.lose_replies = True
    flaky.failures = unavailable(1)
    assert not store.put_if_absent("decision", b"ours")
    assert store.get("decision", 10) == b"ours"


def test_all_attempts_of_an_upload_share_its_deadline(
    store: RetryingStore, flaky: FlakyStore, source: BinarySource
) -> None:
    flaky.failures = unavailable(3)
    with pytest.raises(UnavailableError, match="down 2"):
        store.upload("a", source, progress=lambda _: None, cancelled=lambda: False, deadline_s=2.0)
    assert flaky.deadlines_s == [2.0, 1.5, 0.5]


def test_a_listing_that_broke_off_is_made_again_from_the_start(store: RetryingStore, flaky: FlakyStore) -> None:
    for key in ("a/1", "a/2", "a/3"):
        flaky.inner.put(key, b"")
    flaky.failures = unavailable(1)
    assert [entry.key for entry in store.list("a/")] == ["a/1", "a/2", "a/3"]


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, int, str]] = []
        self.durations_s: list[float] = []

    def record(self, operation: str, *, size_bytes: int, duration_s: float, failure: str) -> None:
        self.calls.append((operation, size_bytes, failure))
        self.durations_s.append(duration_s)


def test_every_operation_is_counted_with_bytes_seconds_and_failures(
    flaky: FlakyStore, clock: Time, source: BinarySource
) -> None:
    recorder = Recorder()
    store: ObjectStore = MeteredStore(flaky, recorder, clock.monotonic_s)
    store.put("a", b"12345")
    store.put_if_absent("b", b"123")
    store.put_if_absent("b", b"123")
    store.upload("c", source, progress=lambda _: clock.sleep(1.0), cancelled=lambda: False, deadline_s=60)
    store.get("a", 10)
    store.read_into("a", 1, memoryview(bytearray(2)))
    store.info("a")
    list(store.list(""))
    store.list_folders("")
    flaky.failures = unavailable(1)
    with pytest.raises(UnavailableError):
        store.delete("a")
    store.abort_stale_uploads("", 0)
    store.probe("p")
    assert recorder.calls == [
        ("put", 5, ""),
        ("put_if_absent", 3, ""),
        ("put_if_absent", 0, ""),
        ("upload", 1000, ""),
        ("get", 5, ""),
        ("read_into", 2, ""),
        ("info", 0, ""),
        ("list", 0, ""),
        ("list_folders", 0, ""),
        ("delete", 0, "UnavailableError"),
        ("abort_stale_uploads", 0, ""),
        ("probe", 0, ""),
    ]
    assert recorder.durations_s[3] >= 1.0
    assert store.capabilities == flaky.capabilities
