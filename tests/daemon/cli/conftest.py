from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from tests.daemon.cli.running import Cairn, runner
from tests.daemon.cli.seeding import seed_bucket, seed_tier1, three_versions

settings.register_profile("unhurried", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("unhurried")


@pytest.fixture
def cairn(capsys: pytest.CaptureFixture[str]) -> Cairn:
    """The command, in this process."""
    return runner(capsys)


@pytest.fixture
def tier1(tmp_path: Path) -> Path:
    """A tier 1 folder with three versions; the oldest is pinned."""
    versions = three_versions()
    return seed_tier1(tmp_path / "tier1", versions, pins=versions[:1])


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """A bucket's folder with three versions; the oldest is pinned."""
    versions = three_versions()
    seed_bucket(tmp_path / "bucket", versions, pins=versions[:1])
    return tmp_path / "bucket"


@pytest.fixture(params=["tier1", "bucket"])
def store(request: pytest.FixtureRequest) -> str:
    """Each kind of store, as ``--store`` names it."""
    path: Path = request.getfixturevalue(request.param)
    return str(path) if request.param == "tier1" else f"file://{path}"
