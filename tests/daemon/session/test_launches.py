"""Launches: whose job it is, which epoch, which buffers."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from cairn_api.errors import ConfigurationError
from cairn_api.names import VersionId
from cairnd.model import CopyState, Tier, VersionState
from cairnd.session.clients import TOKEN_LIFETIME_S, Clients
from tests.clock import ManualClock
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, Lab, Rank, eventually


async def test_epochs_count_launches_also_those_that_committed_nothing(lab: Lab) -> None:
    first = await Rank.join(lab)
    assert lab.app.launches.max_epoch(JOB) == 0
    assert await first.claim("a" * 32) == (False, False)
    assert await first.claim("a" * 32, epoch=1) == (False, False)  # repeated after a lost reply
    second = await Rank.join(lab)
    assert await second.claim("b" * 32, epoch=1) == (True, False)
    assert await second.claim("b" * 32, epoch=2) == (False, False)
    await lab.restart()
    assert lab.app.launches.max_epoch(JOB) == 2


async def test_a_lost_node_learns_its_epoch_from_the_bucket(make_lab: MakeLab) -> None:
    lab = await make_lab()
    await Rank.launch(lab)
    await lab.close()
    shutil.rmtree(lab.tier1)
    lab.app = lab._new_app()
    await lab.start()
    rank = await Rank.join(lab)
    assert lab.app.launches.max_epoch(JOB) == 1
    assert await rank.claim("b" * 32, epoch=1) == (True, False)
    assert await rank.claim("b" * 32) == (False, False)
    assert rank.client.epoch == 2


async def test_a_stalled_launch_cannot_turn_the_record_back(lab: Lab) -> None:
    old = await Rank.launch(lab, world_size=2)
    await Rank.launch(lab)
    again = await Rank.join(lab, rank=1, world_size=2)
    with pytest.raises(ConfigurationError, match=r"epoch 1 .* is over"):
        await again.claim(old[0].client.nonce, epoch=1)
    assert lab.app.launches.max_epoch(JOB) == 2


async def test_claiming_comes_after_joining(lab: Lab) -> None:
    rank = await Rank.join(lab)
    rank.client.job = "never-joined"
    with pytest.raises(ConfigurationError, match="Join"):
        await rank.claim()


async def test_a_job_belongs_to_who_joined_it_first(lab: Lab) -> None:
    await Rank.join(lab, uid=0, job="of-root")
    lab.app.clients._allowed_uids = frozenset({1001, 1002})
    await Rank.join(lab, uid=1001, job="of-1001")
    for job, uid in (("of-root", 1001), ("of-1001", 1002)):
        with pytest.raises(ConfigurationError, match="belongs to user"):
            await Rank.join(lab, uid=uid, job=job)
    await Rank.join(lab, uid=0, job="of-1001")  # root may
    record = lab.app.jobs.get("of-1001")
    assert record is not None
    assert record.uid == 1001


async def test_versions_without_a_record_still_say_whose_job_it_is(make_lab: MakeLab) -> None:
    lab = await make_lab(allowed_uids=(1001, 1002))
    owner = await Rank.join(lab, uid=1001)
    await owner.claim()
    version = await owner.save(persist=True)
    await lab.reaches(version, Tier.TIER2)
    await lab.close()
    shutil.rmtree(lab.tier1)
    lab.app = lab._new_app()
    await lab.start()
    await eventually(lambda: lab.app.catalog.get(JOB, version) is not None)
    with pytest.raises(ConfigurationError, match="versions of user 1001"):
        await Rank.join(lab, uid=1002)
    await Rank.join(lab, uid=1001)


async def test_locations_that_the_operator_did_not_allow_fail_at_join(make_lab: MakeLab) -> None:
    lab = await make_lab(allowed_storage_locations=("file:///srv/a",))
    for url in ("file:///srv", "file:///srv/ab", "s3://other/x", "file:///srv/a/../b"):
        with pytest.raises(ConfigurationError, match="does not allow") as caught:
            await Rank.join(lab, storage_url=url)
        assert "allowed_storage_locations" in caught.value.hint
    assert lab.app.jobs.get(JOB) is None


async def test_buffers_are_given_back_oldest_first_and_never_unsafe(make_lab: MakeLab) -> None:
    lab = await make_lab(run=False)
    (rank,) = await Rank.launch(lab)
    launches = lab.app.launches

    async def seal() -> VersionId:
        version = rank.next()
        rank.create(version)
        rank.seal(version, "a", b"x")
        await rank.prepare(version, ["a"])
        rank.commit(version)
        return version

    first = await seal()
    assert await launches.reserve(rank.client, 2, 0.0) == []  # a second buffer may be made
    second = await seal()
    waiting = asyncio.ensure_future(launches.reserve(rank.client, 2, 100.0))
    await lab.settle()
    assert not waiting.done()  # both versions are in memory alone
    assert await launches.reserve(rank.client, 2, 0.0) is None
    lab.go()
    free = await waiting
    assert free is not None
    assert [segment.owner for segment in free] == [None]
    assert lab.version(first).copy(Tier.MEMORY).state is CopyState.EVICTED
    assert lab.version(second).has(Tier.MEMORY)


async def test_a_wait_for_a_buffer_ends_in_time(make_lab: MakeLab) -> None:
    lab = await make_lab(run=False)
    (rank,) = await Rank.launch(lab)
    version = rank.next()
    rank.create(version)
    rank.seal(version, "a", b"x")
    waiting = asyncio.ensure_future(lab.app.launches.reserve(rank.client, 1, 30.0))
    await eventually(lambda: lab.clock.sleepers)
    lab.clock.advance(29)
    await lab.settle()
    assert not waiting.done()
    lab.clock.advance(1)
    assert await waiting is None
    with pytest.raises(ConfigurationError, match="at least one"):
        await lab.app.launches.reserve(rank.client, 0, 0.0)


async def test_a_buffer_that_a_restore_reads_is_not_given_back(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    version = await rank.save()
    reader = lab.app.clients.connect(0, 0, 1)
    steps = [step async for step in lab.app.fetcher.fetch(reader.number, lab.version(version), ())]
    assert steps[-1].ready[0].tier is Tier.MEMORY
    assert await lab.app.launches.reserve(rank.client, 1, 0.0) is None
    lab.app.clients.disconnect(reader)
    lab.app._on_client_gone(reader)
    assert await lab.app.launches.reserve(rank.client, 1, 0.0)


async def test_buffers_of_damaged_versions_are_given_back_when_newer_ones_need_them(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, scrub_bytes_per_s=0)
    (rank,) = await Rank.launch(lab)
    launches, catalog = lab.app.launches, lab.app.catalog
    first, second = [await rank.save({"a": b"x"}) for _ in range(2)]
    for version in (first, second):
        catalog.set_damaged(lab.version(version), Tier.TIER1, "a: block 0")
    assert await launches.reserve(rank.client, 2, 0.0)  # there is nothing to wait for
    assert [lab.version(version).has(Tier.MEMORY) for version in (first, second)] == [False, True]
    assert "block 0" in lab.events("copy_evicted")[-1].fields["reason"]


async def test_the_buffer_of_a_damaged_version_waits_for_a_newer_one_to_be_safe(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, run=False)
    (rank,) = await Rank.launch(lab)
    launches = lab.app.launches
    writer = asyncio.ensure_future(lab.app.writer.run(lab.app.saves))
    damaged = await rank.save({"a": b"x"})
    lab.app.catalog.set_damaged(lab.version(damaged), Tier.TIER1, "a: block 0")
    writer.cancel()
    newer = rank.next()
    rank.create(newer)
    rank.seal(newer, "a", b"x")
    await rank.prepare(newer, ["a"])
    rank.commit(newer)
    assert await launches.reserve(rank.client, 2, 0.0) is None  # in memory alone, both of them
    lab.go()
    await lab.reaches(newer, Tier.TIER1)
    assert await launches.reserve(rank.client, 2, 0.0)
    assert [lab.version(version).has(Tier.MEMORY) for version in (damaged, newer)] == [False, True]


async def test_copies_of_dead_ranks_make_room_but_the_newest_stays_while_it_can(make_lab: MakeLab) -> None:
    lab = await make_lab(capture_memory_bytes=8 * 4096)
    (rank,) = await Rank.launch(lab)
    versions = [await rank.save({"a": bytes(4096)}) for _ in range(2)]
    rank.leave()
    assert [lab.version(version).has(Tier.MEMORY) for version in versions] == [False, True]
    lab.app.launches.reclaim(1 << 40)  # more than there can ever be: giving up copies would not help
    assert lab.version(versions[1]).has(Tier.MEMORY)
    lab.app.launches.reclaim(8 * 4096)
    assert not lab.version(versions[1]).has(Tier.MEMORY)
    assert lab.app.memory.granted_bytes == 0
    assert state_of(lab, versions) == [VersionState.COMMITTED] * 2


def state_of(lab: Lab, versions: list[VersionId]) -> list[VersionState]:
    return [lab.version(version).state for version in versions]


async def test_the_next_save_inherits_the_flag_of_an_aborted_one(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    assert not lab.app.launches.persist_lost(rank.client)
    flagged = rank.next()
    rank.create(flagged, persist=True)
    lab.app.saves.abort(lab.version(flagged), "x")
    plain = rank.next()
    rank.create(plain)
    assert lab.app.launches.persist_lost(rank.client)
    rank.create(rank.next(), persist=True)
    assert not lab.app.launches.persist_lost(rank.client)


async def test_tokens_live_for_their_time_and_their_connection(lab: Lab) -> None:
    clock = ManualClock()
    clients = Clients(clock, lab.app.metrics, own_uid=5, allowed_uids=frozenset({7}))
    client = clients.connect(7, 7, 1)
    assert not client.privileged
    assert clients.connect(5, 5, 1).privileged
    assert clients.connect(0, 0, 1).privileged
    with pytest.raises(ConfigurationError, match="user 8 may not use") as caught:
        clients.connect(8, 8, 1)
    assert "allowed_uids" in caught.value.hint
    first = clients.issue_token(client)
    clock.advance(TOKEN_LIFETIME_S - 1)
    second = clients.issue_token(client)
    assert clients.authenticate(first) is client
    clock.advance(2)
    assert clients.authenticate(first) is None
    assert clients.authenticate(second) is client
    assert clients.authenticate("") is None
    clients.disconnect(client)
    assert clients.authenticate(second) is None
