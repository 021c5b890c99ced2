"""A daemon without its faces: everything that decides, and what happens in answer to what.

Makes the components that need no gRPC, no sockets and no service manager, and wires the reactions between them. Time,
disk, threads, random names and object stores come in through the constructor, so that a simulation can own them all;
:class:`cairnd.app.App` adds the ways in.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field

from cairn_api.errors import CairnError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.hashing import Hashing
from cairnd.catalog.health import HealthBook
from cairnd.catalog.jobs import JobBook
from cairnd.catalog.leases import Leases
from cairnd.catalog.verified import DamagedError, VerifiedFiles
from cairnd.clock import Clock, SystemClock
from cairnd.events import EventLog
from cairnd.metrics import Metrics, StoreMetrics
from cairnd.model import CopyState, Tier, Version
from cairnd.replication.bucket import BucketRepository
from cairnd.replication.persist import Persistence
from cairnd.replication.replicator import Replicator
from cairnd.replication.storage import Storage
from cairnd.restore.fetcher import Fetcher
from cairnd.restore.inventory import Inventory
from cairnd.restore.memory_copies import MemoryCopies
from cairnd.restore.partials import KeyLocks
from cairnd.session.clients import Client, Clients
from cairnd.session.launches import Launches
from cairnd.session.memory import CaptureMemory
from cairnd.session.saves import Saves
from cairnd.session.tier1_writer import Tier1Writer, write_lanes
from cairnd.settings import Settings
from cairnd.tiers.filesystem import FileSystem, OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.tiers.metered import MeteredStore
from cairnd.tiers.object_store import ObjectStore
from cairnd.tiers.retrying import RetryingStore
from cairnd.tiers.stores import open_store
from cairnd.upkeep import room
from cairnd.upkeep.drain import Drainer
from cairnd.upkeep.keeper import Keeper
from cairnd.upkeep.looking import Judge
from cairnd.upkeep.recovery import Recovered, asked_by_itself, identify, lock, notes, open_tree, recover
from cairnd.upkeep.repair import Repairer
from cairnd.upkeep.scrubber import Scrubber
from cairnd.upkeep.verification import Verification
from cairnd.upkeep.verifier import check_tier2
from cairnd.workers import ThreadWorkers, Workers

_EXPIRY_CHECK_S = 1.0
_STOOD_STILL_S = 2 * _EXPIRY_CHECK_S
"""A daemon that looks again so late was stopped, or had no processor."""
_REQUEST_POLL_S = 30.0
_STALE_UPLOAD_S = 24 * 3600.0
"""Longer than any upload takes: other nodes' unfinished uploads look the same as those of a daemon that was killed."""

_LAST_FINDINGS_S = 5.0
"""For what was found against versions, when the deadline of a drain may have passed."""
_WORKER_THREADS = 16


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What lies around a daemon; a simulation replaces all of it.

    ``workers`` makes a pool for blocking calls, ``pools`` one for digests and the like, each by its name and its number
    of threads. ``stores`` opens the object store at a URL with these options. ``token_hex`` makes a random name of so
    many bytes.
    """

    clock: Clock = field(default_factory=SystemClock)
    fs: FileSystem = field(default_factory=OsFileSystem)
    workers: Callable[[str, int], Workers] = ThreadWorkers
    pools: Callable[[int, str], Executor] = ThreadPoolExecutor
    stores: Callable[[str, Mapping[str, str]], ObjectStore] = open_store
    token_hex: Callable[[int], str] = secrets.token_hex


class Core:
    """All that one daemon knows and does. ``recover``, then ``work`` until cancelled, then ``let_go``."""

    def __init__(self, settings: Settings, surroundings: Surroundings | None = None) -> None:
        self.settings = settings
        self.surroundings = surroundings or Surroundings()
        self.clock = self.surroundings.clock
        self.metrics = Metrics()
        self.events = EventLog(self.clock)
        self.left_alone: list[str] = []
        """What recovery found and did not touch, each with its next step."""
        self._fs = self.surroundings.fs
        self._workers = self.surroundings.workers("cairnd", _WORKER_THREADS)
        # The disk gets threads of its own: uploads that hang in a dead bucket must not hold up a save.
        self._disk = self.surroundings.workers("cairnd-disk", 3 + write_lanes(settings.drain_threads))
        self._tasks: set[asyncio.Task[None]] = set()
        self._build()

    def _build(self) -> None:
        settings, clock, events, metrics = self.settings, self.clock, self.events, self.metrics
        token_hex, pools = self.surroundings.token_hex, self.surroundings.pools
        self.tier1 = LocalTier(self._fs, open_tree(self._fs, settings.tier1_path), token_hex)
        self._lock_fd = lock(self.tier1)
        self.node = identify(self.tier1)
        self.tier1.open_to_all(layout.VERSIONS)
        self.catalog = Catalog(clock, events)
        self.jobs = JobBook(self.tier1, self._disk)
        self.leases = Leases(self.catalog)
        self.memory = CaptureMemory(settings.capture_limit_bytes(), metrics, pools)
        self.clients = Clients(clock, metrics, os.geteuid(), frozenset(settings.allowed_uids))
        self.hashing = Hashing(self._fs, pools)
        self.verified = VerifiedFiles(
            self._fs, self.tier1, self.hashing, clock, metrics, always=settings.verify_on_load == "always"
        )
        self.health = HealthBook(
            self.catalog, self.tier1, self.verified, self._disk, clock, events,
            most_resumes=settings.pass_over_after_resumes,
        )  # fmt: skip
        if settings.persistent_storage_path:
            self._open_store(settings.persistent_storage_path)  # a URL that can never work is refused now
        self.storage = Storage(
            self.node, settings.persistent_storage_path, settings.allowed_storage_locations, self._open_store,
            self._workers, events, metrics, token_hex,
        )  # fmt: skip
        self.replicator = Replicator(
            self.node, self.catalog, self.jobs, self.tier1, self.verified, self.storage, self._workers, clock, events,
            metrics, concurrency=settings.upload_concurrency, check=_read_all, on_damaged=self._on_damaged,
            on_failed=self._on_persist_failed,
            on_persisted=self._on_persisted,
        )  # fmt: skip
        locks = KeyLocks()
        self.keeper = Keeper(
            settings, self.catalog, self.jobs, self.leases, self._fs, self.tier1, self.verified, self.storage,
            self.replicator, self._workers, self._disk, clock, events, metrics, locks=locks,
        )  # fmt: skip
        self.inventory = Inventory(
            self.catalog, self.storage, self._workers, events,
            location=self.replicator.location, on_deleted=self.keeper.sweep_later,
        )  # fmt: skip
        self.persistence = Persistence(self.catalog, self.tier1, self.storage, self.replicator, self._disk, events)
        self.writer = Tier1Writer(
            self.node, self.catalog, self.tier1, self._disk, self.clients, clock, events, metrics,
            on_published=self._on_published, protect=settings.protect_files,
            threads=settings.drain_threads, bytes_per_s=settings.tier1_write_bytes_per_s,
            recheck_every=settings.recheck_one_in, pools=pools,
        )  # fmt: skip
        self.saves = Saves(
            self.catalog, self.memory, self.tier1, self._disk, clock, events, metrics,
            make_room=self.keeper.make_room, on_sealed=self.writer.put,
        )  # fmt: skip
        self.launches = Launches(
            self.catalog, self.jobs, self.leases, self.memory, self.storage, self.inventory, self.replicator, events,
            metrics,
        )  # fmt: skip
        self.memory_copies = MemoryCopies(self.catalog, self.memory, self.hashing, self.verified, self._workers)
        self.fetcher = Fetcher(
            self.node, self.catalog, self.leases, self.memory, self.memory_copies, self.tier1, self.verified,
            self.storage, self._workers, events, location=self.replicator.location, make_room=self.keeper.make_room,
            concurrency=settings.upload_concurrency, locks=locks, protect=settings.protect_files,
        )  # fmt: skip
        self.repairer = Repairer(self.catalog, self.keeper, self.fetcher, clock, events)
        judge = Judge(self.catalog, self.verified, is_deleting=self.keeper.is_deleting)
        self.scrubber = Scrubber(
            settings, self.catalog, self.tier1, self.storage, self._workers, clock, events, metrics, judge,
            location=self.replicator.location,
        )  # fmt: skip
        self.verification = Verification(
            self.catalog, self.tier1, self.storage, self.health, self._workers, judge,
            location=self.replicator.location,
        )  # fmt: skip
        self.drainer = Drainer(self.catalog, self.saves, self.persistence, self.replicator, clock, events)
        self.catalog.on_change(lambda _: self.replicator.wake())
        self.catalog.on_damaged(lambda _, tier: metrics.verify_failures.labels(tier).inc())

    async def recover(self) -> Recovered:
        """Find out what survived in tier 1 and take it in."""
        complaint = await self._disk.run(self._complaint)
        if complaint:
            self.events.publish("tier1_has_no_room", reason=complaint)  # `cairn status` shows it as long as it holds
        recovered = await self._disk.run(recover, self.tier1)
        self._take_in(recovered)
        return recovered

    async def work(self) -> None:
        """Do what has to be done until cancelled; a defect in any of it ends all of it."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.writer.run(self.saves))
            group.create_task(self.replicator.run())
            group.create_task(self.keeper.run())
            group.create_task(self.health.run())
            group.create_task(self.repairer.run())
            group.create_task(self.scrubber.run())
            group.create_task(self._look_at_bucket())
            group.create_task(self._expire())
            group.create_task(self._finish_jobs())

    async def drain(self) -> list[Version]:
        """Bring what must outlive this node to tier 2 within the deadline; returns what did not make it."""
        left: tuple[Version, ...] = ()
        async for report in self.drainer.drain(self.settings.drain_timeout_s):
            left = report.versions
        # What could not be written is found, or counted, again; a disk that hangs must not hold up the end.
        with suppress(CairnError, TimeoutError):
            async with asyncio.timeout(_LAST_FINDINGS_S):
                await self.health.settle()
        return list(left)

    async def give_up(self) -> None:
        """Begin nothing more; what was begun in the background ends."""
        self.replicator.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def let_go(self) -> None:
        """Let go of threads and of the tree, after :meth:`give_up`."""
        self._workers.close()
        self._disk.close()
        self.writer.close()
        self.hashing.close()
        self._fs.close(self._lock_fd)

    def _complaint(self) -> str:
        return room.complaint(self.tier1.root, self.tier1.total_bytes(), self.tier1.free_bytes())

    def _take_in(self, recovered: Recovered) -> None:
        for key in recovered.swept:
            self.events.publish("recovery_swept", key=key, reason="it had no manifest: it never reached tier 1")
        for key in self.health.load():
            self.left_alone.append(
                f"the record {key} is damaged: what was known against its version is forgotten; `cairn verify --deep` "
                "finds damage again, `cairn mark` sets a mark again; delete the record"
            )
        for job, version_id in recovered.lost:
            self.health.note_lost(job, version_id)
        for key, why in recovered.quarantined:
            self.health.note_missing(*layout.version_of(key), f"its manifest was damaged: {why}")
            if key not in recovered.left_alone:
                self.events.publish("manifest_quarantined", key=key, reason=why)
            self.metrics.verify_failures.labels(Tier.TIER1).inc()
        for key, error in recovered.left_alone.items():
            self.events.publish("recovery_failed", key=key, error=error)
            self.left_alone.append(
                f"{key} in tier 1 was left alone at the start, and nothing in it is used: "
                f"{error.message.rstrip('.')}; {error.hint or 'look at it'}; the next start of cairnd tries again"
            )
        self.inventory.note_unreadable(recovered.unreadable)
        for key in self.jobs.load():
            self.left_alone.append(f"the job record {key} is damaged; the job's next launch writes it anew")
        for version in recovered.versions:
            self.catalog.add(version)
            if version.copy(Tier.TIER1).state is CopyState.FAILED:
                self.metrics.verify_failures.labels(Tier.TIER1).inc()
                self.events.publish(
                    "copy_failed", version.job, version.id, tier=Tier.TIER1, error=version.copy(Tier.TIER1).error
                )
        for job, version_id in sorted(notes(self.tier1, layout.PINS)):
            self._mark(job, version_id, "pinned")
        for job, version_id in sorted(notes(self.tier1, layout.REQUESTS)):
            self._mark(job, version_id, "requested")
            if asked_by_itself(self.tier1, job, version_id):
                self._mark(job, version_id, "by_itself")

    def _mark(self, job: str, version_id: VersionId, what: str) -> None:
        version = self.catalog.get(job, version_id)
        if version is not None:
            setattr(version, what, True)

    def _on_published(self, version: Version) -> None:
        self.health.saved(version)
        self.launches.trim_memory()
        self._spawn(self._tidy(version.job))
        if not self._is_training(version.job):
            self._spawn(self._persist_newest(version.job))

    def _is_training(self, job: str) -> bool:
        """Whether a launch is connected; whoever only reads does not count."""
        return any(client.nonce for client in self.clients.of_job(job))

    def _on_persisted(self, version: Version) -> None:
        # What waited for this may go from tier 1, and what this replaces from tier 2.
        self._spawn(self._tidy(version.job))

    def _on_client_gone(self, client: Client) -> None:
        for lease in self.leases.of_client(client.number):
            self.fetcher.end(lease)
        self.memory_copies.client_gone(client.number)
        self.health.client_gone(client.number)
        self.saves.client_gone(client)
        self.launches.trim_memory()
        self.catalog.wake()
        if client.job and client.nonce and not self._is_training(client.job):
            self.events.publish("job_idle", client.job, reason="its last rank disconnected")
            self._spawn(self._persist_newest(client.job))

    def _on_persist_failed(self, version: Version, error: CairnError) -> None:
        # What time does not heal reaches the trainer: a run must not end green with nothing in the bucket.
        told = copy(error)
        told.context = {**error.context, "version": str(version.id), "tier": str(Tier.TIER2)}
        self.clients.fail(version.job, told)

    def _on_damaged(self, version: Version, error: DamagedError) -> None:
        self.catalog.set_damaged(version, Tier.TIER1, error.message)

    async def _tidy(self, job: str) -> None:
        await self.keeper.apply(job)

    async def _persist_newest(self, job: str) -> None:
        try:
            await self.persistence.request_newest(job)
        except CairnError as error:
            self.events.publish("persist_failed", job, error=error)

    async def _finish_jobs(self) -> None:
        """Ranks that ended while no daemon ran: their job's newest version must reach tier 2 all the same."""
        await self.clock.sleep(self.settings.lease_s)
        for job, version_id in self.health.lost():
            self.events.publish("version_lost", job, version_id, reason="captured, and not yet in tier 1")
        for job in self.catalog.jobs():
            if not self._is_training(job):
                await self._persist_newest(job)

    async def _look_at_bucket(self) -> None:
        """Learn what the bucket holds, at start and then now and then: other daemons of a job write there too."""
        await self._sweep_uploads()
        while True:
            await self.inventory.refresh_all()
            await self.clock.sleep(_REQUEST_POLL_S)

    async def _sweep_uploads(self) -> None:
        url = self.storage.default_url
        if not url:
            return
        try:
            bucket = await self.storage.bucket(url)
            swept = await self._workers.run(bucket.sweep_uploads, _STALE_UPLOAD_S)
        except CairnError as error:
            self.storage.note_failure(url, error)
            return
        if swept:
            self.events.publish("uploads_swept", count=swept)

    async def _expire(self) -> None:
        while True:
            before_s = self.clock.monotonic_s()
            await self.clock.sleep(_EXPIRY_CHECK_S)
            passed_s = self.clock.monotonic_s() - before_s
            if passed_s > _STOOD_STILL_S:
                # Ranks that lived meanwhile have spoken, and were not heard yet: they get the time again.
                self.clients.excuse(passed_s)
                self.saves.excuse(passed_s)
                self.events.publish("daemon_stood_still", seconds=f"{passed_s - _EXPIRY_CHECK_S:.1f}")
            self.saves.expire(
                self.settings.lease_s,
                self.settings.commit_timeout_s,
                {client.number: client for client in self.clients.all()},
            )

    def _open_store(self, url: str) -> ObjectStore:
        options = {} if url.startswith("file:") else self.settings.store_options()
        store = MeteredStore(self.surroundings.stores(url, options), StoreMetrics(self.metrics), self.clock.monotonic_s)
        # S3's store repeats by itself what failed; a folder's failures do not pass in a moment.
        return store if url.startswith(("file:", "s3:")) else RetryingStore(store)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.events.publish("defect", error=repr(task.exception()))


def _read_all(bucket: BucketRepository, version: Version, progress: Callable[[int], None]) -> Iterator[tuple[str, str]]:
    """What is wrong with a version's copy in the bucket, by path; reads every byte. Blocks."""
    for finding in check_tier2(bucket, version, deep=True, progress=progress):
        yield finding.path, finding.problem
