"""Saves from create to sealed or aborted, and what death, delay and contradiction do to them."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path

import pytest

from cairn_api.errors import ConfigurationError, OverloadedError, SaveFailedError, VersionError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.model import CopyState, Tier, VersionState
from cairnd.records import PieceDigests
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, NO_RECORDS, Lab, Rank, eventually, gone, held_fds, state
from tests.daemon.tiers.rigged import NotesProtection, RiggedFileSystem, failing


async def test_the_bytes_reach_tier1_under_their_names(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    parts = {"model.pt": b"weights", "zero/rank-0/optim.pt": b"moments" * 10_000, "zero/rank-1/optim.pt": b"m"}
    version = await rank.save(parts)
    assert {name: lab.file(version, name).read_bytes() for name in parts} == parts
    assert state(lab, version) is VersionState.COMMITTED
    assert not (lab.tier1 / layout.incoming_folder(JOB, version)).exists()
    assert [event.name for event in lab.app.events.remembered() if event.version == str(version)] == [
        "version_open", "version_sealed", "copy_verified", "copy_copying", "copy_verified", "version_committed",
    ]  # fmt: skip


async def test_files_are_protected_before_the_manifest_shows_them(make_lab: MakeLab) -> None:
    lab = await make_lab(protect_files=True)
    lab.app.tier1._fs = rigged = NotesProtection(lab.tier1)
    (rank,) = await Rank.launch(lab)
    version = await rank.save({"model.pt": b"weights", "optim.pt": b"moments"})
    folder = layout.version_folder(JOB, version)
    manifest = rigged.calls.index(("rename", layout.manifest(JOB, version)))
    for name in ("model.pt", "optim.pt"):
        assert rigged.calls.index(("protect", f"{folder}/{name}")) < manifest


async def test_that_it_was_captured_is_kept_until_the_manifest_is_there(lab: Lab) -> None:
    lab.app.tier1._fs = rigged = RiggedFileSystem(lab.tier1)
    (rank,) = await Rank.launch(lab)
    version = await rank.save({"model.pt": b"weights"})
    manifest = rigged.calls.index(("rename", layout.manifest(JOB, version)))
    assert rigged.calls.index(("unlink", layout.sealed(JOB, version))) > manifest
    marked = rigged.calls.index(("open", layout.sealed(JOB, version)))
    assert ("fsync_folder", layout.incoming_folder(JOB, version)) in rigged.calls[marked:manifest], "a power cut, too"


async def test_each_version_is_marked_as_captured_also_while_it_waits_for_another(make_lab: MakeLab) -> None:
    """When the daemon is killed, all of them are told as lost."""
    lab = await make_lab(bucket=False, run=False)
    (rank,) = await Rank.launch(lab)
    captured = []
    for _ in range(2):
        captured.append(rank.next())
        rank.create(captured[-1])
        rank.seal(captured[-1], "model.pt", b"weights")
        await rank.prepare(captured[-1], ["model.pt"])
        rank.commit(captured[-1])
    await eventually(lambda: all((lab.tier1 / layout.sealed(JOB, version)).exists() for version in captured))
    await lab.restart(run=False)
    assert lab.app.health.lost(JOB) == [(JOB, version) for version in captured]


async def test_a_mark_that_cannot_be_made_fails_the_version(lab: Lab) -> None:
    def refused(key: str) -> None:
        raise OverloadedError(f"the disk is full: {key}")

    lab.app.tier1.mark = refused  # type: ignore[method-assign]
    (rank,) = await Rank.launch(lab)
    version = rank.next()
    rank.create(version)
    rank.seal(version, "model.pt", b"weights")
    await rank.prepare(version, ["model.pt"])
    rank.commit(version)
    await eventually(lambda: state(lab, version) is VersionState.ABORTED)
    assert "the disk is full" in lab.version(version).reason


async def test_ranks_that_share_a_name_get_folders(lab: Lab) -> None:
    ranks = await Rank.launch(lab, world_size=3)
    version = ranks[0].next()
    for rank in ranks:
        rank.create(version)
        rank.seal(version, "model.pt", b"rank %d" % rank.rank)
        await rank.prepare(version, ["model.pt"])
    with pytest.raises(ConfigurationError, match="same partition name"):
        ranks[0].commit(version, [("model.pt", 1)])
    ranks[0].commit(version, [("model.pt", 1), ("model.pt", 2)])
    assert ranks[1].commit(version).state is VersionState.SEALED  # all others repeat it
    await lab.reaches(version, Tier.TIER1)
    assert lab.file(version, "model.pt").read_bytes() == b"rank 0"
    assert lab.file(version, "by-rank/1/model.pt").read_bytes() == b"rank 1"
    assert lab.file(version, "by-rank/2/model.pt").read_bytes() == b"rank 2"


async def test_names_that_cannot_lie_side_by_side_fail_while_all_can_still_abort(lab: Lab) -> None:
    ranks = await Rank.launch(lab, world_size=2)
    version = ranks[0].next()
    for rank, name in zip(ranks, ("model", "model/extra.pt"), strict=True):
        rank.create(version)
        rank.seal(version, name, b"x")
    with pytest.raises(ConfigurationError, match="cannot lie beside"):
        await ranks[0].prepare(version, ["model"])
    with pytest.raises(ConfigurationError, match="by-rank"):
        ranks[0].seal(version, "by-rank/1/model.pt", b"x")
    lab.app.saves.abort(lab.version(version), "told to")
    assert state(lab, version) is VersionState.ABORTED


async def test_order_is_kept(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    version = rank.next()
    with pytest.raises(VersionError, match="was not created"):
        rank.seal(version, "a", b"x")
    with pytest.raises(VersionError):
        rank.commit(version)
    rank.create(version)
    with pytest.raises(ConfigurationError, match="before any rank had prepared"):
        rank.commit(version)
    with pytest.raises(SaveFailedError, match="does not hold partition 'a'"):
        await rank.prepare(version, ["a"])
    rank.seal(version, "a", b"x")
    with pytest.raises(ConfigurationError, match="before any rank had prepared"):
        rank.commit(version)
    await rank.prepare(version, ["a"])
    with pytest.raises(ConfigurationError, match="cannot add"):
        rank.seal(version, "b", b"x")
    rank.commit(version)
    with pytest.raises(ConfigurationError, match="no more partitions"):
        rank.seal(version, "b", b"x")
    lab.app.saves.abort(lab.version(version), "too late")
    await lab.reaches(version, Tier.TIER1)
    assert rank.create(version).state is VersionState.COMMITTED  # a repeated call tells what it became
    await rank.prepare(version, ["a"])
    assert rank.commit(version).state is VersionState.COMMITTED


async def test_a_rank_that_is_not_ready_cannot_be_committed_over(lab: Lab) -> None:
    ranks = await Rank.launch(lab, world_size=2)
    version = ranks[0].next()
    for rank in ranks:
        rank.create(version)
        rank.seal(version, f"{rank.rank}.pt", b"x")
    await ranks[0].prepare(version, ["0.pt"])
    assert ranks[0].commit(version).state is VersionState.OPEN  # agreed on, but not all of it is held here yet
    await ranks[1].prepare(version, ["1.pt"])
    await lab.reaches(version, Tier.TIER1)
    assert {item.path for item in lab.version(version).partitions} == {"0.pt", "1.pt"}


async def test_versions_belong_to_the_epoch_that_was_claimed(lab: Lab) -> None:
    rank = await Rank.join(lab)
    with pytest.raises(ConfigurationError, match="claimed"):
        rank.create(VersionId(1, 1, "early"))
    await rank.claim()
    with pytest.raises(ConfigurationError, match="claimed"):
        rank.create(VersionId(9, 1, "far"))
    rank.create(rank.next())


async def test_another_world_or_launch_cannot_join_a_version(lab: Lab) -> None:
    ranks = await Rank.launch(lab, world_size=2)
    version = ranks[0].next()
    ranks[0].create(version)
    ranks[1].world_size = 3
    with pytest.raises(ConfigurationError, match="another launch"):
        ranks[1].create(version)
    ranks[1].world_size = 2
    ranks[1].client.nonce = "f" * 32
    with pytest.raises(ConfigurationError, match="another launch"):
        ranks[1].create(version)
    ranks[0].rank = 2
    with pytest.raises(ConfigurationError, match="rank 2 of 2"):
        ranks[0].create(version)


async def test_a_buffer_holds_one_partition_and_is_its_ranks_own(lab: Lab) -> None:
    ranks = await Rank.launch(lab, world_size=2)
    saves, version = lab.app.saves, ranks[0].next()
    for rank in ranks:
        rank.create(version)
    segment = ranks[0].seal(version, "a", b"x")

    def seal(rank: Rank, name: str, segment_name: str, size_bytes: int = 1) -> None:
        saves.seal(
            rank.client, version, rank=rank.rank, name=name, segment_name=segment_name, size_bytes=size_bytes,
            records=NO_RECORDS, globals_=(), digests=PieceDigests(),
        )  # fmt: skip

    seal(ranks[0], "a", segment.name)  # repeated
    with pytest.raises(ConfigurationError, match="another partition"):
        seal(ranks[0], "b", segment.name)
    with pytest.raises(ConfigurationError, match="does not hold"):
        seal(ranks[1], "b", segment.name)
    with pytest.raises(ConfigurationError, match="does not hold"):
        seal(ranks[1], "b", "0" * 32)
    free = ranks[1].offer(b"y")
    with pytest.raises(ConfigurationError, match="its buffer"):
        seal(ranks[1], "b", free.name, size_bytes=free.size_bytes + 1)
    with pytest.raises(ConfigurationError, match="empty"):
        seal(ranks[1], "b", free.name, size_bytes=0)
    later = ranks[0].next()
    ranks[0].create(later)
    with pytest.raises(ConfigurationError, match="still holds another version"):
        saves.seal(
            ranks[0].client, later, rank=0, name="a", segment_name=segment.name, size_bytes=1, records=NO_RECORDS,
            globals_=(), digests=PieceDigests(),
        )  # fmt: skip


async def test_an_abort_gives_everything_back(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    version = rank.next()
    before = held_fds(lab.tier1)
    rank.create(version, persist=True)
    segment = rank.seal(version, "a", b"x" * 5000)
    replaced = rank.seal(version, "a", b"y" * 5000)
    assert segment.owner is None
    await rank.prepare(version, ["a"])
    lab.app.saves.abort(lab.version(version), "rank 0: out of space")
    assert state(lab, version) is VersionState.ABORTED
    assert replaced.owner is None
    assert lab.app.launches.persist_lost(rank.client)
    with pytest.raises(SaveFailedError, match="rank 0: out of space"):
        rank.seal(version, "b", b"x")
    for held in lab.app.memory.of_client(rank.client.number):
        lab.app.memory.release(held)
    assert lab.app.memory.granted_bytes == 0
    await eventually(lambda: held_fds(lab.tier1) == before)
    await lab.restart()
    assert gone(lab, version)


async def test_prepare_called_twice_at_once_reserves_once(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    version = rank.next()
    rank.create(version)
    rank.seal(version, "a", b"x")
    before = held_fds(lab.tier1)
    await asyncio.gather(rank.prepare(version, ["a"]), rank.prepare(version, ["a"]), rank.prepare(version, ["a"]))
    await eventually(lambda: held_fds(lab.tier1) == before + 1)
    rank.commit(version)
    await lab.reaches(version, Tier.TIER1)


async def test_a_rank_that_dies_in_mid_copy_leaves_nothing(lab: Lab) -> None:
    ranks = await Rank.launch(lab, world_size=2)
    version = ranks[0].next()
    before = held_fds(lab.tier1)
    for rank in ranks:
        rank.create(version)
        rank.seal(version, f"{rank.rank}.pt", b"x")
    await ranks[0].prepare(version, ["0.pt"])
    lab.app.memory.grant(ranks[1].client.number, JOB, 4096)
    ranks[1].leave()
    assert state(lab, version) is VersionState.ABORTED
    assert "ended before commit" in lab.version(version).reason
    ranks[0].leave()
    assert lab.app.memory.granted_bytes == 0
    await eventually(lambda: held_fds(lab.tier1) == before)


async def test_ranks_that_die_after_all_prepared_have_agreed(lab: Lab) -> None:
    """All ranks can only have agreed to commit; the daemon finishes the version and persists it without them."""
    ranks = await Rank.launch(lab, world_size=2)
    version = ranks[0].next()
    for rank in ranks:
        rank.create(version)
        rank.seal(version, f"{rank.rank}.pt", b"x")
        await rank.prepare(version, [f"{rank.rank}.pt"])
    for rank in ranks:
        rank.leave()
    await lab.reaches(version, Tier.TIER1)
    await lab.reaches(version, Tier.TIER2)


async def test_names_that_clash_are_not_guessed_when_ranks_die(lab: Lab) -> None:
    ranks = await Rank.launch(lab, world_size=2)
    version = ranks[0].next()
    for rank in ranks:
        rank.create(version)
        rank.seal(version, "same.pt", b"x")
        await rank.prepare(version, ["same.pt"])
    ranks[1].leave()
    assert state(lab, version) is VersionState.ABORTED


@pytest.mark.parametrize("ready", [False, True])
async def test_a_silent_rank_and_an_idle_save_expire(make_lab: MakeLab, ready: bool) -> None:
    lab = await make_lab(lease_s=60.0, commit_timeout_s=600.0)
    (rank,) = await Rank.launch(lab)
    version = rank.next()
    rank.create(version)
    rank.seal(version, "a", b"x")
    if ready:
        await rank.prepare(version, ["a"])
    passed_s = await lab.passes(lambda: state(lab, version) is not VersionState.OPEN)
    assert 60 < passed_s < 65
    assert (
        state(lab, version) is VersionState.ABORTED
    ) is not ready  # what all ranks prepared is finished, not dropped


async def test_time_in_which_the_daemon_stood_still_counts_for_nobody(make_lab: MakeLab) -> None:
    lab = await make_lab(lease_s=60.0, commit_timeout_s=600.0)
    (rank,) = await Rank.launch(lab)
    version = rank.next()
    rank.create(version)
    token = lab.app.clients.issue_token(rank.client)
    await lab.settle()
    lab.clock.advance(1000)  # in one step: nobody ran meanwhile, as after SIGSTOP
    await lab.settle()
    assert state(lab, version) is VersionState.OPEN
    assert lab.app.clients.authenticate(token) is rank.client
    assert lab.events("daemon_stood_still")
    passed_s = await lab.passes(lambda: state(lab, version) is not VersionState.OPEN)
    assert 55 < passed_s < 65, "a rank that is silent beyond that is still noticed"


async def test_a_rank_that_shows_signs_of_life_but_never_commits_expires(make_lab: MakeLab) -> None:
    lab = await make_lab(lease_s=60.0, commit_timeout_s=600.0)
    (rank,) = await Rank.launch(lab)
    version = rank.next()
    rank.create(version)
    token = lab.app.clients.issue_token(rank.client)
    for _ in range(11):
        lab.clock.advance(55)
        token = lab.app.clients.issue_token(rank.client) if lab.app.clients.authenticate(token) else token
        lab.app.saves.expire(60.0, 600.0, {rank.client.number: rank.client})
        assert rank.client.seen_s == lab.clock.monotonic_s()
    assert state(lab, version) is VersionState.ABORTED
    assert "not committed within 600 s" in lab.version(version).reason


async def test_a_sealed_save_does_not_end_with_time_or_its_rank(make_lab: MakeLab) -> None:
    lab = await make_lab(run=False)
    (rank,) = await Rank.launch(lab)
    version = rank.next()
    rank.create(version)
    rank.seal(version, "a", b"x")
    await rank.prepare(version, ["a"])
    rank.commit(version)
    rank.leave()
    lab.clock.advance(1e6)
    lab.app.saves.expire(1.0, 1.0, {})
    assert state(lab, version) is VersionState.SEALED
    lab.go()
    await lab.reaches(version, Tier.TIER1)


async def test_after_a_restart_the_whole_record_can_be_told_again(make_lab: MakeLab) -> None:
    """The daemon dies with a SEALED version in memory alone; the rank, which has the bytes too, tells it once more."""
    lab = await make_lab(run=False)
    (rank,) = await Rank.launch(lab)
    version, nonce = rank.next(), rank.client.nonce
    rank.create(version)
    rank.seal(version, "a", b"x")
    await rank.prepare(version, ["a"])
    rank.commit(version)
    await lab.restart()
    assert lab.app.catalog.get(JOB, version) is None
    again = await Rank.join(lab)
    assert await again.claim(nonce, epoch=version.epoch) == (False, False)
    again.create(version)
    again.seal(version, "a", b"x")
    await again.prepare(version, ["a"])
    again.commit(version)
    await lab.reaches(version, Tier.TIER1)


async def test_draining_refuses_new_saves(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    lab.app.saves.draining = True
    with pytest.raises(OverloadedError, match="draining"):
        rank.create(rank.next())


@pytest.mark.parametrize(
    ("call", "code", "name"),
    [
        ("pwrite", errno.EIO, ""),
        ("fsync", errno.EIO, ""),
        ("rename", errno.EIO, "a"),
        ("rename", errno.ENOSPC, "manifest.json"),
    ],
)
async def test_a_sealed_version_that_the_disk_loses_is_aborted_and_told(
    make_lab: MakeLab, call: str, code: int, name: str
) -> None:
    lab = await make_lab()
    (rank,) = await Rank.launch(lab)
    good = await rank.save()
    lab.app.tier1._fs = rigged = RiggedFileSystem(lab.tier1)
    version = rank.next()
    rank.create(version)
    rank.seal(version, "a", b"x")
    await rank.prepare(version, ["a"])
    rigged.fault = failing(call, code, name=name)
    rank.commit(version)
    await eventually(lambda: state(lab, version) is VersionState.ABORTED)
    await eventually(lambda: gone(lab, version), "what was written must not take space until the next start")
    (failure,) = rank.client.take_failures()
    assert isinstance(failure, SaveFailedError)
    assert str(version) in failure.message
    assert failure.hint
    assert lab.version(version).copy(Tier.TIER1).state is CopyState.FAILED
    assert lab.file(good, "model.pt").exists()
    assert rank.client.take_failures() == []  # told once
    segments = await lab.app.launches.reserve(rank.client, 1, 0.0)
    assert segments, "the buffer is free again"
    assert state(lab, await rank.save()) is VersionState.COMMITTED  # and the daemon goes on


async def test_a_disk_that_fails_after_the_rank_died_does_not_end_the_daemon(make_lab: MakeLab) -> None:
    lab = await make_lab(run=False, bucket=False)
    (rank,) = await Rank.launch(lab)
    version = rank.next()
    rank.create(version)
    rank.seal(version, "a", b"x" * 10_000)
    await rank.prepare(version, ["a"])
    rank.commit(version)
    rank.leave()
    lab.app.tier1._fs.pwrite = failing_write  # type: ignore[method-assign]
    try:
        lab.go()
        await eventually(lambda: state(lab, version) is VersionState.ABORTED)
        await lab.settle()
    finally:
        del lab.app.tier1._fs.pwrite
    assert lab.app.memory.granted_bytes == 0
    (rank,) = await Rank.launch(lab)
    assert state(lab, await rank.save()) is VersionState.COMMITTED


def failing_write(fd: int, data: memoryview, offset: int) -> int:
    raise OSError(errno.EIO, f"cannot write {len(data[1:])} bytes at {offset} to {fd}")


async def test_a_full_tier1_fails_at_prepare(make_lab: MakeLab) -> None:
    lab = await make_lab(tier1_limit_bytes=10_000, bucket=False)
    (rank,) = await Rank.launch(lab)
    kept = await rank.save({"a": bytes(6000)})
    version = rank.next()
    rank.create(version)
    for name in ("a", "b"):
        rank.seal(version, name, bytes(3000))
    with pytest.raises(OverloadedError, match="no room") as caught:
        await rank.prepare(version, ["a", "b"])  # each alone would fit
    assert "num_of_version_in_retention" in caught.value.hint
    lab.app.saves.abort(lab.version(version), "full")
    assert lab.file(kept, "a").exists()
    assert state(lab, await rank.save({"a": bytes(3000)})) is VersionState.COMMITTED


async def test_temporary_files_are_removed_on_the_workers_and_none_is_forgotten(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rank,) = await Rank.launch(lab)
    threads = list[str]()
    lab.app.tier1._fs = rigged = RiggedFileSystem(lab.tier1)
    unlink = rigged.unlink

    def noted(path: Path | str) -> None:
        threads.append(threading.current_thread().name)
        unlink(path)

    monkeypatch.setattr(rigged, "unlink", noted)
    version = rank.next()
    rank.create(version)
    for name in ("a", "b", "c"):
        rank.seal(version, name, b"x" * 5000)
    before = held_fds(lab.tier1)
    await rank.prepare(version, ["a", "b", "c"])
    folder = lab.tier1 / layout.incoming_folder(JOB, version)
    assert len(list(folder.iterdir())) == 3
    lab.app.saves.abort(lab.version(version), "told to")
    assert state(lab, version) is VersionState.ABORTED
    assert threads == [], "the loop has not waited for the disk"
    await lab.app.saves.discarded()
    assert len(threads) == 3
    assert threading.main_thread().name not in threads
    assert list(folder.iterdir()) == []
    assert held_fds(lab.tier1) == before


async def test_a_temporary_file_that_cannot_be_removed_is_reported(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    lab.app.tier1._fs = rigged = RiggedFileSystem(lab.tier1)
    version = rank.next()
    rank.create(version)
    rank.seal(version, "a", b"x")
    await rank.prepare(version, ["a"])
    rigged.fault = failing("unlink", errno.EIO)
    lab.app.saves.abort(lab.version(version), "told to")
    await lab.app.saves.discarded()
    assert len(lab.events("discard_failed")) == 1
