"""What ranks conclude from what they gathered."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn.agreement import agree_on_create, check_same, error_to_json, first_error, floor, shared_names
from cairn.transport.connection import ConnectionLostError
from cairn_api.errors import ConfigurationError, InternalError, OverloadedError, UnavailableError
from cairn_api.names import VersionId

V = [str(VersionId(1, number, f"step{number}")) for number in range(1, 6)]


def said(tag: str = "step9", *, rank: int = 0, **changes: Any) -> dict[str, Any]:
    value: dict[str, Any] = {
        "tag": tag, "available": True, "tier1": [], "tier2": [], "persist_lost": False, "error": None,
    }  # fmt: skip
    if rank == 0:
        value |= {"sequence": 9, "persist": False, "save_dir": "/data", "file_marks": True}
    return value | changes


def test_an_agreed_save_carries_what_rank_0_decided() -> None:
    agreed = agree_on_create([said(persist=True), said(rank=1)], 3, skip_allowed=False)
    assert agreed.version == VersionId(3, 9, "step9")
    assert (agreed.persist, agreed.save_dir, agreed.file_marks, agreed.skip) == (True, "/data", True, False)


def test_a_lost_flag_on_any_node_is_inherited() -> None:
    assert agree_on_create([said(), said(rank=1, persist_lost=True)], 1, skip_allowed=False).persist


def test_a_tag_that_differs_is_an_error_that_says_who_said_what() -> None:
    with pytest.raises(ConfigurationError, match=r"rank 0: 'step9'; ranks 1, 2 \(2\): 'step8'"):
        agree_on_create([said(), said("step8", rank=1), said("step8", rank=2)], 1, skip_allowed=False)


def test_one_rank_without_a_buffer_makes_all_skip_or_all_fail() -> None:
    gathered = [said(), said(rank=1, available=False)]
    agreed = agree_on_create(gathered, 1, skip_allowed=True)
    assert (agreed.skip, agreed.lacking) == (True, (1,))
    with pytest.raises(OverloadedError, match="rank 1"):
        agree_on_create(gathered, 1, skip_allowed=False)


def test_the_first_failing_rank_is_named_and_its_class_kept() -> None:
    problem = OverloadedError("tier 1 is full", hint="free some", context={"tier": "tier1"})
    gathered = [said(), said(rank=1, error=error_to_json(problem)), said(rank=2, error=error_to_json(ValueError("x")))]
    with pytest.raises(OverloadedError, match="rank 1: tier 1 is full") as raised:
        agree_on_create(gathered, 1, skip_allowed=True)
    assert raised.value.hint == "free some"
    assert raised.value.context == {"tier": "tier1", "rank": "1"}


def test_errors_survive_the_trip_as_what_callers_may_catch() -> None:
    lost = first_error([{"error": error_to_json(ConnectionLostError("gone"))}])
    assert type(lost) is UnavailableError
    foreign = first_error([{"error": error_to_json(AttributeError("cannot pickle"))}])
    assert type(foreign) is InternalError
    assert foreign.message == "AttributeError: cannot pickle"
    assert first_error([{"error": None}]) is None


@pytest.mark.parametrize(
    ("tier1", "tier2", "expected"),
    [
        ([[V[0], V[1]], [V[1]]], [[], []], V[1]),
        ([[V[0], V[2]], [V[1]]], [[V[0]], [V[0]]], V[0]),
        ([[V[3]], [V[3]]], [[V[2]], [V[2]]], V[3]),
        ([[V[3]], []], [[V[2]], [V[1]]], None),  # on all ranks, but not in one tier
    ],
)
def test_floor(tier1: list[list[str]], tier2: list[list[str]], expected: str | None) -> None:
    gathered = [{"tier1": one, "tier2": two} for one, two in zip(tier1, tier2, strict=True)]
    found = floor(gathered)
    assert (None if found is None else str(found)) == expected


def test_settings_that_differ_are_shown() -> None:
    with pytest.raises(ConfigurationError, match="disagree about the settings"):
        check_same([{"settings": {"a": 1}}, {"settings": {"a": 2}}], "settings", "settings")


@given(st.lists(st.sets(st.sampled_from(["a", "b", "c"])), min_size=1, max_size=5))
def test_every_stored_path_is_used_once(names_by_rank: list[set[str]]) -> None:
    shared = shared_names([sorted(names) for names in names_by_rank])
    everything = [(name, rank) for rank, names in enumerate(names_by_rank) for name in names]
    plain = [name for name, rank in everything if (name, rank) not in shared]
    assert sorted(plain) == sorted(set().union(*names_by_rank))
    for name, rank in shared:
        assert any(name in names for names in names_by_rank[:rank]), "the lowest rank keeps the plain name"
