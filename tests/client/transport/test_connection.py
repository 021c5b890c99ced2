"""The side socket when the daemon does not answer."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cairn.transport import connection as module
from cairn.transport.connection import Connection, ConnectionLostError
from cairn_api.errors import CairnError, UnavailableError
from tests.daemon_process import DaemonProcess


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path / "node") as running:
        yield running


@pytest.fixture
def paused(daemon: DaemonProcess) -> Iterator[Connection]:
    """A connection to a daemon that has been stopped in its tracks."""
    connection = Connection.open(str(daemon.runtime_dir), "run-7", 0, "test")
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        yield connection
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
        connection.close()


def test_closing_wakes_whoever_waits_for_an_answer(paused: Connection) -> None:
    raised: list[CairnError] = []
    asked = threading.Event()

    def ask() -> None:
        asked.set()
        try:
            paused.request({"op": "end_hold", "hold": "none"})
        except CairnError as error:
            raised.append(error)

    waiting = threading.Thread(target=ask)
    waiting.start()
    assert asked.wait(10)
    while not paused._side_lock.locked():
        pass
    paused.close()
    waiting.join(module.SIDE_TIMEOUT_S / 2)
    assert not waiting.is_alive()
    assert isinstance(raised[0], ConnectionLostError)


def test_its_number_is_not_free_while_a_thread_waits_on_it(paused: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def late(*_: object) -> None:
        asked.set()
        assert go_on.wait(10)
        raise ConnectionResetError("the daemon closed the connection")

    def ask() -> None:
        with pytest.raises(ConnectionLostError):
            paused.request({"op": "end_hold", "hold": "none"})

    monkeypatch.setattr(module, "_receive", late)
    waiting, closing = threading.Thread(target=ask), threading.Thread(target=paused.close)
    waiting.start()
    assert asked.wait(10)
    closing.start()
    closing.join(0.2)  # it must not end before the other thread; if it did, it would within this time
    assert paused._side.fileno() >= 0, "another socket of this process could now be taken for this one"
    go_on.set()
    waiting.join(10)
    closing.join(10)
    assert paused._side.fileno() < 0


def test_a_daemon_that_is_there_and_silent_is_not_called_absent(
    paused: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SIDE_TIMEOUT_S", 0.2)
    paused._side.settimeout(0.2)
    with pytest.raises(UnavailableError, match=r"is there, but did not answer within 0\.2 s") as caught:
        paused.request({"op": "end_hold", "hold": "none"})
    assert not isinstance(caught.value, ConnectionLostError)


def test_a_daemon_that_is_busy_for_a_while_is_waited_for(daemon: DaemonProcess, paused: Connection) -> None:
    """Longer than the pauses between two attempts to connect: those must not bound how long one attempt may take."""
    with pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(paused.channel).result(timeout=1.5)
    health: Any = health_pb2_grpc.HealthStub(paused.channel)  # its stubs name no method
    call = health.Check.future(health_pb2.HealthCheckRequest(), timeout=60)
    with pytest.raises(grpc.FutureTimeoutError):
        call.result(timeout=1.5)
    os.kill(daemon.pid, signal.SIGCONT)
    assert call.result().status == health_pb2.HealthCheckResponse.SERVING
