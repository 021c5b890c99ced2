"""Control groups (version 1) of a test's own: limits of memory, disk speed, processes; freezing. All need root."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

_ROOT = Path("/sys/fs/cgroup")
_NUMBERS = itertools.count()
_PATIENCE_S = 60.0


class Group:
    """A new group of *controller*, below the one that this process is in; a context manager that removes it.

    Processes are added by :meth:`add`, or add themselves (see :mod:`tests.crash.limited`); all must have ended when the
    group is removed.
    """

    def __init__(self, controller: str) -> None:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if f":{controller}:" in line)
        above = _ROOT / controller / own.rpartition(":")[2].lstrip("/")
        self.path = above / f"cairn-{os.getpid()}-{next(_NUMBERS)}"

    def add(self, pid: int) -> None:
        """Move a process with all its threads into the group."""
        self.write("cgroup.procs", pid)

    def write(self, name: str, value: object) -> None:
        """Set the parameter *name*."""
        (self.path / name).write_text(str(value))

    def read(self, name: str) -> str:
        """The parameter *name*."""
        return (self.path / name).read_text()

    def freeze(self) -> None:
        """Stop all processes of a freezer group; returns when they stand still."""
        self.write("freezer.state", "FROZEN")
        _wait(lambda: self.read("freezer.state").strip() == "FROZEN", "the group is frozen")

    def thaw(self) -> None:
        """Let them go on."""
        self.write("freezer.state", "THAWED")

    def __enter__(self) -> Self:
        self.path.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (self.path / "freezer.state").exists():
            self.thaw()  # the frozen cannot be killed

        def removed() -> bool:
            try:
                self.path.rmdir()
            except OSError:  # the kernel counts a process that has just ended for a moment longer
                return False
            return True

        _wait(removed, f"{self.path} can be removed")


def need_group(controller: str) -> None:
    """Skip the test, saying why, where groups of *controller* cannot be made."""
    folder = _ROOT / controller
    if os.geteuid() != 0 or not (folder / "cgroup.procs").exists() or (folder / "cgroup.controllers").exists():
        pytest.skip(
            f"NOT PROVED HERE: needs root and the {controller} controller of cgroup version 1; run as root in a "
            "container or machine that mounts it below /sys/fs/cgroup"
        )


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"{what}: not within {_PATIENCE_S:g} s")
        time.sleep(0.02)
