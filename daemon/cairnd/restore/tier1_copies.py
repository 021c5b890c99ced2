"""Versions in tier 1, for restores and repairs: what is damaged is set aside, what is missing is made again.

A partition comes from tier 2 when tier 1 does not have it intact. When all of a version has come, it is a proper copy
again: its manifest is published, and the catalog is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from cairn_api.errors import CairnError, VersionError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.verified import DamagedError, VerifiedFiles
from cairnd.events import EventLog
from cairnd.manifest import NodeManifest
from cairnd.model import CopyState, Partition, Tier, Version
from cairnd.restore.downloads import Downloads, PlaceError
from cairnd.restore.pace import Meter
from cairnd.restore.partials import KeyLocks, Partials
from cairnd.session.memory import Segment
from cairnd.session.tier1_writer import protect_files
from cairnd.tiers.errors import is_damage
from cairnd.tiers.local import LocalTier
from cairnd.upkeep.recovery import quarantine
from cairnd.upkeep.verifier import block_buffer, compare_block
from cairnd.workers import Workers, to_the_end


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


class Tier1Copies:
    """Used from the event loop's thread. A partition is worked on under the lock of its key, a manifest under that of
    its version's folder; who holds the latter waits for none of the former."""

    def __init__(
        self,
        node: str,
        catalog: Catalog,
        tier1: LocalTier,
        verified: VerifiedFiles,
        downloads: Downloads,
        partials: Partials,
        locks: KeyLocks,
        workers: Workers,
        events: EventLog,
        *,
        location: Callable[[str], str],
        protect: bool,
    ) -> None:
        """*protect*: files of a proper copy are made immutable."""
        self._node = node
        self._catalog = catalog
        self._tier1 = tier1
        self._verified = verified
        self._downloads = downloads
        self._partials = partials
        self._locks = locks
        self._workers = workers
        self._events = events
        self._location = location
        self._protect = protect
        self._downloading: Counter[tuple[str, VersionId]] = Counter()

    async def bring(self, version: Version, partition: Partition, meter: Meter, *, repairing: bool = False) -> Fetched:
        """The partition in tier 1, made again from tier 2 if need be.

        *repairing*: nobody waits for it, so the disk is believed and not the page cache, which may hold what was read
        before the disk failed; no version is given up for its place, and no other place will do.

        Raises :class:`VersionError` when neither tier has it intact, else as :meth:`Downloads.bring` does.
        """
        failures: list[str] = []
        key = layout.partition(version.job, version.id, partition.path)
        async with self._locks.hold(key):
            try:
                look = self._workers.run(self._is_intact, key, partition, meter, repairing)
                if await (to_the_end(look) if repairing else look):
                    return Fetched(partition.path, Tier.TIER1, partition.size_bytes, key=key)
                if version.has(Tier.TIER1):
                    failures.append(f"tier 1 copy {key} is missing")
                    self._catalog.set_damaged(version, Tier.TIER1, f"{partition.path} is missing")
            except DamagedError as error:
                failures.append(error.message)
                await self._set_aside(version, key, error)
            url = self._location(version.job)
            if not url or not version.has(Tier.TIER2):
                raise self._no_copy(version, partition, failures)
            temporary = layout.incoming_download(version.job, version.id, self._tier1.token_hex(8))
            folder = layout.version_folder(version.job, version.id)
            await self._partials.wait(folder)  # its manifest may be being published, which removes temporary files
            self._downloading[version.job, version.id] += 1
            try:
                self._partials.note(version, folder)
                return await self._download(
                    version, partition, url, key, temporary, meter, failures, deleting=not repairing
                )
            except PlaceError as error:
                if repairing:
                    raise
                self._events.publish("place_unusable", version.job, version.id, tier=Tier.TIER1, error=error)
            finally:
                self._downloading.subtract([(version.job, version.id)])
                self._downloading = +self._downloading  # without those that have none left
            return await self.bring_from(url, version, partition, meter)

    async def bring_from(self, source: str, version: Version, partition: Partition, meter: Meter) -> Fetched:
        """The partition as the bucket at *source* has it, in a place that is no copy's; raises as :meth:`bring`."""
        key = layout.fetched(source, version.job, version.id, partition.path)
        await self._partials.wait(folder_of(version, source))
        async with self._locks.hold(key):
            try:
                if await self._workers.run(self._is_intact, key, partition, meter, False):
                    return Fetched(partition.path, Tier.TIER1, partition.size_bytes, key=key, origin=Tier.TIER2)
            except DamagedError as error:
                await self._set_aside(version, key, error)
            temporary = layout.incoming_fetched(self._tier1.token_hex(8))
            self._partials.note(version, folder_of(version, source))
            return await self._download(version, partition, source, key, temporary, meter, [])

    async def adopt(self, version: Version, anew: Collection[str]) -> None:
        """If every partition now lies in tier 1, publish the manifest: the version has a proper copy there again.

        *anew* are the keys that were just written, or read around the page cache: only they tell that a copy which was
        found damaged is no longer. One that lacks them is left to a repair.
        """
        async with self._locks.hold(layout.version_folder(version.job, version.id)):
            found = version.copy(Tier.TIER1)
            if version.has(Tier.TIER1) or not version.has(Tier.TIER2):
                return
            keys = {layout.partition(version.job, version.id, item.path): item for item in version.partitions}
            if found.damaged and not keys.keys() <= set(anew):
                return
            for key, partition in keys.items():
                try:
                    if not await self._workers.run(self._tier1.exists, key):
                        return  # not all of it is here: it stays a partial, unlisted copy while restores need it
                    await self._workers.run(self._verified.check, key, partition)
                except CairnError:
                    return  # whoever reads it next says so
            if version.copy(Tier.TIER1) is found:
                # With the lock to its end, whoever gives up waiting: else the folder is tidied away under the manifest.
                await to_the_end(self._list(version))

    async def _list(self, version: Version) -> None:
        found = version.copy(Tier.TIER1)
        tidy = (version.job, version.id) not in self._downloading
        await self._workers.run(self._publish, NodeManifest.of(version, self._node, version.partitions), tidy)
        if version.copy(Tier.TIER1) is found:  # else damage was found meanwhile
            self._catalog.set_copy(version, Tier.TIER1, CopyState.VERIFIED, source=Tier.TIER2)

    def _publish(self, manifest: NodeManifest, tidy: bool) -> None:
        job, version = manifest.job, manifest.id
        self._tier1.hand_to_group(layout.job_folder(job), manifest.gid)
        self._tier1.hand_to_group(layout.version_folder(job, version), manifest.gid, everything=True)
        if tidy:
            self._tier1.delete_tree(layout.incoming_folder(job, version))
        if self._protect:
            protect_files(self._tier1, [layout.partition(job, version, item.path) for item in manifest.partitions])
        self._tier1.put_small(layout.manifest(job, version), manifest.encode())
        self._tier1.hand_to_group(layout.manifest(job, version), manifest.gid)

    def _is_intact(self, key: str, partition: Partition, meter: Meter, uncached: bool) -> bool:
        """Whether the file is there. Raises :class:`DamagedError` when it is not as its digest says. Blocks."""
        try:
            if not self._tier1.exists(key):
                return False
            problem = self._problem_on_disk(key, partition) if uncached else ""
        except CairnError as error:
            if not is_damage(error):
                raise
            problem = error.message
        if problem:
            raise DamagedError(f"tier 1 copy {key} is damaged: {problem}")
        self._verified.check(key, partition, progress=meter.reader(partition), digested=meter.digested)
        return True

    def _problem_on_disk(self, key: str, partition: Partition) -> str:
        """What is wrong with the file, read around the page cache; empty if nothing."""
        assert partition.digest is not None, "what is made again is digested"
        file = self._tier1.open_uncached(key)
        try:
            buffer = block_buffer()
            problems = (
                compare_block(partition, number, file.read_into, buffer)
                for number in range(len(partition.digest.blocks))
            )
            return next(filter(None, problems), "")
        finally:
            file.close()

    async def _set_aside(self, version: Version, key: str, error: DamagedError) -> None:
        self._verified.forget(key)
        self._catalog.set_damaged(version, Tier.TIER1, error.message)  # whatever becomes of the file
        try:
            where = await self._workers.run(quarantine, self._tier1, key)
        except CairnError as failure:
            self._events.publish("quarantine_failed", version.job, version.id, tier=Tier.TIER1, key=key, error=failure)
            return
        self._events.publish("copy_quarantined", version.job, version.id, tier=Tier.TIER1, now_at=where)

    async def _download(
        self,
        version: Version,
        partition: Partition,
        url: str,
        key: str,
        temporary: str,
        meter: Meter,
        failures: Sequence[str],
        *,
        deleting: bool = True,
    ) -> Fetched:
        try:
            await self._downloads.bring(url, version, partition, key, temporary, meter, deleting=deleting)
        except DamagedError as error:
            self._catalog.set_damaged(version, Tier.TIER2, error.message)
            raise VersionError(
                f"no intact copy of {partition.path} of {version}: {'; '.join([*failures, error.message])}",
                hint=f"choose an older version: `cairn list --job {version.job}`",
                context={"version": version.id, "partition": partition.path},
            ) from error
        return Fetched(partition.path, Tier.TIER1, partition.size_bytes, key=key, origin=Tier.TIER2)

    def _no_copy(self, version: Version, partition: Partition, failures: Sequence[str]) -> VersionError:
        """No tier has an intact copy: what was found in each of them, now or before."""
        tried = list(failures)
        for tier in (Tier.TIER1, Tier.TIER2):
            copy = version.copy(tier)
            if copy.damaged and not any(copy.error in failure for failure in tried):
                tried.append(f"its copy in {tier} was found damaged before: {copy.error}")
        hint = f"choose an older version: `cairn list --job {version.job}`"
        if tried:
            hint += f"; damaged files of tier 1 are kept in {self._tier1.root / layout.QUARANTINE}, or where they were"
        return VersionError(
            f"no intact copy of {partition.path} of {version}: {'; '.join(tried) or 'no tier holds it'}",
            hint=hint,
            context={"version": version.id, "partition": partition.path},
        )


def folder_of(version: Version, source: str) -> str:
    """Where partitions of *version* lie in tier 1, when they come from the bucket at *source* (if empty: its own)."""
    if source:
        return layout.fetched(source, version.job, version.id, "x").removesuffix("/x")
    return layout.version_folder(version.job, version.id)
