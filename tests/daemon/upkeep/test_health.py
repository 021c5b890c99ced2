"""What was found damaged stays known, is not counted as kept, and is made again; copies are read in the background."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from cairn_api.errors import CairnError, OverloadedError, UnavailableError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.catalog.health import Health, read_records
from cairnd.model import CopyState, Tier
from cairnd.tiers.filesystem import AnyPath, OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.upkeep.verifier import block_buffer, compare_block
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, Lab, Rank, eventually, gone
from tests.daemon.replication.test_replicator import flip
from tests.daemon.restore.test_damage import still_cached

PARTS = {"model.pt": b"weights" * 1000, "zero/optim.pt": b"moments" * 3000}
SCRUBS = {"scrub_bytes_per_s": 1 << 20, "scrub_tier2_bytes_per_s": 1 << 20, "scrub_interval_s": 100.0}
STILL = {"scrub_bytes_per_s": 0}


async def saved(lab: Lab, *, persist: bool = True) -> VersionId:
    (rank,) = await Rank.launch(lab)
    version = await rank.save(PARTS, persist=persist)
    if persist:
        await lab.reaches(version, Tier.TIER2)
    rank.leave()
    await lab.settle()
    return version


def record(lab: Lab, version: VersionId) -> dict[str, str]:
    path = lab.tier1 / layout.health(JOB, version)
    return dict(json.loads(path.read_text())["damaged"]) if path.exists() else {}


def rot(path: Path) -> None:
    """Other bytes in the same file, whose times do not tell."""
    before = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(b"rotten")
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def hold_writes(lab: Lab) -> None:
    """The disk accepts no more data of versions, and says nothing."""
    run = lab.app._disk.run

    async def held(function: Callable[..., Any], *arguments: Any) -> Any:
        if getattr(function, "__name__", "") in ("write", "finish"):
            await asyncio.Event().wait()
        return await run(function, *arguments)

    lab.app._disk.run = held  # type: ignore[method-assign]


def damaged(lab: Lab, version: VersionId, tier: Tier) -> bool:
    found = lab.app.catalog.get(JOB, version)
    return found is not None and found.copy(tier).damaged


async def test_damage_is_known_after_a_restart_and_forgotten_when_the_copy_was_made_again(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, **STILL)
    version = await saved(lab, persist=False)
    flip(lab.file(version, "model.pt"))
    lab.app.catalog.set_damaged(lab.version(version), Tier.TIER1, "model.pt: block 0")
    await lab.app.health.settle()
    assert record(lab, version) == {"tier1": "model.pt: block 0"}
    await lab.restart()
    assert lab.version(version).copy(Tier.TIER1).damaged
    assert lab.app.keeper.floor(JOB) is None
    lab.app.catalog.set_copy(lab.version(version), Tier.TIER1, CopyState.VERIFIED)
    await lab.app.health.settle()
    assert record(lab, version) == {}
    await lab.restart()
    assert lab.version(version).has(Tier.TIER1)


async def test_retention_does_not_count_damaged_copies_also_after_a_restart(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, num_of_version_in_retention=1, **STILL)
    (rank,) = await Rank.launch(lab)
    older = await rank.save(PARTS)
    lab.app.catalog.require(JOB, older).pinned = True
    newer = await rank.save(PARTS)
    await lab.app.keeper.apply(JOB)
    lab.app.catalog.require(JOB, older).pinned = False
    lab.app.catalog.set_damaged(lab.version(newer), Tier.TIER1, "model.pt: block 0")
    await lab.app.health.settle()
    assert lab.app.keeper.plan(JOB) == []
    await lab.restart()
    assert lab.app.keeper.plan(JOB) == []
    assert lab.app.keeper.floor(JOB) == older
    assert not await lab.app.keeper.apply(JOB)
    assert lab.version(older).has(Tier.TIER1)


async def test_damage_in_tier2_is_known_when_tier1_has_let_the_version_go(make_lab: MakeLab) -> None:
    """Else the version would be found in the bucket anew, taken for intact, and an older one deleted for it."""
    lab = await make_lab(num_of_version_in_retention=2, **STILL)
    (rank,) = await Rank.launch(lab)
    intact, damaged = await rank.save(PARTS, persist=True), await rank.save(PARTS, persist=True)
    for version in (intact, damaged):
        await lab.reaches(version, Tier.TIER2)
    for path in (lab.file(damaged, "model.pt"), lab.object(damaged, "model.pt")):
        flip(path)
    for tier in (Tier.TIER1, Tier.TIER2):
        lab.app.catalog.set_damaged(lab.version(damaged), tier, "model.pt: block 0")
    newer = [await rank.save(PARTS) for _ in range(3)]
    await eventually(lambda: lab.version(damaged).copy(Tier.TIER1).state is CopyState.EVICTED)
    for _ in range(2):
        await lab.app.inventory.refresh(JOB)
        assert lab.version(damaged).copy(Tier.TIER2).damaged
        await lab.restart()
        await lab.app.inventory.refresh(JOB)
    assert lab.version(intact).has(Tier.TIER2)
    rank = (await Rank.launch(lab))[0]
    first = await rank.save(PARTS, persist=True)
    await lab.reaches(first, Tier.TIER2)
    await lab.app.keeper.apply(JOB)
    assert lab.version(intact).has(Tier.TIER2), "of the two newest that are intact there it is one"
    second = await rank.save(PARTS, persist=True)
    await lab.reaches(second, Tier.TIER2)
    await eventually(lambda: gone(lab, damaged) and gone(lab, intact))
    assert newer


async def test_damage_in_tier1_is_known_when_another_daemon_has_deleted_the_version_in_tier2(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await saved(lab)
    await lab.restart(run=False)
    await lab.app.inventory.refresh_all()
    flip(lab.file(version, "model.pt"))
    lab.app.catalog.set_damaged(lab.version(version), Tier.TIER1, "model.pt: block 0")
    (await lab.bucket()).mark_deleted(JOB, version, 0.0)
    for _ in range(2):
        await lab.app.inventory.refresh(JOB)
        assert lab.version(version).copy(Tier.TIER1).damaged
        await lab.app.health.settle()
        await lab.restart(run=False)
    assert not lab.version(version).has(Tier.TIER1), "it is not taken for intact after a restart"


async def test_a_damaged_copy_in_tier2_is_known_after_a_restart_and_uploaded_again(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await saved(lab)
    flip(lab.object(version, "model.pt"))
    await lab.restart(run=False)  # nobody uploads yet
    await lab.app.inventory.refresh_all()
    lab.app.catalog.set_damaged(lab.version(version), Tier.TIER2, "model.pt: block 0")
    await lab.app.health.settle()
    await lab.restart(run=False)
    assert damaged(lab, version, Tier.TIER2)
    await lab.app.inventory.refresh_all()
    assert damaged(lab, version, Tier.TIER2), "the bucket's listing acquitted it"
    lab.go()
    await lab.reaches(version, Tier.TIER2)
    assert lab.object(version, "model.pt").read_bytes() == PARTS["model.pt"]
    await eventually(lambda: record(lab, version) == {})


async def test_a_damaged_tier1_copy_is_made_again_from_tier2(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await saved(lab)
    await lab.restart()
    await lab.reaches(version, Tier.TIER2)
    flip(lab.file(version, "model.pt"))
    lab.app.catalog.set_damaged(lab.version(version), Tier.TIER1, "model.pt: block 0")
    await lab.reaches(version, Tier.TIER1)
    assert lab.file(version, "model.pt").read_bytes() == PARTS["model.pt"]
    assert [path.name for path in lab.tier1.glob(".cairn/quarantine/**/*.pt")] == ["model.pt"]
    await eventually(lambda: lab.events("copy_repaired"))
    await eventually(lambda: record(lab, version) == {})
    await lab.restart()
    assert lab.version(version).has(Tier.TIER1)


async def test_a_copy_whose_manifest_was_damaged_is_made_again_from_tier2(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await saved(lab)
    await lab.close()
    manifest = lab.tier1 / layout.manifest(JOB, version)
    flip(manifest)
    lab.app = lab._new_app()
    await lab.start()
    await lab.reaches(version, Tier.TIER1)
    assert manifest.exists()
    assert lab.file(version, "model.pt").read_bytes() == PARTS["model.pt"]


async def test_a_failed_repair_is_reported_and_tried_again(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await saved(lab)
    await lab.restart()
    await lab.reaches(version, Tier.TIER2)
    away = lab.bucket_path.with_name("away")
    lab.bucket_path.rename(away)
    lab.file(version, "model.pt").unlink()
    lab.app.catalog.set_damaged(lab.version(version), Tier.TIER1, "model.pt is missing")
    await eventually(lambda: lab.events("repair_failed"))
    away.rename(lab.bucket_path)
    lab.app.catalog.set_copy(lab.version(version), Tier.TIER2, CopyState.VERIFIED)
    await lab.passes(lambda: lab.version(version).has(Tier.TIER1), step_s=30.0)


@pytest.mark.parametrize("tier", [Tier.TIER1, Tier.TIER2])
async def test_the_scrubber_finds_what_rotted_and_it_is_made_again(make_lab: MakeLab, tier: Tier) -> None:
    lab = await make_lab(**SCRUBS)
    version = await saved(lab)
    await lab.restart()
    await lab.reaches(version, Tier.TIER2)
    await lab.passes(lambda: any(event.fields["tier"] == tier for event in lab.events("scrubbed")))
    path = lab.file(version, "zero/optim.pt") if tier is Tier.TIER1 else lab.object(version, "zero/optim.pt")
    flip(path)
    await lab.passes(lambda: any(event.fields["tier"] == tier for event in lab.events("copy_failed")), step_s=10.0)
    await lab.passes(lambda: lab.version(version).has(tier))
    assert path.read_bytes() == PARTS["zero/optim.pt"]
    assert lab.app.metrics.verify_failures.labels(tier)._value.get() == 1


async def test_the_scrubber_keeps_to_its_budget(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, scrub_bytes_per_s=1000, scrub_interval_s=10_000.0)
    version = await saved(lab, persist=False)
    await lab.restart()
    passed_s = await lab.passes(lambda: lab.events("scrubbed"), step_s=0.5)
    first_bytes = len(PARTS["model.pt"])  # the last one is waited for by whoever comes next
    assert first_bytes / 1000 - 1 <= passed_s
    assert lab.version(version).has(Tier.TIER1)


async def test_what_is_deleted_while_it_is_scrubbed_is_no_damage(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, num_of_version_in_retention=1, scrub_bytes_per_s=1000)
    (rank,) = await Rank.launch(lab)
    older = await rank.save(PARTS)
    lab.clock.advance(40.0)  # the scrubber looks, and waits for its budget after the first block
    await lab.settle()
    await rank.save(PARTS)
    await eventually(lambda: gone(lab, older))
    await lab.passes(lambda: lab.events("scrubbed"))
    assert not lab.events("copy_failed")


async def test_a_damaged_record_is_left_for_the_operator(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, **STILL)
    version = await saved(lab, persist=False)
    lab.app.catalog.set_damaged(lab.version(version), Tier.TIER1, "model.pt: block 0")
    await lab.app.health.settle()
    flip(lab.tier1 / layout.health(JOB, version))
    await lab.restart()
    assert any("health" in line for line in lab.app.left_alone)
    assert lab.version(version).has(Tier.TIER1)


async def test_a_version_on_which_resumes_die_is_passed_over_and_stays_so(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, pass_over_after_resumes=2, **STILL)
    version = await saved(lab, persist=False)
    for number in range(2):
        assert not lab.version(version).passed_over
        client = lab.app.clients.connect(0, 0, 1)
        assert await lab.app.health.resume_began(client.number, lab.version(version), f"attempt {number}") == number
        lab.app._on_client_gone(client)
        if not number:
            await lab.restart()
    assert lab.version(version).passed_over == "2 resumes in a row died on it before they had saved anything"
    assert [event.version for event in lab.events("version_passed_over")] == [str(version)]
    await lab.app.health.settle()
    await lab.restart()
    assert lab.version(version).passed_over
    assert any("cairn mark" in problem for problem in (await lab.app.reporter.status()).problems)
    assert lab.app.health.mark(lab.version(version), "")
    await lab.app.health.settle()
    await lab.restart()
    assert not lab.version(version).passed_over
    assert record(lab, version) == {}


async def test_resumes_that_end_well_or_save_or_live_do_not_count(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, pass_over_after_resumes=1, **STILL)
    version = await saved(lab, persist=False)
    ends_well, saves = lab.app.clients.connect(0, 0, 1), lab.app.clients.connect(0, 0, 1)
    await lab.app.health.resume_began(ends_well.number, lab.version(version), "ends well")
    lab.app.health.judge(JOB)
    lab.app.health.resume_ended(ends_well.number)
    lab.app._on_client_gone(ends_well)
    assert await lab.app.health.resume_began(saves.number, lab.version(version), "saves") == 0
    (rank,) = await Rank.launch(lab)
    await rank.save(PARTS)
    lab.app._on_client_gone(saves)
    assert not lab.version(version).passed_over


async def test_a_resume_that_died_with_the_daemon_is_judged_when_somebody_chooses(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, pass_over_after_resumes=1, **STILL)
    version = await saved(lab, persist=False)
    client = lab.app.clients.connect(0, 0, 1)
    await lab.app.health.resume_began(client.number, lab.version(version), "one")
    await lab.restart()
    again = lab.app.clients.connect(0, 0, 1)
    await lab.app.health.resume_began(again.number, lab.version(version), "one")  # the same process, told again
    lab.app.health.judge(JOB)
    assert not lab.version(version).passed_over
    await lab.restart()
    lab.app.health.judge(JOB)
    assert lab.version(version).passed_over


async def test_a_captured_version_that_is_lost_with_its_daemon_is_told(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, **STILL)
    (rank,) = await Rank.launch(lab)
    older = await rank.save(PARTS)
    lost = rank.next()
    rank.create(lost)
    for name, data in PARTS.items():
        rank.seal(lost, name, data)
    await rank.prepare(lost, list(PARTS))
    hold_writes(lab)
    rank.commit(lost)
    await eventually((lab.tier1 / layout.sealed(JOB, lost)).exists)
    await lab.restart()  # its trainer is gone too: nobody offers it again
    assert lab.app.health.lost(JOB) == [(JOB, lost)]
    assert any(str(lost) in problem for problem in (await lab.app.reporter.status()).problems)
    await lab.passes(lambda: lab.events("version_lost"), step_s=10.0)
    await lab.restart()
    assert lab.app.health.lost(JOB) == [(JOB, lost)]
    (rank,) = await Rank.launch(lab)
    await rank.save(PARTS)
    assert lab.app.health.lost(JOB) == []
    await eventually(lambda: not (lab.tier1 / layout.health(JOB, lost)).exists())
    assert lab.version(older).has(Tier.TIER1)


async def test_what_was_not_agreed_on_is_no_loss(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, **STILL)
    (rank,) = await Rank.launch(lab)
    version = rank.next()
    rank.create(version)
    rank.seal(version, "model.pt", PARTS["model.pt"])
    await rank.prepare(version, ["model.pt"])
    await lab.restart()
    assert gone(lab, version)
    assert lab.app.health.lost() == []


async def test_verify_does_not_take_a_failed_upload_for_damage(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await saved(lab, persist=False)
    lab.app.catalog.set_copy(lab.version(version), Tier.TIER2, CopyState.FAILED, "the bucket was away")
    steps = [step async for step in lab.app.verification.verify([lab.version(version)], deep=True)]
    assert [step.findings for step in steps] == [()]
    assert not damaged(lab, version, Tier.TIER2)


async def test_a_shortage_of_descriptors_or_memory_condemns_nobody(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, **SCRUBS)
    version = await saved(lab, persist=False)
    really = OsFileSystem.open

    def refused(self: OsFileSystem, path: AnyPath, flags: int, mode: int = 0o600) -> int:
        if JOB in os.fspath(path):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), os.fspath(path))
        return really(self, path, flags, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OsFileSystem, "open", refused)
        await lab.passes(lambda: lab.events("scrubbed"), step_s=10.0)
        with pytest.raises(OverloadedError):
            [step async for step in lab.app.verification.verify([lab.version(version)], deep=True)]
    assert lab.version(version).has(Tier.TIER1)
    lack = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    partition = lab.version(version).partitions[0]
    with pytest.raises(OverloadedError):
        compare_block(partition, 0, Mock(side_effect=lack), memoryview(bytearray(partition.size_bytes)))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OverloadedError, match="memory for a block"):
        patch.setattr("cairnd.upkeep.verifier.mmap.mmap", Mock(side_effect=lack))
        block_buffer()


async def test_a_bucket_that_does_not_answer_condemns_nobody(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await saved(lab)
    bucket = await lab.bucket()
    bucket.store.get = Mock(side_effect=UnavailableError("no answer"))  # type: ignore[method-assign]
    with pytest.raises(UnavailableError):
        [step async for step in lab.app.verification.verify([lab.version(version)], deep=False)]
    assert lab.version(version).has(Tier.TIER2)


async def test_damage_that_was_found_while_somebody_else_looked_is_not_acquitted(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, **STILL)
    version = await saved(lab, persist=False)
    looking = lab.app.verification.verify([lab.version(version)], deep=True)
    look = lab.app.verification._look

    async def looked(*arguments: Any, **options: Any) -> Any:
        found = await look(*arguments, **options)
        lab.app.catalog.set_damaged(lab.version(version), Tier.TIER1, "model.pt: block 0")
        return found

    lab.app.verification._look = looked  # type: ignore[method-assign]
    assert [step.findings async for step in looking] == [()]
    assert damaged(lab, version, Tier.TIER1)
    lab.app.verification._look = look  # type: ignore[method-assign]
    [step async for step in lab.app.verification.verify([lab.version(version)], deep=True)]
    assert not damaged(lab, version, Tier.TIER1)


async def test_damage_that_is_found_beside_other_damage_is_repaired_with_it(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await saved(lab)
    await lab.restart(run=False)
    await lab.app.inventory.refresh_all()
    found = lab.version(version)
    flip(lab.file(version, "model.pt"))
    [step async for step in lab.app.verification.verify([found], deep=True)]
    optim = next(item for item in found.partitions if item.path == "zero/optim.pt")
    lab.app.verified.check(layout.partition(JOB, version, optim.path), optim)  # by a load of it alone
    status = lab.file(version, "zero/optim.pt").stat()
    rot(lab.file(version, "zero/optim.pt"))
    assert lab.file(version, "zero/optim.pt").stat().st_mtime_ns == status.st_mtime_ns
    [step async for step in lab.app.verification.verify([found], deep=True)]
    lab.go()
    await lab.reaches(version, Tier.TIER1)
    assert {path: lab.file(version, path).read_bytes() for path in PARTS} == PARTS


async def test_a_record_that_cannot_be_read_or_written_keeps_nothing_else_away(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, run=False, **STILL)
    versions = [VersionId(1, number, "a") for number in range(1, 4)]
    for version in versions:
        lab.app.health._set((JOB, version), Health(passed_over="because"))
    (lab.tier1 / layout.health(JOB, versions[0])).mkdir(parents=True)
    with pytest.raises(CairnError):
        await lab.app.health.settle()
    assert all((lab.tier1 / layout.health(JOB, version)).is_file() for version in versions[1:])
    (lab.tier1 / layout.health(JOB, versions[0])).rmdir()
    await lab.app.health.settle()
    (lab.tier1 / layout.health(JOB, versions[0])).with_name(".1f.tmp").write_bytes(b"")  # of a daemon that was killed
    read = LocalTier.read_small

    def refused(self: LocalTier, key: str, *limit: int) -> bytes:
        if key == layout.health(JOB, versions[0]):
            raise UnavailableError("input/output error")
        return read(self, key, *limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalTier, "read_small", refused)
        records, unread = read_records(lab.app.tier1)
    assert sorted(records) == [(JOB, version) for version in versions[1:]]
    assert unread == [layout.health(JOB, versions[0])]


async def test_when_the_last_version_is_passed_over_the_one_before_it_reaches_tier2_too(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    (rank,) = await Rank.launch(lab)
    sound, marked = await rank.save(PARTS), await rank.save(PARTS)
    lab.app.health.mark(lab.version(marked), "its loss exploded")
    rank.leave()
    await lab.app.persistence.request_newest(JOB)
    for version in (marked, sound):
        await lab.reaches(version, Tier.TIER2)


async def test_a_bad_sector_is_damage_like_any_other(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await saved(lab)
    await lab.restart(run=False)
    await lab.app.inventory.refresh_all()
    bad, really = lab.file(version, "model.pt").stat().st_ino, OsFileSystem.pread_into

    def refused(self: OsFileSystem, fd: int, buffer: memoryview, offset: int) -> int:
        if os.fstat(fd).st_ino == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return really(self, fd, buffer, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OsFileSystem, "pread_into", refused)
        (step,) = [step async for step in lab.app.verification.verify([lab.version(version)], deep=True)][:1]
        assert step.findings
        lab.go()
        await lab.reaches(version, Tier.TIER1)
    assert lab.file(version, "model.pt").read_bytes() == PARTS["model.pt"]


async def test_a_repair_believes_the_disk_and_not_the_page_cache(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await saved(lab)
    await lab.restart(run=False)
    await lab.app.inventory.refresh_all()
    path = lab.file(version, "model.pt")
    flip(path)
    with pytest.MonkeyPatch.context() as patch:
        still_cached(patch, path, PARTS["model.pt"])
        lab.app.catalog.set_damaged(lab.version(version), Tier.TIER1, "model.pt: block 0")  # says the scrubber
        lab.go()
        await lab.reaches(version, Tier.TIER1)
    assert path.read_bytes() == PARTS["model.pt"]
    assert lab.events("copy_quarantined")


async def test_no_version_is_given_up_for_a_repair(make_lab: MakeLab) -> None:
    lab = await make_lab(tier1_limit_bytes=35_000, num_of_version_in_retention=5, **STILL)
    (rank,) = await Rank.launch(lab)
    only_here = await rank.save({"a": bytes(10_000)})
    both, newest = await rank.save({"a": bytes(10_000)}, persist=True), await rank.save({"a": bytes(10_000)})
    await lab.reaches(both, Tier.TIER2)
    await lab.reaches(newest, Tier.TIER1)
    flip(lab.file(both, "a"))
    lab.app.catalog.set_damaged(lab.version(both), Tier.TIER1, "a: block 0")
    await eventually(lambda: lab.events("copy_repaired") or lab.events("repair_failed"))
    assert lab.version(both).has(Tier.TIER1), "its bytes counted already"
    assert lab.version(only_here).has(Tier.TIER1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalTier, "free_bytes", lambda _: 0)
        with pytest.raises(OverloadedError):
            await lab.app.keeper.make_room(1, JOB, deleting=False)
    assert lab.version(only_here).has(Tier.TIER1)


async def test_a_process_that_loads_again_and_again_has_not_died(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, pass_over_after_resumes=2, **STILL)
    version = await saved(lab, persist=False)
    client = lab.app.clients.connect(0, 0, 1)
    for number in range(4):  # one that evaluates, say, or that rolls back
        assert await lab.app.health.resume_began(client.number, lab.version(version), f"load {number}") == 0
        lab.app.health.judge(JOB)
    assert not lab.version(version).passed_over
    lab.app._on_client_gone(client)
    again = lab.app.clients.connect(0, 0, 1)
    assert await lab.app.health.resume_began(again.number, lab.version(version), "after it died") == 1


async def test_a_bucket_folder_that_is_gone_condemns_no_copy(make_lab: MakeLab) -> None:
    """A file system that was unmounted: nothing in it is missing, however much cannot be found."""
    lab = await make_lab(**STILL)
    version = await saved(lab)
    lab.bucket_path.rename(lab.bucket_path.with_name("away"))
    lab.bucket_path.mkdir()  # what was below the mount
    with pytest.raises(UnavailableError, match="another one"):
        [step async for step in lab.app.verification.verify([lab.version(version)], deep=True)]
    store = (await lab.bucket()).store
    key = layout.Bucket.partition(JOB, version, "model.pt")
    for look in (lambda: store.info(key), lambda: store.get(key, 10), lambda: store.read_into(key, 0, memoryview(b""))):
        with pytest.raises(UnavailableError, match="another one"):
            look()
    assert not damaged(lab, version, Tier.TIER2)
