"""`cairn verify` where not everything can be looked at, or stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cairn_api.errors import ConfigurationError, UnavailableError
from cairnd import layout
from cairnd.cli.offline import BucketVersions, open_offline
from cairnd.cli.source import Check
from cairnd.model import Tier
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.upkeep.verifier import Finding, check_tier1
from tests.daemon.cli import schemas
from tests.daemon.cli.running import Cairn
from tests.daemon.cli.seeding import damage, three_versions

OLDEST, MIDDLE, NEWEST = (str(seed.id) for seed in three_versions())
Refuse = Callable[[str, Exception], None]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Let a look at the sizes of one version fail."""

    def refuse(version: str, error: Exception) -> None:
        really = LocalTier.identity

        def identity(self: LocalTier, key: str) -> object:
            if version in key:
                raise error
            return really(self, key)

        monkeypatch.setattr(LocalTier, "identity", identity)

    return refuse


def test_a_version_that_nobody_could_look_at_keeps_no_other_from_being_checked(
    cairn: Cairn, tier1: Path, refuse: Refuse
) -> None:
    refuse(NEWEST, ConfigurationError("permission denied", hint="let the daemon's user own this path"))
    outcome = cairn("verify", "--deep", "--store", tier1)
    assert outcome.status == 12
    assert outcome.lines[-1].startswith("2 versions, 2 copies checked")
    told = outcome.err.replace("\n  ", " ")
    assert f"could not look at {NEWEST} in tier1: permission denied" in told
    assert "let the daemon's user own this path" in told


def test_a_manifest_that_nobody_may_read_is_no_damage(
    cairn: Cairn, tier1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, really = layout.manifest("run-7", three_versions()[2].id), LocalTier.read_small

    def read_small(self: LocalTier, asked: str, *limits: int) -> bytes:
        if asked == key:
            raise ConfigurationError("permission denied", hint="let the daemon's user own this path")
        return really(self, asked, *limits)

    monkeypatch.setattr(LocalTier, "read_small", read_small)
    for version in ([], [NEWEST]):
        outcome = cairn("verify", *version, "--store", tier1)
        assert outcome.status == 12
        assert f"could not look at {NEWEST} in tier1: permission denied" in outcome.err.replace("\n  ", " ")
    assert f"{NEWEST} is not listed" in cairn("list", "--store", tier1).err.replace("\n  ", " ")
    assert cairn("verify", OLDEST, "--store", tier1).status == 0


def test_damage_beside_it_decides_the_exit_status(cairn: Cairn, tier1: Path, refuse: Refuse) -> None:
    refuse(NEWEST, UnavailableError("the disk is away", hint="mount it"))
    damage(tier1 / layout.partition("run-7", three_versions()[0].id, "model.pt"), 7)
    outcome = cairn("verify", "--deep", "--json", "--store", tier1)
    assert outcome.status == 1
    assert [item["version"] for item in outcome.json(schemas.VERIFY)["findings"]] == [OLDEST]
    error = json.loads(outcome.err)["error"]
    assert (error["class"], error["exit_status"], error["hint"]) == ("UnavailableError", 1, "mount it")


def test_where_nothing_could_be_looked_at_there_is_no_answer(cairn: Cairn, tier1: Path, refuse: Refuse) -> None:
    refuse("run-7", UnavailableError("the disk is away", hint="mount it"))
    error = cairn("verify", "--json", "--store", tier1).error()
    assert (error["class"], error["exit_status"]) == ("UnavailableError", 10)
    for version in (OLDEST, MIDDLE, NEWEST):
        assert f"{version} in tier1" in error["message"]


def test_a_version_that_goes_while_a_store_is_read_is_not_damaged(store: str) -> None:
    source = open_offline(store, {})
    told: list[Check] = []
    versions = source.versions("run-7").versions  # read, and deleted by the daemon before it is looked at
    newest = versions[0].version
    if source.tier is Tier.TIER1:
        shutil.rmtree(Path(store) / layout.version_folder("run-7", newest.id))
    else:
        assert isinstance(source, BucketVersions)
        source._bucket.mark_deleted("run-7", newest.id, 1.0)
        source._bucket.delete_data("run-7", newest.id)
    source.verify("run-7", None, deep=True, report=told.append)
    assert [finding for check in told for finding in check.findings] == []
    assert told[-1].copies_checked == 2


def test_data_that_is_missing_below_its_manifest_is_damage(tier1: Path) -> None:
    source = open_offline(str(tier1), {})
    (newest, *_) = source.versions("run-7").versions
    (tier1 / layout.partition("run-7", newest.version.id, "model.pt")).unlink()
    told: list[Check] = []
    source.verify("run-7", None, deep=False, report=told.append)
    found: list[Finding] = [finding for check in told for finding in check.findings]
    assert [finding.path for finding in found] == ["model.pt"]
    tier = LocalTier(OsFileSystem(), tier1)
    assert list(check_tier1(tier, newest.version, deep=False, progress=lambda _: None)) == found
