"""Looks at copies: what they find is about the copy that is there, and what keeps them from looking is no damage."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from cairn_api.errors import CairnError, ConfigurationError, UnavailableError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.catalog.health import Health
from cairnd.catalog.verified import DamagedError
from cairnd.model import CopyState, Tier
from cairnd.tiers.filesystem import AnyPath, OsFileSystem
from cairnd.upkeep.keeper import Deletion
from cairnd.upkeep.verification import Step
from cairnd.upkeep.verifier import Finding, compare_block
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, Lab, Rank, eventually, gone
from tests.daemon.replication.test_replicator import flip
from tests.daemon.upkeep.test_health import PARTS, SCRUBS, STILL, damaged, saved

TIERS = (Tier.TIER1, Tier.TIER2)
Look = Callable[[Lab, VersionId], Awaitable[list[str]]]


async def steps(lab: Lab, *versions: VersionId, deep: bool = True) -> list[Step]:
    found = [lab.version(version) for version in versions] or list(lab.app.catalog.versions(JOB))
    return [step async for step in lab.app.verification.verify(found, deep=deep)]


async def verify(lab: Lab, version: VersionId) -> list[str]:
    return [finding.text for step in await steps(lab, version) for finding in step.findings]


async def scrub(lab: Lab, version: VersionId) -> list[str]:
    """All copies once, by a daemon that scrubs nothing by itself."""
    tiers = {tier for tier in TIERS if lab.version(version).has(tier)}
    lab.app.scrubber._budgets = dict.fromkeys(tiers, 1 << 30)
    scrubbing = asyncio.ensure_future(lab.app.scrubber.run())
    await lab.passes(lambda: {event.fields["tier"] for event in lab.events("scrubbed")} == tiers)
    scrubbing.cancel()
    await asyncio.gather(scrubbing, return_exceptions=True)
    return [event.text() for event in lab.events("scrub_failed")]


looks = pytest.mark.parametrize("look", [verify, scrub])


def uncounted(lab: Lab) -> bool:
    return all(lab.app.metrics.verify_failures.labels(tier)._value.get() == 0 for tier in TIERS)


@asynccontextmanager
async def deletion_held(lab: Lab, version: VersionId) -> AsyncIterator[None]:
    """A deletion of the tier 1 copy that stops between the manifest, which is gone, and the data."""
    run, begun, go_on = lab.app._disk.run, asyncio.Event(), asyncio.Event()

    async def held(function: Callable[..., Any], *arguments: Any) -> Any:
        if function.__name__ == "delete_tree":
            begun.set()
            await go_on.wait()
        return await run(function, *arguments)

    lab.app._disk.run = held  # type: ignore[method-assign]
    deletion = Deletion(lab.version(version), Tier.TIER1, "older than the newest")
    deleting = asyncio.ensure_future(lab.app.keeper.delete([deletion]))
    await begun.wait()
    try:
        yield
    finally:
        go_on.set()
        assert await deleting == [deletion]
        lab.app._disk.run = run  # type: ignore[method-assign]


@looks
async def test_a_copy_that_is_being_deleted_is_not_damaged(make_lab: MakeLab, look: Look) -> None:
    lab = await make_lab(num_of_version_in_retention=5, **STILL)
    version, _ = await saved(lab), await saved(lab)
    async with deletion_held(lab, version):
        assert await look(lab, version) == []
        assert not damaged(lab, version, Tier.TIER1)
    await lab.settle()
    assert gone(lab, version)
    assert uncounted(lab)
    assert not lab.events("copy_repaired")
    assert lab.version(version).has(Tier.TIER2)


@looks
@pytest.mark.parametrize("swept", [False, True])
async def test_a_version_that_another_daemon_deleted_is_not_damaged(
    make_lab: MakeLab, look: Look, *, swept: bool
) -> None:
    lab = await make_lab(num_of_version_in_retention=5, **STILL)
    version = await saved(lab)
    bucket = await lab.bucket()
    bucket.mark_deleted(JOB, version, 1.0)
    if swept:
        bucket.delete_data(JOB, version)
    assert lab.version(version).has(Tier.TIER2), "it has not heard of that yet"
    assert await look(lab, version) == []
    assert not damaged(lab, version, Tier.TIER2)
    assert uncounted(lab)


@looks
@pytest.mark.parametrize("call", ["info", "read_into"])
async def test_data_that_goes_during_a_look_was_deleted(make_lab: MakeLab, look: Look, call: str) -> None:
    lab = await make_lab(**STILL)
    version = await saved(lab)
    bucket = await lab.bucket()
    really = getattr(bucket.store, call)

    def overtaken(key: str, *arguments: Any) -> Any:  # the decision was read: committed
        if (lab.bucket_path / key).exists():
            bucket.mark_deleted(JOB, version, 1.0)
            bucket.delete_data(JOB, version)
        return really(key, *arguments)

    setattr(bucket.store, call, overtaken)
    assert await look(lab, version) == []
    assert not lab.object(version, "model.pt").exists()
    assert not damaged(lab, version, Tier.TIER2)
    assert uncounted(lab)


@pytest.mark.parametrize("tier", TIERS)
async def test_what_was_found_of_a_copy_does_not_condemn_the_one_made_after_it(make_lab: MakeLab, tier: Tier) -> None:
    lab = await make_lab(**STILL)
    version = await saved(lab)
    found = lab.version(version)
    flip(lab.file(version, "model.pt") if tier is Tier.TIER1 else lab.object(version, "model.pt"))
    run = lab.app._workers.run

    async def overtaken(function: Callable[..., Any], *arguments: Any) -> Any:
        result = await run(function, *arguments)
        if getattr(function, "__name__", "") == "extend":  # the look has ended
            lab.app.catalog.set_copy(found, tier, CopyState.EVICTED)
            lab.app.catalog.set_copy(found, tier, CopyState.VERIFIED)
        return result

    lab.app.verification._workers = Mock(run=overtaken)
    assert await verify(lab, version) == []
    assert found.has(tier)
    lab.app.verification._workers = lab.app._workers
    assert await verify(lab, version) == ["model.pt: block 0 does not match its digest"]


CANNOT_LOOK = (errno.EACCES, errno.ETIMEDOUT, errno.ESTALE, errno.EINTR, errno.EAGAIN)


@pytest.mark.parametrize("code", CANNOT_LOOK, ids=[errno.errorcode[code] for code in CANNOT_LOOK])
async def test_a_file_that_nobody_could_open_is_not_damaged(make_lab: MakeLab, code: int) -> None:
    lab = await make_lab(bucket=False, **STILL)
    version = await saved(lab, persist=False)
    await lab.restart()
    name, really = str(lab.file(version, "model.pt")), OsFileSystem.open
    partition = next(item for item in lab.version(version).partitions if item.path == "model.pt")

    def refused(self: OsFileSystem, path: AnyPath, flags: int, mode: int = 0o600) -> int:
        if os.fspath(path) == name:
            raise OSError(code, os.strerror(code))
        return really(self, path, flags, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OsFileSystem, "open", refused)
        with pytest.raises(CairnError, match="cannot open") as raised:
            lab.app.verified.check(layout.partition(JOB, version, "model.pt"), partition)
        assert not isinstance(raised.value, DamagedError)
        with pytest.raises(type(raised.value), match=f"could not look at {version} in tier1"):
            await verify(lab, version)
        assert any(os.strerror(code) in told for told in await scrub(lab, version))
    with pytest.raises(type(raised.value)):
        compare_block(partition, 0, Mock(side_effect=OSError(code, "")), memoryview(bytearray(partition.size_bytes)))
    assert lab.version(version).has(Tier.TIER1)
    assert uncounted(lab)
    assert await verify(lab, version) == []


@pytest.mark.parametrize("call", ["open", "pread_into"])
@pytest.mark.parametrize("tier", TIERS)
async def test_a_rotten_file_is_found_by_scrubbing_in_either_tier(make_lab: MakeLab, tier: Tier, call: str) -> None:
    lab = await make_lab(**SCRUBS)
    version = await saved(lab)
    path = lab.file(version, "model.pt") if tier is Tier.TIER1 else lab.object(version, "model.pt")
    bad, really = path.stat().st_ino, getattr(OsFileSystem, call)

    def refused(self: OsFileSystem, target: Any, *arguments: Any) -> Any:
        if (os.fspath(target) == str(path)) if call == "open" else (os.fstat(target).st_ino == bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return really(self, target, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OsFileSystem, call, refused)
        failures = lab.app.metrics.verify_failures.labels(tier)._value
        await lab.passes(lambda: failures.get() >= 1, limit_s=600.0)
    assert any("Input/output error" in event.text() for event in lab.events("copy_failed"))


async def test_a_look_that_nobody_waits_for_ends_at_its_next_block(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, **STILL)
    (rank,) = await Rank.launch(lab)
    version = await rank.save({f"part{number}": bytes(4096) for number in range(50)})
    really, read, reads, go_on = OsFileSystem.pread_into, asyncio.Event(), 0, threading.Event()
    loop = asyncio.get_running_loop()

    def counted(self: OsFileSystem, fd: int, buffer: memoryview, offset: int) -> int:
        nonlocal reads
        if "/part" in os.fspath(Path(f"/proc/self/fd/{fd}").readlink()):
            reads += 1
            loop.call_soon_threadsafe(read.set)
            go_on.wait()
        return really(self, fd, buffer, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OsFileSystem, "pread_into", counted)
        looking = lab.app.verification.verify([lab.version(version)], deep=True)
        assert (await anext(looking)).copies == 0
        await read.wait()
        await looking.aclose()
        go_on.set()
        await lab.restart(run=False)  # threads end before that does
    assert reads == 1


async def three(lab: Lab) -> list[VersionId]:
    return [await saved(lab) for _ in range(3)]


async def test_a_bucket_that_is_away_keeps_nobody_from_looking_at_tier1(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=5, **STILL)
    oldest, middle, newest = await three(lab)
    flip(lab.file(oldest, "model.pt"))
    bucket = await lab.bucket()
    bucket.store.get = Mock(side_effect=UnavailableError("no answer", hint="wait"))  # type: ignore[method-assign]
    with pytest.raises(UnavailableError) as raised:
        await steps(lab)
    assert raised.value.message == (
        f"could not look at {newest} in tier2, {middle} in tier2, {oldest} in tier2: no answer"
    )
    assert raised.value.hint == "wait"
    assert bucket.store.get.call_count == 2, "who is silent twice is asked no more"
    assert damaged(lab, oldest, Tier.TIER1)
    assert not any(damaged(lab, version, Tier.TIER2) for version in (oldest, middle, newest))


async def test_one_object_that_cannot_be_read_keeps_nobody_from_looking_at_others(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=5, **STILL)
    oldest, middle, newest = await three(lab)
    flip(lab.object(oldest, "model.pt"))
    bucket = await lab.bucket()
    really = bucket.store.read_into

    def refused(key: str, offset: int, buffer: memoryview) -> None:
        if str(newest) in key:
            raise ConfigurationError("access denied", hint="look at the bucket's policy")
        really(key, offset, buffer)

    bucket.store.read_into = refused  # type: ignore[method-assign]
    findings: list[Finding] = []
    last = Step(0, 0)
    with pytest.raises(ConfigurationError, match=f"could not look at {newest} in tier2: access denied"):
        async for step in lab.app.verification.verify(list(lab.app.catalog.versions(JOB)), deep=True):
            findings += step.findings
            last = step
    assert [finding.id for finding in findings] == [oldest]
    assert (last.versions, last.copies) == (3, 5)
    assert not damaged(lab, middle, Tier.TIER2)


async def test_damage_counts_though_not_all_of_the_copy_could_be_looked_at(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await saved(lab)
    flip(lab.object(version, "model.pt"))
    bucket = await lab.bucket()
    really = bucket.store.info

    def info(key: str) -> Any:
        if key.endswith("optim.pt"):
            raise UnavailableError("no answer")
        return really(key)

    bucket.store.info = info  # type: ignore[method-assign]
    assert await verify(lab, version) == ["model.pt: block 0 does not match its digest"]
    assert lab.app.metrics.verify_failures.labels(Tier.TIER2)._value.get() == 1


async def test_a_tier2_that_is_not_configured_any_more_is_passed_over(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=5, **STILL)
    older, newer = await saved(lab), await saved(lab)
    await lab.close()
    lab.app.tier1.put_small(layout.health(JOB, newer), Health({Tier.TIER2: "model.pt: block 0"}).encode())
    lab.settings = replace(lab.settings, persistent_storage_path="")
    lab.app = lab._new_app()
    await lab.start()
    assert lab.version(newer).copy(Tier.TIER2).damaged
    flip(lab.file(older, "model.pt"))
    assert [finding.id for step in await steps(lab) for finding in step.findings] == [older]


async def test_saves_go_on_after_a_jobs_folder_was_deleted_by_hand(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False, **STILL)
    await saved(lab, persist=False)
    shutil.rmtree(lab.tier1 / layout.job_folder(JOB))
    (rank,) = await Rank.launch(lab)
    version = await rank.save(PARTS)
    assert {path: lab.file(version, path).read_bytes() for path in PARTS} == PARTS
    await eventually(lambda: lab.version(version).has(Tier.TIER1))
    await lab.restart()
    assert lab.version(version).has(Tier.TIER1)
