"""kill -9 of ranks: in mid-copy nothing remains, after commit nothing is lost, before commit the others are told."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from cairnd.replication.bucket import BucketRepository
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.tiers.stores import open_store
from cairnd.upkeep import recovery, verifier
from tests.crash import faulty_daemon, oracle, ranks
from tests.crash.trainer import JOB, Trainer, Trainers
from tests.daemon_process import DaemonProcess
from tests.promises import Evidence, proof_size

BIG_BYTES = 512 * 1024 * 1024
ROUNDS = proof_size(5, 20)
MOST_ROUNDS = 5 * ROUNDS
GO_ON = "go-on"
_EARLY, _LATE = 1024 * 1024, BIG_BYTES * 7 // 8


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path) as started:
        yield started


@pytest.mark.promise("rank")
@pytest.mark.timeout(400)
def test_a_rank_killed_in_mid_copy_leaves_nothing(
    tmp_path: Path, daemon: DaemonProcess, trainers: Trainers, evidence: Evidence, figures: Callable[[str], None]
) -> None:
    ranks.status(daemon)  # opens whatever the daemon opens once
    before = ranks.descriptors(daemon.pid)
    rounds = in_the_middle = 0
    while rounds < ROUNDS or (not in_the_middle and rounds < MOST_ROUNDS):  # on a busy machine the kill may come late
        rounds += 1
        rank = _save_big(tmp_path, daemon, trainers)
        in_the_middle += _stop_in_mid_copy(daemon, rank)
        assert ranks.status(daemon).memory_granted_bytes >= BIG_BYTES
        rank.kill9()
        _wait_for_everything_back(daemon, before)
    figures(f"kills of a rank in mid-copy: {rounds} kills, {in_the_middle} with half a state copied, all returned")
    found = oracle.examine(daemon.tier1_path, JOB)
    evidence(tried=rounds, broken=len(found.listed) + len(found.unfinished))
    assert in_the_middle, "no kill came in the middle of a copy"
    assert daemon.log.count("version_aborted") == rounds
    assert found == oracle.Found((), {}, ())


@pytest.mark.promise("rank")
def test_a_rank_stopped_in_mid_copy_loses_its_lease_and_is_told(
    tmp_path: Path, trainers: Trainers, evidence: Evidence
) -> None:
    with DaemonProcess(tmp_path, lease_s=5.0) as daemon:
        rank = _save_big(tmp_path, daemon, trainers)
        _stop_in_mid_copy(daemon, rank)
        ranks.wait_until(lambda: "version_aborted" in daemon.log, "the silent rank's save is aborted")
        assert "was silent for more than 5 s" in daemon.log
        (tmp_path / GO_ON).touch()
        rank.send(signal.SIGCONT)
        assert rank.end() == 0
        evidence(tried=1, broken=len(oracle.examine(daemon.tier1_path, JOB).listed))
        (failed,) = oracle.Diary.read(tmp_path / "diary").failed
        assert "was silent for more than 5 s" in failed
        assert oracle.examine(daemon.tier1_path, JOB).listed == ()


@pytest.mark.promise("rank")
def test_a_rank_killed_between_two_partitions_leaves_nothing(
    tmp_path: Path, daemon: DaemonProcess, trainers: Trainers, evidence: Evidence
) -> None:
    ranks.status(daemon)
    before = ranks.descriptors(daemon.pid)
    diary_path = tmp_path / "diary"
    rank = trainers.start(ranks.seal_one_of_two, str(daemon.runtime_dir), str(diary_path))
    ranks.wait_until(lambda: bool(oracle.Diary.read(diary_path).tried), "one partition is sealed", trainer=rank)
    assert ranks.status(daemon).open_versions == 1
    rank.kill9()
    _wait_for_everything_back(daemon, before)
    evidence(tried=1, broken=len(oracle.examine(daemon.tier1_path, JOB).listed))
    assert "ended before commit" in daemon.log
    assert oracle.examine(daemon.tier1_path, JOB).listed == ()


@pytest.mark.promise("rank")
def test_all_ranks_killed_right_after_commit(tmp_path: Path, trainers: Trainers, evidence: Evidence) -> None:
    diary_path, hold = tmp_path / "diary", tmp_path / "hold"
    with DaemonProcess(
        tmp_path,
        environment={**faulty_daemon.environment(), faulty_daemon.HOLD: str(hold)},
        program=faulty_daemon.program("held_disk"),
    ) as daemon:
        started = [
            trainers.start(
                ranks.commit_and_die,
                rank,
                str(tmp_path / "meeting"),
                str(daemon.runtime_dir),
                str(diary_path),
                str(hold),
            )
            for rank in range(2)
        ]
        for trainer in started:
            assert trainer.end() == -signal.SIGKILL, trainer.log
        first, last = sorted(oracle.Diary.read(diary_path).promised)
        assert last not in oracle.examine(daemon.tier1_path, JOB).listed, "the control: its data is not yet synced"
        hold.unlink()
        ranks.wait_until(lambda: f"copy_verified {JOB}/{last} tier=tier2" in daemon.log, f"{last} is persisted", 60)
        daemon.kill9()
        tier = LocalTier(OsFileSystem(), daemon.tier1_path)
        by_id = {version.id: version for version in recovery.scan(tier).versions}
        bucket = BucketRepository(open_store(f"file://{daemon.bucket_path}", {}), recovery.identify(tier))
        versions = [by_id[id_] for id_ in (first, last) if id_ in by_id]
        findings = [
            finding
            for version in versions
            for check in (partial(verifier.check_tier1, tier), partial(verifier.check_tier2, bucket))
            for finding in check(version, deep=True, progress=lambda _: None)
        ]
        evidence(tried=2, broken=2 - len(versions) + len(findings))
        assert [version.id for version in versions if version.complete] == [first, last]
        assert not findings


@pytest.mark.promise("rank")
def test_one_of_two_ranks_killed_before_commit(
    tmp_path: Path, daemon: DaemonProcess, trainers: Trainers, evidence: Evidence
) -> None:
    ranks.status(daemon)
    before = ranks.descriptors(daemon.pid)
    diary_path = tmp_path / "diary-0"
    arguments = (str(tmp_path / "meeting"), str(daemon.runtime_dir))
    survivor = trainers.start(ranks.save_and_lose_the_other, 0, *arguments, str(diary_path))
    victim = trainers.start(ranks.save_and_lose_the_other, 1, *arguments, str(tmp_path / "diary-1"))
    ranks.wait_until(
        lambda: bool(oracle.Diary.read(tmp_path / "diary-1").tried), "both ranks have saved", 60, trainer=victim
    )
    victim.kill9()
    assert survivor.end() == 0, survivor.log
    (failed,) = oracle.Diary.read(diary_path).failed
    assert "rank" in failed
    _wait_for_everything_back(daemon, before)
    evidence(tried=1, broken=len(oracle.examine(daemon.tier1_path, JOB).listed))
    assert "version_aborted" in daemon.log
    assert oracle.examine(daemon.tier1_path, JOB).listed == ()
    again = trainers.start(ranks.save_once, str(daemon.runtime_dir), str(tmp_path / "diary-2"), "again")
    assert again.end() == 0, again.log
    assert [version.tag for version in oracle.examine(daemon.tier1_path, JOB).listed] == ["again"]


def _save_big(folder: Path, daemon: DaemonProcess, trainers: Trainers) -> Trainer:
    """Start a save that commits only when there is a file :data:`GO_ON`."""
    paths = (str(daemon.runtime_dir), str(folder / "diary"))
    return trainers.start(ranks.save_big, *paths, BIG_BYTES, str(folder / GO_ON))


def _stop_in_mid_copy(daemon: DaemonProcess, rank: Trainer) -> bool:
    """SIGSTOP a rank once its state begins to appear in the shared buffer; whether the rest was not there yet."""

    def begun() -> list[Path]:
        return [path for path in ranks.capture_buffers(daemon.pid) if ranks.byte_at(path, _EARLY)]

    ranks.wait_until(lambda: bool(begun()), "the state appears in the buffer", trainer=rank)
    rank.send(signal.SIGSTOP)
    return all(ranks.byte_at(path, _LATE) == 0 for path in begun())


def _wait_for_everything_back(daemon: DaemonProcess, descriptors: list[str]) -> None:
    """Granted bytes, buffers and descriptors of dead ranks return to the pool, and no save stays open."""

    def kept() -> tuple[int, int, list[str]]:
        now = ranks.status(daemon)
        # The sockets of this very question come and go.
        more = Counter(ranks.descriptors(daemon.pid)) - Counter(descriptors)
        return now.memory_granted_bytes, now.open_versions, [what for what in more.elements() if "socket" not in what]

    ranks.wait_until(lambda: kept() == (0, 0, []), "everything returns to the pool", describe=kept)
    ranks.wait_until(
        lambda: len(ranks.descriptors(daemon.pid)) <= len(descriptors),
        "no socket stays open",
        describe=lambda: ranks.descriptors(daemon.pid),
    )
