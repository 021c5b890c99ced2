"""A real daemon for the tests of the client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cairn
from tests.daemon_process import DaemonProcess

Connect = Callable[..., cairn.Client]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon with an empty store and a bucket in a folder."""
    with DaemonProcess(tmp_path / "node") as process:
        yield process


@pytest.fixture
def connect(daemon: DaemonProcess) -> Iterator[Connect]:
    """``cairn.connect`` to that daemon as job run-7; what is still open at the end is closed."""
    clients: list[cairn.Client] = []

    def connected(**settings: object) -> cairn.Client:
        client = cairn.connect(**{"job": "run-7", "runtime_dir": str(daemon.runtime_dir), **settings})  # type: ignore[arg-type]
        clients.append(client)
        return client

    yield connected
    for client in clients:
        client.close()
