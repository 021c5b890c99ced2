"""Start-up: what is believed, what is swept, what is left alone."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cairn_api.errors import ConfigurationError, VersionError
from cairnd import layout
from cairnd.app import App
from cairnd.core import Surroundings
from cairnd.manifest import NOTE_FORMAT, NodeManifest, encode
from cairnd.model import CopyState, Tier, VersionState
from cairnd.tiers.filesystem import AnyPath, OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.upkeep.recovery import identify, lock, open_tree, recover, scan
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, Lab, Rank, gone


def tree(root: Path) -> dict[str, bytes]:
    """Every file below *root* with its bytes."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def tree_names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def replace(path: Path, data: bytes) -> None:
    """Put other bytes where a read-only published file lies."""
    path.unlink()
    path.write_bytes(data)


@pytest.fixture
async def kept(make_lab: MakeLab) -> Lab:
    """A daemon with two committed versions and no bucket."""
    lab = await make_lab(bucket=False, num_of_version_in_retention=9)
    (rank,) = await Rank.launch(lab)
    for _ in range(2):
        await rank.save({"model.pt": b"weights" * 100, "zero/optim.pt": b"moments"})
    return lab


async def test_everything_committed_is_there_again(kept: Lab) -> None:
    before = {v.id: (v.state, v.partitions, v.nonce, v.uid) for v in kept.app.catalog.versions(JOB)}
    await kept.restart()
    assert {v.id: (v.state, v.partitions, v.nonce, v.uid) for v in kept.app.catalog.versions(JOB)} == before
    assert all(version.has(Tier.TIER1) for version in kept.app.catalog.versions(JOB))


async def test_recovery_is_idempotent(kept: Lab) -> None:
    (kept.tier1 / layout.version_folder(JOB, next(kept.app.catalog.versions(JOB)).id) / "stray").write_bytes(b"x")
    await kept.restart()
    before = tree(kept.tier1)
    for _ in range(2):
        await kept.restart()
        assert tree(kept.tier1) == before


async def test_without_a_manifest_a_version_was_never_promised(kept: Lab) -> None:
    version = next(kept.app.catalog.versions(JOB)).id
    (kept.tier1 / layout.manifest(JOB, version)).unlink()
    await kept.restart()
    assert kept.app.catalog.get(JOB, version) is None
    assert gone(kept, version)
    (event,) = kept.events("recovery_swept")
    assert str(version) in event.fields["key"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "another's"])
async def test_a_damaged_manifest_is_moved_aside_whole(kept: Lab, damage: str) -> None:
    newest, older = (version.id for version in kept.app.catalog.versions(JOB))
    manifest = kept.tier1 / layout.manifest(JOB, newest)
    data = manifest.read_bytes()
    replace(
        manifest,
        {
            "flip": data[:50] + bytes([data[50] ^ 4]) + data[51:],
            "cut": data[:-10],
            "empty": b"",
            "another's": (kept.tier1 / layout.manifest(JOB, older)).read_bytes(),
        }[damage],
    )
    await kept.restart()
    assert [version.id for version in kept.app.catalog.versions(JOB)] == [older]
    assert gone(kept, newest)
    (moved,) = (kept.tier1 / layout.QUARANTINE).rglob("model.pt")
    assert moved.read_bytes() == b"weights" * 100  # the operator can still look at it
    assert kept.events("manifest_quarantined")
    status = await kept.app.reporter.status()
    assert any(str(newest) in problem for problem in status.problems)


@pytest.mark.parametrize("damage", ["short", "missing", "a link", "a folder"])
async def test_files_of_the_wrong_size_or_kind_fail_the_copy(kept: Lab, damage: str) -> None:
    newest, older = (version.id for version in kept.app.catalog.versions(JOB))
    file = kept.file(newest, "model.pt")
    file.unlink()
    if damage == "short":
        file.write_bytes(b"weights")
    elif damage == "a link":
        file.symlink_to(kept.file(older, "model.pt"))
    elif damage == "a folder":
        file.mkdir()
    await kept.restart()
    copy = kept.version(newest).copy(Tier.TIER1)
    assert copy.state is CopyState.FAILED
    assert "model.pt" in copy.error
    assert kept.version(older).has(Tier.TIER1)
    assert kept.app.keeper.floor(JOB) == older  # retention counts on nothing that is damaged


async def test_foreign_files_are_not_touched(kept: Lab) -> None:
    folder = kept.tier1 / layout.version_folder(JOB, next(kept.app.catalog.versions(JOB)).id)
    foreign = [
        kept.tier1 / "lost+found" / "x",
        kept.tier1 / "jobs" / "notes.txt",
        kept.tier1 / "jobs" / ".hidden" / "e00001-s000001-t" / "x",
        kept.tier1 / "jobs" / JOB / "README",
        kept.tier1 / "jobs" / JOB / "not-a-version" / "model.pt",
        kept.tier1 / "jobs" / JOB / "e1-s1-t" / "model.pt",
        kept.tier1 / layout.JOB_RECORDS / "a copy of it!.json",
        kept.tier1 / layout.JOB_RECORDS / "README",
        kept.tier1 / layout.PINS / "odd name" / "x.json",
        kept.tier1 / layout.PINS / JOB / "x.json",
        folder / "left by hand",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    await kept.restart()
    assert all(path.read_text() == "mine" for path in foreign)
    assert len(list(kept.app.catalog.versions())) == 2


async def test_a_damaged_job_record_is_told_and_written_anew(kept: Lab) -> None:
    record = kept.tier1 / layout.job_record(JOB)
    replace(record, record.read_bytes()[:-5])
    replace_other = kept.tier1 / layout.job_record("other")
    replace_other.write_bytes(encode({"format": NOTE_FORMAT}))
    await kept.restart()
    status = await kept.app.reporter.status()
    assert sum("job record" in problem for problem in status.problems) == 2
    (rank,) = await Rank.launch(kept)
    assert rank.client.epoch == 2


def test_the_node_has_one_durable_name(tmp_path: Path) -> None:
    tier = LocalTier(OsFileSystem(), tmp_path)
    node = identify(tier)
    assert identify(LocalTier(OsFileSystem(), tmp_path)) == node


@pytest.mark.parametrize("what", ["newer", "damaged"])
def test_a_tree_of_another_layout_is_refused(tmp_path: Path, what: str) -> None:
    tier = LocalTier(OsFileSystem(), tmp_path)
    node = identify(tier)
    path = tmp_path / layout.LAYOUT_KEY
    data = encode({"format": NOTE_FORMAT, "layout": 2, "node": node}) if what == "newer" else path.read_bytes()[:-1]
    replace(path, data)
    with pytest.raises(ConfigurationError if what == "newer" else VersionError, match=r"layout 2|damaged"):
        identify(tier)
    assert path.read_bytes() == data


def test_one_daemon_owns_a_tree(tmp_path: Path) -> None:
    tier = LocalTier(OsFileSystem(), tmp_path)
    fd = lock(tier)
    with pytest.raises(ConfigurationError, match="another cairnd") as caught:
        lock(tier)
    assert "tier1_path" in caught.value.hint
    os.close(fd)
    os.close(lock(tier))


async def test_a_second_daemon_is_refused_and_harms_nothing(lab: Lab, tmp_path: Path) -> None:
    """With the same tree, or only the same sockets: it says so, exits with 2, and the first one goes on serving."""
    for tier1 in (lab.settings.tier1_path, str(tmp_path / "other")):
        process = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "cairnd", "--runtime-dir", lab.settings.runtime_dir, "--tier1-path", tier1],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert process.returncode == 2, process.stderr
        assert "another" in process.stderr
        assert set(tree_names(Path(lab.settings.runtime_dir))) == {"cairnd.sock", "side.sock"}


async def test_scanning_changes_nothing(kept: Lab) -> None:
    version = next(kept.app.catalog.versions(JOB)).id
    (kept.tier1 / layout.manifest(JOB, version)).unlink()
    before = tree(kept.tier1)
    found = scan(kept.app.tier1)
    assert len(found.versions) == 1
    assert len(found.swept) == 1
    assert tree(kept.tier1) == before
    assert recover(kept.app.tier1).swept == found.swept
    assert scan(kept.app.tier1).swept == []


async def test_one_nodes_part_is_prepared_not_committed(kept: Lab) -> None:
    version = next(kept.app.catalog.versions(JOB)).id
    path = kept.tier1 / layout.manifest(JOB, version)
    document = json.loads(path.read_bytes())
    del document["crc64nvme"]
    replace(path, encode({**document, "world_size": 2}))
    assert NodeManifest.decode(path.read_bytes()).world_size == 2
    await kept.restart()
    assert kept.version(version).state is VersionState.PREPARED


def test_the_trees_own_name_is_durable_whoever_made_it(tmp_path: Path) -> None:
    synced: list[str] = []

    class Watched(OsFileSystem):
        def fsync_folder(self, path: AnyPath) -> None:
            synced.append(os.path.realpath(path))
            super().fsync_folder(path)

    for _ in range(2):  # the first one may have ended between the two calls
        assert open_tree(Watched(), str(tmp_path / "tier1")) == tmp_path / "tier1"
    assert synced == [str(tmp_path)] * 2


async def test_a_manifest_that_cannot_be_read_does_not_keep_the_others_away(kept: Lab) -> None:
    newest, older = kept.app.catalog.versions(JOB)

    class BadSector(OsFileSystem):
        def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
            if os.readlink(f"/proc/self/fd/{fd}").endswith(layout.manifest(JOB, newest.id)):  # noqa: PTH115
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().pread_into(fd, buffer, offset)

    found = recover(LocalTier(BadSector(), kept.tier1))
    assert [version.id for version in found.versions] == [older.id]
    assert [key for key, _ in found.quarantined] == [layout.version_folder(JOB, newest.id)]
    assert (JOB, newest.id) in found.unreadable, "it was saved here: nobody may be told that there is nothing"


async def test_a_full_disk_does_not_keep_recovery_from_making_room(kept: Lab) -> None:
    (rank,) = await Rank.launch(kept)
    lost = rank.next()
    await kept.close()
    mark = kept.tier1 / layout.sealed(JOB, lost)
    mark.parent.mkdir(parents=True)
    mark.touch()

    class Full(OsFileSystem):
        def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
            if mark.exists():  # what recovery sweeps is what fills the disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().pwrite(fd, data, offset)

    kept.app = App(kept.settings, {}, Surroundings(clock=kept.clock, fs=Full()))
    await kept.start()
    assert not mark.exists()
    assert kept.app.health.lost(JOB) == [(JOB, lost)]
    await kept.app.health.settle()
    assert (kept.tier1 / layout.health(JOB, lost)).exists()
