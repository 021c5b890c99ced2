"""What runs out is told with its name and the next step; nothing hangs, nothing is killed, and it passes."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest
import torch

import cairn
from cairnd.cli import daemon_client
from tests.crash import faulty_daemon, limited, oracle, ranks
from tests.crash.cgroups import Group, need_group
from tests.crash.disks import LoopDisk, need_disks, need_mounts
from tests.crash.limiting import (
    MIB,
    save_in_small_group,
    save_large,
    save_short_of_files,
    save_steadily,
    save_with_small_shm,
    until,
)
from tests.crash.trainer import JOB, Trainer, Trainers
from tests.daemon_process import DaemonProcess
from tests.promises import Evidence, proof_size

BUDGET_BYTES = 64 * MIB
_BESIDES_BYTES = 256 * MIB
_RANKS = 3
_FILES = 96
_WRITE_BYTES_PER_S = 4 * MIB
_STATUS_S = 10.0
_LONG_S = 180.0


@pytest.mark.promise("limits")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("oversize", ["stream", "fail"])
def test_a_daemon_with_little_memory_is_not_killed(
    tmp_path: Path, trainers: Trainers, evidence: Evidence, oversize: str
) -> None:
    """Several ranks save states that are larger than the whole budget, into a daemon that may use 256 MiB besides."""
    need_group("memory")
    saves = proof_size(2, 20)
    with Group("memory") as group:
        group.write("memory.limit_in_bytes", BUDGET_BYTES + _BESIDES_BYTES)
        with _daemon(tmp_path, limited.program([f"group={group.path}"]), capture_memory_bytes=BUDGET_BYTES) as daemon:
            pid = daemon.pid
            started = [
                trainers.start(
                    save_large, str(daemon.runtime_dir), str(tmp_path / f"diary-{rank}"), f"job-{rank}",
                    2 * BUDGET_BYTES, saves, oversize,
                )
                for rank in range(_RANKS)
            ]  # fmt: skip
            problems = _ends(started, _LONG_S)
            most_bytes = int(group.read("memory.max_usage_in_bytes"))
            if not daemon.running or daemon.pid != pid or "oom_kill 0" not in group.read("memory.oom_control"):
                problems.append(f"the daemon was killed:\n{daemon.log[-2000:]}")
            failed = []
            for rank in range(_RANKS):
                diary = oracle.Diary.read(tmp_path / f"diary-{rank}")
                failed += diary.failed
                found = oracle.examine(daemon.tier1_path, f"job-{rank}")
                problems += [*diary.wrong, *found.torn, *(f"lost: {v}" for v in diary.promised - set(found.listed))]
    clear = [text for text in failed if f"{BUDGET_BYTES} bytes of capture memory" in text and "Next step: " in text]
    problems += [f"not clear: {text}" for text in failed if text not in clear]
    if len(clear) != (0 if oversize == "stream" else saves * _RANKS):
        problems.append(f"{len(clear)} of {saves * _RANKS} saves failed")
    evidence(
        tried=1,
        broken=bool(problems),
        detail=f"memory: {_RANKS} ranks {oversize} twice the budget, at most {most_bytes / MIB:.0f} MiB in use",
    )
    assert not problems


@pytest.mark.promise("limits")
@pytest.mark.timeout(300)
def test_a_daemon_without_descriptors_says_so_and_recovers(tmp_path: Path, evidence: Evidence) -> None:
    problems = []
    with (
        _daemon(tmp_path, limited.program([f"files={_FILES}"])) as daemon,
        cairn.connect(job=JOB, runtime_dir=str(daemon.runtime_dir), reconnect_timeout_s=20) as client,
    ):
        _save(client, "first")
        visitors: list[daemon_client.SideSocket] = []
        refused = ""
        with mock.patch.object(daemon_client, "SIDE_TIMEOUT_S", 3.0):
            while not refused and len(visitors) < _FILES:
                try:
                    visitors.append(daemon_client.SideSocket(daemon.runtime_dir))
                except cairn.CairnError as error:
                    refused = str(error)
        try:
            _save(client, "second")
            told = "nothing: its save went through"
        except cairn.CairnError as error:
            told = str(error)
        log = daemon.log
        for visitor in visitors:
            visitor.close()
        recovered = until(lambda: _answers(daemon))
        if recovered:
            _save(client, "third")
        found = oracle.examine(daemon.tier1_path, JOB)
        tags = [version.tag for version in found.listed]
    if not refused or "no daemon answers" not in refused:
        problems.append(f"whoever came too late was told {refused!r}")
    problems += [
        f"{where}: {text}"
        for where, text in (("the rank", told), ("the log", log))
        if "Too many open files" not in text or "raise LimitNOFILE of the daemon's unit" not in text
    ]
    if "Traceback" in daemon.log or not recovered or tags != ["first", "third"] or found.torn:
        problems.append(f"not recovered: {tags}, {found.torn}\n{daemon.log[-3000:]}")
    evidence(
        tried=1, broken=bool(problems), detail=f"{_FILES} descriptors: {len(visitors)} clients, then a clear error"
    )
    assert not problems, "\n".join(problems)


@pytest.mark.promise("limits")
@pytest.mark.parametrize("oversize", ["stream", "fail"])
def test_a_rank_without_descriptors_makes_do_or_is_told(
    tmp_path: Path, trainers: Trainers, evidence: Evidence, oversize: str
) -> None:
    """It gives up a buffer that it does not need, streams, or fails the save with the reason; the next one works."""
    with _daemon(tmp_path) as daemon:
        rank = trainers.start(save_short_of_files, str(daemon.runtime_dir), str(tmp_path / "diary"), oversize)
        problems = _ends([rank])
        diary = oracle.Diary.read(tmp_path / "diary")
        found = oracle.examine(daemon.tier1_path, JOB)
    if set(found.listed) != diary.promised or found.torn or "after" not in {version.tag for version in found.listed}:
        problems.append(f"{diary.promised}, but {found}")
    problems += [text for text in diary.failed if not ("Too many open files" in text and "ulimit -n" in text)]
    if len(diary.promised) + len(diary.failed) != 3:
        problems.append(f"{diary}")
    evidence(tried=1, broken=bool(problems), detail=f"a rank without descriptors, {oversize}")
    assert not problems


@pytest.mark.promise("limits")
@pytest.mark.parametrize("limit", ["files", "pids"])
def test_a_daemon_that_could_not_work_says_what_is_missing(tmp_path: Path, evidence: Evidence, limit: str) -> None:
    """It does not start: half of it would not run, and libraries would end it with words of their own."""
    text = "files and sockets, it needs" if limit == "files" else "threads, it needs"
    step = "LimitNOFILE=" if limit == "files" else "TasksMax="
    if limit == "pids":
        need_group("pids")
    problems = []
    for number in (4, 16, 40):
        folder = tmp_path / str(number)
        folder.mkdir()
        if limit == "files":
            said = _refusal(folder, [f"files={2 * number}"])
        else:
            with Group("pids") as group:
                group.write("pids.max", number)
                said = _refusal(folder, [f"group={group.path}"])
        if limit == "files" and number == 40:  # 80 will do
            problems += [f"{number}: {said}"] if said else []
        elif text not in said or step not in said or "Next step: raise" not in said or len(said.splitlines()) > 1:
            problems.append(f"{number}: {said}")
    evidence(tried=1, broken=bool(problems), detail=f"a start with too few {'threads' if limit == 'pids' else limit}")
    assert not problems


@pytest.mark.promise("limits")
@pytest.mark.root
def test_a_full_dev_shm_is_none_of_cairns_business(tmp_path: Path, trainers: Trainers, evidence: Evidence) -> None:
    """Capture buffers are memfds: what a container gives /dev/shm is not asked for."""
    need_mounts()
    with _daemon(tmp_path) as daemon:
        rank = trainers.start(save_with_small_shm, str(daemon.runtime_dir), str(tmp_path / "diary"))
        problems = _ends([rank])
        diary = oracle.Diary.read(tmp_path / "diary")
        found = oracle.examine(daemon.tier1_path, JOB)
    if len(diary.promised) != 2 or diary.promised != set(found.listed) or diary.failed or diary.wrong:
        problems.append(f"{diary}")
    evidence(tried=1, broken=bool(problems), detail="full /dev/shm")
    assert not problems


@pytest.mark.promise("limits")
@pytest.mark.root
@pytest.mark.parametrize("oversize", ["stream", "fail"])
def test_shared_memory_that_a_group_does_not_have_is_an_error_or_a_stream(
    tmp_path: Path, trainers: Trainers, evidence: Evidence, oversize: str
) -> None:
    need_group("memory")
    with Group("memory") as group, _daemon(tmp_path) as daemon:
        rank = trainers.start(
            save_in_small_group, str(daemon.runtime_dir), str(tmp_path / "diary"), str(group.path), oversize
        )
        problems = _ends([rank], _LONG_S)
        diary = oracle.Diary.read(tmp_path / "diary")
        found = oracle.examine(daemon.tier1_path, JOB)
        rank.kill9()
    tags = [version.tag for version in found.listed]
    if tags != (["large", "after"] if oversize == "stream" else ["after"]) or found.torn:
        problems.append(f"{tags}, {found.torn}")
    if oversize == "fail" and not (
        len(diary.failed) == 1
        and "a capture buffer of " in diary.failed[0]
        and "bytes are free" in diary.failed[0]
        and "Next step: " in diary.failed[0]
    ):
        problems.append(f"the rank was told {diary.failed}")
    evidence(tried=1, broken=bool(problems), detail=f"no shared memory, {oversize}")
    assert not problems


@pytest.mark.promise("limits")
@pytest.mark.root
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["direct", "buffered"])
def test_a_slow_disk_holds_up_saves_and_nothing_else(
    tmp_path: Path, trainers: Trainers, evidence: Evidence, kind: str
) -> None:
    """Tier 1 takes 4 MiB in a second; a rank with two buffers saves as fast as it may."""
    need_disks("ext4")
    need_group("blkio")
    saves = proof_size(4, 20)
    problems, answered = [], 0
    with Group("blkio") as group, LoopDisk(tmp_path, "ext4", 384 * MIB) as disk:
        device = disk.path.stat().st_dev
        program = faulty_daemon.program("buffered_disk") if kind == "buffered" else ("-m", "cairnd")
        limits = limited.program([f"group={group.path}"], program)
        with _daemon(tmp_path, limits, tier1_path=disk.path / "tier1") as daemon:
            group.write(
                "blkio.throttle.write_bps_device", f"{os.major(device)}:{os.minor(device)} {_WRITE_BYTES_PER_S}"
            )
            rank = trainers.start(
                save_steadily, str(daemon.runtime_dir), str(tmp_path / "diary"), _WRITE_BYTES_PER_S, saves
            )
            most_held = 0
            with mock.patch.object(daemon_client, "CALL_TIMEOUT_S", _STATUS_S):
                while rank.running:
                    try:
                        held = len({path.stat().st_ino for path in ranks.capture_buffers(daemon.pid)})
                        ranks.status(daemon)
                    except cairn.CairnError as error:
                        problems.append(f"status: {error}")
                        break
                    answered, most_held = answered + 1, max(most_held, held)
            problems += _ends([rank], _LONG_S)
            diary = oracle.Diary.read(tmp_path / "diary")
            found = oracle.examine(daemon.tier1_path, JOB)
            problems += [*diary.failed, *found.torn, *map(str, diary.promised - set(found.listed))]
    if len(diary.promised) != saves:
        problems.append(f"{len(diary.promised)} of {saves} saves were promised")
    if most_held > 2:
        problems.append(f"{most_held} buffers were held: back-pressure is not bounded")
    evidence(
        tried=1, broken=bool(problems), detail=f"disk of 4 MiB/s ({kind}): status answered {answered} times meanwhile"
    )
    assert not problems
    assert answered


def _ends(started: list[Trainer], timeout_s: float = 60.0) -> list[str]:
    """Wait for ranks; what is wrong with how they ended (a SIGBUS would be here)."""
    statuses = [(trainer, trainer.end(timeout_s)) for trainer in started]
    return [f"a rank ended with {status}:\n{trainer.log}" for trainer, status in statuses if status != 0]


def _save(client: cairn.Client, tag: str) -> None:
    with client.create(tag) as checkpoint:
        checkpoint.save("model.pt", {"weights": torch.ones(MIB)})
    client.wait(tag, durability="tier1", timeout=60)


def _answers(daemon: DaemonProcess) -> bool:
    try:
        with closing(daemon_client.Daemon(daemon.runtime_dir)) as asked:
            asked.status()
    except cairn.CairnError:
        return False
    return True


def _refusal(folder: Path, limits: list[str]) -> str:
    """What a daemon says that does not start under *limits*; empty if it starts."""
    try:
        with _daemon(folder, limited.program(limits)):
            return ""
    except AssertionError:
        return (folder / "cairnd.log").read_text()


def _daemon(
    folder: Path, program: tuple[str, ...] = ("-m", "cairnd"), *, tier1_path: Path | None = None, **settings: object
) -> DaemonProcess:
    return DaemonProcess(
        folder, environment=faulty_daemon.environment(), persistent_storage_path="", program=program,
        tier1_path=tier1_path, num_of_version_in_retention=100, **settings,
    )  # fmt: skip
