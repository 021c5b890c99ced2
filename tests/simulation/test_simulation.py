"""Whatever goes wrong and in whatever order: what was promised holds.

``CAIRN_SIM_SEED=<n>`` replays one seed, step by step the same; ``CAIRN_SIM_FIRST=<n>`` begins elsewhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.promises import Evidence, proof_size
from tests.simulation.planted import PLANTS
from tests.simulation.world import Outcome, simulate

pytestmark = pytest.mark.fault

ROOT = Path(__file__).parents[2]
STEPS = 5000
"""Of each seed, before its world heals and is judged."""

SEEDS = proof_size(300, 1000)
FIRST = int(os.environ.get("CAIRN_SIM_FIRST", "0"))
ONE = os.environ.get("CAIRN_SIM_SEED", "")
_PROCESSES = 2
_MOST_SEEDS_TO_CATCH = 300


def seeds() -> range:
    """Those of this run."""
    return range(int(ONE), int(ONE) + 1) if ONE else range(FIRST, FIRST + SEEDS)


@pytest.mark.timeout(60 + 6 * SEEDS)
@pytest.mark.promise("simulation")
def test_every_seed_keeps_every_promise(evidence: Evidence) -> None:
    with ProcessPoolExecutor(_PROCESSES, get_context("spawn")) as pool:
        outcomes = list(pool.map(partial(simulate, steps=STEPS), seeds(), chunksize=5))
    failed = [outcome for outcome in outcomes if outcome.violations]
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        counts.update(outcome.counts)
    steps = sum(outcome.steps for outcome in outcomes)
    evidence(
        tried=len(outcomes),
        broken=len(failed),
        detail=f"{steps:,} steps, {counts['crashes']:,} crashes, {counts['promises']:,} saves promised, "
        f"{counts['deletions']:,} deletions and {counts['loads']:,} loads judged",
    )
    assert not failed, "\n\n".join(outcome.report() for outcome in failed[:3])
    assert min(outcome.steps for outcome in outcomes) >= STEPS
    assert ONE or min(counts.values()) >= SEEDS // 2, f"so little happened that it proves nothing: {counts}"


def test_a_seed_replays_to_the_same_trace() -> None:
    first, second = (simulate(FIRST + 7, STEPS, whole_trace=True) for _ in range(2))
    assert first.last == second.last
    assert first == second
    assert len(first.last) >= STEPS
    assert simulate(FIRST + 8, STEPS).digest != first.digest


def test_a_seed_does_not_depend_on_how_a_process_hashes() -> None:
    program = f"from tests.simulation.world import simulate; print(simulate({FIRST + 7}, {STEPS}).digest)"
    digests = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for hash_seed in ("1", "2", "random")
    ]  # fmt: skip
    assert len(set(digests)) == 1, digests


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_caught(name: str) -> None:
    for seed in range(_MOST_SEEDS_TO_CATCH):
        outcome: Outcome = simulate(seed, STEPS, plant=PLANTS[name])
        if outcome.violations:
            return
    pytest.fail(f"{_MOST_SEEDS_TO_CATCH} seeds did not show the planted bug {name!r}")
