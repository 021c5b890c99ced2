"""The side socket when the daemon does not answer."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cairn.transport import connection as module
from cairn.transport.connection import Connection, ConnectionLostError
from cairn_api.errors import CairnError, UnavailableError
from tests.daemon_process import DaemonProcess


@pytest.fixture
def paused(tmp_path: Path) -> Iterator[Connection]:
    """A connection to a daemon that has been stopped in its tracks."""
    with DaemonProcess(tmp_path / "node") as daemon:
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


def test_a_daemon_that_is_there_and_silent_is_not_called_absent(
    paused: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SIDE_TIMEOUT_S", 0.2)
    paused._side.settimeout(0.2)
    with pytest.raises(UnavailableError, match=r"is there, but did not answer within 0\.2 s") as caught:
        paused.request({"op": "end_hold", "hold": "none"})
    assert not isinstance(caught.value, ConnectionLostError)
