"""One machine: a disk, a clock, a way to the bucket, and at times a daemon, which is the real one below its faces."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from inspect import isawaitable
from typing import Any

from cairn_api.errors import CairnError
from cairnd.core import Core, Surroundings
from cairnd.settings import Settings
from tests.simulation.bucket import Bucket, BucketStore, WayFaults
from tests.simulation.disk import Disk
from tests.simulation.kernel import CrashedError, InlinePool, Process, SeededClock, SeededLoop, SeededWorkers
from tests.simulation.planted import Plant

TIER1 = "/tier1"
URL = "s3://simulated/bucket"
_REPLY_S = 0.002


class GoneError(Exception):
    """The daemon is not there, or ended before it answered: nobody knows whether it did what it was asked."""


class Machine:
    """Survives its daemons. ``core`` is the one that runs, if ``up``."""

    def __init__(
        self,
        loop: SeededLoop,
        number: int,
        bucket: Bucket,
        settings: dict[str, Any],
        plant: Plant,
        on_start: Callable[[Machine, Core], None],
    ) -> None:
        self.number = number
        self.name = f"m{number}"
        self.loop = loop
        self.chance: random.Random = loop.chance
        self.disk = Disk(loop.chance, direct=loop.chance.random() < 0.7)
        self.clock = SeededClock(loop)
        self.way = WayFaults()
        self.settings = Settings(
            runtime_dir="/run/cairn", tier1_path=TIER1, persistent_storage_path=URL, **settings
        ).validate()
        self.core: Core | None = None
        self.process: Process | None = None
        self.up = False
        self.starts = 0
        self.wanted = True
        """Whether somebody starts the daemon again after a crash."""
        self._outside = copy_context()
        self._bucket = bucket
        self._plant = plant
        self._on_start = on_start
        self._burying: asyncio.Task[None] | None = None
        self._working: asyncio.Task[None] | None = None

    async def start(self) -> bool:
        """Start a daemon and let it recover; False if it did not come up."""
        if self._burying is not None:
            await self._burying
        self.starts += 1
        process = self.process = Process(self.loop, f"{self.name}.{self.starts}")
        process.on_fuse = self.power_cut
        mounted = self._plant.disk(self.disk, process)
        surroundings = Surroundings(
            clock=self.clock,
            fs=mounted,
            workers=lambda _name, _threads: SeededWorkers(process),
            pools=InlinePool,
            stores=lambda _url, _options: BucketStore(self._bucket, self.way, mounted, process),
            token_hex=lambda size_bytes: f"{self.chance.getrandbits(8 * size_bytes):0{2 * size_bytes}x}",
        )
        try:
            core = self.core = process.context.run(Core, self.settings, surroundings)
            self._plant.into(core)
            await self.loop.create_task(core.recover(), context=process.context)
        except (CrashedError, asyncio.CancelledError):
            if not process.dead:
                raise
            return False
        except CairnError as error:
            # A disk that fails now: the service manager tries again.
            self.loop.trace.note(f"{process.name} did not start: {error.message}")
            if not process.dead:
                self.kill()
            return False
        if process.dead:
            return False
        self._on_start(self, core)
        self.up = True
        self._working = self.loop.create_task(core.work(), context=process.context)
        return True

    def kill(self) -> None:
        """``kill -9``: the page cache survives."""
        self._end("killed")
        self.disk.kill()

    def power_cut(self) -> None:
        """What was not synced may be gone."""
        self._end("power cut")
        self.disk.power_cut()

    def arm(self, calls: int) -> None:
        """The power is cut in the daemon's n-th call of disk or bucket from now."""
        if self.process is not None and not self.process.dead:
            self.process.fuse = calls

    def defect(self) -> str:
        """Why the daemon's work ended by itself; empty while it does not."""
        if not self.up or self._working is None or not self._working.done():
            return ""
        return repr(self._working.exception())

    async def gone(self) -> None:
        """Wait until nothing of a dead daemon is left."""
        if self._burying is not None:
            await self._burying

    def _end(self, how: str) -> None:
        process, core = self.process, self.core
        if process is None or process.dead:
            return
        self.loop.trace.add(f"{process.name} {how}")
        self.up = False
        self.core = None
        process.kill()
        self._burying = self.loop.create_task(self._bury(process, core), context=self._outside)

    async def _bury(self, process: Process, core: Core | None) -> None:
        await process.bury()
        if core is not None:
            for segment in list(core.memory.segments.values()):
                with suppress(BufferError):  # a traceback may hold a view; then it is unmapped with that
                    segment.memory.close()
                os.close(segment.fd)
            core.memory.segments.clear()

    async def call(self, make: Callable[[Core], Any]) -> Any:
        """What a client asks of the daemon, on a wire that takes a moment. Raises :class:`GoneError`."""
        await asyncio.sleep(self.chance.random() * _REPLY_S)
        process, core = self.process, self.core
        if not self.up or process is None or core is None:
            raise GoneError
        process.trim()
        task = self.loop.create_task(_answer(make, core), context=process.context)
        try:
            answer = await task
        except (CrashedError, asyncio.CancelledError):
            here = asyncio.current_task()
            if process.dead and not (here is not None and here.cancelling()):
                raise GoneError from None
            raise
        await asyncio.sleep(self.chance.random() * _REPLY_S)
        if process.dead:
            raise GoneError
        return answer


async def _answer(make: Callable[[Core], Any], core: Core) -> Any:
    answer = make(core)
    return await answer if isawaitable(answer) else answer


def memory_file(data: bytes) -> tuple[int, mmap.mmap]:
    """A memfd of whole pages that begins with *data*, mapped for writing."""
    size_bytes = max(1, -(-len(data) // mmap.PAGESIZE)) * mmap.PAGESIZE
    fd = os.memfd_create("simulated", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.posix_fallocate(fd, 0, size_bytes)
    memory = mmap.mmap(fd, size_bytes)
    memory[: len(data)] = data
    return fd, memory
