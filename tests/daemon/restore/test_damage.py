"""Restores when a disk fails: one failure is told from another, and only the copy in which it was found is blamed."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from cairn_api.errors import OverloadedError, UnavailableError, VersionError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.model import CopyState, Tier
from cairnd.restore.pace import Meter
from cairnd.tiers.atomic import BulkWriter
from cairnd.tiers.errors import NotFoundError
from cairnd.tiers.filesystem import AnyPath, OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.tiers.object_store import ObjectStore
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, Lab, Rank, eventually
from tests.daemon.replication.test_replicator import flip
from tests.daemon.restore.test_fetcher import PARTS, Reader, lose_memory, lose_tier1, stored
from tests.daemon.restore.test_partials import Gated
from tests.daemon.tiers.rigged import NotesProtection

STILL = {"scrub_bytes_per_s": 0}


async def quiet(lab: Lab) -> None:
    """Start anew without background tasks: what was in memory is gone, and nobody repairs."""
    await lab.restart(run=False)
    await lab.app.inventory.refresh_all()


def unreadable(patch: pytest.MonkeyPatch, *paths: Path, code: int = errno.EIO) -> None:
    """The bytes of these files cannot be read."""
    bad, really = {path.stat().st_ino for path in paths}, OsFileSystem.pread_into

    def refused(self: OsFileSystem, fd: int, buffer: memoryview, offset: int) -> int:
        if os.fstat(fd).st_ino in bad:
            raise OSError(code, os.strerror(code))
        return really(self, fd, buffer, offset)

    patch.setattr(OsFileSystem, "pread_into", refused)


def still_cached(patch: pytest.MonkeyPatch, path: Path, data: bytes) -> None:
    """The page cache has *data* for this file, whatever the disk has by now."""
    rotten, really = path.stat().st_ino, OsFileSystem.pread_into

    def cached(self: OsFileSystem, fd: int, buffer: memoryview, offset: int) -> int:
        if os.fstat(fd).st_ino == rotten and not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            piece = data[offset : offset + len(buffer)]
            buffer[: len(piece)] = piece
            return len(piece)
        return really(self, fd, buffer, offset)

    patch.setattr(OsFileSystem, "pread_into", cached)


def unmovable(patch: pytest.MonkeyPatch, code: int) -> None:
    """No folder can be made in the quarantine."""
    really = OsFileSystem.mkdir

    def refused(self: OsFileSystem, path: AnyPath, mode: int) -> None:
        if layout.QUARANTINE in os.fspath(path):
            raise OSError(code, os.strerror(code))
        really(self, path, mode)

    patch.setattr(OsFileSystem, "mkdir", refused)


@pytest.mark.parametrize("gone", [layout.job_folder(JOB), ""])
async def test_a_folder_of_tier1_that_was_removed_condemns_no_copy_in_tier2(make_lab: MakeLab, gone: str) -> None:
    lab = await make_lab(**STILL)
    version = await stored(lab)
    lab.app.catalog.set_copy(lab.version(version), Tier.MEMORY, CopyState.EVICTED)
    shutil.rmtree(lab.tier1 / (gone or layout.version_folder(JOB, version)))
    reader = Reader(lab)
    assert reader.read(await reader.fetch(version)) == PARTS
    assert lab.version(version).has(Tier.TIER2)
    await lab.reaches(version, Tier.TIER1)
    assert {path: lab.file(version, path).read_bytes() for path in PARTS} == PARTS


async def test_a_place_that_takes_no_file_condemns_no_copy_and_another_place_serves(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = await make_lab(**STILL)
    version = await stored(lab)
    await lose_memory(lab)
    begin = LocalTier.begin

    def refused(self: LocalTier, key: str, temp_key: str, size_bytes: int) -> BulkWriter:
        if key.startswith(layout.version_folder(JOB, version)):
            raise NotFoundError(f"cannot make the folder of {key}")
        return begin(self, key, temp_key, size_bytes)

    monkeypatch.setattr(LocalTier, "begin", refused)
    lab.file(version, "model.pt").unlink()
    reader = Reader(lab)
    progress = await reader.fetch(version)
    assert reader.read(progress) == PARTS
    assert {item.path: item.origin for item in progress.ready} == {"model.pt": Tier.TIER2, "zero/optim.pt": Tier.TIER1}
    await eventually(lambda: lab.events("place_unusable") and lab.events("repair_failed"))
    assert lab.version(version).has(Tier.TIER2)
    assert all(bucket.reachable for bucket in lab.app.storage.health.values())
    lab.app.fetcher.end(reader.lease(progress))
    await eventually(lambda: not any((lab.tier1 / layout.FETCHED).rglob("model.pt")))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
async def test_a_damaged_copy_that_cannot_be_set_aside_is_known_as_damaged(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    lab = await make_lab(bucket=False, **STILL)
    (rank,) = await Rank.launch(lab)
    older, newer = await rank.save(PARTS), await rank.save(PARTS)
    rank.leave()
    await lab.restart(run=False)
    flip(lab.file(newer, "model.pt"))
    unmovable(monkeypatch, code)
    with pytest.raises(VersionError, match="no intact copy"):  # so that clients go on from an older version
        await Reader(lab).fetch(newer)
    assert lab.version(newer).copy(Tier.TIER1).damaged
    assert lab.app.persistence.newest(JOB) == lab.version(older)
    assert [event.version for event in lab.events("quarantine_failed")] == [str(newer)]


async def test_a_damaged_copy_that_cannot_be_set_aside_is_replaced_from_tier2(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = await make_lab(**STILL)
    version = await stored(lab)
    await lose_memory(lab)
    flip(lab.file(version, "model.pt"))
    unmovable(monkeypatch, errno.ENOSPC)
    reader = Reader(lab)
    assert reader.read(await reader.fetch(version)) == PARTS
    assert lab.file(version, "model.pt").read_bytes() == PARTS["model.pt"]
    assert lab.events("quarantine_failed")
    await lab.reaches(version, Tier.TIER1)


@pytest.mark.parametrize("code", [errno.EIO, errno.EUCLEAN])
async def test_a_file_that_cannot_even_be_looked_at_comes_from_tier2(make_lab: MakeLab, code: int) -> None:
    lab = await make_lab(**STILL)
    version = await stored(lab)
    await quiet(lab)
    bad, really = lab.file(version, "model.pt"), OsFileSystem.lstat

    def refused(self: OsFileSystem, path: AnyPath) -> os.stat_result:
        if os.fspath(path) == str(bad):
            raise OSError(code, os.strerror(code))
        return really(self, path)

    reader = Reader(lab)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OsFileSystem, "lstat", refused)
        assert reader.read(await reader.fetch(version)) == PARTS
    assert lab.version(version).copy(Tier.TIER1).damaged
    assert lab.version(version).has(Tier.TIER2)


async def test_a_lack_of_descriptors_for_a_look_condemns_nothing(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await stored(lab)
    await quiet(lab)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OverloadedError):
        patch.setattr(LocalTier, "exists", Mock(side_effect=OverloadedError("no descriptors are left")))
        await Reader(lab).fetch(version)
    assert lab.version(version).has(Tier.TIER1)


@pytest.mark.parametrize("code", [errno.EIO, errno.EUCLEAN])
async def test_an_object_that_cannot_be_read_is_damaged_and_the_bucket_is_not_away(
    make_lab: MakeLab, code: int
) -> None:
    lab = await make_lab(**STILL)
    version = await stored(lab)
    await lose_tier1(lab)
    with pytest.MonkeyPatch.context() as patch:
        unreadable(patch, lab.object(version, "model.pt"), code=code)
        with pytest.raises(VersionError, match="no intact copy"):
            await Reader(lab).fetch(version)
    assert lab.version(version).copy(Tier.TIER2).damaged
    assert all(bucket.reachable for bucket in lab.app.storage.health.values())


@pytest.mark.parametrize("record", ["decision", "node", "claim"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EUCLEAN])
async def test_a_record_that_cannot_be_read_hides_no_other_version_of_the_bucket(
    make_lab: MakeLab, record: str, code: int
) -> None:
    lab = await make_lab(**STILL)
    versions = []
    for _ in range(2):
        (rank,) = await Rank.launch(lab)
        versions.append(await rank.save(PARTS, persist=True))
        await lab.reaches(versions[-1], Tier.TIER2)
        rank.leave()
    older, newer = versions
    await lab.close()
    shutil.rmtree(lab.tier1 / layout.VERSIONS)
    node = next((lab.bucket_path / layout.Bucket.nodes(JOB, newer)).iterdir())
    bad = {
        "decision": lab.bucket_path / layout.Bucket.decision(JOB, newer),
        "node": node,
        "claim": lab.bucket_path / layout.Bucket.epoch(JOB, older.epoch),
    }[record]
    lab.app = lab._new_app()
    await lab.start(run=False)
    seen: list[VersionId] = []
    with pytest.MonkeyPatch.context() as patch:
        unreadable(patch, bad, code=code)
        problem = await lab.app.inventory.refresh(JOB)
        seen = [version.id for version in lab.app.catalog.versions(JOB)]
    if record == "claim":
        assert "epochs/" in problem
        assert seen == [newer, older]
    else:
        assert seen == [older]
        assert lab.app.inventory.unreadable(JOB) == [newer]
    assert not await lab.app.inventory.refresh(JOB), "what could be read again is believed again"
    assert [version.id for version in lab.app.catalog.versions(JOB)] == [newer, older]
    assert lab.app.inventory.unreadable(JOB) == []


async def test_a_record_that_nobody_may_read_is_not_taken_for_a_damaged_one(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await stored(lab)
    await lose_tier1(lab)
    bucket = await lab.bucket()
    with pytest.MonkeyPatch.context() as patch:
        bucket._read_before.clear()
        unreadable(patch, lab.bucket_path / layout.Bucket.decision(JOB, version), code=errno.ESTALE)
        with pytest.raises(UnavailableError):
            bucket.decisions(JOB)
    assert lab.version(version).has(Tier.TIER2)


async def test_a_restore_that_reads_cached_pages_does_not_acquit_the_disk(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await stored(lab)
    await quiet(lab)
    path = lab.file(version, "model.pt")
    flip(path)
    with pytest.MonkeyPatch.context() as patch:
        still_cached(patch, path, PARTS["model.pt"])
        found = [step.findings async for step in lab.app.verification.verify([lab.version(version)], deep=True)]
        assert [finding.path for findings in found for finding in findings] == ["model.pt"]
        await Reader(lab).fetch(version)
        assert lab.version(version).copy(Tier.TIER1).damaged
        lab.go()
        await lab.reaches(version, Tier.TIER1)
    assert path.read_bytes() == PARTS["model.pt"]


async def test_a_damaged_copy_of_which_all_was_downloaded_is_one_again(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await stored(lab)
    await quiet(lab)
    for path in PARTS:
        flip(lab.file(version, path))
    await Reader(lab).fetch(version)
    assert lab.version(version).has(Tier.TIER1)


def _gated(stores: list[Gated]) -> Callable[[ObjectStore], ObjectStore]:
    def wrap(store: ObjectStore) -> ObjectStore:
        stores.append(Gated(store))
        return stores[-1]

    return wrap


async def test_a_copy_is_not_listed_while_part_of_it_is_downloaded_anew(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage that is found while another restore publishes the manifest stays known, and its download arrives."""
    stores: list[Gated] = []
    lab = await make_lab(wrap_store=_gated(stores), **STILL)
    version = await stored(lab)
    await quiet(lab)
    found = lab.version(version)
    lab.app.catalog.set_copy(found, Tier.TIER1, CopyState.EVICTED)  # its files lie there all the same
    (model,) = (item for item in found.partitions if item.path == "model.pt")
    copies, publish = lab.app.fetcher._tier1_copies, lab.app.fetcher._tier1_copies._publish
    again: list[asyncio.Future[object]] = []
    loop = asyncio.get_running_loop()

    async def damage() -> None:
        flip(lab.file(version, "model.pt"))
        again.append(asyncio.ensure_future(copies.bring(found, model, Meter([model]))))
        await eventually(lambda: found.copy(Tier.TIER1).damaged)

    def meanwhile(*arguments: Any) -> None:
        asyncio.run_coroutine_threadsafe(damage(), loop).result(60)
        publish(*arguments)

    monkeypatch.setattr(copies, "_publish", meanwhile)
    await Reader(lab).fetch(version)
    assert found.copy(Tier.TIER1).damaged
    incoming = lab.tier1 / layout.incoming_folder(JOB, version)
    await eventually(lambda: incoming.exists() and list(incoming.iterdir()))  # its download has begun
    monkeypatch.undo()
    lab.app.catalog.set_copy(found, Tier.TIER1, CopyState.EVICTED)
    (lab.tier1 / layout.manifest(JOB, version)).unlink()
    lab.file(version, "model.pt").write_bytes(PARTS["model.pt"])
    await copies.adopt(found, [])  # as another restore would that came just before
    assert found.has(Tier.TIER1)
    stores[-1].gate.release()
    await again[0]
    assert lab.file(version, "model.pt").read_bytes() == PARTS["model.pt"]
    assert not lab.events("place_unusable")


async def test_what_was_fetched_is_served_also_if_its_manifest_cannot_be_written(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = await make_lab(**STILL)
    version = await stored(lab)
    await lose_tier1(lab)
    put = LocalTier.put_small

    def refused(self: LocalTier, key: str, data: bytes) -> None:
        if key == layout.manifest(JOB, version):
            raise UnavailableError("input/output error")
        put(self, key, data)

    monkeypatch.setattr(LocalTier, "put_small", refused)
    reader = Reader(lab)
    assert reader.read(await reader.fetch(version)) == PARTS
    assert not lab.version(version).has(Tier.TIER1)
    assert lab.events("copy_not_listed")


async def test_files_of_a_copy_that_was_made_again_are_protected_before_its_manifest_shows_them(
    make_lab: MakeLab,
) -> None:
    lab = await make_lab(protect_files=True, **STILL)
    lab.app.tier1._fs = NotesProtection(lab.tier1)
    version = await stored(lab)
    lab.app.catalog.set_copy(lab.version(version), Tier.MEMORY, CopyState.EVICTED)
    lab.app.tier1._fs = rigged = NotesProtection(lab.tier1)
    lab.file(version, "model.pt").unlink()
    await Reader(lab).fetch(version)
    await lab.reaches(version, Tier.TIER1)
    manifest = rigged.calls.index(("rename", layout.manifest(JOB, version)))
    assert rigged.calls.index(("protect", layout.partition(JOB, version, "model.pt"))) < manifest
