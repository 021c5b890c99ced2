"""Cuts the power of a real daemon's disk at random moments and judges what is left.

One cycle: the daemon starts on what the last cut left (recovery), a trainer loads the newest version and saves one
after the other, the disk loses its power at a random moment, both processes are killed, the journal is replayed, and
every byte of every listed version is read and compared with what was saved. Retention is small, so deletions are cut in
half too.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cairn_api.names import VersionId
from tests.crash import faulty_daemon, oracle, ranks
from tests.crash.disks import LoopDisk
from tests.crash.trainer import JOB, Trainer, Trainers, train_after
from tests.daemon_process import DaemonProcess

KEEP = 4
_DISK_BYTES = 384 * 1024 * 1024  # xfs makes nothing below 300 MiB
_EARLY_CUTS = 0.15
_LONGEST_WAIT_S = 0.25
PAUSES_S = (0.0, 0.0, 0.03, 0.15)


@dataclass(slots=True)
class Figures:
    """What a run of cuts came to. All but the first four must be empty."""

    kind: str
    fault: str
    seed: int
    cuts: int = 0
    tried: int = 0
    promised: int = 0
    loaded: int = 0
    seconds: float = 0.0
    lost: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    """Recovery that did not find what was there, or found something else the second time."""
    wrong: list[str] = field(default_factory=list)
    """Versions that loaded with other tensors than were saved, or another version than the newest."""

    @property
    def broken(self) -> list[str]:
        """All that was not as promised."""
        return [*self.lost, *self.torn, *self.unlike, *self.wrong]

    def line(self) -> str:
        """For the report."""
        planted = f" with {self.fault} planted" if self.fault else ""
        return (
            f"power cuts on {self.kind}{planted}: {self.cuts} cuts, {self.tried} saves begun, "
            f"{self.promised} promised, {len(self.lost)} lost, {len(self.torn)} torn, {self.loaded} loaded equal, "
            f"{len(self.wrong)} wrong, {len(self.unlike)} recoveries unlike ({self.seconds:.0f} s, seed {self.seed})"
        )


class _Known(NamedTuple):
    """How much of what was in the diary before a cycle."""

    promised: int
    loaded: int
    afresh: int
    wrong: int

    @classmethod
    def of(cls, diary: oracle.Diary) -> _Known:
        return cls(len(diary.promised), len(diary.loaded), diary.begun_afresh, len(diary.wrong))


class PowerCuts:
    """One disk, cut again and again; see the module."""

    def __init__(
        self,
        folder: Path,
        trainers: Trainers,
        kind: str,
        seed: int,
        fault: str = "",
        *,
        pauses_s: tuple[float, ...] = PAUSES_S,
    ) -> None:
        """*pauses_s*: what trainers wait between two saves, one of these in each cycle."""
        self._pauses_s = pauses_s
        self._folder = folder
        self._trainers = trainers
        self._random = random.Random(seed)  # noqa: S311 - moments of cuts, not secrets
        self._diary_path = folder / "diary"
        self._diary = oracle.Diary()
        self._contents = oracle.Contents()
        self._cut_early = False
        self._missing: set[VersionId] = set()
        self._seen_torn: set[str] = set()
        self.figures = Figures(kind, fault, seed)

    def run(self, cuts: int, *, stop_at_first: bool = False) -> Figures:
        """Cut the power *cuts* times (with *stop_at_first*, until something is not as promised) and recover at last."""
        figures = self.figures
        start_s = time.monotonic()
        with LoopDisk(self._folder, figures.kind, _DISK_BYTES) as disk:
            while figures.cuts < cuts and not (stop_at_first and figures.broken):
                self._cycle(disk, last=False)
                figures.cuts += 1
                self._judge(disk)
            if not stop_at_first:
                self._cycle(disk, last=True)
        figures.seconds = time.monotonic() - start_s
        return figures

    def _cycle(self, disk: LoopDisk, *, last: bool) -> None:
        before = self._examine(disk)
        self.figures.unlike += oracle.unlike_recoveries(disk.path / "tier1")
        name, pause_s = f"c{self.figures.cuts}", self._random.choice(self._pauses_s)
        go_on_path = self._folder / f"go-on-{name}"
        known = _Known.of(self._read_on())
        trainer = self._trainers.start(  # its process is made while the daemon starts
            train_after, str(go_on_path),
            str(self._folder / "run"), str(self._diary_path), name, "tier1", pause_s, 1 if last else 10**6, {},
        )  # fmt: skip
        daemon = DaemonProcess(
            self._folder,
            environment=faulty_daemon.environment(),
            persistent_storage_path="",
            tier1_path=disk.path / "tier1",
            program=faulty_daemon.program(self.figures.fault),
            num_of_version_in_retention=KEEP,
        )
        with daemon:
            after = self._examine(disk)
            if after.listed != before.listed or after.unfinished:
                self.figures.unlike.append(f"after cut {self.figures.cuts}: {before} became {after}")
            go_on_path.touch()
            if last:
                if trainer.end() != 0:
                    self.figures.wrong.append(f"the last trainer failed: {trainer.log}")
            else:
                self._wait_for_moment(known.promised, trainer)
                disk.cut_power()
                trainer.kill9()
        self._check_loaded(before, known)
        if not last:
            disk.power_on()

    def _wait_for_moment(self, promised_before: int, trainer: Trainer) -> None:
        # Early ones never come twice in a row: a version that several launches died on would rightly be passed over.
        self._cut_early = not self._cut_early and self._random.random() < _EARLY_CUTS
        if self._cut_early:
            time.sleep(self._random.uniform(0, 2 * _LONGEST_WAIT_S))
            return
        ranks.wait_until(
            lambda: len(self._read_on().promised) > promised_before, "the first save of a trainer", trainer=trainer
        )
        time.sleep(self._random.uniform(0, _LONGEST_WAIT_S))

    def _check_loaded(self, before: oracle.Found, known: _Known) -> None:
        now, newest = self._read_on(), max(before.listed, default=None)
        self.figures.wrong += now.wrong[known.wrong :]
        for version in now.loaded[known.loaded :]:
            self.figures.loaded += 1
            if version != newest:
                self.figures.wrong.append(f"{version} was loaded, {newest} is the newest")
        if now.begun_afresh > known.afresh and newest is not None:
            self.figures.wrong.append(f"nothing was loaded, {newest} is the newest")

    def _judge(self, disk: LoopDisk) -> None:
        diary = self._read_on()
        found = self._examine(disk)
        self.figures.tried, self.figures.promised = len(diary.tried), len(diary.promised)
        lost = oracle.lost(diary.promised, found, KEEP) - self._missing
        self._missing |= lost
        self.figures.lost += map(str, sorted(lost))
        self.figures.torn += [f"{what}: {why}" for what, why in found.torn.items() if what not in self._seen_torn]
        self._seen_torn |= set(found.torn)

    def _examine(self, disk: LoopDisk) -> oracle.Found:
        path = disk.path / "tier1"
        path.mkdir(exist_ok=True)
        return oracle.examine(path, JOB, self._read_on().tried, contents=self._contents)

    def _read_on(self) -> oracle.Diary:
        self._diary.read_on(self._diary_path)
        return self._diary
