"""Inodes or space of a disk end at each stage of each phase: a clear error with sizes, nothing lost, and it passes.

Steps leave the phase 0, 1, 2, … inodes or blocks, until they are enough. Without the reserve that ``prepare`` keeps, so
that space ends also where the reserve would not let it. A sized-down run leaves out steps, chosen by the seed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crash.disks import need_disks, need_mounts
from tests.crash.full_disks import Scene, Step, stage
from tests.crash.phases import FirstStart, Persist, PlainSave, Prune, Recovery, Repair, Restore
from tests.crash.test_power_cut import SEED
from tests.promises import Evidence, full_run, proof_size

_MOST_STEPS = 400
_STRIDES = {"inodes": 4, "blocks": 24}
_ENOUGH = proof_size(1, 3)
"""So many steps with room enough, one after the other, end a scene."""

SCENES = tuple(
    Scene(phase, where, what, kind)
    for phase, where, kind in (
        (FirstStart(), "tier1", "tmpfs"),
        (Recovery(), "tier1", "tmpfs"),
        (PlainSave(), "tier1", "tmpfs"),
        (PlainSave(), "tier1", "ext4"),
        (Persist(), "tier1", "tmpfs"),
        (Persist(), "bucket", "tmpfs"),
        (Persist(), "bucket", "ext4"),
        (Prune(), "tier1", "tmpfs"),
        (Prune(), "bucket", "tmpfs"),
        (Restore(), "tier1", "tmpfs"),
        (Restore(), "tier1", "ext4"),
        (Repair(), "tier1", "tmpfs"),
    )
    for what in ("inodes", "blocks")
    if (kind, what) != ("ext4", "inodes")  # its inodes come in groups: the small disk has too many to take one by one
)


@pytest.mark.promise("no_space")
@pytest.mark.root
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_inodes_or_space_end_at_each_stage(
    tmp_path: Path, evidence: Evidence, figures: Callable[[str], None], scene: Scene
) -> None:
    need_disks(scene.kind) if scene.kind != "tmpfs" else need_mounts()
    start_s, steps = time.monotonic(), list[Step]()
    with stage(scene, tmp_path) as on:
        for left in _lefts(scene, steps):
            steps.append(on.step(left))
    short, broken = [step for step in steps if step.told], [step for step in steps if step.problems]
    evidence(tried=len(steps), broken=len(broken))
    figures(
        f"{scene}: {len(steps)} points, {len(short)} told as an error, {len(broken)} broken, enough with "
        f"{steps[-_ENOUGH].left} ({time.monotonic() - start_s:.0f} s, seed {SEED})"
    )
    assert not broken, "\n".join(f"{step.left} left: {step.problems}" for step in broken)


def _lefts(scene: Scene, done: list[Step]) -> Iterator[int]:
    """What is left at each step; ends when it was enough."""
    strides = random.Random(SEED)  # noqa: S311 - a sample of points, not a secret
    left = 0
    while not (len(done) >= _ENOUGH and all(not step.told for step in done[-_ENOUGH:])):
        yield left
        left += 1 if full_run() else strides.randint(1, _STRIDES[scene.what])
        assert left < _MOST_STEPS, f"{scene}: nothing is ever enough: {done[-1].told}"
