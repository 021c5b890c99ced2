"""Who may call what: tokens, users, owners."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cairn_api.errors import ERRORS
from cairn_api.names import VersionId
from cairn_api.v1 import admin_pb2, restore_pb2, save_pb2, types_pb2
from cairn_api.wire import PROTOCOL_VERSION, TOKEN_METADATA
from cairnd import __version__
from cairnd.model import Tier
from cairnd.rpc import convert
from cairnd.rpc.server import SERVICES
from cairnd.rpc.status import CODES
from cairnd.session.clients import TOKEN_LIFETIME_S
from tests.daemon.lab import JOB, Lab, Rank, eventually
from tests.daemon.rpc.conftest import MakePeer
from tests.daemon.rpc.peer import TIMEOUT_S, Peer, error_of

METHODS: list[MethodDescriptor] = [
    method
    for file in (save_pb2, restore_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


async def call_raw(peer: Peer, method: MethodDescriptor, metadata: tuple[tuple[str, str], ...]) -> None:
    """Call any method with an empty request; raises what the call ends with."""
    channel: Any = peer.channel
    path = f"/{method.containing_service.full_name}/{method.name}"
    if method.client_streaming and method.server_streaming:
        calls: Any = channel.stream_stream(path)(iter([b""]), metadata=metadata, timeout=TIMEOUT_S)
    elif method.client_streaming:
        await channel.stream_unary(path)(iter([b""]), metadata=metadata, timeout=TIMEOUT_S)
        return
    elif method.server_streaming:
        calls = channel.unary_stream(path)(b"", metadata=metadata, timeout=TIMEOUT_S)
    else:
        await channel.unary_unary(path)(b"", metadata=metadata, timeout=TIMEOUT_S)
        return
    async for _ in calls:
        pass


def test_every_method_is_looked_at() -> None:
    assert {method.containing_service.full_name for method in METHODS} == set(SERVICES)
    assert len(METHODS) >= 26


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name.removeprefix("cairn_api.v1."))
async def test_nothing_answers_without_a_token(lab: Lab, make_peer: MakePeer, method: MethodDescriptor) -> None:
    peer = await make_peer()
    stale = peer.token
    await lab.idle(TOKEN_LIFETIME_S + 1)
    for metadata in ((), ((TOKEN_METADATA, ""),), ((TOKEN_METADATA, "made-up"),), ((TOKEN_METADATA, stale),)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_raw(peer, method, metadata)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "side socket" in (caught.value.details() or "")


async def test_a_token_dies_with_its_connection(lab: Lab, make_peer: MakePeer) -> None:
    peer = await make_peer()
    await peer.call(peer.admin.Status, admin_pb2.StatusRequest())
    peer.side.close()
    await eventually(lambda: not lab.app.clients.all())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await peer.call(peer.admin.Status, admin_pb2.StatusRequest())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_keep_alive_gives_the_next_token(lab: Lab, make_peer: MakePeer) -> None:
    peer = await make_peer(job=JOB)
    for _ in range(4):
        lab.clock.advance(TOKEN_LIFETIME_S * 0.6)
        reply = await peer.call(peer.saving.KeepAlive, save_pb2.KeepAliveRequest(job=JOB))
        assert reply.token != peer.token
        peer.token = reply.token


async def test_health_and_reflection_answer_everyone(lab: Lab, make_peer: MakePeer) -> None:
    peer = await make_peer(hello=False)
    health: Any = health_pb2_grpc.HealthStub(peer.channel)
    for service in ("", *SERVICES):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    channel: Any = peer.channel
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request: Any = reflection_pb2.ServerReflectionRequest
    asked = request(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([asked]), timeout=TIMEOUT_S):
        assert set(SERVICES) <= {service.name for service in answer.list_services_response.service}
    await lab.app.server.set_serving(False)
    reply = await health.Check(health_pb2.HealthCheckRequest(service=""), timeout=TIMEOUT_S)
    assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_user_who_is_not_allowed_is_told_what_to_do(lab: Lab, make_peer: MakePeer) -> None:
    for _ in range(20):  # the reason must not get lost in the closing of the connection
        peer = await make_peer(uid=4242, hello=False)
        error = (await peer.hello())["error"]
        assert error["class"] == "ConfigurationError"
        assert "4242" in error["message"]
        assert "allowed_uids" in error["hint"]
        assert (await peer.receive())[0] is None
    assert lab.app.clients.all() == []


async def test_an_allowed_user_is_who_the_kernel_says(lab: Lab, make_peer: MakePeer) -> None:
    peer = await make_peer(uid=1001, hello=False)
    assert (await peer.hello(uid=0))["uid"] == 1001
    (client,) = lab.app.clients.all()
    assert (client.uid, client.privileged) == (1001, False)


@pytest.mark.parametrize("protocol", [0, 2, 99, "1", None])
async def test_another_protocol_is_refused_naming_both(make_peer: MakePeer, protocol: object) -> None:
    peer = await make_peer(hello=False)
    error = (await peer.hello(protocol=protocol))["error"]
    assert error["class"] == "ConfigurationError"
    assert str(PROTOCOL_VERSION) in error["message"]
    assert repr(protocol) in error["message"]
    assert __version__ in error["message"]
    assert "cairn-checkpoint" in error["hint"]
    assert (await peer.receive())[0] is None


async def test_join_checks_the_protocol_too(make_peer: MakePeer) -> None:
    peer = await make_peer()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await peer.call(peer.saving.Join, save_pb2.JoinRequest(protocol=7, job=JOB, world_size=1))
    assert "protocol 1" in error_of(caught.value).message
    assert "7" in error_of(caught.value).message


async def refused(call: Any, match: str, kind: str = "ConfigurationError") -> None:
    """The call ends with that error."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    info = error_of(caught.value)
    assert info.error_class == kind
    assert caught.value.code() is CODES[ERRORS[kind]]
    assert match in info.message, info.message


async def test_another_users_job_is_out_of_reach(lab: Lab, make_peer: MakePeer) -> None:
    (rank,) = await Rank.launch(lab, uid=1001)
    version = await rank.save()
    wire = convert.id_to(version)
    thief = await make_peer(uid=1002, hello=False)
    await thief.hello(job=JOB)  # naming the job does not make it theirs
    await refused(thief.join(JOB), "belongs to user 1001")
    saving, admin, restoring = thief.saving, thief.admin, thief.restoring
    for call in (
        thief.call(
            saving.ClaimEpoch, save_pb2.ClaimEpochRequest(job=JOB, epoch=9, nonce="n", world_size=1, claim=True)
        ),
        thief.call(saving.Reserve, save_pb2.ReserveRequest(job=JOB, buffers=1)),
        thief.call(saving.Grant, save_pb2.GrantRequest(job=JOB, size_bytes=4096)),
        thief.call(saving.Create, save_pb2.CreateRequest(job=JOB, id=wire, world_size=1, nonce=rank.client.nonce)),
        thief.call(saving.Seal, save_pb2.SealRequest(job=JOB, id=wire, name="a", size_bytes=1)),
        thief.call(saving.Prepare, save_pb2.PrepareRequest(job=JOB, id=wire)),
        thief.call(saving.Commit, save_pb2.CommitRequest(job=JOB, id=wire)),
        thief.call(saving.Abort, save_pb2.AbortRequest(job=JOB, id=wire)),
        thief.call(saving.Wait, save_pb2.WaitRequest(job=JOB, id=wire, durability=types_pb2.DURABILITY_TIER1)),
        thief.put(save_pb2.PutRequest(header=save_pb2.PutHeader(job=JOB, id=wire, name="a", size_bytes=1))),
    ):
        await refused(call, "has not joined")
    for call in (
        thief.call(restoring.Resolve, restore_pb2.ResolveRequest(job=JOB)),
        thief.stream(restoring.Fetch, restore_pb2.FetchRequest(job=JOB, id=wire)),
        thief.call(admin.Describe, admin_pb2.DescribeRequest(job=JOB, version=str(version))),
        thief.call(admin.Pin, admin_pb2.PinRequest(job=JOB, version=str(version))),
        thief.call(admin.Unpin, admin_pb2.PinRequest(job=JOB, version=str(version))),
        thief.call(admin.Prune, admin_pb2.PruneRequest(job=JOB)),
        thief.call(admin.Prune, admin_pb2.PruneRequest(job=JOB, version=str(version))),
        thief.call(admin.Persist, admin_pb2.PersistRequest(job=JOB)),
        thief.stream(admin.Verify, admin_pb2.VerifyRequest(job=JOB, version=str(version))),
    ):
        await refused(call, "user 1001")
    await refused(thief.stream(admin.Drain, admin_pb2.DrainRequest(timeout_s=1)), "only root")
    assert not (await thief.call(admin.List, admin_pb2.ListRequest())).versions
    assert await thief.stream(admin.Watch, admin_pb2.WatchRequest()) == []
    owner = await make_peer(uid=1001)
    assert len((await owner.call(owner.admin.List, admin_pb2.ListRequest())).versions) == 1
    assert await owner.stream(owner.admin.Watch, admin_pb2.WatchRequest())
    root = await make_peer()
    assert len((await root.call(root.admin.List, admin_pb2.ListRequest())).versions) == 1


async def test_a_job_without_a_record_is_still_its_owners(lab: Lab, make_peer: MakePeer) -> None:
    (rank,) = await Rank.launch(lab, uid=1001)
    version = await rank.save()
    lab.app.jobs._records.clear()  # as after a damaged record, or on a node that learned of it from the bucket
    thief = await make_peer(uid=1002)
    wire = convert.id_to(version)
    await refused(thief.join(JOB), "user 1001")
    await refused(thief.call(thief.restoring.Resolve, restore_pb2.ResolveRequest(job=JOB)), "user 1001")
    await refused(thief.stream(thief.restoring.Fetch, restore_pb2.FetchRequest(job=JOB, id=wire)), "user 1001")
    assert not (await thief.call(thief.admin.Prune, admin_pb2.PruneRequest(job=JOB))).deletions
    await refused(
        thief.call(thief.admin.Persist, admin_pb2.PersistRequest(job=JOB)), "no committed version", "VersionError"
    )
    assert lab.version(version).has(Tier.TIER1)


async def test_a_lease_and_a_buffer_are_their_clients_own(lab: Lab, make_peer: MakePeer) -> None:
    (rank,) = await Rank.launch(lab)
    version = await rank.save({"a": b"x"})
    one, other = await make_peer(), await make_peer()
    fetched = await one.stream(one.restoring.Fetch, restore_pb2.FetchRequest(job=JOB, id=convert.id_to(version)))
    lease = fetched[-1].lease
    await refused(other.stream(other.restoring.Read, restore_pb2.ReadRequest(lease=lease, path="a")), "does not exist")
    await refused(other.call(other.restoring.EndFetch, restore_pb2.EndFetchRequest(lease=lease)), "does not exist")
    assert (await other.ask({"op": "open", "lease": lease, "path": "a"}))["error"]["class"] == "ConfigurationError"
    assert (await one.ask({"op": "open", "lease": lease, "path": "a"}))["size"] == 1
    (segment,) = lab.app.memory.segments
    await other.call(other.saving.Release, save_pb2.ReleaseRequest(segment=segment))
    assert segment in lab.app.memory.segments


def test_each_error_has_a_code_of_its_own() -> None:
    assert set(CODES) == set(ERRORS.values())
    assert len(set(CODES.values())) == len(CODES)
    assert grpc.StatusCode.UNAVAILABLE not in CODES.values()  # gRPC's own word for a daemon that is gone
    assert VersionId(1, 1, "t") == convert.id_from(convert.id_to(VersionId(1, 1, "t")))
