"""Every state in which a power cut may leave the disk recovers: nothing promised is lost, nothing torn is listed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash import block_replay, oracle
from tests.crash.block_recording import KEEP, record
from tests.crash.block_replay import Image, Judged, Recording
from tests.crash.logged_disk import need_logged_disks
from tests.crash.test_power_cut import SEED
from tests.crash.trainer import JOB, Trainers, train
from tests.daemon_process import DaemonProcess
from tests.promises import Evidence, full_run, proof_size

IMAGES = proof_size(250, 5000)
"""On each file system."""

STARTS = proof_size(1, 10)
"""On each file system: images on which a daemon is started and a training resumes."""

SAVES, KILLS = (8, 7) if full_run() else (6, 1)
_MOST_SHOWN = 20
_PROCESSES = min(2, os.cpu_count() or 1)
_JUDGED_WITHIN_S = 120 + IMAGES
"""Thirty times what it takes on an idle machine."""


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.timeout(_JUDGED_WITHIN_S + 300)
@pytest.mark.promise("replay")
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_every_state_of_the_disk_recovers(
    tmp_path: Path, trainers: Trainers, figures: Callable[[str], None], evidence: Evidence, kind: str
) -> None:
    need_logged_disks(kind)
    recording = record(tmp_path, trainers, kind, SAVES, KILLS, SEED)
    records = recording.records()
    chosen = block_replay.choose_images(records, IMAGES, SEED)
    judged = _judge_side_by_side(tmp_path, trainers, recording, chosen)
    evidence(tried=judged.images, broken=judged.broken, detail=f"{judged.images:,} on {kind}")
    figures(
        f"block replay on {kind}: {judged.images} images from a log of {len(records)} writes and flushes, "
        f"{judged.versions} versions listed, {len(judged.lost)} lost, {len(judged.torn)} torn, "
        f"{len(judged.unlike)} recoveries unlike, {len(judged.unmountable)} unmountable (seed {SEED})"
    )
    again = f"again: python -m tests.crash.block_replay {tmp_path} {kind} {KEEP} CUT SEED"
    assert not judged.broken, "\n".join([*judged.findings[:_MOST_SHOWN], again])
    assert judged.images == IMAGES, "the log has too few different states: record more saves"
    assert judged.versions > judged.images, "so few versions prove nothing"
    for number, image in enumerate(random.Random(SEED).sample(chosen, STARTS)):  # noqa: S311 - chooses disks
        _resume(tmp_path / f"start-{number}", trainers, recording, image)


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("fault", ["no_file_sync", "no_folder_sync", "manifest_first"])
def test_a_bug_in_what_was_recorded_is_found(
    tmp_path: Path, trainers: Trainers, figures: Callable[[str], None], kind: str, fault: str
) -> None:
    need_logged_disks(kind)
    recording = record(tmp_path, trainers, kind, saves=2, kills=0, seed=SEED, fault=fault)
    judged = block_replay.judge(recording, block_replay.every_prefix(recording.records()), stop_at_first=True)
    figures(f"block replay on {kind} with {fault} planted: found in image {judged.images}: {bool(judged.broken)}")
    # Which of the two a file that was not synced comes to depends on what a journal's commit happens to take along.
    assert judged.torn or (fault != "manifest_first" and judged.lost)
    assert not judged.unmountable


def _resume(folder: Path, trainers: Trainers, recording: Recording, image: Image) -> None:
    """A daemon and a training go on with what is left on *image*."""
    with block_replay.made(recording, image) as tier1_path:
        tier1_path.mkdir(exist_ok=True)
        listed = oracle.examine(tier1_path, JOB).listed
        with DaemonProcess(folder, persistent_storage_path="", tier1_path=tier1_path) as daemon:
            diary_path = folder / "diary"
            trainer = trainers.start(train, str(daemon.runtime_dir), str(diary_path), "on", "tier1", 0.0, 1, {})
            assert trainer.end() == 0, f"{image}: {trainer.log}\n{daemon.log}"
        diary = oracle.Diary.read(diary_path)
        assert not diary.wrong, f"{image}: {diary.wrong}"
        assert not diary.failed, f"{image}: {diary.failed}"
        assert diary.loaded == sorted(listed)[-1:], f"{image}: {listed} were there, {diary.loaded} was loaded"
        assert len(diary.promised) == 1


def _judge_side_by_side(folder: Path, trainers: Trainers, recording: Recording, images: list[Image]) -> Judged:
    """Judge in several processes; late cuts take longer, so each process gets early and late ones."""
    results = [folder / f"judged-{number}.json" for number in range(_PROCESSES)]
    judges = [
        trainers.start(block_replay.judge_into, str(result), recording, images[number::_PROCESSES])
        for number, result in enumerate(results)
    ]
    together = Judged()
    for judge, result in zip(judges, results, strict=True):
        assert judge.end(timeout_s=_JUDGED_WITHIN_S) == 0, judge.log
        together.add(block_replay.read_result(result))
    return together
