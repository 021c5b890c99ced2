"""The wall clock of a daemon jumps by 40 days, forward and back, while it works: its decisions are those of a calm one.

``faketime`` gives the daemon's process another wall clock, which a file sets anew while it runs. Both daemons get the
same saves, pins and restarts, and after each step they must show the same versions, in the same order, in both tiers.
(Retention by period is an operator's wish about wall-clock time and is left out: with a clock that jumps it means
something else.)
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import cairn
from cairn_api.names import VersionId
from cairnd.cli.daemon_client import Daemon
from cairnd.model import CopyState, Tier, Version, VersionState
from tests.crash import oracle, ranks
from tests.crash.pausing import hold_saves
from tests.crash.test_power_cut import SEED
from tests.crash.trainer import JOB, Trainer, Trainers
from tests.daemon_process import DaemonProcess
from tests.promises import Evidence, proof_size

STEPS = proof_size(8, 60)
DAYS = 40
LEASE_S = 60.0
"""Clients come back to a restarted daemon sooner; else it would persist the newest version of each job."""
HOUR_S = 3600.0
JOBS: Mapping[str, float] = {JOB: 0.0, "hourly": HOUR_S}
"""Each job with its ``persistent_time_interval``: all versions go to tier 2, or one in an hour."""

_LIBRARIES = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib*/faketime/libfaketimeMT.so.1")
_SWEEP_GRACE_S = 0.2

Shown = list[tuple[str, str, tuple[str, ...], bool]]


class WallClock:
    """The wall clock of one daemon: real until it jumps."""

    def __init__(self, folder: Path, library: str) -> None:
        self._path = folder / "clock"
        self.jump(0)
        self.environment = {
            "LD_PRELOAD": library,
            "FAKETIME_TIMESTAMP_FILE": str(self._path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def jump(self, days: int) -> None:
        """From now on it is *days* after (negative: before) the machine's own."""
        new = self._path.with_suffix(".new")
        new.write_text(f"{days:+d}d\n")
        new.rename(self._path)


class Course:
    """One daemon and what is done to it, step by step; equal numbers mean equal steps."""

    def __init__(self, folder: Path, clock: WallClock | None, trainers: Trainers) -> None:
        self.daemon = DaemonProcess(
            folder, environment=clock.environment if clock else {}, num_of_version_in_retention=3,
            tier2_num_of_version_in_retention=2, tier2_keep_every=4, tier2_delete_grace_s=_SWEEP_GRACE_S,
            lease_s=LEASE_S,
        )  # fmt: skip
        self.clock = clock
        self._folder = folder
        self._clients = {
            job: cairn.connect(job=job, runtime_dir=str(self.daemon.runtime_dir), persistent_time_interval=interval_s)
            for job, interval_s in JOBS.items()
        }
        self.holder: Trainer = trainers.start(
            hold_saves, str(self.daemon.runtime_dir), str(folder / "held"), "held", str(folder), 1
        )
        ranks.wait_until(lambda: bool(self.held.tried), "one save is open all the time", trainer=self.holder)

    @property
    def held(self) -> oracle.Diary:
        """What the rank noted that keeps a save open during all jumps."""
        return oracle.Diary.read(self._folder / "held")

    def step(self, number: int) -> dict[str, object]:
        """Save in each job, wait until retention has nothing left to do, and say what the daemon shows."""
        for job, client in self._clients.items():
            with client.create(f"step{number}") as checkpoint:
                checkpoint.save("model.pt", {"step": torch.tensor(number)})
            client.wait(f"step{number}", durability="tier1" if JOBS[job] else "tier2", timeout=60)
        asked = Daemon(self.daemon.runtime_dir)
        try:
            if number == STEPS // 3:
                asked.pin(JOB, f"step{number - 1}", "for the test")
            shown: dict[str, object] = {job: self._settled(asked, job) for job in JOBS}
            shown["last_persisted"] = asked.status().last_persisted
        finally:
            asked.close()
        shown["newest"] = {job: str(client.latest()) for job, client in self._clients.items()}
        if number == STEPS - 1:  # the sweep comes once in a second
            shown["bucket"] = self._data_in_bucket(shown[JOB])
        return shown

    def end(self) -> list[str]:
        """Let the open save go, stop; problems of it, and of both tiers."""
        (self._folder / "go-0").touch()
        assert self.holder.end() == 0, self.holder.log
        for client in self._clients.values():
            client.close()
        self.daemon.kill9()
        torn = [what for job in (*JOBS, "held") for what in oracle.examine(self.daemon.tier1_path, job).torn]
        return [*self.held.failed, *torn]

    def _settled(self, asked: Daemon, job: str) -> Shown:
        shown: Shown = []

        def settled() -> bool:
            planned = asked.prune(job, None, dry_run=True).deletions
            versions = [item.version for item in asked.versions(job).versions]
            shown[:] = [(str(item.id), item.state.value, _tiers(item), item.pinned) for item in versions]
            busy = any(copy.state is CopyState.COPYING for item in versions for copy in item.copies.values())
            return not (planned or busy or any(item.state is VersionState.DELETING for item in versions))

        ranks.wait_until(settled, "retention is applied", describe=lambda: shown)
        return shown

    def _data_in_bucket(self, shown: object) -> list[str]:
        """Versions whose data the bucket holds, once tombstoned ones were swept."""
        assert isinstance(shown, list)
        kept = [version for version, _, tiers, _ in shown if Tier.TIER2 in tiers]
        folder = self.daemon.bucket_path / JOB

        def data() -> list[str]:
            return sorted((path.parent.name for path in folder.glob("e*/model.pt")), reverse=True)

        ranks.wait_until(lambda: data() == kept, "the bucket holds what is kept", describe=lambda: (kept, data()))
        return data()


def _tiers(version: Version) -> tuple[str, ...]:
    return tuple(tier.value for tier in (Tier.TIER1, Tier.TIER2) if version.has(tier))


@pytest.mark.promise("pause")
@pytest.mark.timeout(600)
def test_a_clock_that_jumps_by_forty_days_changes_no_decision(
    tmp_path: Path, trainers: Trainers, evidence: Evidence
) -> None:
    library = _need_faketime()
    generator = random.Random(SEED)  # noqa: S311 - moments of jumps, not secrets
    jumps = {
        step: (DAYS, -DAYS, 0)[place % 3]
        for place, step in enumerate(sorted(generator.sample(range(STEPS), STEPS // 2)))
    }
    restarts = set(generator.sample(range(1, STEPS), STEPS // 5))
    with ExitStack() as stack:
        courses = []
        for name in ("calm", "jumping"):
            folder = tmp_path / name
            folder.mkdir()
            courses.append(Course(folder, WallClock(folder, library) if name == "jumping" else None, trainers))
            stack.enter_context(courses[-1].daemon)
        different = []
        for step in range(STEPS):
            for course in courses:
                if course.clock and step in jumps:
                    course.clock.jump(jumps[step])
                if step in restarts:
                    course.daemon.restart()
            calm, jumping = (course.step(step) for course in courses)
            different += [
                f"step {step}, {what}: {jumping[what]} instead of {calm[what]}"
                for what in calm
                if calm[what] != jumping[what]
            ]
        problems = [problem for course in courses for problem in course.end()]
        problems += [f"the open save was lost: {course.held}" for course in courses if not course.held.promised]
    evidence(
        tried=len(jumps),
        broken=len(different) + len(problems),
        detail=f"{len(jumps)} jumps of the wall clock by 40 to 80 days, {len(restarts)} restarts: as a calm daemon",
    )
    assert not different, "\n".join(different)
    assert not problems


@pytest.mark.promise("pause")
def test_a_daemon_that_starts_with_a_wrong_clock_sweeps_nobodys_upload(tmp_path: Path, evidence: Evidence) -> None:
    library = _need_faketime()
    clock = WallClock(tmp_path, library)
    clock.jump(DAYS)
    another = tmp_path / "bucket" / JOB / str(VersionId(1, 1, "step1")) / ".upload-0123456789abcdef"
    stale = another.with_name(".upload-fedcba9876543210")
    another.parent.mkdir(parents=True)
    for path in (another, stale):
        path.write_bytes(b"half a partition")
    two_days_ago_s = time.time() - 2 * 24 * HOUR_S
    os.utime(stale, (two_days_ago_s, two_days_ago_s))
    with DaemonProcess(tmp_path, environment=clock.environment):
        ranks.wait_until(lambda: not stale.exists(), "the daemon sweeps what was given up")
    evidence(tried=1, broken=not another.exists())
    assert another.exists(), "another daemon's upload that is under way was taken for one that was given up"


def _need_faketime() -> str:
    found: Iterator[Path] = (path for pattern in _LIBRARIES for path in Path("/").glob(pattern.lstrip("/")))
    library = next(found, None)
    if library is None:
        pytest.skip("NOT PROVED HERE: faketime is missing; install it (`make test-faults` does)")
    return str(library)
