"""Who is stopped for a while in the tests of pauses, how, and what ranks do meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import cairn
from tests.crash.cgroups import Group
from tests.crash.trainer import PARTITIONS, DiaryWriter, state_of

Pause = Callable[[int], "Paused"]


class Paused:
    """A process that stands still until :meth:`resume`."""

    def __init__(self, resume: Callable[[], None]) -> None:
        self.resume = resume


@contextmanager
def pausing(means: str) -> Iterator[Pause]:
    """Something that stops one process, by a *means* of ``SIGSTOP`` or ``freezer``."""
    if means == "SIGSTOP":
        yield _stop
        return
    with Group("freezer") as group:
        home = group.path.parent / "cgroup.procs"

        def freeze(pid: int) -> Paused:
            group.add(pid)
            group.freeze()

            def thaw() -> None:
                group.thaw()
                home.write_text(str(pid))

            return Paused(thaw)

        yield freeze


def _stop(pid: int) -> Paused:
    os.kill(pid, signal.SIGSTOP)
    return Paused(lambda: os.kill(pid, signal.SIGCONT))


def hold_saves(runtime_dir: str, diary_path: str, job: str, folder: str, rounds: int) -> None:
    """Save *rounds* versions of *job*; the n-th is open, all its bytes handed over, until there is *folder*/go-n."""
    torch.set_num_threads(1)
    diary = DiaryWriter(Path(diary_path))
    with cairn.connect(job=job, runtime_dir=runtime_dir) as client:
        for number in range(rounds):
            tag = f"held-{number}"
            try:
                with client.create(tag) as checkpoint:
                    for name in sorted(PARTITIONS):
                        checkpoint.save(name, state_of(tag, name))
                    diary.note("tried", checkpoint.version)
                    wait_for(Path(folder) / f"go-{number}")
                client.wait(tag, durability="tier1", timeout=60)
                diary.note("promised", checkpoint.version)
            except cairn.CairnError as error:
                diary.note("failed", f"{tag}: {type(error).__name__}: {error}")


def wait_for(path: Path) -> None:
    """Return when the file *path* is there."""
    while not path.exists():
        time.sleep(0.01)
