"""One process of a simulated training. It saves, loads and dies as the client library does, on its daemon's core."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cairn.choice import Candidate
from cairn_api.errors import CairnError, SaveFailedError, UnavailableError
from cairn_api.names import VersionId
from cairnd.core import Core
from cairnd.model import CopyState, Tier, Version, VersionState
from cairnd.records import PieceDigests, RecordTable
from cairnd.replication.bucket import EpochClaim
from cairnd.restore.tier1_copies import Fetched
from cairnd.session.clients import Client
from tests.simulation.kernel import Process
from tests.simulation.machine import GoneError, Machine, memory_file
from tests.simulation.model import Model, Saved

if TYPE_CHECKING:
    from tests.simulation.training import Launch

_NO_RECORDS = RecordTable((), (), (), ())
_PATIENCE_S = 240.0
_OVER = (VersionState.PREPARED, VersionState.COMMITTED, VersionState.DELETING)
_BUFFERS = 2


class RankDiedError(Exception):
    """This rank's process has ended; the others find out at their next collective."""


@dataclass(slots=True)
class Buffer:
    """A capture buffer as its rank sees it."""

    name: str
    fd: int
    memory: mmap.mmap

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


@dataclass(slots=True)
class Opening:
    """One version as a rank has told it to its daemon so far, to be told again to the next daemon."""

    saved: Saved
    parts: dict[str, tuple[bytes, Buffer]] = field(default_factory=dict)
    prepared: bool = False
    agreed: list[tuple[str, int]] | None = None
    lost: str = ""


class Rank:
    """One process of a training, or of a program that only reads."""

    def __init__(self, launch: Launch, number: int, machine: Machine) -> None:
        self.launch = launch
        self.number = number
        self.machine = machine
        self.client: Client | None = None
        self.alive = True
        self.unsettled: dict[VersionId, Opening] = {}
        self._daemon: Process | None = None
        self._buffers: dict[str, Buffer] = {}
        self._chance: random.Random = machine.chance

    async def do(self, make: Callable[[Core, Client], Any]) -> Any:
        """Ask the daemon; one that is gone is waited for, told everything again, and asked again."""
        deadline_s = self.machine.loop.time() + _PATIENCE_S
        while True:
            try:
                await self.connect()
                return await self._ask(make)
            except GoneError:
                if not self.alive:
                    raise RankDiedError from None
                if self.machine.loop.time() > deadline_s:
                    raise UnavailableError(f"rank {self.number}: the daemon does not come back") from None
                await asyncio.sleep(self._chance.random() * 5.0)

    async def _ask(self, make: Callable[[Core, Client], Any]) -> Any:
        def asked(core: Core) -> Any:
            client = self.client
            if client is None or not self.alive or self._daemon is not self.machine.process:
                raise GoneError
            core.clients.seen(client)
            return make(core, client)

        return await self.machine.call(asked)

    async def connect(self) -> None:
        """Be known to the daemon that runs now, with all that is unsettled."""
        if not self.alive:
            raise RankDiedError
        if self.client is not None and self._daemon is self.machine.process and self.machine.up:
            return

        def admit(core: Core) -> Client:
            return core.clients.connect(0, 0, 1)

        client = await self.machine.call(admit)
        if not self.alive:
            raise RankDiedError
        self.client, self._daemon = client, self.machine.process
        kept = {buffer.name for opening in self.unsettled.values() for _, buffer in opening.parts.values()}
        for name in [name for name in self._buffers if name not in kept]:
            self._buffers.pop(name).close()
        launch = self.launch
        try:
            await self._ask(
                lambda core, client: core.launches.join(client, launch.job, storage_url="", keep=launch.keep)
            )
            if launch.nonce and not launch.reader:
                await self._ask(lambda core, client: core.launches.claim(
                    client, EpochClaim(launch.epoch, launch.nonce, launch.world_size, launch.resumed_from),
                    first_rank=self.number == 0 and launch.provisional, provisional=launch.provisional,
                ))  # fmt: skip
            await self._tell_again()
        except (GoneError, CairnError):
            self.client = None
            raise

    async def _tell_again(self) -> None:
        for version, opening in list(self.unsettled.items()):
            try:
                state = await self._ask(lambda core, client, opening=opening: self._create(core, client, opening))  # type: ignore[misc]
                if state is VersionState.ABORTED:
                    raise SaveFailedError("the daemon had aborted it")
                if state is VersionState.OPEN:
                    for name, (data, buffer) in list(opening.parts.items()):
                        again = self._duplicate(data, buffer)
                        opening.parts[name] = data, again
                        await self._offer(again)
                        await self._seal(opening, name, data, again)
                    if opening.prepared:
                        await self._prepare(opening)
                if opening.agreed is not None and state not in _OVER:
                    await self._commit(opening)
            except CairnError as error:
                opening.lost = error.message
                self.unsettled.pop(version)

    def _duplicate(self, data: bytes, buffer: Buffer) -> Buffer:
        self._buffers.pop(buffer.name, None)
        buffer.close()
        return self._new_buffer(data)

    def _new_buffer(self, data: bytes) -> Buffer:
        fd, memory = memory_file(data)
        buffer = Buffer(f"{self._chance.getrandbits(128):032x}", fd, memory)
        self._buffers[buffer.name] = buffer
        return buffer

    async def _offer(self, buffer: Buffer) -> None:
        def offer(core: Core, client: Client) -> None:
            if buffer.name in core.memory.segments:
                return  # asked again: the reply was lost
            size_bytes = len(buffer.memory)
            core.launches.reclaim(size_bytes)
            grant = core.memory.grant(client.number, client.job, size_bytes)
            fd = os.dup(buffer.fd)
            try:
                core.memory.accept(client.number, 0, grant, buffer.name, fd, size_bytes)
            except BaseException:
                os.close(fd)
                raise

        await self._ask(offer)

    def _create(self, core: Core, client: Client, opening: Opening) -> VersionState:
        saved, launch = opening.saved, self.launch
        core.launches.check_current(client)
        here = [rank for rank, home in enumerate(saved.homes) if home == self.machine.number]
        return core.saves.create(
            client, saved.id, rank=self.number, world_size=saved.world_size, nonce=launch.nonce, save_dir="",
            persist=saved.persist, file_marks=False, attributes={}, node_ranks=here,
        ).state  # fmt: skip

    async def _seal(self, opening: Opening, name: str, data: bytes, buffer: Buffer) -> None:
        await self._ask(lambda core, client: core.saves.seal(
            client, opening.saved.id, rank=self.number, name=name, segment_name=buffer.name, size_bytes=len(data),
            records=_NO_RECORDS, globals_=(), digests=PieceDigests(),
        ))  # fmt: skip

    async def _prepare(self, opening: Opening) -> None:
        version = opening.saved.id
        names = sorted(opening.parts)
        # From here the daemon may conclude that all agreed, as soon as it has heard so of every rank.
        opening.saved.prepared.add(self.number)
        await self._ask(lambda core, client: core.saves.prepare(client, version, rank=self.number, names=names))

    async def _commit(self, opening: Opening) -> VersionState:
        shared = opening.agreed or []
        version = await self._ask(lambda core, client: core.saves.commit(client, opening.saved.id, shared_names=shared))
        state: VersionState = version.state
        return state

    # A save, step by step

    async def reserve(self) -> dict[str, Any] | None:
        """What this rank's daemon says before a save; None: there is no buffer."""

        async def ask(core: Core, client: Client) -> dict[str, Any] | None:
            free = await core.launches.reserve(client, _BUFFERS, 5.0)
            if free is None:
                return None
            return {
                "free": [segment.name for segment in free],
                "tier1": [str(version.id) for version in core.launches.newest(client.job, Tier.TIER1)],
                "tier2": [str(version.id) for version in core.launches.newest(client.job, Tier.TIER2)],
                "persist_lost": core.launches.persist_lost(client),
            }

        answer: dict[str, Any] | None = await self.do(ask)
        for version, opening in list(self.unsettled.items()):
            # What the daemon gives free needs nothing more from this rank.
            if answer is not None and any(buffer.name in answer["free"] for _, buffer in opening.parts.values()):
                del self.unsettled[version]
        return answer

    async def save(self, saved: Saved, floor: VersionId | None, parts: Mapping[str, bytes], free: list[str]) -> None:
        """Create, hand over, prepare. Raises what makes this rank's save fail."""
        opening = self.unsettled[saved.id] = Opening(saved)

        def create(core: Core, client: Client) -> VersionState:
            state = self._create(core, client, opening)
            core.keeper.set_floor(client.job, saved.id, floor)
            return state

        if await self.do(create) is VersionState.ABORTED:
            raise SaveFailedError("it was aborted at once")
        for name, data in parts.items():
            buffer = self._reuse(data, free)
            while True:
                await self.connect_patiently()
                fresh = buffer is None or buffer.name not in self._buffers
                if fresh:
                    buffer = self._new_buffer(data)
                assert buffer is not None
                try:
                    if fresh:
                        await self._offer(buffer)
                    await self._seal(opening, name, data, buffer)
                except GoneError:
                    continue
                opening.parts[name] = data, buffer
                break
        while not opening.prepared:
            await self.connect_patiently()
            if opening.lost:
                raise SaveFailedError(opening.lost)
            try:
                await self._prepare(opening)
            except GoneError:
                continue
            opening.prepared = True

    async def connect_patiently(self) -> None:
        """Wait for a daemon that knows everything."""
        await self.do(lambda _core, _client: None)

    def _reuse(self, data: bytes, free: list[str]) -> Buffer | None:
        for name in free:
            buffer = self._buffers.get(name)
            if buffer is not None and len(buffer.memory) >= len(data):
                free.remove(name)
                buffer.memory[: len(data)] = data
                return buffer
        return None

    async def commit(self, version: VersionId, shared: list[tuple[str, int]]) -> None:
        """All ranks agreed. Raises when this rank's daemon cannot be told, or has lost it."""
        opening = self.unsettled.get(version)
        if opening is None or opening.lost:
            raise SaveFailedError(f"{version}: {opening.lost if opening else 'it was lost with the daemon'}")
        opening.agreed = shared
        while True:
            await self.connect_patiently()
            if version not in self.unsettled:
                raise SaveFailedError(f"{version}: {opening.lost}")
            try:
                state = await self._commit(opening)
            except GoneError:
                continue
            if state is not VersionState.OPEN:
                return
            await asyncio.sleep(1.0)  # another rank of this machine has still to come back

    async def abort(self, version: VersionId) -> None:
        """This rank's or another's save failed."""

        def abort(core: Core, client: Client) -> None:
            known = core.catalog.get(client.job, version)
            if known is not None:
                core.saves.abort(known, "a rank failed")

        self.unsettled.pop(version, None)
        await self.do(abort)

    async def reached(self, version: VersionId, tier: Tier, timeout_s: float) -> tuple[bool, bool]:
        """The client's ``wait`` for *tier* or a safer one: whether the daemon says that it is in tier 1, in tier 2."""

        async def wait(core: Core, client: Client) -> tuple[bool, bool]:
            found = core.catalog.require(client.job, version)

            def there() -> bool:
                return found.has(Tier.TIER2) or (tier is Tier.TIER1 and found.has(Tier.TIER1))

            if tier is Tier.TIER2 and not there():
                await core.persistence.request(found)
            await core.catalog.wait_until(
                lambda: there() or found.state in (VersionState.ABORTED, VersionState.DELETING), timeout_s
            )
            return found.has(Tier.TIER1), found.has(Tier.TIER2)

        reached: tuple[bool, bool] = await self.do(wait)
        return reached

    async def keep_alive(self) -> None:
        """A sign of life; what has reached tier 1 need not be told again."""
        if self.client is None or self._daemon is not self.machine.process:
            return

        def ask(core: Core, client: Client) -> list[VersionId]:
            client.take_failures()
            return [item.id for item in core.catalog.versions(client.job) if item.has(Tier.TIER1)]

        for version in await self._ask(ask):
            self.unsettled.pop(version, None)

    # A restore

    async def inventory(self) -> dict[str, Any]:
        """What ``Resolve`` answers."""
        job = self.launch.job

        async def resolve(core: Core, _client: Client) -> dict[str, Any]:
            error = await core.inventory.refresh(job)
            await core.catalog.wait_until(
                lambda: not [v for v in core.catalog.versions(job) if v.state is VersionState.SEALED], 60.0
            )
            claim, record = core.inventory.newest_claim(job), core.jobs.get(job)
            newest = (claim.epoch, claim.resumed_from) if claim is not None else (0, None)
            if record is not None and record.epoch > newest[0]:
                newest = record.epoch, record.resumed_from
            known = [version for version in core.catalog.versions(job) if version.restorable]
            return {
                "claimed_epoch": newest[0],
                "resumed_from": str(newest[1]) if newest[1] else None,
                "tier2_error": error,
                "unhealthy": [str(version.id) for version in known if not _held(version)],
                "versions": [_entry(version) for version in known if _held(version)],
            }

        known: dict[str, Any] = await self.do(resolve)
        return known

    async def load(self, candidate: Candidate, model: Model) -> None:
        """Fetch and read every partition. Raises :class:`VersionError` when no intact copy is found."""
        saved = model.saved.get((candidate.version, candidate.nonce))
        if saved is None:
            model.violation(f"{candidate.version} is offered, and nobody saved it")
            return
        paths = list(reads(candidate, self.number, self.launch.world_size))
        wanted = {path: data for path, data in saved.paths().items() if path in paths}
        reader = (self.machine.number, (saved.id, saved.nonce))

        began_s = self.machine.loop.time()

        async def fetch(core: Core, client: Client) -> dict[str, bytes]:
            version = core.catalog.require(client.job, candidate.version)
            ready: tuple[Fetched, ...] = ()
            lease = ""
            async with aclosing(core.fetcher.fetch(client.number, version, paths)) as steps:
                async for step in steps:
                    ready, lease = step.ready, step.lease
            held = core.leases.get(lease, client.number)
            model.reading.setdefault(reader, set()).add(self)
            try:
                await asyncio.sleep(self._chance.random() * 2.0)
                return {item.path: _read(core, item) for item in ready}
            finally:
                model.reading[reader].discard(self)
                core.fetcher.end(held)

        found: dict[str, bytes] = await self.do(fetch)
        model.loads += 1
        looked_before = self.machine.process in saved.rotten_unseen or saved.rotted_s >= began_s
        if found != wanted and not looked_before:
            wrong = sorted(path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path))
            model.violation(
                f"rank {self.number} loaded {saved.id} from {self.machine.name}, and {wrong} is not what was saved"
            )

    def die(self) -> None:
        """The process ends, its connection with it."""
        self.alive = False
        for holders in self.launch.model.reading.values():
            holders.discard(self)
        client, core = self.client, self.machine.core
        if client is not None and core is not None and self._daemon is self.machine.process and self.machine.up:
            assert self._daemon is not None
            self._daemon.context.run(core.clients.disconnect, client)
            self._daemon.context.run(core._on_client_gone, client)
        self.client = None
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()
        self.unsettled.clear()


def reads(candidate: Candidate, rank: int, world_size: int) -> list[str]:
    """What a rank reads: what it saved, or everything when the world has another size now."""
    return [
        part.path
        for part in sorted(candidate.parts.values(), key=lambda part: part.path)
        if part.rank == rank or candidate.world_size != world_size
    ]


def _held(version: Version) -> bool:
    return any(copy.state is CopyState.VERIFIED for copy in version.copies.values())


def _entry(version: Version) -> dict[str, Any]:
    return {
        "version": str(version.id), "nonce": version.nonce, "state": version.state.value,
        "world_size": version.world_size, "ranks": sorted(version.ranks), "save_dir": "", "file_marks": False,
        "held": True, "passed_over": "",
        "partitions": [[item.path, item.name, item.rank, item.size_bytes] for item in version.partitions],
    }  # fmt: skip


def _read(core: Core, item: Fetched) -> bytes:
    if item.segment is not None:
        with item.segment.view(item.size_bytes) as view:
            return bytes(view)
    return core.tier1.read_small(item.key)
