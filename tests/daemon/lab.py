"""A whole daemon inside the test: real sockets, memfds, files and threads, on a clock that the test owns."""

from __future__ import annotations

import asyncio
import mmap
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cairn_api.names import VersionId
from cairnd import layout
from cairnd.app import App
from cairnd.core import Surroundings
from cairnd.events import Event
from cairnd.model import Tier, Version, VersionState
from cairnd.records import PieceDigests, RecordTable
from cairnd.replication.bucket import BucketRepository, EpochClaim
from cairnd.session.clients import Client
from cairnd.session.memory import Segment
from cairnd.settings import Settings
from cairnd.tiers.object_store import ObjectStore
from cairnd.workers import ThreadWorkers, Workers
from tests.clock import ManualClock

T = TypeVar("T")
JOB = "run-7"
PATIENCE_S = 60.0
_SETTLING_S = 1.0
"""How long :meth:`Lab.settle` waits for threads; those that a test itself holds up take longer."""
NO_RECORDS = RecordTable((), (), (), ())


async def eventually(condition: Callable[[], object], what: str = "") -> None:
    """Wait until *condition* holds; fails the test after :data:`PATIENCE_S` of real time."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, what or "the condition never held"
        await asyncio.sleep(0.002)


def memfd(data: bytes = b"", size_bytes: int = 0) -> int:
    """A sealable memfd that begins with *data*, filled up with reserved zeros to whole pages (or *size_bytes*)."""
    size_bytes = size_bytes or max(1, -(-len(data) // mmap.PAGESIZE)) * mmap.PAGESIZE
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.posix_fallocate(fd, 0, size_bytes)
    os.pwrite(fd, data, 0)
    return fd


def held_fds(tier1: Path | None = None) -> int:
    """How many descriptors this process has of the memfds made here and of files in *tier1*."""
    count = 0
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = str(fd.readlink())
        except FileNotFoundError:
            continue
        count += target.startswith("/memfd:test") or (tier1 is not None and target.startswith(f"{tier1}/jobs/"))
    return count


class Lab:
    """One node. ``close`` it; ``restart`` gives the next daemon on the same folders; ranks have to join anew."""

    def __init__(
        self,
        folder: Path,
        *,
        bucket: bool | str = True,
        wrap_store: Callable[[ObjectStore], ObjectStore] | None = None,
        environment: Mapping[str, str] | None = None,
        **settings: object,
    ) -> None:
        self.folder = folder
        self.bucket_path = folder / "bucket"
        url = bucket if isinstance(bucket, str) else f"file://{self.bucket_path}" if bucket else ""
        self.settings = Settings(
            **{  # type: ignore[arg-type]
                "runtime_dir": str(folder / "run"),
                "tier1_path": str(folder / "tier1"),
                "persistent_storage_path": url,
                "capture_memory_bytes": 64 * 1024 * 1024,
                **settings,
            }
        ).validate()
        self.clock = ManualClock()
        self._wrap_store = wrap_store
        self._environment = environment or {}
        self._running: asyncio.Task[None] | None = None
        self._at_work = 0
        self.app = self._new_app()

    def _new_app(self) -> App:
        app = App(self.settings, self._environment, Surroundings(clock=self.clock))
        if self._wrap_store is not None:
            make, wrap = app.storage._open_store, self._wrap_store
            app.storage._open_store = lambda url: wrap(make(url))
        for pool in (app._workers, app._disk):
            self._watch(pool)
        return app

    def _watch(self, workers: Workers) -> None:
        """Count what *workers* have to do, for :meth:`settle`."""
        run = workers.run

        async def counted(function: Callable[..., T], *arguments: Any) -> T:
            self._at_work += 1
            try:
                return await run(function, *arguments)
            finally:
                self._at_work -= 1

        workers.run = counted  # type: ignore[method-assign]

    async def start(self, *, run: bool = True) -> Lab:
        """Recover, bind the sockets and (with *run*) start the background tasks."""
        await self.app.start()
        if run:
            self.go()
        return self

    def go(self) -> None:
        """Start the background tasks."""
        self._running = asyncio.ensure_future(self.app.run())

    async def close(self) -> None:
        """Stop without draining. A background task that failed fails the test."""
        running, self._running = self._running, None
        crashed = running is not None and running.done()
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        await self.app.stop()
        for pool in (self.app._workers, self.app._disk):  # what has begun ends before the next daemon comes
            assert isinstance(pool, ThreadWorkers)
            await asyncio.to_thread(pool._pool.shutdown)
        for segment in list(self.app.memory.segments.values()):  # as the end of a process would
            self.app.memory.release(segment)
        if running is not None and crashed:
            running.result()

    async def restart(self, *, run: bool = True) -> None:
        """As after a crash of the daemon: what is not on disk is gone."""
        await self.close()
        self.app = self._new_app()
        await self.start(run=run)

    async def passes(self, condition: Callable[[], object], *, step_s: float = 1.0, limit_s: float = 3600.0) -> float:
        """Let time pass in steps until *condition* holds; fails after *limit_s*. Returns the seconds that passed.

        Threads do not live by this clock: on a busy machine they get some real time too before it fails.
        """
        passed_s, deadline_s = 0.0, time.monotonic() + PATIENCE_S / 4
        while not condition():
            if passed_s >= limit_s:
                told = [event.text() for event in self.app.events.remembered()]
                assert time.monotonic() < deadline_s, f"not within {limit_s} s: {told}"
                await asyncio.sleep(0.01)
            self.clock.advance(step_s)
            passed_s += step_s
            await self.settle()
        return passed_s

    async def idle(self, duration_s: float) -> None:
        """Let time pass second by second. All at once, the daemon would take it for a pause of its own."""
        for _ in range(int(duration_s)):
            self.clock.advance(1.0)
            await asyncio.sleep(0.001)

    async def settle(self) -> None:
        """Let everybody act on what happened: tasks that are ready, and threads that work for them."""
        deadline_s = time.monotonic() + _SETTLING_S
        quiet = 0
        while quiet < 5 and time.monotonic() < deadline_s:
            await asyncio.sleep(0.001)
            quiet = 0 if self._at_work else quiet + 1

    def events(self, name: str) -> list[Event]:
        """Remembered events of that name, oldest first."""
        return [event for event in self.app.events.remembered() if event.name == name]

    @property
    def tier1(self) -> Path:
        return self.app.tier1.root

    def file(self, version: VersionId, path: str, job: str = JOB) -> Path:
        """A partition's file in tier 1."""
        return self.tier1 / layout.partition(job, version, path)

    def object(self, version: VersionId, path: str, job: str = JOB) -> Path:
        """A partition's file in the bucket."""
        return self.bucket_path / layout.Bucket.partition(job, version, path)

    async def bucket(self) -> BucketRepository:
        return await self.app.storage.bucket(self.settings.persistent_storage_path)

    def version(self, version: VersionId, job: str = JOB) -> Version:
        return self.app.catalog.require(job, version)

    async def reaches(self, version: VersionId, tier: Tier, job: str = JOB) -> None:
        """Wait until *tier* holds the version."""
        await eventually(
            lambda: (found := self.app.catalog.get(job, version)) is not None and found.has(tier),
            f"{version} did not reach {tier}: {[event.text() for event in self.app.events.remembered()]}",
        )


class Rank:
    """A rank of a launch, talking to the daemon's own components (not over the wire)."""

    def __init__(self, lab: Lab, client: Client, rank: int, world_size: int) -> None:
        self.lab, self.client, self.rank, self.world_size = lab, client, rank, world_size
        self.sequence = 0

    @classmethod
    async def join(
        cls, lab: Lab, *, rank: int = 0, world_size: int = 1, job: str = JOB, uid: int = 0, keep: int = 0,
        storage_url: str = "",
    ) -> Rank:  # fmt: skip
        client = lab.app.clients.connect(uid, uid, os.getpid())
        client.rank = rank
        await lab.app.launches.join(client, job, storage_url=storage_url, keep=keep)
        return cls(lab, client, rank, world_size)

    async def claim(
        self, nonce: str = "", *, resumed_from: VersionId | None = None, epoch: int = 0, provisional: bool = False
    ) -> tuple[bool, bool]:
        """Claim an epoch (rank 0) or take note of it: ``(taken, provisional)``."""
        epoch = epoch or self.lab.app.launches.max_epoch(self.client.job) + 1
        claim = EpochClaim(epoch, nonce or uuid.uuid4().hex, self.world_size, resumed_from)
        return await self.lab.app.launches.claim(self.client, claim, first_rank=self.rank == 0, provisional=provisional)

    @classmethod
    async def launch(cls, lab: Lab, world_size: int = 1, **options: object) -> list[Rank]:
        """All ranks of a launch, its epoch claimed."""
        ranks = [
            await cls.join(lab, rank=rank, world_size=world_size, **options)  # type: ignore[arg-type]
            for rank in range(world_size)
        ]
        nonce = uuid.uuid4().hex
        taken, _ = await ranks[0].claim(nonce)
        assert not taken
        for rank in ranks[1:]:
            await rank.claim(nonce, epoch=ranks[0].client.epoch)
        return ranks

    def offer(self, data: bytes = b"", *, size_bytes: int = 0) -> Segment:
        """A new buffer with *data*, granted and accepted."""
        fd = memfd(data, size_bytes)
        size_bytes = os.fstat(fd).st_size
        grant = self.lab.app.memory.grant(self.client.number, self.client.job, size_bytes)
        return self.lab.app.memory.accept(self.client.number, self.client.uid, grant, uuid.uuid4().hex, fd, size_bytes)

    def create(self, version: VersionId, *, persist: bool = False, save_dir: str = "") -> Version:
        return self.lab.app.saves.create(
            self.client, version, rank=self.rank, world_size=self.world_size, nonce=self.client.nonce,
            save_dir=save_dir, persist=persist, file_marks=bool(save_dir), attributes={},
        )  # fmt: skip

    def seal(
        self,
        version: VersionId,
        name: str,
        data: bytes,
        *,
        records: RecordTable = NO_RECORDS,
        digests: PieceDigests | None = None,
    ) -> Segment:
        segment = self.offer(data)
        self.lab.app.saves.seal(
            self.client, version, rank=self.rank, name=name, segment_name=segment.name, size_bytes=len(data),
            records=records, globals_=(), digests=digests or PieceDigests(),
        )  # fmt: skip
        return segment

    async def prepare(self, version: VersionId, names: Sequence[str]) -> None:
        await self.lab.app.saves.prepare(self.client, version, rank=self.rank, names=names)

    def commit(self, version: VersionId, shared_names: Sequence[tuple[str, int]] = ()) -> Version:
        return self.lab.app.saves.commit(self.client, version, shared_names=shared_names)

    def next(self, tag: str = "") -> VersionId:
        """The next version of this rank's launch."""
        self.sequence += 1
        return VersionId(self.client.epoch, self.sequence, tag or f"step{self.sequence}")

    async def save(
        self, parts: Mapping[str, bytes] | None = None, *, persist: bool = False, tag: str = "", save_dir: str = ""
    ) -> VersionId:
        """A whole save by this rank alone (a world of one), up to tier 1. Its buffers are free again afterwards."""
        version = self.next(tag)
        parts = parts if parts is not None else {"model.pt": f"bytes of {version}".encode() * 100}
        self.create(version, persist=persist, save_dir=save_dir)
        for name, data in parts.items():
            self.seal(version, name, data)
        await self.prepare(version, list(parts))
        self.commit(version)
        await self.lab.reaches(version, Tier.TIER1)
        return version

    def leave(self) -> None:
        """The process ends."""
        self.lab.app.clients.disconnect(self.client)
        self.lab.app._on_client_gone(self.client)


def gone(lab: Lab, version: VersionId) -> bool:
    """Whether no trace of the version is in tier 1."""
    return not (lab.tier1 / layout.version_folder(JOB, version)).exists()


def state(lab: Lab, version: VersionId) -> VersionState:
    return lab.version(version).state
