"""Attacks with connections, tokens, order, streams and sizes of messages."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import grpc

from cairn_api.framing import framed
from cairn_api.v1 import admin_pb2, restore_pb2, save_pb2, types_pb2
from cairn_api.wire import GRPC_SOCKET_NAME, MAX_MESSAGE_BYTES, SIDE_SOCKET_NAME, TOKEN_METADATA
from tests.hostile.attacker import CUT_S, PAGE, Attack, Attacker
from tests.hostile.peer import TIMEOUT_S, GoneError, Peer

_STATUS = "/cairn_api.v1.Admin/Status"
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
_HALF_HEADERS = b"\0\1\0\1\0\0\0\0\1"


def uses_a_token_that_is_not_its_own(a: Attacker) -> None:
    """Forged, empty, of a connection that ended: none of them is let in."""
    ended = a.connect()
    token = ended.token
    ended.side.close()
    _wait_for_end(a, token)
    for wrong in ("", "x", "0" * 43, a.peer.token[:-1], a.peer.token + "A", token, a.victim.token_of_the_past):
        with_token = a.connect(hello=False)
        with_token.token = wrong
        for path in (_STATUS, "/cairn_api.v1.Save/Join", "/cairn_api.v1.Save/Grant"):
            assert a.judged(partial(with_token.unary, path, b"")) is None, f"{wrong!r} was let in"
        assert a.judged(partial(with_token.upload, "/cairn_api.v1.Save/Put", [b"x" * 100] * 3)) is None
        with_token.close()


def _wait_for_end(a: Attacker, token: str) -> None:
    late = a.connect(hello=False)
    late.token = token
    end_s = time.monotonic() + TIMEOUT_S
    while a.judged(lambda: late.unary(_STATUS, b"")) is not None:
        assert time.monotonic() < end_s, "a token outlived its connection"
        time.sleep(0.01)


def is_not_allowed_at_all(a: Attacker) -> None:
    """A user who may not connect gets a reason and nothing else."""
    stranger = Peer(a.runtime_dir, uid=4242)
    try:
        with suppress(GoneError):
            assert "token" not in stranger.hello()
        assert a.judged(lambda: stranger.unary(_STATUS, b"")) is None
    finally:
        stranger.close()


def touches_what_is_anothers(a: Attacker) -> None:
    """The victim's job, version, lease and buffers, by every call that names one."""
    job, version = a.victim.job, a.victim.version
    a.refused("Join", save_pb2.JoinRequest(protocol=1, job=job, world_size=1))
    a.join()
    for name, request in (
        ("Create", save_pb2.CreateRequest(job=job, id=version, world_size=1, nonce=a.nonce)),
        ("ClaimEpoch", save_pb2.ClaimEpochRequest(job=job, epoch=9999, nonce="n", world_size=1, claim=True)),
        ("Abort", save_pb2.AbortRequest(job=job, id=version)),
        ("Commit", save_pb2.CommitRequest(job=job, id=version)),
        ("Prepare", save_pb2.PrepareRequest(job=job, id=version)),
        ("Reserve", save_pb2.ReserveRequest(job=job, buffers=1)),
        ("Seal", save_pb2.SealRequest(job=job, id=version, name="a", segment="0" * 32, size_bytes=1)),
        ("Wait", save_pb2.WaitRequest(job=job, id=version, durability=types_pb2.DURABILITY_TIER2)),
    ):
        a.refused(name, request)
    a.refused("Resolve", restore_pb2.ResolveRequest(job=job), service="Restore")
    a.refused("EndFetch", restore_pb2.EndFetchRequest(lease=a.victim.lease), service="Restore")
    for path, packed in (
        ("Restore/Fetch", restore_pb2.FetchRequest(job=job, id=version).SerializeToString()),
        ("Restore/Read", restore_pb2.ReadRequest(lease=a.victim.lease, path="model.pt").SerializeToString()),
        ("Admin/Verify", admin_pb2.VerifyRequest(job=job, version=version.tag).SerializeToString()),
        ("Admin/Drain", admin_pb2.DrainRequest(timeout_s=1).SerializeToString()),
    ):
        assert a.judged(partial(a.peer.download, f"/cairn_api.v1.{path}", packed)) is None, path
    for name, admin in (
        ("Describe", admin_pb2.DescribeRequest(job=job, version=version.tag)),
        ("Pin", admin_pb2.PinRequest(job=job, version=version.tag)),
        ("Unpin", admin_pb2.PinRequest(job=job, version=version.tag)),
        ("Prune", admin_pb2.PruneRequest(job=job, version=version.tag)),
        ("Persist", admin_pb2.PersistRequest(job=job)),
    ):
        a.refused(name, admin, service="Admin")
    assert not a.asked({"op": "open", "lease": a.victim.lease, "path": "model.pt"})


def leaves_at_a_step(a: Attacker) -> None:
    """GoneError without a word after any step of a save."""
    segment = ""
    steps: tuple[Callable[[], object], ...] = (
        a.join, a.create, a.grant, a.share, lambda: a.seal(segment), a.prepare, a.commit,
    )  # fmt: skip
    for step in steps[: a.chance.randrange(len(steps) + 1)]:
        done = step()
        if isinstance(done, str) and len(done) == 32:
            segment = done
    if a.chance.random() < 0.5:
        a.peer.side.shutdown(socket.SHUT_RDWR)


def does_things_in_the_wrong_order(a: Attacker) -> None:
    """Commit before prepare, twice, after the end; buffers that were given back or hold something else."""
    a.join()
    assert a.commit() is None
    assert a.prepare() is None
    assert a.seal("0" * 32) is None
    a.create()
    assert a.commit() is None
    segment, other = a.share(), a.share()
    assert a.seal(segment) is not None
    assert a.seal(segment) is not None  # a repeated call
    assert a.seal(segment, name="b") is None  # its buffer holds "a"
    a.refused("Release", save_pb2.ReleaseRequest(segment=segment))
    assert a.prepare(("a", "b")) is None
    a.call("Release", save_pb2.ReleaseRequest(segment=other))
    assert a.seal(other, name="c") is None
    assert a.prepare() is not None
    assert a.seal(segment) is None  # prepared
    assert a.commit(shared_names=[save_pb2.SharedName(name="../x", rank=0)]) is None
    if a.chance.random() < 0.5:
        a.call("Abort", save_pb2.AbortRequest(job=a.job, id=a.id))
        assert a.commit() is None
        assert a.prepare() is None
    else:
        a.commit()
        a.commit()
    a.seal(segment)
    a.create()


def floods_with_connections(a: Attacker) -> None:
    """Connections that say nothing, half of something, or everything at once."""
    side, face = str(a.runtime_dir / SIDE_SOCKET_NAME), str(a.runtime_dir / GRPC_SOCKET_NAME)
    with ExitStack() as open_sockets:
        for _ in range(a.chance.choice((10, 30, 60))):
            kind, path = a.chance.choice(((socket.SOCK_SEQPACKET, side), (socket.SOCK_STREAM, face)))
            opened = open_sockets.enter_context(socket.socket(socket.AF_UNIX, kind))
            opened.settimeout(1.0)
            with suppress(OSError):
                opened.connect(path)
                opened.send(
                    a.chance.choice(
                        (b"x", _PREFACE[:10], _PREFACE, _PREFACE + _SETTINGS, _PREFACE + _SETTINGS + _HALF_HEADERS,
                         b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(200), b'{"op":"hello"', b"{}", b"\0" * 9000)
                    )
                )  # fmt: skip
        if a.chance.random() < 0.3:
            a.peer.status()


def is_slow(a: Attacker) -> None:
    """A save whose bytes come one by one, or not at all."""
    a.join()
    a.create()
    header = save_pb2.PutHeader(job=a.job, id=a.id, name="slow", size_bytes=a.chance.choice((10, 2**20, 2**30)))
    ended = threading.Event()

    def trickle() -> Iterator[bytes]:
        yield save_pb2.PutRequest(header=header).SerializeToString()
        while not ended.wait(0.02):
            yield framed(2, b"x")

    a.judged(lambda: a.peer.upload("/cairn_api.v1.Save/Put", trickle(), CUT_S), cut=True)
    ended.set()


def breaks_streams_off(a: Attacker) -> None:
    """Uploads, downloads and waits that their caller forgets."""
    a.join()
    a.create()
    channel: Any = a.peer.channel
    wait = save_pb2.WaitRequest(job=a.job, id=a.id, durability=types_pb2.DURABILITY_TIER1, timeout_s=1e308)
    waits = [
        channel.unary_unary("/cairn_api.v1.Save/Wait").future(wait.SerializeToString(), metadata=a.peer.metadata)
        for _ in range(50)
    ]
    watching = [
        channel.unary_stream("/cairn_api.v1.Admin/Watch")(
            admin_pb2.WatchRequest(follow=True).SerializeToString(), metadata=a.peer.metadata
        )
        for _ in range(10)
    ]
    size_bytes = 8 * 2**20
    header = save_pb2.PutRequest(header=save_pb2.PutHeader(job=a.job, id=a.id, name="a", size_bytes=size_bytes))
    messages = [header.SerializeToString(), *[framed(2, bytes(2**20))] * a.chance.randrange(9)]
    a.judged(lambda: a.peer.upload("/cairn_api.v1.Save/Put", messages))
    for call in (*waits, *watching):
        if a.chance.random() < 0.5:
            call.cancel()


def sends_huge_messages(a: Attacker) -> None:
    """100 MB in one message, and bombs of gzip that unfold to more than a message may have."""
    token = a.peer.token
    if a.chance.random() < 0.5:
        assert a.call("Create", bytes(100_000_000)) is None
        return
    channel: Any = grpc.insecure_channel(
        f"unix:{a.runtime_dir / GRPC_SOCKET_NAME}",
        options=[("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)],
        compression=grpc.Compression.Gzip,
    )
    try:
        bomb = framed(5, bytes(a.chance.choice((MAX_MESSAGE_BYTES + 1, 64_000_000, 300_000_000))))
        metadata = ((TOKEN_METADATA, token),)
        for path in ("/cairn_api.v1.Save/Create", "/cairn_api.v1.Restore/Resolve"):
            call = partial(channel.unary_unary(path), bomb, metadata=metadata, timeout=TIMEOUT_S)
            assert a.judged(call) is None
    finally:
        channel.close()


def is_refused_with_large_messages(a: Attacker) -> None:
    """What a refused call said is forgotten at once, whoever made it: nothing of it stays with the daemon."""
    message = save_pb2.CreateRequest(job="x", save_dir="x" * 25_000_000).SerializeToString()
    for peer in (a.connect(hello=False), a.peer):
        for _ in range(3):
            assert a.judged(partial(peer.unary, "/cairn_api.v1.Save/Create", message)) is None


def floods_with_metadata(a: Attacker) -> None:
    """Headers by the thousand, and texts that no header should have."""
    channel: Any = a.peer.channel
    call = channel.unary_unary(_STATUS)
    for extra in (
        [("x", "y" * 200_000)],
        [(f"x-{number}", "y") for number in range(3000)],
        [("x-bin", b"\0" * 60_000)],
    ):
        a.judged(partial(call, b"", metadata=(*a.peer.metadata, *extra), timeout=TIMEOUT_S))


def calls_what_is_not_there(a: Attacker) -> None:
    """Methods that do not exist, and health and reflection asked for nonsense, with and without a token."""
    nobody = a.connect(hello=False)
    for peer in (a.peer, nobody):
        for path in ("/x", "/", "/cairn_api.v1.Save/__init__", "/cairn_api.v1.Save/", "/../etc", f"/{'x' * 10_000}/y"):
            assert a.judged(partial(peer.unary, path, b"\xff" * 100)) is None
        for path in ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"):
            with suppress(grpc.RpcError):
                peer.unary(path, b"\xff\xff", CUT_S)
        call: Any = peer.channel
        reflection = call.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with suppress(grpc.RpcError):
            list(reflection(iter([b"\xff\xff", b"", b"\x1a\x05ab/cd"]), timeout=TIMEOUT_S))


def asks_again_after_the_end(a: Attacker) -> None:
    """Calls with what belonged to a connection that is closed."""
    a.join()
    grant, segment = a.grant(), a.share()
    a.peer.side.close()
    later = a.connect()
    a.peer, before = later, a.peer
    assert not a.asked({"op": "offer", "segment": a.name(), "size": PAGE, "grant": grant})
    a.asked({"op": "end_hold", "hold": "x"})
    a.call("Release", save_pb2.ReleaseRequest(segment=segment, grant=grant))
    assert a.create() is None
    with suppress(grpc.RpcError):
        before.unary(_STATUS, b"", CUT_S)


CALL_ATTACKS: tuple[Attack, ...] = (
    uses_a_token_that_is_not_its_own, is_not_allowed_at_all, touches_what_is_anothers, leaves_at_a_step,
    leaves_at_a_step, leaves_at_a_step, does_things_in_the_wrong_order, floods_with_connections, is_slow,
    breaks_streams_off, sends_huge_messages, is_refused_with_large_messages, floods_with_metadata,
    calls_what_is_not_there, asks_again_after_the_end,
)  # fmt: skip
