"""Ranks over real gloo, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from cairn.ranks import SingleRank, broadcast

_PRELUDE = """
import os, sys, time
from datetime import timedelta
from torch import distributed
from cairn.ranks import GlooRanks, broadcast
from cairn_api.errors import CairnError
rank, world = map(int, sys.argv[1:3])
distributed.init_process_group(
    "gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
)
ranks = GlooRanks(60)
def attempt(step, value, timeout_s):
    try:
        result = ranks.all_gather(step, value, timeout_s)
    except CairnError as error:
        result = f"{type(error).__name__}: {error.message}"
    print(result, flush=True)
"""


def run_ranks(folder: Path, script: str, world_size: int, statuses: Sequence[int] | None = None) -> list[str]:
    """What each rank printed; *statuses* are the expected exit statuses (None: any but for rank 0)."""
    path = folder / "rank.py"
    path.write_text(_PRELUDE + script)
    processes = [
        subprocess.Popen(
            [sys.executable, str(path), str(rank), str(world_size), str(folder / "meeting")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=110) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if statuses is not None:
        assert [process.returncode for process in processes] == list(statuses), outputs
    return [printed for printed, _ in outputs]


def test_a_single_rank_agrees_with_itself() -> None:
    assert SingleRank().all_gather("x", {"a": (1, None)}, 1.0) == [{"a": [1, None]}]
    assert broadcast(SingleRank(), "x", "value", 1.0) == "value"


def test_short_and_long_values_reach_every_rank_in_order(tmp_path: Path) -> None:
    script = """
print(ranks.all_gather("short", {"rank": rank}, 60))
print([len(item) for item in ranks.all_gather("long", "x" * (rank * 5000), 60)])
print(broadcast(ranks, "told", f"from {rank}", 60))
distributed.destroy_process_group()
"""
    expected = "[{'rank': 0}, {'rank': 1}, {'rank': 2}]\n[0, 5000, 10000]\nfrom 0\n"
    assert run_ranks(tmp_path, script, 3, [0, 0, 0]) == [expected] * 3


def test_ranks_at_different_steps_are_told_so_and_stay_apart(tmp_path: Path) -> None:
    script = """
attempt("create" if rank == 0 else "commit", None, 60)
attempt("create", None, 60)
os._exit(0)
"""
    for output in run_ranks(tmp_path, script, 2, [0, 0]):
        first, second = output.splitlines()
        assert first.startswith("ConfigurationError: the ranks are not doing the same thing (rank 0: create; rank 1: ")
        assert second.startswith("UnavailableError: the ranks could not agree at create")


@pytest.mark.parametrize(("late", "timeout_s"), [(False, 3600), (True, 2)], ids=["dead", "late"])
def test_a_rank_that_does_not_come_fails_the_others(tmp_path: Path, late: bool, timeout_s: float) -> None:
    # What may take no time at all gets an hour, which this test does not have.
    script = f"""
attempt("warm up", 0, 60)
if rank == 1:
    while {late} and not os.path.exists({str(tmp_path / "over")!r}):
        time.sleep(0.01)
    os._exit(9)
attempt("commit", 0, {timeout_s})
attempt("again", 0, 3600)
open({str(tmp_path / "over")!r}, "w").close()
os._exit(0)
"""
    first, second, third = run_ranks(tmp_path, script, 2, [0, 9])[0].splitlines()
    assert first == "[0, 0]"
    assert second.startswith("UnavailableError: the ranks could not agree at commit: a rank died or did not come")
    assert third.startswith("UnavailableError: the ranks could not agree at again")
