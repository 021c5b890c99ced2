"""``cairn verify``: looks at the copies of versions, records what it finds, and says how far it is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from cairn_api.errors import CairnError
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.health import HealthBook
from cairnd.catalog.verified import VerifiedFiles
from cairnd.model import Copy, CopyState, Tier, Version, VersionState
from cairnd.replication.storage import Storage
from cairnd.tiers.local import LocalTier
from cairnd.upkeep.verifier import Finding, check_tier1, check_tier2
from cairnd.workers import Workers

_PROGRESS_S = 0.5
_TIERS = (Tier.TIER1, Tier.TIER2)


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
        verified: VerifiedFiles,
        storage: Storage,
        health: HealthBook,
        workers: Workers,
        *,
        location: Callable[[str], str],
    ) -> None:
        self._catalog = catalog
        self._tier1 = tier1
        self._verified = verified
        self._storage = storage
        self._health = health
        self._workers = workers
        self._location = location

    async def verify(self, versions: Sequence[Version], *, deep: bool) -> AsyncIterator[Step]:
        """Look at every copy of *versions*, tier 1 first: manifests and sizes, with *deep* every byte.

        Raises :class:`UnavailableError` when a bucket does not answer, :class:`OverloadedError` when it cannot look.
        """
        total = sum(version.size_bytes * sum(version.has(tier) for tier in _TIERS) for version in versions)
        done, copies, guard = 0, 0, threading.Lock()

        def progress(size_bytes: int) -> None:
            nonlocal done
            with guard:
                done += size_bytes

        for number, version in enumerate(versions, start=1):
            for tier in _TIERS:
                if not _is_held(version, tier):
                    continue
                before = version.copy(tier)
                looking = asyncio.ensure_future(self._look(version, tier, progress, deep=deep))
                while not (await asyncio.wait({looking}, timeout=_PROGRESS_S))[0]:
                    yield Step(done, total)
                found = looking.result()
                copies += 1
                if not _is_held(version, tier):
                    found = []  # it was deleted meanwhile
                await self._record(version, tier, before, found, deep=deep)
                yield Step(done, total, number, copies, tuple(found))

    async def _look(
        self, version: Version, tier: Tier, progress: Callable[[int], None], *, deep: bool
    ) -> list[Finding]:
        if tier is Tier.TIER1:
            found = check_tier1(self._tier1, version, deep=deep, progress=progress)
        else:
            bucket = await self._storage.bucket(self._location(version.job))
            found = check_tier2(bucket, version, deep=deep, progress=progress)
        return await self._workers.run(list, found)

    async def _record(self, version: Version, tier: Tier, before: Copy, found: list[Finding], *, deep: bool) -> None:
        if found:
            if tier is Tier.TIER1:  # whoever makes it again must not believe what was read of it earlier
                self._verified.forget(f"{layout.version_folder(version.job, version.id)}/")
            self._catalog.set_damaged(version, tier, found[0].text)
        # A look at sizes cannot acquit a copy whose bytes were wrong, and none what others found wrong meanwhile.
        elif deep and before.damaged and version.copy(tier) is before:
            self._catalog.set_copy(version, tier, CopyState.VERIFIED)
        with suppress(CairnError):  # a full disk, say: the health book reports it and tries again
            await self._health.settle()


def _is_held(version: Version, tier: Tier) -> bool:
    """Whether *tier* should have a copy, intact or not: a failed upload has left none, and what is deleted has gone."""
    gone = version.state in (VersionState.DELETING, VersionState.ABORTED)
    return (version.has(tier) or version.copy(tier).damaged) and not gone
