"""Each durable system call of each phase fails once, or is the daemon's last: no false promise, a clean recovery.

A full run takes every call that the recordings show with every fault. A sized-down one takes, by the seed, one point of
each call of each phase that is a kill, and one that is an error.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.crash import points
from tests.crash.phases import PHASES, Phase, PlainSave
from tests.crash.points import Outcome, Point, Recording
from tests.crash.syscalls import DURABLE, FAULTS, need_strace
from tests.crash.test_power_cut import SEED
from tests.promises import Evidence, full_run, proof_size

KILL, ERRORS = FAULTS[:1], FAULTS[1:]
_BY_NAME = {phase.name: phase for phase in PHASES}
Recorder = Callable[[Phase], Recording]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    """Makes the recording of a phase, once."""
    need_strace()
    folder = tmp_path_factory.mktemp("recorded")
    made: dict[str, Recording] = {}

    def get(phase: Phase) -> Recording:
        if phase.name not in made:
            made[phase.name] = points.record(phase, folder)
        return made[phase.name]

    return get


@pytest.mark.timeout(300)
def test_every_durable_call_is_in_the_matrix(recorded: Recorder, figures: Callable[[str], None]) -> None:
    """A call that changes a disk and that nobody knows here would never be made to fail."""
    seen: dict[str, set[str]] = {}
    for phase in PHASES:
        calls = recorded(phase).calls
        seen[phase.name] = {call.name for call in calls}
        assert len({call.thread for call in calls}) == 1, (
            f"{phase.name} uses several threads: counting them is not exact"
        )
    made = set().union(*seen.values())
    assert not made - set(DURABLE), f"nobody makes these fail: {made - set(DURABLE)}"
    # Not every file system has the flag that protects files.
    assert not set(DURABLE) - made - {"ioctl"}, f"no phase makes these any more: {set(DURABLE) - made}"
    figures(f"durable calls: {', '.join(f'{name} {len(recorded(_BY_NAME[name]).calls)}' for name in seen)}")


@pytest.mark.promise("syscall_kill")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", _BY_NAME)
def test_killed_in_each_call(
    tmp_path: Path, recorded: Recorder, evidence: Evidence, figures: Callable[[str], None], name: str
) -> None:
    _judge(recorded(_BY_NAME[name]), KILL, tmp_path, evidence, figures)


@pytest.mark.promise("syscall_error")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", _BY_NAME)
def test_an_error_of_each_call(
    tmp_path: Path, recorded: Recorder, evidence: Evidence, figures: Callable[[str], None], name: str
) -> None:
    _judge(recorded(_BY_NAME[name]), ERRORS, tmp_path, evidence, figures)


def _judge(
    recording: Recording, faults: Sequence[str], folder: Path, evidence: Evidence, figures: Callable[[str], None]
) -> None:
    start_s, chosen = time.monotonic(), _chosen(recording.points(faults))
    found = points.run(recording, chosen, folder)
    broken, missed = [item for item in found if item.problems], [item for item in found if item.missed]
    name = recording.phase.name
    evidence(tried=len(found) - len(missed), broken=len(broken), detail=f"{name} {len(recording.calls)} calls")
    figures(
        f"{name}, {' and '.join(faults)}: {len(found)} of {len(recording.calls) * len(faults)} points, {len(broken)} "
        f"broken, {len(missed)} missed, {sum(bool(item.told) for item in found)} told as an error "
        f"({time.monotonic() - start_s:.0f} s, seed {SEED})"
    )
    assert not broken, _text(broken)
    # How many files are opened before, for reading, depends on what Python has imported by then: some are missed. What
    # two threads do at the same time, such as deletions in both tiers, may change places.
    hit = [item for item in missed if item.point.call != "openat"]
    assert len(hit) <= max(1, len(found) // 50), [f"{item.point}: {item.missed}" for item in hit]
    assert len(missed) <= len(found) // 5, [f"{item.point}: {item.missed}" for item in missed]


def _chosen(every: Sequence[Point]) -> Sequence[Point]:
    if full_run():
        return every
    sample = random.Random(SEED)  # noqa: S311 - a sample of points, not a secret
    by_call: dict[str, list[Point]] = defaultdict(list)
    for point in every:
        by_call[point.call].append(point)
    return [sample.choice(alike) for alike in by_call.values()]


@pytest.mark.planted("swallowed_sync_error")
@pytest.mark.timeout(600)
def test_a_failed_sync_that_is_taken_for_success_is_caught(
    tmp_path: Path, evidence: Evidence, figures: Callable[[str], None]
) -> None:
    recording, tried = _planted(tmp_path, "swallowed_sync_error", "fsync", "EIO", proof_size(3, 10**6))
    caught = [item for item in tried if any("promised whose fsync had failed" in problem for problem in item.problems)]
    evidence(tried=len(tried), broken=len(tried) - len(caught))
    figures(f"with swallowed_sync_error planted: {len(caught)} of {len(tried)} failed syncs of a save caught")
    assert recording.calls
    assert len(caught) == len(tried) > 0, _text([item for item in tried if item not in caught])


@pytest.mark.planted("manifest_first")
@pytest.mark.timeout(600)
def test_a_manifest_before_its_data_is_caught(
    tmp_path: Path, evidence: Evidence, figures: Callable[[str], None]
) -> None:
    recording, tried = _planted(tmp_path, "manifest_first", "rename", "KILL", 10**6)
    caught = [item for item in tried if any(problem.startswith("torn: ") for problem in item.problems)]
    evidence(tried=len(tried), broken=not caught)
    figures(f"with manifest_first planted: {len(caught)} of {len(tried)} kills in a rename of a save left it torn")
    assert recording.calls
    assert caught


def _planted(folder: Path, fault: str, call: str, what: str, count: int) -> tuple[Recording, list[Outcome]]:
    """Points of a save with a planted bug: *what* in those of *call* that concern the version's files."""
    need_strace()
    recording = points.record(PlainSave(), folder, fault)
    every = [point for point in recording.points([what]) if point.call == call and "-disturbed" in point.what]
    chosen = random.Random(SEED).sample(every, min(count, len(every)))  # noqa: S311 - a sample of points
    return recording, points.run(recording, chosen, folder, fault)


def _text(broken: Sequence[Outcome]) -> str:
    return "\n".join(f"{item.point}:\n  " + "\n  ".join(item.problems) for item in broken)
