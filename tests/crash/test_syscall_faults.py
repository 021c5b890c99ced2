"""Each durable system call of one save fails once, or is the daemon's last: no false promise, a clean recovery."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crash import oracle, ranks
from tests.crash.syscalls import Injection, need_strace
from tests.crash.trainer import JOB, Trainers, train
from tests.daemon_process import DaemonProcess

_MOST_POINTS = 60
_LONGEST_SAVE_S = 60.0


@dataclass(slots=True)
class Point:
    """One daemon, one save or two, and a fault in call *number* of it."""

    trainers: Trainers
    folder: Path
    number: int

    @property
    def diary(self) -> oracle.Diary:
        """What the trainers of this point wrote down."""
        return oracle.Diary.read(self.folder / "diary")

    def daemon(self, keep: int) -> DaemonProcess:
        """A daemon on folders of its own that keeps *keep* versions."""
        return DaemonProcess(self.folder, persistent_storage_path="", num_of_version_in_retention=keep)

    def save(self, daemon: DaemonProcess, calls: str, what: str, saves: int = 1) -> list[str]:
        """Save under the fault until the trainer and what it set off have ended, or the daemon; the injected errors."""
        with Injection(daemon.pid, calls, what, self.number, self.folder / "strace.log") as injection:
            arguments: tuple[object, ...] = (
                str(daemon.runtime_dir),
                str(self.folder / "diary"),
                "save",
                "tier1",
                0.0,
                saves,
                {},
            )
            trainer = self.trainers.start(train, *arguments)

            def ended() -> bool:
                deleted = len(re.findall(r"copy_evicted \S+ tier=tier1", daemon.log))
                return not daemon.running or (not trainer.running and deleted == saves - 1)

            ranks.wait_until(
                ended, "the end of the save or of the daemon", _LONGEST_SAVE_S, describe=lambda: daemon.log
            )
            trainer.kill9()
            return injection.hits

    def check_saving_works(self, daemon: DaemonProcess) -> None:
        """Save once more without a fault."""
        before = len(self.diary.promised)
        trainer = self.trainers.start(ranks.save_once, str(daemon.runtime_dir), str(self.folder / "diary"), "after")
        assert trainer.end() == 0, f"{trainer.log}\n{daemon.log}"
        assert len(self.diary.promised) == before + 1


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("calls", "saves"),
    [("^fsync$", 1), ("^rename", 1), ("^mkdir", 1), ("^pwrite64$", 1), ("^(unlink|unlinkat|rmdir)$", 2)],
    ids=["fsync", "rename", "mkdir", "pwrite64", "unlink"],
)
def test_killed_in_the_nth_call(
    tmp_path: Path, trainers: Trainers, figures: Callable[[str], None], calls: str, saves: int
) -> None:
    """Only the newest version is kept, so that of two saves the first is deleted."""
    need_strace()
    number, untouched, kept = 0, False, 0
    while not untouched:
        number += 1
        assert number < _MOST_POINTS, f"a save makes no end of calls of {calls}"
        point = Point(trainers, tmp_path / str(number), number)
        with point.daemon(keep=1) as daemon:
            point.save(daemon, calls, "signal=KILL", saves)
            untouched = daemon.running
            daemon.kill9()
            found = oracle.examine(daemon.tier1_path, JOB, point.diary.tried)
            assert not found.torn, f"killed in call {number}: {found.torn}"
            assert not oracle.lost(point.diary.promised, found, keep=1), f"killed in call {number}: {found}"
            daemon.start()
            recovered = oracle.examine(daemon.tier1_path, JOB, point.diary.tried)
            assert recovered == oracle.Found(found.listed, {}, ()), f"killed in call {number}: {found}"
            point.check_saving_works(daemon)
        kept += bool(found.listed) and not untouched
    assert number > 1, f"a save makes no call of {calls}"
    figures(f"killed in the n-th {_plain(calls)}: {number - 1} points, 0 lost, 0 torn, {kept} had a version already")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("calls", "error"), [("^fsync$", "EIO"), ("^pwrite64$", "ENOSPC"), ("^rename", "EIO"), ("^fallocate$", "ENOSPC")]
)
def test_an_error_of_the_nth_call(
    tmp_path: Path, trainers: Trainers, figures: Callable[[str], None], calls: str, error: str
) -> None:
    need_strace()
    number, hits = 0, [""]
    while hits:
        number += 1
        assert number < _MOST_POINTS, f"a save makes no end of calls of {calls}"
        point = Point(trainers, tmp_path / str(number), number)
        with point.daemon(keep=2) as daemon:
            hits = point.save(daemon, calls, f"error={error}")
            assert daemon.running, f"{hits} ended the daemon:\n{daemon.log}"
            assert bool(point.diary.promised) is not bool(hits), f"promised: {point.diary.promised}, failed: {hits}"
            point.check_saving_works(daemon)
            daemon.restart()
            found = oracle.examine(daemon.tier1_path, JOB, point.diary.tried)
            assert not found.torn, f"{hits}: {found.torn}"
            assert not oracle.lost(point.diary.promised, found, keep=2)
    assert number > 1, f"a save makes no call of {calls}"
    figures(f"{error} of the n-th {_plain(calls)}: {number - 1} points, 0 false promises, 0 torn")


def _plain(calls: str) -> str:
    return calls.strip("^()$").replace("|", ", ")
