"""The catalog: one entry per version, checked moves, one event per change, waiters that wake."""

from __future__ import annotations

import asyncio

import pytest

from cairn_api.errors import InternalError, VersionError
from cairn_api.names import VersionId
from cairnd.catalog.catalog import Catalog
from cairnd.events import REMEMBERED_EVENTS, EventLog
from cairnd.model import CopyState, Tier, Version, VersionState
from tests.clock import ManualClock
from tests.daemon.lab import eventually


class Books:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.events = EventLog(self.clock)
        self.catalog = Catalog(self.clock, self.events)

    def add(
        self, sequence: int, *, epoch: int = 1, job: str = "job", tag: str = "", state: VersionState = VersionState.OPEN
    ) -> Version:
        identity = VersionId(epoch, sequence, tag or f"step{sequence}")
        return self.catalog.add(Version(job, identity, state, world_size=1, nonce="n"))

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.events.remembered()]


@pytest.fixture
def books() -> Books:
    return Books()


def test_newest_first_by_commit_order_whatever_the_time(books: Books) -> None:
    for epoch, sequence in ((2, 1), (1, 9), (1, 10), (2, 3)):
        books.clock.jump(-1e6)
        books.add(sequence, epoch=epoch)
    assert [version.id[:2] for version in books.catalog.versions("job")] == [(2, 3), (2, 1), (1, 10), (1, 9)]
    assert books.catalog.max_epoch("job") == 2
    assert books.catalog.max_epoch("unknown") == 0
    books.add(1, job="a")
    assert books.catalog.jobs() == ["a", "job"]
    assert next(books.catalog.versions()).job == "a"


def test_a_name_or_a_tag_finds_and_a_miss_names_what_is_near(books: Books) -> None:
    old = books.add(1, tag="global_step100", state=VersionState.COMMITTED)
    new = books.add(2, tag="global_step100", state=VersionState.COMMITTED)
    books.add(3, tag="global_step100")  # open: a tag never means that one
    find = books.catalog.find
    assert find("job", "global_step100") is new
    assert find("job", str(old.id)) is old
    with pytest.raises(VersionError, match="global_step1000") as caught:
        find("job", "global_step1000")
    assert "did you mean global_step100?" in caught.value.hint
    assert "cairn list --job job" in caught.value.hint
    for text in ("../x", "", "e00009-s000009-none", "\0"):
        with pytest.raises(VersionError):
            find("job", text)
    with pytest.raises(VersionError, match="no version"):
        books.catalog.require("job", VersionId(9, 9, "t"))


def test_changes_are_published_once(books: Books) -> None:
    version = books.add(1)
    books.catalog.move(version, VersionState.SEALED, bytes=5)
    books.catalog.set_copy(version, Tier.TIER1, CopyState.COPYING)
    books.catalog.set_copy(version, Tier.TIER1, CopyState.COPYING)
    books.catalog.set_copy(version, Tier.TIER1, CopyState.FAILED, "disk")
    books.catalog.set_copy(version, Tier.TIER1, CopyState.FAILED, "disk")
    books.catalog.set_copy(version, Tier.TIER1, CopyState.FAILED, "another reason")
    assert books.names == ["version_sealed", "copy_copying", "copy_failed", "copy_failed"]
    with pytest.raises(InternalError):
        books.catalog.move(version, VersionState.OPEN)
    assert len(books.names) == 4


def test_the_age_of_the_last_persist_is_monotonic(books: Books) -> None:
    assert books.catalog.last_persist_age_s("job") is None
    books.catalog.set_copy(books.add(1), Tier.TIER2, CopyState.VERIFIED)
    books.clock.jump(-1e9)
    books.clock.advance(7)
    assert books.catalog.last_persist_age_s("job") == 7


async def test_waiters_wake_on_a_change_or_in_time(books: Books) -> None:
    version = books.add(1)

    def sealed() -> bool:
        return version.state is VersionState.SEALED

    waiting = [asyncio.ensure_future(books.catalog.wait_until(sealed, 10)) for _ in range(3)]
    await eventually(lambda: books.clock.sleepers == 3)
    books.catalog.set_copy(version, Tier.MEMORY, CopyState.VERIFIED)  # a change, but not that one
    waiting[2].cancel()
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting[:2])
    books.catalog.move(version, VersionState.SEALED)
    assert await asyncio.gather(*waiting[:2]) == [True, True]
    assert await books.catalog.wait_until(sealed, 0)
    late = asyncio.ensure_future(books.catalog.wait_until(lambda: False, 10))
    await eventually(lambda: books.clock.sleepers)
    books.clock.advance(10)
    assert not await late
    assert books.catalog._waiters == {}


def test_what_is_forgotten_is_gone(books: Books) -> None:
    version = books.add(1)
    seen: list[Version] = []
    books.catalog.on_change(seen.append)
    books.catalog.forget(version)
    books.catalog.forget(version)
    assert books.catalog.jobs() == []
    assert books.catalog.get("job", version.id) is None
    assert seen == [version, version]


async def test_events_are_numbered_without_gaps_and_the_slow_lose_the_oldest(books: Books) -> None:
    books.events.publish("first")
    watching = books.events.watch()
    assert (await anext(watching)).name == "first"
    slow = asyncio.ensure_future(anext(watching))
    await asyncio.sleep(0)
    for number in range(REMEMBERED_EVENTS + 50):
        books.events.publish("flood", "job", detail=number)
    seen = [await slow] + [await anext(watching) for _ in range(REMEMBERED_EVENTS - 2)]
    numbers = [event.number for event in seen]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] - numbers[0] >= REMEMBERED_EVENTS - 2
    assert len(list(books.events.remembered())) == REMEMBERED_EVENTS
    await watching.aclose()  # type: ignore[attr-defined]
    assert books.events._watchers == set()
