"""Peers of a daemon, for tests over the real sockets."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.conftest import MakeLab
from tests.daemon.lab import Lab
from tests.daemon.rpc.peer import Peer

MakePeer = Callable[..., Awaitable[Peer]]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may pass through (pytest's are private)."""
    folder = Path(tempfile.mkdtemp(prefix="cairn-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
async def lab(open_folder: Path, make_lab: MakeLab) -> Lab:  # in this order: the folder goes last
    return await make_lab(folder=open_folder, allowed_uids=(1001, 1002))


@pytest.fixture
async def make_peer(lab: Lab) -> AsyncIterator[MakePeer]:
    """Connects peers; with *job* they have joined it."""
    peers: list[Peer] = []

    async def make(*, uid: int | None = None, hello: bool = True, job: str = "", **options: Any) -> Peer:
        if uid is not None and os.geteuid() != 0:
            pytest.skip("needs root to become another user")
        peer = Peer(Path(lab.settings.runtime_dir), uid=uid)
        peers.append(peer)
        if hello:
            assert "token" in await peer.hello()
        if job:
            await peer.join(job, **options)
        return peer

    yield make
    for peer in peers:
        await peer.close()
