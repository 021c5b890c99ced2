"""Makes damaged tier 1 copies again from tier 2, in the background, as soon as they are found.

The other way, from tier 1 to tier 2, is the replicator's: a version that wants tier 2 and has a damaged copy there is
uploaded anew. What is damaged in both tiers stays as it was found, for the operator.
"""

from __future__ import annotations

import asyncio

from cairn_api.errors import CairnError
from cairn_api.names import VersionId
from cairnd.catalog.catalog import Catalog
from cairnd.clock import Clock
from cairnd.events import EventLog
from cairnd.model import Tier, Version
from cairnd.restore.fetcher import Fetcher
from cairnd.upkeep.keeper import Keeper

_FIRST_RETRY_S = 30.0
_LAST_RETRY_S = 3600.0


class Repairer:
    """Runs as one task; one version at a time, newest first."""

    def __init__(self, catalog: Catalog, keeper: Keeper, fetcher: Fetcher, clock: Clock, events: EventLog) -> None:
        self._catalog = catalog
        self._keeper = keeper
        self._fetcher = fetcher
        self._clock = clock
        self._events = events
        self._awake = asyncio.Event()
        self._not_before_s: dict[tuple[str, VersionId], tuple[float, float]] = {}
        catalog.on_change(self._look)

    def _look(self, version: Version) -> None:
        if version.copy(Tier.TIER1).damaged:
            self._awake.set()

    def waiting(self) -> list[Version]:
        """Versions with a damaged tier 1 copy and an intact one in tier 2, but those that tier 1 no longer keeps."""
        found = [
            version
            for version in self._catalog.versions()
            if version.copy(Tier.TIER1).damaged and version.has(Tier.TIER2) and version.restorable
        ]
        leaving = {
            (deletion.version.job, deletion.version.id)
            for job in {version.job for version in found}
            for deletion in self._keeper.plan(job)
            if deletion.tier is Tier.TIER1
        }
        return [version for version in found if (version.job, version.id) not in leaving]

    async def run(self) -> None:
        """Repair, for ever. A version that cannot be repaired now is tried again later; the others go on."""
        while True:
            self._awake.clear()
            now_s = self._clock.monotonic_s()
            waiting = self.waiting()
            keys = {(version.job, version.id) for version in waiting}
            self._not_before_s = {key: paced for key, paced in self._not_before_s.items() if key in keys}
            due = [item for item in waiting if self._not_before_s.get((item.job, item.id), (0.0, 0.0))[0] <= now_s]
            if due:
                await self._repair(due[0])
                continue
            await self._catalog.wait_until(self._awake.is_set, _FIRST_RETRY_S if waiting else _LAST_RETRY_S)

    async def _repair(self, version: Version) -> None:
        key = (version.job, version.id)
        try:
            await self._fetcher.remake(version)
        except CairnError as error:
            _, delay_s = self._not_before_s.get(key, (0.0, _FIRST_RETRY_S))
            self._not_before_s[key] = (self._clock.monotonic_s() + delay_s, min(2 * delay_s, _LAST_RETRY_S))
            self._events.publish("repair_failed", version.job, version.id, tier=Tier.TIER1, error=error)
            return
        self._not_before_s.pop(key, None)
        if version.has(Tier.TIER1):
            self._events.publish("copy_repaired", version.job, version.id, tier=Tier.TIER1, source=Tier.TIER2)
        else:  # it was deleted, or damaged anew, meanwhile
            self._not_before_s[key] = (self._clock.monotonic_s() + _FIRST_RETRY_S, _FIRST_RETRY_S)
