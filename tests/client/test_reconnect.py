"""The daemon dies with SIGKILL at every moment of a save, and the training goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cairn
from cairn.transport.messages import Claimed
from cairn.transport.save_calls import SaveCalls
from tests.client.conftest import Connect
from tests.daemon_process import DaemonProcess

STATE = {"weight": torch.arange(500_000, dtype=torch.float32)}


def check(client: cairn.Client, tag: str) -> None:
    client.wait(tag, "tier1", 60)
    assert torch.equal(client.load(tag, "model.pt")["weight"], STATE["weight"])


@pytest.mark.parametrize("moment", ["before create", "before save", "before commit", "after commit"])
def test_nothing_captured_is_lost(daemon: DaemonProcess, connect: Connect, moment: str) -> None:
    client = connect()
    with client.create("settled") as checkpoint:
        checkpoint.save("model.pt", STATE)
    client.wait("settled", "tier1", 60)
    if moment == "before create":
        daemon.restart()
    checkpoint = client.create("step1")
    if moment == "before save":
        daemon.restart()
    checkpoint.save("model.pt", STATE)
    checkpoint.save("second.pt", {"x": 2})
    if moment == "before commit":
        daemon.restart()
    version = checkpoint.commit()
    if moment == "after commit":
        daemon.restart()
    check(client, "step1")
    check(client, "settled")
    assert client.load("step1", "second.pt") == {"x": 2}
    assert client.latest() == version
    assert client.statistics()["reconnects"] == 1
    for number in range(3):
        with client.create(f"later{number}") as checkpoint:
            checkpoint.save("model.pt", STATE)
        check(client, f"later{number}")


def test_the_daemon_dies_between_the_claim_of_the_epoch_and_the_first_version(
    daemon: DaemonProcess, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, claim_epoch = connect(), SaveCalls.claim_epoch

    def restarting(self: SaveCalls, epoch: int, nonce: str, world_size: int, **others: Any) -> Claimed:
        claimed = claim_epoch(self, epoch, nonce, world_size, **others)
        if not client.statistics()["reconnects"]:
            daemon.restart()
            while not client.statistics()["reconnects"]:
                time.sleep(0.01)
        return claimed

    monkeypatch.setattr(SaveCalls, "claim_epoch", restarting)
    with client.create("step1") as checkpoint:
        checkpoint.save("model.pt", STATE)
    check(client, "step1")


def held_buffers() -> int:
    """How many capture buffers this process has: a segment and its mapping hold a descriptor each."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += str(entry.readlink()).startswith("/memfd:cairn-capture")
        except FileNotFoundError:  # the descriptor with which the folder was read
            continue
    return count // 2


def test_a_version_that_reached_tier1_gives_its_buffers_back_when_the_daemon_dies(
    daemon: DaemonProcess, connect: Connect
) -> None:
    client = connect()
    for number in range(4):
        checkpoint = client.create(f"step{number}")
        checkpoint.save("model.pt", STATE)
        version = checkpoint.commit()
        assert version is not None
        client.wait(version, "tier1", 60)
        assert [item.opening.version for item in client._session.ledger.all()] == [version], "no keep-alive said so yet"
        daemon.restart()
        check(client, f"step{number}")  # connects again
        assert client._session.pool.owned_by(version) == []
        assert client._session.ledger.all() == []
    assert held_buffers() <= client.settings.buffers


def test_without_memory_for_a_copy_the_bytes_go_to_the_new_daemon_as_a_stream(
    daemon: DaemonProcess, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect()
    checkpoint = client.create("step1")
    checkpoint.save("model.pt", STATE)
    monkeypatch.setattr("cairn.transport.shared_memory.free_memory_bytes", lambda: 0)
    daemon.restart()
    version = checkpoint.commit()
    assert version is not None
    check(client, "step1")
    assert len(client._session.pool.owned_by(version)) == 1, "kept for the next daemon until tier 1 has it"
    client._session.ledger.drop(version)  # as the next keep-alive does
    assert client._session.pool.owned_by(version) == []


def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next(connect: Connect) -> None:
    client = connect()
    connection = client._session._link.peek()
    assert connection is not None
    interrupted = {"op": "call", "name": "nonsense", "request": "", "number": 0}
    connection._side.send(json.dumps(interrupted).encode())  # Control-C came before the answer was read
    with client.create("step1") as checkpoint:
        checkpoint.save("model.pt", STATE)
    check(client, "step1")


def test_calls_wait_for_a_daemon_that_is_away(daemon: DaemonProcess, connect: Connect) -> None:
    client = connect()
    daemon.kill9()
    starting = threading.Timer(1.0, daemon.start)
    starting.start()
    with client.create("step1") as checkpoint:
        checkpoint.save("model.pt", STATE)
    starting.join()
    check(client, "step1")


@pytest.mark.timeout(45)
def test_a_daemon_that_stays_away_is_reported_within_the_patience(daemon: DaemonProcess, connect: Connect) -> None:
    client = connect(reconnect_timeout_s=1.0)  # with the usual minute this test would end by its own deadline
    daemon.kill9()
    with pytest.raises(cairn.UnavailableError, match=r"no daemon answers.*start cairnd"):
        client.create("step1")


def test_a_streamed_partition_is_lost_with_its_daemon_and_commit_says_so(
    daemon: DaemonProcess, connect: Connect
) -> None:
    client = connect(transport="stream")
    checkpoint = client.create("step1")
    checkpoint.save("model.pt", STATE)
    daemon.restart()
    with pytest.raises(cairn.SaveFailedError, match="went as a stream and was lost"):
        checkpoint.commit()
    assert client.latest() is None
    with client.create("step2") as checkpoint:
        checkpoint.save("model.pt", STATE)
    check(client, "step2")


def test_without_a_daemon_connecting_fails_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(cairn.UnavailableError, match=r"no daemon answers in .*start cairnd"):
        cairn.connect(job="run-7", runtime_dir=str(tmp_path), connect_timeout_s=0.3)


def test_connecting_waits_for_a_daemon_that_is_just_starting(tmp_path: Path) -> None:
    started: list[DaemonProcess] = []
    thread = threading.Timer(0.5, lambda: started.append(DaemonProcess(tmp_path)))
    thread.start()
    try:
        cairn.connect(job="run-7", runtime_dir=str(tmp_path / "run"), connect_timeout_s=60).close()
    finally:
        thread.join()
        for daemon in started:
            daemon.kill9()


def test_a_forked_child_may_not_use_the_client(connect: Connect) -> None:
    client = connect()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            client.versions()
        except cairn.ConfigurationError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    assert b"belongs to the parent process" in os.read(reader, 1000)
    os.close(reader)
    assert client.versions() == []


_TRAINER = """
import os, signal, sys, torch, cairn
client = cairn.connect(job="run-7", runtime_dir=sys.argv[1])
checkpoint = client.create("step1")
checkpoint.save("model.pt", {"weight": torch.arange(500_000, dtype=torch.float32)})
if sys.argv[2] == "committed":
    checkpoint.commit()
if sys.argv[2] == "left":
    checkpoint.commit()
    sys.exit()
if os.fork() == 0:  # a data loader that outlives its parent must not keep the dead rank alive
    import time
    time.sleep(600)  # the test ends it
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["saved", "committed", "left"])
def test_a_rank_that_dies(daemon: DaemonProcess, connect: Connect, when: str) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", _TRAINER, str(daemon.runtime_dir), when], start_new_session=True, stderr=subprocess.PIPE
    )
    try:
        status = trainer.wait(60)
        assert status == (0 if when == "left" else -signal.SIGKILL), trainer.stderr and trainer.stderr.read()
        client = connect()
        if when == "saved":
            checkpoint = client.create("next")  # its answer comes after the daemon has seen the end of the rank
            checkpoint.abort()
            assert client.latest() is None
        else:
            check(client, "step1")
    finally:
        if when != "left":
            os.killpg(trainer.pid, signal.SIGKILL)
        assert trainer.stderr is not None
        trainer.stderr.close()


def wait_until(happened: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_daemon_that_stays_away_is_told_of_once_and_so_is_its_return(
    daemon: DaemonProcess, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    client = connect(reconnect_timeout_s=3)

    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    daemon.kill9()
    wait_until(warnings)
    with pytest.raises(cairn.UnavailableError):
        client.wait("never", "tier1", 0)  # long enough for a second warning
    (away,) = warnings()
    assert "reconnect_timeout_s (3 s)" in away
    assert "start cairnd" in away
    daemon.start()
    wait_until(lambda: len(warnings()) > 1)
    assert "connected again" in warnings()[1]
    with client.create("step1") as checkpoint:
        checkpoint.save("model.pt", STATE)
    check(client, "step1")
    assert len(warnings()) == 2
