"""Restores on the side socket: the answers of gRPC when all is near and verified, and otherwise nothing at all."""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Any

import pytest

from cairn_api.names import VersionId
from cairn_api.v1 import restore_pb2
from cairnd.model import Tier, VersionState
from cairnd.rpc import brief, convert
from tests.daemon.lab import JOB, Lab, Rank
from tests.daemon.rpc.conftest import MakePeer
from tests.daemon.rpc.peer import Peer

PARTS = {"model.pt": b"weights" * 1000, "optim.pt": b"moments" * 3000}


async def ask(peer: Peer, name: str, request: Any) -> bytes | None:
    """The packed reply, None if the call has to be made by gRPC."""
    packed = b64encode(request.SerializeToString()).decode()
    reply = (await peer.ask({"op": "call", "name": name, "request": packed}))["reply"]
    return None if reply is None else b64decode(reply)


async def stored(lab: Lab) -> VersionId:
    (rank,) = await Rank.launch(lab)
    version = await rank.save(PARTS)
    await lab.reaches(version, Tier.TIER1)
    return version


def fetch_of(version: VersionId, *paths: str) -> restore_pb2.FetchRequest:
    return restore_pb2.FetchRequest(job=JOB, id=convert.id_to(version), paths=paths)


def leases_of(lab: Lab) -> int:
    return len(lab.app.leases._leases)


@pytest.mark.parametrize("tier", [Tier.MEMORY, Tier.TIER1])
async def test_a_fetch_is_brief_once_every_copy_is_verified(lab: Lab, make_peer: MakePeer, tier: Tier) -> None:
    version = await stored(lab)
    if tier is Tier.TIER1:
        await lab.restart()
    peer = await make_peer()
    request = fetch_of(version)
    assert await ask(peer, "Fetch", request) is None
    assert leases_of(lab) == 0
    (*_, first) = await peer.stream(peer.restoring.Fetch, fetch_of(version, "model.pt"))
    assert first.digested_bytes == len(PARTS["model.pt"])
    assert await ask(peer, "Fetch", request) is None, "of the other partition nobody knows yet"
    (*_, second) = await peer.stream(peer.restoring.Fetch, request)
    assert second.digested_bytes == len(PARTS["optim.pt"])
    packed = await ask(peer, "Fetch", request)
    assert packed is not None
    answer = restore_pb2.FetchProgress.FromString(packed)
    assert (answer.digested_bytes, answer.digest_s) == (0, 0)
    assert answer.from_tier == convert.tier_to(tier)
    assert sorted(map(str, answer.ready)) == sorted(map(str, second.ready))
    assert leases_of(lab) == 3
    for lease in (first.lease, second.lease, answer.lease):
        assert await ask(peer, "EndFetch", restore_pb2.EndFetchRequest(lease=lease)) is not None
    assert leases_of(lab) == 0
    assert not any(segment.readers for segment in lab.app.memory.segments.values())


async def test_with_every_load_verified_no_fetch_is_brief(lab: Lab, make_peer: MakePeer) -> None:
    lab.app.verified.always = True
    version = await stored(lab)
    peer = await make_peer()
    for _ in range(2):
        (*_, last) = await peer.stream(peer.restoring.Fetch, fetch_of(version))
        assert last.digested_bytes == sum(map(len, PARTS.values()))
        assert await ask(peer, "Fetch", fetch_of(version)) is None


async def test_an_answer_too_long_for_a_packet_leaves_no_lease(
    lab: Lab, make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = await stored(lab)
    peer = await make_peer()
    (*_, last) = await peer.stream(peer.restoring.Fetch, fetch_of(version))
    await ask(peer, "EndFetch", restore_pb2.EndFetchRequest(lease=last.lease))
    monkeypatch.setattr(brief, "BRIEF_BYTES", 20)
    assert await ask(peer, "Fetch", fetch_of(version)) is None
    assert leases_of(lab) == 0


async def test_an_unknown_partition_is_the_same_error_as_by_grpc(lab: Lab, make_peer: MakePeer) -> None:
    version = await stored(lab)
    peer = await make_peer()
    packed = b64encode(fetch_of(version, "other.pt").SerializeToString()).decode()
    reply = await peer.ask({"op": "call", "name": "Fetch", "request": packed})
    assert reply["error"]["class"] == "VersionError"
    assert "no partition 'other.pt'" in reply["error"]["message"]


async def test_what_exists_is_told_unless_a_bucket_has_to_be_asked(lab: Lab, make_peer: MakePeer) -> None:
    await stored(lab)
    peer = await make_peer()
    assert await ask(peer, "Resolve", restore_pb2.ResolveRequest(job=JOB)) is None
    local = restore_pb2.ResolveRequest(job=JOB, local_only=True)
    packed = await ask(peer, "Resolve", local)
    assert packed is not None
    answer = restore_pb2.ResolveReply.FromString(packed)
    assert answer == await peer.call(peer.restoring.Resolve, local)
    assert len(answer.versions) == 1


async def test_what_is_being_written_is_waited_for_by_grpc(lab: Lab, make_peer: MakePeer) -> None:
    version = lab.version(await stored(lab))
    peer = await make_peer()
    (*_, last) = await peer.stream(peer.restoring.Fetch, fetch_of(version.id))
    assert last.lease
    version.state = VersionState.SEALED
    assert await ask(peer, "Resolve", restore_pb2.ResolveRequest(job=JOB, local_only=True)) is None
    assert await ask(peer, "Fetch", fetch_of(version.id)) is None
    version.state = VersionState.COMMITTED
    assert await ask(peer, "Fetch", fetch_of(version.id)) is not None
