"""Requests to persist: by a waiting client, by an operator, by a job whose ranks are gone, by a daemon that stops."""

from __future__ import annotations

from cairn_api.errors import CairnError, ConfigurationError, VersionError
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.events import EventLog
from cairnd.manifest import NOTE_FORMAT, encode
from cairnd.model import CopyState, Tier, Version, VersionState
from cairnd.replication.replicator import Replicator
from cairnd.replication.storage import Storage
from cairnd.tiers.local import LocalTier
from cairnd.workers import Workers


class Persistence:
    """Raises a version's flag after the fact, durably, where all daemons of the job see it."""

    def __init__(
        self,
        catalog: Catalog,
        tier1: LocalTier,
        storage: Storage,
        replicator: Replicator,
        workers: Workers,
        events: EventLog,
    ) -> None:
        self._catalog = catalog
        self._tier1 = tier1
        self._storage = storage
        self._replicator = replicator
        self._workers = workers
        self._events = events

    async def request(self, version: Version, *, by_itself: bool = False) -> bool:
        """Ask for *version* in tier 2; returns False if that was asked for, or done, already.

        What the daemon asks for *by itself* may lose its place in the queue when tier 1 is full, as if it had been
        flagged at ``create``: a long outage of the bucket must not stop training.

        Raises :class:`ConfigurationError` when the job has no tier 2 and :class:`VersionError` for a version that will
        not be committed.
        """
        if version.has(Tier.TIER2):
            return False
        if version.state in (VersionState.ABORTED, VersionState.DELETING):
            raise VersionError(f"{version} is {version.state}: {version.reason}", hint="choose another version")
        refused = version.copy(Tier.TIER2)
        if refused.state is CopyState.EVICTED and refused.error:
            raise VersionError(
                f"tier 2 has refused {version}: {refused.error}",
                hint="`cairn export` saves it; persist a newer version",
            )
        url = self._replicator.location(version.job)
        if not url:
            raise ConfigurationError(
                f"job {version.job!r} has no tier 2",
                hint="set persistent_storage_path in cairnd.toml or in the job's settings",
            )
        already, version.requested = version.requested, True
        version.by_itself = by_itself and (version.by_itself or not already)
        key = layout.request(version.job, version.id)
        await self._workers.run(self._tier1.put_small, key, _note(version))
        if not already:
            self._events.publish("persist_requested", version.job, version.id)
        self._replicator.wake(version)
        if not version.complete:
            # Other nodes hold the rest; without the bucket they hear of it when it is back.
            try:
                bucket = await self._storage.bucket(url)
                await self._workers.run(bucket.request_persist, version.job, version.id)
            except CairnError as error:
                self._events.publish("persist_request_local", version.job, version.id, error=error)
        return not already

    def newest(self, job: str, *, passed_over: bool = True) -> Version | None:
        """The newest version of *job* that is committed and intact somewhere, or is about to be.

        Without *passed_over* only what automatic resume takes counts.
        """
        for version in self._catalog.versions(job):
            held = version.state is VersionState.SEALED or version.has(Tier.TIER1) or version.has(Tier.TIER2)
            if version.restorable and held and (passed_over or not version.passed_over):
                return version
        return None

    async def request_newest(self, job: str) -> None:
        """The job's ranks are gone, or this daemon stops: what was committed last must not exist only here.

        Nor what the next launch resumes from, if that passes the last one over.
        """
        newest, taken = self.newest(job), self.newest(job, passed_over=False)
        for version in (newest, taken if taken is not newest else None):
            if version is not None and self._replicator.location(job) and not version.has(Tier.TIER2):
                await self.request(version, by_itself=True)


def _note(version: Version) -> bytes:
    return encode({"format": NOTE_FORMAT, "version": str(version.id), "by_itself": version.by_itself})
