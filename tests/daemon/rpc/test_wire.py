"""A save and a restore over the real sockets, and everything that a client can get wrong on the way."""

from __future__ import annotations

import asyncio
import os
import uuid
from typing import Any

import grpc
import pytest

from cairn_api.names import VersionId
from cairn_api.v1 import admin_pb2, restore_pb2, save_pb2, types_pb2
from cairn_api.wire import pack_column
from cairnd.digests import BLOCK_BYTES
from cairnd.model import CopyState, Tier, VersionState
from cairnd.rpc import convert
from tests.daemon.lab import JOB, Lab, Rank, eventually, held_fds, memfd, state
from tests.daemon.replication.test_replicator import flip
from tests.daemon.rpc.conftest import MakePeer
from tests.daemon.rpc.peer import Peer
from tests.daemon.rpc.test_access import refused

DATA = b"partition" * 1000


async def launched(make_peer: MakePeer) -> tuple[Peer, VersionId]:
    """A rank that has claimed an epoch, and its first version, created."""
    peer = await make_peer(job=JOB)
    nonce = uuid.uuid4().hex
    await peer.call(
        peer.saving.ClaimEpoch, save_pb2.ClaimEpochRequest(job=JOB, epoch=1, nonce=nonce, world_size=1, claim=True)
    )
    version = VersionId(1, 1, "step1")
    await create(peer, version, nonce)
    return peer, version


async def create(peer: Peer, version: VersionId, nonce: str) -> Any:
    return await peer.call(
        peer.saving.Create,
        save_pb2.CreateRequest(job=JOB, id=convert.id_to(version), world_size=1, nonce=nonce, persist=True),
    )


async def offer(peer: Peer, data: bytes) -> str:
    fd, segment = memfd(data), uuid.uuid4().hex
    size = os.fstat(fd).st_size
    grant = (await peer.call(peer.saving.Grant, save_pb2.GrantRequest(job=JOB, size_bytes=size))).grant
    try:
        assert await peer.ask({"op": "offer", "segment": segment, "size": size, "grant": grant}, [fd]) == {}
    finally:
        os.close(fd)
    return segment


def seal(version: VersionId, name: str, segment: str, size_bytes: int, **records: list[int]) -> save_pb2.SealRequest:
    return save_pb2.SealRequest(
        job=JOB, id=convert.id_to(version), name=name, segment=segment, size_bytes=size_bytes,
        records=table(records),
    )  # fmt: skip


def table(columns: dict[str, list[int]]) -> save_pb2.RecordTable:
    return save_pb2.RecordTable(**{name: pack_column(numbers) for name, numbers in columns.items()})


def header(version: VersionId, name: str, size_bytes: int) -> save_pb2.PutRequest:
    return save_pb2.PutRequest(
        header=save_pb2.PutHeader(job=JOB, id=convert.id_to(version), name=name, size_bytes=size_bytes)
    )


def piece(data: bytes) -> save_pb2.PutRequest:
    return save_pb2.PutRequest(data=data)


async def test_a_save_and_a_restore(make_peer: MakePeer) -> None:
    peer, version = await launched(make_peer)
    wire = convert.id_to(version)
    await peer.call(peer.saving.Seal, seal(version, "shared.pt", await offer(peer, DATA), len(DATA)))
    large = os.urandom(BLOCK_BYTES + 12_345)
    pieces = [piece(large[at : at + 1_000_003]) for at in range(0, len(large), 1_000_003)]
    put = await peer.put(header(version, "streamed/large.pt", len(large)), *pieces)
    again = await peer.put(header(version, "streamed/large.pt", len(large)), *pieces)  # its reply got lost
    assert put.crc64nvme == again.crc64nvme
    names = ["shared.pt", "streamed/large.pt"]
    await peer.call(peer.saving.Prepare, save_pb2.PrepareRequest(job=JOB, id=wire, names=names))
    reply = await peer.call(peer.saving.Commit, save_pb2.CommitRequest(job=JOB, id=wire))
    assert reply.state == types_pb2.VERSION_STATE_SEALED
    for durability in (types_pb2.DURABILITY_CAPTURED, types_pb2.DURABILITY_TIER1, types_pb2.DURABILITY_TIER2):
        wait = save_pb2.WaitRequest(job=JOB, id=wire, durability=durability, timeout_s=60)
        assert (await peer.call(peer.saving.Wait, wait)).reached
    reserve = save_pb2.ReserveRequest(job=JOB, buffers=1)
    reserved = await peer.call(peer.saving.Reserve, reserve)
    assert reserved.available
    assert [convert.id_from(item) for item in reserved.tier2] == [version]
    reader = await make_peer()
    found = await reader.call(reader.restoring.Resolve, restore_pb2.ResolveRequest(job=JOB))
    assert [item.path for item in found.versions[0].partitions] == names
    assert found.claimed_epoch == 1
    progress = await reader.stream(reader.restoring.Fetch, restore_pb2.FetchRequest(job=JOB, id=wire))
    assert progress[-1].done_bytes == progress[-1].total_bytes == len(DATA) + len(large)
    lease = progress[-1].lease
    chunks = await reader.stream(reader.restoring.Read, restore_pb2.ReadRequest(lease=lease, path=names[1]))
    assert b"".join(chunk.data for chunk in chunks) == large
    await reader.send(b'{"op":"open","lease":"%s","path":"shared.pt"}' % lease.encode())
    opened, (fd,) = await reader.receive()
    assert opened is not None
    assert os.pread(fd, opened["size"], 0) == DATA
    os.close(fd)
    await reader.call(reader.restoring.EndFetch, restore_pb2.EndFetchRequest(lease=lease))
    await refused(
        reader.stream(reader.restoring.Read, restore_pb2.ReadRequest(lease=lease, path=names[1])), "not exist"
    )


async def test_wrong_order(make_peer: MakePeer) -> None:
    stranger = await make_peer()
    version = VersionId(1, 1, "step1")
    wire = convert.id_to(version)
    await refused(create(stranger, version, "n"), "has not joined")
    peer = await make_peer(job=JOB)
    await refused(create(peer, version, "n"), "claimed")
    await refused(peer.call(peer.saving.Seal, seal(version, "a", "0" * 32, 1)), "not created", "VersionError")
    await refused(peer.call(peer.saving.Commit, save_pb2.CommitRequest(job=JOB, id=wire)), "no version", "VersionError")
    await peer.call(peer.saving.Abort, save_pb2.AbortRequest(job=JOB, id=wire))  # there is nothing to abort
    await peer.call(peer.saving.Release, save_pb2.ReleaseRequest(segment="unknown"))
    await refused(peer.call(peer.saving.Grant, save_pb2.GrantRequest(job="other", size_bytes=4096)), "has not joined")


@pytest.mark.parametrize(
    "identity",
    [
        types_pb2.VersionId(), types_pb2.VersionId(epoch=1, sequence=0, tag="t"),
        types_pb2.VersionId(epoch=1, sequence=1),
        types_pb2.VersionId(epoch=1, sequence=1, tag="../x"), types_pb2.VersionId(epoch=2**32 - 1, sequence=1, tag="t"),
        types_pb2.VersionId(epoch=1, sequence=2**31, tag="t"),
    ],
    ids=lambda identity: str(identity).replace("\n", " "),
)  # fmt: skip
async def test_names_that_could_not_be_read_back_are_refused(
    make_peer: MakePeer, identity: types_pb2.VersionId
) -> None:
    peer = await make_peer(job=JOB)
    await refused(peer.call(peer.saving.Create, save_pb2.CreateRequest(job=JOB, id=identity, world_size=1)), "")


@pytest.mark.parametrize("name", ["", "../x", "/x", ".cairn/manifest.json", "a//b", "x" * 2000, "by-rank/0/x", "a\n"])
async def test_partition_names_are_checked(lab: Lab, make_peer: MakePeer, name: str) -> None:
    peer, version = await launched(make_peer)
    await refused(peer.call(peer.saving.Seal, seal(version, name, await offer(peer, b"x"), 1)), "not allowed")
    await refused(peer.put(header(version, name, 1), piece(b"x")), "not allowed")
    assert state(lab, version) is VersionState.OPEN


@pytest.mark.parametrize(
    "records",
    [
        {"offsets": [0], "lengths": [1]},
        {"offsets": [0], "lengths": [100], "descriptor_crc_offsets": [50], "directory_crc_offsets": [0]},
        {"offsets": [0], "lengths": [9000], "descriptor_crc_offsets": [8999], "directory_crc_offsets": [0]},
        {"offsets": [0, 50], "lengths": [100, 10], "descriptor_crc_offsets": [0, 0], "directory_crc_offsets": [0, 0]},
        {"offsets": [2**63], "lengths": [2**63], "descriptor_crc_offsets": [0], "directory_crc_offsets": [0]},
        {"offsets": [0], "lengths": [10], "descriptor_crc_offsets": [2**64 - 2], "directory_crc_offsets": [0]},
        {"offsets": [0], "lengths": [10], "descriptor_crc_offsets": [20], "directory_crc_offsets": [22]},
    ],
    ids=str,
)
async def test_hostile_record_tables_are_refused(lab: Lab, make_peer: MakePeer, records: dict[str, list[int]]) -> None:
    peer, version = await launched(make_peer)
    segment = await offer(peer, DATA)
    await refused(peer.call(peer.saving.Seal, seal(version, "a", segment, len(DATA), **records)), "record table")
    assert lab.app.memory.segments[segment].owner is None
    put = header(version, "b", len(DATA))
    put.header.records.CopyFrom(table(records))
    await refused(peer.put(put, piece(DATA)), "record table")
    half = seal(version, "a", segment, len(DATA))
    half.records.offsets = bytes(12)
    await refused(peer.call(peer.saving.Seal, half), "record table")
    await peer.call(peer.saving.Seal, seal(version, "a", segment, len(DATA)))


async def test_streams_that_do_not_keep_their_word(lab: Lab, make_peer: MakePeer) -> None:
    peer, version = await launched(make_peer)
    before = held_fds(lab.tier1)
    for parts, why in (
        ([], "begins with its header"),
        ([piece(b"x")], "begins with its header"),
        ([header(version, "a", 10)], "ended after 0 of 10"),
        ([header(version, "a", 10), piece(b"x" * 9)], "ended after 9 of 10"),
        ([header(version, "a", 10), piece(b"x" * 11)], "does not match"),
        ([header(version, "a", 10), header(version, "a", 10)], "does not match"),
        ([header(version, "a", 0)], "is empty"),
    ):
        await refused(peer.put(*parts), why)
    await refused(peer.put(header(version, "a", 2**62), piece(b"x")), "no room", "OverloadedError")
    await eventually(lambda: held_fds(lab.tier1) == before)
    assert not list((lab.tier1 / "jobs").rglob("0000*"))


async def test_a_stream_that_breaks_off_leaves_nothing(lab: Lab, make_peer: MakePeer) -> None:
    peer, version = await launched(make_peer)
    begun = asyncio.Event()

    async def half() -> Any:
        yield header(version, "a", 1 << 20)
        yield piece(b"x" * 1000)
        begun.set()
        await asyncio.Event().wait()

    call = peer.saving.Put(half(), metadata=peer.metadata)
    await begun.wait()
    await eventually(lambda: list((lab.tier1 / "jobs").rglob("0000*")))
    call.cancel()
    await eventually(lambda: not list((lab.tier1 / "jobs").rglob("0000*")))
    assert state(lab, version) is VersionState.OPEN


async def test_deadlines_end_calls_and_nothing_else(lab: Lab, make_peer: MakePeer) -> None:
    peer, version = await launched(make_peer)
    waiting = len(lab.app.catalog._waiters)  # the daemon's own tasks wait too
    wait = save_pb2.WaitRequest(
        job=JOB, id=convert.id_to(version), durability=types_pb2.DURABILITY_TIER1, timeout_s=1e9
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await peer.saving.Wait(wait, metadata=peer.metadata, timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: len(lab.app.catalog._waiters) == waiting)
    for timeout_s in (0.0, -5.0, float("-inf")):
        wait.timeout_s = timeout_s
        assert not (await peer.call(peer.saving.Wait, wait)).reached
    wait.timeout_s = float("nan")
    await refused(peer.call(peer.saving.Wait, wait), "number of seconds")
    reserve = save_pb2.ReserveRequest(job=JOB, buffers=1, wait_s=float("nan"))
    await refused(peer.call(peer.saving.Reserve, reserve), "number of seconds")
    await refused(peer.stream(peer.admin.Drain, admin_pb2.DrainRequest(timeout_s=float("nan"))), "number of seconds")
    wait.ClearField("durability")
    await refused(peer.call(peer.saving.Wait, wait), "no durability")


async def test_a_wait_fails_with_the_reason_why_it_never_will(lab: Lab, make_peer: MakePeer) -> None:
    peer, version = await launched(make_peer)
    wire = convert.id_to(version)
    await peer.call(peer.saving.Abort, save_pb2.AbortRequest(job=JOB, id=wire, reason="out of space"))
    wait = save_pb2.WaitRequest(job=JOB, id=wire, durability=types_pb2.DURABILITY_TIER1, timeout_s=60)
    await refused(peer.call(peer.saving.Wait, wait), "rank 0: out of space", "SaveFailedError")
    (rank,) = await Rank.launch(lab)
    (await lab.bucket()).abort(JOB, VersionId(2, 1, "step1"), "fenced")
    fenced = await rank.save()
    wait = save_pb2.WaitRequest(job=JOB, id=convert.id_to(fenced), durability=types_pb2.DURABILITY_TIER2, timeout_s=60)
    await refused(peer.call(peer.saving.Wait, wait), "will not be in tier 2", "SaveFailedError")


async def test_the_daemon_tells_what_failed_in_the_background_once(lab: Lab, make_peer: MakePeer) -> None:
    peer = await make_peer(job=JOB)
    (client,) = lab.app.clients.of_job(JOB)
    from cairn_api.errors import SaveFailedError  # noqa: PLC0415

    client.failures.append(SaveFailedError("lost before tier 1", hint="save again", context={"version": "v"}))
    reply = await peer.call(peer.saving.KeepAlive, save_pb2.KeepAliveRequest(job=JOB))
    (failure,) = reply.failures
    assert (failure.error_class, failure.hint, failure.context["version"]) == ("SaveFailedError", "save again", "v")
    assert not (await peer.call(peer.saving.KeepAlive, save_pb2.KeepAliveRequest(job=JOB))).failures


async def test_prune_says_and_does_the_same(lab: Lab, make_peer: MakePeer) -> None:
    (rank,) = await Rank.launch(lab)
    peer = await make_peer()
    first = await rank.save()
    lease = lab.app.leases.take(0, JOB, first)
    for _ in range(3):
        await rank.save()
    await eventually(lambda: len([v for v in lab.app.catalog.versions(JOB) if v.has(Tier.TIER1)]) == 3)
    lab.app.leases.end(lease)
    said = await peer.call(peer.admin.Prune, admin_pb2.PruneRequest(job=JOB, dry_run=True))
    assert [item.id.sequence for item in said.deletions] == [1]
    assert lab.version(first).has(Tier.TIER1)
    done = await peer.call(peer.admin.Prune, admin_pb2.PruneRequest(job=JOB))
    assert list(done.deletions) == list(said.deletions)
    assert lab.app.catalog.get(JOB, first) is None


async def test_a_quick_check_does_not_acquit_what_a_deep_one_convicted(lab: Lab, make_peer: MakePeer) -> None:
    (rank,) = await Rank.launch(lab)
    version = await rank.save()
    peer = await make_peer()
    flip(lab.file(version, "model.pt"))

    async def verify(*, deep: bool) -> list[str]:
        request = admin_pb2.VerifyRequest(job=JOB, version=str(version), deep=deep)
        replies = await peer.stream(peer.admin.Verify, request)
        return [finding.path for reply in replies for finding in reply.findings]

    assert await verify(deep=False) == []
    assert lab.version(version).has(Tier.TIER1)
    assert await verify(deep=True) == ["model.pt"]
    assert await verify(deep=False) == []
    assert lab.version(version).copy(Tier.TIER1).state is CopyState.FAILED
    flip(lab.file(version, "model.pt"))
    assert await verify(deep=True) == []
    assert lab.version(version).has(Tier.TIER1)
