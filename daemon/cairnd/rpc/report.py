"""``cairn status``: health and backlog in numbers, and each problem with its next step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from cairn_api.v1 import admin_pb2 as pb
from cairn_api.wire import PROTOCOL_VERSION
from cairnd import __version__, layout
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.health import HealthBook
from cairnd.clock import Clock
from cairnd.metrics import Metrics, value_of
from cairnd.model import Tier, Version, VersionState
from cairnd.replication.replicator import Replicator
from cairnd.replication.storage import Storage
from cairnd.session.clients import Clients
from cairnd.session.memory import CaptureMemory
from cairnd.session.saves import Saves
from cairnd.tiers.local import LocalTier
from cairnd.upkeep import room
from cairnd.upkeep.keeper import Keeper
from cairnd.upkeep.recovery import unreadable
from cairnd.workers import Workers


class Reporter:
    """Collects the numbers; also refreshes the gauges that only change with time."""

    def __init__(
        self,
        node: str,
        clock: Clock,
        catalog: Catalog,
        clients: Clients,
        memory: CaptureMemory,
        saves: Saves,
        keeper: Keeper,
        replicator: Replicator,
        storage: Storage,
        tier1: LocalTier,
        workers: Workers,
        health: HealthBook,
        metrics: Metrics,
        left_alone: Sequence[str],
    ) -> None:
        """*left_alone*: what recovery did not touch, each with its next step; it may still grow."""
        self._node = node
        self._clock = clock
        self._catalog = catalog
        self._clients = clients
        self._memory = memory
        self._saves = saves
        self._keeper = keeper
        self._replicator = replicator
        self._storage = storage
        self._tier1 = tier1
        self._workers = workers
        self._health = health
        self._metrics = metrics
        self._started_s = clock.monotonic_s()
        self._left_alone = left_alone
        metrics.start_time_s.set(clock.now_s())

    async def refresh(self) -> tuple[int, int]:
        """Bring the gauges of tier 1 up to date; returns its used and its free bytes."""
        used, free = self._keeper.used_bytes(), await self._workers.run(self._tier1.free_bytes)
        self._metrics.tier1_used_bytes.set(used)
        self._metrics.tier1_free_bytes.set(free)
        return used, free

    async def status(self, may_see: Callable[[Version], bool] = lambda _: True) -> pb.StatusReply:
        """Everything an operator pages on; versions are named only to a caller who *may_see* them."""
        backlog = self._replicator.backlog()
        health = self._storage.health.get(self._storage.default_url)
        used, free = await self.refresh()
        ages_s = [self._replicator.waiting_s(version) for version in backlog]
        saves = self._metrics.saves
        return pb.StatusReply(
            daemon_version=__version__,
            node=self._node,
            uptime_s=self._clock.monotonic_s() - self._started_s,
            tier1_path=str(self._tier1.root),
            tier1_used_bytes=used,
            tier1_free_bytes=free,
            persistent_storage_path=self._storage.default_url,
            tier2_reachable=health is not None and health.reachable,
            tier2_error=health.error if health is not None else "",
            conditional_put=health is not None and health.conditional_put,
            memory_limit_bytes=self._memory.limit_bytes,
            memory_granted_bytes=self._memory.granted_bytes,
            clients=len([client for client in self._clients.all() if client.job]),
            open_versions=len(self._saves.open_saves()),
            backlog_versions=len(backlog),
            backlog_bytes=sum(version.size_bytes for version in backlog),
            oldest_unpersisted_age_s=max(ages_s, default=0.0),
            last_persisted=self._last_persisted(may_see),
            verify_failures=int(value_of(self._metrics.verify_failures)),
            skipped_saves=int(value_of(saves.labels("skipped"))),
            failed_saves=int(value_of(saves.labels("aborted"))),
            lost_claims=int(value_of(self._metrics.lost_claims)),
            draining=self._saves.draining,
            protocol=PROTOCOL_VERSION,
            problems=[
                *filter(None, [await self._complaint(free), await self._quarantine()]),
                *self._problems(may_see),
            ],
        )

    def _last_persisted(self, may_see: Callable[[Version], bool]) -> str:
        """The newest version in tier 2 of the job of which one arrived there last: no wall clock orders versions."""
        newest: dict[str, Version] = {}
        for version in self._catalog.versions():
            if version.has(Tier.TIER2) and may_see(version):
                newest.setdefault(version.job, version)

        def age_s(version: Version) -> tuple[float, float]:
            arrived_s = self._catalog.last_persist_age_s(version.job)
            # Those that came before this daemon started are told apart as well as can be.
            return math.inf if arrived_s is None else arrived_s, -version.created_s

        return str(min(newest.values(), key=age_s, default=""))

    async def _complaint(self, free_bytes: int) -> str:
        return room.complaint(self._tier1.root, await self._workers.run(self._tier1.total_bytes), free_bytes)

    async def _quarantine(self) -> str:
        def look() -> tuple[bool, list[str]]:
            versions, unlisted = unreadable(self._tier1)
            whole = sorted(f"{job}/{version}" for job, version in versions)
            there = unlisted or (self._tier1.exists(layout.QUARANTINE) and self._tier1.list_folder(layout.QUARANTINE))
            return bool(there), whole

        anything, whole = await self._workers.run(look)
        if not anything:
            return ""
        versions = f", with the manifests of {', '.join(whole)}" if whole else ""
        return f"damaged files lie in {self._tier1.root / layout.QUARANTINE}{versions}; look at them, then delete them"

    def _problems(self, may_see: Callable[[Version], bool]) -> list[str]:
        problems = list(self._left_alone)
        if not self._storage.default_url:
            problems.append("no tier 2 is configured: nothing outlives this node; set persistent_storage_path")
        for url, health in self._storage.health.items():
            if not health.reachable and health.error:
                problems.append(f"tier 2 at {url}: {health.error}")
        for version in self._catalog.versions():
            for tier, copy in version.copies.items():
                if copy.error and version.restorable and may_see(version):
                    problems.append(f"{version} in {tier}: {copy.error.rstrip('.')}; {_next_step(version, tier)}")
            if version.passed_over and may_see(version):
                problems.append(
                    f"automatic resume passes {version} over: {version.passed_over}; when it is sound, "
                    f"`cairn mark {version.id} --sound --job {version.job}`"
                )
        for job, version_id in self._health.lost():
            problems.append(
                f"{job}/{version_id} was captured, and lost before it reached tier 1 when the daemon ended; "
                f"`cairn list --job {job}` shows what there is"
            )
        for job in self._catalog.jobs():
            last = next(self._catalog.versions(job))
            if last.state is VersionState.ABORTED and may_see(last):
                problems.append(
                    f"the last save of job {job} failed ({last.id}): {last.reason}; earlier ones are intact, "
                    f"`cairn list --job {job}` shows them; this goes away with the next save"
                )
        return problems


def _next_step(version: Version, tier: Tier) -> str:
    """What happens to a copy that failed, and what the operator can do."""
    name = f"{version.id} --job {version.job}"
    if not version.copy(tier).damaged:
        return f"`cairn show {name}` tells more"
    if tier is Tier.TIER1 and version.has(Tier.TIER2):
        return f"it is made again from tier 2, in the background or by a load; `cairn verify {name} --deep` looks again"
    if tier is Tier.TIER2 and version.has(Tier.TIER1):
        part = "it" if version.complete else "this node's part"
        again = (
            f"{part} is uploaded again from tier 1"
            if version.wants_tier2
            else f"`cairn persist {name}` uploads {part} again"
        )
        return f"{again}; `cairn verify {name} --deep` looks again"
    return (
        f"no other tier has an intact copy: `cairn list --job {version.job}` shows older versions, and "
        f"`cairn prune {name}` removes this one"
    )
