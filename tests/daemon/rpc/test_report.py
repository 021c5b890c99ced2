"""Problems in ``cairn status``: each says what happens next, or what to do."""

from __future__ import annotations

from cairnd.model import CopyState, Tier
from cairnd.rpc.report import _next_step
from tests.daemon.lab import Lab, Rank


async def problems(lab: Lab) -> list[str]:
    return list((await lab.app.reporter.status()).problems)


async def test_damage_says_from_where_it_is_mended(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    version = lab.version(await rank.save(persist=True))
    await lab.reaches(version.id, Tier.TIER2)
    version.copies.pop(Tier.MEMORY, None)
    assert await problems(lab) == []
    for tier, other in ((Tier.TIER1, Tier.TIER2), (Tier.TIER2, Tier.TIER1)):
        kept = version.copy(tier)
        lab.app.catalog.set_damaged(version, tier, "block 0 does not match its digest")
        (problem,) = await problems(lab)
        assert f"{version} in {tier}: block 0" in problem
        assert f"again from {other[:4]} {other[4]}" in problem
        version.copies[tier] = kept
    lab.app.catalog.set_damaged(version, Tier.TIER1, "bad")
    version.copies[Tier.TIER2] = version.copy(Tier.TIER1)
    assert "no other tier has an intact copy" in _next_step(version, Tier.TIER1)


async def test_a_copy_that_nobody_flagged_has_to_be_asked_for(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    version = lab.version(await rank.save())
    lab.app.catalog.set_damaged(version, Tier.TIER2, "bad")
    assert f"`cairn persist {version.id} --job {version.job}` uploads it again" in _next_step(version, Tier.TIER2)
    lab.app.catalog.set_copy(version, Tier.TIER2, CopyState.FAILED, "it does not answer")
    version.copies[Tier.TIER2] = type(version.copy(Tier.TIER2))(CopyState.FAILED, "it does not answer")
    assert "cairn show" in _next_step(version, Tier.TIER2)


async def test_a_save_that_failed_says_that_earlier_ones_are_intact(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    version = rank.create(rank.next())
    lab.app.saves.abort(version, "the program never committed it")
    (problem,) = await problems(lab)
    assert "the program never committed it; earlier ones are intact" in problem
    assert f"cairn list --job {version.job}" in problem
