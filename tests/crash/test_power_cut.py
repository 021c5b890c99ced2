"""A power cut at any moment loses nothing that was promised, and shows nothing that is torn."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.disks import need_disks
from tests.crash.power_cut import PowerCuts
from tests.crash.trainer import Trainers

CUTS = int(os.environ.get("CAIRN_POWER_CUTS", "50"))
"""On ext4; xfs gets half as many."""

MOST_CUTS_TO_CATCH = 40

SEED = int(os.environ.get("CAIRN_CRASH_SEED") or secrets.randbelow(10**6))
"""Printed with the figures; set it to choose the same moments again (the machine's own timing stays free)."""


@pytest.mark.root
@pytest.mark.timeout(60 + 6 * CUTS)
@pytest.mark.parametrize(("kind", "cuts"), [("ext4", CUTS), ("xfs", -(-CUTS // 2))])
def test_nothing_promised_is_lost_and_nothing_torn_is_listed(
    tmp_path: Path, trainers: Trainers, figures: Callable[[str], None], kind: str, cuts: int
) -> None:
    need_disks(kind)
    harness = PowerCuts(tmp_path, trainers, kind, SEED)
    try:
        found = harness.run(cuts)
    finally:
        figures(harness.figures.line())
    assert found.clean, f"{found.lost=}\n{found.torn=}\n{found.unlike=}\n{found.wrong=}"
    assert found.promised >= cuts // 2, "so few promises prove nothing"
    assert found.loaded >= cuts // 2, "so few loads prove nothing"


@pytest.mark.root
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("fault", ["no_file_sync", "no_folder_sync", "manifest_first"])
def test_a_planted_bug_is_caught(
    tmp_path: Path, trainers: Trainers, figures: Callable[[str], None], kind: str, fault: str
) -> None:
    need_disks(kind)
    harness = PowerCuts(tmp_path, trainers, kind, SEED, fault)
    try:
        found = harness.run(MOST_CUTS_TO_CATCH, stop_at_first=True)
    finally:
        figures(harness.figures.line())
    assert found.lost or found.torn, f"{MOST_CUTS_TO_CATCH} power cuts did not show the planted bug {fault}"
