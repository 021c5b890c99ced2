"""Brings partitions of a version near: memory, then tier 1, then tier 2; verified, protected by a lease.

What is damaged is set aside and counted, and the next copy is tried; what comes from tier 2 is published into tier 1 as
a proper copy. Only when no copy of a partition can be believed does a fetch fail, and then it says what it tried.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from cairn_api.errors import CairnError, VersionError
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.leases import Lease, Leases
from cairnd.catalog.verified import VerifiedFiles
from cairnd.events import EventLog
from cairnd.model import Partition, Tier, Version, VersionState
from cairnd.replication.storage import Storage
from cairnd.restore import pace
from cairnd.restore.downloads import Downloads
from cairnd.restore.memory_copies import MemoryCopies
from cairnd.restore.pace import Meter, as_they_end
from cairnd.restore.partials import KeyLocks, Partials
from cairnd.restore.tier1_copies import Fetched, Tier1Copies, folder_of
from cairnd.session.memory import CaptureMemory
from cairnd.tiers.local import LocalTier
from cairnd.workers import Workers, to_the_end

_SETTLE_S = 600.0

NO_CLIENT = 0
"""Holds the leases of the daemon's own work; clients are numbered from 1."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a fetch is; ``ready`` is complete in the last one."""

    done_bytes: int
    total_bytes: int
    lease: str
    ready: tuple[Fetched, ...] = ()
    tier: Tier | None = None
    digested_bytes: int = 0
    digest_s: float = 0.0


class Fetcher:
    """Serves all fetches of this daemon, and its repairs; two that want one partition share one download."""

    def __init__(
        self,
        node: str,
        catalog: Catalog,
        leases: Leases,
        memory: CaptureMemory,
        memory_copies: MemoryCopies,
        tier1: LocalTier,
        verified: VerifiedFiles,
        storage: Storage,
        workers: Workers,
        events: EventLog,
        *,
        location: Callable[[str], str],
        make_room: Callable[..., Awaitable[None]],
        concurrency: int,
        locks: KeyLocks,
        protect: bool,
    ) -> None:
        self._catalog = catalog
        self._leases = leases
        self._memory = memory
        self._memory_copies = memory_copies
        self._tier1 = tier1
        self._verified = verified
        self._events = events
        self._locks = locks
        self._partials = Partials(catalog, leases, tier1, verified, locks, workers, events)
        downloads = Downloads(tier1, verified, storage, workers, make_room=make_room, concurrency=concurrency)
        self._tier1_copies = Tier1Copies(
            node, catalog, tier1, verified, downloads, self._partials, locks, workers, events,
            location=location, protect=protect,
        )  # fmt: skip

    async def fetch(
        self, client: int, version: Version, paths: Sequence[str], *, source: str = ""
    ) -> AsyncGenerator[Progress, None]:
        """Make *paths* (all partitions if empty) of *version* readable here; yields progress, the last one with all.

        Raises :class:`VersionError` when a partition has no intact copy, :class:`UnavailableError` when the tier that
        has it does not answer or tier 1 takes no file, :class:`OverloadedError` when it has no room. The lease is given
        up on failure.
        """
        meter = Meter(self._select(version, paths))
        with self._partials.fetching(version):
            lease = self._leases.take(client, version.job, version.id)
            try:
                async for _ in self._settling(version):
                    yield Progress(0, meter.total_bytes, lease.name)
                partitions = self._select(version, paths)
                meter = Meter(partitions)
                yield Progress(0, meter.total_bytes, lease.name)
                await self._partials.wait(folder_of(version, source))
                bring = [self._bring(lease, version, item, source, meter) for item in partitions]
                async with aclosing(as_they_end(bring, meter.give_up)) as steps:
                    async for fetched in steps:
                        tier = fetched.origin if fetched is not None else None
                        yield Progress(meter.done_bytes, meter.total_bytes, lease.name, tier=tier)
                ready = tuple(item for item in lease.partitions.values() if isinstance(item, Fetched))
                async with aclosing(as_they_end([self._adopt(version, source, ready)], meter.give_up)) as beats:
                    async for _ in beats:
                        yield Progress(meter.done_bytes, meter.total_bytes, lease.name)
                yield Progress(
                    meter.total_bytes, meter.total_bytes, lease.name, ready,
                    digested_bytes=meter.digested_bytes, digest_s=meter.digest_s,
                )  # fmt: skip
            except BaseException:
                self.end(lease)
                raise

    async def remake(self, version: Version) -> None:
        """Make a damaged tier 1 copy whole again from tier 2; what is damaged is moved to the quarantine folder.

        Does nothing when the copy is no longer damaged, or wanted. Raises as :meth:`fetch` does.
        """
        with self._partials.fetching(version):
            # Before the lease: whoever deletes the copy already must not find the other tier's protected by it.
            await self._partials.wait(folder_of(version, ""))
            damaged = version.copy(Tier.TIER1).damaged and version.has(Tier.TIER2) and version.restorable
            if not damaged or self._catalog.get(version.job, version.id) is not version:
                return
            lease, meter = self._leases.take(NO_CLIENT, version.job, version.id), Meter(version.partitions)
            try:
                made = [
                    await self._tier1_copies.bring(version, partition, meter, repairing=True)
                    for partition in version.partitions
                ]
                await self._tier1_copies.adopt(version, [item.key for item in made])
            finally:
                self.end(lease)

    def is_near(self, version: Version, paths: Sequence[str]) -> bool:
        """Whether all of *paths* is here and was verified, so that a fetch of it neither waits nor reads.

        Raises :class:`VersionError` as :meth:`fetch` does.
        """
        partitions = self._select(version, paths)
        if not version.restorable or version.state is VersionState.SEALED:
            return False
        if version.has(Tier.TIER2) and not version.has(Tier.TIER1):
            return False  # a fetch may have to make the copy in tier 1 complete
        return all(self._is_verified(version, partition) for partition in partitions)

    def _is_verified(self, version: Version, partition: Partition) -> bool:
        if version.has(Tier.MEMORY):
            for segment in self._memory.of_version(version.job, version.id):
                if segment.partition == (partition.rank, partition.name):
                    return self._memory_copies.knows(segment, partition)
        key = layout.partition(version.job, version.id, partition.path)
        return version.has(Tier.TIER1) and self._verified.knows(key, partition)

    def open(self, lease: Lease, path: str) -> tuple[int, Fetched]:
        """A read-only descriptor of a fetched partition, owned by the caller. Blocks briefly."""
        fetched = lease.partitions.get(path)
        if not isinstance(fetched, Fetched):
            raise VersionError(f"partition {path!r} was not fetched under this lease", hint="name it in the fetch")
        if fetched.segment is not None:
            return os.open(f"/proc/self/fd/{fetched.segment.fd}", os.O_RDONLY | os.O_CLOEXEC), fetched
        return self._tier1.open_read(fetched.key), fetched

    def hold(self, lease: Lease, path: str) -> str | None:
        """Let the lease's client map a fetched partition of the memory tier for as long as it likes.

        The name of the hold, or None when there is nothing to hold or the client has to copy the bytes.
        """
        fetched = lease.partitions.get(path)
        if not isinstance(fetched, Fetched) or fetched.segment is None:
            return None
        return self._memory_copies.hold(lease.client, fetched.segment)

    def end(self, lease: Lease) -> None:
        """Give up a lease and what it keeps from being reused."""
        for item in lease.partitions.values():
            if isinstance(item, Fetched) and item.segment is not None:
                item.segment.readers -= 1
        lease.partitions.clear()
        self._leases.end(lease)
        self._partials.tidy(lease.job, lease.version)

    async def _bring(self, lease: Lease, version: Version, partition: Partition, source: str, meter: Meter) -> Fetched:
        fetched = await self._near(version, partition, source, meter)
        # Nothing else runs between the check of the bytes and this, else the buffer could be filled anew meanwhile.
        if not self._leases.holds(lease):
            raise VersionError(f"the restore of {version} was given up", hint="fetch the version again")
        if fetched.segment is not None:
            fetched.segment.readers += 1
        lease.partitions[fetched.path] = fetched
        meter.reader(partition)(partition.size_bytes)  # also when nothing had to be read
        return fetched

    @staticmethod
    def _select(version: Version, paths: Sequence[str]) -> list[Partition]:
        if not paths:
            return list(version.partitions)
        found = {path: version.partition(path) for path in paths}
        missing = sorted(path for path, partition in found.items() if partition is None)
        if missing:
            raise VersionError(
                f"{version} has no partition {missing[0]!r}", hint=f"run `cairn show {version.id} --job {version.job}`"
            )
        return [partition for partition in found.values() if partition is not None]

    async def _settling(self, version: Version) -> AsyncGenerator[None, None]:
        """Wait until *version* is safe in a tier; yields now and then meanwhile."""
        for _ in range(int(_SETTLE_S / pace.HEARTBEAT_S)):
            if await self._catalog.wait_until(lambda: version.state is not VersionState.SEALED, pace.HEARTBEAT_S):
                break
            yield
        if not version.restorable or version.state is VersionState.SEALED:
            raise VersionError(f"{version} is {version.state}: {version.reason}", hint="choose another version")

    async def _near(self, version: Version, partition: Partition, source: str, meter: Meter) -> Fetched:
        if source:
            return await self._tier1_copies.bring_from(source, version, partition, meter)
        fetched = await self._from_memory(version, partition, meter)
        return fetched or await self._tier1_copies.bring(version, partition, meter)

    async def _from_memory(self, version: Version, partition: Partition, meter: Meter) -> Fetched | None:
        if not version.has(Tier.MEMORY):
            return None
        for segment in self._memory.of_version(version.job, version.id):
            if segment.partition == (partition.rank, partition.name):
                segment.readers += 1  # not reused while it is hashed
                try:
                    intact = await to_the_end(self._memory_copies.intact(segment, partition, meter))
                finally:
                    segment.readers -= 1
                if intact:
                    return Fetched(partition.path, Tier.MEMORY, partition.size_bytes, segment, origin=Tier.MEMORY)
                self._catalog.set_damaged(version, Tier.MEMORY, f"{partition.path} changed in memory")
        return None

    async def _adopt(self, version: Version, source: str, ready: Sequence[Fetched]) -> None:
        """What was fetched is served in any case, also if tier 1 takes no manifest for it."""
        if source:
            return
        try:
            await self._tier1_copies.adopt(version, [item.key for item in ready if item.origin is Tier.TIER2])
        except CairnError as error:
            self._events.publish("copy_not_listed", version.job, version.id, tier=Tier.TIER1, error=error)
