"""The choice of a version: newest first, the same on every rank, never less than asked for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn.choice import Candidate, choose
from cairn.load import named
from cairn_api.errors import UnavailableError, VersionError
from cairn_api.names import VersionId, parse_version


def version(
    sequence: int, *, epoch: int = 1, tag: str = "", held: bool = True, ranks: tuple[int, ...] = (0, 1), **more: Any
) -> dict[str, Any]:
    """A version of two ranks with a model file of rank 0 and a state file of each rank."""
    parts = [["model.pt", "model.pt", 0, 10]] if 0 in ranks else []
    parts += [[f"optim-{rank}.pt", f"optim-{rank}.pt", rank, 10] for rank in ranks]
    return {
        "version": str(VersionId(epoch, sequence, tag or f"step{sequence}")),
        "nonce": f"n{epoch}",
        "state": "committed",
        "world_size": 2,
        "ranks": list(ranks),
        "save_dir": "/data",
        "file_marks": False,
        "held": held,
        "passed_over": "",
        "partitions": parts,
        **more,
    }


def inventory(*versions: dict[str, Any], **more: Any) -> dict[str, Any]:
    nothing: dict[str, Any] = {"claimed_epoch": 0, "resumed_from": None, "tier2_error": "", "unhealthy": []}
    return {**nothing, "versions": list(versions), **more}


def deepspeed_reads(_: Candidate, rank: int) -> list[str]:
    return ["model.pt", f"optim-{rank}.pt"]


def chosen(inventories: list[dict[str, Any]], **asked: Any) -> str | None:
    choice = choose(inventories, **asked)
    return None if choice is None else str(choice.version)


def test_nothing_anywhere_is_nothing() -> None:
    assert chosen([inventory(), inventory()]) is None


def test_nothing_known_while_the_bucket_is_away_is_not_nothing() -> None:
    with pytest.raises(UnavailableError, match="no route"):
        choose([inventory(), inventory(tier2_error="no route")])


def test_the_newest_by_epoch_and_sequence_whatever_the_order_of_the_answers() -> None:
    one = inventory(version(7), version(2, epoch=2), version(9))
    assert chosen([one, one]) == "e00002-s000002-step2"


def test_a_version_that_one_rank_cannot_reach_is_passed_over_by_all() -> None:
    both = version(1)
    choice = choose([inventory(both, version(2)), inventory(both, version(2, held=False))])
    assert choice is not None
    assert choice.version.sequence == 1
    assert "rank 1 cannot reach" in choice.passed_over[0]


def test_what_a_rank_reads_counts_whoever_wrote_it() -> None:
    first = inventory(version(1, ranks=(0,)), version(2, ranks=(0,)))
    second = inventory(version(1, ranks=(1,)), version(2))
    # Rank 1's daemon holds version 2 whole; of version 1 it lacks the model file that rank 0 wrote.
    with pytest.raises(VersionError, match=r"rank 1 cannot reach partition 'model\.pt'"):
        choose([inventory(version(1, ranks=(0,))), inventory(version(1, ranks=(1,)))], reads=deepspeed_reads)
    assert chosen([first, second], reads=deepspeed_reads) == "e00001-s000002-step2"


def test_incomplete_versions_do_not_count() -> None:
    one = inventory(version(1), version(2, ranks=(0,)))
    assert chosen([one, one]) == "e00001-s000001-step1"


def test_known_but_unreachable_raises() -> None:
    with pytest.raises(VersionError, match="no version can be loaded"):
        choose([inventory(version(1, held=False))])
    with pytest.raises(VersionError, match="no copy can be read"):
        choose([inventory(unhealthy=["e00001-s000001-step1"])])


def test_a_tag_is_loaded_or_reported_never_replaced() -> None:
    one = inventory(version(1, tag="global_step10"), version(2, tag="global_step20"))
    assert chosen([one], tag="global_step10") == "e00001-s000001-global_step10"
    with pytest.raises(VersionError, match=r"global_step1.*there are: global_step10"):
        choose([one], tag="global_step1")


def test_the_newest_of_a_tag_saved_twice_and_each_by_its_full_name() -> None:
    one = inventory(version(1, tag="best"), version(5, tag="best"))
    assert chosen([one], tag="best") == "e00001-s000005-best"
    assert chosen([one], tag="best", exactly=parse_version("e00001-s000001-best")) == "e00001-s000001-best"


def test_a_version_found_damaged_gives_way_to_the_next() -> None:
    one = inventory(version(1), version(2))
    bad = frozenset({(parse_version("e00001-s000002-step2"), "n1")})
    assert chosen([one], bad=bad) == "e00001-s000001-step1"


def test_history_that_a_later_launch_left_behind_is_ignored_unless_named() -> None:
    # Epoch 2 resumed from step 3 of epoch 1, so steps 4 and 5 of epoch 1 are another future.
    versions = [version(number) for number in (3, 4, 5)]
    one = inventory(*versions, claimed_epoch=2, resumed_from="e00001-s000003-step3")
    assert chosen([one]) == "e00001-s000003-step3"
    assert chosen([one], tag="step5") == "e00001-s000005-step5"
    both = inventory(*versions, version(1, epoch=2), claimed_epoch=2, resumed_from="e00001-s000003-step3")
    assert chosen([both]) == "e00002-s000001-step1"


def test_a_launch_that_started_afresh_leaves_nothing_behind() -> None:
    assert chosen([inventory(version(3), claimed_epoch=2)]) == "e00001-s000003-step3"


def test_the_newest_claim_of_any_daemon_decides() -> None:
    old = inventory(version(3), version(5))
    new = inventory(version(3), version(5), claimed_epoch=2, resumed_from="e00001-s000003-step3")
    assert chosen([old, new]) == chosen([new, old]) == "e00001-s000003-step3"


def test_only_versions_of_the_save_directory() -> None:
    one = inventory(version(1), version(2, save_dir="/elsewhere"))
    assert chosen([one], save_dir="/data") == "e00001-s000001-step1"
    assert chosen([one], save_dir="/new") is None


def test_two_launches_with_one_name_are_two_versions() -> None:
    one = inventory(version(1, nonce="a", ranks=(0,)), version(1, nonce="b", ranks=(1,)))
    with pytest.raises(VersionError, match="partitions of rank"):
        choose([one])


def test_each_rank_reads_its_own_partition_of_a_shared_name() -> None:
    parts = [["state.pt", "state.pt", 0, 1], ["by-rank/1/state.pt", "state.pt", 1, 1]]
    one = inventory(version(1, partitions=parts))
    choice = choose([one, one], reads=named("state.pt"))
    assert choice is not None
    assert [list(named("state.pt")(choice.candidate, rank)) for rank in (0, 1, 2)] == [
        ["state.pt"], ["by-rank/1/state.pt"], ["state.pt"],
    ]  # fmt: skip
    with pytest.raises(VersionError, match=r"has no partition 'other\.pt'"):
        choose([one, one], reads=named("other.pt"))


_RANKS: list[tuple[int, ...]] = [(), (0,), (1,), (0, 1)]


@given(data=st.data())
def test_all_that_is_chosen_can_be_read_by_all_and_nothing_newer_can(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 3))
    inventories = []
    for _ in range(ranks):
        versions = [
            version(number, held=data.draw(st.booleans()), ranks=data.draw(st.sampled_from(_RANKS)))
            for number in range(1, 5)
            if data.draw(st.booleans())
        ]
        inventories.append(inventory(*versions))

    def readable(sequence: int) -> bool:
        found = [[item for item in one["versions"] if parse_version(item["version"]).sequence == sequence]
                 for one in inventories]  # fmt: skip
        known = {part[0] for items in found for item in items for part in item["partitions"]}
        present = {rank for items in found for item in items for rank in item["ranks"]}
        return present == {0, 1} and all(
            items and items[0]["held"] and known == {part[0] for part in items[0]["partitions"]} for items in found
        )

    expected = [sequence for sequence in range(4, 0, -1) if readable(sequence)]
    try:
        choice = choose(inventories)
    except VersionError:
        assert not expected
    else:
        assert ([] if choice is None else [choice.version.sequence]) == expected[:1]
        assert (choice is None) == (not any(one["versions"] for one in inventories))


def test_a_marked_version_is_the_last_resort_of_automatic_resume() -> None:
    marked = version(3, passed_over="3 resumes died on it")
    seen = [inventory(marked, version(2), version(1)), inventory(version(3), version(2), version(1))]
    choice = choose(seen)
    assert choice is not None
    assert choice.version.sequence == 2
    assert choice.passed_over == (f"{marked['version']}: 3 resumes died on it",)
    assert chosen(seen, tag="step3") == marked["version"], "by its name it is loaded"
    assert chosen([inventory(marked), inventory(marked)]) == marked["version"], "there is no other"
    older = version(1, passed_over="its loss exploded")
    assert chosen([inventory(marked, older)] * 2) == marked["version"], "of several the newest"
