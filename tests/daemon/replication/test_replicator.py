"""Persisting: in which order, how often, and what never gets out."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import pytest

from cairn_api.errors import ConfigurationError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.digests import Digest
from cairnd.manifest import NodeManifest
from cairnd.model import CopyState, Partition, Tier, VersionState
from cairnd.replication.bucket import BucketRepository, EpochClaim, Verdict
from cairnd.replication.replicator import _FIRST_RETRY_S, _LAST_RETRY_S
from cairnd.tiers.object_store import ObjectStore
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, Lab, Rank, eventually, state
from tests.daemon.replication.stores import LosesReplies


class Rigged:
    """Puts a :class:`LosesReplies` between the daemon and each bucket; remembers the last."""

    store: LosesReplies

    def __call__(self, store: ObjectStore) -> ObjectStore:
        self.store = LosesReplies(store)
        return self.store


@pytest.fixture
def rigged() -> Rigged:
    return Rigged()


async def writing(lab: Lab) -> asyncio.Task[None]:
    """Tier 1 alone works."""
    return asyncio.ensure_future(lab.app.writer.run(lab.app.saves))


async def test_a_flagged_version_arrives_whole_and_visible(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    version = await rank.save({"model.pt": b"w" * 1000, "zero/o.pt": b"m"}, persist=True)
    await lab.reaches(version, Tier.TIER2)
    assert lab.object(version, "zero/o.pt").read_bytes() == b"m"
    bucket = await lab.bucket()
    decision = bucket.decision(JOB, version)
    assert decision is not None
    (manifest,) = bucket.committed(JOB, version, decision)
    assert manifest.partitions == lab.version(version).partitions
    plain = await rank.save()
    await lab.settle()
    assert not lab.version(plain).has(Tier.TIER2)
    assert lab.app.replicator.backlog() == []


async def test_the_newest_goes_first(make_lab: MakeLab, rigged: Rigged) -> None:
    lab = await make_lab(run=False, wrap_store=rigged, num_of_version_in_retention=9)
    writer = await writing(lab)
    (rank,) = await Rank.launch(lab)
    versions = [await rank.save(persist=True) for _ in range(4)]
    assert [version.id for version in lab.app.replicator.backlog()] == versions[::-1]
    assert lab.app.metrics.backlog_versions._value.get() == 0  # not shown before it runs
    writer.cancel()
    lab.go()
    for version in versions:
        await lab.reaches(version, Tier.TIER2)
    order = [VersionId(1, int(key.split("-s")[1][:6]), "").sequence for key in rigged.store.uploads]
    assert order == [4, 3, 2, 1]


async def test_failures_are_paced_and_end_when_the_bucket_is_back(make_lab: MakeLab, rigged: Rigged) -> None:
    lab = await make_lab(wrap_store=rigged)
    (rank,) = await Rank.launch(lab)
    await lab.app.inventory.refresh_all()
    rigged.store.away = True
    version = await rank.save(persist=True)
    failures = lab.app.metrics.stage_failures.labels("tier2_upload")
    await eventually(lambda: failures._value.get() == 1)
    pauses = [
        await lab.passes(lambda seen=attempt: failures._value.get() == seen, step_s=0.5)  # type: ignore[misc]
        for attempt in range(2, 9)
    ]
    assert pauses[0] == pytest.approx(_FIRST_RETRY_S, abs=1)
    assert all(later >= earlier - 1 for earlier, later in pairwise(pauses))
    assert max(pauses) <= _LAST_RETRY_S + 1
    assert pauses[-1] > 20
    assert lab.version(version).copy(Tier.TIER2).state is CopyState.FAILED
    assert not lab.app.storage.health[lab.settings.persistent_storage_path].reachable
    status = await lab.app.reporter.status()
    assert status.backlog_versions == 1
    assert status.oldest_unpersisted_age_s > 60
    assert any("away" in problem for problem in status.problems)
    rigged.store.away = False
    await lab.passes(lambda: lab.version(version).has(Tier.TIER2))
    assert lab.app.replicator.backlog() == []


async def test_a_request_does_not_wait_for_the_pace(make_lab: MakeLab, rigged: Rigged) -> None:
    lab = await make_lab(wrap_store=rigged)
    (rank,) = await Rank.launch(lab)
    rigged.store.away = True
    version = await rank.save(persist=True)
    failures = lab.app.metrics.stage_failures.labels("tier2_upload")
    await eventually(lambda: failures._value.get() == 1)
    rigged.store.away = False
    assert await lab.app.persistence.request(lab.version(version))
    await lab.reaches(version, Tier.TIER2)  # no time passed
    assert not await lab.app.persistence.request(lab.version(version))


@pytest.mark.parametrize("lost", ["put_if_absent", "put", "upload"])
async def test_a_lost_reply_makes_neither_a_phantom_nor_a_duplicate(
    make_lab: MakeLab, rigged: Rigged, lost: str
) -> None:
    lab = await make_lab(wrap_store=rigged)
    (rank,) = await Rank.launch(lab)
    rigged.store.lose(lost)
    version = await rank.save(persist=True)
    await lab.passes(lambda: lab.version(version).has(Tier.TIER2))
    bucket = await lab.bucket()
    assert list(bucket.decisions(JOB)) == [version]
    assert lab.object(version, "model.pt").read_bytes() == lab.file(version, "model.pt").read_bytes()


async def test_a_damaged_copy_never_reaches_the_bucket(make_lab: MakeLab) -> None:
    lab = await make_lab(run=False)
    writer = await writing(lab)
    (rank,) = await Rank.launch(lab)
    version = await rank.save({"a": b"x" * 100, "b": b"y" * 100}, persist=True)
    flip(lab.file(version, "b"))
    writer.cancel()
    lab.go()
    await eventually(lambda: lab.version(version).copy(Tier.TIER1).state is CopyState.FAILED)
    await eventually(lambda: lab.app.replicator.running is None)
    assert lab.version(version).copy(Tier.TIER2).state is CopyState.FAILED
    bucket = await lab.bucket()
    assert bucket.decisions(JOB) == {}
    assert not lab.object(version, "b").exists()
    assert lab.app.metrics.verify_failures.labels("tier1")._value.get() == 1
    assert lab.app.replicator.backlog() == []


def flip(path: Path) -> None:
    """One bit of a published file goes wrong, behind everybody's back (size and name stay)."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


async def test_another_launchs_epoch_is_refused_and_the_bucket_is_not_blamed(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    bucket = await lab.bucket()
    (lab.bucket_path / layout.Bucket.epoch(JOB, 1)).unlink()  # as if this daemon had never seen that bucket
    assert bucket.claim_epoch(JOB, EpochClaim(1, "another launch", 1, None))
    version = await rank.save(persist=True)
    await eventually(lambda: lab.version(version).copy(Tier.TIER2).state is CopyState.FAILED)
    assert "belongs to another launch" in lab.version(version).copy(Tier.TIER2).error
    assert not lab.object(version, "model.pt").exists()
    assert lab.version(version).has(Tier.TIER1)
    assert lab.app.storage.health[lab.settings.persistent_storage_path].reachable
    assert [item.id for item in lab.app.replicator.backlog()] == [version]  # a drain must not end green


async def test_a_provisional_epoch_is_claimed_when_the_bucket_is_back(make_lab: MakeLab, rigged: Rigged) -> None:
    lab = await make_lab(wrap_store=rigged)
    await lab.app.inventory.refresh_all()
    rigged.store.away = True
    rank = await Rank.join(lab)
    assert await rank.claim("f" * 32, resumed_from=VersionId(1, 1, "x"), epoch=2) == (False, True)
    assert lab.events("epoch_provisional")
    version = await rank.save(persist=True)
    record = lab.app.jobs.get(JOB)
    assert record is not None
    assert record.provisional
    rigged.store.away = False
    await lab.passes(lambda: lab.version(version).has(Tier.TIER2))
    bucket = await lab.bucket()
    assert bucket.epochs(JOB) == [EpochClaim(2, "f" * 32, 1, VersionId(1, 1, "x"))]
    record = lab.app.jobs.get(JOB)
    assert record is not None
    assert not record.provisional


async def test_a_claim_fences_what_nobody_can_finish(lab: Lab) -> None:
    await Rank.launch(lab)
    bucket = await lab.bucket()
    torn = VersionId(1, 5, "torn")
    bucket.store.put(layout.Bucket.partition(JOB, torn, "p"), b"x")
    (rank,) = await Rank.launch(lab)
    decision = bucket.decision(JOB, torn)
    assert decision is not None
    assert decision.verdict is Verdict.ABORTED
    assert rank.client.epoch == 2
    await lab.app.inventory.refresh(JOB)
    await lab.passes(lambda: not lab.object(torn, "p").exists())  # and its data goes after the grace


async def test_a_damaged_decision_does_not_keep_a_job_from_starting(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    version = await rank.save(persist=True)
    await lab.reaches(version, Tier.TIER2)
    flip(lab.bucket_path / layout.Bucket.decision(JOB, version))
    await lab.restart()
    (rank,) = await Rank.launch(lab)
    assert rank.client.epoch == 2
    await eventually(lambda: lab.version(version).copy(Tier.TIER2).state is CopyState.FAILED)
    assert lab.version(version).has(Tier.TIER1)


async def test_a_fenced_version_is_refused_for_good(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    bucket = await lab.bucket()
    version = VersionId(1, 1, "step1")
    bucket.abort(JOB, version, "fenced")
    assert await rank.save(persist=True) == version
    await eventually(lambda: lab.version(version).copy(Tier.TIER2).state is CopyState.EVICTED)
    assert lab.app.replicator.refused(lab.version(version))
    assert lab.app.replicator.backlog() == []
    assert state(lab, version) is VersionState.COMMITTED  # tier 1 still has it


async def test_a_part_is_uploaded_once_while_others_are_missing(make_lab: MakeLab, rigged: Rigged) -> None:
    """World of two nodes: this node's part waits in the bucket until the other node's is there."""
    lab = await make_lab(wrap_store=rigged)
    ranks = await Rank.launch(lab, world_size=2)
    version = ranks[0].next()
    ranks[0].create(version, persist=True)
    ranks[0].seal(version, "0.pt", b"x")
    await ranks[0].prepare(version, ["0.pt"])
    ranks[0].commit(version)
    await lab.reaches(version, Tier.TIER1)
    bucket = await lab.bucket()
    await eventually(lambda: bucket.manifests(JOB, version))
    lab.clock.advance(10)
    await lab.settle()
    lab.clock.advance(10)
    await lab.settle()
    assert len(rigged.store.uploads) == 1
    assert state(lab, version) is VersionState.PREPARED
    other = Partition("1.pt", "1.pt", 1, 1, Digest(1, 0, (0,)))
    mine = NodeManifest.of(lab.version(version), lab.app.node, lab.version(version).partitions)
    BucketRepository(bucket.store, "e" * 32).put_manifest(
        NodeManifest(JOB, version, "e" * 32, mine.nonce, 2, (1,), (other,), "", True, False, 1.0, 0, 0, {})
    )
    await lab.passes(lambda: lab.version(version).has(Tier.TIER2))
    assert len(rigged.store.uploads) == 1
    assert state(lab, version) is VersionState.COMMITTED


async def test_a_killed_daemon_goes_on_where_it_stopped(make_lab: MakeLab) -> None:
    lab = await make_lab(run=False)
    writer = await writing(lab)
    (rank,) = await Rank.launch(lab)
    flagged = await rank.save(persist=True)
    asked = await rank.save()
    await lab.app.persistence.request(lab.version(asked))
    writer.cancel()
    await lab.restart()
    await lab.reaches(flagged, Tier.TIER2)
    await lab.reaches(asked, Tier.TIER2)
    await lab.restart()
    await lab.reaches(asked, Tier.TIER2)
    assert lab.events("copy_copying") == []  # it looked, and uploaded nothing again


async def test_an_upload_that_failed_says_nothing_about_what_is_in_the_bucket(make_lab: MakeLab) -> None:
    """After a start the replicator may meet a bucket that fails for a moment, and tier 1 may be damaged by then."""
    lab = await make_lab(run=False)
    task = await writing(lab)
    (rank,) = await Rank.launch(lab)
    version = await rank.save(persist=True)
    await lab.reaches(version, Tier.TIER1)
    task.cancel()
    await lab.app.replicator._persist(lab.version(version), lab.settings.persistent_storage_path)
    lab.app.catalog.set_copy(lab.version(version), Tier.TIER2, CopyState.FAILED, "no space left on device")
    await lab.app.inventory.refresh(JOB)
    assert lab.version(version).has(Tier.TIER2)
    lab.app.catalog.set_damaged(lab.version(version), Tier.TIER2, "model.pt: block 0 does not match")
    await lab.app.inventory.refresh(JOB)
    assert not lab.version(version).has(Tier.TIER2)


async def test_rotten_bytes_in_the_bucket_are_replaced(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    version = await rank.save(persist=True)
    await lab.reaches(version, Tier.TIER2)
    flip(lab.object(version, "model.pt"))
    lab.app.catalog.set_copy(lab.version(version), Tier.TIER2, CopyState.FAILED, "model.pt: block 0 does not match")
    await lab.reaches(version, Tier.TIER2)
    assert lab.object(version, "model.pt").read_bytes() == lab.file(version, "model.pt").read_bytes()


async def test_without_a_bucket_nothing_waits_and_asking_says_why(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False)
    (rank,) = await Rank.launch(lab)
    version = await rank.save(persist=True)
    assert lab.app.replicator.backlog() == []
    with pytest.raises(ConfigurationError, match="no tier 2"):
        await lab.app.persistence.request(lab.version(version))
    rank.leave()
    await lab.settle()
    assert lab.events("defect") == []
