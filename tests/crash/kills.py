"""kill -9 of a real daemon at random moments, while ranks save, load, die and begin again.

A run is a series of jobs, each a few launches long. Within a launch the daemon is killed again and again: while ranks
load, while they save, while its successor recovers, while versions go to the bucket. Each launch ends with the death of
a rank, what was promised is waited for, the daemon is killed once more, and the next launch has to load the newest
version. After every kill the judge reads all that lies in tier 1 and in the bucket. Every other job keeps all of its
versions, so that each promise can be looked up; the others keep three, so that kills hit deletions too.
"""

from __future__ import annotations

import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cairn_api.names import VersionId
from tests.crash import faulty_daemon, oracle, ranks
from tests.crash.trainer import Trainers
from tests.crash.world import Launch, World
from tests.daemon_process import DaemonProcess

KEEP_ALL = 10**6
_LAUNCHES = 3
_KILLS_PER_LAUNCH = 8
_PAUSE_S = 0.02
_PERSIST_INTERVAL_S = 0.2
_DELETE_GRACE_S = 0.2

_WHILE_LOADING = 0.3
_BEFORE_A_SAVE = 0.25
_WHILE_RECOVERING = 0.15
_LONGEST_WAIT_S = 0.25
_LOADING_S = 0.6
_RECOVERING_S = 0.35
_AWAY_S = (0.0, 0.0, 0.0, 0.3)
_SETTLE_S = 60.0


@dataclass(slots=True)
class Figures:
    """What a run of kills came to. What is in a list was not as promised."""

    seed: int
    world_size: int
    fault: str = ""
    kills: int = 0
    rank_kills: int = 0
    loaded: int = 0
    tried: int = 0
    promised: int = 0
    persisted: int = 0
    reoffered: int = 0
    seconds: float = 0.0
    lost: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    """Recoveries that did not find what was there, or something else the second time."""
    wrong: list[str] = field(default_factory=list)
    """Launches that loaded other tensors than were saved, or another version than the newest."""
    failed: list[str] = field(default_factory=list)
    """Saves that failed although the daemon came back at once."""

    @property
    def broken(self) -> list[str]:
        """All that was not as promised."""
        return [*self.lost, *self.torn, *self.unlike, *self.wrong, *self.failed]

    def line(self) -> str:
        """For the report."""
        fault = f" ({self.fault})" if self.fault else ""
        return (
            f"kills of the daemon of {self.world_size} ranks{fault}: {self.kills} kills, {self.rank_kills} of ranks, "
            f"{self.tried} saves begun, {self.promised} promised, {self.reoffered} offered again, {self.loaded} loaded "
            f"equal, {self.persisted} in the bucket, {len(self.lost)} lost, {len(self.torn)} torn, {len(self.wrong)} "
            f"wrong, {len(self.unlike)} recoveries unlike, {len(self.failed)} failed ({self.seconds:.0f} s, "
            f"seed {self.seed})"
        )


class DaemonKills:
    """One daemon, killed again and again; see the module. *kept*: how many versions jobs keep, in turns."""

    def __init__(
        self,
        folder: Path,
        trainers: Trainers,
        seed: int,
        fault: str = "",
        *,
        world_size: int = 4,
        kept: tuple[int, ...] = (KEEP_ALL, 3),
    ) -> None:
        self._folder = folder
        self._trainers = trainers
        self._random = random.Random(seed)  # noqa: S311 - moments of kills, not secrets
        self._kept = kept
        self.figures = Figures(seed, world_size, fault)

    def run(self, kills: int, *, stop_at_first: bool = False) -> Figures:
        """Kill the daemon *kills* times, or (*stop_at_first*) until something is not as promised."""
        figures = self.figures
        start_s = time.monotonic()
        with DaemonProcess(
            self._folder,
            environment=faulty_daemon.environment(),
            program=faulty_daemon.program(figures.fault),
            tier2_delete_grace_s=_DELETE_GRACE_S,
        ) as daemon:
            number = 0
            while figures.kills < kills and not (stop_at_first and figures.broken):
                keep = self._kept[number % len(self._kept)]
                job = _Job(f"run-{number}", keep, self._folder, daemon, self._trainers, self._random, figures)
                job.run(kills, stop_at_first=stop_at_first)
                number += 1
            daemon.kill9()
            sealed = Counter(re.findall(r"version_sealed (\S+)", daemon.log))
        figures.reoffered = sum(times > 1 for times in sealed.values())
        figures.seconds = time.monotonic() - start_s
        return figures


class _Job:
    """One job: a few launches, and the judge after every kill."""

    def __init__(
        self,
        name: str,
        keep: int,
        folder: Path,
        daemon: DaemonProcess,
        trainers: Trainers,
        moments: random.Random,
        figures: Figures,
    ) -> None:
        self._name = name
        self._keep = keep
        self._folder = folder
        self._daemon = daemon
        self._trainers = trainers
        self._random = moments
        self._figures = figures
        self._contents = oracle.Contents()
        self._told: set[str] = set()
        self._tried = self._promised = 0
        self._newest: VersionId | None = None

    def run(self, kills: int, *, stop_at_first: bool) -> None:
        """Launch it a few times, look at the bucket, and remove it; ends early after *kills* in all."""
        figures = self._figures
        for number in range(_LAUNCHES):
            if figures.kills >= kills or (stop_at_first and figures.broken):
                break
            launch = Launch(
                job=self._name,
                name=f"l{number}",
                world_size=figures.world_size,
                runtime_dir=str(self._daemon.runtime_dir),
                folder=str(self._folder),
                pause_s=_PAUSE_S,
                settings={"num_of_version_in_retention": self._keep, "persistent_time_interval": _PERSIST_INTERVAL_S},
            )
            with World(launch, self._trainers) as world:
                self._launch(world, stop_at_first=stop_at_first)
        self._daemon.kill9()
        shutil.rmtree(self._daemon.tier1_path / "jobs" / self._name, ignore_errors=True)
        shutil.rmtree(self._daemon.bucket_path / self._name, ignore_errors=True)
        self._daemon.start()

    def _launch(self, world: World, *, stop_at_first: bool) -> None:
        if self._random.random() < _WHILE_LOADING:
            time.sleep(self._random.uniform(0, _LOADING_S))
            self._kill(world)
            if not world.wait_begun():
                return  # what it was loading went away: the launcher begins again
        elif not world.wait_begun():
            raise AssertionError(f"a rank ended:\n{world.describe()}")
        self._check_resumed(world)
        for _ in range(_KILLS_PER_LAUNCH):
            if self._random.random() >= _BEFORE_A_SAVE:
                world.wait_for_a_new_save()
            time.sleep(self._random.uniform(0, _LONGEST_WAIT_S))
            self._kill(world)
            if stop_at_first and self._figures.broken:
                return
        world.wait_for_a_new_save()
        time.sleep(self._random.uniform(0, _LONGEST_WAIT_S))
        world.kill_one(self._random.randrange(self._figures.world_size), self._random.uniform(0, 0.1))
        self._figures.rank_kills += 1
        self._settle(world)
        self._kill(world, settled=True)

    def _check_resumed(self, world: World) -> None:
        self._tell(self._figures.wrong, (line for diary in world.diaries for line in diary.wrong))
        resumed = world.resumed_from()
        if resumed != {self._newest}:
            self._figures.wrong.append(f"{resumed} was loaded, {self._newest} is the newest")
        elif self._newest is not None:
            self._figures.loaded += 1

    def _settle(self, world: World) -> None:
        """The ranks are gone: wait until the daemon has finished what it holds. What it does not finish is lost."""
        promised = _union(world, "promised")
        wanted = promised if self._keep == KEEP_ALL else {max(promised)}
        jobs = self._daemon.tier1_path / "jobs" / self._name
        deadline_s = time.monotonic() + _SETTLE_S
        while not all((jobs / str(version) / ".cairn" / "manifest.json").exists() for version in wanted):
            if time.monotonic() > deadline_s:
                return
            time.sleep(0.01)

    def _kill(self, world: World, *, settled: bool = False) -> None:
        self._daemon.kill9()
        self._figures.kills += 1
        found = self._judge(world, settled=settled)
        if self._random.random() < _WHILE_RECOVERING:
            self._daemon.launch()
            time.sleep(self._random.uniform(0, _RECOVERING_S))
            self._daemon.kill9()
            self._figures.kills += 1
            found = self._judge(world, settled=settled)
        time.sleep(self._random.choice(_AWAY_S))
        written_bytes = self._daemon.log_path.stat().st_size
        self._daemon.start()
        self._check_recovered(written_bytes, found)
        if settled:
            self._newest = max(found.listed, default=None)

    def _check_recovered(self, written_bytes: int, found: oracle.Found) -> None:
        """The new daemon, whose log begins at *written_bytes*, has to find what the judge found, and says how much."""

        def held() -> list[bytes]:
            with self._daemon.log_path.open("rb") as log:
                log.seek(written_bytes)
                return re.findall(rb"daemon_started.* versions=(\d+)", log.read())

        ranks.wait_until(lambda: bool(held()), "the daemon says that it started")
        if int(held()[0]) != len(found.listed):
            self._figures.unlike.append(f"{len(found.listed)} versions became {int(held()[0])}: {found.listed}")

    def _judge(self, world: World, *, settled: bool) -> oracle.Found:
        figures, partitions = self._figures, world.launch.partitions
        tried, durable, persisted = (_union(world, word) for word in ("tried", "durable", "persisted"))
        promised = len(world.promised_everywhere())
        figures.tried += len(tried) - self._tried
        figures.promised += promised - self._promised
        self._tried, self._promised = len(tried), promised
        found = oracle.examine(
            self._daemon.tier1_path, self._name, tried, partitions=partitions, contents=self._contents
        )
        bucket = oracle.examine_bucket(
            self._daemon.bucket_path, self._name, tried, partitions=partitions, contents=self._contents
        )
        missing = oracle.lost(durable, found, self._keep) | oracle.lost(persisted, bucket, self._keep)
        if settled:
            missing |= oracle.lost(_union(world, "promised"), found, self._keep)
            figures.persisted += len(bucket.listed)
        else:  # with a rank gone, what the others were saving fails
            self._tell(figures.failed, world.failed())
        self._tell(figures.lost, map(str, missing))
        self._tell(figures.torn, (f"{what}: {why}" for what, why in {**found.torn, **bucket.torn}.items()))
        self._tell(figures.unlike, oracle.unlike_recoveries(self._daemon.tier1_path))
        return found

    def _tell(self, figure: list[str], problems: Iterable[str]) -> None:
        for problem in problems:
            if problem not in self._told:
                self._told.add(problem)
                figure.append(f"{self._name}: {problem}")


def _union(world: World, word: str) -> set[VersionId]:
    return set[VersionId]().union(*(getattr(diary, word) for diary in world.diaries))
