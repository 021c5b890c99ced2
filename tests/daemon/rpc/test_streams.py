"""Partitions as streams of bytes, over the real socket: what is kept, what is refused, what stays responsive."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Iterable, Iterator
from typing import Any

import grpc
import pytest

from cairn.transport.calls import translate
from cairn.transport.stream import BulkStub
from cairn_api.errors import CairnError, InternalError
from cairn_api.framing import framed, unframed
from cairn_api.names import VersionId
from cairn_api.v1 import restore_pb2, save_pb2
from cairn_api.wire import GRPC_SOCKET_NAME, STREAM_CHUNK_BYTES
from cairnd.model import VersionState
from cairnd.rpc import convert, spool
from tests.daemon.lab import JOB, Lab, Rank, eventually, held_fds, state
from tests.daemon.rpc.conftest import MakePeer
from tests.daemon.rpc.peer import TIMEOUT_S, Peer
from tests.daemon.rpc.test_access import refused
from tests.daemon.rpc.test_wire import header, launched, piece

DATA = os.urandom(2 * spool._BLOCK_BYTES + 12_345)


def put_raw(lab: Lab, peer: Peer, messages: Iterable[bytes]) -> asyncio.Task[Any]:
    """``Put`` with messages as bytes, which may be anything, begun at once.

    On a channel as the client has it: that of ``grpc.aio`` forgets why a stream was refused while it still sends.
    """

    def put() -> Any:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"unix:{lab.settings.runtime_dir}/{GRPC_SOCKET_NAME}", options=options) as channel:
            call = BulkStub(channel).Put(iter(messages), metadata=peer.metadata, timeout=TIMEOUT_S)
            return call.result()

    return asyncio.ensure_future(asyncio.to_thread(put))


async def refused_put(call: Awaitable[Any], reason: str, error_class: str = "ConfigurationError") -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    error = translate(caught.value)
    assert type(error).__name__ == error_class
    assert reason in error.message


def read_raw(peer: Peer, lease: str, path: str) -> Any:
    channel: Any = peer.channel
    method = channel.unary_stream(
        "/cairn_api.v1.Restore/Read",
        request_serializer=restore_pb2.ReadRequest.SerializeToString,
        response_deserializer=None,
    )
    return method(restore_pb2.ReadRequest(lease=lease, path=path), metadata=peer.metadata, timeout=TIMEOUT_S)


class Held:
    """A stream of *data* that waits for ``go`` after its first byte, and before its last for ``end`` (set already)."""

    def __init__(self, version: VersionId, name: str, data: bytes) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()
        self.end = threading.Event()
        self.end.set()
        self._header = header(version, name, len(data)).SerializeToString()
        self._data = data

    def messages(self) -> Iterator[bytes]:
        yield self._header
        yield framed(save_pb2.PutRequest.DATA_FIELD_NUMBER, self._data[:1])
        self.begun.set()
        self.go.wait(TIMEOUT_S)
        for start in range(1, len(self._data) - 1, STREAM_CHUNK_BYTES):
            part = self._data[start : min(start + STREAM_CHUNK_BYTES, len(self._data) - 1)]
            yield framed(save_pb2.PutRequest.DATA_FIELD_NUMBER, part)
        self.end.wait(TIMEOUT_S)
        yield framed(save_pb2.PutRequest.DATA_FIELD_NUMBER, self._data[-1:])


def temporaries(lab: Lab) -> list[str]:
    return [path.name for path in (lab.tier1 / "jobs").rglob("0000*")]


async def test_messages_framed_by_hand_or_by_protobuf_are_the_same_partition(lab: Lab, make_peer: MakePeer) -> None:
    peer, version = await launched(make_peer)
    pieces = [piece(DATA[at : at + 1_000_003]) for at in range(0, len(DATA), 1_000_003)]
    by_protobuf = await peer.put(header(version, "a", len(DATA)), *pieces)
    held = Held(version, "b", DATA)
    held.go.set()
    by_hand = await put_raw(lab, peer, held.messages())
    assert by_hand.crc64nvme == by_protobuf.crc64nvme
    wire = convert.id_to(version)
    await peer.call(peer.saving.Prepare, save_pb2.PrepareRequest(job=JOB, id=wire, names=["a", "b"]))
    await peer.call(peer.saving.Commit, save_pb2.CommitRequest(job=JOB, id=wire))
    progress = await peer.stream(peer.restoring.Fetch, restore_pb2.FetchRequest(job=JOB, id=wire))
    lease = progress[-1].lease
    for path in ("a", "b"):
        messages = [message async for message in read_raw(peer, lease, path)]
        chunks = [unframed(restore_pb2.ReadReply.DATA_FIELD_NUMBER, message) for message in messages]
        assert b"".join(chunk for chunk in chunks if chunk is not None) == DATA
        by_protobuf = await peer.stream(peer.restoring.Read, restore_pb2.ReadRequest(lease=lease, path=path))
        assert b"".join(reply.data for reply in by_protobuf) == DATA
        assert max(len(reply.data) for reply in by_protobuf) == STREAM_CHUNK_BYTES


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"\xff\xff", "cannot be read"),
        (b"\x12\x05ab", "cannot be read"),
        (b"", "does not match its header"),
        (framed(save_pb2.PutRequest.DATA_FIELD_NUMBER, b""), "does not match its header"),
        (piece(b"x" * 11).SerializeToString(), "does not match its header"),
    ],
)
async def test_messages_that_are_not_of_a_stream_are_refused(
    lab: Lab, make_peer: MakePeer, bad: bytes, why: str
) -> None:
    peer, version = await launched(make_peer)
    before = held_fds(lab.tier1)

    def messages() -> Iterator[bytes]:
        yield header(version, "a", 10).SerializeToString()
        yield bad

    def only_bad() -> Iterator[bytes]:
        yield bad

    await refused_put(put_raw(lab, peer, messages()), why)
    await refused_put(put_raw(lab, peer, only_bad()), "")
    await eventually(lambda: held_fds(lab.tier1) == before)
    assert not temporaries(lab)
    assert state(lab, version) is VersionState.OPEN


async def test_a_stream_that_falls_silent_or_crawls_is_given_up(
    lab: Lab, make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, version = await launched(make_peer)
    monkeypatch.setattr(spool, "SILENCE_TIMEOUT_S", 0.3)
    given_up = threading.Event()
    held = Held(version, "a", DATA)
    await refused_put(put_raw(lab, peer, held.messages()), "fell silent", "UnavailableError")
    held.go.set()
    await eventually(lambda: not temporaries(lab))

    def crawling() -> Iterator[bytes]:
        yield header(version, "a", len(DATA)).SerializeToString()
        for byte in DATA:
            yield framed(save_pb2.PutRequest.DATA_FIELD_NUMBER, bytes([byte]))
            if given_up.wait(0.01):  # never silent for long
                return

    await refused_put(put_raw(lab, peer, crawling()), "too slow", "UnavailableError")
    given_up.set()
    await eventually(lambda: not temporaries(lab))


async def test_a_client_has_a_bounded_number_of_streams(lab: Lab, make_peer: MakePeer) -> None:
    peer, version = await launched(make_peer)
    running = [Held(version, f"part{number}", DATA) for number in range(spool._STREAMS_PER_CLIENT)]
    calls = [put_raw(lab, peer, held.messages()) for held in running]
    await eventually(lambda: all(held.begun.is_set() for held in running))
    await eventually(lambda: len(temporaries(lab)) == len(running))
    one_more = Held(version, "more", DATA)
    one_more.go.set()
    await refused_put(put_raw(lab, peer, one_more.messages()), "streams running", "OverloadedError")
    for held in running:
        held.go.set()
    replies = await asyncio.gather(*calls)
    assert len({reply.crc64nvme for reply in replies}) == 1
    assert (await put_raw(lab, peer, one_more.messages())).crc64nvme == replies[0].crc64nvme


async def test_of_two_streams_of_one_partition_the_last_to_end_stays(lab: Lab, make_peer: MakePeer) -> None:
    peer, version = await launched(make_peer)
    other = bytes(len(DATA))
    slow, fast = Held(version, "a", DATA), Held(version, "a", other)
    call = put_raw(lab, peer, slow.messages())
    await eventually(slow.begun.is_set)
    fast.go.set()
    replaced = await put_raw(lab, peer, fast.messages())
    slow.go.set()
    kept = await call
    assert kept.crc64nvme != replaced.crc64nvme
    await eventually(lambda: len(temporaries(lab)) == 1)
    (received,) = lab.app.saves.open_saves()[0].received.values()
    assert received.digest is not None
    assert received.digest.crc64nvme == kept.crc64nvme


async def test_a_stream_ends_soon_after_its_version(lab: Lab, make_peer: MakePeer) -> None:
    peer, version = await launched(make_peer)
    held = Held(version, "a", DATA)
    call = put_raw(lab, peer, held.messages())
    await eventually(held.begun.is_set)
    await eventually(lambda: len(temporaries(lab)) == 1)
    # Other calls are answered while a stream is open.
    abort = save_pb2.AbortRequest(job=JOB, id=convert.id_to(version), reason="no longer wanted")
    await peer.call(peer.saving.Abort, abort)
    held.end.clear()
    held.go.set()
    await refused_put(call, "no longer wanted", "SaveFailedError")  # although its last byte never comes
    held.end.set()
    await eventually(lambda: not temporaries(lab))


async def test_a_stream_that_the_disk_fails_leaves_nothing(
    lab: Lab, make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, version = await launched(make_peer)
    from cairnd.tiers.atomic import BulkWriter  # noqa: PLC0415

    write = BulkWriter.write

    def fail(self: BulkWriter, block: memoryview, offset: int) -> None:
        if offset:
            raise InternalError("the disk is broken")
        write(self, block, offset)

    monkeypatch.setattr(BulkWriter, "write", fail)
    held = Held(version, "a", DATA)
    held.go.set()
    await refused_put(put_raw(lab, peer, held.messages()), "the disk is broken", "InternalError")
    await eventually(lambda: not temporaries(lab))
    monkeypatch.setattr(BulkWriter, "write", write)
    assert (await put_raw(lab, peer, held.messages())).crc64nvme


async def test_reading_ends_with_the_lease(lab: Lab, make_peer: MakePeer) -> None:
    (rank,) = await Rank.launch(lab)
    version = await rank.save({"a": bytes(16 * STREAM_CHUNK_BYTES)})
    peer = await make_peer()
    wire = convert.id_to(version)
    progress = await peer.stream(peer.restoring.Fetch, restore_pb2.FetchRequest(job=JOB, id=wire))
    lease = progress[-1].lease
    call = read_raw(peer, lease, "a")
    await call.read()
    await peer.call(peer.restoring.EndFetch, restore_pb2.EndFetchRequest(lease=lease))

    async def rest() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    await refused(rest(), "was given up", "VersionError")


async def test_nothing_is_left_open_when_a_reader_goes(lab: Lab, make_peer: MakePeer) -> None:
    (rank,) = await Rank.launch(lab)
    version = await rank.save({"a": bytes(16 * STREAM_CHUNK_BYTES)})
    peer = await make_peer()
    wire = convert.id_to(version)
    progress = await peer.stream(peer.restoring.Fetch, restore_pb2.FetchRequest(job=JOB, id=wire))
    before = held_fds(lab.tier1)
    call = read_raw(peer, progress[-1].lease, "a")
    await call.read()
    assert held_fds(lab.tier1) > before
    call.cancel()
    await eventually(lambda: held_fds(lab.tier1) <= before)


async def test_slots_are_given_back_whatever_happens() -> None:
    slots = spool.StreamSlots()
    for _ in range(2 * spool._STREAMS):
        with pytest.raises(CairnError):
            async with slots.taken(1):
                raise InternalError("x")
    async with slots.taken(1):
        pass
    assert not slots._of_client
