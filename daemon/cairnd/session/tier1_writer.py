"""From sealed to durable: writes a version's captured bytes to tier 1 and publishes its manifest.

One pass over the bytes makes the zip's checksums true, digests them and writes them past the page cache. The order is
the promise: data under temporary names, synced; renamed; folders synced; then the manifest, whose presence is what
makes the version exist; then its folder. One version is written at a time: the disk is not faster with two.

What training loses to this are processor seconds, so an operator may set how many threads take part and how many bytes
per second are written. There is no setting for priority: on full cores, niceness stretches the write and saves nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

from cairn_api.errors import CairnError, InternalError, SaveFailedError
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.clock import Clock
from cairnd.digests import BLOCK_BYTES
from cairnd.events import EventLog
from cairnd.manifest import NodeManifest
from cairnd.metrics import Metrics
from cairnd.model import CopyState, Partition, Tier, Version, VersionState
from cairnd.session.clients import Clients
from cairnd.session.draining import Draining
from cairnd.session.saves import OpenSave, Received, Saves
from cairnd.session.throttle import Throttle
from cairnd.tiers.local import LocalTier
from cairnd.workers import Workers

log = logging.getLogger("cairnd")

_LEAST_STEP_BYTES = 1024 * 1024
_STEPS_PER_S = 10
"""With a limit, the bytes of a second are written in this many steps."""


def write_lanes(drain_threads: int) -> int:
    """How many partitions *drain_threads* bring along at once: one thread writes each, another digests it."""
    return max(1, drain_threads // 2)


class Tier1Writer:
    """Takes sealed saves and brings each to tier 1, in the order in which they were sealed."""

    def __init__(
        self,
        node: str,
        catalog: Catalog,
        tier1: LocalTier,
        workers: Workers,
        clients: Clients,
        clock: Clock,
        events: EventLog,
        metrics: Metrics,
        *,
        on_published: Callable[[Version], None],
        protect: bool,
        threads: int = 2,
        bytes_per_s: int = 0,
        recheck_every: int = 1,
        pools: Callable[[int, str], Executor] = ThreadPoolExecutor,
    ) -> None:
        """*threads* of 1 digests and writes by turns. *bytes_per_s* of 0 is no limit. *pools* makes pools of threads.

        Of the pieces that clients digested while they copied, one in *recheck_every* is digested again, by turns, and
        at least one of each partition.
        """
        self._node = node
        self._catalog = catalog
        self._tier1 = tier1
        self._workers = workers
        self._clients = clients
        self._clock = clock
        self._events = events
        self._metrics = metrics
        self._on_published = on_published
        self._protect = protect
        self._lanes = asyncio.Semaphore(write_lanes(threads))
        self._digesting = pools(write_lanes(threads), "cairnd-digest") if threads > 1 else None
        self._recheck_every = recheck_every
        self._throttle = Throttle(clock, bytes_per_s)
        self._queue: asyncio.Queue[tuple[OpenSave, asyncio.Task[Exception | None]]] = asyncio.Queue()

    def put(self, save: OpenSave) -> None:
        """Queue a sealed save; never blocks. A moment later it is marked as captured, whatever waits before it."""
        self._queue.put_nowait((save, asyncio.ensure_future(self._mark(save))))

    async def run(self, saves: Saves) -> None:
        """Write what is queued, for ever. A version that fails is aborted and the rest goes on."""
        while True:
            save, marking = await self._queue.get()
            version = save.version
            started_s = self._clock.monotonic_s()
            self._catalog.set_copy(version, Tier.TIER1, CopyState.COPYING)
            try:
                version.partitions = await self._write(save, marking)
            except Exception as error:
                if not isinstance(error, CairnError):
                    log.exception("unforeseen error while writing %s", version)
                    error = InternalError(f"{type(error).__name__}: {error}", hint="report this with the daemon's log")
                self._fail(version, error)
                saves.let_go(save)
                await self._sweep(version)
                continue
            seconds = self._clock.monotonic_s() - started_s
            self._metrics.stage_seconds.labels("tier1_write").observe(seconds)
            self._metrics.stage_bytes.labels("tier1_write").inc(version.size_bytes)
            self._metrics.saves.labels("committed").inc()
            state = VersionState.COMMITTED if version.complete else VersionState.PREPARED
            self._catalog.set_copy(version, Tier.TIER1, CopyState.VERIFIED, seconds=f"{seconds:.3f}")
            self._catalog.move(version, state, bytes=version.size_bytes)
            self._on_published(version)

    def close(self) -> None:
        """Start no more digests."""
        if self._digesting is not None:
            self._digesting.shutdown(wait=False, cancel_futures=True)

    async def _mark(self, save: OpenSave) -> Exception | None:
        """Note durably that all ranks agreed: should it be lost, the next daemon tells so. Returns what failed."""
        sealed = layout.sealed(save.version.job, save.version.id)
        try:
            await self._workers.run(self._tier1.make_folders_of, [sealed])
            await self._workers.run(self._tier1.mark, sealed)
            await self._workers.run(self._tier1.sync_folders, [sealed])
        except Exception as error:  # noqa: BLE001 - told by who writes the version
            return error
        return None

    async def _write(self, save: OpenSave, marking: asyncio.Task[Exception | None]) -> tuple[Partition, ...]:
        version = save.version
        partitions = save.partitions()
        items = [save.received[partition.rank, partition.name] for partition in partitions]
        # All of them end before a failure is told: no thread uses a file any more that is given up then.
        failures: list[Exception] = []
        # The folders are made durable beside the data: later, each sync would add its wait for the disk.
        folders = [layout.partition(version.job, version.id, save.path_of(item)) for item in items]
        folders.append(layout.manifest(version.job, version.id))
        drained = (self._drain(item, version.id.sequence, failures) for item in items)
        await asyncio.gather(self._make_folders(folders, marking, failures), *drained)
        try:
            if failures:
                raise failures[0]
        finally:
            failures.clear()  # an error that holds itself would hold the buffer, until the next collection
        digested = [replace(part, digest=item.digest) for part, item in zip(partitions, items, strict=True)]
        manifest = NodeManifest.of(version, self._node, tuple(digested))
        await self._workers.run(self._publish, save, manifest)
        return manifest.partitions

    async def _drain(self, item: Received, turn: int, failures: list[Exception]) -> None:
        """Write one partition, unless it came as a stream, and note its digest; adds to *failures*, and heeds them.

        *turn* chooses what is digested again of that which the client digested.
        """
        if item.digest is not None:
            return
        async with self._lanes:
            try:
                draining = Draining(item, self._digesting, self._rechecked(item, turn))
                step_bytes = self._step_bytes(item.size_bytes)
                for start in range(0, item.size_bytes, step_bytes):
                    if failures:
                        return
                    stop = min(start + step_bytes, item.size_bytes)
                    await self._throttle.take(stop - start)
                    await self._workers.run(draining.write, start, stop)
                item.digest = await self._workers.run(draining.finish)
            except Exception as error:  # noqa: BLE001 - told by the caller
                failures.append(error)

    def _rechecked(self, item: Received, turn: int) -> range:
        count = len(item.digests.pieces) if item.digests is not None else 0
        every = max(1, min(self._recheck_every, count))
        return range(turn % every, count, every)

    async def _make_folders(
        self, keys: list[str], marking: asyncio.Task[Exception | None], failures: list[Exception]
    ) -> None:
        if (failed := await marking) is not None:
            failures.append(failed)
            return
        try:
            await self._workers.run(self._tier1.make_folders_of, keys)
        except Exception as error:  # noqa: BLE001 - told by the caller
            failures.append(error)

    def _step_bytes(self, size_bytes: int) -> int:
        if not self._throttle.bytes_per_s:
            return size_bytes
        step_bytes = self._throttle.bytes_per_s // _STEPS_PER_S // _LEAST_STEP_BYTES * _LEAST_STEP_BYTES
        return max(_LEAST_STEP_BYTES, min(step_bytes, BLOCK_BYTES))

    def _publish(self, save: OpenSave, manifest: NodeManifest) -> None:
        publish_version(
            self._tier1,
            manifest,
            {save.path_of(item): item for item in save.received.values()},
            protect=self._protect,
        )

    async def _sweep(self, version: Version) -> None:
        try:
            # The manifest may be there already, if what failed was its last sync: it goes before the data, as ever.
            await self._workers.run(self._tier1.delete, layout.manifest(version.job, version.id))
            await self._workers.run(self._tier1.delete_tree, layout.version_folder(version.job, version.id))
        except CairnError as error:  # swept at the next start
            self._events.publish("delete_failed", version.job, version.id, tier=Tier.TIER1, error=error)

    def _fail(self, version: Version, error: CairnError) -> None:
        self._metrics.stage_failures.labels("tier1_write").inc()
        self._metrics.saves.labels("aborted").inc()
        self._catalog.set_copy(version, Tier.TIER1, CopyState.FAILED, error.message)
        self._catalog.set_copy(version, Tier.MEMORY, CopyState.EVICTED)
        step = f" ({error.hint})" if error.hint else ""
        self._catalog.move(version, VersionState.ABORTED, f"lost before tier 1: {error.message}{step}")
        self._clients.fail(
            version.job,
            SaveFailedError(
                f"version {version.id} was captured but lost before it reached tier 1: {error.message}",
                hint=error.hint or "look at the daemon's log; earlier versions are intact",
                context={"version": version.id, **error.context},
            ),
        )


def publish_version(
    tier1: LocalTier, manifest: NodeManifest, items: dict[str, Received], *, protect: bool = False
) -> None:
    """Give finished temporary files their names, then publish *manifest*: the one order that survives a power cut."""
    job, version = manifest.job, manifest.id
    keys = []
    for path, item in items.items():
        key = layout.partition(job, version, path)
        if item.writer is None:
            raise InternalError(f"partition {path!r} was never written")
        tier1.publish(item.writer, key)
        keys.append(key)
    tier1.sync_folders(keys)
    if keys:
        tier1.hand_to_group(layout.job_folder(job), manifest.gid)
        tier1.hand_to_group(layout.version_folder(job, version), manifest.gid, everything=True)
    if protect:
        protect_files(tier1, keys)  # before the manifest: who sees that looks at once whether links are safe
    tier1.put_small(layout.manifest(job, version), manifest.encode())
    # From here the version exists: nothing that fails below may undo it. Who may read its manifest may read all of it.
    try:
        tier1.hand_to_group(layout.manifest(job, version), manifest.gid)
    except CairnError as error:
        log.warning("%s/%s is published, but its manifest could not be handed over: %s", job, version, error)
    try:
        # Not before: it tells that the version was captured. Unsynced, for recovery sweeps it.
        tier1.delete_tree(layout.incoming_folder(job, version), sync=False)
    except CairnError as error:
        log.warning("%s/%s is published; what was left of its save goes at the next start: %s", job, version, error)


def protect_files(tier1: LocalTier, keys: list[str]) -> None:
    """Make published files immutable; what cannot be is only told."""
    try:
        for key in keys:
            tier1.set_immutable(key)
    except CairnError as error:
        log.warning("%s; whoever trains as root gets copies in save_dir instead of links", error)
