"""``cairn verify``: looks at the copies of versions, records what it finds, and says how far it is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from cairn_api.errors import CairnError
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.health import HealthBook
from cairnd.model import Copy, CopyState, Tier, Version
from cairnd.replication.storage import Storage
from cairnd.tiers.local import LocalTier
from cairnd.upkeep.looking import Judge, Unseen, is_held
from cairnd.upkeep.verifier import Finding, GoneError, check_tier1, check_tier2
from cairnd.workers import Workers

_PROGRESS_S = 0.5
_TIERS = (Tier.TIER1, Tier.TIER2)


class _StoppedError(Exception):
    """Ends the reading of a copy when nobody waits for it any more."""


@dataclass(frozen=True, slots=True)
class Step:
    """How far a verification is; ``findings`` are those of the copy that was looked at last."""

    done_bytes: int
    total_bytes: int
    versions: int = 0
    copies: int = 0
    findings: tuple[Finding, ...] = ()


class Verification:
    """What it finds damaged is durably known when it says so; a deep look that finds nothing acquits a copy."""

    def __init__(
        self,
        catalog: Catalog,
        tier1: LocalTier,
        storage: Storage,
        health: HealthBook,
        workers: Workers,
        judge: Judge,
        *,
        location: Callable[[str], str],
    ) -> None:
        self._catalog = catalog
        self._tier1 = tier1
        self._storage = storage
        self._health = health
        self._workers = workers
        self._judge = judge
        self._location = location

    async def verify(self, versions: Sequence[Version], *, deep: bool) -> AsyncGenerator[Step, None]:
        """Look at every copy of *versions*, tier 1 first: manifests and sizes, with *deep* every byte.

        What keeps it from looking at a copy (a bucket that does not answer, no descriptors, no rights) is raised when
        it has looked at the others. Closed before its end, it stops reading.
        """
        total = sum(version.size_bytes for version, tier, _ in self._copies(versions) if version.has(tier))
        done, copies, guard, stop = 0, 0, threading.Lock(), threading.Event()
        seen: set[str] = set()
        unseen = Unseen()

        def progress(size_bytes: int) -> None:
            nonlocal done
            if stop.is_set():
                raise _StoppedError
            with guard:
                done += size_bytes

        for version, tier, place in self._copies(versions):
            error = unseen.given_up(place)
            if error is not None:
                unseen.note(version.id, tier, place, error)
                continue
            looking = asyncio.ensure_future(self._look(version, tier, place, progress, deep=deep))
            try:
                while not (await asyncio.wait({looking}, timeout=_PROGRESS_S))[0]:
                    yield Step(done, total)
                found = looking.result()
            except GoneError:
                continue
            except CairnError as failure:
                unseen.note(version.id, tier, place, failure)
                continue
            finally:
                if not looking.done():  # the thread ends at its next block
                    stop.set()
                    looking.cancel()
            unseen.seen(place)
            seen.add(str(version))
            copies += 1
            yield Step(done, total, len(seen), copies, tuple(found))
        unseen.tell()

    def _copies(self, versions: Sequence[Version]) -> Iterator[tuple[Version, Tier, str]]:
        """What there is to look at now, and where; a record may speak of a tier 2 that is not configured any more."""
        for version in versions:
            for tier in _TIERS:
                place = self._location(version.job) if tier is Tier.TIER2 else str(self._tier1.root)
                if place and is_held(version, tier):
                    yield version, tier, place

    async def _look(
        self, version: Version, tier: Tier, place: str, progress: Callable[[int], None], *, deep: bool
    ) -> list[Finding]:
        before = version.copy(tier)
        if tier is Tier.TIER1:
            looking = check_tier1(self._tier1, version, deep=deep, progress=progress)
        else:
            bucket = await self._storage.bucket(place)
            looking = check_tier2(bucket, version, deep=deep, progress=progress)
        found: list[Finding] = []
        try:
            await self._workers.run(found.extend, looking)
        except CairnError:
            if not found:  # else it is damaged, whatever could not be looked at beside that
                raise
        if found and not self._judge.condemn(version, tier, before, found[0].text):
            return []
        self._acquit(version, tier, before, found, deep=deep)
        with suppress(CairnError):  # a full disk, say: the health book reports it and tries again
            await self._health.settle()
        return found

    def _acquit(self, version: Version, tier: Tier, before: Copy, found: list[Finding], *, deep: bool) -> None:
        """A look at sizes cannot acquit a copy whose bytes were wrong, and none what others found wrong meanwhile."""
        if not found and deep and before.damaged and version.copy(tier) is before and is_held(version, tier):
            self._catalog.set_copy(version, tier, CopyState.VERIFIED)
