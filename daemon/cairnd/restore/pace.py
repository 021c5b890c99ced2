"""What a fetch tells while it is under way: how many bytes were read, and that it is still alive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from cairnd.model import Partition
from cairnd.workers import to_the_end

HEARTBEAT_S = 5.0
"""The longest silence of a fetch. Clients give up one that says nothing for two minutes."""

T = TypeVar("T")


class GivenUpError(Exception):
    """Ends the reading of a partition that nobody waits for any more."""


class Meter:
    """Bytes of each partition that were read so far, as worker threads tell."""

    def __init__(self, partitions: Sequence[Partition]) -> None:
        self.total_bytes = sum(partition.size_bytes for partition in partitions)
        self._bytes = {partition.path: 0 for partition in partitions}
        self._highest_bytes = 0
        self._given_up = False
        self._digest_passes: list[tuple[int, float]] = []

    def reader(self, partition: Partition) -> Callable[[int], None]:
        """What a thread that reads *partition* calls with its position in bytes."""

        def at(position_bytes: int) -> None:
            self._bytes[partition.path] = position_bytes  # one thread at a time, and no key is ever added

        return at

    @property
    def done_bytes(self) -> int:
        """Never falls, though a partition may be read anew from another tier."""
        self._highest_bytes = max(self._highest_bytes, sum(self._bytes.values()))
        return self._highest_bytes

    def digested(self, size_bytes: int, duration_s: float) -> None:
        """A copy of *size_bytes* had to be hashed; threads call this."""
        self._digest_passes.append((size_bytes, duration_s))

    @property
    def digested_bytes(self) -> int:
        """What was hashed."""
        return sum(size_bytes for size_bytes, _ in self._digest_passes)

    @property
    def digest_s(self) -> float:
        """Seconds that took; with partitions side by side the sum of all."""
        return sum(duration_s for _, duration_s in self._digest_passes)

    def give_up(self) -> None:
        """Nobody waits any more: :meth:`check` raises from now on."""
        self._given_up = True

    def check(self) -> None:
        """Raise :class:`GivenUpError` once the fetch was given up; for threads to call between blocks."""
        if self._given_up:
            raise GivenUpError


async def as_they_end(
    works: Iterable[Coroutine[Any, Any, T]], give_up: Callable[[], None]
) -> AsyncGenerator[T | None, None]:
    """Run *works* side by side: yields each result, and None whenever there was none for :data:`HEARTBEAT_S`.

    The first error ends it. However it ends, *give_up* is called and all works are over then.
    """
    tasks = {asyncio.ensure_future(work) for work in works}
    pending = set(tasks)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
            if not done:
                yield None
    finally:
        give_up()
        for task in tasks:
            task.cancel()
        await to_the_end(_over(tasks))


async def _over(tasks: set[asyncio.Task[T]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
