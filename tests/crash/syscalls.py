"""strace makes the n-th call of a kind fail, or kills the daemon in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest


class Injection:
    """strace attached to process *pid* with all its threads; a context manager that detaches.

    *calls* is a regular expression for names of system calls, *what* is strace's own (``error=EIO``, ``signal=KILL``).
    strace counts per thread; the daemon's disk work for one save at a time is done by one.
    """

    def __init__(self, pid: int, calls: str, what: str, number: int, log_path: Path) -> None:
        self._log_path = log_path
        self._tracer = subprocess.Popen(
            ["strace", "-f", "-y", "-o", str(log_path), "-e", f"trace=/{calls}",
             "-e", f"inject=/{calls}:{what}:when={number}", "-p", str(pid)],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._tracer.stderr is not None, "it was asked for"
        said = self._tracer.stderr.readline()
        if "attached" not in said:
            self._end()
            raise AssertionError(f"strace did not attach: {said}")

    @property
    def hits(self) -> list[str]:
        """The calls that were made to fail, as strace prints them, with the paths of their descriptors."""
        return [line for line in self._log_path.read_text().splitlines() if "(INJECTED)" in line]

    def _end(self) -> None:
        self._tracer.terminate()
        self._tracer.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()


def need_strace() -> None:
    """Skip the test, saying why, where strace cannot attach to a process."""
    if shutil.which("strace") is None:
        pytest.skip("NOT PROVED HERE: strace is missing; install it (`make test-faults` does)")
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if os.geteuid() != 0 and scope.exists() and scope.read_text().strip() != "0":
        pytest.skip("NOT PROVED HERE: strace may not attach to processes (kernel.yama.ptrace_scope); run as root")
