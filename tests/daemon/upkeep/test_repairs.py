"""Repairs of tier 1 beside what else happens to a copy: they make again what was lost here, and no more than that."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from cairn_api.names import VersionId
from cairnd import layout
from cairnd.catalog.hashing import Hashing
from cairnd.model import CopyState, Tier
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, Lab, Rank, eventually, gone
from tests.daemon.replication.test_replicator import flip

PARTS = {"model.pt": b"weights" * 1000, "zero/optim.pt": b"moments" * 3000}
STILL = {"scrub_bytes_per_s": 0}


async def saved(lab: Lab) -> VersionId:
    (rank,) = await Rank.launch(lab)
    version = await rank.save(PARTS, persist=True)
    await lab.reaches(version, Tier.TIER2)
    rank.leave()
    await lab.settle()
    return version


@pytest.mark.parametrize("tiers", [1, 2])
async def test_what_is_being_deleted_is_not_repaired_and_no_repair_keeps_it(make_lab: MakeLab, tiers: int) -> None:
    lab = await make_lab(num_of_version_in_retention=5, **STILL)
    version, _ = await saved(lab), await saved(lab)
    found, run = lab.version(version), lab.app._disk.run
    in_the_middle, go_on = asyncio.Event(), asyncio.Event()

    async def held_up(function: Callable[..., Any], *arguments: Any) -> Any:
        if function == lab.app.tier1.delete_tree:
            in_the_middle.set()
            await go_on.wait()
        return await run(function, *arguments)

    lab.app._disk.run = held_up  # type: ignore[method-assign]
    deleting = asyncio.ensure_future(lab.app.keeper.delete(lab.app.keeper.plan_version(found)[:tiers]))
    await in_the_middle.wait()
    lab.app.catalog.set_damaged(found, Tier.TIER1, "model.pt is missing")  # says whoever read it just now
    await lab.settle()
    go_on.set()
    assert [deletion.tier for deletion in await deleting] == [Tier.TIER1, Tier.TIER2][:tiers]
    await lab.settle()
    assert gone(lab, version)
    assert found.copy(Tier.TIER1).state is CopyState.EVICTED
    assert found.has(Tier.TIER2) is (tiers == 1)
    assert not lab.events("copy_repaired")


async def test_a_node_makes_again_only_what_it_held(make_lab: MakeLab, tmp_path: Path) -> None:
    options = {"bucket": f"file://{tmp_path}/bucket", "tier1_limit_bytes": 60_000, **STILL}
    labs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        labs.append(await make_lab(folder=tmp_path / name, **options))
    ranks = [await Rank.join(lab, rank=number, world_size=2) for number, lab in enumerate(labs)]
    nonce = uuid.uuid4().hex
    await ranks[0].claim(nonce)
    await ranks[1].claim(nonce, epoch=ranks[0].client.epoch)
    version = ranks[0].next()
    for rank in ranks:
        rank.create(version, persist=True)
        rank.seal(version, f"rank{rank.rank}.pt", bytes([rank.rank]) * 50_000)
        await rank.prepare(version, [f"rank{rank.rank}.pt"])
    for rank in ranks:
        rank.commit(version)
    for lab in labs:
        await lab.passes(lambda lab=lab: lab.version(version).has(Tier.TIER2), step_s=5.0)  # type: ignore[misc]
    for rank in ranks:
        rank.leave()
    lab, manifest = labs[0], labs[0].tier1 / layout.manifest(JOB, version)
    before = lab.version(version)
    await lab.close()
    content = manifest.read_bytes()
    flip(manifest)
    lab.app = lab._new_app()
    await lab.start()
    await lab.reaches(version, Tier.TIER1)
    found = lab.version(version)
    assert (found.ranks, found.partitions) == (before.ranks, before.partitions)
    assert [path.name for path in (lab.tier1 / layout.VERSIONS).rglob("*.pt")] == ["rank0.pt"]
    assert manifest.read_bytes() == content
    assert lab.app.keeper.used_bytes() == 50_000


async def test_a_repair_that_runs_out_of_memory_is_tried_again(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await saved(lab)
    await lab.restart()
    await lab.reaches(version, Tier.TIER2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hashing, "_buffer", Mock(side_effect=MemoryError))
        lab.app.catalog.set_damaged(lab.version(version), Tier.TIER1, "model.pt: block 0")
        await eventually(lambda: lab.events("repair_failed"))
    assert "not enough memory" in lab.events("repair_failed")[0].fields["error"]
    await lab.passes(lambda: lab.version(version).has(Tier.TIER1), step_s=10.0)
    assert lab.version(version).has(Tier.TIER2)


async def test_a_version_that_needs_no_repair_any_more_is_forgotten(make_lab: MakeLab) -> None:
    lab = await make_lab(**STILL)
    version = await saved(lab)
    await lab.restart()
    await lab.reaches(version, Tier.TIER2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hashing, "_buffer", Mock(side_effect=MemoryError))
        lab.app.catalog.set_damaged(lab.version(version), Tier.TIER1, "model.pt: block 0")
        await eventually(lambda: lab.app.repairer._not_before_s)
    lab.app.catalog.set_copy(lab.version(version), Tier.TIER1, CopyState.EVICTED)
    await lab.passes(lambda: not lab.app.repairer._not_before_s, step_s=10.0)
