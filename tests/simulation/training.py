"""A training: ranks that agree on what to restore and to save, as the client library has them agree."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from cairn.agreement import floor as agreed_floor
from cairn.agreement import shared_names
from cairn.choice import Choice, choose
from cairn_api.errors import CairnError, OverloadedError, SaveFailedError, UnavailableError, VersionError
from cairn_api.names import VersionId
from cairnd.model import Tier
from cairnd.replication.bucket import EpochClaim
from tests.simulation.machine import GoneError, Machine
from tests.simulation.model import Model, Saved
from tests.simulation.rank import Rank, RankDiedError, reads

T = TypeVar("T")


class Launch:
    """One start of a program with several ranks. Its coroutines are the collectives: what all ranks agree on."""

    def __init__(self, job: str, homes: list[Machine], model: Model, *, keep: int, reader: bool = False) -> None:
        self.job = job
        self.model = model
        self.keep = keep
        self.reader = reader
        self.world_size = len(homes)
        self.nonce = ""
        self.epoch = 0
        self.provisional = False
        self.resumed_from: VersionId | None = None
        self.sequence = 0
        self.ranks = [Rank(self, number, machine) for number, machine in enumerate(homes)]
        self.saves = 0
        self.pausing = False
        self._chance: random.Random = homes[0].chance

    async def everybody(self, make: Callable[[Rank], Awaitable[T]]) -> list[T]:
        """What each rank does or says; raises the first failure, after all have ended."""
        tasks = [asyncio.ensure_future(make(rank)) for rank in self.ranks]
        try:
            answers = await asyncio.gather(*tasks, return_exceptions=True)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers  # type: ignore[return-value]

    async def restore(self, bad: frozenset[tuple[VersionId, str]] = frozenset()) -> Choice | None:
        """Choose together, load everywhere; what is found damaged is passed over, by all."""
        for _ in range(4):
            inventories = await self.everybody(lambda rank: rank.inventory())
            chosen = choose(inventories, reads=lambda item, rank: reads(item, rank, self.world_size), bad=bad)
            if chosen is None:
                return None
            try:
                await self.everybody(lambda rank, item=chosen.candidate: rank.load(item, self.model))  # type: ignore[misc]
            except VersionError:
                bad |= {chosen.candidate.key}
                continue
            self.resumed_from = chosen.version
            return chosen
        return None

    async def claim(self) -> None:
        """Begin to save: an epoch of one's own."""
        epochs = await self.everybody(lambda rank: rank.do(lambda core, client: core.launches.max_epoch(client.job)))
        nonce = f"{self._chance.getrandbits(128):032x}"
        epoch = max(epochs) + 1
        while True:
            claim = EpochClaim(epoch, nonce, self.world_size, self.resumed_from)
            if self.resumed_from is not None:
                self.model.resumed.append((epoch, self.resumed_from))  # it may be claimed without the reply arriving
            taken, provisional = await self.ranks[0].do(
                lambda core, client, claim=claim: core.launches.claim(client, claim, first_rank=True, provisional=False)  # type: ignore[misc]
            )
            if not taken:
                break
            if self.resumed_from is not None:
                self.model.resumed.remove((epoch, self.resumed_from))
            epoch += 1
        self.nonce, self.epoch, self.provisional = nonce, epoch, provisional

        async def note(rank: Rank) -> None:
            if rank.number:
                await rank.do(lambda core, client: core.launches.claim(
                    client, EpochClaim(epoch, nonce, self.world_size, self.resumed_from), first_rank=False,
                    provisional=provisional,
                ))  # fmt: skip

        await self.everybody(note)

    async def save(self) -> None:
        """One checkpoint, from the reservation to what the ranks are told of it."""
        answers = await self.everybody(lambda rank: rank.reserve())
        if any(answer is None for answer in answers):
            return
        told: list[dict[str, Any]] = [answer for answer in answers if answer is not None]
        self.sequence += 1
        persist = self._chance.random() < 0.5 or told[0]["persist_lost"]
        saved = Saved(
            VersionId(self.epoch, self.sequence, f"step{self.sequence}"), self.nonce,
            tuple(rank.machine.number for rank in self.ranks), persist,
        )  # fmt: skip
        self.model.saved[saved.id, saved.nonce] = saved
        parts = [self._state(rank) for rank in self.ranks]
        for rank, mine in zip(self.ranks, parts, strict=True):
            saved.parts.update({(rank.number, name): data for name, data in mine.items()})
        shared = shared_names([sorted(mine) for mine in parts])
        saved.shared = frozenset((rank, name) for name, rank in shared)
        floor = agreed_floor(told)
        try:
            await self.everybody(lambda rank: rank.save(saved, floor, parts[rank.number], told[rank.number]["free"]))
        except (CairnError, OSError) as error:
            self.model.note(f"{saved.id} failed: {error}")
            await self.everybody(lambda rank: rank.abort(saved.id))
            return
        saved.agreed = True
        await self.everybody(lambda rank: rank.commit(saved.id, shared))
        for rank in self.ranks:
            if rank.machine.process is not None and rank.machine.up:
                saved.captured_by.append(rank.machine.process)
        self.saves += 1
        self.model.promises += 1
        await self._wait_durable(saved)

    def _state(self, rank: Rank) -> dict[str, bytes]:
        sizes = [self._chance.choice((1, 100, 4096, 5000, 9000)) for _ in range(self._chance.randrange(1, 3))]
        names = ["state.pt" if self._chance.random() < 0.5 else f"rank{rank.number}.pt", f"optim{rank.number}.pt"]
        return {name: self._chance.randbytes(size) for name, size in zip(names, sizes, strict=False)}

    async def _wait_durable(self, saved: Saved) -> None:
        tier = self._chance.choice((None, Tier.TIER1, Tier.TIER1, Tier.TIER2))
        if tier is None:
            return

        async def wait(rank: Rank) -> bool:
            in_tier1, in_tier2 = await rank.reached(saved.id, tier, 60.0)
            if in_tier1:
                saved.told.add(rank.machine.number)
            return in_tier2

        if all(await self.everybody(wait)):
            saved.told_tier2 = True

    async def train(self) -> None:
        """Restore, claim, save again and again, until the world ends it."""
        try:
            await self.restore()
            if self.reader:
                return
            await self.claim()
            while True:
                await asyncio.sleep(self._chance.choice((0.0, 0.5, 5.0)) * self._chance.random())
                try:
                    await self.save()
                except (OverloadedError, SaveFailedError, UnavailableError) as error:
                    self.model.note(f"a save failed: {error.message}")
        except (CairnError, RankDiedError) as error:
            self.model.note(f"a launch ended: {error!r}")

    async def keep_alive(self) -> None:
        """Signs of life of all ranks, unless they are stopped."""
        while True:
            await asyncio.sleep(15.0)
            if not self.pausing:
                for rank in self.ranks:
                    try:
                        await rank.keep_alive()
                    except (GoneError, CairnError):
                        continue
