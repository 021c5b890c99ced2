"""The side socket under abuse: whatever arrives, the daemon answers or closes, keeps no descriptor and goes on."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import struct
import uuid
from pathlib import Path

import pytest

from cairn_api.v1 import admin_pb2, save_pb2
from cairn_api.wire import PROTOCOL_VERSION, SIDE_PACKET_BYTES, SIDE_SOCKET_NAME
from tests.daemon.lab import JOB, Lab, eventually, held_fds, memfd
from tests.daemon.rpc.conftest import MakePeer
from tests.daemon.rpc.peer import TIMEOUT_S
from tests.daemon_process import DaemonProcess

MALFORMED = [
    b"x", b"{", b"[]", b"null", b"5", b'"hello"', b"{}", b'{"op":5}', b'{"op":null}', b'{"op":[]}', b"\xff\xfe", b"\0",
    b"[" * 60_000, b'{"op":' + b"9" * 5000 + b"}", b'{"op":"hello"}', b'{"op":"unknown"}',
]  # fmt: skip


@pytest.mark.parametrize("packet", MALFORMED, ids=lambda packet: repr(packet[:20]))
async def test_a_malformed_greeting_is_answered_and_ends_the_connection(
    lab: Lab, make_peer: MakePeer, packet: bytes
) -> None:
    peer = await make_peer(hello=False)
    await peer.send(packet)
    reply, _ = await peer.receive()
    assert reply is not None
    assert reply["error"]["class"] == "ConfigurationError"
    assert await peer.receive() == (None, [])
    await eventually(lambda: not lab.app.clients.all())


@pytest.mark.parametrize(
    "greeting",
    [
        {"protocol": PROTOCOL_VERSION, "job": "../x"}, {"protocol": PROTOCOL_VERSION, "job": 5.5e300},
        {"protocol": PROTOCOL_VERSION, "rank": "zero"}, {"protocol": PROTOCOL_VERSION, "rank": []},
        {"protocol": PROTOCOL_VERSION, "rank": 1e999}, {"job": "run-7"},
    ],
    ids=str,
)  # fmt: skip
async def test_a_greeting_with_nonsense_in_it(make_peer: MakePeer, greeting: dict[str, object]) -> None:
    peer = await make_peer(hello=False)
    reply = await peer.ask({"op": "hello", **greeting})
    assert reply["error"]["class"] == "ConfigurationError"


REQUESTS = [
    *MALFORMED,
    b'{"op":"hello","protocol":1}',
    b'{"op":"offer"}',
    b'{"op":"offer","segment":"x","size":"many","grant":"x"}',
    b'{"op":"offer","segment":"x","size":1e999,"grant":"x"}',
    b'{"op":"offer","segment":"x","size":NaN,"grant":"x"}',
    b'{"op":"offer","segment":"\\ud800","size":4096,"grant":"\\ud800"}',
    b'{"op":"open"}',
    b'{"op":"open","lease":"x","path":"x"}',
    b'{"op":"open","lease":{},"path":[]}',
]


@pytest.mark.parametrize("packet", REQUESTS, ids=lambda packet: repr(packet[:40]))
async def test_a_malformed_request_is_answered_and_the_connection_goes_on(make_peer: MakePeer, packet: bytes) -> None:
    peer = await make_peer()
    await peer.call(peer.admin.Status, admin_pb2.StatusRequest())
    fd = memfd()
    before = held_fds()
    for fds in ([], [fd]):
        await peer.send(packet, fds)
        reply, _ = await peer.receive()
        assert reply is not None
        assert reply["error"]["class"] == "ConfigurationError"
    await peer.call(peer.admin.Status, admin_pb2.StatusRequest())
    assert held_fds() == before
    os.close(fd)


async def test_an_oversize_packet_ends_the_connection_with_a_reason(make_peer: MakePeer) -> None:
    peer = await make_peer()
    await peer.send(json.dumps({"op": "open", "lease": "x" * SIDE_PACKET_BYTES, "path": ""}).encode())
    reply, _ = await peer.receive()
    assert reply is not None
    assert str(SIDE_PACKET_BYTES) in reply["error"]["message"]
    assert await peer.receive() == (None, [])
    assert "token" in await (await make_peer(hello=False)).hello()


async def test_floods_of_descriptors_leave_none_behind(make_peer: MakePeer) -> None:
    fd = memfd()
    before = held_fds()
    for count in (2, 4, 5, 100, 250):
        peer = await make_peer(hello=False)
        for _ in range(3):  # before the greeting, with it, and after it
            try:
                await peer.send(b'{"op":"hello","protocol":1}', [fd] * count)
                await peer.receive()
            except (BrokenPipeError, ConnectionResetError):
                break
        await peer.close()
    for _ in range(5):  # a packet of no bytes that carries descriptors
        peer = await make_peer()
        await peer.send(b"", [fd] * 4)
        assert await peer.receive() == (None, [])
        await peer.close()
    await eventually(lambda: held_fds() == before)
    os.close(fd)


@pytest.mark.parametrize("count", [0, 2, 4])
async def test_an_offer_carries_one_descriptor(make_peer: MakePeer, count: int) -> None:
    peer = await make_peer(job=JOB)
    grant = (await peer.call(peer.saving.Grant, save_pb2.GrantRequest(job=JOB, size_bytes=4096))).grant
    fds = [memfd() for _ in range(count)]
    before = held_fds()
    request = {"op": "offer", "segment": uuid.uuid4().hex, "size": 4096, "grant": grant}
    reply = await peer.ask(request, fds)
    assert f"this one {count}" in reply["error"]["message"]
    assert held_fds() == before
    assert await peer.ask(request, [memfd()]) == {}
    for fd in fds:
        os.close(fd)


async def test_a_refused_buffer_stays_the_clients(lab: Lab, make_peer: MakePeer) -> None:
    peer = await make_peer(job=JOB)
    grant = (await peer.call(peer.saving.Grant, save_pb2.GrantRequest(job=JOB, size_bytes=4096))).grant
    other = await make_peer(job=JOB)
    fd = memfd(size_bytes=8192)
    before = held_fds()
    request = {"op": "offer", "segment": uuid.uuid4().hex, "size": 4096, "grant": grant}
    assert "not granted" in (await other.ask(request, [fd]))["error"]["message"]
    assert "8192" in (await peer.ask(request, [fd]))["error"]["message"]
    assert held_fds() == before
    assert lab.app.memory.granted_bytes == 4096
    await peer.close()
    await eventually(lambda: lab.app.memory.granted_bytes == 0)
    os.close(fd)


async def test_half_open_connections_are_closed(lab: Lab, make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cairnd.rpc.side_socket._HELLO_S", 0.2)
    peers = [await make_peer(hello=False) for _ in range(20)]
    for peer in peers:
        assert await peer.receive() == (None, [])
    await eventually(lambda: lab.app.side_socket._connections == set())
    await eventually(lambda: lab.app.clients.all() == [])


async def test_one_who_does_not_read_holds_up_nobody(make_peer: MakePeer) -> None:
    deaf = await make_peer(hello=False)
    deaf.side.setblocking(False)
    deaf.side.send(b'{"op":"hello","protocol":1}')
    sent = 0
    while sent < 100_000:
        try:
            deaf.side.send(b'{"op":"open","lease":"x","path":"x"}')
            sent += 1
        except BlockingIOError:
            break
    assert sent < 100_000, "the daemon must not buffer without end"
    assert "token" in await (await make_peer(hello=False)).hello()


async def test_a_process_that_dies_takes_its_token_and_its_grants(lab: Lab, make_peer: MakePeer) -> None:
    peer = await make_peer(job=JOB)
    await peer.call(peer.saving.Grant, save_pb2.GrantRequest(job=JOB, size_bytes=4096))
    assert lab.app.memory.granted_bytes == 4096
    peer.side.shutdown(socket.SHUT_RDWR)
    await eventually(lambda: lab.app.memory.granted_bytes == 0)
    assert lab.app.clients.all() == []


async def test_another_user_namespace_is_not_admitted(
    lab: Lab, make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cairnd.rpc.side_socket.OVERFLOW_UID", 4343)  # the real one is nobody's to become here
    lab.app.clients._allowed_uids = frozenset({4343})
    peer = await make_peer(uid=4343, hello=False)
    error = (await peer.hello())["error"]
    assert "namespace" in error["message"]
    assert "sidecar" in error["hint"]


def test_running_out_of_descriptors_does_not_end_the_daemon(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        used = len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (used + 8, used + 8))
        path = str(daemon.runtime_dir / SIDE_SOCKET_NAME)
        peers = []
        for _ in range(40):
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            peer.settimeout(20)
            peer.connect(path)
            peer.send(b'{"op":"hello","protocol":1}')
            peers.append(peer)
        assert b"token" in peers[0].recv(SIDE_PACKET_BYTES)
        for peer in peers[:-1]:
            peer.close()
        assert b"token" in peers[-1].recv(SIDE_PACKET_BYTES)  # it was served as soon as there was room
        peers[-1].close()
        assert "accept connections" in daemon.log
        assert "LimitNOFILE" in daemon.log
        assert "are accepted again" in daemon.log
        assert daemon.stop() == 0


async def test_many_at_once(lab: Lab, make_peer: MakePeer) -> None:
    peers = await asyncio.gather(*[make_peer() for _ in range(50)])
    assert len({peer.token for peer in peers}) == 50
    assert len(lab.app.clients.all()) == 50


LINGER_S = 2 * int(TIMEOUT_S)
"""Longer than anybody here waits for an answer."""


def slow_to_close() -> int:
    """A descriptor whose last close takes :data:`LINGER_S`: a TCP connection with unsent data, and nobody reads it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    _DEAF.append(receiver)
    sender.setblocking(False)
    try:
        while True:
            sender.send(bytes(1 << 20))
    except BlockingIOError:
        pass  # full
    sender.setblocking(True)
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_S))
    return sender.detach()


_DEAF: list[socket.socket] = []


def close_all_deaf() -> None:
    """Reset those connections, which lets their closes return."""
    while _DEAF:
        _DEAF.pop().close()


@pytest.mark.parametrize("moment", ["stranger", "stranger leaves", "greeting", "request", "too many", "unread"])
async def test_a_descriptor_that_is_slow_to_close_holds_up_only_its_sender(make_peer: MakePeer, moment: str) -> None:
    try:
        stranger = moment.startswith("stranger")
        peer = await make_peer(uid=4343 if stranger else None, hello=moment != "greeting" and not stranger)
        witness = await make_peer()
        fds = [slow_to_close()]
        packet = b'{"op":"hello","protocol":1}' if stranger or moment == "greeting" else b'{"op":"offer"}'
        if moment == "too many":
            fds += [os.dup(1) for _ in range(200)]
        # Without a step of the event loop in between: the daemon, which runs in it too, is to have the last reference.
        socket.send_fds(peer.side, [packet], fds)
        for fd in fds:
            os.close(fd)
        answer = None
        if moment in ("unread", "stranger leaves"):
            peer.side.close()
            await asyncio.sleep(0.2)
        else:
            answer = asyncio.create_task(peer.receive())
        await witness.call(witness.admin.Status, admin_pb2.StatusRequest())
        assert "token" in await (await make_peer(hello=False)).hello()
        if answer is not None:
            assert not answer.done(), "the control: closing does take its time"
            close_all_deaf()
            reply, _ = await answer
            assert reply is not None
            assert ("token" in reply) is (moment == "greeting")
    finally:
        close_all_deaf()


async def test_strangers_are_told_why_and_their_descriptors_are_not_taken(make_peer: MakePeer) -> None:
    peer = await make_peer(uid=4343, hello=False)
    fd = memfd()
    before = held_fds()
    await peer.send(b'{"op":"hello","protocol":1}', [fd] * 4)
    reply, _ = await peer.receive()
    assert reply is not None
    assert "4343" in reply["error"]["message"]
    assert held_fds() == before
    assert await peer.receive() == (None, [])
    os.close(fd)


@pytest.mark.parametrize("uid", [None, 4343])
async def test_those_who_do_not_greet_are_limited_and_hold_up_no_one_else(
    lab: Lab, make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch, uid: int | None
) -> None:
    monkeypatch.setattr("cairnd.rpc.side_socket._MAX_UNGREETED", 3)
    greeted = await make_peer()
    silent = [await make_peer(uid=uid, hello=False) for _ in range(3)]
    late = await make_peer(uid=uid, hello=False)
    if uid is None:
        assert "too many connections" in (await late.hello())["error"]["message"]
    assert await late.receive() == (None, [])
    await greeted.call(greeted.admin.Status, admin_pb2.StatusRequest())
    if uid is not None:  # strangers do not take the place of users
        assert "token" in await (await make_peer(hello=False)).hello()
    for peer in silent:
        await peer.close()
    await eventually(lambda: not lab.app.side_socket._ungreeted and not lab.app.side_socket._strangers)
    assert "token" in await (await make_peer(hello=False)).hello()
