"""The memory tier for restores: hashed once or always, mapped only where that costs no save."""

from __future__ import annotations

import pytest

from cairn_api.errors import ConfigurationError
from cairn_api.names import VersionId
from cairnd.model import CopyState, Tier
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, Lab, Rank
from tests.daemon.restore.test_fetcher import PARTS, Reader, verify_failures


async def left_behind(lab: Lab) -> VersionId:
    """A version whose trainer is gone."""
    (rank,) = await Rank.launch(lab)
    version = await rank.save(PARTS)
    rank.leave()
    return version


def readers(lab: Lab, version: VersionId) -> list[int]:
    return [segment.readers for segment in lab.app.memory.of_version(JOB, version)]


async def test_a_hold_outlives_its_lease_and_keeps_the_buffer(lab: Lab) -> None:
    version = await left_behind(lab)
    reader = Reader(lab)
    progress = await reader.fetch(version)
    lease = reader.lease(progress)
    hold = lab.app.fetcher.hold(lease, "model.pt")
    assert hold is not None
    lab.app.fetcher.end(lease)
    assert sorted(readers(lab, version)) == [0, 1]
    lab.app.launches.reclaim(lab.app.memory.limit_bytes)
    assert readers(lab, version) == [1], "the held buffer stays counted, the other one goes"
    stranger = Reader(lab)
    with pytest.raises(ConfigurationError, match="does not exist"):
        lab.app.memory_copies.end_hold(stranger.client.number, hold)
    lab.app.memory_copies.end_hold(reader.client.number, hold)
    with pytest.raises(ConfigurationError, match="does not exist"):
        lab.app.memory_copies.end_hold(reader.client.number, hold)
    assert readers(lab, version) == [0]


async def test_a_hold_ends_with_its_client(lab: Lab) -> None:
    version = await left_behind(lab)
    reader = Reader(lab)
    lease = reader.lease(await reader.fetch(version))
    assert lab.app.fetcher.hold(lease, "model.pt")
    assert lab.app.fetcher.hold(lease, "model.pt")
    assert sorted(readers(lab, version)) == [1, 3]
    reader.leave()
    assert readers(lab, version) == [0, 0]


async def test_a_buffer_that_will_be_filled_again_is_not_held(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    version = await rank.save(PARTS)
    reader = Reader(lab)
    assert lab.app.fetcher.hold(reader.lease(await reader.fetch(version)), "model.pt") is None
    assert readers(lab, version) == [1, 1]


async def test_what_the_budget_cannot_spare_is_not_held(make_lab: MakeLab) -> None:
    lab = await make_lab(capture_memory_bytes=(1 + 2 + 4 + 1) * 4096)
    (rank,) = await Rank.launch(lab)
    version = await rank.save({"a": bytes(4096), "b": bytes(4096)})
    rank.leave()
    reader = Reader(lab)
    lease = reader.lease(await reader.fetch(version))
    assert lab.app.memory.free_bytes == 6 * 4096
    assert lab.app.fetcher.hold(lease, "a")
    assert lab.app.fetcher.hold(lease, "b")
    lab.app.memory.grant(rank.client.number, JOB, 3 * 4096)
    assert lab.app.fetcher.hold(lease, "a") is None


async def test_nothing_is_held_of_a_file(lab: Lab) -> None:
    version = await left_behind(lab)
    await lab.restart()
    reader = Reader(lab)
    lease = reader.lease(await reader.fetch(version))
    assert lab.app.fetcher.hold(lease, "model.pt") is None
    assert lab.app.fetcher.hold(lease, "nothing") is None


@pytest.mark.parametrize("always", [False, True])
async def test_a_buffer_is_hashed_once_or_at_every_load(make_lab: MakeLab, always: bool) -> None:
    lab = await make_lab(verify_on_load="always" if always else "cached", bucket=False)
    version = await left_behind(lab)
    size_bytes = sum(map(len, PARTS.values()))
    assert (await Reader(lab).fetch(version)).digested_bytes == size_bytes
    assert (await Reader(lab).fetch(version)).digested_bytes == (size_bytes if always else 0)
    segment = lab.app.memory.of_version(JOB, version)[0]
    with segment.view(1) as view:
        view[0] ^= 1
    reader = Reader(lab)
    progress = await reader.fetch(version)
    if always:
        assert reader.read(progress) == PARTS, "the bytes came from tier 1"
        assert lab.version(version).copy(Tier.MEMORY).state is CopyState.FAILED
        assert verify_failures(lab, "memory") == 1
