"""Records what a real daemon writes to its disk: saves, deletions, a kill in the middle of a save, and recovery."""

from __future__ import annotations

import random
from pathlib import Path

from tests.crash import faulty_daemon, oracle, ranks
from tests.crash.block_replay import TIER1, Recording
from tests.crash.logged_disk import LoggedDisk
from tests.crash.trainer import Trainer, Trainers, train
from tests.daemon_process import DaemonProcess

KEEP = 3
"""So few that most saves delete one."""

_MOST_BYTES_OF_A_SAVE = 500_000


def record(
    folder: Path, trainers: Trainers, kind: str, saves: int, kills: int, seed: int, fault: str = ""
) -> Recording:
    """Save *saves* versions, be killed in the save after them, recover; *kills* times, always with the same tags.

    After a kill the disk is mounted again, so that no journal gets long: replaying it is most of what an image costs.
    """
    moments = random.Random(seed)  # noqa: S311 - moments of kills, not secrets
    with LoggedDisk(folder, kind) as disk:
        daemon = DaemonProcess(
            folder,
            environment=faulty_daemon.environment(),
            persistent_storage_path="",
            tier1_path=disk.path / TIER1,
            program=faulty_daemon.program(fault),
            num_of_version_in_retention=KEEP,
        )
        with daemon:
            arguments = (str(daemon.runtime_dir), str(disk.diary_path), "again", "tier1", 0.0)
            for _ in range(kills):
                promises = len(oracle.Diary.read(disk.diary_path).promised) + saves
                trainer = trainers.start(train, *arguments, 10**6, {})
                _wait_for_promises(disk, promises, trainer)
                _wait_for_log(disk, disk.log_path.stat().st_size + moments.randrange(_MOST_BYTES_OF_A_SAVE), trainer)
                daemon.kill9()
                trainer.kill9()
                disk.mount_again()
                daemon.start()
            trainer = trainers.start(train, *arguments, saves, {})
            assert trainer.end() == 0, f"{trainer.log}\n{daemon.log}"
            assert daemon.stop() == 0, daemon.log
        return Recording(kind, KEEP, disk.empty_path, disk.log_path)


def _wait_for_promises(disk: LoggedDisk, number: int, trainer: Trainer) -> None:
    ranks.wait_until(
        lambda: len(oracle.Diary.read(disk.diary_path).promised) >= number, f"{number} promises", trainer=trainer
    )


def _wait_for_log(disk: LoggedDisk, size_bytes: int, trainer: Trainer) -> None:
    ranks.wait_until(
        lambda: disk.log_path.stat().st_size >= size_bytes, f"a log of {size_bytes} bytes", trainer=trainer
    )
