"""kill -9 of the daemon while training runs: training goes on, and nothing that ``commit`` returned for is lost."""

from __future__ import annotations

import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from cairn import session
from cairn_api.names import VersionId
from tests.crash import faulty_daemon, oracle, ranks
from tests.crash.test_power_cut import SEED
from tests.crash.trainer import JOB, Trainer, Trainers, train
from tests.daemon_process import DaemonProcess

_PROGRESS_S = 60.0


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "kills"),
    [("", 20), ("slow_disk", 12)],
    ids=["any_moment", "between_sealed_and_tier1"],
)
def test_no_committed_version_is_lost(
    tmp_path: Path, trainers: Trainers, figures: Callable[[str], None], fault: str, kills: int
) -> None:
    moments = random.Random(SEED)  # noqa: S311 - moments of kills, not secrets
    diary_path = tmp_path / "diary"
    start_s = time.monotonic()
    with _daemon(tmp_path, fault) as daemon:
        # Buffers for four versions, so that several are sealed and not yet durable when the daemon dies.
        trainer = trainers.start(
            train, str(daemon.runtime_dir), str(diary_path), "run", "captured", 0.02, 10**6, {"buffers": 4}
        )
        for _ in range(kills):
            _wait_for_a_promise(diary_path, trainer)
            time.sleep(moments.uniform(0, 0.25))
            daemon.kill9()
            time.sleep(moments.choice((0.0, 0.0, 0.3)))  # now and then training has to do without a daemon for a while
            daemon.start()
        _wait_for_a_promise(diary_path, trainer)
        trainer.send(signal.SIGSTOP)  # no more promises; what is sealed is now the daemon's to finish
        _wait_until_in_tier1(daemon, oracle.Diary.read(diary_path).promised)
        daemon.kill9()
        trainer.kill9()
        again = re.findall(r"version_sealed run-7/(\S+)", daemon.log)
        reoffered = sum(count > 1 for count in Counter(again).values())
        diary = oracle.Diary.read(diary_path)
        found = oracle.examine(daemon.tier1_path, JOB, diary.tried)
    lost = oracle.lost(diary.promised, found, keep=10**6)
    figures(
        f"kills of the daemon{f' ({fault})' if fault else ''}: {kills} kills, {len(diary.tried)} saves begun, "
        f"{len(diary.promised)} committed, {reoffered} offered again, {len(lost)} lost, {len(found.torn)} torn, "
        f"{len(diary.failed)} failed ({time.monotonic() - start_s:.0f} s, seed {SEED})"
    )
    assert not lost
    assert not found.torn
    assert not diary.failed, "a daemon that comes back within reconnect_timeout_s fails no save"
    assert len(diary.promised) > kills, "training did not go on"
    if fault:
        assert reoffered > kills // 2, "so few versions offered again prove nothing"


@pytest.mark.timeout(240)
def test_killed_while_it_removes_a_version_whose_last_sync_failed(tmp_path: Path, trainers: Trainers) -> None:
    diary_path = tmp_path / "diary"
    with _daemon(tmp_path, "dies_while_sweeping") as daemon:
        trainer = trainers.start(train, str(daemon.runtime_dir), str(diary_path), "run", "tier1", 0.0, 1, {})
        ranks.wait_until(lambda: not daemon.running, "the daemon dies in the middle of the removal")
        trainer.kill9()
        diary = oracle.Diary.read(diary_path)
        assert not diary.promised
        found = oracle.examine(daemon.tier1_path, JOB, diary.tried)
        assert not found.torn, "the manifest has to go first"


@pytest.mark.timeout(400)
def test_a_manifest_before_its_data_is_caught(
    tmp_path: Path, trainers: Trainers, figures: Callable[[str], None]
) -> None:
    """The planted bug that a kill can show: a missing fsync it cannot, as the kernel lives on."""
    diary_path = tmp_path / "diary"
    moments = random.Random(SEED)  # noqa: S311 - moments of kills, not secrets
    torn: dict[str, str] = {}
    kills = 0
    with _daemon(tmp_path, "manifest_first") as daemon:
        trainer = trainers.start(train, str(daemon.runtime_dir), str(diary_path), "run", "captured", 0.0, 10**6, {})
        while not torn and kills < 30:
            _wait_for_a_promise(diary_path, trainer)
            time.sleep(moments.uniform(0, 0.1))
            daemon.kill9()
            kills += 1
            torn = oracle.examine(daemon.tier1_path, JOB).torn
            daemon.start()
    figures(f"kills of the daemon with manifest_first planted: caught after {kills} kills: {bool(torn)}")
    assert torn


@pytest.mark.timeout(400)
def test_a_client_that_does_not_offer_again_is_caught(
    tmp_path: Path, trainers: Trainers, figures: Callable[[str], None]
) -> None:
    """The other planted bug: a client that forgets what it handed over when the daemon is a new one."""
    diary_path = tmp_path / "diary"
    kills, lost = 0, set[VersionId]()
    with _daemon(tmp_path, "slow_disk") as daemon:
        trainer = trainers.start(forgetful_train, str(daemon.runtime_dir), str(diary_path))
        while not lost and kills < 10:
            _wait_for_a_promise(diary_path, trainer)
            daemon.kill9()
            kills += 1
            at_risk = oracle.Diary.read(diary_path).promised - set(oracle.examine(daemon.tier1_path, JOB).listed)
            daemon.start()
            _wait_for_a_promise(diary_path, trainer)
            newest = max(oracle.Diary.read(diary_path).promised)
            _wait_until_in_tier1(daemon, {newest})
            lost = at_risk - set(oracle.examine(daemon.tier1_path, JOB).listed)
    figures(f"kills of the daemon with a forgetful client: caught after {kills} kills: {bool(lost)}")
    assert lost


def forgetful_train(runtime_dir: str, diary_path: str) -> None:
    """A training whose client tells a restarted daemon nothing."""
    with mock.patch.object(session, "tell_again", return_value=[]):
        train(runtime_dir, diary_path, "run", "captured", 0.02, 10**6, {"buffers": 4})


def _daemon(folder: Path, fault: str) -> DaemonProcess:
    return DaemonProcess(
        folder,
        environment=faulty_daemon.environment(),
        persistent_storage_path="",
        program=faulty_daemon.program(fault),
        num_of_version_in_retention=10**6,
    )


def _wait_for_a_promise(diary_path: Path, trainer: Trainer) -> None:
    before = len(oracle.Diary.read(diary_path).promised)
    deadline_s = time.monotonic() + _PROGRESS_S
    while len(oracle.Diary.read(diary_path).promised) == before:
        assert trainer.running, f"training ended:\n{trainer.log}"
        assert time.monotonic() < deadline_s, f"training stands still:\n{trainer.log}"
        time.sleep(0.005)


def _wait_until_in_tier1(daemon: DaemonProcess, versions: set[VersionId]) -> None:
    deadline_s = time.monotonic() + _PROGRESS_S
    while missing := versions - set(oracle.examine(daemon.tier1_path, JOB).listed):
        if time.monotonic() > deadline_s:
            raise AssertionError(f"lost: {missing}\n{daemon.log[-4000:]}")
        time.sleep(0.05)
