"""CPU time and memory of the processes that a save keeps busy, from /proc."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_PERIOD_S = 0.01
_KTHREADD = 2


def cpu_s(pids: Iterable[int]) -> float:
    """User and system seconds of processes so far, all their threads, also those that have ended."""
    total_s = 0.0
    for pid in pids:
        with suppress(OSError):  # it ended meanwhile
            total_s += time.clock_gettime(_cpu_clock(pid))
    return total_s


def _cpu_clock(pid: int) -> int:
    """What clock_getcpuclockid(3) returns: its resolution is nanoseconds, that of /proc/<pid>/stat 10 ms."""
    return (~pid << 3) | 2


def machine_cpu_s() -> float:
    """Seconds for which cores were busy so far: kernel threads that write dirty pages back belong to no process."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - getattr(times, "guest", 0) - getattr(times, "guest_nice", 0))


class Disturbance:
    """CPU time that others took since this was made: processes outside of this benchmark, and the hypervisor."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._before_s = _others_cpu_s()

    def cores(self) -> float:
        """How many cores that is on average."""
        return max(0.0, _others_cpu_s() - self._before_s) / (time.perf_counter() - self._started_s)


def _others_cpu_s() -> float:
    machine_s = machine_cpu_s()
    parent = psutil.Process(os.getppid())
    ours = [os.getppid(), *(process.pid for process in parent.children(recursive=True))]
    return machine_s - cpu_s(ours) - _kernel_cpu_s()


def _kernel_cpu_s() -> float:
    """Seconds of kernel threads: to write dirty pages back is a contender's own doing."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended just now
        if int(fields[1]) == _KTHREADD:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def status_bytes(pid: int, *names: str) -> int:
    """The sum of fields of ``/proc/<pid>/status`` such as RssAnon; 0 for a process that has ended."""
    return sum(_fields(Path(f"/proc/{pid}/status"), names))


def shared_memory_bytes() -> int:
    """Pages of memfds and of tmpfs files on the whole machine."""
    return sum(_fields(Path("/proc/meminfo"), ("Shmem",)))


def _fields(path: Path, names: tuple[str, ...]) -> list[int]:
    try:
        lines = path.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []
    pairs = [line.split(":", 1) for line in lines]
    return [int(value.split()[0]) * 1024 for name, value in pairs if name in names]


class PeakMemory:
    """A context manager: the most memory that this process and *helpers* took more than this one had at its start.

    Private pages are counted per process; shared memory once for the machine, by the one rank for which *shared* is
    true. Helpers (process ids) count in full: without the contender there would be none. *since* an earlier one means
    more than at that one's start, and not less than its peak.
    """

    def __init__(self, helpers: Callable[[], list[int]], *, shared: bool, since: PeakMemory | None = None) -> None:
        self._helpers = helpers
        self._shared = shared
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="bench-memory")
        self._start_bytes: int = since._start_bytes if since else self._now_bytes([])
        self.extra_bytes: int = since.extra_bytes if since else 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            self.extra_bytes = max(self.extra_bytes, self._now_bytes(self._helpers()) - self._start_bytes)

    def _now_bytes(self, helpers: list[int]) -> int:
        private_bytes = sum(status_bytes(pid, "RssAnon") for pid in [os.getpid(), *helpers])
        return private_bytes + (shared_memory_bytes() if self._shared else 0)
