"""What ranks do in the tests of limits."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import cairn
from tests.crash.trainer import JOB, DiaryWriter, same, save_one

MIB = 1024 * 1024
_CLONE_NEWNS = 0x00020000  # linux/sched.h
_MAP_NORESERVE = 0x4000  # linux/mman.h; not in Python's mmap module before 3.13


def big_state(number: int, size_bytes: int) -> dict[str, torch.Tensor]:
    """A state of *size_bytes* that differs with *number*."""
    return {"weights": torch.full((size_bytes // 4,), number, dtype=torch.int32)}


def save_large(runtime_dir: str, diary_path: str, job: str, size_bytes: int, saves: int, oversize: str) -> None:
    """Save *saves* states of *size_bytes*, load each back and compare it; failed saves are noted."""
    torch.set_num_threads(1)
    diary = DiaryWriter(Path(diary_path))
    with cairn.connect(job=job, runtime_dir=runtime_dir, oversize=oversize) as client:
        for number in range(saves):
            tag, state = f"step{number}", big_state(number, size_bytes)
            try:
                with client.create(tag) as checkpoint:
                    diary.note("tried", checkpoint.version)
                    checkpoint.save("model.pt", state)
                client.wait(tag, durability="tier1", timeout=120)
            except cairn.CairnError as error:
                diary.note("failed", error)
                continue
            if same(client.load(tag, "model.pt"), state):
                diary.note("promised", checkpoint.version)
            else:
                diary.note("wrong", tag)


def save_short_of_files(runtime_dir: str, diary_path: str, oversize: str) -> None:
    """Save with no descriptor left in this process, and again with some."""
    diary = DiaryWriter(Path(diary_path))
    with cairn.connect(job=JOB, runtime_dir=runtime_dir, oversize=oversize) as client:
        save_one(client, diary, "first", "tier1")
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = 1 + max(int(path.name) for path in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, limits[1]))
        taken = _all_descriptors()
        try:
            with client.create("short") as checkpoint:
                checkpoint.save("model.pt", big_state(1, 16 * MIB))  # needs a buffer that is not there yet
            client.wait("short", durability="tier1", timeout=60)
            diary.note("promised", checkpoint.version)
        except cairn.CairnError as error:
            diary.note("failed", f"{type(error).__name__}: {error}")
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        save_one(client, diary, "after", "tier1")


def _all_descriptors() -> list[int]:
    """Every descriptor that this process can get, also those that other threads close within a second."""
    taken: list[int] = []
    until_s = time.monotonic() + 1.0
    while time.monotonic() < until_s:
        try:
            taken.append(os.dup(0))
        except OSError:
            time.sleep(0.005)
    return taken


def save_with_small_shm(runtime_dir: str, diary_path: str) -> None:
    """Save where /dev/shm has room for 64 KiB, as in a container that nobody gave more."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    for command in ("mount --make-rprivate /", "mount -t tmpfs -o size=64k tmpfs /dev/shm"):
        subprocess.run(command.split(), check=True)
    Path("/dev/shm/full").write_bytes(bytes(64 * 1024))  # noqa: S108 - the mount made above
    save_large(runtime_dir, diary_path, JOB, 32 * MIB, 2, "fail")


def save_in_small_group(runtime_dir: str, diary_path: str, group: str, oversize: str) -> None:
    """Save 256 MiB where a control group has 64 MiB left, and a small state where it has enough."""
    sparse = mmap.mmap(-1, 256 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    state = {"weights": torch.frombuffer(sparse, dtype=torch.uint8)}
    folder = Path(group)
    (folder / "cgroup.procs").write_text(str(os.getpid()))
    diary = DiaryWriter(Path(diary_path))
    with cairn.connect(job=JOB, runtime_dir=runtime_dir, oversize=oversize) as client:
        used_bytes = int((folder / "memory.usage_in_bytes").read_text())
        (folder / "memory.limit_in_bytes").write_text(str(used_bytes + 64 * MIB))
        try:
            with client.create("large") as checkpoint:
                diary.note("tried", checkpoint.version)
                checkpoint.save("model.pt", state)
            client.wait("large", durability="tier1", timeout=60)
            diary.note("promised", checkpoint.version)
        except cairn.CairnError as error:
            diary.note("failed", error)
        (folder / "memory.limit_in_bytes").write_text("-1")
        save_one(client, diary, "after", "tier1")


def save_steadily(runtime_dir: str, diary_path: str, size_bytes: int, saves: int) -> None:
    """Save *saves* states of *size_bytes* as fast as two buffers allow, then wait until all are in tier 1."""
    torch.set_num_threads(1)
    diary = DiaryWriter(Path(diary_path))
    with cairn.connect(job=JOB, runtime_dir=runtime_dir, buffers=2) as client:
        for number in range(saves):
            try:
                with client.create(f"step{number}") as checkpoint:
                    diary.note("tried", checkpoint.version)
                    checkpoint.save("model.pt", big_state(number, size_bytes))
                diary.note("promised", checkpoint.version)
            except cairn.CairnError as error:
                diary.note("failed", error)
        client.wait(f"step{saves - 1}", durability="tier1", timeout=120)


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    """Whether *condition* came to hold within *timeout_s*."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True
