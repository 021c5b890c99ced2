"""The bucket's protocol on a real ``file://`` store: decisions move one way, whoever loses a race or a reply."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cairn_api.errors import ConfigurationError, UnavailableError, VersionError
from cairn_api.names import VersionId
from cairnd.digests import Digest
from cairnd.layout import Bucket as Keys
from cairnd.manifest import DECISION_FORMAT, EPOCH_FORMAT, NodeManifest, encode
from cairnd.model import Partition
from cairnd.replication.bucket import BucketRepository, EpochClaim, Verdict
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.stores.file import FileStore
from tests.daemon.replication.stores import LosesReplies

JOB, VERSION = "run-7", VersionId(3, 1, "step")
NODES = ["a" * 32, "b" * 32]


def manifest(rank: int, *, world_size: int = 2, nonce: str = "n") -> NodeManifest:
    part = Partition(f"{rank}.pt", f"{rank}.pt", rank, 1, Digest(1, rank, (rank,)))
    return NodeManifest(JOB, VERSION, NODES[rank], nonce, world_size, (rank,), (part,), "", True, False, 1.0, 0, 0, {})


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(OsFileSystem(), tmp_path / "bucket")


@pytest.fixture
def bucket(store: FileStore) -> BucketRepository:
    return BucketRepository(store, NODES[0])


def publish(bucket: BucketRepository) -> None:
    for rank in (0, 1):
        bucket.store.put(Keys.partition(JOB, VERSION, f"{rank}.pt"), b"x")
        bucket.put_manifest(manifest(rank))


def test_nothing_is_decided_before_every_rank_is_there(bucket: BucketRepository) -> None:
    assert bucket.commit(JOB, VERSION, 2) is None
    bucket.put_manifest(manifest(1))
    assert bucket.has_manifest(manifest(1))
    assert not bucket.has_manifest(manifest(0))
    assert bucket.commit(JOB, VERSION, 2) is None
    assert bucket.decisions(JOB) == {}
    assert not bucket.prepared_everywhere(JOB, VERSION)
    bucket.put_manifest(manifest(0))
    assert bucket.prepared_everywhere(JOB, VERSION)
    decision = bucket.commit(JOB, VERSION, 2)
    assert decision is not None
    assert decision.verdict is Verdict.COMMITTED
    assert {item.node for item in bucket.committed(JOB, VERSION, decision)} == set(NODES)
    assert bucket.decision(JOB, VERSION) is not None
    assert bucket.decisions(JOB)[VERSION].verdict is Verdict.COMMITTED


def test_every_node_decides_the_same_bytes(bucket: BucketRepository, store: FileStore) -> None:
    publish(bucket)
    bucket.commit(JOB, VERSION, 2)
    first = store.get(Keys.decision(JOB, VERSION), 10_000)
    store.delete(Keys.decision(JOB, VERSION))
    BucketRepository(store, NODES[1]).commit(JOB, VERSION, 2)
    assert store.get(Keys.decision(JOB, VERSION), 10_000) == first


def test_committed_then_deleted_and_never_back(bucket: BucketRepository, store: FileStore) -> None:
    publish(bucket)
    bucket.commit(JOB, VERSION, 2)
    with pytest.raises(VersionError, match="not tombstoned"):
        bucket.delete_data(JOB, VERSION)
    assert bucket.abort(JOB, VERSION, "too late").verdict is Verdict.COMMITTED
    bucket.mark_deleted(JOB, VERSION, 123.0)
    for again in (bucket.commit(JOB, VERSION, 2), bucket.abort(JOB, VERSION, "x")):
        assert again is not None
        assert again.verdict is Verdict.DELETED
    bucket.mark_deleted(JOB, VERSION, 456.0)
    decision = bucket.decision(JOB, VERSION)
    assert decision is not None
    assert decision.document["deleted_at_s"] == 123.0
    for _ in range(2):
        bucket.delete_data(JOB, VERSION)
    assert list(store.list(Keys.version(JOB, VERSION))) == []
    publish(bucket)  # a slow writer comes by
    late = bucket.commit(JOB, VERSION, 2)
    assert late is not None
    assert (late.verdict, late.swept) == (Verdict.DELETED, True)
    assert bucket.decisions(JOB)[VERSION].swept


def test_what_another_daemon_has_pinned_is_not_tombstoned(bucket: BucketRepository, store: FileStore) -> None:
    publish(bucket)
    bucket.commit(JOB, VERSION, 2)
    BucketRepository(store, NODES[1]).pin(JOB, VERSION, "the paper's figures")
    with pytest.raises(ConfigurationError, match="pinned"):
        bucket.mark_deleted(JOB, VERSION, 1.0)
    assert bucket.decisions(JOB)[VERSION].verdict is Verdict.COMMITTED
    bucket.unpin(JOB, VERSION)
    bucket.mark_deleted(JOB, VERSION, 1.0)
    assert bucket.decisions(JOB)[VERSION].verdict is Verdict.DELETED


def test_aborted_and_never_back(bucket: BucketRepository) -> None:
    assert bucket.abort(JOB, VERSION, "fenced").verdict is Verdict.ABORTED
    publish(bucket)
    decision = bucket.commit(JOB, VERSION, 2)
    assert decision is not None
    assert decision.verdict is Verdict.ABORTED
    bucket.mark_deleted(JOB, VERSION, 1.0)
    assert bucket.decisions(JOB)[VERSION].verdict is Verdict.ABORTED
    bucket.delete_data(JOB, VERSION)
    assert bucket.decisions(JOB)[VERSION].swept


def test_ones_own_lost_reply_is_recognised(store: FileStore) -> None:
    """put-if-absent created the key, the reply got lost, the repeated call says "exists": still committed, by us."""
    lossy = LosesReplies(store)
    bucket = BucketRepository(lossy, NODES[0])
    publish(bucket)
    lossy.lose("put_if_absent")
    with pytest.raises(UnavailableError):
        bucket.commit(JOB, VERSION, 2)
    decision = bucket.commit(JOB, VERSION, 2)
    assert decision is not None
    assert decision.verdict is Verdict.COMMITTED
    lossy.lose("put_if_absent")
    claim = EpochClaim(3, "n", 2, VersionId(2, 9, "old"))
    with pytest.raises(UnavailableError):
        bucket.claim_epoch(JOB, claim)
    assert bucket.claim_epoch(JOB, claim)
    assert not bucket.claim_epoch(JOB, replace(claim, nonce="other"))
    assert bucket.epochs(JOB) == [claim]
    assert bucket.epoch_nonce(JOB, 3) == "n"
    assert bucket.epoch_nonce(JOB, 4) is None


def test_racing_committers_and_aborters_agree_on_one_outcome(tmp_path: Path) -> None:
    outcomes = set()
    with ThreadPoolExecutor(8) as pool:
        for number in range(20):
            bucket = BucketRepository(FileStore(OsFileSystem(), tmp_path / str(number)), NODES[0])
            publish(bucket)
            racers: list[Any] = [
                *[pool.submit(bucket.commit, JOB, VERSION, 2) for _ in range(4)],
                *[pool.submit(bucket.abort, JOB, VERSION, f"fence {racer}") for racer in range(4)],
            ]
            said = {racer.result().verdict for racer in racers}
            stands = bucket.decision(JOB, VERSION)
            assert stands is not None
            assert said == {stands.verdict}
            outcomes.add(stands.verdict)
    assert outcomes <= {Verdict.COMMITTED, Verdict.ABORTED}


def test_racing_claims_have_one_winner(store: FileStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        for epoch in range(1, 11):
            claims = [EpochClaim(epoch, f"launch-{racer}", 1, None) for racer in range(8)]
            won = list(pool.map(lambda claim: BucketRepository(store, NODES[0]).claim_epoch(JOB, claim), claims))
            assert sum(won) == 1
            assert BucketRepository(store, NODES[0]).epoch_nonce(JOB, epoch) == claims[won.index(True)].nonce
    assert [claim.epoch for claim in BucketRepository(store, NODES[0]).epochs(JOB)] == list(range(10, 0, -1))


def test_manifests_that_changed_after_the_decision_are_not_believed(bucket: BucketRepository) -> None:
    publish(bucket)
    decision = bucket.commit(JOB, VERSION, 2)
    assert decision is not None
    bucket.put_manifest(replace(manifest(1), created_s=2.0))
    with pytest.raises(VersionError, match="not those that were committed"):
        bucket.committed(JOB, VERSION, decision)


def test_what_is_undecided_before_an_epoch(bucket: BucketRepository) -> None:
    publish(bucket)
    bucket.store.put(Keys.partition(JOB, VersionId(9, 1, "later"), "p"), b"x")
    bucket.store.put(f"{JOB}/README", b"x")
    assert bucket.undecided(JOB, before_epoch=3) == []
    assert bucket.undecided(JOB, before_epoch=4) == [VERSION]
    bucket.abort(JOB, VERSION, "x")
    assert bucket.undecided(JOB, before_epoch=4) == []


def test_foreign_objects_are_passed_over(bucket: BucketRepository, store: FileStore) -> None:
    publish(bucket)
    bucket.commit(JOB, VERSION, 2)
    for key in ("README", "not a job/x", f"{Keys.decisions(JOB)}README", f"{Keys.decisions(JOB)}x.json",
                f"{Keys.pins(JOB)}x.json", f"{Keys.nodes(JOB, VERSION)}README"):  # fmt: skip
        store.put(key, b"?")
    assert bucket.jobs() == [JOB]
    assert list(bucket.decisions(JOB)) == [VERSION]
    assert bucket.pins(JOB) == bucket.requests(JOB) == set()


@pytest.mark.parametrize(
    "document",
    [
        {}, {"verdict": "maybe"}, {"verdict": "committed"}, {"verdict": "committed", "manifests": {}, "nonce": "n"},
        {"verdict": "committed", "manifests": {"a": "b"}}, {"verdict": None}, {"verdict": "damaged", "problem": "x"},
        {"verdict": "deleted", "version": "e00009-s000001-another"}, {"verdict": "aborted"},
        {"verdict": "deleted", "version": str(VERSION), "job": "another"},
    ],
    ids=str,
)  # fmt: skip
def test_a_decision_that_decides_nothing_is_damage_and_not_absence(
    bucket: BucketRepository, store: FileStore, document: dict[str, Any]
) -> None:
    publish(bucket)
    store.put(Keys.decision(JOB, VERSION), encode({"format": DECISION_FORMAT, **document}))
    with pytest.raises(VersionError, match="damaged"):
        bucket.decision(JOB, VERSION)
    with pytest.raises(VersionError, match="damaged"):
        bucket.commit(JOB, VERSION, 2)
    assert bucket.decisions(JOB)[VERSION].verdict is Verdict.DAMAGED
    assert bucket.undecided(JOB, before_epoch=99) == []


@pytest.mark.parametrize(
    "document",
    [
        {}, {"resumed_from": "x", "epoch": 1}, {"resumed_from": "", "epoch": "one"},
        {"resumed_from": "", "job": JOB, "epoch": 2, "nonce": "n", "world_size": 1},
        {"resumed_from": "", "job": "another", "epoch": 1, "nonce": "n", "world_size": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_claim_is_told(bucket: BucketRepository, store: FileStore, document: dict[str, Any]) -> None:
    store.put(Keys.epoch(JOB, 1), encode({"format": EPOCH_FORMAT, **document}))
    bucket.claim_epoch(JOB, EpochClaim(2, "n", 2, None))
    sound, damaged = bucket.epochs(JOB)
    assert (sound.epoch, sound.problem) == (2, "")
    assert damaged.epoch == 1
    assert "damaged" in damaged.problem
    with pytest.raises(VersionError, match="damaged"):
        bucket.epoch_nonce(JOB, 1)


def test_unchanged_records_are_not_read_again(store: FileStore) -> None:
    lossy = LosesReplies(store)
    bucket = BucketRepository(lossy, NODES[0])
    publish(bucket)
    bucket.commit(JOB, VERSION, 2)
    bucket.claim_epoch(JOB, EpochClaim(1, "n", 2, None))
    bucket.decisions(JOB), bucket.epochs(JOB)
    lossy.calls.clear()
    assert bucket.decisions(JOB)[VERSION].verdict is Verdict.COMMITTED
    assert len(bucket.epochs(JOB)) == 1
    assert "get" not in lossy.calls
    BucketRepository(store, NODES[1]).mark_deleted(JOB, VERSION, 1.0)
    assert bucket.decisions(JOB)[VERSION].verdict is Verdict.DELETED


def test_notes_for_all_daemons(bucket: BucketRepository, store: FileStore) -> None:
    other = BucketRepository(store, NODES[1])
    bucket.request_persist(JOB, VERSION)
    bucket.pin(JOB, VERSION, "paper")
    assert other.requests(JOB) == other.pins(JOB) == {VERSION}
    other.unpin(JOB, VERSION)
    other.unpin(JOB, VERSION)
    assert bucket.pins(JOB) == set()
    assert json.loads(store.get(Keys.request(JOB, VERSION), 1000))["version"] == str(VERSION)
