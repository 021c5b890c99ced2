"""Launches of a job: who may join, which epoch a launch gets, which buffers a rank may fill next.

An epoch is one launch. Rank 0 claims it in the bucket; with the bucket away it is provisional: tier 1 works and nothing
is uploaded until the claim succeeds. Epochs are also noted here on disk, so that a launch that committed nothing is
never repeated.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from cairn_api.errors import ConfigurationError
from cairn_api.names import VersionId, check_job
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.jobs import JobBook, JobRecord
from cairnd.catalog.leases import Leases
from cairnd.events import EventLog
from cairnd.metrics import Metrics
from cairnd.model import CopyState, Tier, Version, VersionState
from cairnd.replication.bucket import EpochClaim
from cairnd.replication.replicator import Replicator
from cairnd.replication.storage import Storage
from cairnd.restore.inventory import Inventory
from cairnd.session.clients import Client
from cairnd.session.memory import CaptureMemory, Segment

_NEWEST_TOLD = 64


def _safe(version: Version) -> bool:
    """Whether nothing is lost with its copy in memory."""
    return version.has(Tier.TIER1) or version.has(Tier.TIER2)


class Launches:
    """Joining, claiming and reserving, for all jobs of this daemon."""

    def __init__(
        self,
        catalog: Catalog,
        jobs: JobBook,
        leases: Leases,
        memory: CaptureMemory,
        storage: Storage,
        inventory: Inventory,
        replicator: Replicator,
        events: EventLog,
        metrics: Metrics,
    ) -> None:
        self._catalog = catalog
        self._jobs = jobs
        self._leases = leases
        self._memory = memory
        self._storage = storage
        self._inventory = inventory
        self._replicator = replicator
        self._events = events
        self._metrics = metrics
        self._locks: dict[str, asyncio.Lock] = {}

    async def join(self, client: Client, job: str, *, storage_url: str, keep: int) -> tuple[int, str]:
        """Admit a rank to *job* under the policy it asks for; returns the highest epoch seen and tier 2's error.

        Raises :class:`ConfigurationError` when the job is another user's or names a location that is not allowed.
        """
        check_job(job)
        if client.job not in ("", job):
            raise ConfigurationError(
                f"this connection belongs to job {client.job!r}", hint="open another connection for another job"
            )
        self._check_owner(client, job)
        if storage_url:
            self._storage.check_allowed(storage_url)
        # The bucket may know an owner that this node has not heard of.
        error = await self._inventory.refresh(job)
        async with self._changing(job):
            self._check_owner(client, job)
            record = self._jobs.get(job) or JobRecord(job, client.uid, client.gid, storage_url, keep)
            await self._jobs.put(
                replace(record, storage_url=storage_url or record.storage_url, keep=keep or record.keep)
            )
            client.job = job
        if storage_url:
            error = await self._inventory.refresh(job)
            self._check_owner(client, job)
        return self.max_epoch(job), error

    def _changing(self, job: str) -> asyncio.Lock:
        """Held while a job's record is read, changed and made durable: two launches must not both do that at once."""
        return self._locks.setdefault(job, asyncio.Lock())

    def _check_owner(self, client: Client, job: str) -> None:
        self._jobs.check_owner(job, client.uid, client.privileged)
        owners = {version.uid for version in self._catalog.versions(job)}
        if owners and client.uid not in owners and not client.privileged:
            # No record says whose job it is (it came from the bucket, say), but its versions do.
            raise ConfigurationError(
                f"job {job!r} has versions of user {min(owners)}, not of user {client.uid}",
                hint="choose another job name, or run as that user",
                context={"job": job},
            )

    def max_epoch(self, job: str) -> int:
        """The highest epoch of *job* seen in any tier or on this node's own record, unreadable versions too."""
        record = self._jobs.get(job)
        claim = self._inventory.newest_claim(job)
        return max(
            self._catalog.max_epoch(job),
            record.epoch if record is not None else 0,
            claim.epoch if claim is not None else 0,
            *(version.epoch for version in self._inventory.unreadable(job)),
        )

    async def claim(
        self, client: Client, claim: EpochClaim, *, first_rank: bool, provisional: bool
    ) -> tuple[bool, bool]:
        """Begin a launch: ``(taken by another launch, provisional)``. Ranks but the first only take note."""
        async with self._changing(client.job):
            return await self._claim(client, claim, first_rank=first_rank, provisional=provisional)

    async def _claim(
        self, client: Client, claim: EpochClaim, *, first_rank: bool, provisional: bool
    ) -> tuple[bool, bool]:
        self._check_owner(client, client.job)
        record = self._jobs.get(client.job)
        if record is None:
            raise ConfigurationError("claim an epoch after joining the job", hint="call Join first")
        if (record.epoch, record.nonce) == (claim.epoch, claim.nonce):
            client.epoch, client.nonce = claim.epoch, claim.nonce
            return False, record.provisional
        if claim.epoch <= record.epoch:
            if first_rank:
                return True, False
            # Taking note of it would turn this node's record back, and the next launch would repeat an epoch.
            raise ConfigurationError(
                f"epoch {claim.epoch} of job {client.job!r} is over: epoch {record.epoch} belongs to another launch",
                hint="end this launch; one launch of a job runs at a time",
                context={"job": client.job},
            )
        if first_rank:
            taken, provisional = False, False
            if self._replicator.location(client.job):
                taken, provisional = await self._replicator.claim(record, claim)
            if taken:
                await self._inventory.refresh(client.job)
                return True, False
        await self._jobs.change(
            client.job, epoch=claim.epoch, nonce=claim.nonce, world_size=claim.world_size, provisional=provisional,
            resumed_from=claim.resumed_from,
        )  # fmt: skip
        client.epoch, client.nonce = claim.epoch, claim.nonce
        self._events.publish(
            "launch", client.job, epoch=claim.epoch, world_size=claim.world_size, provisional=provisional
        )
        return False, provisional

    def check_current(self, client: Client) -> None:
        """Raise :class:`ConfigurationError` when a newer launch of the job has begun since *client* claimed its epoch.

        What a superseded launch saves counts as older than all that the newer one has: retention would take it.
        """
        record = self._jobs.get(client.job)
        if client.epoch and record is not None and record.epoch > client.epoch:
            raise ConfigurationError(
                f"a newer launch (epoch {record.epoch}) of job {client.job!r} has begun, so this one (epoch "
                f"{client.epoch}) may not save any more",
                hint="end this launch; two trainings at the same time need a job name each",
                context={"job": client.job},
            )

    async def reserve(self, client: Client, buffers: int, wait_s: float) -> list[Segment] | None:
        """The segments that a rank may overwrite for its next save; None if no buffer is free within *wait_s*.

        A buffer is all segments of one version. The rank may hold *buffers* of them; when it does, the oldest version
        that is safe in tier 1 and read by no restore gives up its copy in memory. One whose other copies are damaged
        does so once a newer version is safe, or when there is nothing to wait for: else it could keep the buffer, and
        every save from it, for ever.
        """
        self.check_current(client)
        if buffers < 1:
            raise ConfigurationError("a rank needs at least one capture buffer", hint="set buffers to 1 or more")
        if not await self._catalog.wait_until(lambda: self._next_buffer(client, buffers) is not None, wait_s):
            self._metrics.saves.labels("skipped").inc()
            self._events.publish(
                "save_skipped", client.job, rank=client.rank, reason=f"no buffer was free in {wait_s:g} s"
            )
            return None
        evicted = self._next_buffer(client, buffers)
        for segment in evicted or []:
            if segment.owner is not None:
                version = self._catalog.get(*segment.owner)
                if version is not None and version.has(Tier.MEMORY):
                    reason = "its buffer is reused"
                    if not _safe(version):
                        reason += f", and its copy in tier 1 is lost: {version.copy(Tier.TIER1).error}"
                    self._catalog.set_copy(version, Tier.MEMORY, CopyState.EVICTED, reason=reason)
                segment.owner = segment.partition = None
        return [segment for segment in self._memory.of_client(client.number) if segment.owner is None]

    def has_buffer(self, client: Client, buffers: int) -> bool:
        """Whether :meth:`reserve` would answer at once, with a buffer or an error."""
        return buffers < 1 or self._next_buffer(client, buffers) is not None

    def _next_buffer(self, client: Client, buffers: int) -> list[Segment] | None:
        """What has to be given up for a buffer to be free: nothing ([]), a version's segments, or None: wait."""
        held: dict[VersionId, list[Segment]] = {}
        for segment in self._memory.of_client(client.number):
            if segment.owner is not None:
                held.setdefault(segment.owner[1], []).append(segment)
        if len(held) < buffers:
            return []
        safe, coming, lost = set[VersionId](), set[VersionId](), set[VersionId]()
        for version_id in held:
            version = self._catalog.get(client.job, version_id)
            if version is None or _safe(version):
                safe.add(version_id)
            else:
                (coming if version.state in (VersionState.OPEN, VersionState.SEALED) else lost).add(version_id)
        nothing_to_wait_for = not safe and not coming
        for version_id in sorted(held):
            superseded = version_id in lost and any(version_id < other for other in safe)
            free = version_id in safe or superseded or nothing_to_wait_for
            if free and not any(segment.readers for segment in held[version_id]):
                return held[version_id]
        return None

    def newest(self, job: str, tier: Tier) -> list[Version]:
        """The newest versions with a verified copy in *tier*, newest first: what ranks agree on a floor from.

        Those that automatic resume passes over are told only if there are no others.
        """
        held = [version for version in self._catalog.versions(job) if version.restorable and version.has(tier)]
        return ([version for version in held if not version.passed_over] or held)[:_NEWEST_TOLD]

    def persist_lost(self, client: Client) -> bool:
        """Whether the newest flagged version of this launch aborted: the next save inherits its flag."""
        for version in self._catalog.versions(client.job):
            if version.nonce == client.nonce and version.persist:
                return version.state is VersionState.ABORTED
        return False

    def trim_memory(self) -> None:
        """Give back copies that dead clients left, except each job's newest version that is in memory."""
        newest: dict[str, VersionId] = {}
        for segment in self._memory.segments.values():
            if segment.owner is not None:
                job, version_id = segment.owner
                newest[job] = max(version_id, newest.get(job, version_id))
        for segment in list(self._memory.orphans()):
            if segment.owner is None or segment.owner[1] != newest[segment.owner[0]]:
                self._give_up(segment)

    def reclaim(self, needed_bytes: int) -> None:
        """Give up dead clients' copies, oldest first, until *needed_bytes* are free or none is left to give."""
        if needed_bytes > self._memory.limit_bytes:
            return  # it will be refused anyway
        for segment in list(self._memory.orphans()):
            if self._memory.free_bytes >= needed_bytes:
                return
            self._give_up(segment)

    def _give_up(self, segment: Segment) -> None:
        version = self._catalog.get(*segment.owner) if segment.owner is not None else None
        if segment.readers or (version is not None and version.state is VersionState.SEALED):
            return
        if version is not None and version.has(Tier.MEMORY):
            self._catalog.set_copy(version, Tier.MEMORY, CopyState.EVICTED, reason="its trainer is gone")
        self._memory.release(segment)
