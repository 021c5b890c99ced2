"""Brings partitions of a version near: memory, then tier 1, then tier 2; verified, protected by a lease.

What is damaged is set aside and counted, and the next copy is tried; what comes from tier 2 is published into tier 1 as
a proper copy. Only when no copy of a partition can be believed does a fetch fail, and then it says what it tried.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from awscrt import checksums

from cairn_api.errors import CairnError, OverloadedError, UnavailableError, VersionError
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.leases import Lease, Leases
from cairnd.catalog.verified import DamagedError, VerifiedFiles
from cairnd.digests import BLOCK_BYTES
from cairnd.events import EventLog
from cairnd.manifest import NodeManifest
from cairnd.metrics import Metrics
from cairnd.model import CopyState, Partition, Tier, Version, VersionState
from cairnd.replication.bucket import BucketRepository
from cairnd.replication.storage import Storage
from cairnd.restore import pace
from cairnd.restore.memory_copies import MemoryCopies
from cairnd.restore.pace import Meter, as_they_end
from cairnd.restore.partials import KeyLocks, Partials
from cairnd.session.memory import CaptureMemory, Segment
from cairnd.tiers.local import LocalTier
from cairnd.upkeep.recovery import quarantine
from cairnd.upkeep.verifier import block_buffer, compare_block
from cairnd.workers import Workers, to_the_end

_SETTLE_S = 600.0

NO_CLIENT = 0
"""Holds the leases of the daemon's own work; clients are numbered from 1."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A verified partition, ready to be opened: in ``segment``, or as the tier 1 file ``key``.

    ``origin`` is the tier that its bytes came from; what came from tier 2 is opened in tier 1.
    """

    path: str
    tier: Tier
    size_bytes: int
    segment: Segment | None = None
    key: str = ""
    origin: Tier = Tier.TIER1


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
    """Serves all fetches of this daemon; two fetches of one partition share one download."""

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
        metrics: Metrics,
        *,
        location: Callable[[str], str],
        make_room: Callable[..., Awaitable[None]],
        concurrency: int,
        locks: KeyLocks,
    ) -> None:
        self._node = node
        self._catalog = catalog
        self._leases = leases
        self._memory = memory
        self._memory_copies = memory_copies
        self._tier1 = tier1
        self._verified = verified
        self._storage = storage
        self._workers = workers
        self._events = events
        self._metrics = metrics
        self._location = location
        self._make_room = make_room
        self._slots = asyncio.Semaphore(concurrency)
        self._locks = locks
        self._partials = Partials(catalog, leases, tier1, verified, self._locks, workers, events)

    async def fetch(
        self, client: int, version: Version, paths: Sequence[str], *, source: str = ""
    ) -> AsyncGenerator[Progress, None]:
        """Make *paths* (all partitions if empty) of *version* readable here; yields progress, the last one with all.

        Raises :class:`VersionError` when a partition has no intact copy, :class:`UnavailableError` when the tier that
        has it does not answer. The lease is given up on failure.
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
                await self._partials.wait(_folder(version, source))
                bring = [self._bring(lease, version, item, source, meter) for item in partitions]
                async with aclosing(as_they_end(bring, meter.give_up)) as steps:
                    async for fetched in steps:
                        tier = fetched.origin if fetched is not None else None
                        yield Progress(meter.done_bytes, meter.total_bytes, lease.name, tier=tier)
                async with aclosing(as_they_end([self._adopt(version, source)], meter.give_up)) as beats:
                    async for _ in beats:
                        yield Progress(meter.done_bytes, meter.total_bytes, lease.name)
                ready = tuple(item for item in lease.partitions.values() if isinstance(item, Fetched))
                yield Progress(
                    meter.total_bytes, meter.total_bytes, lease.name, ready,
                    digested_bytes=meter.digested_bytes, digest_s=meter.digest_s,
                )  # fmt: skip
            except BaseException:
                self.end(lease)
                raise

    async def remake(self, version: Version) -> None:
        """Make a damaged tier 1 copy whole again from tier 2; what is damaged is moved to the quarantine folder.

        Raises as :meth:`fetch` does.
        """
        meter = Meter(version.partitions)
        with self._partials.fetching(version):
            lease = self._leases.take(NO_CLIENT, version.job, version.id)
            try:
                await self._partials.wait(_folder(version, ""))
                for partition in version.partitions:
                    await self._read_anew(version, partition)
                    await self._on_disk(version, partition, meter, again=True)
                await self._adopt(version, "")
            finally:
                self.end(lease)

    async def _read_anew(self, version: Version, partition: Partition) -> None:
        """Believe the disk of *partition*, not the page cache: that may hold what was read before the disk failed."""
        key = layout.partition(version.job, version.id, partition.path)
        async with self._locks.hold(key):
            problem = await to_the_end(self._workers.run(self._compare, key, partition))
            if problem:
                error = DamagedError(f"tier 1 copy {key} is damaged: {problem}")
                await self._set_aside(version, key, error)

    def _compare(self, key: str, partition: Partition) -> str:
        """What is wrong on disk with a file that is there; empty if nothing. Blocks."""
        assert partition.digest is not None, "what is made again is digested"
        try:
            file = self._tier1.open_uncached(key)
        except OverloadedError:
            raise
        except CairnError:
            return ""  # not there, or no file: who reads it next deals with that
        try:
            buffer = block_buffer()
            for number in range(len(partition.digest.blocks)):
                problem = compare_block(partition, number, file.read_into, buffer)
                if problem:
                    return problem
        except VersionError as error:  # it is cut short
            return error.message
        finally:
            file.close()
        return ""

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
            return await self._from_source(version, partition, source, meter)
        return await self._from_memory(version, partition, meter) or await self._on_disk(version, partition, meter)

    async def _on_disk(self, version: Version, partition: Partition, meter: Meter, *, again: bool = False) -> Fetched:
        """*again*: nobody waits for it, so no version is given up for its place."""
        failures: list[str] = []
        key = layout.partition(version.job, version.id, partition.path)
        async with self._locks.hold(key):
            if await self._workers.run(self._tier1.exists, key):
                try:
                    await self._check(key, partition, meter)
                    return Fetched(partition.path, Tier.TIER1, partition.size_bytes, key=key)
                except DamagedError as error:
                    failures.append(error.message)
                    await self._set_aside(version, key, error)
            elif version.has(Tier.TIER1):
                failures.append(f"tier 1 copy {key} is missing")
                self._catalog.set_damaged(version, Tier.TIER1, f"{partition.path} is missing")
            url = self._location(version.job)
            if not url or not version.has(Tier.TIER2):
                raise self._no_copy(version, partition, failures)
            temporary = layout.incoming_download(version.job, version.id, self._tier1.token_hex(8))
            self._partials.note(version, _folder(version, ""))
            return await self._from_tier2(version, partition, url, key, temporary, meter, failures, again=again)

    def _no_copy(self, version: Version, partition: Partition, failures: Sequence[str]) -> VersionError:
        """No tier has an intact copy: what was found in each of them, now or before."""
        tried = list(failures)
        for tier in (Tier.TIER1, Tier.TIER2):
            copy = version.copy(tier)
            if copy.damaged and not any(copy.error in failure for failure in tried):
                tried.append(f"its copy in {tier} was found damaged before: {copy.error}")
        hint = f"choose an older version: `cairn list --job {version.job}`"
        if tried:
            hint += f"; what was damaged in tier 1 is kept in {self._tier1.root / layout.QUARANTINE}"
        return VersionError(
            f"no intact copy of {partition.path} of {version}: {'; '.join(tried) or 'no tier holds it'}",
            hint=hint,
            context={"version": version.id, "partition": partition.path},
        )

    async def _from_source(self, version: Version, partition: Partition, source: str, meter: Meter) -> Fetched:
        key = layout.fetched(source, version.job, version.id, partition.path)
        async with self._locks.hold(key):
            if await self._workers.run(self._tier1.exists, key):
                try:
                    await self._check(key, partition, meter)
                    return Fetched(partition.path, Tier.TIER1, partition.size_bytes, key=key, origin=Tier.TIER2)
                except DamagedError as error:
                    await self._set_aside(version, key, error)
            temporary = layout.incoming_fetched(self._tier1.token_hex(8))
            self._partials.note(version, _folder(version, source))
            return await self._from_tier2(version, partition, source, key, temporary, meter, [])

    async def _check(self, key: str, partition: Partition, meter: Meter) -> None:
        await self._workers.run(
            lambda: self._verified.check(key, partition, progress=meter.reader(partition), digested=meter.digested)
        )

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

    async def _from_tier2(
        self,
        version: Version,
        partition: Partition,
        url: str,
        key: str,
        temporary: str,
        meter: Meter,
        failures: list[str],
        *,
        again: bool = False,
    ) -> Fetched:
        async with self._slots:
            await self._make_room(partition.size_bytes, version.job, deleting=not again)
            try:
                bucket = await self._storage.bucket(url)
                download = self._workers.run(self._download, bucket, version, partition, key, temporary, meter)
                await to_the_end(download)  # what ends later than its fetch would escape the clean-up
            except VersionError as error:  # damaged, cut short or missing
                self._catalog.set_damaged(version, Tier.TIER2, error.message)
                raise VersionError(
                    f"no intact copy of {partition.path} of {version}: {'; '.join([*failures, error.message])}",
                    hint=f"choose an older version: `cairn list --job {version.job}`",
                    context={"version": version.id, "partition": partition.path},
                ) from error
            except UnavailableError as error:
                self._storage.note_failure(url, error)
                raise
        return Fetched(partition.path, Tier.TIER1, partition.size_bytes, key=key, origin=Tier.TIER2)

    def _download(
        self,
        bucket: BucketRepository,
        version: Version,
        partition: Partition,
        key: str,
        temporary: str,
        meter: Meter,
    ) -> None:
        digest, at = partition.digest, meter.reader(partition)
        assert digest is not None, "versions of the bucket have digests"
        source = layout.Bucket.partition(version.job, version.id, partition.path)
        writer = self._tier1.begin(key, temporary, partition.size_bytes)
        try:
            view = block_buffer()
            for number, offset in enumerate(range(0, partition.size_bytes, BLOCK_BYTES)):
                meter.check()
                block = view[: min(BLOCK_BYTES, partition.size_bytes - offset)]
                bucket.store.read_into(source, offset, block)
                if checksums.crc64nvme(block) != digest.blocks[number]:
                    raise DamagedError(f"block {number} of {source} in tier 2 does not match its digest")
                writer.write(block, offset)
                at(offset + len(block))
            writer.finish()
        except BaseException:
            writer.discard()
            raise
        self._tier1.publish(writer, key)
        self._tier1.sync_folders([key])
        self._verified.trust(key, partition)

    async def _set_aside(self, version: Version, key: str, error: DamagedError) -> None:
        where = await self._workers.run(quarantine, self._tier1, key)
        self._verified.forget(key)
        self._catalog.set_damaged(version, Tier.TIER1, error.message)
        self._events.publish("copy_quarantined", version.job, version.id, tier=Tier.TIER1, now_at=where)

    async def _adopt(self, version: Version, source: str) -> None:
        """If every partition now lies in tier 1, publish the manifest: the version has a proper copy there again."""
        if source:
            return
        folder = layout.version_folder(version.job, version.id)
        async with self._locks.hold(folder):
            await self._adopt_once(version)

    async def _adopt_once(self, version: Version) -> None:
        if version.has(Tier.TIER1) or not version.has(Tier.TIER2):
            return
        keys = {layout.partition(version.job, version.id, item.path): item for item in version.partitions}
        for key, partition in keys.items():
            if not await self._workers.run(self._tier1.exists, key):
                return  # not all of it is here: it stays a partial, unlisted copy while restores need it
            try:
                await self._workers.run(self._verified.check, key, partition)
            except CairnError:
                return
        manifest = NodeManifest.of(version, self._node, version.partitions)
        await self._workers.run(self._publish, version, manifest)
        self._catalog.set_copy(version, Tier.TIER1, CopyState.VERIFIED, source=Tier.TIER2)

    def _publish(self, version: Version, manifest: NodeManifest) -> None:
        folder = layout.version_folder(version.job, version.id)
        self._tier1.hand_to_group(layout.job_folder(version.job), manifest.gid)
        self._tier1.hand_to_group(folder, manifest.gid, everything=True)
        self._tier1.delete_tree(layout.incoming_folder(version.job, version.id))
        self._tier1.put_small(layout.manifest(version.job, version.id), manifest.encode())
        self._tier1.hand_to_group(layout.manifest(version.job, version.id), manifest.gid)


def _folder(version: Version, source: str) -> str:
    if source:
        return layout.fetched(source, version.job, version.id, "x").removesuffix("/x")
    return layout.version_folder(version.job, version.id)
