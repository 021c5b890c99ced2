"""What a restore tells while it is under way, and what it leaves when it ends."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from cairnd import layout
from cairnd.digests import BLOCK_BYTES
from cairnd.model import CopyState, Tier
from cairnd.restore import pace
from cairnd.restore.fetcher import Progress
from cairnd.tiers.local import LocalTier
from cairnd.tiers.object_store import ObjectStore
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, Lab, Rank, eventually
from tests.daemon.replication.stores import LosesReplies
from tests.daemon.replication.test_replicator import flip
from tests.daemon.restore.test_fetcher import PARTS, Reader, lose_memory, lose_tier1, stored


class Gated(LosesReplies):
    """Gives one block of an object for each ``gate.release()``."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store)
        self.gate = threading.Semaphore(0)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        assert self.gate.acquire(timeout=60)
        super().read_into(key, offset, buffer)


@pytest.fixture
def fast_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "HEARTBEAT_S", 0.01)


@pytest.mark.usefixtures("fast_heartbeat")
async def test_progress_is_told_while_a_large_partition_comes(make_lab: MakeLab) -> None:
    stores: list[Gated] = []

    def wrap(store: ObjectStore) -> ObjectStore:
        stores.append(Gated(store))
        return stores[-1]

    lab = await make_lab(wrap_store=wrap)
    (rank,) = await Rank.launch(lab)
    data = os.urandom(2 * BLOCK_BYTES + 5)
    version = await rank.save({"model.pt": data}, persist=True)
    await lab.reaches(version, Tier.TIER2)
    await lose_tier1(lab)
    reader = Reader(lab)
    found = lab.version(version)
    steps: list[Progress] = []
    async for step in lab.app.fetcher.fetch(reader.client.number, found, ()):
        if not steps or step.done_bytes > steps[-1].done_bytes:
            stores[-1].gate.release()
        steps.append(step)
    assert reader.read(steps[-1]) == {"model.pt": data}
    told = [step.done_bytes for step in steps]
    assert told == sorted(told)
    assert {0, BLOCK_BYTES, 2 * BLOCK_BYTES, len(data)} == set(told)


@pytest.mark.usefixtures("fast_heartbeat")
async def test_progress_is_told_while_a_sealed_version_is_waited_for(make_lab: MakeLab) -> None:
    lab = await make_lab(run=False)
    (rank,) = await Rank.launch(lab)
    version = rank.next()
    rank.create(version)
    rank.seal(version, "a", b"x")
    await rank.prepare(version, ["a"])
    rank.commit(version)
    reader = Reader(lab)
    steps: list[Progress] = []

    async def fetch() -> None:
        async for step in lab.app.fetcher.fetch(reader.client.number, lab.version(version), ()):
            steps.append(step)  # noqa: PERF401 - looked at meanwhile

    fetching = asyncio.ensure_future(fetch())
    await lab.passes(lambda: len(steps) >= 3)
    assert not fetching.done()
    lab.go()
    await fetching
    assert reader.read(steps[-1]) == {"a": b"x"}


@pytest.mark.parametrize("client_dies", [False, True])
async def test_a_part_of_a_version_goes_with_its_last_restore(lab: Lab, client_dies: bool) -> None:
    version = await stored(lab)
    await lose_tier1(lab)
    first, second = Reader(lab), Reader(lab)
    one = await first.fetch(version, "model.pt")
    two = await second.fetch(version, "model.pt")
    lab.app.fetcher.end(first.lease(one))
    await lab.settle()
    assert second.read(two) == {"model.pt": PARTS["model.pt"]}
    if client_dies:
        second.leave()
    else:
        lab.app.fetcher.end(second.lease(two))
    await eventually(lambda: not lab.file(version, "model.pt").parent.exists())
    assert lab.version(version).has(Tier.TIER2)
    await eventually(lambda: len(lab.app.fetcher._locks) == 0)
    again = Reader(lab)
    assert again.read(await again.fetch(version)) == PARTS


async def test_a_proper_copy_stays_when_its_restore_ends(lab: Lab) -> None:
    version = await stored(lab)
    await lose_tier1(lab)
    reader = Reader(lab)
    part = await reader.fetch(version, "model.pt")
    whole = await reader.fetch(version)
    for progress in (part, whole):
        lab.app.fetcher.end(reader.lease(progress))
    await eventually(lambda: not lab.app.fetcher._partials._folders)
    assert lab.version(version).has(Tier.TIER1)
    assert {name: lab.file(version, name).read_bytes() for name in PARTS} == PARTS


async def test_a_damaged_copy_is_not_taken_for_a_part(lab: Lab) -> None:
    version = await stored(lab)
    await lose_memory(lab)
    flip(lab.file(version, "model.pt"))
    flip(lab.file(version, "zero/optim.pt"))
    reader = Reader(lab)
    progress = await reader.fetch(version, "model.pt")
    assert lab.version(version).copy(Tier.TIER1).state is CopyState.FAILED
    lab.app.fetcher.end(reader.lease(progress))
    await eventually(lambda: not lab.app.fetcher._partials._folders)
    assert (lab.tier1 / layout.manifest(JOB, version)).exists()
    assert lab.file(version, "zero/optim.pt").exists()


async def test_a_fetch_that_is_given_up_leaves_nothing(make_lab: MakeLab) -> None:
    stores: list[Gated] = []

    def wrap(store: ObjectStore) -> ObjectStore:
        stores.append(Gated(store))
        return stores[-1]

    lab = await make_lab(wrap_store=wrap)
    version = await stored(lab)
    await lose_tier1(lab)
    reader = Reader(lab)
    fetching = asyncio.ensure_future(reader.fetch(version))
    folder = lab.tier1 / layout.incoming_folder(JOB, version)
    await eventually(lambda: folder.exists() and len(list(folder.iterdir())) == len(PARTS))
    reader.leave()  # its process died; the call's cancellation follows
    fetching.cancel()
    await lab.settle()
    assert folder.exists()  # threads still read
    for _ in PARTS:
        stores[-1].gate.release()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    await eventually(lambda: not lab.file(version, "model.pt").parent.exists())


async def test_a_fetch_that_is_given_up_while_its_copy_is_published_leaves_a_whole_copy(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tidied away under the manifest, the version would be listed without its data."""
    version = await stored(lab)
    await lose_tier1(lab)
    begun, go_on, put = threading.Event(), threading.Event(), LocalTier.put_small

    def slow(self: LocalTier, key: str, data: bytes) -> None:
        if key == layout.manifest(JOB, version):
            begun.set()
            assert go_on.wait(60)
        put(self, key, data)

    monkeypatch.setattr(LocalTier, "put_small", slow)
    reader = Reader(lab)
    fetching = asyncio.ensure_future(reader.fetch(version))
    await eventually(begun.is_set)
    reader.leave()
    fetching.cancel()
    await lab.settle()
    assert lab.file(version, "model.pt").exists(), "whatever else happens waits for the manifest"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    await eventually(lambda: lab.version(version).has(Tier.TIER1))
    assert {name: lab.file(version, name).read_bytes() for name in PARTS} == PARTS
