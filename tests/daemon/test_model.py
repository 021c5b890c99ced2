"""The states of a version and the moves between them."""

from __future__ import annotations

from itertools import product

import pytest

from cairn_api.errors import InternalError
from cairn_api.names import VersionId
from cairnd.model import ABSENT, Copy, CopyState, Partition, Tier, Version, VersionState

LEGAL = {
    ("open", "sealed"), ("open", "aborted"),
    ("sealed", "prepared"), ("sealed", "committed"), ("sealed", "aborted"),
    ("prepared", "committed"), ("prepared", "aborted"), ("prepared", "deleting"),
    ("committed", "deleting"),
}  # fmt: skip


def version(state: VersionState = VersionState.OPEN, **more: object) -> Version:
    return Version("job", VersionId(1, 2, "tag"), state, world_size=2, nonce="n", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("before", "after"), list(product(VersionState, VersionState)))
def test_moves(before: VersionState, after: VersionState) -> None:
    item = version(before)
    if (before.value, after.value) in LEGAL:
        item.move(after, "because")
        assert (item.state, item.reason) == (after, "because")
    else:
        with pytest.raises(InternalError, match=f"from {before} to {after}"):
            item.move(after, "because")
        assert (item.state, item.reason) == (before, "")


def test_what_is_committed_is_never_aborted_and_what_has_ended_stays_so() -> None:
    reachable: dict[str, set[str]] = {state.value: {b for a, b in LEGAL if a == state.value} for state in VersionState}
    assert "aborted" not in reachable["committed"]
    assert reachable["deleting"] == reachable["aborted"] == set()


def test_only_promised_bytes_are_restorable() -> None:
    restorable = {state for state in VersionState if version(state).restorable}
    assert restorable == {VersionState.SEALED, VersionState.PREPARED, VersionState.COMMITTED}


def test_complete_means_every_rank_of_the_world() -> None:
    assert not version().complete
    assert not version(ranks=frozenset({0})).complete
    assert version(ranks=frozenset({0, 1})).complete
    assert not version(ranks=frozenset({0, 1, 2})).complete


def test_sizes_copies_and_flags() -> None:
    item = version(partitions=(Partition("a", "a", 0, 3), Partition("b", "by-rank/1/b", 1, 4)))
    assert item.size_bytes == 7
    assert item.copy(Tier.TIER2) is ABSENT
    assert not item.has(Tier.TIER2)
    assert item.partition("by-rank/1/b") is item.partitions[1]
    assert item.partition("b") is None
    assert str(item) == "job/e00001-s000002-tag"


def test_the_flag_rises_by_request_and_is_settled_by_a_copy() -> None:
    asked = [version(), version(persist=True), version(requested=True)]
    assert [item.wants_tier2 for item in asked] == [False, True, True]
    assert [item.requested_and_waiting for item in asked] == [False, False, True]
    there = version(requested=True, copies={Tier.TIER2: Copy(CopyState.VERIFIED)})
    assert not there.requested_and_waiting
