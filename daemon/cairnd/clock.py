"""Time comes in through the constructor, so that a test can own it.

Nothing in the daemon reads the wall clock to decide an order: versions are ordered by ``(epoch, sequence)``. Wall time
is only shown to people and compared with ages that people configured.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Wall time, monotonic time and waiting, all in seconds."""

    def now_s(self) -> float:
        """Seconds since the Unix epoch; may jump."""

    def monotonic_s(self) -> float:
        """Seconds since some fixed moment; never goes back."""

    async def sleep(self, duration_s: float) -> None:
        """Wait for *duration_s* of monotonic time."""


class SystemClock:
    """The machine's own clock."""

    def now_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)
