"""The judge of the crash tests is itself judged: what must not be in a tier is put there, and it has to say so."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest

from cairn_api.names import VersionId
from cairnd import layout
from cairnd.manifest import NodeManifest
from cairnd.tiers.local import LocalTier
from cairnd.upkeep import recovery
from tests.crash import oracle
from tests.crash.trainer import JOB, PARTITIONS, Trainers, train
from tests.daemon_process import DaemonProcess

_KEEP_ALL = 10**6


@dataclass(frozen=True)
class Saved:
    """Three versions in both tiers, as a daemon left them, and the diary of the trainer that saved them."""

    folder: Path
    diary: oracle.Diary

    @property
    def versions(self) -> list[VersionId]:
        return sorted(self.diary.promised)

    @property
    def tier1(self) -> Path:
        return self.folder / "tier1"

    @property
    def bucket(self) -> Path:
        return self.folder / "bucket"

    def of(self, version: VersionId) -> Path:
        """Its folder in tier 1."""
        return self.tier1 / layout.version_folder(JOB, version)

    def examine(self) -> oracle.Found:
        return oracle.examine(self.tier1, JOB, self.diary.tried, contents=oracle.Contents())

    def examine_bucket(self) -> oracle.Found:
        contents = oracle.Contents()
        return oracle.examine_bucket(self.bucket, JOB, self.diary.tried, partitions=PARTITIONS, contents=contents)


@pytest.fixture(scope="module")
def three_versions(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    with Trainers(folder) as trainers, DaemonProcess(folder, num_of_version_in_retention=3) as daemon:
        arguments = (str(daemon.runtime_dir), str(folder / "diary"), "run", "tier2", 0.0, 3)
        assert trainers.start(train, *arguments, {"persistent_time_interval": 0}).end() == 0
        daemon.kill9()
    return Saved(folder, oracle.Diary.read(folder / "diary"))


@pytest.fixture
def saved(three_versions: Saved, tmp_path: Path) -> Saved:
    """A copy of its own for each test, to be spoiled."""
    for name in ("tier1", "bucket"):
        shutil.copytree(three_versions.folder / name, tmp_path / name)
    return Saved(tmp_path, three_versions.diary)


def test_nothing_is_wrong_with_what_nobody_touched(saved: Saved) -> None:
    assert saved.examine() == saved.examine_bucket() == oracle.Found(tuple(saved.versions), {}, ())
    assert not oracle.lost(saved.versions, saved.examine(), _KEEP_ALL)
    assert not oracle.unlike_recoveries(saved.tier1)


def test_a_promised_version_that_vanished_below_a_younger_one_is_lost(saved: Saved) -> None:
    oldest, middle, newest = saved.versions
    shutil.rmtree(saved.of(middle))
    found = saved.examine()
    assert found.listed == (oldest, newest)
    assert oracle.lost(saved.versions, found, keep=2) == {middle}
    assert oracle.lost(saved.versions, found, keep=1) == set(), "retention may have deleted it"
    shutil.rmtree(saved.of(newest))
    assert oracle.lost(saved.versions, saved.examine(), keep=1) == {middle, newest}


def test_wrong_bytes_with_right_digests_are_torn(saved: Saved) -> None:
    earlier, later, _ = saved.versions
    shutil.rmtree(saved.of(later))
    shutil.copytree(saved.of(earlier), saved.of(later))
    manifest_path = saved.tier1 / layout.manifest(JOB, later)
    manifest = replace(NodeManifest.decode(manifest_path.read_bytes()), id=later)
    manifest_path.unlink()
    manifest_path.write_bytes(manifest.encode())
    found = saved.examine()
    assert found.torn.keys() == {str(later)}
    assert "it is not what was saved" in found.torn[str(later)]


def test_a_flipped_bit_is_torn(saved: Saved) -> None:
    version = saved.versions[1]
    for folder in (saved.of(version), saved.bucket / layout.Bucket.version(JOB, version)):
        path = folder / "model.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()
        path.write_bytes(content)
    assert saved.examine().torn.keys() == saved.examine_bucket().torn.keys() == {str(version)}


def test_a_version_that_nobody_began_or_that_lacks_a_partition_is_torn(saved: Saved) -> None:
    first, second, third = saved.versions
    found = oracle.examine(saved.tier1, JOB, {first, second})
    assert found.torn == {str(third): "nobody began it"}
    found = oracle.examine(saved.tier1, JOB, saved.versions, partitions=PARTITIONS | {"rank_1.pt"})
    assert found.torn.keys() == set(map(str, saved.versions))


def test_in_the_bucket_only_decisions_count(saved: Saved) -> None:
    undecided, damaged, sound = saved.versions
    (saved.bucket / layout.Bucket.decision(JOB, undecided)).unlink()
    shutil.rmtree(saved.bucket / layout.Bucket.nodes(JOB, damaged))
    found = saved.examine_bucket()
    assert found.listed == (sound,)
    assert found.torn.keys() == {str(damaged)}
    assert found.unfinished == (str(undecided),)
    assert oracle.lost(saved.diary.promised, found, _KEEP_ALL) == {undecided, damaged}


def test_a_version_that_is_offered_without_a_decision_is_torn(saved: Saved) -> None:
    (version, *_), decided = saved.versions, oracle._decisions(saved.bucket, JOB)
    del decided[str(version)]
    with mock.patch.object(oracle, "_decisions", return_value=decided):
        assert saved.examine_bucket().torn == {str(version): "it is offered without a decision"}


def test_a_recovery_that_sweeps_what_it_lists_is_noticed(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    recover = recovery.recover

    def careless(tier: LocalTier) -> recovery.Recovered:
        found = recover(tier)
        if found.versions:
            tier.delete_tree(layout.version_folder(JOB, found.versions[0].id))
        return found

    monkeypatch.setattr(recovery, "recover", careless)
    assert oracle.unlike_recoveries(saved.tier1)
    assert saved.examine().listed == tuple(saved.versions), "the tree itself is left alone"
