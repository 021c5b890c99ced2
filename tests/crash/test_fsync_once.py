"""A disk that reports an error once and then says yes: no promise is made for what it does not hold.

After a write that failed, Linux takes the pages for clean: a second fsync succeeds, and what is read comes from memory
until the disk is mounted again. So each point ends with that, and with a look at what a power cut would have left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

import cairn
from tests.crash import block_replay, faulty_daemon, oracle
from tests.crash.block_log import REFUSED
from tests.crash.block_replay import ALL, NONE, TIER1, Image, Recording
from tests.crash.logged_disk import LoggedDisk, need_logged_disks
from tests.crash.test_power_cut import SEED
from tests.crash.trainer import JOB, DiaryWriter, Trainers, load_newest, save_one
from tests.daemon_process import DaemonProcess
from tests.promises import Evidence, proof_size

STEP = proof_size(10, 2)
"""Every so many-th write and flush of two saves fails; which ones is the seed's choice."""

_KEEP = 10**6
_MANIFEST = "bytes " + b'"partitions"'.hex()
_MOST_POINTS = 300


@dataclass(slots=True)
class Figures:
    """What came of a number of failures. All but the first three must be empty."""

    failures: int = 0
    promised: int = 0
    failed_saves: int = 0
    lost: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    """Daemons that died, saves that did not work on a disk mounted again."""

    @property
    def broken(self) -> int:
        """How many findings there are."""
        return len(self.lost) + len(self.torn) + len(self.stuck)


def save_on_a_failing_disk(runtime_dir: str, diary_path: str, control_path: str, name: str, moment: str) -> None:
    """Load; save; have the disk fail at *moment*; save, and once more. Saves that fail are noted."""
    diary = DiaryWriter(Path(diary_path))
    with cairn.connect(job=JOB, runtime_dir=runtime_dir) as client:
        load_newest(client, diary)
        save_one(client, diary, f"{name}-before", "tier1")
        Path(control_path).write_text(moment)
        for tag in (f"{name}-failing", f"{name}-later"):
            try:
                save_one(client, diary, tag, "tier1")
            except cairn.CairnError as error:
                diary.note("failed", f"{tag}: {type(error).__name__}: {error}")


class FailingDisk:
    """One disk and one daemon after the other on it; see the module."""

    def __init__(self, folder: Path, trainers: Trainers, disk: LoggedDisk, fault: str = "") -> None:
        self._folder = folder
        self._trainers = trainers
        self._disk = disk
        self._fault = fault
        self._points = count()
        self._lost: set[str] = set()
        self.figures = Figures()

    def fail_at(self, moment: str) -> bool:
        """Let the disk fail at *moment* of two saves; returns whether it came to that."""
        before = oracle.Diary.read(self._disk.diary_path)
        refused = self._refused()
        name = f"p{next(self._points)}"
        where = f"{moment} of {name}"
        with DaemonProcess(
            self._folder,
            environment=faulty_daemon.environment(),
            persistent_storage_path="",
            tier1_path=self._disk.path / TIER1,
            program=faulty_daemon.program(self._fault),
            num_of_version_in_retention=_KEEP,
        ) as daemon:
            paths = (str(daemon.runtime_dir), str(self._disk.diary_path), str(self._disk.control_path))
            trainer = self._trainers.start(save_on_a_failing_disk, *paths, name, moment)
            if trainer.end() != 0:
                self.figures.stuck.append(f"{where}: {trainer.log}")
            if not daemon.running:
                self.figures.stuck.append(f"{where}: the daemon died: {daemon.log}")
            self._judge_power_cut(where)
        self._disk.control_path.write_text("off")
        self._disk.mount_again()
        self._judge(where)
        diary = oracle.Diary.read(self._disk.diary_path)
        self.figures.promised += len(diary.promised) - len(before.promised)
        self.figures.failed_saves += len(diary.failed) - len(before.failed)
        self.figures.torn += [f"{where}: {what} was loaded" for what in diary.wrong[len(before.wrong) :]]
        failures = self._refused() - refused
        self.figures.failures += failures
        return failures > 0

    def _refused(self) -> int:
        return sum(record.kind == REFUSED for record in self._disk.records())

    def _judge(self, where: str) -> None:
        diary = oracle.Diary.read(self._disk.diary_path)
        found = oracle.examine(self._disk.path / TIER1, JOB, diary.tried)
        self.figures.torn += [f"{where}: {what}: {why}" for what, why in found.torn.items()]
        lost = set(map(str, oracle.lost(diary.promised, found, _KEEP))) - self._lost
        self._lost |= lost
        self.figures.lost += [f"{where}: {what}" for what in sorted(lost)]

    def _judge_power_cut(self, where: str) -> None:
        """What a power cut would leave now, with what the disk still had to flush and without."""
        recording = Recording(self._disk.kind, _KEEP, self._disk.empty_path, self._disk.log_path)
        end = len(recording.records())
        judged = block_replay.judge(recording, [Image(end, ALL), Image(end, NONE)])
        self.figures.lost += [f"{where}, power cut: {what}" for what in judged.lost]
        self.figures.torn += [f"{where}, power cut: {what}" for what in judged.torn]
        self.figures.stuck += [f"{where}, power cut: {what}" for what in judged.unlike + judged.unmountable]


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.timeout(900)
@pytest.mark.promise("fsync_once")
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_nothing_is_promised_that_a_failing_disk_does_not_hold(
    tmp_path: Path, trainers: Trainers, figures: Callable[[str], None], evidence: Evidence, kind: str
) -> None:
    need_logged_disks(kind)
    with LoggedDisk(tmp_path, kind) as disk:
        failing = FailingDisk(tmp_path, trainers, disk)
        assert failing.fail_at(_MANIFEST), "no write has a manifest"
        for word in ("flush", "write"):
            for number in _numbers():
                if not failing.fail_at(f"{word} {number}"):
                    break
        assert not failing.fail_at("off"), "a disk that is well again fails"
    found = failing.figures
    evidence(tried=found.failures, broken=found.broken, detail=f"{found.failures} on {kind}")
    figures(
        f"a disk that fails once, {kind}: {found.failures} failures, {found.promised} saves promised, "
        f"{found.failed_saves} failed, {len(found.lost)} lost, {len(found.torn)} torn (seed {SEED})"
    )
    assert not found.broken, found
    assert found.failed_saves > 0, "no failure was noticed"


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.timeout(120)
@pytest.mark.planted("swallowed_sync_error")
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_daemon_that_ignores_a_failed_sync_is_caught(
    tmp_path: Path, trainers: Trainers, figures: Callable[[str], None], kind: str
) -> None:
    need_logged_disks(kind)
    with LoggedDisk(tmp_path, kind) as disk:
        failing = FailingDisk(tmp_path, trainers, disk, "swallowed_sync_error")
        assert failing.fail_at(_MANIFEST), "no write has a manifest"
    found = failing.figures
    figures(f"a disk that fails once, {kind}, swallowed_sync_error planted: {len(found.lost)} lost")
    assert found.lost


def _numbers() -> Iterator[int]:
    first = 1 + SEED % STEP
    yield from range(first, _MOST_POINTS, STEP)
    raise AssertionError("two saves make no end of writes")
