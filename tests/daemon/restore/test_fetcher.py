"""Restoring: from the nearest tier, never wrong bytes; what is damaged is set aside, counted and made again."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cairn_api.errors import CairnError, ConfigurationError, OverloadedError, UnavailableError, VersionError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.catalog.leases import Lease
from cairnd.digests import Digest
from cairnd.model import CopyState, Tier
from cairnd.restore.fetcher import Progress
from cairnd.tiers.object_store import ObjectStore
from cairnd.upkeep.keeper import Deletion
from cairnd.upkeep.links import remove_links
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, Lab, Rank, eventually, gone
from tests.daemon.replication.stores import LosesReplies
from tests.daemon.replication.test_replicator import flip
from tests.daemon.tiers.rigged import RiggedFileSystem, failing

PARTS = {"model.pt": b"weights" * 1000, "zero/optim.pt": b"moments" * 3000}


class Reader:
    """A client that restores."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.client = lab.app.clients.connect(0, 0, os.getpid())

    async def fetch(self, version: VersionId, *paths: str, source: str = "") -> Progress:
        found = self.lab.version(version)
        steps = [step async for step in self.lab.app.fetcher.fetch(self.client.number, found, paths, source=source)]
        return steps[-1]

    def lease(self, progress: Progress) -> Lease:
        return self.lab.app.leases.get(progress.lease, self.client.number)

    def read(self, progress: Progress) -> dict[str, bytes]:
        found = {}
        for item in progress.ready:
            fd, fetched = self.lab.app.fetcher.open(self.lease(progress), item.path)
            try:
                found[item.path] = os.pread(fd, fetched.size_bytes, 0)
                with pytest.raises(OSError, match="Bad file"):
                    os.pwrite(fd, b"x", 0)
            finally:
                os.close(fd)
        return found

    def leave(self) -> None:
        self.lab.app.clients.disconnect(self.client)
        self.lab.app._on_client_gone(self.client)


async def stored(lab: Lab) -> VersionId:
    """One version in memory, tier 1 and tier 2."""
    (rank,) = await Rank.launch(lab)
    version = await rank.save(PARTS, persist=True)
    await lab.reaches(version, Tier.TIER2)
    return version


async def lose_memory(lab: Lab) -> None:
    """The daemon starts anew: what it had in memory is gone."""
    await lab.restart()
    await eventually(lambda: any(version.has(Tier.TIER2) for version in lab.app.catalog.versions(JOB)))


async def lose_tier1(lab: Lab) -> None:
    """A new machine: only the bucket is left."""
    await lab.close()
    shutil.rmtree(lab.tier1)
    lab.app = lab._new_app()
    await lab.start()
    await eventually(lambda: any(version.has(Tier.TIER2) for version in lab.app.catalog.versions(JOB)))


def verify_failures(lab: Lab, tier: str) -> float:
    return float(lab.app.metrics.verify_failures.labels(tier)._value.get())


async def test_the_nearest_tier_serves(lab: Lab) -> None:
    version = await stored(lab)
    reader = Reader(lab)
    progress = await reader.fetch(version)
    assert {item.origin for item in progress.ready} == {Tier.MEMORY}
    assert reader.read(progress) == PARTS
    assert (progress.done_bytes, progress.total_bytes) == (sum(map(len, PARTS.values())),) * 2
    await lose_memory(lab)
    reader = Reader(lab)
    progress = await reader.fetch(version)
    assert {item.origin for item in progress.ready} == {Tier.TIER1}
    assert reader.read(progress) == PARTS
    await lab.close()
    shutil.rmtree(lab.tier1)
    lab.app = lab._new_app()
    await lab.start()
    await eventually(lambda: lab.app.catalog.get(JOB, version))
    reader = Reader(lab)
    progress = await reader.fetch(version)
    assert {(item.tier, item.origin) for item in progress.ready} == {(Tier.TIER1, Tier.TIER2)}
    assert reader.read(progress) == PARTS
    assert lab.version(version).has(Tier.TIER1)  # it has a proper copy there again
    await lab.restart()
    assert lab.version(version).has(Tier.TIER1)


async def test_bytes_that_changed_in_memory_are_not_served(lab: Lab) -> None:
    version = await stored(lab)
    for segment in lab.app.memory.of_version(JOB, version):
        with segment.view(1) as view:  # as a hostile owner could
            view[0] ^= 1
    reader = Reader(lab)
    progress = await reader.fetch(version)
    assert {item.origin for item in progress.ready} == {Tier.TIER1}
    assert reader.read(progress) == PARTS
    assert verify_failures(lab, "memory") > 0
    assert lab.version(version).copy(Tier.MEMORY).state is CopyState.FAILED


async def test_a_flipped_bit_in_tier1_is_set_aside_and_made_good_from_tier2(lab: Lab) -> None:
    version = await stored(lab)
    await lose_memory(lab)
    flip(lab.file(version, "model.pt"))
    reader = Reader(lab)
    progress = await reader.fetch(version)
    assert {item.path: item.origin for item in progress.ready} == {"model.pt": Tier.TIER2, "zero/optim.pt": Tier.TIER1}
    assert reader.read(progress) == PARTS
    (moved,) = (lab.tier1 / layout.QUARANTINE).rglob("model.pt")
    assert moved.read_bytes() != PARTS["model.pt"]
    assert lab.file(version, "model.pt").read_bytes() == PARTS["model.pt"]
    await lab.reaches(version, Tier.TIER1)  # once a repair has read what was not written anew
    assert verify_failures(lab, "tier1") == 1
    assert lab.events("copy_quarantined")


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
async def test_damage_in_every_tier_is_an_error_that_names_it(lab: Lab, damage: str) -> None:
    version = await stored(lab)
    await lose_memory(lab)
    flip(lab.file(version, "model.pt"))
    target = lab.object(version, "model.pt")
    if damage == "flip":
        flip(target)
    elif damage == "cut":
        target.chmod(0o600)
        os.truncate(target, 10)
    else:
        target.unlink()
    reader = Reader(lab)
    with pytest.raises(VersionError, match=r"no intact copy of model\.pt") as caught:
        await reader.fetch(version)
    assert "tier 1" in caught.value.message
    assert caught.value.context["partition"] == "model.pt"
    assert "cairn list" in caught.value.hint
    assert verify_failures(lab, "tier1") == 1
    assert verify_failures(lab, "tier2") == 1
    assert lab.version(version).copy(Tier.TIER2).state is CopyState.FAILED
    await lab.app.inventory.refresh(JOB)
    assert lab.version(version).copy(Tier.TIER2).state is CopyState.FAILED  # a look at the keys does not acquit it
    assert lab.app.leases.of_client(reader.client.number) == []
    assert not lab.file(version, "model.pt").exists()


async def test_a_file_that_is_missing_in_tier1_comes_from_tier2(lab: Lab) -> None:
    version = await stored(lab)
    await lose_memory(lab)
    lab.file(version, "zero/optim.pt").unlink()
    reader = Reader(lab)
    assert reader.read(await reader.fetch(version)) == PARTS
    assert lab.file(version, "zero/optim.pt").exists()


async def test_a_file_that_is_missing_everywhere_is_told(make_lab: MakeLab) -> None:
    lab = await make_lab(bucket=False)
    (rank,) = await Rank.launch(lab)
    version = await rank.save(PARTS)
    await lab.restart()
    lab.file(version, "model.pt").unlink()
    with pytest.raises(VersionError, match=r"model\.pt is missing"):
        await Reader(lab).fetch(version)


async def test_part_of_a_version_is_no_damage(lab: Lab) -> None:
    version = await stored(lab)
    await lab.close()
    shutil.rmtree(lab.tier1)
    lab.app = lab._new_app()
    await lab.start()
    await eventually(lambda: lab.app.catalog.get(JOB, version))
    reader = Reader(lab)
    progress = await reader.fetch(version, "model.pt")
    assert reader.read(progress) == {"model.pt": PARTS["model.pt"]}
    assert not lab.version(version).has(Tier.TIER1)
    assert verify_failures(lab, "tier1") == 0
    await reader.fetch(version, "zero/optim.pt")
    assert lab.version(version).has(Tier.TIER1)  # now all of it is here


async def test_running_out_of_descriptors_is_not_damage(lab: Lab) -> None:
    version = await stored(lab)
    await lose_memory(lab)
    lab.app.tier1._fs = RiggedFileSystem(lab.tier1, failing("open", errno.EMFILE, name="model.pt"))
    with pytest.raises(OverloadedError):
        await Reader(lab).fetch(version)
    assert lab.version(version).has(Tier.TIER1)
    assert verify_failures(lab, "tier1") == 0
    reader = Reader(lab)
    assert reader.read(await reader.fetch(version)) == PARTS


async def test_a_bucket_that_is_away_is_not_damage(make_lab: MakeLab) -> None:
    stores: list[LosesReplies] = []

    def wrap(store: ObjectStore) -> ObjectStore:
        stores.append(LosesReplies(store))
        return stores[-1]

    lab = await make_lab(wrap_store=wrap)
    version = await stored(lab)
    await lose_memory(lab)
    flip(lab.file(version, "model.pt"))
    stores[-1].away = True
    with pytest.raises(UnavailableError):
        await Reader(lab).fetch(version)
    assert lab.version(version).has(Tier.TIER2)
    stores[-1].away = False
    reader = Reader(lab)
    assert reader.read(await reader.fetch(version)) == PARTS


async def test_many_readers_share_one_download(make_lab: MakeLab) -> None:
    stores: list[LosesReplies] = []

    def wrap(store: ObjectStore) -> ObjectStore:
        stores.append(LosesReplies(store))
        return stores[-1]

    lab = await make_lab(wrap_store=wrap)
    version = await stored(lab)
    await lab.close()
    shutil.rmtree(lab.tier1)
    lab.app = lab._new_app()
    await lab.start()
    await eventually(lambda: lab.app.catalog.get(JOB, version))
    readers = [Reader(lab) for _ in range(6)]
    fetched = await asyncio.gather(*[reader.fetch(version) for reader in readers])
    for reader, progress in zip(readers, fetched, strict=True):
        assert reader.read(progress) == PARTS
    assert stores[-1].calls.count("read_into") == len(PARTS)


async def test_another_bucket_is_read_by_many_and_leaves_this_ones_versions_alone(
    make_lab: MakeLab, tmp_path: Path
) -> None:
    origin = await make_lab(folder=tmp_path / "origin")
    version = await stored(origin)
    source = origin.settings.persistent_storage_path
    lab = await make_lab(folder=tmp_path / "here", allowed_storage_locations=(source,))
    (rank,) = await Rank.launch(lab)
    mine = await rank.save({"model.pt": b"mine", "zero/optim.pt": b"mine"}, tag=version.tag)
    assert mine == version  # the same name, other bytes
    (found,), claim, damaged = await lab.app.inventory.read_source(source, JOB)
    assert not damaged
    assert claim is not None
    readers = [Reader(lab) for _ in range(4)]

    async def fetch(reader: Reader) -> Progress:
        steps = [step async for step in lab.app.fetcher.fetch(reader.client.number, found, (), source=source)]
        return steps[-1]

    fetched = await asyncio.gather(*[fetch(reader) for reader in readers])
    for reader, progress in zip(readers, fetched, strict=True):
        assert reader.read(progress) == PARTS
    assert lab.file(mine, "model.pt").read_bytes() == b"mine"
    fetched_file = lab.tier1 / layout.fetched(source, JOB, version, "model.pt")
    for reader in readers:
        assert fetched_file.exists()
        reader.leave()
    await eventually(lambda: not fetched_file.parent.exists())
    assert lab.file(mine, "model.pt").read_bytes() == b"mine"
    with pytest.raises(ConfigurationError, match="does not allow"):
        await lab.app.inventory.read_source(f"file://{tmp_path}/elsewhere", JOB)
    await lab.restart()
    assert not (lab.tier1 / layout.FETCHED).exists()


async def test_a_download_whose_caller_left_cannot_spoil_the_next(make_lab: MakeLab) -> None:
    lab = await make_lab()
    version = await stored(lab)
    await lab.close()
    shutil.rmtree(lab.tier1)
    lab.app = lab._new_app()
    await lab.start()
    await eventually(lambda: lab.app.catalog.get(JOB, version))
    for _ in range(10):
        task = asyncio.ensure_future(Reader(lab).fetch(version))
        await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    reader = Reader(lab)
    assert reader.read(await reader.fetch(version)) == PARTS
    assert all(lab.file(version, name).read_bytes() == data for name, data in PARTS.items())


async def test_a_lease_protects_from_deletion_and_ends_with_its_client(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=1)
    (rank,) = await Rank.launch(lab)
    version = await rank.save(PARTS)
    reader = Reader(lab)
    progress = await reader.fetch(version)
    for _ in range(2):
        await rank.save()
    await lab.app.keeper.apply(JOB)
    assert lab.file(version, "model.pt").exists()
    assert reader.read(progress) == PARTS
    lease = reader.lease(progress)
    other = Reader(lab)
    with pytest.raises(ConfigurationError, match="lease"):
        other.lease(progress)
    reader.leave()
    with pytest.raises(ConfigurationError, match="lease"):
        reader.lease(progress)
    lab.app.fetcher.end(lease)  # ended already: nothing happens twice
    assert all(segment.readers == 0 for segment in lab.app.memory.segments.values())
    await lab.app.keeper.apply(JOB)
    await eventually(lambda: gone(lab, version))


async def test_an_open_descriptor_outlives_the_version(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=1)
    (rank,) = await Rank.launch(lab)
    version = await rank.save(PARTS)
    await lab.restart()
    reader = Reader(lab)
    progress = await reader.fetch(version)
    fd, _ = lab.app.fetcher.open(reader.lease(progress), "model.pt")
    reader.leave()
    (rank,) = await Rank.launch(lab)
    for _ in range(2):
        await rank.save()
    await eventually(lambda: gone(lab, version))
    assert os.pread(fd, 1 << 20, 0) == PARTS["model.pt"]
    os.close(fd)


async def test_what_was_not_fetched_cannot_be_opened(lab: Lab) -> None:
    version = await stored(lab)
    reader = Reader(lab)
    progress = await reader.fetch(version, "model.pt")
    for path in ("zero/optim.pt", "../../x", "", ".cairn/manifest.json", "/etc/passwd"):
        with pytest.raises(VersionError, match="not fetched"):
            lab.app.fetcher.open(reader.lease(progress), path)
    with pytest.raises(VersionError, match="has no partition 'nope'"):
        await reader.fetch(version, "nope")


async def test_open_and_aborted_versions_are_not_served(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    version = rank.next()
    rank.create(version)
    rank.seal(version, "a", b"x")
    with pytest.raises(VersionError, match="is open"):
        await Reader(lab).fetch(version)
    lab.app.saves.abort(lab.version(version), "gave up")
    with pytest.raises(VersionError, match="gave up"):
        await Reader(lab).fetch(version)


async def test_a_sealed_version_is_waited_for(make_lab: MakeLab) -> None:
    lab = await make_lab(run=False)
    (rank,) = await Rank.launch(lab)
    version = rank.next()
    rank.create(version)
    rank.seal(version, "a", b"x")
    await rank.prepare(version, ["a"])
    rank.commit(version)
    reader = Reader(lab)
    fetching = asyncio.ensure_future(reader.fetch(version))
    await lab.settle()
    assert not fetching.done()
    lab.go()
    assert reader.read(await fetching) == {"a": b"x"}


@pytest.mark.parametrize("always", [False, True])
async def test_a_file_is_hashed_once_per_start_or_at_every_load(make_lab: MakeLab, always: bool) -> None:
    lab = await make_lab(verify_on_load="always" if always else "cached", bucket=False)
    (rank,) = await Rank.launch(lab)
    version = await rank.save(PARTS)
    await lab.restart()
    hashed: list[str] = []
    real = lab.app.verified._digest

    def counted(key: str, size_bytes: int, progress: Callable[[int], None]) -> Digest:
        hashed.append(key)
        return real(key, size_bytes, progress)

    lab.app.verified._digest = counted  # type: ignore[method-assign]
    for _ in range(3):
        await Reader(lab).fetch(version)
    assert len(hashed) == (6 if always else 2)
    flip(lab.file(version, "model.pt"))  # its identity (mtime) changed
    with pytest.raises(CairnError):
        await Reader(lab).fetch(version)


async def test_a_restore_waits_for_a_deletion_of_its_version_that_has_begun(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = await make_lab(num_of_version_in_retention=1)
    version = await stored(lab)
    await lose_memory(lab)
    at_the_files, go_on = asyncio.Event(), asyncio.Event()
    run = lab.app.keeper._disk.run

    async def held_up(function: Callable[..., Any], *arguments: Any) -> Any:
        if function is remove_links:
            at_the_files.set()
            await go_on.wait()
        return await run(function, *arguments)

    monkeypatch.setattr(lab.app.keeper._disk, "run", held_up)
    deleting = asyncio.ensure_future(lab.app.keeper.delete([Deletion(lab.version(version), Tier.TIER1, "asked for")]))
    await at_the_files.wait()
    reader = Reader(lab)
    fetching = asyncio.ensure_future(reader.fetch(version))
    await lab.settle()
    assert not fetching.done()  # it would be given files that are about to go
    go_on.set()
    assert await deleting
    progress = await fetching
    assert reader.read(progress) == PARTS
    reader.lab.app.fetcher.end(reader.lease(progress))
