"""A daemon that lives with everything at once for a long time, and what it holds meanwhile.

Ranks of several jobs save and load all the time. One generator, whose seed is printed, draws what happens besides:
ranks and the daemon are killed and started again, the bucket is full or read-only for a while, an operator verifies,
prunes and looks. The daemon is killed in the first half only, so that the second half shows one daemon growing old.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

import cairn
from cairn_api.names import VersionId
from cairnd.cli.daemon_client import Daemon
from cairnd.model import CopyState, Tier
from cairnd.upkeep.verifier import Finding
from tests.crash import oracle, ranks
from tests.crash.disks import Mount, Tmpfs
from tests.crash.trainer import DiaryWriter, Trainer, Trainers, load_newest, same, save_one, state_of
from tests.daemon_process import DaemonProcess

MIB = 1024 * 1024
JOBS = ("job-0", "job-1", "job-2")
KEEP = 4
_PAUSE_S = 0.5
_BUCKET_BYTES = 128 * MIB
_LOAD_EVERY = 5
_PATIENCE_S = 120.0


def live(runtime_dir: str, diary_path: str, job: str, name: str) -> None:
    """Resume, then save about every half a second and load now and then, for ever."""
    torch.set_num_threads(1)
    diary = DiaryWriter(Path(diary_path))
    with cairn.connect(job=job, runtime_dir=runtime_dir, persistent_time_interval=0) as client:
        load_newest(client, diary)
        step = 0
        while True:
            tag = f"{name}-s{step}"
            try:
                save_one(client, diary, tag, "tier1")
                if step % _LOAD_EVERY == 0 and not same(client.load(tag, "model.pt"), state_of(tag, "model.pt")):
                    diary.note("wrong", tag)
            except cairn.CairnError as error:
                diary.note("failed", f"{tag}: {type(error).__name__}: {error}")
            step += 1
            time.sleep(_PAUSE_S)


@dataclass(frozen=True, slots=True)
class Sample:
    """What the daemon holds at one moment. ``life`` counts its starts."""

    at_s: float
    life: int
    anonymous_bytes: int
    descriptors: int
    threads: int
    buffers: int
    temporary_files: int
    records: int


@dataclass(frozen=True, slots=True)
class Growth:
    """How a figure grew: its last value on the line through the second half, and what the whole run would add."""

    level: float
    per_run: float
    uncertain: float
    """Two standard errors of ``per_run``: a figure that goes up and down has a slope by chance."""

    def beyond(self, bound: float) -> bool:
        """Whether it surely grew by more than *bound*."""
        return self.per_run - self.uncertain > bound


BOUNDS: Mapping[str, float] = {
    "anonymous_bytes": 16 * MIB,  # in 30 minutes of 6 saves a second: less than 2 KiB a save
    "descriptors": 4,  # one leaked for each rank that is killed would be a hundred
    "threads": 4,
    "buffers": 2,
    "temporary_files": 4,
    "records": 8,  # below .cairn: jobs, requests, pins; versions are in the thousands
}


@dataclass(slots=True)
class Report:
    """What a soak came to."""

    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    promised: int = 0
    loaded: int = 0
    failed: list[str] = field(default_factory=list)
    log_lines: int = 0

    def growth(self) -> dict[str, Growth]:
        """Of every figure, over the second half and the last daemon."""
        half_s = self.samples[0].at_s + self.seconds / 2
        late = [item for item in self.samples if item.at_s >= half_s and item.life == self.samples[-1].life]
        times = [item.at_s for item in late]
        return {name: _line(times, [float(getattr(item, name)) for item in late], self.seconds) for name in BOUNDS}

    def text(self) -> str:
        """One phrase for the table."""
        did = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        grown = self.growth()
        held = []
        for name, value in grown.items():
            unit, label = (MIB, " MiB") if name.endswith("bytes") else (1, "")
            held.append(f"{name.replace('_', ' ')} {value.level / unit:.0f}{label} ({value.per_run / unit:+.1f})")
        return (
            f"{self.promised:,} saves promised, {self.loaded:,} resumes, {did}, "
            f"at the end (growth per run): {', '.join(held)}"
        )


class Soak:
    """See the module. Everything is below *folder*."""

    def __init__(self, folder: Path, trainers: Trainers, seconds: float, seed: int, sample_every_s: float) -> None:
        self._folder = folder
        self._trainers = trainers
        self._seconds = seconds
        self._sample_every_s = sample_every_s
        self._random = random.Random(seed)  # noqa: S311 - moments of faults, not secrets
        self._ranks: dict[str, Trainer] = {}
        self._launches = 0
        self._life = 1
        self._outage_until_s = 0.0
        self._end_outage: Callable[[], None] = lambda: None
        self.report = Report()

    def run(self) -> Report:
        """Soak; the report has everything that is not as promised."""
        report = self.report
        with (
            Tmpfs(self._folder, _BUCKET_BYTES, files=20_000) as bucket,
            DaemonProcess(
                self._folder, persistent_storage_path=f"file://{bucket.path}/objects", num_of_version_in_retention=KEEP,
                tier2_num_of_version_in_retention=KEEP, tier2_delete_grace_s=2.0, lease_s=20.0,
            ) as daemon,
        ):  # fmt: skip
            for job in JOBS:
                self._launch(daemon, job)
            self._live(daemon, bucket)
            self._end_outage()
            self._settle(daemon)
            self._judge(daemon)
        report.log_lines = daemon.log.count("\n")
        return report

    def _live(self, daemon: DaemonProcess, bucket: Mount) -> None:
        start_s = time.monotonic()
        next_sample_s = next_fault_s = start_s
        while (now_s := time.monotonic()) < start_s + self._seconds:
            if now_s >= self._outage_until_s:
                self._end_outage()
            if now_s >= next_fault_s:
                self._happens(daemon, bucket, early=now_s < start_s + self._seconds * 0.45)
                next_fault_s = time.monotonic() + self._random.uniform(0.5, 3.0)
            if now_s >= next_sample_s:
                self.report.samples.append(self._sample(daemon, bucket))
                next_sample_s = now_s + self._sample_every_s
            time.sleep(0.05)
        self.report.seconds = time.monotonic() - start_s

    def _happens(self, daemon: DaemonProcess, bucket: Mount, *, early: bool) -> None:
        kinds = ["rank kills", "outages", "verifications", "prunes", "looks", *(["daemon kills"] if early else [])]
        kind = self._random.choice(kinds)
        if kind == "daemon kills":
            daemon.kill9()
            time.sleep(self._random.choice((0.0, 0.5)))
            daemon.start()
            self._life += 1
        elif kind == "rank kills":
            job = self._random.choice(JOBS)
            self._ranks[job].kill9()
            self._launch(daemon, job)
        elif kind == "outages":
            if self._outage_until_s > time.monotonic():
                return
            self._end_outage = _full(bucket) if self._random.random() < 0.5 else _read_only(bucket)
            self._outage_until_s = time.monotonic() + self._random.uniform(1.0, 5.0)
        else:
            self._operate(daemon, kind)
        self.report.kinds[kind] = self.report.kinds.get(kind, 0) + 1

    def _operate(self, daemon: DaemonProcess, kind: str) -> None:
        job = self._random.choice(JOBS)
        try:
            with closing(Daemon(daemon.runtime_dir)) as asked:
                if kind == "verifications":
                    self._verify(asked, job)
                elif kind == "prunes":
                    asked.prune(job, None, dry_run=False)
                else:
                    asked.status()
                    asked.versions(None)
        except cairn.CairnError as error:
            if self._outage_until_s <= time.monotonic():
                self.report.problems.append(f"{kind}: {error}")

    def _verify(self, asked: Daemon, job: str) -> None:
        """Read all copies; a finding counts if the copy was whole before, is still wanted, and its tier answers."""
        found: list[Finding] = []
        judged = _copies(asked, job, CopyState.VERIFIED)  # others wait for a bucket that was away
        asked.verify(job, None, deep=True, report=lambda check: found.extend(check.findings))
        judged &= _copies(asked, job, CopyState.VERIFIED, CopyState.FAILED)  # retention took others meanwhile
        if self._outage_until_s <= time.monotonic():
            self.report.problems += [f"found by verify: {item}" for item in found if (item.id, item.tier) in judged]

    def _launch(self, daemon: DaemonProcess, job: str) -> None:
        self._launches += 1
        arguments = (str(daemon.runtime_dir), str(self._diary_path(job)), job, f"l{self._launches}")
        self._ranks[job] = self._trainers.start(live, *arguments)

    def _diary_path(self, job: str) -> Path:
        return self._folder / f"diary-{job}"

    def _sample(self, daemon: DaemonProcess, bucket: Mount) -> Sample:
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        anonymous = re.search(r"RssAnon:\s+(\d+) kB", status)
        threads = re.search(r"Threads:\s+(\d+)", status)
        assert anonymous is not None
        assert threads is not None
        return Sample(
            time.monotonic(),
            self._life,
            int(anonymous[1]) * 1024,
            len(ranks.descriptors(daemon.pid)),
            int(threads[1]),
            len(_inodes(ranks.capture_buffers(daemon.pid))),
            _count(daemon.tier1_path, "incoming/") + _count(bucket.path, ".upload-"),
            _count(daemon.tier1_path / ".cairn", ""),
        )

    def _settle(self, daemon: DaemonProcess) -> None:
        """Every rank dies; the daemon brings to tier 2 what still waits."""
        for rank in self._ranks.values():
            if not rank.running:
                self.report.problems.append(f"a rank ended by itself:\n{rank.log}")
            rank.kill9()
        ranks.wait_until(
            lambda: ranks.status(daemon).backlog_versions == 0 and ranks.status(daemon).open_versions == 0,
            "everything reaches tier 2 after the last outage",
            _PATIENCE_S,
            describe=lambda: (ranks.status(daemon), daemon.log[-3000:]),
        )
        with closing(Daemon(daemon.runtime_dir)) as asked:
            for job in JOBS:
                self._verify(asked, job)

    def _judge(self, daemon: DaemonProcess) -> None:
        report = self.report
        daemon.kill9()
        daemon.start()
        left = _count(daemon.tier1_path, "incoming/")
        daemon.kill9()
        if left:
            report.problems.append(f"{left} temporary files are left in tier 1 after a restart")
        for job in JOBS:
            diary = oracle.Diary.read(self._diary_path(job))
            found = oracle.examine(daemon.tier1_path, job, diary.tried)
            lost: set[VersionId] = oracle.lost(diary.promised, found, KEEP)
            report.problems += [f"lost: {job}/{version}" for version in sorted(lost)]
            report.problems += [f"torn: {job}/{what}: {why}" for what, why in found.torn.items()]
            report.problems += [f"wrong: {job}/{what}" for what in diary.wrong]
            report.promised += len(diary.promised)
            report.loaded += len(diary.loaded)
            report.failed += diary.failed
        if "defect" in daemon.log or "Traceback" in daemon.log:
            report.problems.append("the daemon's log has a traceback")


def _copies(asked: Daemon, job: str, *states: CopyState) -> set[tuple[VersionId, Tier]]:
    """Copies of versions of *job* that may be restored, and that are in one of *states*."""
    versions = [item.version for item in asked.versions(job).versions if item.version.restorable]
    return {(version.id, tier) for version in versions for tier in Tier if version.copy(tier).state in states}


def _full(bucket: Mount) -> Callable[[], None]:
    ballast = bucket.path / "somebody-elses"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:  # to the last page, whatever the daemon writes meanwhile
            file.write(bytes(64 * 1024))
    return lambda: ballast.unlink(missing_ok=True)


def _read_only(bucket: Mount) -> Callable[[], None]:
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            bucket.remount("ro")
        except OSError:  # somebody is just writing
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)
        else:
            return lambda: bucket.remount("rw")


def _inodes(paths: list[Path]) -> set[int]:
    found = set()
    for path in paths:
        with suppress(FileNotFoundError):  # closed since it was listed
            found.add(path.stat().st_ino)
    return found


def _count(folder: Path, part: str) -> int:
    """Files below *folder* whose path contains *part*."""
    return sum(part in f"{path}/{name}" for path, _, names in os.walk(folder) for name in names)


def _line(times: list[float], values: list[float], seconds: float) -> Growth:
    """The least-squares line through *values*."""
    count, mean_s, mean = len(times), sum(times) / len(times), sum(values) / len(values)
    spread = sum((at_s - mean_s) ** 2 for at_s in times)
    slope = sum((at_s - mean_s) * (value - mean) for at_s, value in zip(times, values, strict=True)) / spread
    rest = sum((value - mean - slope * (at_s - mean_s)) ** 2 for at_s, value in zip(times, values, strict=True))
    error = (rest / max(1, count - 2) / spread) ** 0.5
    return Growth(mean + slope * (times[-1] - mean_s), slope * seconds, 2 * error * seconds)
