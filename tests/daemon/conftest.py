"""Daemons for the tests of their parts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.lab import Lab

MakeLab = Callable[..., Awaitable[Lab]]


@pytest.fixture
async def make_lab(tmp_path: Path) -> AsyncIterator[MakeLab]:
    """Starts daemons with settings of the test's choice; stops them afterwards."""
    labs: list[Lab] = []

    async def make(*, run: bool = True, **options: Any) -> Lab:
        lab = Lab(options.pop("folder", tmp_path), **options)
        labs.append(lab)
        return await lab.start(run=run)

    yield make
    for lab in labs:
        await lab.close()


@pytest.fixture
async def lab(make_lab: MakeLab) -> Lab:
    """A daemon with default settings and a ``file://`` bucket."""
    return await make_lab()
