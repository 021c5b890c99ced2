"""A limit on bytes per second, for work that must leave the disk to others."""

from __future__ import annotations

from cairnd.clock import Clock


class Throttle:
    """Spaces work out so that it stays at *bytes_per_s* (0: no limit). Used from the event loop's thread.

    What was not used while idle is not saved up: after a pause work goes on at the limit, not in a burst.
    """

    def __init__(self, clock: Clock, bytes_per_s: int) -> None:
        self.bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_s = 0.0

    async def take(self, size_bytes: int) -> None:
        """Wait until the next *size_bytes* may be moved. Whoever comes next waits as long as these take."""
        if not self.bytes_per_s:
            return
        now_s = self._clock.monotonic_s()
        begin_s = max(self._free_s, now_s)
        self._free_s = begin_s + size_bytes / self.bytes_per_s
        if begin_s > now_s:
            await self._clock.sleep(begin_s - now_s)
