"""Start-up on a disk with errors, one that is full, and a tree that somebody was at: nothing keeps the rest away."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cairn_api.names import VersionId
from cairnd import core, layout
from cairnd.app import App
from cairnd.catalog.health import Health
from cairnd.core import Surroundings
from cairnd.model import Tier
from cairnd.tiers.filesystem import AnyPath, FileSystem, FolderEntry, OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.upkeep.recovery import recover
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, PATIENCE_S, Lab, Rank, gone
from tests.daemon.replication.test_replicator import flip

ERRORS = (errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA)


class Faulty(OsFileSystem):
    """Fails the calls named in *calls* on paths that end with *path*."""

    def __init__(self, code: int, path: str, *calls: str) -> None:
        self._code = code
        self._end = path
        self._calls = calls

    def _meet(self, call: str, path: AnyPath) -> None:
        if call in self._calls and os.fspath(path).endswith(self._end):
            raise OSError(self._code, os.strerror(self._code))

    def lstat(self, path: AnyPath) -> os.stat_result:
        self._meet("lstat", path)
        return super().lstat(path)

    def scandir(self, path: AnyPath) -> list[FolderEntry]:
        self._meet("scandir", path)
        return super().scandir(path)

    def unlink(self, path: AnyPath) -> None:
        self._meet("unlink", path)
        super().unlink(path)

    def rename(self, source: AnyPath, target: AnyPath) -> None:
        self._meet("rename", source)
        super().rename(source, target)

    def mkdir(self, path: AnyPath, mode: int) -> None:
        self._meet("mkdir", path)
        super().mkdir(path, mode)

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        self._meet("pread_into", os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115
        return super().pread_into(fd, buffer, offset)


@pytest.fixture
async def kept(make_lab: MakeLab) -> Lab:
    """A daemon with two committed versions and no bucket."""
    lab = await make_lab(bucket=False, num_of_version_in_retention=9, scrub_bytes_per_s=0)
    (rank,) = await Rank.launch(lab)
    for _ in range(2):
        await rank.save({"model.pt": b"weights" * 100})
    return lab


async def start(lab: Lab, fs: FileSystem | None = None) -> None:
    """The next daemon on the same folders."""
    await lab.close()
    lab.app = App(lab.settings, {}, Surroundings(clock=lab.clock, fs=fs or OsFileSystem()))
    await lab.start(run=False)


def versions(lab: Lab) -> list[VersionId]:
    return [version.id for version in lab.app.catalog.versions(JOB)]


OLDER, NEWER = VersionId(1, 1, "step1"), VersionId(1, 2, "step2")


async def assert_told(lab: Lab, key: str) -> None:
    assert [event.fields["key"] for event in lab.events("recovery_failed")] == [key]
    problems = (await lab.app.reporter.status()).problems
    (told,) = [line for line in problems if line.startswith(f"{key} in tier 1")]
    assert "next start" in told
    assert "; ; " not in told


@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize("call", ["unlink", "scandir"])
async def test_what_cannot_be_swept_is_left_alone_and_told(kept: Lab, call: str, code: int) -> None:
    (kept.tier1 / layout.manifest(JOB, NEWER)).unlink()
    folder = layout.version_folder(JOB, NEWER)
    await start(kept, Faulty(code, "model.pt" if call == "unlink" else folder, call))
    assert versions(kept) == [OLDER]
    assert kept.app.inventory.unreadable(JOB) == [], "it was never promised"
    assert kept.events("recovery_swept") == []
    await assert_told(kept, folder)
    await start(kept)
    assert gone(kept, NEWER)
    assert kept.app.left_alone == []


@pytest.mark.parametrize("code", ERRORS)
async def test_a_download_that_cannot_be_removed_does_not_hide_its_version(kept: Lab, code: int) -> None:
    folder = layout.incoming_folder(JOB, NEWER)
    (kept.tier1 / folder).mkdir(parents=True)
    await start(kept, Faulty(code, folder, "scandir"))
    assert versions(kept) == [NEWER, OLDER]
    assert kept.version(NEWER).has(Tier.TIER1)
    await assert_told(kept, folder)


@pytest.mark.parametrize("code", ERRORS)
async def test_what_cannot_be_looked_at_is_left_alone_and_unreadable(kept: Lab, code: int) -> None:
    folder = layout.version_folder(JOB, NEWER)
    await start(kept, Faulty(code, folder, "lstat"))
    assert versions(kept) == [OLDER]
    assert kept.app.inventory.unreadable(JOB) == [NEWER], "it was saved here: nobody may be told that there is nothing"
    await assert_told(kept, folder)
    await start(kept)
    assert kept.version(NEWER).has(Tier.TIER1)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EACCES])
async def test_a_manifest_that_nobody_may_or_can_read_now_is_not_moved(kept: Lab, code: int) -> None:
    await start(kept, Faulty(code, layout.manifest(JOB, NEWER), "pread_into"))
    assert versions(kept) == [OLDER]
    assert kept.app.inventory.unreadable(JOB) == [NEWER]
    assert kept.events("manifest_quarantined") == []
    await start(kept)
    assert kept.version(NEWER).has(Tier.TIER1)


@pytest.mark.parametrize("fault", [(errno.ENOSPC, "quarantine", "mkdir"), (errno.EIO, str(NEWER), "rename")])
async def test_a_damaged_manifest_that_cannot_be_moved_stays_out_of_use(kept: Lab, fault: tuple[int, str, str]) -> None:
    flip(kept.tier1 / layout.manifest(JOB, NEWER))
    for _ in range(2):
        await start(kept, Faulty(*fault))
        assert versions(kept) == [OLDER]
        assert kept.app.inventory.unreadable(JOB) == [NEWER]
        assert kept.events("manifest_quarantined") == []
        await assert_told(kept, layout.version_folder(JOB, NEWER))
    await start(kept)
    assert gone(kept, NEWER)
    assert kept.app.inventory.unreadable(JOB) == [NEWER]
    assert kept.events("manifest_quarantined")


async def test_a_quarantine_that_cannot_be_listed_does_not_end_the_start(kept: Lab) -> None:
    flip(kept.tier1 / layout.manifest(JOB, NEWER))
    await start(kept)
    await start(kept, Faulty(errno.EIO, layout.QUARANTINE, "scandir", "lstat"))
    assert versions(kept) == [OLDER]
    await assert_told(kept, layout.QUARANTINE)


def manifest_as_a_folder(manifest: Path) -> None:
    manifest.unlink()
    manifest.mkdir()


def manifest_as_a_link(manifest: Path) -> None:
    manifest.rename(manifest.with_name("moved.json"))
    manifest.symlink_to("moved.json")


def folder_as_a_file(manifest: Path) -> None:
    manifest.unlink()
    manifest.parent.rmdir()
    manifest.parent.write_text("x")


@pytest.mark.parametrize("shape", [manifest_as_a_folder, manifest_as_a_link, folder_as_a_file])
async def test_a_manifest_that_is_no_file_is_set_aside_like_a_damaged_one(
    kept: Lab, shape: Callable[[Path], None]
) -> None:
    shape(kept.tier1 / layout.manifest(JOB, NEWER))
    for _ in range(2):
        await start(kept)
        assert versions(kept) == [OLDER]
        assert gone(kept, NEWER)
        assert kept.app.inventory.unreadable(JOB) == [NEWER]
    (moved,) = (kept.tier1 / layout.QUARANTINE).rglob("model.pt")
    assert moved.read_bytes() == b"weights" * 100


async def test_the_epoch_of_an_unreadable_version_is_not_used_again(kept: Lab) -> None:
    for version in (OLDER, NEWER):
        flip(kept.tier1 / layout.manifest(JOB, version))
    (kept.tier1 / layout.job_record(JOB)).unlink()
    await start(kept)
    (rank,) = await Rank.launch(kept)
    assert rank.client.epoch == NEWER.epoch + 1


async def test_a_loss_is_recorded_beside_what_was_known(kept: Lab) -> None:
    record = kept.tier1 / layout.health(JOB, NEWER)
    record.parent.mkdir(parents=True)
    known = Health({Tier.TIER2: "model.pt: block 0"}, ("launch-1",), "its loss exploded")
    record.write_bytes(known.encode())
    (kept.tier1 / layout.manifest(JOB, NEWER)).unlink()
    mark = kept.tier1 / layout.sealed(JOB, NEWER)
    mark.parent.mkdir()
    mark.touch()
    recover(LocalTier(OsFileSystem(), kept.tier1))
    assert not mark.exists()
    found = Health.decode(record.read_bytes(), "the record")
    assert found == Health(known.damaged, known.resumes, known.passed_over, lost=True)


async def test_a_loss_that_cannot_be_recorded_keeps_its_trace(kept: Lab) -> None:
    (kept.tier1 / layout.manifest(JOB, NEWER)).unlink()
    mark = kept.tier1 / layout.sealed(JOB, NEWER)
    mark.parent.mkdir()
    mark.touch()
    found = recover(LocalTier(Faulty(errno.EIO, layout.HEALTH, "mkdir"), kept.tier1))
    assert found.lost == [(JOB, NEWER)]
    assert mark.exists()
    await start(kept)
    assert not mark.exists()
    assert kept.app.health.lost(JOB) == [(JOB, NEWER)]


@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize("record", [layout.health(JOB, OLDER), f"{layout.HEALTH}/{JOB}", layout.job_record(JOB)])
async def test_records_that_cannot_be_read_do_not_keep_the_daemon_from_starting(
    kept: Lab, record: str, code: int
) -> None:
    health = kept.tier1 / layout.health(JOB, OLDER)
    health.parent.mkdir(parents=True)
    health.write_bytes(Health({Tier.TIER1: "model.pt: block 0"}).encode())
    await start(kept, Faulty(code, record, "pread_into", "scandir"))
    assert versions(kept) == [NEWER, OLDER]
    assert any(record in line for line in (await kept.app.reporter.status()).problems)


async def test_a_disk_that_hangs_does_not_hold_up_the_end_of_a_drain(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = await make_lab(scrub_bytes_per_s=0)
    (rank,) = await Rank.launch(lab)
    version = await rank.save(persist=True)
    await lab.reaches(version, Tier.TIER2)
    run = lab.app._disk.run

    async def held(function: Callable[..., Any], *arguments: Any) -> Any:
        if function == lab.app.health._write:
            await asyncio.Event().wait()
        return await run(function, *arguments)

    monkeypatch.setattr(lab.app._disk, "run", held)
    monkeypatch.setattr(core, "_LAST_FINDINGS_S", 0.05)
    lab.app.health.mark(lab.version(version), "its loss exploded")
    assert await asyncio.wait_for(lab.app.drain(), PATIENCE_S) == []
