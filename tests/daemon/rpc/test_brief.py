"""Calls on the side socket: the same answers as by gRPC, and what cannot be brief is left to it untouched."""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Any

import pytest

from cairn_api.errors import UnavailableError
from cairn_api.v1 import save_pb2
from cairn_api.wire import BRIEF_BYTES
from tests.daemon.lab import JOB, Lab
from tests.daemon.rpc.conftest import MakePeer
from tests.daemon.rpc.peer import Peer


async def ask(peer: Peer, name: str, request: Any) -> dict[str, Any]:
    packed = b64encode(request.SerializeToString()).decode()
    return await peer.ask({"op": "call", "name": name, "request": packed})


async def test_a_call_is_answered_as_by_grpc(make_peer: MakePeer) -> None:
    peer = await make_peer(job=JOB)
    request = save_pb2.ReserveRequest(job=JOB, wait_s=5, buffers=2)
    answer = save_pb2.ReserveReply.FromString(b64decode((await ask(peer, "Reserve", request))["reply"]))
    assert answer.available
    assert answer == await peer.call(peer.saving.Reserve, request)


async def test_an_error_is_the_same_as_by_grpc(make_peer: MakePeer) -> None:
    peer = await make_peer()
    error = (await ask(peer, "Reserve", save_pb2.ReserveRequest(job=JOB, buffers=2)))["error"]
    assert (error["class"], error["hint"]) == ("ConfigurationError", "call Join first")


async def test_a_failure_that_is_told_once_is_left_to_grpc(lab: Lab, make_peer: MakePeer) -> None:
    peer = await make_peer(job=JOB)
    lab.app.clients.fail(JOB, UnavailableError("x" * 2 * BRIEF_BYTES))
    request = save_pb2.ReserveRequest(job=JOB, buffers=2)
    assert await ask(peer, "Reserve", request) == {"reply": None}
    assert len((await peer.call(peer.saving.Reserve, request)).failures) == 1
    assert (await ask(peer, "Reserve", request))["reply"] is not None


async def test_what_has_to_wait_is_left_to_grpc_and_counts_as_nothing(
    lab: Lab, make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = await make_peer(job=JOB)
    monkeypatch.setattr(lab.app.launches, "_next_buffer", lambda client, buffers: None)  # noqa: ARG005 - all taken
    assert await ask(peer, "Reserve", save_pb2.ReserveRequest(job=JOB, wait_s=5, buffers=2)) == {"reply": None}
    skipped = lab.app.metrics.saves.labels("skipped")._value
    assert skipped.get() == 0
    reply = (await ask(peer, "Reserve", save_pb2.ReserveRequest(job=JOB, wait_s=0, buffers=2)))["reply"]
    assert not save_pb2.ReserveReply.FromString(b64decode(reply)).available
    assert skipped.get() == 1


@pytest.mark.parametrize(
    "request_",
    [
        {}, {"name": "Reserve"}, {"name": "Reserve", "request": "%"}, {"name": "Reserve", "request": "é"},
        {"name": "Prepare", "request": ""}, {"name": "__init__", "request": ""}, {"name": [], "request": ""},
    ],
    ids=str,
)  # fmt: skip
async def test_nonsense_is_refused_and_the_connection_goes_on(make_peer: MakePeer, request_: dict[str, Any]) -> None:
    peer = await make_peer(job=JOB)
    assert (await peer.ask({"op": "call", **request_}))["error"]["class"] == "ConfigurationError"
    assert (await ask(peer, "Reserve", save_pb2.ReserveRequest(job=JOB, buffers=2)))["reply"]


async def test_what_is_no_message_is_an_error_and_the_connection_goes_on(make_peer: MakePeer) -> None:
    peer = await make_peer(job=JOB)
    junk = b64encode(b"\xff" * 9).decode()
    assert "error" in await peer.ask({"op": "call", "name": "Reserve", "request": junk})
    assert (await ask(peer, "Reserve", save_pb2.ReserveRequest(job=JOB, buffers=2)))["reply"]


async def test_a_reply_bears_the_number_of_its_request(make_peer: MakePeer) -> None:
    peer = await make_peer(job=JOB)
    assert (await peer.ask({"op": "call", "name": "?", "request": "", "number": 7}))["number"] == 7
    assert (await peer.ask({"op": "end_hold", "hold": "?", "number": 8}))["number"] == 8
    assert "number" not in await peer.ask({"op": "end_hold", "hold": "?", "number": "9"})
