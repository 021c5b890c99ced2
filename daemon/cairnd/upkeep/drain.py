"""Leaving honestly: accept no more saves, bring what must outlive this node to tier 2, say what did not make it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from cairn_api.errors import CairnError
from cairnd.catalog.catalog import Catalog
from cairnd.clock import Clock
from cairnd.events import EventLog
from cairnd.model import Tier, Version, VersionState
from cairnd.replication.persist import Persistence
from cairnd.replication.replicator import Replicator
from cairnd.session.saves import Saves

_REPORT_S = 0.5


@dataclass(frozen=True, slots=True)
class Left:
    """Versions that are not in tier 2 yet, oldest promise last; ``done`` in the final report.

    ``without_tier2``: the newest version of each job that has no tier 2 to go to, in the final report.
    """

    versions: tuple[Version, ...]
    done: bool
    without_tier2: tuple[Version, ...] = ()


class Drainer:
    """Drains once or often; what it waits for is the same queue that the replicator works on."""

    def __init__(
        self,
        catalog: Catalog,
        saves: Saves,
        persistence: Persistence,
        replicator: Replicator,
        clock: Clock,
        events: EventLog,
    ) -> None:
        self._catalog = catalog
        self._saves = saves
        self._persistence = persistence
        self._replicator = replicator
        self._clock = clock
        self._events = events

    async def drain(self, timeout_s: float) -> AsyncIterator[Left]:
        """Refuse new saves and wait until all is in tier 2, or until *timeout_s* passed; reports on the way."""
        self._saves.draining = True
        deadline_s = self._clock.monotonic_s() + timeout_s
        self._events.publish("drain_started", timeout_s=timeout_s)
        requested: set[str] = set()
        while True:
            await self._request_newest(requested)
            left = self.left()
            remaining_s = deadline_s - self._clock.monotonic_s()
            if not left or remaining_s <= 0:
                break
            yield Left(tuple(left), done=False)
            await self._catalog.wait_until(lambda: not self.left(), min(_REPORT_S, remaining_s))
        self._events.publish(
            "drain_incomplete" if left else "drain_done", versions=", ".join(str(version) for version in left) or "none"
        )
        yield Left(tuple(left), done=True, without_tier2=tuple(self._without_tier2()))

    def left(self) -> list[Version]:
        """What would be lost with this node now: unfinished promises first, then the backlog."""
        sealed = [version for version in self._catalog.versions() if version.state is VersionState.SEALED]
        return sealed + self._replicator.backlog()

    def _without_tier2(self) -> list[Version]:
        newest = [self._persistence.newest(job) for job in self._catalog.jobs()]
        return [version for version in newest if version is not None and not self._replicator.location(version.job)]

    async def _request_newest(self, requested: set[str]) -> None:
        for job in self._catalog.jobs():
            newest = self._persistence.newest(job)
            if newest is None or newest.state is VersionState.SEALED or job in requested:
                continue
            if newest.has(Tier.TIER2) and not newest.passed_over:
                continue
            requested.add(job)
            try:
                await self._persistence.request_newest(job)
            except CairnError as error:
                self._events.publish("persist_failed", job, newest.id, error=error)
