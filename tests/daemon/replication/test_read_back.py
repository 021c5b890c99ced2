"""A copy in the bucket that was found damaged is believed again only when all of it was read back."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from cairn_api.names import VersionId
from cairnd import layout
from cairnd.model import Tier
from cairnd.tiers.object_store import BinarySource, ObjectStore
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, Lab, Rank, eventually
from tests.daemon.replication.test_replicator import flip

STILL = {"scrub_bytes_per_s": 0, "num_of_version_in_retention": 5}
PARTS = ("r0.pt", "r1.pt")


class Watched:
    """A store that counts what is sent to it and read from it, and may spoil the one or hold up the other."""

    def __init__(self, store: ObjectStore, counts: Counts) -> None:
        self._store = store
        self._counts = counts

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def upload(
        self,
        key: str,
        source: BinarySource,
        *,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
        deadline_s: float,
    ) -> None:
        self._counts.uploads.append(key.rpartition("/")[2])
        self._store.upload(key, source, progress=progress, cancelled=cancelled, deadline_s=deadline_s)
        if self._counts.spoiled is not None:
            flip(self._counts.spoiled / key)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._counts.reads.append(key.rpartition("/")[2])
        self._counts.readable.wait()
        self._store.read_into(key, offset, buffer)


class Counts:
    """What one node did, by the last part of each object's name."""

    def __init__(self) -> None:
        self.uploads: list[str] = []
        self.reads: list[str] = []
        self.readable = threading.Event()
        self.readable.set()
        self.spoiled: Path | None = None
        """The folder of a bucket that damages whatever it is given."""

    def __call__(self, store: ObjectStore) -> ObjectStore:
        return Watched(store, self)  # type: ignore[return-value]


class Pair:
    """Two nodes of one job, with one rank each and one bucket; ``versions`` are in both tiers."""

    def __init__(self, folder: Path, labs: list[Lab], counts: list[Counts]) -> None:
        self.labs, self.counts = labs, counts
        self.versions: list[VersionId] = []
        self._bucket = folder / "bucket"

    def stored(self, version: VersionId, path: str) -> Path:
        return self._bucket / layout.Bucket.partition(JOB, version, path)

    async def begin(self) -> None:
        """Save and persist two versions."""
        ranks = [await Rank.join(lab, rank=number, world_size=2) for number, lab in enumerate(self.labs)]
        nonce = uuid.uuid4().hex
        await ranks[0].claim(nonce)
        await ranks[1].claim(nonce, epoch=ranks[0].client.epoch)
        for _ in range(2):
            version = ranks[0].next()
            for rank, path in zip(ranks, PARTS, strict=True):
                rank.create(version, persist=True)
                rank.seal(version, path, path.encode() * 10_000)
                await rank.prepare(version, [path])
            for rank in ranks:
                rank.commit(version)
            self.versions.append(version)
            await self.passes(lambda version=version: all(lab.version(version).has(Tier.TIER2) for lab in self.labs))  # type: ignore[misc]
        for counts in self.counts:
            counts.uploads.clear()

    async def passes(self, condition: Callable[[], object]) -> None:
        """Let time pass on both nodes until *condition* holds."""
        for _ in range(100):
            if condition():
                return
            await self.idle(5)
        raise AssertionError([event.text() for lab in self.labs for event in lab.app.events.remembered()])

    async def idle(self, duration_s: int) -> None:
        for lab in self.labs:
            lab.clock.advance(duration_s)
            await lab.settle()


@pytest.fixture
async def pair(make_lab: MakeLab, tmp_path: Path) -> Pair:
    labs, counts = [], []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        counts.append(Counts())
        labs.append(
            await make_lab(
                folder=tmp_path / name, bucket=f"file://{tmp_path}/bucket", wrap_store=counts[-1], run=True, **STILL
            )
        )
    pair = Pair(tmp_path, labs, counts)
    await pair.begin()
    return pair


async def verify(lab: Lab, version: VersionId) -> list[str]:
    """``cairn verify --deep``: what it finds."""
    steps = [step async for step in lab.app.verification.verify([lab.version(version)], deep=True)]
    return [finding.path for step in steps for finding in step.findings]


def record(lab: Lab, version: VersionId) -> dict[str, str]:
    path = lab.tier1 / layout.health(JOB, version)
    return dict(json.loads(path.read_text())["damaged"]) if path.exists() else {}


def damaged(lab: Lab, version: VersionId) -> str:
    """What is said of a damaged copy in tier 2 that nobody is at work on."""
    copy = lab.version(version).copy(Tier.TIER2)
    return copy.error if copy.damaged and copy.state == "failed" else ""


async def test_uploading_ones_own_part_does_not_acquit_a_copy_that_is_damaged_in_anothers(pair: Pair) -> None:
    (a, b), (older, newer) = pair.labs, pair.versions
    rotten = pair.stored(newer, "r0.pt")
    flip(rotten)
    assert await verify(b, newer) == ["r0.pt"]
    await pair.passes(lambda: "not this node's part" in damaged(b, newer))
    assert pair.counts[1].uploads == ["r1.pt"]
    assert "`cairn verify" in damaged(b, newer)
    assert "r0.pt" in record(b, newer)["tier2"]
    assert b.app.keeper.floor(JOB) == older, "retention counts on a version that nobody can restore"
    # Nothing changes in the bucket, so nothing is sent or read again, however long it takes.
    reads = len(pair.counts[1].reads)
    for _ in range(10):
        await pair.idle(60)
    assert (pair.counts[1].uploads, len(pair.counts[1].reads)) == (["r1.pt"], reads)
    assert damaged(b, newer)
    # What the message says to do.
    assert await verify(a, newer) == ["r0.pt"]
    await pair.passes(lambda: all(lab.version(newer).has(Tier.TIER2) for lab in pair.labs))
    assert pair.counts[0].uploads == ["r0.pt"]
    assert rotten.read_bytes() == b"r0.pt" * 10_000
    await eventually(lambda: (record(a, newer), record(b, newer)) == ({}, {}))
    assert b.app.keeper.floor(JOB) == newer


async def test_damage_in_anothers_part_is_still_known_after_a_restart(pair: Pair) -> None:
    b, newer = pair.labs[1], pair.versions[1]
    flip(pair.stored(newer, "r0.pt"))
    await verify(b, newer)
    await b.restart()
    await pair.passes(lambda: "not this node's part" in damaged(b, newer))


async def test_what_the_bucket_spoils_again_stays_damaged(make_lab: MakeLab) -> None:
    counts = Counts()
    lab = await make_lab(wrap_store=counts, **STILL)
    (rank,) = await Rank.launch(lab)
    version = await rank.save({"model.pt": b"weights" * 1000}, persist=True)
    await lab.reaches(version, Tier.TIER2)
    flip(lab.object(version, "model.pt"))
    counts.spoiled = lab.bucket_path
    await verify(lab, version)
    await lab.passes(lambda: counts.uploads.count("model.pt") == 4)
    assert not lab.version(version).has(Tier.TIER2)
    counts.spoiled = None
    await lab.passes(lambda: lab.version(version).has(Tier.TIER2))
    assert lab.object(version, "model.pt").read_bytes() == b"weights" * 1000


async def test_reading_back_holds_up_no_newer_version(make_lab: MakeLab) -> None:
    counts = Counts()
    lab = await make_lab(wrap_store=counts, **STILL)
    (rank,) = await Rank.launch(lab)
    version = await rank.save({"model.pt": b"weights" * 1000}, persist=True)
    await lab.reaches(version, Tier.TIER2)
    flip(lab.object(version, "model.pt"))
    await verify(lab, version)
    counts.reads.clear()
    counts.readable.clear()
    try:
        await lab.passes(lambda: counts.reads)
        newer = await rank.save({"model.pt": b"newer" * 1000}, persist=True)
        await lab.reaches(newer, Tier.TIER2)
        assert not lab.version(version).has(Tier.TIER2)
    finally:
        counts.readable.set()
    await lab.reaches(version, Tier.TIER2)


async def test_a_bucket_that_goes_away_while_it_is_read_back_is_not_sent_everything_again(make_lab: MakeLab) -> None:
    counts = Counts()
    lab = await make_lab(wrap_store=counts, **STILL)
    (rank,) = await Rank.launch(lab)
    version = await rank.save({"model.pt": b"weights" * 1000}, persist=True)
    await lab.reaches(version, Tier.TIER2)
    flip(lab.object(version, "model.pt"))
    await verify(lab, version)
    counts.reads.clear()
    counts.readable.clear()
    try:
        await lab.passes(lambda: counts.reads)
        lab.bucket_path.rename(lab.bucket_path.with_name("away"))
    finally:
        counts.readable.set()
    await eventually(lambda: lab.version(version).copy(Tier.TIER2).state == "failed")
    assert lab.version(version).copy(Tier.TIER2).error == "model.pt: block 0 does not match its digest"
    assert not lab.app.storage.health[lab.settings.persistent_storage_path].reachable
    lab.bucket_path.with_name("away").rename(lab.bucket_path)
    await lab.passes(lambda: lab.version(version).has(Tier.TIER2))
    assert counts.uploads.count("model.pt") == 2
