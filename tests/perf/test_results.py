"""The arithmetic behind the benchmark's tables."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.perf.__main__ import main
from tests.perf.goals import Goal, ahead_of_us, goals_of
from tests.perf.report import report
from tests.perf.results import Run, joined, merged, run_from_json


def run_of(size_bytes: int = 1_000_000_000, **contenders: dict[str, list[float]]) -> Run:
    names = {"cairn": "Cairn", "plain": "torch.save", "tensors": "safetensors"}
    return Run(
        "adam", 1, 3, size_bytes,
        floors={"memcpy": [0.1, 0.3, 0.2], "direct_write": [0.4], "direct_read": [0.5]},
        contenders={names[name]: samples for name, samples in contenders.items()},
    )  # fmt: skip


def goal(run: Run, text: str) -> Goal:
    return next(item for item in goals_of(run) if item.text.startswith(text))


def test_the_slower_rank_counts_and_cpu_time_and_memory_add_up() -> None:
    one = run_of(cairn={"stall_s": [1.0, 5.0], "cpu_s": [1.0, 2.0], "extra_bytes": [10.0]})
    other = run_of(cairn={"stall_s": [2.0, 4.0], "cpu_s": [3.0, 4.0], "extra_bytes": [20.0]})
    both = merged([one, other])
    assert both.contenders["Cairn"] == {"stall_s": [2.0, 5.0], "cpu_s": [4.0, 6.0], "extra_bytes": [30.0]}
    assert both.size_bytes == 2_000_000_000
    assert both.floors["memcpy"] == [0.1, 0.3, 0.2]


def test_a_contender_that_one_rank_lacks_is_left_out() -> None:
    assert list(merged([run_of(cairn={}, plain={}), run_of(cairn={})]).contenders) == ["Cairn"]


def test_runs_of_the_same_state_are_put_together() -> None:
    runs = [run_of(cairn={"stall_s": [1.0]}), run_of(cairn={"stall_s": [2.0]}, plain={}), run_of(size_bytes=7)]
    whole, other = joined(runs)
    assert whole.rounds == 6
    assert whole.contenders["Cairn"]["stall_s"] == [1.0, 2.0]
    assert len(whole.floors["memcpy"]) == 6
    assert other.size_bytes == 7
    assert runs[0].contenders["Cairn"]["stall_s"] == [1.0], "the parts are left as they were"


def test_json_gives_the_run_back() -> None:
    run = run_of(cairn={"stall_s": [1.0]})
    assert run_from_json(json.loads(json.dumps(asdict(run)))) == run


@pytest.mark.parametrize(("stall_s", "met"), [(0.219, True), (0.221, False)])
def test_the_stall_is_held_against_the_median_memcpy(stall_s: float, *, met: bool) -> None:
    assert goal(run_of(cairn={"stall_s": [stall_s]}), "warm stall / memcpy").met is met


def test_the_bill_is_per_gigabyte_and_held_against_the_best_peer() -> None:
    run = run_of(
        size_bytes=2_000_000_000,
        cairn={"bill_s": [0.3]}, plain={"bill_s": [0.8]}, tensors={"bill_s": [0.2]},
    )  # fmt: skip
    assert goal(run, "stall + lost, s per GB").value == pytest.approx(0.15)
    against = goal(run, "stall + lost / that of safetensors")
    assert against.value == pytest.approx(1.5)
    assert not against.met
    assert ahead_of_us(run) == ["stall + lost: safetensors 0.200 s, Cairn 0.300 s (1.50 x)"]


@pytest.mark.parametrize(("drain_s", "met"), [(0.44, True), (0.46, False)])
def test_tier_1_is_compared_with_the_disk_as_it_was_beside_each_save(drain_s: float, *, met: bool) -> None:
    run = run_of(cairn={"raw_write_s": [0.1, 0.4, 9.0], "drain_s": [1.0, drain_s, 1.0]})
    assert goal(run, "raw O_DIRECT write").met is met


def test_what_was_not_measured_is_no_goal_and_an_empty_cell() -> None:
    run = run_of(cairn={"stall_s": [0.2], "corrupt": [1.0]})
    run.skipped["safetensors"] = "it is not installed"
    assert [item.text for item in goals_of(run)] == ["warm stall / memcpy"]
    text = report(run)
    assert "| Cairn |  |  | 0.200 | 1.00 |" in text
    assert "**corrupt**" in text
    assert "safetensors was left out: it is not installed" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), ("{", "is not what --json writes"), ('{"runs": [{}]}', "is not what --json writes")],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["--read", str(path)])
    assert said in str(ended.value.code)
    assert str(path) in str(ended.value.code)
    assert "\n" not in str(ended.value.code)
