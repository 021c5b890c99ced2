"""Retention as a pure function: what must never go, by property; what does go, by example."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn_api.errors import ConfigurationError
from cairn_api.names import VersionId
from cairnd.upkeep.retention import Held, Policy, damaged_first, over_limit, plan


def at(sequence: int, epoch: int = 1) -> VersionId:
    return VersionId(epoch, sequence, "t")


ids = st.builds(VersionId, st.integers(1, 3), st.integers(1, 12), st.just("t"))
copies = st.builds(
    Held,
    ids,
    st.integers(1, 100),
    st.floats(0, 1e6, allow_nan=False),
    protected=st.booleans(),
    waiting=st.booleans(),
    passed_over=st.booleans(),
)
helds = st.lists(copies, max_size=20, unique_by=lambda item: item.id)
policies = st.builds(Policy, st.integers(1, 5), st.integers(0, 4), st.sampled_from([0.0, 10.0, 1000.0]))
floors = st.none() | ids


@given(helds, policies, floors)
def test_what_must_stay_is_never_chosen(held: list[Held], policy: Policy, floor: VersionId | None) -> None:
    by_id = {item.id: item for item in held}
    evictions = plan(held, policy, floor)
    newest = sorted((item.id for item in held if not item.passed_over), reverse=True)
    for eviction in evictions:
        item = by_id[eviction.id]
        assert not item.protected
        assert not item.waiting
        assert floor is not None
        assert item.id < floor
        assert item.id not in newest[: policy.keep_last]
        assert eviction.size_bytes == item.size_bytes
        assert not policy.keep_every or item.id.sequence % policy.keep_every
    assert [item.id for item in evictions] == sorted({item.id for item in evictions})


@given(helds, policies, floors)
def test_applying_a_plan_leaves_nothing_to_do_and_never_nothing(
    held: list[Held], policy: Policy, floor: VersionId | None
) -> None:
    gone = {item.id for item in plan(held, policy, floor)}
    left = [item for item in held if item.id not in gone]
    assert not held or left
    assert plan(left, policy, floor) == []


@given(helds, st.integers(1, 5), floors)
def test_everything_else_goes(held: list[Held], keep: int, floor: VersionId | None) -> None:
    counted = sorted((item.id for item in held if not item.passed_over), reverse=True)[:keep]
    may_go = {
        item.id
        for item in held
        if floor and item.id < floor and not item.protected and not item.waiting
        and len(counted) == keep and item.id < counted[-1]
    }  # fmt: skip
    assert {item.id for item in plan(held, Policy(keep), floor)} == may_go


@given(helds, floors, st.integers(-10, 2000))
def test_over_the_limit_only_what_is_safe_goes_oldest_first(
    held: list[Held], floor: VersionId | None, excess: int
) -> None:
    by_id = {item.id: item for item in held}
    last_resort = any(item.passed_over for item in held if item.id == floor)
    could = {
        item.id
        for item in held
        if floor is not None and not item.protected
        and (item.id < floor or (item.passed_over and item.id != floor and not last_resort))
    }  # fmt: skip
    evictions, lost = over_limit(held, excess, floor)
    assert {item.id for item in evictions} <= could
    assert lost == [item.id for item in evictions if by_id[item.id].waiting]
    order = [(by_id[item.id].waiting, item.id) for item in evictions]
    assert order == sorted(order)  # those that wait for tier 2 lose their place last
    freed = sum(item.size_bytes for item in evictions)
    assert not evictions or freed - evictions[-1].size_bytes < excess  # and not one more than needed
    if freed < excess:
        assert {item.id for item in evictions} == could


@given(helds, st.integers(-10, 2000))
def test_of_damaged_copies_the_oldest_go_and_no_more_than_needed(damaged: list[Held], excess: int) -> None:
    could = sorted(item.id for item in damaged if not item.protected)
    evictions = damaged_first(damaged, excess)
    assert [item.id for item in evictions] == could[: len(evictions)]
    freed = sum(item.size_bytes for item in evictions)
    assert not evictions or freed - evictions[-1].size_bytes < excess
    assert freed >= excess or len(evictions) == len(could)


def test_without_a_floor_nothing_goes() -> None:
    held = [Held(at(number), 1, 0.0) for number in range(1, 9)]
    assert plan(held, Policy(1), None) == []
    assert over_limit(held, 100, None) == ([], [])


def test_a_floor_of_an_earlier_epoch_holds_until_this_one_has_one() -> None:
    held = [Held(at(1), 1, 0.0), Held(at(2), 1, 0.0), Held(at(1, epoch=2), 1, 0.0), Held(at(2, epoch=2), 1, 0.0)]
    assert [item.id for item in plan(held, Policy(1), floor=at(2))] == [at(1)]
    assert [item.id for item in plan(held, Policy(1), floor=at(2, epoch=2))] == [at(1), at(2), at(1, epoch=2)]


def test_every_nth_and_one_per_period_are_kept_besides() -> None:
    held = [Held(at(number), 1, created_s=60.0 * number) for number in range(1, 11)]
    gone = plan(held, Policy(2, keep_every=4), floor=at(10))
    assert [item.id.sequence for item in gone] == [1, 2, 3, 5, 6, 7]
    gone = plan(held, Policy(2, keep_period_s=240.0), floor=at(10))
    assert [item.id.sequence for item in gone] == [2, 3, 5, 6, 7]


@pytest.mark.parametrize("keep", [0, -1])
def test_a_policy_that_keeps_nothing_is_refused(keep: int) -> None:
    with pytest.raises(ConfigurationError, match="refused"):
        Policy(keep)


def test_what_automatic_resume_passes_over_is_not_counted_and_stays_beside_what_is() -> None:
    good = [Held(at(number), 1, 0.0) for number in (1, 2, 4)]
    bad = [Held(at(number), 1, 0.0, passed_over=True) for number in (3, 5)]
    assert [item.id for item in plan([*good, *bad], Policy(keep_last=2), at(5))] == [at(1)]
    assert plan([good[0], *bad], Policy(keep_last=2), at(5)) == []
