"""Streams of a client and a real daemon that go wrong half-way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc
import pytest
import torch

import cairn
from cairn.transport import calls, stream
from cairn.transport.messages import PartitionPlan
from cairn_api.wire import STREAM_CHUNK_BYTES
from tests.client.conftest import Connect
from tests.daemon_process import DaemonProcess

CHUNKS = 40
STATE = {"weight": torch.arange(CHUNKS * STREAM_CHUNK_BYTES // 4, dtype=torch.int32)}


def temporaries(daemon: DaemonProcess) -> list[str]:
    return [path.name for path in (daemon.tier1_path / "jobs").rglob("0000*") if path.is_file()]


def check(client: cairn.Client, tag: str) -> None:
    client.wait(tag, "tier1", 30)
    assert torch.equal(client.load(tag, "model.pt")["weight"], STATE["weight"])


def test_a_state_of_many_messages_goes_there_and_back(connect: Connect) -> None:
    client = connect(transport="stream")
    with client.create("step1") as checkpoint:
        checkpoint.save("model.pt", STATE)
    check(client, "step1")
    restored = client.restore("step1")
    assert restored is not None
    with restored:
        kept = restored.load("model.pt")
        with restored.open("model.pt") as file:
            assert torch.equal(torch.load(file, weights_only=True)["weight"], STATE["weight"])
    kept["weight"].add_(1)  # its own memory, also after the restore has ended
    check(client, "step1")


def test_what_goes_wrong_while_gathering_is_raised_and_the_save_can_be_repeated(
    connect: Connect, daemon: DaemonProcess
) -> None:
    client = connect(transport="stream")
    checkpoint = client.create("step1")
    assert checkpoint.version is not None
    plan = PartitionPlan("model.pt", 5 * STREAM_CHUNK_BYTES, cairn.capture.plan.RecordTable.empty(), ())

    def broken() -> Iterator[bytes]:
        yield bytes(3 * STREAM_CHUNK_BYTES)
        raise cairn.ConfigurationError("a tensor's storage shrank")

    with pytest.raises(cairn.ConfigurationError, match="storage shrank"):
        client._session.saving.put(checkpoint.version, plan, broken)
    deadline_s = time.monotonic() + 20
    while temporaries(daemon):  # the daemon removes the file once it hears of it
        assert time.monotonic() < deadline_s, "the call was left open"
        time.sleep(0.01)
    checkpoint.save("model.pt", STATE)
    checkpoint.commit()
    check(client, "step1")


def test_a_refused_stream_ends_while_it_is_being_made(connect: Connect) -> None:
    client = connect(transport="stream")
    plan = PartitionPlan("model.pt", 1 << 40, cairn.capture.plan.RecordTable.empty(), ())

    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(STREAM_CHUNK_BYTES)

    with pytest.raises(cairn.VersionError, match="was not created"):
        client._session.saving.put(cairn.VersionId(1, 99, "never"), plan, endless)


def test_a_stream_that_a_dying_daemon_cut_off_fails_the_save_and_the_next_one_works(
    connect: Connect, daemon: DaemonProcess
) -> None:
    client = connect(transport="stream")
    checkpoint = client.create("step1")
    assert checkpoint.version is not None
    plan = PartitionPlan("model.pt", CHUNKS * STREAM_CHUNK_BYTES, cairn.capture.plan.RecordTable.empty(), ())
    attempts: list[int] = []

    def windows() -> Iterator[bytes]:
        attempts.append(0)
        for number in range(CHUNKS):
            if number == CHUNKS // 2 and len(attempts) == 1:
                daemon.restart()
            yield bytes(STREAM_CHUNK_BYTES)

    client._session.saving.put(checkpoint.version, plan, windows)
    assert len(attempts) == 2, "once for each daemon"
    checkpoint.save("model.pt", STATE)  # replaces what was sent by hand
    checkpoint.commit()
    check(client, "step1")


def test_a_daemon_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "SILENCE_TIMEOUT_S", 0.2)

    class Silent:
        def __init__(self) -> None:
            self.cancelled = threading.Event()

        def cancel(self) -> None:
            self.cancelled.set()

        def __next__(self) -> bytes:
            assert self.cancelled.wait(20)
            raise grpc.RpcError

    with pytest.raises(cairn.UnavailableError, match="sent nothing"):
        stream.receive(calls.listen(Silent()), 5, "a")
