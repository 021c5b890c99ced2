"""What is known against a version: durable, one small file a version, below ``.cairn/health``.

Which of its copies were found *damaged*: a manifest says what a copy should be, never that somebody has read it and
found it otherwise. Without these records a restart would take a damaged version for an intact one again, and retention
would delete an older one in its favour. Which *resumes* in a row died on it before they had saved anything: after some,
it is *passed over* by automatic resume, however intact its bytes are.

A record is written soon after the finding and removed soon after the copy was read, or written, anew. Should the daemon
be killed in between, the finding is made again by the next look: the safe side of both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cairn_api.errors import CairnError, ConfigurationError, OverloadedError, VersionError
from cairn_api.names import VersionId, parse_version
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.verified import VerifiedFiles
from cairnd.clock import Clock
from cairnd.events import EventLog
from cairnd.manifest import NOTE_FORMAT, decode, encode, text
from cairnd.model import Copy, CopyState, Tier, Version
from cairnd.settings import MOST_RESUMES
from cairnd.tiers.atomic import TEMPORARY_SUFFIX
from cairnd.tiers.local import LocalTier
from cairnd.workers import Workers

_DURABLE = (Tier.TIER1, Tier.TIER2)
_RETRY_S = 30.0
_LONGEST_ATTEMPT = 64

Key = tuple[str, VersionId]


@dataclass(frozen=True, slots=True)
class Health:
    """The record of one version. ``damaged`` says what is wrong in which tier, ``resumes`` names attempts.

    ``lost``: all ranks had agreed on it, and the daemon ended before it was in tier 1.
    """

    damaged: dict[Tier, str] = field(default_factory=dict)
    resumes: tuple[str, ...] = ()
    passed_over: str = ""
    lost: bool = False

    def encode(self) -> bytes:
        """Canonical JSON."""
        damaged = {str(tier): problem for tier, problem in self.damaged.items()}
        return encode(
            {
                "format": NOTE_FORMAT,
                "damaged": damaged,
                "resumes": self.resumes,
                "passed_over": self.passed_over,
                "lost": self.lost,
            }
        )

    @classmethod
    def decode(cls, data: bytes, what: str) -> Health:
        """Raises :class:`VersionError` when the record is damaged."""
        document = decode(data, NOTE_FORMAT, what)
        try:
            return cls(
                {Tier(tier): text(problem) for tier, problem in document["damaged"].items()},
                tuple(text(attempt) for attempt in document["resumes"]),
                text(document["passed_over"]),
                bool(document["lost"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise VersionError(f"{what} is damaged: field missing or invalid ({error})") from error

    def apply(self, version: Version) -> None:
        """Say in *version* what is known against it."""
        for tier, problem in self.damaged.items():
            version.copies[tier] = Copy(CopyState.FAILED, problem, damaged=True)
        version.passed_over = self.passed_over


_SOUND = Health()


def read_records(tier1: LocalTier) -> tuple[dict[Key, Health], list[str]]:
    """All records, and the keys of damaged or unreadable ones, which are left in place for the operator. Blocks.

    A folder of records that cannot be listed is named like one of them. Raises :class:`OverloadedError` when
    descriptors or memory ran out.
    """
    records: dict[Key, Health] = {}
    damaged: list[str] = []
    if not tier1.exists(layout.HEALTH):
        return records, damaged
    for folder in tier1.list_folder(layout.HEALTH):
        try:
            entries = tier1.list_folder(f"{layout.HEALTH}/{folder.name}") if folder.is_folder else []
        except OverloadedError:
            raise
        except CairnError:
            damaged.append(f"{layout.HEALTH}/{folder.name}")
            continue
        for entry in entries:
            if entry.name.startswith(".") and entry.name.endswith(TEMPORARY_SUFFIX):
                continue  # of a daemon that was killed while it wrote one
            try:
                version = parse_version(entry.name.removesuffix(".json"))
                key = layout.health(folder.name, version)
                records[folder.name, version] = Health.decode(tier1.read_small(key), key)
            except OverloadedError:
                raise
            except CairnError:
                damaged.append(f"{layout.HEALTH}/{folder.name}/{entry.name}")
    return records, damaged


class HealthBook:
    """Follows the catalog: what is found there is on disk a moment later, and after a restart in the catalog again.

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
        *,
        most_resumes: int,
    ) -> None:
        self._catalog = catalog
        self._tier1 = tier1
        self._verified = verified
        self._workers = workers
        self._clock = clock
        self._events = events
        self._most_resumes = most_resumes
        self._records: dict[Key, Health] = {}
        self._alive: dict[int, tuple[Key, str]] = {}
        """Resumes that are under way, by client."""
        self._applied: set[Key] = set()
        self._unwritten: set[Key] = set()
        self._writing = asyncio.Lock()
        self._awake = asyncio.Event()
        catalog.on_change(self._follow)

    def load(self) -> list[str]:
        """Read all records; returns the keys of damaged ones."""
        self._records, damaged = read_records(self._tier1)
        return damaged

    def note_missing(self, job: str, version: VersionId, problem: str) -> None:
        """The tier 1 copy of a version that is not in the catalog yet is damaged, manifest and all."""
        known = self._records.get((job, version), _SOUND)
        self._records[job, version] = replace(known, damaged={**known.damaged, Tier.TIER1: problem})

    def note_lost(self, job: str, version: VersionId) -> None:
        """A version that all ranks had agreed on went with the daemon; recovery may have had no room to write that."""
        self._set((job, version), replace(self._records.get((job, version), _SOUND), lost=True))

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
        """Make all findings so far durable.

        Raises what the tier raises, after all others were written; what was not written stays to be written.
        """
        failures: list[CairnError] = []
        async with self._writing:
            for key in list(self._unwritten):
                try:
                    await self._settle(key)
                except CairnError as error:
                    failures.append(error)
        if failures:
            raise failures[0]

    async def _settle(self, key: Key) -> None:
        while key in self._unwritten:
            record = self._records.get(key, _SOUND)
            await self._workers.run(self._write, key, record)
            if record == self._records.get(key, _SOUND):
                self._unwritten.discard(key)

    async def resume_began(self, client: int, version: Version, attempt: str) -> int:
        """A launch goes on from *version*, chosen automatically; returns how many before it died in a row.

        Told once by a rank of each node, and again to a daemon that was restarted meanwhile: *attempt* is its name.
        """
        if len(attempt) > _LONGEST_ATTEMPT:
            raise ConfigurationError("the name of a resume is too long", hint="report this: the client made it")
        key = (version.job, version.id)
        if self._alive.get(client) != (key, attempt):
            self.resume_ended(client)  # it loads once more, so what it loaded before did not kill it
        record = self._records.get(key, _SOUND)
        died = len([name for name in record.resumes if name != attempt and (key, name) not in self._alive.values()])
        self._alive[client] = (key, attempt)
        if attempt not in record.resumes:
            self._change(version, replace(record, resumes=(*record.resumes, attempt)[-MOST_RESUMES:]))
        await self.settle()
        return died

    def resume_ended(self, client: int) -> None:
        """The launch ended without an error, if it was under way: that does not speak against its version."""
        if client in self._alive:
            key, attempt = self._alive.pop(client)
            self._keep_resumes(key, lambda name: name != attempt)

    def client_gone(self, client: int) -> None:
        """The process ended, or this daemon lost it: a resume that it had not ended, and saved nothing, has died."""
        if client in self._alive:
            (job, version_id), _ = self._alive.pop(client)
            version = self._catalog.get(job, version_id)
            if version is not None:
                self._judge(version)

    def saved(self, version: Version) -> None:
        """A version of the job is in tier 1: whatever it was resumed from was good enough."""
        for key, record in list(self._records.items()):
            if key[0] == version.job and record.resumes:
                self._keep_resumes(key, lambda _: False)
            if key[0] == version.job and record.lost and key[1] <= version.id:
                self._set(key, replace(record, lost=False))
        self._alive = {client: found for client, found in self._alive.items() if found[0][0] != version.job}

    def lost(self, job: str | None = None) -> list[Key]:
        """Versions (of *job*) that were captured and are not there any more, oldest first.

        One whose trainer lives is offered again and comes back; a later launch that saves has heard of it.
        """
        return sorted(
            key
            for key, record in self._records.items()
            if record.lost and job in (None, key[0]) and self._catalog.get(*key) is None
        )

    def mark(self, version: Version, reason: str) -> bool:
        """Have automatic resume pass *version* over, or no longer (empty *reason*); returns whether that changed.

        Marked as sound, a version gets as many resumes as a new one.
        """
        record = self._records.get((version.job, version.id), _SOUND)
        changed = record.passed_over != reason
        self._change(version, replace(record, passed_over=reason, resumes=record.resumes if reason else ()))
        if changed:
            name = "version_passed_over" if reason else "version_sound"
            self._events.publish(name, version.job, version.id, reason=reason)
        return changed

    def judge(self, job: str) -> None:
        """Somebody is about to choose a version of *job*: resumes may have died with this daemon."""
        for version in list(self._catalog.versions(job)):
            self._judge(version)

    def _judge(self, version: Version) -> None:
        key = (version.job, version.id)
        record = self._records.get(key, _SOUND)
        died = [name for name in record.resumes if (key, name) not in self._alive.values()]
        if self._most_resumes and len(died) >= self._most_resumes and not record.passed_over:
            self.mark(version, f"{len(died)} resumes in a row died on it before they had saved anything")

    def _keep_resumes(self, key: Key, keep: Callable[[str], bool]) -> None:
        record = self._records.get(key, _SOUND)
        version = self._catalog.get(*key)
        if version is not None:
            self._change(version, replace(record, resumes=tuple(filter(keep, record.resumes))))

    def _write(self, key: Key, record: Health) -> None:
        name = layout.health(*key)
        if record == _SOUND:
            self._tier1.delete(name)
        else:
            self._tier1.put_small(name, record.encode())

    def _follow(self, version: Version) -> None:
        key, known = (version.job, version.id), self._catalog.get(version.job, version.id)
        record = self._records.get(key, _SOUND)
        if known is None:
            if key in self._applied:  # it is gone from every tier
                self._applied.discard(key)
                self._set(key, _SOUND)
            return
        if known is not version:
            return  # one of another bucket under the same name
        if key not in self._applied:
            self._applied.add(key)
            record.apply(version)
        found = {tier: version.copy(tier).error for tier in _DURABLE if version.copy(tier).damaged}
        if Tier.TIER1 in found and Tier.TIER1 not in record.damaged:
            # What was read and found intact earlier is believed no more.
            self._verified.forget(layout.version_folder(*key))
        self._set(key, replace(record, damaged=found))

    def _change(self, version: Version, record: Health) -> None:
        version.passed_over = record.passed_over
        self._set((version.job, version.id), record)

    def _set(self, key: Key, record: Health) -> None:
        if record == self._records.get(key, _SOUND):
            return
        if record == _SOUND:
            del self._records[key]
        else:
            self._records[key] = record
        self._unwritten.add(key)
        self._awake.set()
