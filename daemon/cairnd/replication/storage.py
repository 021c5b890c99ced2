"""Which bucket belongs to which job, and whether it answers.

Buckets are opened when first needed and shared by all jobs that name the same URL. A bucket that cannot be opened or
does not answer is a state that is shown (``status``, ``list``, the reply to a rank that joins), not a reason not to
start: tier 1 works without it, and what waits for tier 2 waits.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

from cairn_api.errors import CairnError, ConfigurationError, UnavailableError
from cairnd import layout
from cairnd.events import EventLog
from cairnd.metrics import Metrics
from cairnd.replication.bucket import BucketRepository
from cairnd.tiers.object_store import Capabilities, ObjectStore
from cairnd.workers import Workers


@dataclass(slots=True)
class Health:
    """Whether a bucket answered last time, and what it said if it did not."""

    reachable: bool = False
    error: str = ""
    conditional_put: bool = False
    probed: bool = False


class Storage:
    """Opens, probes and hands out buckets by URL."""

    def __init__(
        self,
        node: str,
        default_url: str,
        allowed: tuple[str, ...],
        open_store: Callable[[str], ObjectStore],
        workers: Workers,
        events: EventLog,
        metrics: Metrics,
        token_hex: Callable[[int], str] = secrets.token_hex,
    ) -> None:
        self._node = node
        self.default_url = default_url
        self._allowed = tuple(url.rstrip("/") for url in (default_url, *allowed) if url)
        self._open_store = open_store
        self._workers = workers
        self._events = events
        self._metrics = metrics
        self._token_hex = token_hex
        self._buckets: dict[str, BucketRepository] = {}
        self._probing: dict[str, asyncio.Lock] = {}
        self._probe_failures: dict[str, CairnError] = {}
        self.health: dict[str, Health] = {}

    def check_allowed(self, url: str) -> None:
        """Raise :class:`ConfigurationError` unless the operator allows *url* or a location it lies below."""
        plain = url.rstrip("/")
        within = any(plain == allowed or plain.startswith(f"{allowed}/") for allowed in self._allowed)
        # A store may decode what looks harmless here, so nothing encoded is accepted, nor what climbs.
        if "%" in plain or "\\" in plain or {"..", "."} & set(plain.split("/")) or not within:
            raise ConfigurationError(
                f"the operator of this daemon does not allow the storage location {url!r}",
                hint="use the daemon's own persistent_storage_path, or have the location added to "
                "allowed_storage_locations in cairnd.toml",
                context={"location": url},
            )

    async def bucket(self, url: str) -> BucketRepository:
        """The bucket at *url*, opened and probed. Raises what opening or probing raised; trying again is cheap."""
        if not url:
            raise ConfigurationError(
                "no tier 2 is configured", hint="set persistent_storage_path in cairnd.toml or in the job's settings"
            )
        health = self.health.setdefault(url, Health())
        try:
            # One at a time: two probes of one key would each see the other's object and take it for a broken store.
            probing = self._probing.setdefault(url, asyncio.Lock())
            waited = probing.locked()
            async with probing:
                if waited and not health.probed and url in self._probe_failures:
                    raise copy(self._probe_failures[url])  # who waited for an answer that failed has waited enough
                bucket = self._buckets.get(url)
                if bucket is None:
                    store = await self._workers.run(self._open_store, url)
                    bucket = self._buckets[url] = BucketRepository(store, self._node)
                if not health.probed:
                    key = layout.Bucket.probe(self._node, self._token_hex(8))
                    # Shielded: a caller that is cancelled leaves the thread probing, and the lock must outlive it.
                    probe = asyncio.ensure_future(self._workers.run(_probe, bucket.store, key))
                    capabilities = await asyncio.shield(probe)
                    health.conditional_put, health.probed = capabilities.conditional_put, True
                    self.note_answer(url)
                    if not health.conditional_put:
                        self._events.publish("tier2_refused", location=url, reason="it ignores put-if-absent")
            if not health.conditional_put:
                raise ConfigurationError(
                    f"the object store at {url} ignores conditional writes, so two writers could both win",
                    hint="use a store that honours If-None-Match: * (Amazon S3, SeaweedFS, Ceph 16+, GCS, Azure)",
                    context={"location": url},
                )
        except CairnError as error:
            self._probe_failures[url] = copy(error)
            self.note_failure(url, error)
            raise
        return bucket

    def note_answer(self, url: str) -> None:
        """The bucket answered."""
        health = self.health.setdefault(url, Health())
        if not health.reachable:
            health.reachable, health.error = True, ""
            self._events.publish("tier2_reachable", location=url)
        self._show()

    def note_failure(self, url: str, error: CairnError) -> None:
        """The bucket failed; only failures of the bucket itself count, not missing keys."""
        health = self.health.setdefault(url, Health())
        if isinstance(error, UnavailableError | ConfigurationError):
            if health.reachable or health.error != str(error):
                self._events.publish("tier2_unreachable", location=url, error=error)
            health.reachable, health.error = False, str(error)
        self._show()

    def _show(self) -> None:
        default = self.health.get(self.default_url)
        self._metrics.tier2_reachable.set(1 if default is not None and default.reachable else 0)


def _probe(store: ObjectStore, key: str) -> Capabilities:
    # Read first: some servers make a bucket that is missing, or misspelt, when something is written to it.
    next(iter(store.list(f"{key}/")), None)
    store.delete(key)  # what a probe that was killed left
    return store.probe(key)
