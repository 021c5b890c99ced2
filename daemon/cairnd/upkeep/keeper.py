"""Applies retention: decides with :mod:`cairnd.upkeep.retention`, deletes in an order that a crash cannot spoil.

``prune --dry-run`` and ``prune`` and the daemon's own clean-up after each save share one plan. Deletion in tier 1:
links, manifest, data; without its manifest a half-deleted version does not exist and is swept at start. In tier 2:
tombstone, grace, leases read again, data; the tombstone stays for ever.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cairn_api.errors import CairnError, ConfigurationError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.jobs import JobBook
from cairnd.catalog.leases import Leases
from cairnd.catalog.verified import VerifiedFiles
from cairnd.clock import Clock
from cairnd.events import EventLog
from cairnd.manifest import NOTE_FORMAT, encode
from cairnd.metrics import Metrics
from cairnd.model import CopyState, Tier, Version, VersionState
from cairnd.replication.replicator import Replicator
from cairnd.replication.storage import Storage
from cairnd.restore.partials import KeyLocks
from cairnd.settings import TIER1_RESERVED_BYTES, Settings
from cairnd.tiers.filesystem import FileSystem
from cairnd.tiers.local import LocalTier
from cairnd.upkeep import retention, room
from cairnd.upkeep.links import remove_links
from cairnd.workers import Workers

_SWEEP_INTERVAL_S = 1.0
_RETRY_S = 60.0
"""Until a deletion in tier 1 that failed is tried again: its manifest may be gone, and no plan would name it again."""

_BEING_SAVED = (VersionState.OPEN, VersionState.SEALED)


@dataclass(frozen=True, slots=True)
class Deletion:
    """One copy that retention lets go."""

    version: Version
    tier: Tier
    reason: str


class Keeper:
    """Retention for all jobs of this daemon."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        jobs: JobBook,
        leases: Leases,
        fs: FileSystem,
        tier1: LocalTier,
        verified: VerifiedFiles,
        storage: Storage,
        replicator: Replicator,
        workers: Workers,
        disk: Workers,
        clock: Clock,
        events: EventLog,
        metrics: Metrics,
        *,
        locks: KeyLocks,
    ) -> None:
        """*locks*: by a version's folder in tier 1; a restore that has its lease waits there for what deletes it."""
        self._settings = settings
        self._catalog = catalog
        self._jobs = jobs
        self._leases = leases
        self._fs = fs
        self._tier1 = tier1
        self._verified = verified
        self._storage = storage
        self._replicator = replicator
        self._workers = workers
        self._disk = disk
        self._locks = locks
        self._clock = clock
        self._events = events
        self._metrics = metrics
        self._answers: dict[str, tuple[VersionId, VersionId | None]] = {}
        """By job: the newest ``create`` that was heard of, and what its ranks agreed on."""
        self._deleting = {tier: asyncio.Lock() for tier in Tier}
        self._going: set[tuple[str, VersionId, Tier]] = set()
        self._sweeps: dict[tuple[str, VersionId], float] = {}
        self._retries: dict[tuple[str, VersionId], tuple[Deletion, float]] = {}

    def set_floor(self, job: str, created: VersionId, floor: VersionId | None) -> None:
        """Note the newest version that all ranks hold verified in one tier, as ranks agreed at the create of *created*.

        None: there is none. The answer of the newest create holds, also if it is lower than the one before: then a
        copy was lost on another node.
        """
        if job not in self._answers or created >= self._answers[job][0]:
            self._answers[job] = (created, floor)

    def floor(self, job: str) -> VersionId | None:
        """The newest version that can be shown to be complete; None: there is none, so nothing may go.

        One that automatic resume passes over is it only if there is no other: else the last good one could go.
        """
        complete = [
            version
            for version in self._catalog.versions(job)
            if version.state is VersionState.COMMITTED
            and ((version.complete and version.has(Tier.TIER1)) or version.has(Tier.TIER2))
        ]
        if job in self._answers:
            created, agreed = self._answers[job]
            # Another node may know better than to count on what is newer than their answer, unless it is all here.
            complete = [
                version
                for version in complete
                if (agreed is not None and version.id <= agreed)
                or (version.complete and version.has(Tier.TIER1) and version.id.epoch >= created.epoch)
            ]
            if agreed is not None and self._intact(job, agreed):  # else an older one is what can be restored
                complete.append(self._catalog.require(job, agreed))
        sound = [version for version in complete if not version.passed_over]
        return max((version.id for version in sound or complete), default=None)

    def _intact(self, job: str, version_id: VersionId) -> bool:
        version = self._catalog.get(job, version_id)
        return version is not None and version.restorable and (version.has(Tier.TIER1) or version.has(Tier.TIER2))

    def plan(self, job: str) -> list[Deletion]:
        """What the policy lets go of *job* now, in both tiers, oldest first."""
        floor = self.floor(job)
        record = self._jobs.get(job)
        keep = (record.keep if record is not None else 0) or self._settings.num_of_version_in_retention
        policies = {
            Tier.TIER1: retention.Policy(keep),
            Tier.TIER2: retention.Policy(
                self._settings.tier2_num_of_version_in_retention or keep,
                self._settings.tier2_keep_every,
                self._settings.tier2_keep_period_s,
            ),
        }
        deletions: list[Deletion] = []
        for tier, policy in policies.items():
            evictions = retention.plan(self._held(job, tier), policy, floor)
            deletions += [Deletion(self._catalog.require(job, item.id), tier, item.reason) for item in evictions]
            if not (policy.keep_every or policy.keep_period_s):  # else damage may be all that is left of a time
                deletions += self._damaged(job, tier, policy.keep_last, floor)
        return deletions

    def _damaged(self, job: str, tier: Tier, keep: int, floor: VersionId | None) -> list[Deletion]:
        """Damaged copies that enough intact newer ones have replaced: nothing else would ever remove them."""
        intact = [version.id for version in self._catalog.versions(job) if version.has(tier)]
        return [
            Deletion(version, tier, "damaged, and replaced by newer ones")
            for version in self._catalog.versions(job)
            if version.copy(tier).state is CopyState.FAILED
            and (tier is Tier.TIER1 or (version.copy(tier).damaged and not version.has(Tier.TIER1)))
            and version.restorable
            and floor is not None
            and version.id < floor
            and sum(other > version.id for other in intact) >= keep
            and not (version.pinned or self._leases.protects(job, version.id))
        ]

    def plan_version(self, version: Version) -> list[Deletion]:
        """What deleting one version would remove. Refuses what is pinned, leased, in use or the last of its job."""
        if version.pinned or self._leases.protects(version.job, version.id):
            why = "it is pinned" if version.pinned else "a restore is reading it"
            raise ConfigurationError(f"{version} is not deleted: {why}", hint="unpin it, or wait for the restore")
        others = [other.id for other in self._catalog.versions(version.job) if other.id != version.id]
        if not any(self._intact(version.job, other) for other in others):
            raise ConfigurationError(
                f"{version} is not deleted: it is the only version of its job that can be restored",
                hint="delete the job's folder by hand if that is what you want",
            )
        held = (CopyState.VERIFIED, CopyState.FAILED)
        tiers = [tier for tier in (Tier.TIER1, Tier.TIER2) if version.copy(tier).state in held]
        return [Deletion(version, tier, "asked for") for tier in tiers]

    async def apply(self, job: str) -> list[Deletion]:
        """Delete what :meth:`plan` lets go; failures are reported as events and the rest goes on."""
        return await self.delete(self.plan(job))

    async def delete(self, deletions: list[Deletion]) -> list[Deletion]:
        """Carry out *deletions*; returns those that succeeded.

        Plans may overlap, so each tier deletes one copy at a time: a bucket that hangs does not hold up tier 1.
        """
        done = []
        for deletion in deletions:
            async with self._deleting[deletion.tier]:
                if await self._delete(deletion):
                    done.append(deletion)
        return done

    def is_deleting(self, version: Version, tier: Tier) -> bool:
        """Whether the copy in *tier* is being deleted, or half of it was: what is missing of it is no damage."""
        half_gone = tier is Tier.TIER1 and (version.job, version.id) in self._retries
        return half_gone or (version.job, version.id, tier) in self._going

    async def _delete(self, deletion: Deletion) -> bool:
        version = deletion.version
        gone = version.copy(deletion.tier).state not in (CopyState.VERIFIED, CopyState.FAILED)
        if gone or version.pinned or self._leases.protects(version.job, version.id):
            return False
        key = (version.job, version.id, deletion.tier)
        try:
            if deletion.tier is Tier.TIER1:
                async with self._locks.hold(layout.version_folder(version.job, version.id)):
                    if self._leases.protects(version.job, version.id):
                        return False
                    self._going.add(key)
                    await self._delete_tier1(version, deletion.reason)
            else:
                self._going.add(key)
                await self._delete_tier2(version, deletion.reason)
        except CairnError as error:
            if deletion.tier is Tier.TIER1:
                self._retries[version.job, version.id] = (deletion, self._clock.monotonic_s() + _RETRY_S)
            self._events.publish("delete_failed", version.job, version.id, tier=deletion.tier, error=error)
            return False
        finally:
            self._going.discard(key)
        return True

    async def make_room(self, size_bytes: int, job: str, *, deleting: bool = True) -> None:
        """Free tier 1 for *size_bytes* more, by policy first and by the byte limit's rule then.

        Without *deleting* the bytes are those of a copy that is made again, which the limit counts already: only the
        disk has to have room. Raises :class:`OverloadedError` when there is too little: nothing that must stay is
        touched.
        """
        beyond_disk, beyond_limit = await self._beyond_bytes(size_bytes)
        if deleting and max(beyond_disk, beyond_limit) > 0:
            await self._free(size_bytes, job)
            beyond_disk, beyond_limit = await self._beyond_bytes(size_bytes)
        if beyond_disk > 0 or (deleting and beyond_limit > 0):
            limit_bytes = self._settings.tier1_limit_bytes
            raise room.refusal(
                self._tier1.root, size_bytes, job, beyond_disk, beyond_limit if deleting else 0, limit_bytes
            )

    async def _free(self, size_bytes: int, job: str) -> None:
        jobs = sorted({job, *self._catalog.jobs()})
        for name in jobs:
            await self.delete([item for item in self.plan(name) if item.tier is Tier.TIER1])
        excess = max(await self._beyond_bytes(size_bytes))
        chosen: list[tuple[Version, retention.Eviction, bool]] = []
        for name in jobs:  # of all jobs before the first intact copy of any
            evictions = retention.damaged_first(self._held_damaged(name), excess)
            chosen += [(self._catalog.require(name, item.id), item, False) for item in evictions]
            excess -= sum(item.size_bytes for item in evictions)
        for name in jobs:
            evictions, lost = retention.over_limit(self._held(name, Tier.TIER1), excess, self.floor(name))
            chosen += [(self._catalog.require(name, item.id), item, item.id in lost) for item in evictions]
            excess -= sum(item.size_bytes for item in evictions)
        # All of it or nothing: no version is given up for a save that fails all the same.
        for version, eviction, lost_claim in chosen if excess <= 0 else ():
            if lost_claim:
                self._metrics.lost_claims.inc()
                self._events.publish("claim_lost", version.job, version.id, reason="tier 1 is at its byte limit")
            if version.copy(Tier.TIER1).damaged:
                self._say_what_goes(version)
            await self.delete([Deletion(version, Tier.TIER1, eviction.reason)])

    def _say_what_goes(self, version: Version) -> None:
        """What was not damaged of the copy goes too: an operator may ask whether anything else has it."""
        left = [str(tier) for tier in (Tier.TIER2, Tier.MEMORY) if version.has(tier)]
        self._events.publish(
            "damaged_copy_given_up", version.job, version.id, tier=Tier.TIER1,
            reason="tier 1 has no room for a new version", damage=version.copy(Tier.TIER1).error,
            intact_copy=left[0] if left else "none",
        )  # fmt: skip

    def used_bytes(self) -> int:
        """Bytes of versions in tier 1, finished or being written."""
        return sum(
            version.reserved_bytes if version.state in _BEING_SAVED else version.size_bytes
            for version in self._catalog.versions()
            if version.state in _BEING_SAVED or version.copy(Tier.TIER1).state in (CopyState.VERIFIED, CopyState.FAILED)
        )

    async def pin(self, version: Version, reason: str, *, pinned: bool) -> bool:
        """Pin or unpin durably; returns whether anything changed.

        A pin holds here even if the bucket does not answer (an event says so); to unpin, the bucket has to answer.
        """
        if version.pinned is pinned:
            return False
        key, url = layout.pin(version.job, version.id), self._replicator.location(version.job)
        if pinned:
            await self._disk.run(self._tier1.put_small, key, encode({"format": NOTE_FORMAT, "reason": reason}))
            version.pinned = True
            try:
                if url:
                    bucket = await self._storage.bucket(url)
                    await self._workers.run(bucket.pin, version.job, version.id, reason)
            except CairnError as error:
                self._events.publish("pin_local", version.job, version.id, error=error)
        else:
            # The bucket first: the pin there would be taken over again.
            if url:
                bucket = await self._storage.bucket(url)
                await self._workers.run(bucket.unpin, version.job, version.id)
            await self._disk.run(self._tier1.delete, key)
            version.pinned = False
        self._events.publish("version_pinned" if pinned else "version_unpinned", version.job, version.id, reason=reason)
        return True

    def _held(self, job: str, tier: Tier) -> list[retention.Held]:
        waiting = {version.id for version in self._replicator.backlog() if version.job == job}
        return [
            retention.Held(
                version.id,
                version.size_bytes,
                version.created_s,
                protected=version.pinned or version.requested_and_waiting or self._leases.protects(job, version.id),
                waiting=tier is Tier.TIER1 and version.id in waiting,
                passed_over=bool(version.passed_over),
            )
            for version in self._catalog.versions(job)
            if version.has(tier) and version.restorable
        ]

    def _held_damaged(self, job: str) -> list[retention.Held]:
        return [
            retention.Held(
                version.id,
                version.size_bytes,
                version.created_s,
                protected=version.pinned or self._leases.protects(job, version.id),
            )
            for version in self._catalog.versions(job)
            if version.copy(Tier.TIER1).state is CopyState.FAILED and version.restorable
        ]

    async def _beyond_bytes(self, size_bytes: int) -> tuple[int, int]:
        """How many bytes are missing for *size_bytes* more, on the disk and below the limit; negative: to spare."""
        free_bytes = await self._disk.run(self._tier1.free_bytes)  # a disk that hangs must not stop the daemon
        limit_bytes = self._settings.tier1_limit_bytes
        beyond_limit = self.used_bytes() + size_bytes - limit_bytes if limit_bytes else 0
        return size_bytes + TIER1_RESERVED_BYTES - free_bytes, beyond_limit

    async def _delete_tier1(self, version: Version, reason: str) -> None:
        folder = layout.version_folder(version.job, version.id)
        only_copy = not version.holds(Tier.TIER2)
        if only_copy and version.state is not VersionState.DELETING:
            self._catalog.move(version, VersionState.DELETING, reason)
        await self._disk.run(remove_links, self._fs, version, self._tier1.root / folder)
        await self._disk.run(self._tier1.delete, layout.manifest(version.job, version.id))
        await self._disk.run(self._tier1.delete_tree, folder)
        await self._disk.run(self._tier1.delete, layout.request(version.job, version.id))
        self._verified.forget(folder)
        self._catalog.set_copy(version, Tier.TIER1, CopyState.EVICTED, reason=reason)
        if only_copy:
            self._catalog.forget(version)

    async def _delete_tier2(self, version: Version, reason: str) -> None:
        bucket = await self._storage.bucket(self._replicator.location(version.job))
        await self._workers.run(bucket.mark_deleted, version.job, version.id, self._clock.now_s())
        if not version.holds(Tier.TIER1) and version.state is not VersionState.DELETING:
            self._catalog.move(version, VersionState.DELETING, reason)
        self._catalog.set_copy(version, Tier.TIER2, CopyState.EVICTED, reason=reason)
        self.sweep_later(version.job, version.id)
        if not version.holds(Tier.TIER1):
            self._catalog.forget(version)

    def sweep_later(self, job: str, version: VersionId) -> None:
        """Delete the data of a tombstoned version once its grace has passed and no restore here reads it."""
        self._sweeps.setdefault((job, version), self._clock.monotonic_s() + self._settings.tier2_delete_grace_s)

    async def run(self) -> None:
        """Sweep tombstoned versions of the bucket, for ever; what fails in either tier is tried again later."""
        while True:
            await self._clock.sleep(_SWEEP_INTERVAL_S)
            now_s = self._clock.monotonic_s()
            for key, retry in list(self._retries.items()):
                deletion, due_s = retry
                if due_s <= now_s and not self._leases.protects(*key):
                    await self.delete([deletion])
                    if self._retries.get(key) is retry:  # it did not fail again
                        del self._retries[key]
            for (job, version), due_s in list(self._sweeps.items()):
                if due_s > now_s or self._leases.protects(job, version):
                    continue
                try:
                    bucket = await self._storage.bucket(self._replicator.location(job))
                    await self._workers.run(bucket.delete_data, job, version)
                except CairnError as error:
                    self._sweeps[job, version] = now_s + max(self._settings.tier2_delete_grace_s, _SWEEP_INTERVAL_S)
                    self._events.publish("delete_failed", job, version, tier=Tier.TIER2, error=error)
                    continue
                del self._sweeps[job, version]
                self._events.publish("tier2_data_deleted", job, version)
