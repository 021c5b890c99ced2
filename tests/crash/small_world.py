"""A small tier 1 and a small bucket with all kinds of records in them, to be damaged and put back again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from cairn_api.names import VersionId
from cairnd import layout
from cairnd.model import Tier
from tests.crash import media
from tests.daemon.lab import JOB, Lab, Rank

OTHER_JOB = "run-8"
JOBS: Mapping[str, int] = {JOB: 18, OTHER_JOB: 5}
FEW: Mapping[str, int] = {JOB: 4, OTHER_JOB: 2}
"""How many versions each job has."""

SMALL = "note.txt"
"""The one partition that is not as long as the others."""

KEEP = 1000
_SIZES_BYTES = {"model.pt": 24_000, "zero/rank_0.pt": 24_000, "zero/rank_1.pt": 24_000, SMALL: 60}
_HOMES = (frozenset({Tier.TIER1, Tier.TIER2}), frozenset({Tier.TIER1}), frozenset({Tier.TIER2}))


@dataclass(frozen=True, slots=True)
class Stored:
    """One version of the world: what was saved, and which tiers hold it."""

    job: str
    id: VersionId
    tiers: frozenset[Tier]
    parts: media.Snapshot = field(hash=False, compare=False)

    def __str__(self) -> str:
        return f"{self.job}/{self.id}"

    def data(self, tier: Tier, path: str) -> str:
        """Where a partition lies below the root of *tier*."""
        make = layout.partition if tier is Tier.TIER1 else layout.Bucket.partition
        return make(self.job, self.id, path)


@dataclass(frozen=True, slots=True)
class World:
    """What a daemon has written, to be put back before each round.

    ``decisions``: all decision keys, also of what is deleted. ``earlier_records``: job records before the last launch.
    """

    folder: Path
    node: str
    files: dict[Tier, dict[str, bytes]]
    stored: tuple[Stored, ...]
    decisions: tuple[str, ...]
    earlier_records: media.Snapshot

    @property
    def jobs(self) -> list[str]:
        """Names of all jobs."""
        return sorted({item.job for item in self.stored})

    def root(self, tier: Tier) -> Path:
        return self.folder / ("tier1" if tier is Tier.TIER1 else "bucket")

    def record(self, stored: Stored, place: str) -> str:
        """The key of a version's small record: the manifest of a tier, or the decision key."""
        if place == "tier 1 manifest":
            return layout.manifest(stored.job, stored.id)
        if place == "tier 2 manifest":
            return layout.Bucket.node(stored.job, stored.id, self.node)
        return layout.Bucket.decision(stored.job, stored.id)

    def reset(self) -> None:
        """Everything as it was written."""
        for tier, files in self.files.items():
            media.reset(self.root(tier), files)

    @classmethod
    async def build(cls, folder: Path, random: Random, jobs: Mapping[str, int] = JOBS) -> World:
        """Save versions through a daemon's own components: two jobs, two launches each, all kinds of records."""
        lab = await Lab(folder, num_of_version_in_retention=KEEP).start()
        try:
            earlier: dict[str, bytes] = {}
            stored = [item for job in jobs for item in await _save_job(lab, job, jobs[job], random, earlier)]
            node = lab.app.node
        finally:
            await lab.close()
        files = {Tier.TIER1: media.snapshot(folder / "tier1"), Tier.TIER2: media.snapshot(folder / "bucket")}
        for item in stored:
            if Tier.TIER1 not in item.tiers:
                prefix = f"{layout.version_folder(item.job, item.id)}/"
                files[Tier.TIER1] = {k: data for k, data in files[Tier.TIER1].items() if not k.startswith(prefix)}
        decisions = [key for key in files[Tier.TIER2] if "/decisions/" in key]
        return cls(folder, node, files, tuple(stored), tuple(sorted(decisions)), earlier)


async def _save_job(lab: Lab, job: str, count: int, random: Random, earlier_records: dict[str, bytes]) -> list[Stored]:
    found: list[Stored] = []
    (rank,) = await Rank.launch(lab, job=job)
    while len(found) < count:
        if len(found) == count // 2:
            earlier_records[layout.job_record(job)] = (lab.tier1 / layout.job_record(job)).read_bytes()
            (rank,) = await Rank.launch(lab, job=job)
        parts = {path: random.randbytes(size_bytes) for path, size_bytes in _SIZES_BYTES.items()}
        tiers = _HOMES[len(found) % len(_HOMES)]
        found.append(Stored(job, await _save(lab, rank, parts, persist=Tier.TIER2 in tiers), tiers, parts))
    gone = lab.version(await _save(lab, rank, {"model.pt": b"deleted"}, persist=True), job)
    await lab.app.keeper.delete(lab.app.keeper.plan_version(gone))
    bucket = await lab.bucket()
    bucket.abort(job, VersionId(1, 999, "aborted"), "for its key")
    bucket.request_persist(job, found[0].id)
    await lab.app.keeper.pin(lab.version(found[0].id, job), "for its file", pinned=True)
    return found


async def _save(lab: Lab, rank: Rank, parts: media.Snapshot, *, persist: bool) -> VersionId:
    """As :meth:`Rank.save`, for any job."""
    version = rank.next()
    rank.create(version, persist=persist)
    for name, data in parts.items():
        rank.seal(version, name, data)
    await rank.prepare(version, list(parts))
    rank.commit(version)
    await lab.reaches(version, Tier.TIER2 if persist else Tier.TIER1, rank.client.job)
    return version
