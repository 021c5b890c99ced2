"""A power cut at any moment loses nothing that was promised, and shows nothing that is torn."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.disks import need_disks
from tests.crash.power_cut import PAUSES_S, PowerCuts
from tests.crash.trainer import Trainers
from tests.promises import Evidence, proof_size

CUTS = proof_size(40, 1000)
MOST_CUTS_TO_CATCH = 40

SEED = int(os.environ.get("CAIRN_CRASH_SEED") or secrets.randbelow(10**6))
"""Printed with the figures; set it to choose the same moments again (the machine's own timing stays free)."""


@pytest.mark.root
@pytest.mark.timeout(60 + 6 * CUTS)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("ext4", marks=pytest.mark.promise("power_ext4")),
        pytest.param("xfs", marks=pytest.mark.promise("power_xfs")),
    ],
)
def test_nothing_promised_is_lost_and_nothing_torn_is_listed(
    tmp_path: Path, trainers: Trainers, evidence: Evidence, figures: Callable[[str], None], kind: str
) -> None:
    need_disks(kind)
    harness = PowerCuts(tmp_path, trainers, kind, SEED)
    try:
        found = harness.run(CUTS)
    finally:
        figures(harness.figures.line())
    evidence(
        tried=found.cuts,
        broken=len(found.broken),
        detail=f"{found.promised:,} saves promised, {found.loaded:,} recoveries loaded equal",
    )
    assert not found.broken
    assert found.promised >= found.cuts // 2, "so few promises prove nothing"
    assert found.loaded >= found.cuts // 2, "so few loads prove nothing"


@pytest.mark.root
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize(
    ("fault", "pauses_s"),
    [
        pytest.param("no_file_sync", PAUSES_S, marks=pytest.mark.planted("no_file_sync")),
        # Always a pause: the syncs of a next save would make the names of this one durable too.
        pytest.param("no_folder_sync", PAUSES_S[-1:], marks=pytest.mark.planted("no_folder_sync")),
        pytest.param("manifest_first", PAUSES_S, marks=pytest.mark.planted("manifest_first")),
    ],
    ids=["no_file_sync", "no_folder_sync", "manifest_first"],
)
def test_a_planted_bug_is_caught(
    tmp_path: Path,
    trainers: Trainers,
    figures: Callable[[str], None],
    kind: str,
    fault: str,
    pauses_s: tuple[float, ...],
) -> None:
    need_disks(kind)
    harness = PowerCuts(tmp_path, trainers, kind, SEED, fault, pauses_s=pauses_s)
    try:
        found = harness.run(MOST_CUTS_TO_CATCH, stop_at_first=True)
    finally:
        figures(harness.figures.line())
    assert found.lost or found.torn, f"{MOST_CUTS_TO_CATCH} power cuts did not show the planted bug {fault}"
