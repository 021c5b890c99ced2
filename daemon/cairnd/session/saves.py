"""Saves in progress: from ``create`` to the moment when all ranks agreed.

One :class:`OpenSave` per version collects what the ranks of this node hand over. It ends in exactly one of *sealed*
(the bytes are held here; the daemon finishes whatever becomes of the ranks) or *aborted*. Elapsed time never ends a
sealed save, and a dead client never takes back what all ranks agreed on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cairn_api.errors import CairnError, ConfigurationError, OverloadedError, SaveFailedError, VersionError
from cairn_api.names import VersionId, check_partition, stored_path
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.clock import Clock
from cairnd.digests import Digest
from cairnd.events import EventLog
from cairnd.metrics import Metrics
from cairnd.model import CopyState, Partition, Tier, Version, VersionState
from cairnd.records import PieceDigests, RecordTable
from cairnd.session.clients import Client
from cairnd.session.memory import CaptureMemory, Segment
from cairnd.session.rules import (
    check_created,
    check_launch,
    check_new,
    check_paths,
    check_same_launch,
    check_texts,
    clash,
)
from cairnd.tiers.atomic import BulkWriter
from cairnd.tiers.local import LocalTier
from cairnd.workers import Workers, to_the_end


@dataclass(slots=True, eq=False)
class Received:
    """One partition as it was handed over: in a segment, or (``digest`` set) already written to its temporary file."""

    name: str
    rank: int
    size_bytes: int
    globals: tuple[str, ...]
    segment: Segment | None = None
    records: RecordTable | None = None
    digests: PieceDigests | None = None
    writer: BulkWriter | None = None
    digest: Digest | None = None


@dataclass(slots=True, eq=False)
class OpenSave:
    """What this node has received of one version."""

    version: Version
    received: dict[tuple[int, str], Received] = field(default_factory=dict)
    prepared: set[int] = field(default_factory=set)
    clients: set[int] = field(default_factory=set)
    touched_s: float = 0.0
    next_incoming: int = 0
    shared_names: dict[tuple[int, str], bool] = field(default_factory=dict)
    node_ranks: frozenset[int] = frozenset()
    agreed: bool = False

    def incoming_key(self) -> str:
        """A temporary key for the next partition."""
        self.next_incoming += 1
        return layout.incoming(self.version.job, self.version.id, self.next_incoming)

    def path_of(self, item: Received) -> str:
        """Where the partition will lie below the version."""
        return stored_path(item.name, item.rank, shared_name=(item.rank, item.name) in self.shared_names)

    def partitions(self) -> tuple[Partition, ...]:
        """The partitions in a stable order; digests are those known so far."""
        return tuple(
            Partition(item.name, self.path_of(item), item.rank, item.size_bytes, item.digest, item.globals)
            for _, item in sorted(self.received.items())
        )


class Saves:
    """All open saves of this node. Used from the event loop's thread; disk work goes to *workers*."""

    def __init__(
        self,
        catalog: Catalog,
        memory: CaptureMemory,
        tier1: LocalTier,
        workers: Workers,
        clock: Clock,
        events: EventLog,
        metrics: Metrics,
        *,
        make_room: Callable[[int, str], Awaitable[None]],
        on_sealed: Callable[[OpenSave], None],
    ) -> None:
        self._catalog = catalog
        self._memory = memory
        self._tier1 = tier1
        self._workers = workers
        self._clock = clock
        self._events = events
        self._metrics = metrics
        self._make_room = make_room
        self._on_sealed = on_sealed
        self._open: dict[tuple[str, VersionId], OpenSave] = {}
        self._discards: set[asyncio.Task[None]] = set()
        self.draining = False

    def open_saves(self) -> list[OpenSave]:
        """Saves that are neither sealed nor aborted."""
        return list(self._open.values())

    def create(
        self,
        client: Client,
        version_id: VersionId,
        *,
        rank: int,
        world_size: int,
        nonce: str,
        save_dir: str,
        persist: bool,
        file_marks: bool,
        attributes: Mapping[str, str],
        node_ranks: Sequence[int] = (),
    ) -> Version:
        """Open the version, or join it when another rank of this node has; a repeated call returns what it became."""
        if self.draining:
            raise OverloadedError("this daemon is draining", hint="restart cairnd to accept saves again")
        claimed = (client.epoch, client.nonce)
        check_launch(client.job, version_id, rank=rank, world_size=world_size, nonce=nonce, claimed=claimed)
        check_created(save_dir, attributes, node_ranks, world_size)
        known = self._catalog.get(client.job, version_id)
        if known is not None:
            check_same_launch(known, nonce=nonce, world_size=world_size)
            save = self._open.get((client.job, version_id))
            if save is not None:
                save.clients.add(client.number)
                save.node_ranks |= frozenset(node_ranks)
                save.touched_s = self._clock.monotonic_s()
            return known
        version = self._catalog.add(
            Version(
                job=client.job, id=version_id, state=VersionState.OPEN, world_size=world_size, nonce=nonce,
                save_dir=save_dir, persist=persist, file_marks=file_marks, created_s=self._clock.now_s(),
                uid=client.uid, gid=client.gid, attributes=dict(attributes),
            )
        )  # fmt: skip
        save = OpenSave(
            version,
            clients={client.number},
            touched_s=self._clock.monotonic_s(),
            node_ranks=frozenset(node_ranks),
        )
        self._open[client.job, version_id] = save
        self._events.publish("version_open", client.job, version_id, rank=rank, world_size=world_size, persist=persist)
        return version

    def seal(
        self,
        client: Client,
        version_id: VersionId,
        *,
        rank: int,
        name: str,
        segment_name: str,
        size_bytes: int,
        records: RecordTable,
        globals_: Sequence[str],
        digests: PieceDigests,
    ) -> None:
        """Take over a partition that lies in a shared buffer. What it replaces (a repeated call's) is let go."""
        save = self._require(client, version_id)
        self._check_new(save, rank, name, size_bytes)
        segment = self._memory.segments.get(segment_name)
        if segment is None or segment.client != client.number:
            raise ConfigurationError(
                f"partition {name!r} names a capture buffer that this daemon does not hold",
                hint="offer the buffer on the side socket before sealing a partition in it",
            )
        if not 0 < size_bytes <= segment.size_bytes:
            raise ConfigurationError(f"partition {name!r} has {size_bytes} bytes, its buffer {segment.size_bytes}")
        owner = (save.version.job, version_id)
        if segment.readers or (segment.owner not in (None, owner)):
            raise ConfigurationError(f"the capture buffer of partition {name!r} still holds another version")
        if segment.owner == owner and segment.partition != (rank, name):
            raise ConfigurationError(f"the capture buffer of partition {name!r} holds another partition")
        if records == segment.records:
            records = segment.records  # which was checked: the rank waits for this
        records.validate(size_bytes)
        check_texts("globals", globals_)
        digests.validate(size_bytes, records)
        segment.records = records
        self._drop(save, rank, name)
        segment.owner, segment.partition = owner, (rank, name)
        save.received[rank, name] = Received(name, rank, size_bytes, tuple(globals_), segment, records, digests)

    async def begin_stream(
        self, client: Client, version_id: VersionId, *, rank: int, name: str, size_bytes: int
    ) -> BulkWriter:
        """A temporary file in tier 1 for a partition that comes as a stream; discard it if the stream fails."""
        save = self._require(client, version_id)
        self._check_new(save, rank, name, size_bytes)
        return await self._reserve(save, size_bytes)

    def check_open(self, client: Client, version_id: VersionId) -> None:
        """Raises if the version accepts no more bytes, why; a sign of progress if it does."""
        self._require(client, version_id)

    def end_stream(
        self,
        client: Client,
        version_id: VersionId,
        *,
        rank: int,
        name: str,
        globals_: Sequence[str],
        writer: BulkWriter,
        digest: Digest,
    ) -> None:
        """Take over a streamed partition whose temporary file is finished."""
        save = self._require(client, version_id)
        self._check_new(save, rank, name, digest.size_bytes)
        self._drop(save, rank, name)
        save.received[rank, name] = Received(
            name, rank, digest.size_bytes, tuple(globals_), writer=writer, digest=digest
        )

    async def prepare(self, client: Client, version_id: VersionId, *, rank: int, names: Sequence[str]) -> None:
        """Check that everything the rank saved is held, and reserve its place in tier 1.

        After this a full disk can no longer fail the version. Raises :class:`SaveFailedError` when something is
        missing and :class:`OverloadedError` when tier 1 has no room even after retention.
        """
        known = self._catalog.get(client.job, version_id)
        if known is not None and known.restorable:
            return
        save = self._require(client, version_id)
        if not 0 <= rank < save.version.world_size:
            raise ConfigurationError(f"rank {rank} is outside a world of {save.version.world_size}")
        missing = sorted(set(names) - {name for owner, name in save.received if owner == rank})
        if missing:
            raise SaveFailedError(
                f"the daemon does not hold partition {missing[0]!r} of rank {rank}",
                hint="it was restarted and the partition could not be offered again; save again",
                context={"version": version_id, "rank": rank},
            )
        check_paths([name for _, name in save.received])
        for key, item in list(save.received.items()):
            if item.rank == rank and item.writer is None:
                writer = await self._reserve(save, item.size_bytes)
                current = save.received.get(key)
                if current is item and current.writer is None:
                    current.writer = writer
                else:
                    await to_the_end(self._workers.run(writer.discard))  # a repeated call came first
        if save.version.state is not VersionState.OPEN:
            raise self._aborted(save.version)
        save.prepared.add(rank)
        save.touched_s = self._clock.monotonic_s()
        if save.agreed:
            self._seal_if_whole(save)

    def commit(self, client: Client, version_id: VersionId, *, shared_names: Sequence[tuple[str, int]]) -> Version:
        """All ranks agreed: seal the version. The first rank of this node to say so does it, the others repeat it."""
        version = self._catalog.require(client.job, version_id)
        if version.restorable:
            return version
        save = self._require(client, version_id)
        if not save.prepared:
            raise ConfigurationError(f"version {version_id} was committed before any rank had prepared it")
        shared = {(rank, check_partition(name)): True for name, rank in shared_names}
        paths = [stored_path(name, rank, shared_name=(rank, name) in shared) for rank, name in save.received]
        check_paths(paths)
        if len(paths) != len(set(paths)):
            raise ConfigurationError(
                f"two ranks saved version {version_id} under the same partition name, and only one of them was told",
                hint="name every rank but the lowest in Commit's shared_names",
            )
        save.shared_names, save.agreed = shared, True
        self._seal_if_whole(save)
        return version

    def abort(self, version: Version, reason: str) -> None:
        """End an open save; a sealed or finished version is left alone."""
        save = self._open.get((version.job, version.id))
        if save is not None:
            self._abort(save, reason)

    def client_gone(self, client: Client) -> None:
        """Settle what a dead client leaves: its open saves end, its unused memory returns to the pool."""
        for save in self.open_saves():
            if client.number in save.clients:
                self._orphan(save, f"rank {client.rank} (process {client.pid}) ended before commit")
        self._memory.drop_grants(client.number)
        for segment in self._memory.of_client(client.number):
            segment.client = None
            if segment.owner is None:
                self._memory.release(segment)

    def expire(self, lease_s: float, timeout_s: float, clients: Mapping[int, Client]) -> None:
        """Abort open saves whose ranks gave no sign of life for *lease_s*, or that received nothing for *timeout_s*."""
        now_s = self._clock.monotonic_s()
        for save in self.open_saves():
            silent = [clients[n] for n in save.clients if n in clients and now_s - clients[n].seen_s > lease_s]
            if silent:
                self._orphan(save, f"rank {silent[0].rank} was silent for more than {lease_s:g} s")
            elif now_s - save.touched_s > timeout_s:
                self._orphan(save, f"not committed within {timeout_s:g} s of its last sign of progress")

    def excuse(self, duration_s: float) -> None:
        """The daemon itself stood still for *duration_s*, in which no save could make progress."""
        now_s = self._clock.monotonic_s()
        for save in self.open_saves():
            save.touched_s = min(now_s, save.touched_s + duration_s)

    def _orphan(self, save: OpenSave, reason: str) -> None:
        # When every rank of the world is prepared here, agreement can only have been "commit": a rank that failed
        # would not have prepared. So the daemon may finish without having been told.
        if len(save.prepared) == save.version.world_size and not clash([name for _, name in save.received]):
            self._seal_version(save)
        else:
            self._abort(save, reason)

    def _seal_if_whole(self, save: OpenSave) -> None:
        # After a restart of the daemon the ranks offer their bytes again one by one. Sealing with the first of them
        # would publish a version without the others' partitions.
        if save.node_ranks | {rank for rank, _ in save.received} <= save.prepared:
            self._seal_version(save)

    def _seal_version(self, save: OpenSave) -> None:
        version = save.version
        del self._open[version.job, version.id]
        version.ranks = frozenset(save.prepared)
        version.partitions = save.partitions()
        self._catalog.move(version, VersionState.SEALED, bytes=version.size_bytes)
        if all(item.segment is not None for item in save.received.values()):
            # What was captured is what every copy is compared with; whoever first reads one digests it whole.
            self._catalog.set_copy(version, Tier.MEMORY, CopyState.VERIFIED)
        self._on_sealed(save)

    def _abort(self, save: OpenSave, reason: str) -> None:
        version = save.version
        del self._open[version.job, version.id]
        self._metrics.saves.labels("aborted").inc()
        self._catalog.move(version, VersionState.ABORTED, reason)
        self.let_go(save)

    def let_go(self, save: OpenSave) -> None:
        """Free the buffers and temporary files of a save that will not be written."""
        for item in save.received.values():
            if item.segment is not None:
                item.segment.owner = None
                if item.segment.client is None:
                    self._memory.release(item.segment)
            self._discard(save, item.writer)
        save.received.clear()

    def _drop(self, save: OpenSave, rank: int, name: str) -> None:
        replaced = save.received.pop((rank, name), None)
        if replaced is not None:
            if replaced.segment is not None:
                replaced.segment.owner = replaced.segment.partition = None
            self._discard(save, replaced.writer)

    def _discard(self, save: OpenSave, writer: BulkWriter | None) -> None:
        if writer is not None:  # on the workers: freeing the blocks of a large file takes a while
            task = asyncio.ensure_future(self._remove(save, writer))
            self._discards.add(task)  # the loop itself holds tasks only weakly
            task.add_done_callback(self._discards.discard)

    async def _remove(self, save: OpenSave, writer: BulkWriter) -> None:
        try:
            await self._workers.run(writer.discard)
        except CairnError as error:  # a dying disk: the file is swept at the next start
            self._events.publish("discard_failed", save.version.job, save.version.id, error=error)

    async def discarded(self) -> None:
        """Wait until the temporary files that were given up so far are removed, or known not to be."""
        while self._discards:
            await asyncio.wait(set(self._discards))

    async def _reserve(self, save: OpenSave, size_bytes: int) -> BulkWriter:
        version = save.version
        await self._make_room(size_bytes, version.job)
        key, temporary = layout.manifest(version.job, version.id), save.incoming_key()
        beginning = asyncio.ensure_future(self._workers.run(self._tier1.begin, key, temporary, size_bytes))
        try:
            writer = await asyncio.shield(beginning)
        except asyncio.CancelledError:
            # The call ended while the file was being made; nobody else knows of it.
            beginning.add_done_callback(lambda made: self._discard(save, _result(made)))
            raise
        if version.state is not VersionState.OPEN:
            await to_the_end(self._workers.run(writer.discard))
            raise self._aborted(version)
        version.reserved_bytes += size_bytes
        save.touched_s = self._clock.monotonic_s()
        return writer

    def _require(self, client: Client, version_id: VersionId) -> OpenSave:
        save = self._open.get((client.job, version_id))
        if save is None:
            known = self._catalog.get(client.job, version_id)
            if known is None:
                raise VersionError(f"version {version_id} was not created on this daemon", hint="call create first")
            raise self._aborted(known)
        save.touched_s = self._clock.monotonic_s()
        return save

    @staticmethod
    def _aborted(version: Version) -> CairnError:
        if version.state is VersionState.ABORTED:
            return SaveFailedError(
                f"version {version.id} was aborted: {version.reason}",
                hint="save again",
                context={"version": version.id},
            )
        return ConfigurationError(f"version {version.id} is {version.state}: it accepts no more partitions")

    @staticmethod
    def _check_new(save: OpenSave, rank: int, name: str, size_bytes: int) -> None:
        check_new(save.version, rank, name, size_bytes, prepared=save.prepared, received=len(save.received))


def _result(made: asyncio.Future[BulkWriter]) -> BulkWriter | None:
    return None if made.cancelled() or made.exception() is not None else made.result()
