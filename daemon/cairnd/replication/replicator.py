"""Persists: copies committed versions from tier 1 to the bucket, newest first, and makes them visible there.

The queue is not a data structure of its own: a version waits if it wants tier 2 (flagged at ``create``, or requested
since) and has no verified copy there. Both facts are durable (manifest, request note, decision key), so a daemon that
was killed goes on where it stopped. Uploading verified bytes again under the same name is harmless: names of a version
are never reused, and nothing is visible before the decision key.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass

from cairn_api.errors import CairnError, ConfigurationError, ErrorKind, OverloadedError, UnavailableError, VersionError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.jobs import JobBook, JobRecord
from cairnd.catalog.verified import DamagedError, VerifiedFiles
from cairnd.clock import Clock
from cairnd.events import EventLog
from cairnd.manifest import NodeManifest
from cairnd.metrics import Metrics
from cairnd.model import CopyState, Partition, Tier, Version, VersionState
from cairnd.replication.bucket import BucketRepository, EpochClaim, Verdict
from cairnd.replication.read_back import Check, ReadBack
from cairnd.replication.storage import Storage
from cairnd.tiers.errors import UploadCancelledError
from cairnd.tiers.local import LocalTier
from cairnd.tiers.object_store import BinarySource
from cairnd.workers import Workers

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 60.0
_LAST_REPAIR_S = 3600.0
"""Until a bucket that spoils what it is given is given it once more."""
_CLAIM_PATIENCE_S = 10.0
_OTHER_NODES_S = 2.0
_UPLOAD_DEADLINE_S = 6 * 3600.0


class RefusedError(VersionError):
    """The bucket's decision about this version is final and is not "committed": trying again is pointless."""


class EpochTakenError(ConfigurationError):
    """Another launch owns the version's epoch in the bucket. The bucket itself is well."""


@dataclass(slots=True)
class _Pace:
    """When a version may be tried again."""

    not_before_s: float = 0.0
    delay_s: float = _FIRST_RETRY_S


class Replicator:
    """Runs as one task; ``wake`` after anything that may have made a version eligible."""

    def __init__(
        self,
        node: str,
        catalog: Catalog,
        jobs: JobBook,
        tier1: LocalTier,
        verified: VerifiedFiles,
        storage: Storage,
        workers: Workers,
        clock: Clock,
        events: EventLog,
        metrics: Metrics,
        *,
        concurrency: int,
        check: Check,
        on_damaged: Callable[[Version, DamagedError], None],
        on_failed: Callable[[Version, CairnError], None],
        on_persisted: Callable[[Version], None],
    ) -> None:
        self._node = node
        self._catalog = catalog
        self._jobs = jobs
        self._tier1 = tier1
        self._verified = verified
        self._storage = storage
        self._workers = workers
        self._clock = clock
        self._events = events
        self._metrics = metrics
        self._on_damaged = on_damaged
        self._on_failed = on_failed
        self._on_persisted = on_persisted
        self._slots = asyncio.Semaphore(concurrency)
        self._awake = asyncio.Event()
        self._pace: dict[tuple[str, VersionId], _Pace] = {}
        self._waiting_since_s: dict[tuple[str, VersionId], float] = {}
        self._read_back = ReadBack(catalog, workers, check)
        self._reading: set[tuple[str, VersionId]] = set()
        self._cancel = threading.Event()
        self.running: Version | None = None

    def waiting_s(self, version: Version) -> float:
        """How long *version* of the backlog has waited: by a clock that nobody sets, and by the other before that."""
        now_s = self._clock.monotonic_s()
        before_s = max(0.0, self._clock.now_s() - version.created_s) if version.created_s else 0.0
        return now_s - self._waiting_since_s.setdefault((version.job, version.id), now_s - before_s)

    def wake(self, version: Version | None = None) -> None:
        """Look for work again; *version*, if given, is what changed."""
        if version is not None:
            self._pace.pop((version.job, version.id), None)
        self._awake.set()

    def cancel(self) -> None:
        """Have uploads that are under way stop soon; nothing they did becomes visible."""
        self._cancel.set()

    def backlog(self) -> list[Version]:
        """Versions that want tier 2 and are not there, newest first (within a job: commit order)."""
        waiting = [
            version
            for version in self._catalog.versions()
            if version.wants_tier2
            and version.has(Tier.TIER1)
            and version.state in (VersionState.PREPARED, VersionState.COMMITTED)
            and not version.has(Tier.TIER2)
            and not self.refused(version)
            and self.location(version.job)
        ]
        return sorted(waiting, key=lambda version: version.id, reverse=True)

    @staticmethod
    def refused(version: Version) -> bool:
        """Whether the bucket will never take *version*: it was fenced off or deleted there."""
        return version.copy(Tier.TIER2).state is CopyState.EVICTED

    def location(self, job: str) -> str:
        """The URL of the bucket that *job* persists to; empty if there is none."""
        record = self._jobs.get(job)
        return (record.storage_url if record is not None else "") or self._storage.default_url

    async def run(self) -> None:
        """Persist what waits, for ever. A version that fails is tried again later; the others go on."""
        async with asyncio.TaskGroup() as group:  # reading back takes long, and holds up no newer version
            while True:
                self._awake.clear()
                self._show()
                now_s = self._clock.monotonic_s()
                waiting = [version for version in self.backlog() if (version.job, version.id) not in self._reading]
                paced = [(self._pace.setdefault((v.job, v.id), _Pace()), v) for v in waiting]
                ready = [version for pace, version in paced if pace.not_before_s <= now_s]
                if ready:
                    await self._try(ready[0], group)
                    continue
                pause_s = min((pace.not_before_s - now_s for pace, _ in paced), default=_LAST_RETRY_S)
                await self._sleep(max(pause_s, 0.0))

    async def _sleep(self, duration_s: float) -> None:
        sleeper = asyncio.ensure_future(self._clock.sleep(duration_s))
        waker = asyncio.ensure_future(self._awake.wait())
        try:
            await asyncio.wait({sleeper, waker}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeper.cancel()
            waker.cancel()

    async def _try(self, version: Version, group: asyncio.TaskGroup) -> None:
        pace = self._pace[version.job, version.id]
        url, started_s = self.location(version.job), self._clock.monotonic_s()
        self.running = version
        try:
            visible = await self._persist(version, url)
        except DamagedError as error:
            self._catalog.set_copy(version, Tier.TIER2, CopyState.FAILED, error.message)
            self._on_damaged(version, error)
            return
        except CairnError as error:
            if not isinstance(error, EpochTakenError):
                self._storage.note_failure(url, error)
            self._metrics.stage_failures.labels("tier2_upload").inc()
            if version.restorable:
                state = CopyState.EVICTED if isinstance(error, RefusedError) else CopyState.FAILED
                if error.kind is not ErrorKind.RETRY and version.copy(Tier.TIER2).error != str(error):
                    self._on_failed(version, error)
                self._catalog.set_copy(version, Tier.TIER2, state, str(error))
            self._put_off(pace, _LAST_RETRY_S)
            return
        finally:
            self.running = None
        self._storage.note_answer(url)
        damaged = version.copy(Tier.TIER2).damaged
        if not visible:
            pace.not_before_s = self._clock.monotonic_s() + (_LAST_RETRY_S if damaged else _OTHER_NODES_S)
            return
        seconds = self._clock.monotonic_s() - started_s
        if damaged:
            self._reading.add((version.job, version.id))
            group.create_task(self._acquit(version, url, pace, seconds))
        else:
            self._arrived(version, seconds)

    def _put_off(self, pace: _Pace, longest_s: float) -> None:
        pace.not_before_s = self._clock.monotonic_s() + pace.delay_s
        pace.delay_s = min(pace.delay_s * 2, longest_s)

    async def _acquit(self, version: Version, url: str, pace: _Pace, seconds: float) -> None:
        """Believe a copy that was found damaged, and uploaded again, when all of it was read back."""
        try:
            bucket = await self._storage.bucket(url)
            whole = await self._read_back.read(version, bucket, self._go_on)
        except CairnError as error:
            whole = False
            self._storage.note_failure(url, error)
            self._metrics.stage_failures.labels("tier2_upload").inc()
        finally:
            self._reading.discard((version.job, version.id))
        if whole:
            self._arrived(version, seconds)
        else:
            self._put_off(pace, _LAST_RETRY_S if self._read_back.is_sent(version) else _LAST_REPAIR_S)
        self.wake()

    def _go_on(self, _size_bytes: int) -> None:
        if self._cancel.is_set():
            raise UploadCancelledError("reading back what was uploaded was cancelled")

    def _arrived(self, version: Version, seconds: float) -> None:
        self._pace.pop((version.job, version.id), None)
        self._metrics.stage_seconds.labels("tier2_upload").observe(seconds)
        self._metrics.stage_bytes.labels("tier2_upload").inc(version.size_bytes)
        self._metrics.last_persisted_sequence.labels(version.job).set(version.id.sequence)
        self._metrics.last_persisted_time_s.labels(version.job).set(self._clock.now_s())
        self._catalog.set_copy(version, Tier.TIER2, CopyState.VERIFIED, seconds=f"{seconds:.3f}")
        if version.state is VersionState.PREPARED:
            self._catalog.move(version, VersionState.COMMITTED)
        self._on_persisted(version)

    async def _persist(self, version: Version, url: str) -> bool:
        """Upload and decide; False if other nodes' parts are still missing, or damaged."""
        bucket = await self._storage.bucket(url)
        await self._ensure_claim(version, bucket)
        decision = await self._workers.run(bucket.decision, version.job, version.id)
        manifest = NodeManifest.of(version, self._node, version.partitions)
        # A copy that failed may have failed because the bucket's bytes rotted: sending them again repairs it.
        # Not if only other nodes can: then this one's part has been sent again since.
        again = version.copy(Tier.TIER2).state is CopyState.FAILED or version.copy(Tier.TIER2).damaged
        again = again and not self._read_back.is_sent(version)
        wanted = decision is None or (decision.verdict is Verdict.COMMITTED and again)
        if wanted and (again or not await self._workers.run(bucket.has_manifest, manifest)):
            self._catalog.set_copy(version, Tier.TIER2, CopyState.COPYING)
            await self._upload_all(version, bucket)
            named = None if decision is None else decision.document["manifests"].get(self._node)
            if decision is None or named == manifest.fingerprint():
                # After the decision no manifest may be added: readers believe exactly those that it names.
                await self._workers.run(bucket.put_manifest, manifest)
        if decision is None:
            decision = await self._workers.run(bucket.commit, version.job, version.id, version.world_size)
        if decision is None:
            return False
        if decision.verdict is not Verdict.COMMITTED or decision.document["nonce"] != version.nonce:
            raise RefusedError(
                f"{version} is {decision.verdict} in the bucket",
                hint="a later launch of the job fenced it off, or it was deleted there; tier 1 still has it",
            )
        if version.copy(Tier.TIER2).damaged:
            return await self._read_back.is_due(version, bucket)
        if again:
            await self._workers.run(bucket.committed, version.job, version.id, decision)  # what it needs to be read
        return True

    async def _upload_all(self, version: Version, bucket: BucketRepository) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for partition in version.partitions:
                    group.create_task(self._upload(version, partition, bucket))
        except ExceptionGroup as failed:
            # One failure ends the others; the first tells what to do.
            raise failed.exceptions[0] from None

    async def _upload(self, version: Version, partition: Partition, bucket: BucketRepository) -> None:
        async with self._slots:
            key = layout.partition(version.job, version.id, partition.path)
            target = layout.Bucket.partition(version.job, version.id, partition.path)
            await self._workers.run(self._send, bucket, key, target, partition)

    def _send(self, bucket: BucketRepository, key: str, target: str, partition: Partition) -> None:
        # What becomes visible was read and compared: a rotten tier 1 copy never reaches the bucket.
        if not bucket.store.capabilities.checks_source:
            self._verified.check(key, partition)
        try:
            identity = self._tier1.identity(key)
            fd = self._tier1.open_read(key)
            try:
                bucket.store.upload(
                    target,
                    BinarySource(fd, partition.size_bytes, partition.digest),
                    progress=lambda _: None,
                    cancelled=self._cancel.is_set,
                    deadline_s=_UPLOAD_DEADLINE_S,
                )
            finally:
                self._tier1.close(fd)
        except VersionError:
            self._verified.check(key, partition, again=True)  # says so, and which block, if it is this copy's fault
            raise
        if bucket.store.capabilities.checks_source and self._tier1.identity(key) == identity:
            self._verified.trust(key, partition)

    async def _ensure_claim(self, version: Version, bucket: BucketRepository) -> None:
        """The launch that wrote *version* must own its epoch in the bucket, else nothing is uploaded."""
        nonce = await self._workers.run(bucket.epoch_nonce, version.job, version.id.epoch)
        if nonce is None:
            record = self._jobs.get(version.job)
            resumed_from = record.resumed_from if record is not None and record.nonce == version.nonce else None
            claim = EpochClaim(version.id.epoch, version.nonce, version.world_size, resumed_from)
            if await self._workers.run(bucket.claim_epoch, version.job, claim):
                nonce = version.nonce
                if record is not None and record.nonce == version.nonce and record.provisional:
                    await self._jobs.change(version.job, provisional=False)
        if nonce != version.nonce:
            raise EpochTakenError(
                f"epoch {version.id.epoch} of job {version.job!r} belongs to another launch in the bucket",
                hint="two launches ran under one job name without seeing the same bucket: give each its own job name; "
                "`cairn export` saves this version",
                context={"version": version.id},
            )

    async def claim(self, record: JobRecord, claim: EpochClaim) -> tuple[bool, bool]:
        """Claim an epoch for a launch that starts: ``(taken by another, provisional)``. Fences earlier launches.

        A bucket that hangs must not hold up the first save: after a few seconds the epoch is provisional. Should the
        claim still arrive, it carries this launch's nonce and is recognised before anything is uploaded.
        """
        claiming = asyncio.ensure_future(self._claim(record, claim))
        if (await asyncio.wait({claiming}, timeout=_CLAIM_PATIENCE_S))[0]:
            return claiming.result()
        claiming.add_done_callback(lambda late: late.cancelled() or late.exception())
        self._events.publish("epoch_provisional", record.job, epoch=claim.epoch, error="tier 2 does not answer")
        return False, True

    async def _claim(self, record: JobRecord, claim: EpochClaim) -> tuple[bool, bool]:
        try:
            bucket = await self._storage.bucket(self.location(record.job))
            if not await self._workers.run(bucket.claim_epoch, record.job, claim):
                return True, False
        except (UnavailableError, ConfigurationError, OverloadedError) as error:
            self._events.publish("epoch_provisional", record.job, epoch=claim.epoch, error=error)
            return False, True
        # What tier 1 of this node still holds may yet be finished; the rest of earlier launches is fenced off.
        held = {version.id for version in self._catalog.versions(record.job) if version.has(Tier.TIER1)}
        try:
            await self._workers.run(self._fence, bucket, record.job, claim.epoch, held)
        except CairnError as error:  # the claim stands; automatic resume passes over what escaped the fence
            self._events.publish("fence_incomplete", record.job, epoch=claim.epoch, error=error)
        return False, False

    def _fence(self, bucket: BucketRepository, job: str, epoch: int, held: set[VersionId]) -> None:
        for version in bucket.undecided(job, before_epoch=epoch):
            if version not in held and not bucket.prepared_everywhere(job, version):
                bucket.abort(job, version, f"not prepared on all nodes when epoch {epoch} began")

    def _show(self) -> None:
        backlog = self.backlog()
        waiting = {(version.job, version.id) for version in backlog}
        self._waiting_since_s = {key: since_s for key, since_s in self._waiting_since_s.items() if key in waiting}
        self._metrics.backlog_versions.set(len(backlog))
        self._metrics.backlog_bytes.set(sum(version.size_bytes for version in backlog))
        self._metrics.oldest_unpersisted_age_s.set(max((self.waiting_s(version) for version in backlog), default=0.0))
