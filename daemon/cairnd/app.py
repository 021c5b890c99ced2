"""The composition root: the only place that makes components and knows all of them. Start and stop order live here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path

from cairn_api.errors import CairnError, ConfigurationError
from cairn_api.names import VersionId
from cairnd import __version__, layout
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.hashing import Hashing
from cairnd.catalog.jobs import JobBook
from cairnd.catalog.leases import Leases
from cairnd.catalog.verified import DamagedError, VerifiedFiles
from cairnd.clock import Clock, SystemClock
from cairnd.events import EventLog
from cairnd.metrics import Metrics, StoreMetrics
from cairnd.model import CopyState, Tier, Version
from cairnd.notify import Notifier
from cairnd.replication.persist import Persistence
from cairnd.replication.replicator import Replicator
from cairnd.replication.storage import Storage
from cairnd.restore.fetcher import Fetcher
from cairnd.restore.inventory import Inventory
from cairnd.restore.memory_copies import MemoryCopies
from cairnd.rpc.admin_service import AdminService
from cairnd.rpc.brief import BriefCalls
from cairnd.rpc.report import Reporter
from cairnd.rpc.restore_service import RestoreService
from cairnd.rpc.save_service import SaveService
from cairnd.rpc.server import RpcServer
from cairnd.rpc.side_socket import SideSocket
from cairnd.rpc.status import public_class
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
from cairnd.upkeep.drain import Drainer
from cairnd.upkeep.keeper import Keeper
from cairnd.upkeep.recovery import Recovered, identify, lock, notes, open_tree, recover
from cairnd.workers import ThreadWorkers, Workers

_EXPIRY_CHECK_S = 1.0
_REQUEST_POLL_S = 30.0
_STALE_UPLOAD_S = 24 * 3600.0
"""Longer than any upload takes: other nodes' unfinished uploads look the same as those of a daemon that was killed."""

_WORKER_THREADS = 16


class App:
    """One daemon. ``start``, then ``run`` until cancelled, then ``stop``."""

    def __init__(
        self,
        settings: Settings,
        environment: Mapping[str, str],
        *,
        clock: Clock | None = None,
        fs: FileSystem | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.settings = settings
        self.clock = clock or SystemClock()
        self.metrics = Metrics()
        self.events = EventLog(self.clock)
        self.notifier = Notifier(environment)
        self._fs = fs or OsFileSystem()
        self._workers = workers or ThreadWorkers("cairnd", _WORKER_THREADS)
        # The disk gets threads of its own: uploads that hang in a dead bucket must not hold up a save.
        self._disk = workers or ThreadWorkers("cairnd-disk", 3 + write_lanes(settings.drain_threads))
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop_metrics: Callable[[], None] = lambda: None
        self._build()

    def _build(self) -> None:
        settings, clock, events, metrics = self.settings, self.clock, self.events, self.metrics
        self.runtime_dir = _runtime_dir(settings.runtime_dir)
        self.tier1 = LocalTier(self._fs, open_tree(settings.tier1_path))
        self._lock_fd = lock(self.tier1)
        self.node = identify(self.tier1)
        self.tier1.open_to_all(layout.VERSIONS)
        self.boot = secrets.token_hex(16)
        self.catalog = Catalog(clock, events)
        self.jobs = JobBook(self.tier1, self._disk)
        self.leases = Leases(self.catalog)
        self.memory = CaptureMemory(settings.capture_limit_bytes(), metrics)
        self.clients = Clients(clock, metrics, os.geteuid(), frozenset(settings.allowed_uids))
        self.hashing = Hashing(self._fs)
        self.verified = VerifiedFiles(
            self._fs, self.tier1, self.hashing, clock, metrics, always=settings.verify_on_load == "always"
        )
        if settings.persistent_storage_path:
            self._open_store(settings.persistent_storage_path)  # a URL that can never work is refused now
        self.storage = Storage(
            self.node, settings.persistent_storage_path, settings.allowed_storage_locations, self._open_store,
            self._workers, events, metrics,
        )  # fmt: skip
        self.replicator = Replicator(
            self.node, self.catalog, self.jobs, self.tier1, self.verified, self.storage, self._workers, clock, events,
            metrics, concurrency=settings.upload_concurrency, on_damaged=self._on_damaged,
            on_failed=self._on_persist_failed,
            on_persisted=self._on_persisted,
        )  # fmt: skip
        self.keeper = Keeper(
            settings, self.catalog, self.jobs, self.leases, self._fs, self.tier1, self.verified, self.storage,
            self.replicator, self._workers, self._disk, clock, events, metrics,
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
            recheck_every=settings.recheck_one_in,
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
            self.storage, self._workers, events, metrics, location=self.replicator.location,
            make_room=self.keeper.make_room, concurrency=settings.upload_concurrency,
        )  # fmt: skip
        self.drainer = Drainer(self.catalog, self.saves, self.persistence, self.replicator, clock, events)
        self.reporter = Reporter(
            self.node, clock, self.catalog, self.clients, self.memory, self.saves, self.keeper, self.replicator,
            self.storage, self.tier1, self._disk, metrics,
        )  # fmt: skip
        save_service = SaveService(
            self.node, settings.tier1_path, settings.lease_s, settings.protect_files, self.clients, self.launches,
            self.saves, self.catalog, self.memory, self.keeper, self.replicator, self.persistence, self._disk,
        )  # fmt: skip
        restore_service = RestoreService(
            self.clients, self.catalog, self.jobs, self.leases, self.inventory, self.fetcher, self._fs, self._workers
        )
        self.side_socket = SideSocket(
            self.runtime_dir, self.node, self.boot, self.clients, self.memory, self.leases, self.fetcher,
            self.memory_copies, BriefCalls(self.clients, self.launches, save_service, restore_service),
            on_gone=self._on_client_gone, tier1_root=self.tier1.root,
        )  # fmt: skip
        self.server = RpcServer(
            self.runtime_dir,
            self.clients,
            save_service,
            restore_service,
            AdminService(
                self.clients, self.catalog, self.jobs, self.inventory, self.keeper, self.replicator, self.persistence,
                self.storage, self.drainer, self.reporter, events, self._fs, self.tier1, self._workers,
            ),
        )  # fmt: skip
        self.catalog.on_change(lambda _: self.replicator.wake())

    async def start(self) -> None:
        """Recover tier 1, open the sockets, tell systemd."""
        recovered = await self._disk.run(recover, self.tier1)
        await self._disk.run(self.tier1.delete_tree, layout.FETCHED)
        self._take_in(recovered)
        if self.settings.metrics_address:
            self._stop_metrics = self.metrics.serve(self.settings.metrics_address)
        self.side_socket.start()
        await self.server.start()
        held = len(recovered.versions)
        self.events.publish("daemon_started", daemon_version=__version__, node=self.node, versions=held)
        self.notifier.ready(f"{held} versions in tier 1")

    async def run(self) -> None:
        """Serve until cancelled. A defect in any background task ends the daemon: it must not limp on unnoticed."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.side_socket.run())
            group.create_task(self.writer.run(self.saves))
            group.create_task(self.replicator.run())
            group.create_task(self.keeper.run())
            group.create_task(self._look_at_bucket())
            group.create_task(self._expire())
            group.create_task(self._finish_jobs())
            if self.notifier.watchdog_interval_s:
                group.create_task(self._feed_watchdog())

    async def drain_and_stop(self) -> list[Version]:
        """SIGTERM: bring what must outlive this node to tier 2 within the deadline; returns what did not make it."""
        self.notifier.stopping("bringing versions to tier 2")
        await self.server.set_serving(False)
        left: tuple[Version, ...] = ()
        async for report in self.drainer.drain(self.settings.drain_timeout_s):
            left = report.versions
        return list(left)

    async def stop(self) -> None:
        """Close the sockets and let go of everything; safe after a failed start."""
        self.replicator.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.side_socket.stop()
        await self.server.stop()
        self._stop_metrics()
        self._workers.close()
        self._disk.close()
        self.writer.close()
        self.hashing.close()
        os.close(self._lock_fd)
        self.events.publish("daemon_stopped")

    def _take_in(self, recovered: Recovered) -> None:
        for key in recovered.swept:
            self.events.publish("recovery_swept", key=key, reason="it had no manifest: it never reached tier 1")
        for key, why in recovered.quarantined:
            self.events.publish("manifest_quarantined", key=key, reason=why)
            self.reporter.left_alone.append(
                f"{key} was moved to {layout.QUARANTINE}: {why}; look at it, then delete it"
            )
        for key in self.jobs.load():
            self.reporter.left_alone.append(f"the job record {key} is damaged; the job's next launch writes it anew")
        for version in recovered.versions:
            self.catalog.add(version)
            if version.copy(Tier.TIER1).state is CopyState.FAILED:
                self.events.publish(
                    "copy_failed", version.job, version.id, tier=Tier.TIER1, error=version.copy(Tier.TIER1).error
                )
        for job, version_id in notes(self.tier1, layout.PINS):
            self._mark(job, version_id, "pinned")
        for job, version_id in notes(self.tier1, layout.REQUESTS):
            self._mark(job, version_id, "requested")

    def _mark(self, job: str, version_id: VersionId, what: str) -> None:
        version = self.catalog.get(job, version_id)
        if version is not None:
            setattr(version, what, True)

    def _on_published(self, version: Version) -> None:
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
        self.saves.client_gone(client)
        self.launches.trim_memory()
        self.catalog.wake()
        if client.job and client.nonce and not self._is_training(client.job):
            self.events.publish("job_idle", client.job, reason="its last rank disconnected")
            self._spawn(self._persist_newest(client.job))

    def _on_persist_failed(self, version: Version, error: CairnError) -> None:
        # What time does not heal reaches the trainer: a run must not end green with nothing in the bucket.
        context = {**error.context, "version": version.id, "tier": Tier.TIER2}
        self.clients.fail(version.job, public_class(error)(error.message, hint=error.hint, context=context))

    def _on_damaged(self, version: Version, error: DamagedError) -> None:
        self.catalog.set_copy(version, Tier.TIER1, CopyState.FAILED, error.message)

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
        for job in self.catalog.jobs():
            if not self._is_training(job):
                await self._persist_newest(job)

    async def _look_at_bucket(self) -> None:
        """Learn what the bucket holds, at start and then now and then: other daemons of a job write there too."""
        await self._sweep_uploads()
        while True:
            await self.inventory.refresh_all()
            await self.reporter.refresh()
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
            await self.clock.sleep(_EXPIRY_CHECK_S)
            self.saves.expire(
                self.settings.lease_s,
                self.settings.commit_timeout_s,
                {client.number: client for client in self.clients.all()},
            )

    async def _feed_watchdog(self) -> None:
        while True:
            self.notifier.alive()
            await self.clock.sleep(self.notifier.watchdog_interval_s)

    def _open_store(self, url: str) -> ObjectStore:
        options = {} if url.startswith("file:") else self.settings.store_options()
        store = MeteredStore(open_store(url, options), StoreMetrics(self.metrics), self.clock.monotonic_s)
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


def _runtime_dir(path: str) -> Path:
    folder = Path(path)
    with contextlib.suppress(FileExistsError):
        try:
            folder.mkdir(mode=0o755, parents=True)
        except OSError as error:
            if not isinstance(error, FileExistsError):
                raise ConfigurationError(
                    f"cannot make the runtime folder {path}: {error}",
                    hint="set runtime_dir to a folder cairnd may make",
                ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"the runtime folder {path} is not writable for user {os.geteuid()}", hint="own it, or set runtime_dir"
        )
    return folder
