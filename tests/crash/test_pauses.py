"""Processes that stand still for longer than every lease: nothing is lost, and nobody is reaped who lives."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.crash import oracle, ranks
from tests.crash.cgroups import need_group
from tests.crash.pausing import hold_saves, pausing
from tests.crash.test_power_cut import SEED
from tests.crash.trainer import JOB, Trainer, Trainers, train
from tests.daemon_process import DaemonProcess
from tests.promises import Evidence, proof_size

LEASE_S, COMMIT_TIMEOUT_S, PAUSE_S = 1.0, 3.0, 4.5
_PROGRESS_S = 60.0


@pytest.mark.promise("pause")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("means", ["SIGSTOP", "freezer"])
def test_a_daemon_that_sleeps_longer_than_its_leases_reaps_nobody(
    tmp_path: Path, trainers: Trainers, evidence: Evidence, means: str
) -> None:
    """A rank that sleeps as well, and on, is contained: its save is aborted and it is told when it goes on."""
    if means == "freezer":
        need_group("freezer")
    rounds = proof_size(1, 10)
    moments = random.Random(SEED)  # noqa: S311 - moments of pauses, not secrets
    with pausing(means) as pause, _daemon(tmp_path) as daemon:
        busy = _train(trainers, daemon, tmp_path / "busy")
        held, stopped = (
            trainers.start(hold_saves, str(daemon.runtime_dir), str(tmp_path / job), job, str(folder), rounds)
            for job, folder in (("held", tmp_path), ("stopped", tmp_path))
        )
        _wait_for(tmp_path / "busy", "promised", 1)  # whoever is just connecting may give up on a daemon that sleeps
        for number in range(rounds):
            for job in ("held", "stopped"):
                _wait_for(tmp_path / job, "tried", number + 1)
            time.sleep(moments.uniform(0, 0.3))
            sleeper = pause(daemon.pid)
            stopped.send(signal.SIGSTOP)
            time.sleep(PAUSE_S)
            sleeper.resume()
            ranks.wait_until(
                lambda: len(_aborted(daemon, "stopped")) > number,  # noqa: B023 - asked in this round only
                "the save of the rank that sleeps on is aborted",
                describe=lambda: daemon.log[-4000:],
            )
            (tmp_path / f"go-{number}").touch()
            stopped.send(signal.SIGCONT)
            _wait_for(tmp_path / "held", "promised", number + 1)
            _wait_for(tmp_path / "stopped", "failed", number + 1)
            _wait_for(tmp_path / "busy", "promised", len(oracle.Diary.read(tmp_path / "busy").promised) + 1)
        assert held.end() == stopped.end() == 0, f"{held.log}\n{stopped.log}"
        busy.send(signal.SIGSTOP)
        problems = _judge(daemon, tmp_path)
        told = oracle.Diary.read(tmp_path / "stopped").failed
    evidence(
        tried=rounds,
        broken=len(problems),
        detail=f"daemon stopped by {means} for {PAUSE_S:g} s, leases of {LEASE_S:g} s: no living rank's save reaped",
    )
    assert not problems
    assert all("was silent for more than 1 s" in line and "save again" in line for line in told), told


@pytest.mark.promise("pause")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("who", ["rank", "both"])
def test_whoever_is_stopped_in_the_midst_of_saving_goes_on(
    tmp_path: Path, trainers: Trainers, evidence: Evidence, who: str
) -> None:
    rounds = proof_size(2 if who == "rank" else 1, 20)
    moments = random.Random(SEED)  # noqa: S311 - moments of pauses, not secrets
    with pausing("SIGSTOP") as pause, _daemon(tmp_path) as daemon:
        busy = _train(trainers, daemon, tmp_path / "busy")
        for _ in range(rounds):
            _wait_for(tmp_path / "busy", "promised", len(oracle.Diary.read(tmp_path / "busy").promised) + 1)
            time.sleep(moments.uniform(0, 0.2))
            sleepers = [pause(busy.pid), *([pause(daemon.pid)] if who == "both" else [])]
            time.sleep(PAUSE_S if who == "both" else LEASE_S + 1.5)
            for sleeper in moments.sample(sleepers, len(sleepers)):
                sleeper.resume()
        _wait_for(tmp_path / "busy", "promised", len(oracle.Diary.read(tmp_path / "busy").promised) + 1)
        busy.send(signal.SIGSTOP)
        problems = _judge(daemon, tmp_path)
        diary = oracle.Diary.read(tmp_path / "busy")
    silent = [line for line in diary.failed if "was silent for more than" in line]
    if who == "rank":  # the daemon was awake, and ended what was open
        problems = [problem for problem in problems if problem not in {f"failed: {line}" for line in silent}]
    evidence(tried=rounds, broken=len(problems), detail=f"{who} stopped {rounds} times in the midst of saving")
    assert not problems
    assert len(silent) <= rounds, "one save each, and the next one works"


def _judge(daemon: DaemonProcess, folder: Path) -> list[str]:
    """Everything of the ranks that lived all the time that is not as promised."""
    diary = oracle.Diary.read(folder / "busy")
    ranks.wait_until(
        lambda: diary.promised <= set(oracle.examine(daemon.tier1_path, JOB).listed),
        "what was promised reaches tier 1",
        describe=lambda: daemon.log[-4000:],
    )
    daemon.kill9()
    problems = []
    for job in (JOB, "held", "stopped"):
        diary = oracle.Diary.read(folder / ("busy" if job == JOB else job))
        found = oracle.examine(daemon.tier1_path, job, diary.tried)
        problems += [f"torn: {what}: {why}" for what, why in found.torn.items()]
        problems += [f"lost: {version}" for version in oracle.lost(diary.promised, found, keep=10**6)]
        if job != "stopped":
            problems += [f"failed: {line}" for line in diary.failed]
        elif set(found.listed) - diary.promised:
            problems.append(f"aborted and yet listed: {set(found.listed) - diary.promised}")
    return problems


def _aborted(daemon: DaemonProcess, job: str) -> set[str]:
    return set(re.findall(rf"version_aborted {job}/(\S+)", daemon.log))


def _daemon(folder: Path) -> DaemonProcess:
    return DaemonProcess(
        folder, persistent_storage_path="", num_of_version_in_retention=10**6, lease_s=LEASE_S,
        commit_timeout_s=COMMIT_TIMEOUT_S,
    )  # fmt: skip


def _train(trainers: Trainers, daemon: DaemonProcess, diary_path: Path) -> Trainer:
    settings = {"buffers": 4}
    return trainers.start(train, str(daemon.runtime_dir), str(diary_path), "run", "captured", 0.05, 10**6, settings)


def _wait_for(diary_path: Path, word: str, count: int) -> None:
    """Until *count* versions of a diary were tried, promised or failed."""
    ranks.wait_until(
        lambda: len(getattr(oracle.Diary.read(diary_path), word)) >= count,
        f"{count} versions of {diary_path.name} {word}",
        _PROGRESS_S,
        describe=lambda: oracle.Diary.read(diary_path),
    )
