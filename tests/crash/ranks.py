"""What ranks do in the tests that kill them, and what can be seen of a daemon from outside."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

import cairn
from cairn.client import Client
from cairn_api.v1.admin_pb2 import StatusReply
from cairnd.cli.daemon_client import Daemon
from tests.crash.trainer import JOB, DiaryWriter, Trainer, save_one, state_of
from tests.daemon_process import DaemonProcess

_COMMIT_TIMEOUT_S = 5.0
_FOR_EVER_S = 3600.0


def save_big(runtime_dir: str, diary_path: str, size_bytes: int, go_on: str) -> None:
    """One save of ones, large enough to be stopped in the middle; a failing commit is noted.

    It does not commit before there is a file *go_on*: whoever wants to stop it in time may be slow.
    """
    torch.set_num_threads(1)
    diary = DiaryWriter(Path(diary_path))
    with cairn.connect(job=JOB, runtime_dir=runtime_dir, oversize="fail") as client:
        big = torch.ones(size_bytes, dtype=torch.uint8)
        try:
            with client.create("big") as checkpoint:
                checkpoint.save("model.pt", {"big": big})
                while not Path(go_on).exists():
                    time.sleep(0.01)
        except cairn.CairnError as error:
            diary.note("failed", error)


def seal_one_of_two(runtime_dir: str, diary_path: str) -> None:
    """Hand over one partition and hang before the next."""
    diary = DiaryWriter(Path(diary_path))
    with cairn.connect(job=JOB, runtime_dir=runtime_dir) as client:
        checkpoint = client.create("half")
        checkpoint.save("model.pt", state_of("half", "model.pt"))
        diary.note("tried", checkpoint.version)
        time.sleep(_FOR_EVER_S)


def commit_and_die(rank: int, meeting: str, runtime_dir: str, diary_path: str, hold: str) -> None:
    """One of two ranks: a version that reaches the bucket, then one after whose commit the process kills itself.

    The file *hold* is made in between: with it the test keeps the second one from being written.
    """
    client = _connect(rank, meeting, runtime_dir)
    diary = DiaryWriter(Path(diary_path))
    for tag in ("first", "last"):
        checkpoint = client.create(tag)
        checkpoint.save(f"rank_{rank}.pt", state_of(tag, f"rank_{rank}.pt"))
        version = checkpoint.commit()
        if tag == "first":
            client.wait(tag, durability="tier2", timeout=60)
            Path(hold).touch()
        diary.note("promised", version)
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_lose_the_other(rank: int, meeting: str, runtime_dir: str, diary_path: str) -> None:
    """One of two ranks: rank 1 hangs before its commit; rank 0 commits, and notes what came of it."""
    client = _connect(rank, meeting, runtime_dir, commit_timeout_s=_COMMIT_TIMEOUT_S)
    diary = DiaryWriter(Path(diary_path))
    checkpoint = client.create("half")
    checkpoint.save(f"rank_{rank}.pt", state_of("half", f"rank_{rank}.pt"))
    diary.note("tried", checkpoint.version)
    if rank == 1:
        time.sleep(_FOR_EVER_S)
    try:
        checkpoint.commit()
    except cairn.SaveFailedError as error:
        diary.note("failed", error)
    client.close()
    os._exit(0)  # the process group is broken, and gloo's destructor would wait for the dead rank


def save_once(runtime_dir: str, diary_path: str, tag: str) -> None:
    """One ordinary save, durable in tier 1."""
    with cairn.connect(job=JOB, runtime_dir=runtime_dir) as client:
        save_one(client, DiaryWriter(Path(diary_path)), tag, "tier1")


def _connect(rank: int, meeting: str, runtime_dir: str, commit_timeout_s: float = 600.0) -> Client:
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    return cairn.connect(job=JOB, runtime_dir=runtime_dir, commit_timeout_s=commit_timeout_s)


def status(daemon: DaemonProcess) -> StatusReply:
    """What ``cairn status`` shows."""
    asked = Daemon(daemon.runtime_dir)
    try:
        return asked.status()
    finally:
        asked.close()


def descriptors(pid: int) -> list[str]:
    """What the open descriptors of a process lead to."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            found.append(str(entry.readlink()))
    return sorted(found)


def capture_buffers(pid: int) -> list[Path]:
    """Paths under which the capture buffers that a process holds can be read."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            if str(entry.readlink()).startswith("/memfd:cairn-capture"):
                found.append(entry)
    return found


def byte_at(path: Path, offset: int) -> int:
    """One byte of a capture buffer."""
    with path.open("rb") as file:
        return os.pread(file.fileno(), 1, offset)[0]


def wait_until(
    condition: Callable[[], bool],
    what: str,
    timeout_s: float = 60.0,
    *,
    trainer: Trainer | None = None,
    describe: Callable[[], object] = lambda: "",
) -> None:
    """Poll *condition*; fails, saying *what* did not happen, after *timeout_s* or when *trainer* ended."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if trainer is not None and not trainer.running:
            raise AssertionError(f"{what}: did not happen, and the trainer ended:\n{trainer.log}")
        if time.monotonic() > deadline_s:
            raise AssertionError(f"{what}: did not happen within {timeout_s:g} s: {describe()}")
        time.sleep(0.002)
