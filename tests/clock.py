"""Time that a test owns: it stands still until :meth:`ManualClock.advance` is called."""

from __future__ import annotations

import asyncio
import heapq
from itertools import count


class ManualClock:
    """A :class:`cairnd.clock.Clock` for one event loop. Sleepers wake when time has been advanced past them."""

    def __init__(self, now_s: float = 1_700_000_000.0) -> None:
        self._wall_s = now_s
        self._monotonic_s = 1000.0
        self._order = count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now_s(self) -> float:
        return self._wall_s

    def monotonic_s(self) -> float:
        return self._monotonic_s

    async def sleep(self, duration_s: float) -> None:
        if duration_s <= 0:
            await asyncio.sleep(0)
            return
        awake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._monotonic_s + duration_s, next(self._order), awake))
        await awake

    def advance(self, duration_s: float) -> None:
        """Let *duration_s* pass. Whoever is due runs when the test next awaits something."""
        self._wall_s += duration_s
        self._monotonic_s += duration_s
        while self._sleepers and self._sleepers[0][0] <= self._monotonic_s:
            _, _, awake = heapq.heappop(self._sleepers)
            if not awake.done():
                awake.set_result(None)

    @property
    def sleepers(self) -> int:
        """How many wait for time to pass."""
        return sum(1 for _, _, awake in self._sleepers if not awake.done())

    def jump(self, duration_s: float) -> None:
        """Set the wall clock, and it alone, forward or (negative) back: somebody corrected the machine's time."""
        self._wall_s += duration_s
