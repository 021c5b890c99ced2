"""Training-like client processes: forked from a server that has imported torch already, so that a start costs little.

Each writes a diary, one line per event, on a disk that no test cuts. The state of a tag is a function of the tag, so
whoever loads it knows what it must be.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
import zlib
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

import cairn
from cairn.client import Client

JOB = "run-7"
PARTITIONS = frozenset({"model.pt", "optimizer/rank_0.pt"})

_END_TIMEOUT_S = 60.0


def state_of(tag: str, name: str) -> dict[str, Any]:
    """What partition *name* of *tag* holds: some tensors, up to about 300 KB in all, and a little Python."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{tag}/{name}".encode()))
    sizes = torch.randint(1, 200, (3,), generator=generator).tolist()
    return {
        "tag": tag,
        "layers": [torch.rand(size, 128, generator=generator) for size in sizes],
        "step": torch.tensor(sizes[0]),
    }


def same(left: Any, right: Any) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


class DiaryWriter:
    """Appends events to the diary; one write each, so a kill leaves whole lines."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, word: str, what: object) -> None:
        """Write that *word* happened to *what*."""
        os.write(self._fd, f"{word} {what}\n".replace("\n", " ").strip().encode() + b"\n")


def load_newest(client: Client, diary: DiaryWriter) -> None:
    """Load the newest version as a training would, and note whether its tensors are those that were saved."""
    restored = client.restore()
    if restored is None:
        diary.note("afresh", "")
        return
    version = restored.candidate.version
    with restored:
        for name in sorted(PARTITIONS):
            if not same(restored.load(restored.path_of(name, 0)), state_of(version.tag, name)):
                diary.note("wrong", f"{version} {name}")
                return
    diary.note("loaded", version)


def save_one(client: Client, diary: DiaryWriter, tag: str, promise: str) -> None:
    """Save the state of *tag* and note that it was promised to last *promise* (captured or tier1)."""
    with client.create(tag) as checkpoint:
        diary.note("tried", checkpoint.version)
        for name in sorted(PARTITIONS):
            checkpoint.save(name, state_of(tag, name))
    version = checkpoint.version
    assert version is not None, "saves are never left out here: the client waits for a buffer"
    if promise != "captured":
        client.wait(version, durability=promise, timeout=60)
    diary.note("promised", version)


def train(
    runtime_dir: str, diary_path: str, name: str, promise: str, pause_s: float, steps: int, settings: dict[str, Any]
) -> None:
    """Load the newest version, then save *steps* more, *pause_s* apart; a failed save is noted and training goes on."""
    torch.set_num_threads(1)
    diary = DiaryWriter(Path(diary_path))
    with cairn.connect(job=JOB, runtime_dir=runtime_dir, **settings) as client:
        load_newest(client, diary)
        for step in range(steps):
            try:
                save_one(client, diary, f"{name}-s{step}", promise)
            except cairn.CairnError as error:
                diary.note("failed", f"{name}-s{step}: {type(error).__name__}: {error}")
            time.sleep(pause_s)
        client.wait(f"{name}-s{steps - 1}", durability="tier1", timeout=60)


def train_after(go_on_path: str, *arguments: Any) -> None:
    """:func:`train`, once there is a file *go_on_path*."""
    while not Path(go_on_path).exists():
        time.sleep(0.005)
    train(*arguments)


class Trainer:
    """One client process."""

    def __init__(self, process: ForkServerProcess, log_path: Path) -> None:
        self._process = process
        self.log_path = log_path

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None, "it was started"
        return self._process.pid

    @property
    def log(self) -> str:
        """What it printed."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill9(self) -> None:
        """SIGKILL, and reap."""
        self._process.kill()
        self._process.join()

    def end(self, timeout_s: float = _END_TIMEOUT_S) -> int:
        """Wait for its end; its exit status. One that hangs is killed and fails the test."""
        self._process.join(timeout_s)
        if self._process.is_alive():
            self.kill9()
            raise AssertionError(f"a trainer did not end within {timeout_s:g} s:\n{self.log}")
        assert self._process.exitcode is not None, "it has ended"
        return self._process.exitcode


class Trainers:
    """Starts trainers with logs below *folder*; a context manager that kills and reaps all of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Trainer] = []

    def start(self, target: Callable[..., None], *arguments: object) -> Trainer:
        """Run ``target(*arguments)`` in a new process."""
        log_path = self._folder / f"trainer-{len(self._started)}.log"
        process = _server().Process(target=_run, args=(target, str(log_path), arguments), daemon=True)
        process.start()
        trainer = Trainer(process, log_path)
        self._started.append(trainer)
        return trainer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for trainer in self._started:
            trainer.kill9()


def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "cairn.client", "cairn.capture.plan", "tests.crash.trainer"])
    return context


def _run(target: Callable[..., None], log_path: str, arguments: tuple[object, ...]) -> None:
    fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    try:
        target(*arguments)
    except BaseException:
        traceback.print_exc()
        raise
