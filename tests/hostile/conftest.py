"""Prints the seed of a run with hostile inputs, and lends them a folder that is fast to sync."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.seeds import SEED

_MEMORY = "/dev/shm"  # noqa: S108 - not for files: a folder of its own is made there


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"hostile inputs: set CAIRN_CRASH_SEED={SEED} to choose the same again")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder, in memory where there is a file system for that: who writes thousands of files would wait for disks."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None) as folder:
        yield Path(folder)
