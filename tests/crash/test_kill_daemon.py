"""kill -9 of the daemon while training runs: training goes on, and nothing that ``commit`` returned for is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from cairn import session
from cairn_api.names import VersionId
from tests.crash import faulty_daemon, oracle, ranks
from tests.crash.kills import KEEP_ALL, DaemonKills
from tests.crash.test_power_cut import SEED
from tests.crash.trainer import JOB, Trainer, Trainers, train
from tests.daemon_process import DaemonProcess
from tests.promises import Evidence, proof_size

KILLS = proof_size(40, 950)
SLOW_DISK_KILLS = proof_size(10, 50)
MOST_KILLS_TO_CATCH = 30

_PROGRESS_S = 60.0


@pytest.mark.promise("kill")
@pytest.mark.timeout(120 + 4 * KILLS)
@pytest.mark.parametrize(
    ("fault", "kills"),
    [("", KILLS), ("slow_disk", SLOW_DISK_KILLS)],
    ids=["any_moment", "between_sealed_and_tier1"],
)
def test_no_committed_version_is_lost(
    tmp_path: Path, trainers: Trainers, evidence: Evidence, figures: Callable[[str], None], fault: str, kills: int
) -> None:
    harness = DaemonKills(tmp_path, trainers, SEED, fault)
    try:
        found = harness.run(kills)
    finally:
        figures(harness.figures.line())
    evidence(
        tried=found.kills,
        broken=len(found.broken),
        detail=f"{found.promised:,} saves of 4 ranks promised{' on a slow disk' if fault else ''}, "
        f"{found.reoffered:,} of them offered again, {found.rank_kills:,} deaths of ranks",
    )
    assert not found.broken
    assert found.promised > found.kills / 4, "so few promises prove nothing"
    assert found.loaded or fault, "nothing was resumed from"
    assert found.reoffered > (kills / 4 if fault else 0), "so few versions offered again prove nothing"
    assert found.persisted, "nothing reached the bucket"


@pytest.mark.promise("kill")
@pytest.mark.timeout(240)
def test_killed_while_it_removes_a_version_whose_last_sync_failed(
    tmp_path: Path, trainers: Trainers, evidence: Evidence
) -> None:
    diary_path = tmp_path / "diary"
    with _daemon(tmp_path, "dies_while_sweeping") as daemon:
        trainer = trainers.start(train, str(daemon.runtime_dir), str(diary_path), "run", "tier1", 0.0, 1, {})
        ranks.wait_until(lambda: not daemon.running, "the daemon dies in the middle of the removal")
        trainer.kill9()
        diary = oracle.Diary.read(diary_path)
        assert not diary.promised
        found = oracle.examine(daemon.tier1_path, JOB, diary.tried)
        evidence(tried=1, broken=len(found.torn))
        assert not found.torn, "the manifest has to go first"


@pytest.mark.timeout(120 + 10 * MOST_KILLS_TO_CATCH)
@pytest.mark.parametrize(
    ("fault", "kept"),
    [
        pytest.param("manifest_first", KEEP_ALL, marks=pytest.mark.planted("manifest_first")),
        pytest.param("trusts_latest", KEEP_ALL, marks=pytest.mark.planted("trusts_latest")),
        pytest.param("deletes_too_early", 1, marks=pytest.mark.planted("deletes_too_early")),
        pytest.param("sweeps_live_session", KEEP_ALL, marks=pytest.mark.planted("sweeps_live_session")),
    ],
)
def test_a_planted_bug_is_caught(
    tmp_path: Path, trainers: Trainers, figures: Callable[[str], None], fault: str, kept: int
) -> None:
    """A missing sync is not among them: no kill can show it, as the kernel lives on."""
    found = None
    for attempt in range(3):  # a daemon with such a bug may also end, or bring training to a stop, before it is shown
        (tmp_path / str(attempt)).mkdir()
        harness = DaemonKills(tmp_path / str(attempt), trainers, SEED, fault, world_size=2, kept=(kept,))
        try:
            found = harness.run(MOST_KILLS_TO_CATCH, stop_at_first=True)
            break
        except AssertionError as error:
            figures(f"with {fault} planted, broken off: {str(error).splitlines()[0]}")
        finally:
            figures(harness.figures.line())
    assert found is not None, f"no run with {fault} came to its end"
    shown = {
        "manifest_first": found.torn,
        "trusts_latest": [*found.torn, *found.unlike],
        "deletes_too_early": found.lost,
        "sweeps_live_session": [*found.lost, *found.failed],
    }
    assert shown[fault], f"{found.kills} kills did not show the planted bug {fault}: {found}"


@pytest.mark.timeout(400)
def test_a_client_that_does_not_offer_again_is_caught(
    tmp_path: Path, trainers: Trainers, figures: Callable[[str], None]
) -> None:
    """A planted bug of the other side: a client that forgets what it handed over when the daemon is a new one."""
    diary_path = tmp_path / "diary"
    kills, lost = 0, set[VersionId]()
    with _daemon(tmp_path, "slow_disk") as daemon:
        trainer = trainers.start(forgetful_train, str(daemon.runtime_dir), str(diary_path))
        while not lost and kills < MOST_KILLS_TO_CATCH:
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
        num_of_version_in_retention=KEEP_ALL,
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
