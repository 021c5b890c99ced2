"""Reads copies again in the background, before somebody needs them: bits rot, and disks and buckets lose objects.

Each tier has a budget of bytes per second of its own. Copies are read in turn, the one that was read longest ago (or
never, since the daemon started) first, each once per interval. What is found damaged is recorded as by ``cairn verify
--deep``: retention no longer counts the copy, a restore passes it over, and it is made again from the other tier.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from cairn_api.errors import CairnError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.clock import Clock
from cairnd.digests import BLOCK_BYTES
from cairnd.events import EventLog
from cairnd.metrics import Metrics
from cairnd.model import Partition, Tier, Version
from cairnd.replication.bucket import BucketRepository
from cairnd.replication.storage import Storage
from cairnd.session.throttle import Throttle
from cairnd.settings import Settings
from cairnd.tiers.errors import is_damage
from cairnd.tiers.local import LocalTier
from cairnd.upkeep.looking import Judge
from cairnd.upkeep.verifier import (
    Finding,
    GoneError,
    ReadBlock,
    block_buffer,
    check_tier1,
    check_tier2,
    compare_block,
    is_deleted,
)
from cairnd.workers import Workers, to_the_end

_LOOK_S = 30.0
_LEAST_BYTES = 256 * 1024
"""What a small file costs of the budget: opening thousands takes the processor from training, not the disk."""

Key = tuple[str, VersionId, Tier]


class Scrubber:
    """One task per tier that has a budget."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        tier1: LocalTier,
        storage: Storage,
        workers: Workers,
        clock: Clock,
        events: EventLog,
        metrics: Metrics,
        judge: Judge,
        *,
        location: Callable[[str], str],
    ) -> None:
        self._interval_s = settings.scrub_interval_s
        self._budgets = {
            Tier.TIER1: settings.scrub_bytes_per_s,
            Tier.TIER2: settings.scrub_tier2_bytes_per_s,
        }
        self._catalog = catalog
        self._tier1 = tier1
        self._storage = storage
        self._workers = workers
        self._clock = clock
        self._events = events
        self._metrics = metrics
        self._judge = judge
        self._location = location
        self._read_s: dict[Key, float] = {}

    async def run(self) -> None:
        """Scrub each tier within its budget, for ever; returns at once if no tier has one."""
        async with asyncio.TaskGroup() as group:
            for tier, bytes_per_s in self._budgets.items():
                if bytes_per_s:
                    group.create_task(self._run(tier, Throttle(self._clock, bytes_per_s)))

    async def _run(self, tier: Tier, throttle: Throttle) -> None:
        while True:
            due = self._due(tier)
            if not due:
                await self._clock.sleep(min(_LOOK_S, self._interval_s))
            for version in due:
                if not (version.has(tier) and version.restorable):
                    continue  # deleted, or found damaged, since the look
                self._read_s[version.job, version.id, tier] = self._clock.monotonic_s()
                try:
                    await self._scrub(version, tier, throttle)
                except GoneError:
                    pass  # by another node
                except CairnError as error:  # a bucket that does not answer, no descriptors left: not the copy's fault
                    self._metrics.stage_failures.labels("scrub").inc()
                    self._events.publish("scrub_failed", version.job, version.id, tier=tier, error=error)
            if due:
                self._events.publish("scrubbed", tier=tier, copies=len(due))

    def _due(self, tier: Tier) -> list[Version]:
        """The copies in *tier* whose turn it is, those read longest ago first; forgets those that are gone.

        Looked for once in a round: with 10,000 versions a look takes as long as a hundred small copies do.
        """
        held = {(v.job, v.id, tier): v for v in self._catalog.versions() if v.has(tier) and v.restorable}
        self._read_s = {key: read_s for key, read_s in self._read_s.items() if key in held or key[2] is not tier}
        due_s = self._clock.monotonic_s() - self._interval_s
        due = [key for key in held if self._read_s.get(key, float("-inf")) <= due_s]
        return [held[key] for key in sorted(due, key=lambda key: self._read_s.get(key, float("-inf")))]

    async def _scrub(self, version: Version, tier: Tier, throttle: Throttle) -> None:
        before = version.copy(tier)
        bucket = await self._storage.bucket(self._location(version.job)) if tier is Tier.TIER2 else None
        if bucket is None:
            quick = check_tier1(self._tier1, version, deep=False, progress=lambda _: None)
        else:
            quick = check_tier2(bucket, version, deep=False, progress=lambda _: None)
        findings: list[Finding] = await self._workers.run(list, quick)
        problem = findings[0].text if findings else ""
        for item in version.partitions:
            if problem:
                break
            problem = await self._scrub_partition(version, item, bucket, throttle)
        if problem and bucket is not None and await self._workers.run(is_deleted, bucket, version):
            return
        if problem:
            self._judge.condemn(version, tier, before, problem)

    async def _scrub_partition(
        self, version: Version, item: Partition, bucket: BucketRepository | None, throttle: Throttle
    ) -> str:
        """What is wrong with one partition; empty if nothing, or if the copy is no longer there."""
        assert item.digest is not None, "what a tier holds is digested"
        tier, buffer = (Tier.TIER1 if bucket is None else Tier.TIER2), block_buffer()
        try:
            async with self._reading(version, item, bucket) as read:
                for number in range(len(item.digest.blocks)):
                    size_bytes = min(BLOCK_BYTES, item.size_bytes - number * BLOCK_BYTES)
                    await throttle.take(max(size_bytes, _LEAST_BYTES))
                    if not version.has(tier):
                        return ""
                    problem = await to_the_end(self._workers.run(compare_block, item, number, read, buffer))
                    if problem:
                        return Finding(version.job, version.id, tier, item.path, problem).text
                    self._metrics.stage_bytes.labels("scrub").inc(size_bytes)
        except CairnError as error:  # it cannot be opened
            if not is_damage(error):
                raise
            return Finding(version.job, version.id, tier, item.path, error.message).text
        return ""

    @asynccontextmanager
    async def _reading(
        self, version: Version, item: Partition, bucket: BucketRepository | None
    ) -> AsyncIterator[ReadBlock]:
        if bucket is not None:
            yield partial(bucket.store.read_into, layout.Bucket.partition(version.job, version.id, item.path))
            return
        key = layout.partition(version.job, version.id, item.path)
        file = await self._workers.run(self._tier1.open_uncached, key)
        try:
            yield file.read_into
        finally:
            file.close()
