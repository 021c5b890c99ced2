"""Folders that somebody removed while the daemon ran, which had made them durable and believed in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cairnd.tiers.errors import NotFoundError
from cairnd.tiers.local import LocalTier
from tests.daemon.tiers.rigged import RiggedFileSystem, durability_gaps
from tests.daemon.tiers.test_local import save


def put(tier: LocalTier) -> None:
    tier.put_small("jobs/run/v1/manifest", b"x")


def bulk(tier: LocalTier) -> None:
    save(tier, "jobs/run/v1/model.pt", b"x")


def publish(tier: LocalTier) -> None:
    """What was begun elsewhere is published where the folders are gone."""
    writer = tier.begin("jobs/run/v1/model.pt", "staging/one.tmp", 1)
    writer.write(memoryview(b"x"), 0)
    writer.finish()
    tier.make_folders_of(["jobs/run/v1/model.pt"])
    shutil.rmtree(tier.root / "jobs", ignore_errors=True)
    tier.publish(writer, "jobs/run/v1/model.pt")
    tier.sync_folders(["jobs/run/v1/model.pt"])


def move(tier: LocalTier) -> None:
    tier.put_small("aside", b"x")
    tier.move("aside", "jobs/run/v1/model.pt")


def make(tier: LocalTier) -> None:
    tier.make_folders_of(["jobs/run/v1/sub/a"])


@pytest.mark.parametrize("removed", ["jobs", "jobs/run", "jobs/run/v1"])
@pytest.mark.parametrize("act", [put, bulk, publish, move, make])
def test_a_folder_that_was_removed_is_made_again(
    tmp_path: Path, act: Callable[[LocalTier], None], removed: str
) -> None:
    fs = RiggedFileSystem(tmp_path)
    tier = LocalTier(fs, tmp_path)
    tier.put_small("jobs/run/v1/known", b"")
    shutil.rmtree(tmp_path / removed)
    fs.calls.clear()
    act(tier)
    assert (tmp_path / "jobs/run/v1").is_dir()
    assert durability_gaps(fs.calls) == []


def test_what_is_missing_itself_is_told(tmp_path: Path) -> None:
    tier = LocalTier(RiggedFileSystem(tmp_path), tmp_path)
    tier.put_small("known/a", b"")
    with pytest.raises(NotFoundError):
        tier.move("missing", "known/b")
    assert tier.read_small("known/a") == b""
