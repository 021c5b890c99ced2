"""Merges what the bucket holds into the catalog, so that a version has one entry whatever tiers it is in.

A version of the bucket is believed only through its decision key. Small records are read again only when their listing
changed, so looking often is cheap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from cairn_api.errors import CairnError, UnavailableError
from cairn_api.names import VersionId
from cairnd.catalog.catalog import Catalog
from cairnd.events import EventLog
from cairnd.manifest import NodeManifest
from cairnd.model import Copy, CopyState, Tier, Version, VersionState
from cairnd.replication.bucket import BucketRepository, Decision, EpochClaim, Verdict
from cairnd.replication.storage import Storage
from cairnd.tiers.errors import is_damage
from cairnd.workers import Workers

_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class BucketView:
    """What a bucket says of one job to ``node``. ``damaged``: committed versions that cannot be believed, with why."""

    node: str
    decisions: dict[VersionId, Decision]
    manifests: dict[VersionId, list[NodeManifest]]
    damaged: dict[VersionId, str]
    epochs: list[EpochClaim]
    pins: set[VersionId]
    requests: set[VersionId]


def view(
    bucket: BucketRepository,
    job: str,
    known: Callable[[VersionId], bool],
    *,
    listed: Callable[[VersionId], bool] = lambda _: True,
) -> BucketView:
    """Read a job's records; manifests only of committed versions that are not *known* yet. Blocks.

    That a version was deleted and swept long ago matters only where it is still *listed*.
    """
    decisions = bucket.decisions(job, swept=listed)
    manifests: dict[VersionId, list[NodeManifest]] = {}
    damaged: dict[VersionId, str] = {}
    for version, decision in decisions.items():
        if decision.verdict is Verdict.DAMAGED:
            damaged[version] = str(decision.document["problem"])
        elif decision.verdict is Verdict.COMMITTED and not known(version):
            try:
                manifests[version] = bucket.committed(job, version, decision)
            except CairnError as error:
                if not is_damage(error):
                    raise
                damaged[version] = error.message
    return BucketView(
        bucket.node, decisions, manifests, damaged, bucket.epochs(job), bucket.pins(job), bucket.requests(job)
    )


def merged(manifests: list[NodeManifest]) -> Version:
    """One version from the manifests of all its nodes."""
    version = manifests[0].version(VersionState.COMMITTED)
    version.ranks = frozenset(rank for manifest in manifests for rank in manifest.ranks)
    by_path = {partition.path: partition for manifest in manifests for partition in manifest.partitions}
    version.partitions = tuple(by_path[path] for path in sorted(by_path))
    version.copies[Tier.TIER2] = Copy(CopyState.VERIFIED)
    return version


class Inventory:
    """Keeps the catalog's idea of tier 2 fresh."""

    def __init__(
        self,
        catalog: Catalog,
        storage: Storage,
        workers: Workers,
        events: EventLog,
        *,
        location: Callable[[str], str],
        on_deleted: Callable[[str, VersionId], None],
    ) -> None:
        self._catalog = catalog
        self._storage = storage
        self._workers = workers
        self._events = events
        self._location = location
        self._on_deleted = on_deleted
        self._epochs: dict[str, list[EpochClaim]] = {}
        self._looking: dict[str, asyncio.Task[str]] = {}
        self._unreadable: dict[str, set[VersionId]] = {}
        self._unreadable_here: set[tuple[str, VersionId]] = set()

    def newest_claim(self, job: str) -> EpochClaim | None:
        """The newest epoch claim seen in the bucket."""
        claims = self._epochs.get(job, [])
        return claims[0] if claims else None

    def note_unreadable(self, versions: Iterable[tuple[str, VersionId]]) -> None:
        """Versions that tier 1 once held and whose manifests are damaged."""
        self._unreadable_here.update(versions)

    def unreadable(self, job: str) -> list[VersionId]:
        """Versions that were saved and that nobody can describe any more: not in the catalog, and not "nothing"."""
        here = {version for owner, version in self._unreadable_here if owner == job}
        unreadable = here | self._unreadable.get(job, set())
        return sorted(version for version in unreadable if self._catalog.get(job, version) is None)

    def has_bucket(self, job: str) -> bool:
        """Whether :meth:`refresh` has anything to look at."""
        return bool(self._location(job))

    async def refresh(self, job: str) -> str:
        """Bring *job* up to date with its bucket; returns why not all of it could be read, or an empty string.

        A bucket that hangs must not hold up a resume from tier 1: the answer comes after a few seconds in any case,
        and the look goes on in the background. Callers that come meanwhile share it.
        """
        url = self._location(job)
        if not url:
            return ""
        looking = self._looking.get(job)
        if looking is None:
            looking = self._looking[job] = asyncio.ensure_future(self._refresh(job, url))
            looking.add_done_callback(lambda _: self._looking.pop(job, None))
        done, _ = await asyncio.wait({looking}, timeout=_PATIENCE_S)
        if done:
            return looking.result()
        return _silent(url)

    async def _refresh(self, job: str, url: str) -> str:
        try:
            bucket = await self._storage.bucket(url)
            seen = await self._workers.run(
                partial(
                    view, bucket, job, lambda version: self._knows(job, version),
                    listed=lambda version: self._catalog.get(job, version) is not None,
                )
            )  # fmt: skip
        except CairnError as error:
            self._storage.note_failure(url, error)
            return str(error)
        self._storage.note_answer(url)
        self._epochs[job] = seen.epochs
        self._unreadable[job] = set(seen.damaged)
        self._merge(job, seen)
        return "; ".join(claim.problem for claim in seen.epochs if claim.problem)

    async def refresh_all(self) -> str:
        """Bring every job up to date, also those that only the daemon's own bucket knows."""
        jobs, error = set(self._catalog.jobs()), ""
        if self._storage.default_url:
            known = asyncio.ensure_future(self._jobs_of_bucket())
            if not (await asyncio.wait({known}, timeout=_PATIENCE_S))[0]:
                known.cancel()
                return _silent(self._storage.default_url)
            found = known.result()
            if isinstance(found, str):
                return found
            jobs |= found
        for job in sorted(jobs):
            error = await self.refresh(job) or error
        return error

    async def _jobs_of_bucket(self) -> set[str] | str:
        try:
            bucket = await self._storage.bucket(self._storage.default_url)
            return set(await self._workers.run(bucket.jobs))
        except CairnError as error:
            self._storage.note_failure(self._storage.default_url, error)
            return str(error)

    async def read_source(self, url: str, job: str) -> tuple[list[Version], EpochClaim | None, list[VersionId]]:
        """Versions of *job* in another bucket, newest first, not merged into the catalog; and what is damaged there."""
        self._storage.check_allowed(url)
        bucket = await self._storage.bucket(url)
        seen = await self._workers.run(view, bucket, job, lambda _: False)
        versions = [merged(manifests) for manifests in seen.manifests.values()]
        newest_claim = seen.epochs[0] if seen.epochs else None
        return sorted(versions, key=lambda version: version.id, reverse=True), newest_claim, sorted(seen.damaged)

    def _knows(self, job: str, version: VersionId) -> bool:
        known = self._catalog.get(job, version)
        return known is not None and known.has(Tier.TIER2)

    def _merge(self, job: str, seen: BucketView) -> None:
        for version_id, decision in seen.decisions.items():
            version = self._catalog.get(job, version_id)
            if decision.verdict in (Verdict.COMMITTED, Verdict.DAMAGED):
                self._merge_committed(job, version_id, version, seen)
            elif decision.verdict is Verdict.DELETED:
                if version is not None and version.copy(Tier.TIER2).state in (CopyState.VERIFIED, CopyState.FAILED):
                    self._catalog.set_copy(version, Tier.TIER2, CopyState.EVICTED, reason="deleted in the bucket")
                    if not version.holds(Tier.TIER1):
                        self._catalog.forget(version)
            elif version is not None and version.state is VersionState.PREPARED:
                self._catalog.move(version, VersionState.ABORTED, "fenced off in the bucket by a later launch")
            if decision.verdict in (Verdict.DELETED, Verdict.ABORTED) and not decision.swept:
                self._on_deleted(job, version_id)
        for version in self._catalog.versions(job):
            version.pinned = version.pinned or version.id in seen.pins
            version.requested = version.requested or version.id in seen.requests

    def _merge_committed(self, job: str, version_id: VersionId, version: Version | None, seen: BucketView) -> None:
        if version_id in seen.damaged:
            if version is not None:
                self._catalog.set_damaged(version, Tier.TIER2, seen.damaged[version_id])
            else:
                self._events.publish("copy_failed", job, version_id, tier=Tier.TIER2, error=seen.damaged[version_id])
            return
        manifests = seen.manifests.get(version_id)
        if manifests is None:
            return
        if version is None:
            version = self._catalog.add(merged(manifests))
            own = next((manifest for manifest in manifests if manifest.node == seen.node), None)
            if own is not None and version.copy(Tier.TIER1).damaged:
                # What tier 1 lost is this node's part, and no more than that is made again.
                version.ranks, version.partitions = frozenset(own.ranks), own.partitions
        elif version.nonce == manifests[0].nonce:
            # Only a look at its bytes or a new upload acquits a damaged copy, and one that is under way has not done so
            # yet. An upload that failed here says nothing about the copy that was decided meanwhile, or before.
            copy = version.copy(Tier.TIER2)
            # What was deleted or refused while this was being read stays so: no decision is ever taken back.
            if not copy.damaged and copy.state not in (CopyState.COPYING, CopyState.EVICTED):
                self._catalog.set_copy(version, Tier.TIER2, CopyState.VERIFIED)
            if version.state is VersionState.PREPARED:
                self._catalog.move(version, VersionState.COMMITTED)
        else:
            self._catalog.set_copy(
                version, Tier.TIER2, CopyState.EVICTED, "another launch's version of this name is in the bucket"
            )


def _silent(url: str) -> str:
    return str(
        UnavailableError(
            f"tier 2 at {url} has not answered for {_PATIENCE_S:g} s; versions that only it holds are missing here",
            hint="ask again; if it stays silent, look at the object store and the network between",
        )
    )
