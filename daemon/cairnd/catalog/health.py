"""Which copies were found damaged: durable, one small file a version, below ``.cairn/health``.

A manifest says what a copy should be, never that somebody has read it and found it otherwise. Without these records a
restart would take a damaged version for an intact one again, and retention would delete an older one in its favour.
A record is written soon after the finding and removed soon after the copy was read, or written, anew. Should the daemon
be killed in between, the finding is made again by the next look: the safe side of both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from cairn_api.errors import CairnError, ConfigurationError, VersionError
from cairn_api.names import VersionId, parse_version
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.verified import VerifiedFiles
from cairnd.clock import Clock
from cairnd.events import EventLog
from cairnd.manifest import NOTE_FORMAT, decode, encode
from cairnd.model import Copy, CopyState, Tier, Version
from cairnd.tiers.local import LocalTier
from cairnd.workers import Workers

_DURABLE = (Tier.TIER1, Tier.TIER2)
_RETRY_S = 30.0

Key = tuple[str, VersionId]


class HealthBook:
    """Follows the catalog: what is damaged there is on disk a moment later, and after a restart in the catalog again.

    Used from the event loop's thread, but for :meth:`load`, which blocks and comes first.
    """

    def __init__(
        self,
        catalog: Catalog,
        tier1: LocalTier,
        verified: VerifiedFiles,
        workers: Workers,
        clock: Clock,
        events: EventLog,
    ) -> None:
        self._catalog = catalog
        self._tier1 = tier1
        self._verified = verified
        self._workers = workers
        self._clock = clock
        self._events = events
        self._records: dict[Key, dict[Tier, str]] = {}
        self._applied: set[Key] = set()
        self._unwritten: set[Key] = set()
        self._writing = asyncio.Lock()
        self._awake = asyncio.Event()
        catalog.on_change(self._follow)

    def load(self) -> list[str]:
        """Read all records; returns the keys of damaged ones, which are left in place for the operator."""
        damaged: list[str] = []
        if not self._tier1.exists(layout.HEALTH):
            return damaged
        for folder in self._tier1.list_folder(layout.HEALTH):
            for entry in self._tier1.list_folder(f"{layout.HEALTH}/{folder.name}") if folder.is_folder else ():
                name = f"{layout.HEALTH}/{folder.name}/{entry.name}"
                try:
                    version = parse_version(entry.name.removesuffix(".json"))
                    key = layout.health(folder.name, version)
                    document = decode(self._tier1.read_small(key), NOTE_FORMAT, key)
                    found = {Tier(tier): str(problem) for tier, problem in document["damaged"].items()}
                except (VersionError, ConfigurationError, KeyError, AttributeError, ValueError):
                    damaged.append(name)
                    continue
                self._records[folder.name, version] = found
        return damaged

    def note_missing(self, job: str, version: VersionId, problem: str) -> None:
        """The tier 1 copy of a version that is not in the catalog yet is damaged, manifest and all."""
        self._records.setdefault((job, version), {})[Tier.TIER1] = problem

    async def run(self) -> None:
        """Write records as findings change, for ever; a full disk is tried again."""
        while True:
            await self._awake.wait()
            self._awake.clear()
            try:
                await self.settle()
            except CairnError as error:
                self._events.publish("health_not_written", error=error)
                await self._clock.sleep(_RETRY_S)
                self._awake.set()

    async def settle(self) -> None:
        """Make all findings so far durable. Raises what the tier raises; what was not written stays to be written."""
        async with self._writing:
            while self._unwritten:
                key = next(iter(self._unwritten))
                record = dict(self._records.get(key, {}))
                await self._workers.run(self._write, key, record)
                if record == self._records.get(key, {}):
                    self._unwritten.discard(key)

    def _write(self, key: Key, record: Mapping[Tier, str]) -> None:
        job, version = key
        name = layout.health(job, version)
        if record:
            document = {"format": NOTE_FORMAT, "damaged": {str(tier): problem for tier, problem in record.items()}}
            self._tier1.put_small(name, encode(document))
        else:
            self._tier1.delete(name)

    def _follow(self, version: Version) -> None:
        key, known = (version.job, version.id), self._catalog.get(version.job, version.id)
        if known is None:
            if key in self._applied:  # it is gone from every tier
                self._applied.discard(key)
                self._change(key, {})
            return
        if known is not version:
            return  # one of another bucket under the same name
        if key not in self._applied:
            self._applied.add(key)
            for tier, problem in self._records.get(key, {}).items():
                version.copies[tier] = Copy(CopyState.FAILED, problem, damaged=True)
        found = {tier: version.copy(tier).error for tier in _DURABLE if version.copy(tier).damaged}
        if Tier.TIER1 in found and Tier.TIER1 not in self._records.get(key, {}):
            # What was read and found intact earlier is believed no more.
            self._verified.forget(layout.version_folder(*key))
        self._change(key, found)

    def _change(self, key: Key, record: dict[Tier, str]) -> None:
        if record == self._records.get(key, {}):
            return
        if record:
            self._records[key] = record
        else:
            del self._records[key]
        self._unwritten.add(key)
        self._awake.set()
