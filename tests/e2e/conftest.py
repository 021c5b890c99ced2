"""A node: a real daemon with a bucket in a folder, and trainings beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess
from tests.e2e.trainer import Trainer, can_protect, unprotect

Node = Callable[..., DaemonProcess]


@pytest.fixture
def protected(tmp_path: Path) -> bool:
    """Whether published files are safe from this user's own programs, so that ``save_dir`` shows links by default."""
    return os.geteuid() != 0 or can_protect(tmp_path)


@pytest.fixture
def node(tmp_path: Path, protected: bool) -> Iterator[Node]:
    """Makes daemons by name, each with folders of its own; they share one bucket unless told otherwise."""
    with ExitStack() as daemons:

        def make(name: str = "node", **settings: object) -> DaemonProcess:
            if os.geteuid() == 0 and protected:
                settings.setdefault("protect_files", "true")
            bucket = tmp_path / "bucket"
            bucket.mkdir(exist_ok=True)
            settings.setdefault("persistent_storage_path", f"file://{bucket}")
            return daemons.enter_context(DaemonProcess(tmp_path / name, **settings))  # type: ignore[arg-type]

        yield make
    unprotect(tmp_path)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    """Trainings in a folder of their own, without Cairn until they are given a block."""
    return Trainer(tmp_path / "training")
