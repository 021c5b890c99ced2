"""Retention in a real daemon with real tiers, on a clock that the test owns."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cairn_api.errors import ConfigurationError, OverloadedError, UnavailableError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.model import CopyState, Tier, VersionState
from cairnd.replication.bucket import BucketRepository, Verdict
from cairnd.tiers.local import LocalTier
from cairnd.upkeep.keeper import Deletion
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, Lab, Rank, eventually, gone


def held(lab: Lab, tier: Tier) -> list[int]:
    """Sequences of the versions that *tier* holds, newest first."""
    return [version.id.sequence for version in lab.app.catalog.versions(JOB) if version.has(tier)]


async def saved(lab: Lab, count: int, *, persist: bool = False) -> list[VersionId]:
    (rank,) = await Rank.launch(lab)
    versions = []
    for _ in range(count):
        versions.append(await rank.save(persist=persist))
        if persist:
            await lab.reaches(versions[-1], Tier.TIER2)
    return versions


async def test_the_newest_n_stay_in_tier1(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=3)
    versions = await saved(lab, 6)
    await eventually(lambda: held(lab, Tier.TIER1) == [6, 5, 4])
    await eventually(lambda: gone(lab, versions[2]))
    assert not gone(lab, versions[3])
    assert lab.app.catalog.get(JOB, versions[0]) is None  # nothing is left of it anywhere


async def test_a_jobs_own_number_counts(lab: Lab) -> None:
    rank = await Rank.join(lab, keep=4)
    await rank.claim()
    for _ in range(7):
        await rank.save()
    await eventually(lambda: held(lab, Tier.TIER1) == [7, 6, 5, 4])


async def test_what_waits_for_tier2_stays_until_it_is_there(make_lab: MakeLab) -> None:
    lab = await make_lab(run=False, num_of_version_in_retention=1)
    (rank,) = await Rank.launch(lab)
    writer = asyncio.ensure_future(lab.app.writer.run(lab.app.saves))
    flagged = await rank.save(persist=True)
    for _ in range(3):
        await rank.save()
    await eventually(lambda: held(lab, Tier.TIER1) == [4, 1])
    writer.cancel()
    lab.go()
    await lab.reaches(flagged, Tier.TIER2)
    await eventually(lambda: held(lab, Tier.TIER1) == [4])
    assert lab.version(flagged).state is VersionState.COMMITTED  # tier 2 still has it


async def test_the_floor_is_what_ranks_agreed_at_the_newest_create(make_lab: MakeLab) -> None:
    """World of two nodes: this one holds newer versions, but only version 1 is on both."""
    lab = await make_lab(num_of_version_in_retention=1, bucket=False)
    rank = (await Rank.launch(lab, world_size=2))[0]
    versions = []
    for _ in range(3):
        version = rank.next()
        rank.create(version)
        rank.seal(version, "a", b"x")
        await rank.prepare(version, ["a"])
        rank.commit(version)
        await lab.reaches(version, Tier.TIER1)
        versions.append(version)
    assert lab.version(versions[0]).state is VersionState.PREPARED
    await lab.app.keeper.apply(JOB)
    assert held(lab, Tier.TIER1) == [3, 2, 1]
    keeper = lab.app.keeper
    keeper.set_floor(JOB, versions[1], versions[1])
    keeper.set_floor(JOB, versions[2], versions[0])  # lower: the second was lost on the other node
    await keeper.apply(JOB)
    assert held(lab, Tier.TIER1) == [3, 2, 1]
    keeper.set_floor(JOB, versions[1], versions[1])  # a rank that was late tells of an older create
    assert keeper.floor(JOB) == versions[0]
    keeper.set_floor(JOB, rank.next(), None)  # nothing is common any more
    assert keeper.floor(JOB) is None
    keeper.set_floor(JOB, VersionId(2, 1, "a later launch"), versions[1])
    assert keeper.floor(JOB) == versions[1]
    await keeper.apply(JOB)
    assert held(lab, Tier.TIER1) == [3, 2]
    await lab.restart()
    assert lab.app.keeper.floor(JOB) is None, "nothing is known of the other node"


async def test_a_version_lost_on_one_node_keeps_the_one_before_it_on_the_other(
    make_lab: MakeLab, tmp_path: Path
) -> None:
    nodes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        nodes.append(await make_lab(folder=tmp_path / name, bucket=False, num_of_version_in_retention=2))
    ranks = [await Rank.join(lab, rank=number, world_size=2) for number, lab in enumerate(nodes)]
    await ranks[0].claim("a" * 32)
    await ranks[1].claim("a" * 32, epoch=1)

    def common() -> set[VersionId]:
        told = [{version.id for version in lab.app.launches.newest(JOB, Tier.TIER1)} for lab in nodes]
        return set.intersection(*told)

    async def save(*, commits: list[Rank]) -> VersionId:
        version, floor = ranks[0].next(), max(common(), default=None)
        for rank in ranks:
            rank.create(version)
            rank.lab.app.keeper.set_floor(JOB, version, floor)
            rank.seal(version, "a", b"x")
            await rank.prepare(version, ["a"])
        for rank in commits:
            rank.commit(version)
            await rank.lab.reaches(version, Tier.TIER1)
        return version

    versions = [await save(commits=ranks) for _ in range(2)]
    aborted = await save(commits=[])  # its create answers the second
    for rank in ranks:
        rank.lab.app.saves.abort(rank.lab.version(aborted), "a rank failed")
    nodes[1].app.catalog.set_damaged(nodes[1].version(versions[1]), Tier.TIER1, "a: block 0")
    await save(commits=ranks[:1])  # and the second node dies before it has this one in tier 1
    await nodes[0].app.keeper.apply(JOB)
    assert common() == {versions[0]}


async def test_a_copy_in_tier2_that_only_this_node_counts_on_does_not_raise_what_ranks_agreed(
    make_lab: MakeLab,
) -> None:
    lab = await make_lab(num_of_version_in_retention=1, bucket=False)
    rank = (await Rank.launch(lab, world_size=2))[0]
    versions = []
    for _ in range(2):
        versions.append(rank.next())
        rank.create(versions[-1])
        rank.seal(versions[-1], "a", b"x")
        await rank.prepare(versions[-1], ["a"])
        rank.commit(versions[-1])
        await lab.reaches(versions[-1], Tier.TIER1)
    uploaded = lab.version(versions[1])
    lab.app.catalog.move(uploaded, VersionState.COMMITTED)
    lab.app.catalog.set_copy(uploaded, Tier.TIER2, CopyState.VERIFIED)
    assert lab.app.keeper.floor(JOB) == versions[1]
    lab.app.keeper.set_floor(JOB, rank.next(), versions[0])  # the other node has found it damaged there
    assert lab.app.keeper.floor(JOB) == versions[0]


async def test_a_copy_that_is_being_deleted_is_known(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=3)
    first, _ = await saved(lab, 2, persist=True)
    version, keeper = lab.version(first), lab.app.keeper
    seen = []

    def watched(real: Callable[..., Any], name: str, *, fails: bool = False) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            seen.append((name, *(keeper.is_deleting(version, tier) for tier in (Tier.TIER1, Tier.TIER2))))
            if fails and len(seen) == 1:
                raise UnavailableError("the disk reports an error")
            return real(*arguments)

        return wrapped

    bucket = await lab.bucket()
    tree = lab.app.tier1.delete_tree
    lab.app.tier1.delete_tree = watched(tree, "data", fails=True)  # type: ignore[method-assign]
    bucket.mark_deleted = watched(bucket.mark_deleted, "tombstone")  # type: ignore[method-assign]
    await keeper.delete(keeper.plan_version(version))
    assert seen == [("data", True, False), ("tombstone", True, True)]
    assert keeper.is_deleting(version, Tier.TIER1), "half of it is gone, and the rest goes later"
    await lab.passes(lambda: gone(lab, first))
    assert seen[2] == ("data", True, False)
    assert not any(keeper.is_deleting(version, tier) for tier in Tier)


async def test_a_pin_survives_everything_but_unpin(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=1)
    (rank,) = await Rank.launch(lab)
    pinned = await rank.save(persist=True)
    await lab.reaches(pinned, Tier.TIER2)
    assert await lab.app.keeper.pin(lab.version(pinned), "paper", pinned=True)
    assert not await lab.app.keeper.pin(lab.version(pinned), "paper", pinned=True)
    for _ in range(3):
        await lab.reaches(await rank.save(persist=True), Tier.TIER2)
    await lab.app.keeper.apply(JOB)
    assert held(lab, Tier.TIER1) == [4, 1]
    assert held(lab, Tier.TIER2) == [4, 1]
    with pytest.raises(ConfigurationError, match="pinned"):
        lab.app.keeper.plan_version(lab.version(pinned))
    await lab.restart()
    await lab.reaches(pinned, Tier.TIER2)
    assert lab.version(pinned).pinned
    assert await lab.app.keeper.pin(lab.version(pinned), "", pinned=False)
    await lab.app.inventory.refresh(JOB)
    assert not lab.version(pinned).pinned
    await lab.app.keeper.apply(JOB)
    await eventually(lambda: held(lab, Tier.TIER1) == [4] and held(lab, Tier.TIER2) == [4])


async def test_a_pin_holds_without_the_bucket_and_unpinning_needs_it(make_lab: MakeLab) -> None:
    lab = await make_lab()
    (version,) = await saved(lab, 1)
    bucket = await lab.bucket()

    def fails(*_: object) -> None:
        raise UnavailableError("the bucket is away")

    bucket.pin = bucket.unpin = fails  # type: ignore[method-assign, assignment]
    assert await lab.app.keeper.pin(lab.version(version), "", pinned=True)
    assert lab.version(version).pinned
    with pytest.raises(UnavailableError):
        await lab.app.keeper.pin(lab.version(version), "", pinned=False)
    assert lab.version(version).pinned
    await lab.restart()
    assert lab.version(version).pinned


async def test_prune_does_exactly_what_its_dry_run_says(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=5)
    await saved(lab, 5, persist=True)
    keeper = lab.app.keeper
    await asyncio.gather(*lab.app._tasks)  # the daemon tidies by itself after each save
    keeper._settings = lab.settings.__class__(
        **{
            name: getattr(lab.settings, name)
            for name in lab.settings.__slots__
            if name != "num_of_version_in_retention"
        },
        num_of_version_in_retention=2,
    )
    said = keeper.plan(JOB)
    assert keeper.plan(JOB) == said
    assert held(lab, Tier.TIER1) == held(lab, Tier.TIER2) == [5, 4, 3, 2, 1]
    assert {(item.version.id.sequence, item.tier) for item in said} == {
        (number, tier) for number in (1, 2, 3) for tier in (Tier.TIER1, Tier.TIER2)
    }
    assert await keeper.apply(JOB) == said
    assert held(lab, Tier.TIER1) == held(lab, Tier.TIER2) == [5, 4]
    assert keeper.plan(JOB) == []


async def test_tier2_keeps_its_own_numbers(make_lab: MakeLab) -> None:
    lab = await make_lab(
        num_of_version_in_retention=1, tier2_num_of_version_in_retention=2, tier2_keep_every=3, tier2_delete_grace_s=0.0
    )
    await saved(lab, 7, persist=True)
    await lab.app.keeper.apply(JOB)
    assert held(lab, Tier.TIER1) == [7]
    assert held(lab, Tier.TIER2) == [7, 6, 3]


async def test_deletion_in_tier2_is_tombstone_then_grace_then_data(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=1, tier2_delete_grace_s=60.0)
    first, _ = await saved(lab, 2, persist=True)
    await lab.app.keeper.apply(JOB)
    bucket = await lab.bucket()
    decision = bucket.decision(JOB, first)
    assert decision is not None
    assert decision.verdict is Verdict.DELETED
    assert not decision.swept
    data = lab.object(first, "model.pt")
    assert data.exists()
    reader = lab.app.clients.connect(0, 0, 1)
    lease = lab.app.leases.take(reader.number, JOB, first)  # a restore that began just before
    lab.clock.advance(120)
    await lab.settle()
    assert data.exists()
    lab.app.leases.end(lease)
    await lab.passes(lambda: not data.exists())
    await eventually(lambda: lab.events("tier2_data_deleted"))
    decision = bucket.decision(JOB, first)
    assert decision is not None
    assert (decision.verdict, decision.swept) == (Verdict.DELETED, True)  # the key stays for ever
    assert not (lab.bucket_path / JOB / str(first)).exists()


async def test_the_grace_is_kept(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=1, tier2_delete_grace_s=60.0)
    first, _ = await saved(lab, 2, persist=True)
    await lab.app.keeper.apply(JOB)
    passed_s = await lab.passes(lambda: not lab.object(first, "model.pt").exists())
    assert passed_s >= 60


@pytest.mark.parametrize("again", [False, True])
async def test_a_crash_between_tombstone_and_sweep_is_made_good(make_lab: MakeLab, again: bool) -> None:
    lab = await make_lab(num_of_version_in_retention=1, tier2_delete_grace_s=60.0)
    first, _ = await saved(lab, 2, persist=True)
    await lab.app.keeper.apply(JOB)
    await lab.restart()
    if again:
        await lab.restart()
    assert lab.object(first, "model.pt").exists()
    await eventually(lambda: lab.app.keeper._sweeps)
    await lab.passes(lambda: not lab.object(first, "model.pt").exists())
    assert lab.app.catalog.get(JOB, first) is None


async def test_a_sweep_that_fails_is_tried_again(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=1, tier2_delete_grace_s=5.0)
    first, _ = await saved(lab, 2, persist=True)
    bucket = await lab.bucket()
    real, calls = bucket.delete_data, 0

    def fails_once(job: str, version: VersionId) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise UnavailableError("the bucket is away")
        real(job, version)

    bucket.delete_data = fails_once  # type: ignore[method-assign]
    await lab.app.keeper.apply(JOB)
    await lab.passes(lambda: not lab.object(first, "model.pt").exists())
    assert calls == 2
    assert lab.events("delete_failed")


async def test_a_deletion_that_fails_half_way_is_tried_again(make_lab: MakeLab) -> None:
    """Its manifest is gone by then, so that no plan names it any more."""
    lab = await make_lab(num_of_version_in_retention=1, bucket=False)
    real, failed = lab.app.tier1.delete_tree, list[str]()

    def fails_once(key: str, *, sync: bool = True) -> None:
        if key.endswith(str(first)) and not failed:
            failed.append(key)
            raise UnavailableError("the disk reports an error")
        real(key, sync=sync)

    first = VersionId(1, 1, "step1")
    lab.app.tier1.delete_tree = fails_once  # type: ignore[method-assign]
    versions = await saved(lab, 2)
    assert versions[0] == first
    await eventually(lambda: lab.events("delete_failed"))
    assert lab.file(first, "model.pt").exists()
    await lab.passes(lambda: gone(lab, first))
    assert lab.app.catalog.get(JOB, first) is None


async def test_a_tombstone_that_cannot_be_put_leaves_the_version_as_it_was(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=1)
    first, second = await saved(lab, 2, persist=True)
    await eventually(lambda: held(lab, Tier.TIER1) == [2])
    await eventually(lambda: held(lab, Tier.TIER2) == [2])
    bucket: BucketRepository = await lab.bucket()
    assert first != second

    def fails(*_: object) -> None:
        raise UnavailableError("the bucket is away")

    bucket.mark_deleted = fails  # type: ignore[method-assign, assignment]
    version = lab.version(second)
    lab.app.catalog.set_copy(version, Tier.TIER1, CopyState.EVICTED)
    assert await lab.app.keeper.delete([_deletion(lab, second)]) == []
    assert version.state is VersionState.COMMITTED
    assert version.has(Tier.TIER2)


def _deletion(lab: Lab, version: VersionId) -> Deletion:
    return Deletion(lab.version(version), Tier.TIER2, "asked for")


async def test_asking_for_one_version(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=3)
    first, second = await saved(lab, 2, persist=True)
    await lab.settle()
    plan = lab.app.keeper.plan_version(lab.version(second))
    assert [item.tier for item in plan] == [Tier.TIER1, Tier.TIER2]
    assert await lab.app.keeper.delete(plan) == plan
    assert gone(lab, second)
    with pytest.raises(ConfigurationError, match="only version"):
        lab.app.keeper.plan_version(lab.version(first))


async def test_at_the_byte_limit_the_oldest_waiting_version_loses_its_claim(make_lab: MakeLab) -> None:
    lab = await make_lab(
        run=False, tier1_limit_bytes=35_000, num_of_version_in_retention=10, capture_memory_bytes=1 << 20
    )
    writer = asyncio.ensure_future(lab.app.writer.run(lab.app.saves))
    (rank,) = await Rank.launch(lab)
    waiting = await rank.save({"a": bytes(10_000)}, persist=True)
    asked = await rank.save({"a": bytes(10_000)})
    await lab.app.persistence.request(lab.version(asked))
    plain = await rank.save({"a": bytes(10_000)})
    newest = await rank.save({"a": bytes(10_000)}, persist=True)  # the one that waits goes last
    assert [event.version for event in lab.events("claim_lost")] == [str(waiting)]
    assert held(lab, Tier.TIER1) == [newest.sequence, plain.sequence, asked.sequence]
    after = await rank.save({"a": bytes(10_000)})
    assert held(lab, Tier.TIER1) == [after.sequence, newest.sequence, asked.sequence]
    with pytest.raises(
        OverloadedError, match="take 30000 of the 35000 bytes of tier1_limit_bytes, so 25000 "
    ) as caught:
        await rank.save({"a": bytes(30_000)})  # the request and the floor stay
    assert "raise tier1_limit_bytes" in caught.value.hint
    assert lab.app.metrics.lost_claims._value.get() == 1
    writer.cancel()


async def test_links_go_before_the_version_and_only_its_own(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = await make_lab(num_of_version_in_retention=1)
    (rank,) = await Rank.launch(lab)
    save_dir = tmp_path / "save_dir"
    version = await rank.save({"a.pt": b"x", "b.pt": b"y", "c.pt": b"z"}, tag="step", save_dir=str(save_dir))
    folder = save_dir / "step"
    folder.mkdir(parents=True)
    (folder / "a.pt").symlink_to(lab.file(version, "a.pt"))
    (folder / "b.pt").symlink_to("/etc/hostname")
    (folder / "c.pt").write_text("the user's own")
    await rank.save()
    await eventually(lambda: gone(lab, version))
    assert not (folder / "a.pt").is_symlink()
    assert (folder / "b.pt").is_symlink()
    assert (folder / "c.pt").read_text() == "the user's own"


async def test_nothing_depends_on_the_wall_clock(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=2)
    (rank,) = await Rank.launch(lab)
    versions = []
    for jump_s in (0, 1e9, -3e9, 5e8):
        lab.clock.jump(jump_s)
        versions.append(await rank.save(persist=True))
        await lab.reaches(versions[-1], Tier.TIER2)
        assert (await lab.app.reporter.status()).last_persisted == f"{JOB}/{versions[-1]}"
    await lab.app.keeper.apply(JOB)
    assert held(lab, Tier.TIER1) == held(lab, Tier.TIER2) == [4, 3]
    assert layout.version_folder(JOB, versions[3])


async def test_at_the_byte_limit_what_is_passed_over_goes_before_the_newest_that_is_not(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, tier1_limit_bytes=25_000, num_of_version_in_retention=1)
    (rank,) = await Rank.launch(lab)
    sound = await rank.save({"a": bytes(10_000)})
    lab.version(sound).pinned = True
    marked = await rank.save({"a": bytes(10_000)})
    lab.version(sound).pinned = False
    lab.app.health.mark(lab.version(marked), "its loss exploded")
    lab.app.keeper.set_floor(JOB, VersionId(1, 3, "next"), marked)  # agreed on before it was marked
    assert lab.app.keeper.floor(JOB) == sound
    assert [version.id for version in lab.app.launches.newest(JOB, Tier.TIER1)] == [sound]
    saved_now = rank.next()
    rank.create(saved_now)
    rank.seal(saved_now, "a", bytes(10_000))
    await rank.prepare(saved_now, ["a"])
    assert held(lab, Tier.TIER1) == [sound.sequence]
    lab.app.health.mark(lab.version(sound), "this one too")
    assert lab.app.keeper.floor(JOB) == sound, "with nothing else left it is what a resume takes"


async def test_what_the_daemon_asked_for_by_itself_gives_way_and_what_a_person_asked_for_does_not(
    make_lab: MakeLab,
) -> None:
    lab = await make_lab(
        run=False, tier1_limit_bytes=35_000, num_of_version_in_retention=1, capture_memory_bytes=1 << 20
    )
    writer = asyncio.ensure_future(lab.app.writer.run(lab.app.saves))
    versions = []
    for explicit in (False, True, False):
        (rank,) = await Rank.launch(lab)  # and each launch ends while the bucket is away
        versions.append(await rank.save({"model.pt": b"x" * 10_000}))
        if explicit:
            await lab.app.persistence.request(lab.version(versions[-1]))
        await lab.app.persistence.request_newest(JOB)
    writer.cancel()
    await lab.restart(run=False)  # both kinds are told apart afterwards, too
    await lab.app.keeper.make_room(10_000, JOB)
    assert gone(lab, versions[0])
    assert [event.version for event in lab.events("claim_lost")] == [str(versions[0])]
    assert lab.version(versions[1]).requested_and_waiting
    with pytest.raises(OverloadedError):
        await lab.app.keeper.make_room(20_000, JOB)
    assert not gone(lab, versions[1])


async def test_damaged_copies_do_not_keep_every_save_from_its_place(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, tier1_limit_bytes=35_000, num_of_version_in_retention=3, scrub_bytes_per_s=0)
    (rank,) = await Rank.launch(lab)
    intact, *rotten = [await rank.save({"a": bytes(10_000)}) for _ in range(3)]
    for version in rotten:
        lab.app.catalog.set_damaged(lab.version(version), Tier.TIER1, "a: block 0")
    lab.version(rotten[0]).pinned = True
    after = await rank.save({"a": bytes(10_000)})  # newer than the floor, and no more of them than is needed
    assert gone(lab, rotten[1])
    (event,) = lab.events("damaged_copy_given_up")
    assert (event.version, event.fields["damage"]) == (str(rotten[1]), "a: block 0")
    assert held(lab, Tier.TIER1) == [after.sequence, intact.sequence]
    with pytest.raises(OverloadedError) as caught:
        await rank.save({"a": bytes(30_000)})
    assert "cairn prune VERSION" in caught.value.hint
    assert not gone(lab, rotten[0]), "it is pinned"


async def test_with_all_copies_damaged_there_is_room_for_the_next_version(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, tier1_limit_bytes=25_000, num_of_version_in_retention=2, scrub_bytes_per_s=0)
    (rank,) = await Rank.launch(lab)
    rotten = [await rank.save({"a": bytes(10_000)}) for _ in range(2)]
    for version in rotten:
        lab.app.catalog.set_damaged(lab.version(version), Tier.TIER1, "a: block 0")
    assert lab.app.keeper.floor(JOB) is None
    await rank.save({"a": bytes(10_000)})
    assert [gone(lab, version) for version in rotten] == [True, False]


async def test_a_damaged_copy_of_one_job_goes_before_an_intact_one_of_another(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, tier1_limit_bytes=35_000, num_of_version_in_retention=2, scrub_bytes_per_s=0)
    (rank,) = await Rank.launch(lab)
    intact = [await rank.save({"a": bytes(10_000)}) for _ in range(2)]
    (other,) = await Rank.launch(lab, job="z")
    rotten = other.next()
    other.create(rotten)
    other.seal(rotten, "a", bytes(10_000))
    await other.prepare(rotten, ["a"])
    other.commit(rotten)
    await lab.reaches(rotten, Tier.TIER1, "z")
    lab.app.catalog.set_damaged(lab.version(rotten, "z"), Tier.TIER1, "a: block 0")
    await lab.app.keeper.make_room(10_000, JOB)
    assert lab.app.catalog.get("z", rotten) is None
    assert held(lab, Tier.TIER1) == [version.sequence for version in reversed(intact)]


async def test_the_disk_is_asked_for_its_room_beside_the_event_loop(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_by: list[threading.Thread] = []

    def free_bytes(_: LocalTier) -> int:
        asked_by.append(threading.current_thread())
        return 0

    monkeypatch.setattr(LocalTier, "free_bytes", free_bytes)
    with pytest.raises(OverloadedError):
        await lab.app.keeper.make_room(1, JOB)
    assert asked_by
    assert threading.current_thread() not in asked_by
