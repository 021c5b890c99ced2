"""Downloads that are no proper copy: parts of a version, and what came from another bucket.

Retention knows copies, not files, so it never sees them. They are for the restores that asked for them and go with the
last of those.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from cairn_api.errors import CairnError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.leases import Leases
from cairnd.catalog.verified import VerifiedFiles
from cairnd.events import EventLog
from cairnd.model import CopyState, Tier, Version, VersionState
from cairnd.tiers.local import LocalTier
from cairnd.workers import Workers, to_the_end

_NO_COPY = (CopyState.ABSENT, CopyState.EVICTED)


@dataclass(slots=True)
class _Shared:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class KeyLocks:
    """Locks by key. A lock exists only while somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: dict[str, _Shared] = {}

    def __len__(self) -> int:
        return len(self._locks)

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        """Exclude everybody else who holds *key*."""
        shared = self._locks.setdefault(key, _Shared())
        shared.users += 1
        try:
            async with shared.lock:
                yield
        finally:
            shared.users -= 1
            if not shared.users:
                del self._locks[key]


class Partials:
    """Remembers which folders hold downloads, and deletes them once no restore of their version is left."""

    def __init__(
        self,
        catalog: Catalog,
        leases: Leases,
        tier1: LocalTier,
        verified: VerifiedFiles,
        locks: KeyLocks,
        workers: Workers,
        events: EventLog,
    ) -> None:
        self._catalog = catalog
        self._leases = leases
        self._tier1 = tier1
        self._verified = verified
        self._locks = locks
        self._workers = workers
        self._events = events
        self._folders: dict[tuple[str, VersionId], set[str]] = {}
        self._fetches: Counter[tuple[str, VersionId]] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    @contextmanager
    def fetching(self, version: Version) -> Iterator[None]:
        """Nothing of *version* is deleted meanwhile, even if the lease ends first (its client died)."""
        key = (version.job, version.id)
        self._fetches[key] += 1
        try:
            yield
        finally:
            self._fetches[key] -= 1
            if not self._fetches[key]:
                del self._fetches[key]
            self.tidy(*key)

    async def wait(self, folder: str) -> None:
        """Let a deletion of *folder* that has begun end; whoever has a lease need not fear another one."""
        async with self._locks.hold(folder):
            pass

    def note(self, version: Version, folder: str) -> None:
        """Something of *version* is about to be downloaded into *folder*."""
        self._folders.setdefault((version.job, version.id), set()).add(folder)

    def tidy(self, job: str, version: VersionId) -> None:
        """Delete, in the background, what was downloaded of a version that no restore here needs any more."""
        if (job, version) in self._folders and not self._needed(job, version):
            task = asyncio.ensure_future(self._tidy(job, version))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _tidy(self, job: str, version: VersionId) -> None:
        folders = self._folders.get((job, version), set())
        for folder in sorted(folders):
            async with self._locks.hold(folder):
                if self._needed(job, version):
                    return  # the next restore tidies up after itself
                try:
                    if folder != layout.version_folder(job, version) or await self._unlisted(job, version):
                        await to_the_end(self._workers.run(self._tier1.delete_tree, folder))
                        self._verified.forget(f"{folder}/")
                except CairnError as error:  # it stays noted for the next restore, and is swept at the next start
                    self._events.publish("delete_failed", job, version, tier=Tier.TIER1, error=error)
                    return
                folders.discard(folder)
        if not folders:
            self._folders.pop((job, version), None)

    def _needed(self, job: str, version: VersionId) -> bool:
        return (job, version) in self._fetches or self._leases.protects(job, version)

    async def _unlisted(self, job: str, version: VersionId) -> bool:
        """Whether the version's folder in tier 1 is neither a copy, nor a damaged one, nor becoming one."""
        if await self._workers.run(self._tier1.exists, layout.manifest(job, version)):
            return False
        found = self._catalog.get(job, version)
        return found is None or (found.state is VersionState.COMMITTED and found.copy(Tier.TIER1).state in _NO_COPY)
