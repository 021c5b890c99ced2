"""A full disk or full memory is a clear error that names sizes and the next step; nothing is lost; it passes."""

from __future__ import annotations

import mmap
import os
import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

import cairn
from cairn.client import Client
from cairn.transport.shared_memory import free_memory_bytes
from tests.crash import faulty_daemon, oracle, ranks
from tests.crash.disks import LoopDisk, Mount, Tmpfs, need_disks, need_mounts
from tests.crash.full_disks import Ballast
from tests.crash.trainer import JOB, DiaryWriter, Trainers, same, save_one
from tests.daemon_process import DaemonProcess
from tests.promises import Evidence

MIB = 1024 * 1024
STATE = {"weights": torch.ones(2 * MIB)}  # 8 MiB
_CGROUPS = Path("/sys/fs/cgroup/memory")
_MAP_NORESERVE = 0x4000  # linux/mman.h; not in Python's mmap module before 3.13


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LoopDisk]:
    need_disks("ext4")
    with LoopDisk(tmp_path, "ext4", 192 * MIB) as mounted:
        yield mounted


@pytest.mark.promise("no_space")
@pytest.mark.root
def test_a_full_disk_fails_the_commit_and_nothing_else(
    tmp_path: Path, disk: LoopDisk, evidence: Evidence, figures: Callable[[str], None]
) -> None:
    evidence(tried=1)
    with _daemon(tmp_path, disk) as daemon, _connect(daemon) as client:
        _save_and_check(client, daemon, "first")
        ballast = Ballast(disk.path)
        ballast.leave_bytes(48 * MIB)
        with pytest.raises(cairn.SaveFailedError) as raised:
            _save(client, "second")
        text = str(raised.value)
        found = re.search(
            r"no room for (8\d{6}) bytes: (\d+) bytes are free in \S+, (\d+) must stay free for records, so (\d+) ",
            text,
        )
        assert found is not None, text
        needed, free, reserved, missing = map(int, found.groups())
        assert needed + reserved - free == missing, text
        assert str(daemon.tier1_path) in text, text
        assert "Next step: free space there" in text, text
        assert "put tier1_path on a larger disk, lower" in text, text
        assert [version.tag for version in _clean_versions(daemon)] == ["first"]
        assert same(client.load("first", "model.pt"), STATE)
        ballast.drop()
        _save_and_check(client, daemon, "third")
        assert client.latest() == max(_clean_versions(daemon))
    figures("full disk: the commit failed with sizes and next step, earlier versions intact, saving went on when freed")


@pytest.mark.promise("no_space")
@pytest.mark.root
def test_a_disk_that_fills_up_after_the_commit_is_reported_on_the_next_call(tmp_path: Path, evidence: Evidence) -> None:
    """On tmpfs, because its last page is the last: ext4 keeps some blocks for hard times."""
    evidence(tried=1)
    need_mounts()
    hold = tmp_path / "hold"
    with (
        Tmpfs(tmp_path, 256 * MIB, files=1000) as disk,
        _daemon(tmp_path, disk, "held_disk", {faulty_daemon.HOLD: str(hold)}) as daemon,
        _connect(daemon) as client,
    ):
        _save_and_check(client, daemon, "first")
        ballast = Ballast(disk.path)
        hold.touch()
        version = _save(client, "second")  # its data has its place; now the manifest's is taken
        ballast.leave_bytes(0)
        hold.unlink()
        with pytest.raises(cairn.SaveFailedError) as waiting:
            client.wait(version, durability="tier1", timeout=60)
        assert "No space left on device" in str(waiting.value)
        with pytest.raises(cairn.SaveFailedError) as raised:
            _save(client, "third")
        assert "captured but lost before it reached tier 1" in str(raised.value)
        assert "Next step: free space" in str(raised.value)
        assert [version.tag for version in _clean_versions(daemon)] == ["first"]
        ballast.drop()
        _save_and_check(client, daemon, "fourth")


@pytest.mark.promise("no_space")
@pytest.mark.root
def test_no_inodes_left_fails_the_commit_and_nothing_else(tmp_path: Path, evidence: Evidence) -> None:
    evidence(tried=1)
    need_mounts()
    with Tmpfs(tmp_path, 256 * MIB, files=100) as disk, _daemon(tmp_path, disk) as daemon, _connect(daemon) as client:
        _save_and_check(client, daemon, "first")
        ballast = Ballast(disk.path)
        ballast.leave_inodes(0)
        with pytest.raises(cairn.SaveFailedError, match="No space left on device") as raised:
            _save(client, "second")
        assert "Next step: free space" in str(raised.value)
        assert [version.tag for version in _clean_versions(daemon)] == ["first"]
        ballast.drop()
        _save_and_check(client, daemon, "third")


@pytest.mark.parametrize("oversize", ["fail", "stream"])
def test_memory_that_the_kernel_refuses(tmp_path: Path, trainers: Trainers, oversize: str) -> None:
    """posix_fallocate of the memfd fails (here by RLIMIT_FSIZE): an error or a stream, never a SIGBUS."""
    with DaemonProcess(tmp_path, persistent_storage_path="") as daemon:
        diary_path = tmp_path / "diary"
        rank = trainers.start(save_with_file_limit, str(daemon.runtime_dir), str(diary_path), oversize)
        assert rank.end() == 0, rank.log
        _judge_short_memory(daemon, diary_path, oversize, "File too large")


@pytest.mark.root
def test_memory_that_a_cgroup_does_not_have(tmp_path: Path, trainers: Trainers) -> None:
    """The client asks before it takes: a cgroup's limit would otherwise kill the rank, not refuse it."""
    if os.geteuid() != 0 or not (_CGROUPS / "memory.limit_in_bytes").exists():
        pytest.skip("NOT PROVED HERE: needs root and the cgroup v1 memory controller")
    own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
    group = _CGROUPS / own.rpartition(":")[2].lstrip("/") / f"cairn-{os.getpid()}"
    group.mkdir()
    try:
        with DaemonProcess(tmp_path, persistent_storage_path="") as daemon:
            diary_path = tmp_path / "diary"
            rank = trainers.start(save_in_cgroup, str(daemon.runtime_dir), str(diary_path), str(group))
            assert rank.end() == 0, rank.log
            _judge_short_memory(daemon, diary_path, "fail", "bytes are free")
    finally:
        _remove_group(group)


def test_a_state_larger_than_the_machine_names_sizes(tmp_path: Path) -> None:
    size_bytes = free_memory_bytes() + 1024 * MIB
    # Never touched and never reserved: costs nothing until somebody copies it.
    sparse = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    with DaemonProcess(tmp_path, persistent_storage_path="", capture_memory_bytes=1 << 50) as daemon:
        with _connect(daemon, oversize="fail") as client:
            with pytest.raises(cairn.OverloadedError, match=r"a capture buffer of \d+ bytes does not fit into memory"):
                _save(client, "huge", {"weights": torch.frombuffer(sparse, dtype=torch.uint8)})
            _save_and_check(client, daemon, "small")
        ranks.wait_until(lambda: ranks.status(daemon).memory_granted_bytes < size_bytes, "the grant returns")


def test_a_budget_that_is_spent_names_sizes(tmp_path: Path) -> None:
    with (
        DaemonProcess(tmp_path, persistent_storage_path="", capture_memory_bytes=4 * MIB) as daemon,
        _connect(daemon, oversize="fail") as client,
    ):
        with pytest.raises(cairn.OverloadedError, match=r"of 4194304 bytes of capture memory.*Next step: raise"):
            _save(client, "large")
        _save_and_check(client, daemon, "small", {"weights": torch.ones(1000)})


def save_with_file_limit(runtime_dir: str, diary_path: str, oversize: str) -> None:
    """Save under a limit of 1 MiB per file, which counts for a memfd too, and again without."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))

    _save_short_of_memory(runtime_dir, diary_path, oversize, STATE, lambda: limit(MIB), lambda: limit(hard))


def save_in_cgroup(runtime_dir: str, diary_path: str, group: str) -> None:
    """Save 256 MiB in a cgroup that has 64 MiB left, and again after its limit was lifted."""
    sparse = mmap.mmap(-1, 256 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    state = {"weights": torch.frombuffer(sparse, dtype=torch.uint8)}
    folder = Path(group)
    (folder / "cgroup.procs").write_text(str(os.getpid()))

    def limit(size_bytes: int) -> None:
        (folder / "memory.limit_in_bytes").write_text(str(size_bytes))

    used_bytes = int((folder / "memory.usage_in_bytes").read_text())
    _save_short_of_memory(
        runtime_dir, diary_path, "fail", state, lambda: limit(used_bytes + 64 * MIB), lambda: limit(-1)
    )


def _save_short_of_memory(
    runtime_dir: str,
    diary_path: str,
    oversize: str,
    state: object,
    begin: Callable[[], None],
    end: Callable[[], None],
) -> None:
    diary = DiaryWriter(Path(diary_path))
    with cairn.connect(job=JOB, runtime_dir=runtime_dir, oversize=oversize) as client:
        begin()
        try:
            version = _save(client, "short", state)
            client.wait(version, durability="tier1", timeout=60)
            diary.note("promised", version)
        except cairn.OverloadedError as error:
            diary.note("failed", error)
        end()
        save_one(client, diary, "after", "tier1")


def _judge_short_memory(daemon: DaemonProcess, diary_path: Path, oversize: str, reason: str) -> None:
    diary = oracle.Diary.read(diary_path)
    if oversize == "fail":
        (failed,) = diary.failed
        assert "a capture buffer of " in failed, failed
        assert reason in failed, failed
        assert "Next step: " in failed, failed
    else:
        assert not diary.failed
    assert diary.promised == set(_clean_versions(daemon))
    assert "after" in {version.tag for version in diary.promised}
    ranks.wait_until(lambda: ranks.status(daemon).clients == 0, "the rank is gone")


def _daemon(folder: Path, disk: Mount, fault: str = "", environment: Mapping[str, str] | None = None) -> DaemonProcess:
    return DaemonProcess(
        folder,
        environment={**faulty_daemon.environment(), **(environment or {})},
        persistent_storage_path="",
        tier1_path=disk.path / "tier1",
        program=faulty_daemon.program(fault),
        num_of_version_in_retention=100,
    )


def _connect(daemon: DaemonProcess, oversize: str = "stream") -> Client:
    return cairn.connect(job=JOB, runtime_dir=str(daemon.runtime_dir), oversize=oversize)


def _save(client: Client, tag: str, state: object = STATE) -> cairn.VersionId:
    with client.create(tag) as checkpoint:
        checkpoint.save("model.pt", state)
    assert checkpoint.version is not None
    return checkpoint.version


def _save_and_check(client: Client, daemon: DaemonProcess, tag: str, state: object = STATE) -> None:
    version = _save(client, tag, state)
    client.wait(version, durability="tier1", timeout=60)
    assert version in _clean_versions(daemon)


def _clean_versions(daemon: DaemonProcess) -> tuple[cairn.VersionId, ...]:
    found = oracle.examine(daemon.tier1_path, JOB)
    assert not found.torn
    return found.listed


def _remove_group(group: Path) -> None:
    deadline_s = time.monotonic() + 60
    while True:
        try:
            group.rmdir()
        except OSError:  # the kernel counts a process that has just ended for a moment longer
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)
        else:
            return
