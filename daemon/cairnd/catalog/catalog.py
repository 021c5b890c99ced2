"""The one authority on which versions this daemon knows, in which state, with copies where.

An index, not a database: it is rebuilt from tier 1's manifests and the bucket's decision keys, so it can be lost at any
moment. It is used from the event loop's thread only; every change passes through a method that checks the move and
publishes an event, and wakes whoever waits for a version to get somewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from difflib import get_close_matches

from cairn_api.errors import CairnError, VersionError
from cairn_api.names import VersionId, parse_version
from cairnd.clock import Clock
from cairnd.events import EventLog
from cairnd.model import Copy, CopyState, Tier, Version, VersionState


class Catalog:
    """Versions by job and id."""

    def __init__(self, clock: Clock, events: EventLog) -> None:
        self._clock = clock
        self._events = events
        self._jobs: dict[str, dict[VersionId, Version]] = {}
        self._waiters: dict[asyncio.Future[None], Callable[[], bool]] = {}
        self._last_persist_s: dict[str, float] = {}
        self._listeners: list[Callable[[Version], None]] = []
        self._damage_listeners: list[Callable[[Version, Tier], None]] = []

    def jobs(self) -> list[str]:
        """Names of the jobs with at least one version, sorted."""
        return sorted(self._jobs)

    def versions(self, job: str | None = None) -> Iterator[Version]:
        """Versions of *job* (of all jobs: by job), newest first."""
        for name in self.jobs() if job is None else [job]:
            entries = self._jobs.get(name, {})
            for key in sorted(entries, reverse=True):
                yield entries[key]

    def get(self, job: str, version: VersionId) -> Version | None:
        """The version, or None if it is not known."""
        return self._jobs.get(job, {}).get(version)

    def require(self, job: str, version: VersionId) -> Version:
        """The version, or :class:`VersionError`."""
        found = self.get(job, version)
        if found is None:
            raise VersionError(
                f"job {job!r} has no version {version}", hint=f"run `cairn list --job {job}`", context={"job": job}
            )
        return found

    def find(self, job: str, text: str) -> Version:
        """The version named *text*, or the newest restorable version of the tag *text*; else :class:`VersionError`."""
        try:
            exact = self.get(job, parse_version(text))
        except CairnError:
            exact = None
        if exact is not None:
            return exact
        for version in self.versions(job):
            if version.id.tag == text and version.restorable:
                return version
        tags = {version.id.tag for version in self.versions(job)}
        near = get_close_matches(text, tags, n=3)
        known = f"did you mean {', '.join(near)}? " if near else ""
        raise VersionError(
            f"job {job!r} has no version or tag {text!r}",
            hint=f"{known}run `cairn list --job {job}`",
            context={"job": job},
        )

    def max_epoch(self, job: str) -> int:
        """The highest epoch seen, 0 if none."""
        return max((key.epoch for key in self._jobs.get(job, {})), default=0)

    def add(self, version: Version) -> Version:
        """Take in a version that is not known yet."""
        self._jobs.setdefault(version.job, {})[version.id] = version
        self._notify(version)
        return version

    def forget(self, version: Version) -> None:
        """Drop a version that is gone from every tier."""
        entries = self._jobs.get(version.job, {})
        entries.pop(version.id, None)
        if not entries:
            self._jobs.pop(version.job, None)
        self._notify(version)

    def move(self, version: Version, state: VersionState, reason: str = "", **fields: object) -> None:
        """Change a version's state, publish ``version_<state>`` and wake waiters."""
        version.move(state, reason)
        if reason:
            fields["reason"] = reason
        self._events.publish(f"version_{state}", version.job, version.id, **fields)
        self._notify(version)

    def set_copy(self, version: Version, tier: Tier, state: CopyState, error: str = "", **fields: object) -> None:
        """Record where the copy in *tier* stands, publish ``copy_<state>`` and wake waiters.

        A damaged copy that is being written anew, or could not be, stays damaged until it is verified or gone.
        """
        before = version.copy(tier)
        damaged = before.damaged and state in (CopyState.COPYING, CopyState.FAILED)
        self._set_copy(version, tier, Copy(state, error or (before.error if damaged else ""), damaged), fields)

    def set_damaged(self, version: Version, tier: Tier, problem: str) -> None:
        """Record that *tier* holds other bytes than the manifest says; reading or writing them anew clears that."""
        self._set_copy(version, tier, Copy(CopyState.FAILED, problem, damaged=True), {})

    def _set_copy(self, version: Version, tier: Tier, copy: Copy, fields: dict[str, object]) -> None:
        before, version.copies[tier] = version.copy(tier), copy
        if before == copy:
            return
        if copy.damaged and not before.damaged:
            for listener in self._damage_listeners:
                listener(version, tier)
        if copy.state is CopyState.VERIFIED and tier is Tier.TIER2:
            self._last_persist_s[version.job] = self._clock.monotonic_s()
        if copy.error:
            fields["error"] = copy.error
        self._events.publish(f"copy_{copy.state}", version.job, version.id, tier=tier, **fields)
        self._notify(version)

    def last_persist_age_s(self, job: str) -> float | None:
        """Seconds since a version of *job* last reached tier 2 while this daemon ran; None if never."""
        moment = self._last_persist_s.get(job)
        return None if moment is None else self._clock.monotonic_s() - moment

    def on_change(self, listener: Callable[[Version], None]) -> None:
        """Call *listener* after each change of a version, in the loop's thread; it must not block."""
        self._listeners.append(listener)

    def on_damaged(self, listener: Callable[[Version, Tier], None]) -> None:
        """Call *listener* once for each copy that is found damaged, in the loop's thread; it must not block."""
        self._damage_listeners.append(listener)

    def _notify(self, version: Version) -> None:
        for listener in self._listeners:
            listener(version)
        self.wake()

    async def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until *condition* holds, re-checked after each change; False if *timeout_s* passed first."""
        if condition():
            return True
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[future] = condition
        sleeper = asyncio.ensure_future(self._clock.sleep(timeout_s))
        try:
            await asyncio.wait({sleeper, future}, return_when=asyncio.FIRST_COMPLETED)
            return condition()
        finally:
            del self._waiters[future]
            sleeper.cancel()

    def wake(self) -> None:
        """Have every waiter look again: something that is not a version changed (a client left, a lease ended)."""
        for future, condition in list(self._waiters.items()):
            if not future.done() and condition():
                future.set_result(None)
