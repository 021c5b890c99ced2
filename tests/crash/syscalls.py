"""strace records which durable system calls the daemon makes, and fails the n-th of them or kills the daemon in it.

strace counts each call by name and per thread (``when=n`` is the n-th call of that name of *each* thread), from the
start of the program. :mod:`tests.crash.serial_daemon` does all disk work on one thread, so the count of that thread is
the count of all, and a call found in a recording is found again under the same number.

With ``signal=KILL`` the signal is sent on the way into the call: the process dies and the call does not happen. Killed
in the (n+1)-th call is thus killed after the n-th. strace loses such a signal when it filters with seccomp (6.1), so
only runs that are not to kill are filtered, which makes them twice as fast.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

DURABLE = (
    "openat", "pwrite64", "fallocate", "ftruncate", "fsync", "rename", "linkat", "mkdir", "unlink", "rmdir",
    "chmod", "fchmod", "lchown", "ioctl",
)  # fmt: skip
"""The calls by which Cairn changes what is on a disk: these are failed. ``openat`` counts if it creates, ``ioctl`` if
it sets a file's flags."""

FAULTS = ("KILL", "EIO", "ENOSPC")

_READS = frozenset({
    "access", "close", "dup", "faccessat", "faccessat2", "fadvise64", "fchdir", "fcntl", "fgetxattr", "flock", "fstat",
    "fstatfs", "getcwd", "getdents64", "getxattr", "ioctl", "lgetxattr", "lseek", "lstat", "mmap", "newfstatat", "open",
    "openat", "pread64", "preadv", "preadv2", "read", "readlink", "readlinkat", "readv", "stat", "statfs", "statx",
    "execve", "chdir", "epoll_ctl",
})  # fmt: skip
"""Calls that change nothing on a disk (``openat`` and ``ioctl`` are looked at more closely)."""

_LINE = re.compile(r"^(?P<thread>\d+) +(?P<name>\w+)\((?P<rest>.*)$")
_RESUMED = re.compile(r"^(?P<thread>\d+) +<\.\.\. \w+ resumed>(?P<rest>.*)$")
_PATHS = re.compile(r'<(/[^<>]*)>|"(/[^"]*)"')
_RANDOM = re.compile(r"[0-9a-f]{8,32}(?![0-9a-z])")


@dataclass(slots=True)
class Call:
    """One call in a trace: the *number*-th of its name on its thread, with its result as strace prints it."""

    thread: int
    name: str
    number: int
    arguments: str
    result: str = ""

    @property
    def injected(self) -> bool:
        """Whether strace made it fail."""
        return "(INJECTED)" in self.result

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of its arguments and of their descriptors."""
        arguments = re.sub(r"AT_FDCWD<[^>]*>", "", self.arguments)
        return tuple(first or second for first, second in _PATHS.findall(arguments))

    @property
    def changes(self) -> bool:
        """Whether it changes what is on a disk."""
        if self.name == "openat":
            return "O_CREAT" in self.arguments
        if self.name == "ioctl":
            return "FS_IOC_SETFLAGS" in self.arguments
        return self.name not in _READS

    def below(self, *roots: Path) -> bool:
        """Whether one of its paths is one of *roots* or lies below it."""
        return any(Path(path).is_relative_to(root) for path in self.paths for root in roots)

    def what(self, folder: Path) -> str:
        """Name and paths below *folder*, without what is random in them: the same in each run."""
        paths = [os.path.relpath(path, folder) for path in self.paths]
        return _RANDOM.sub("*", " ".join([self.name, *paths]))


def record_command(log_path: Path) -> tuple[str, ...]:
    """What to put before a command to record all its calls that concern files."""
    return _strace(log_path, "trace=%file,%desc,sync", filtered=True)


def fault_command(log_path: Path, call: str, number: int, fault: str) -> tuple[str, ...]:
    """What to put before a command to have its n-th *call* fail with *fault*, or ``KILL`` it there."""
    what = "signal=KILL" if fault == "KILL" else f"error={fault}"
    command = _strace(log_path, f"trace={','.join(DURABLE)}", filtered=fault != "KILL")
    return (*command, "-e", f"inject={call}:{what}:when={number}")


def _strace(log_path: Path, trace: str, *, filtered: bool) -> tuple[str, ...]:
    # -D: the daemon stays our child and strace becomes its; -y: with the paths of descriptors; -s 0: without data.
    filters = ("--seccomp-bpf",) if filtered else ()
    return ("strace", "-D", "-f", *filters, "-qq", "-y", "-s", "0", "-o", str(log_path), "-e", trace)


def read_trace(log_path: Path) -> list[Call]:
    """The calls of a trace in the order in which they began."""
    calls: list[Call] = []
    counts: Counter[tuple[int, str]] = Counter()
    unfinished: dict[int, Call] = {}
    for line in log_path.read_text(errors="replace").splitlines():
        resumed, begun = _RESUMED.match(line), _LINE.match(line)
        if resumed is not None:
            call = unfinished.pop(int(resumed["thread"]))
            call.arguments += resumed["rest"].rpartition(" = ")[0]
            call.result = resumed["rest"].rpartition(" = ")[2]
        elif begun is not None:
            thread, name, rest = int(begun["thread"]), begun["name"], begun["rest"]
            counts[thread, name] += 1
            call = Call(thread, name, counts[thread, name], rest)
            if rest.endswith("<unfinished ...>"):
                unfinished[thread] = call
            else:
                call.arguments, _, call.result = rest.rpartition(" = ")
            calls.append(call)
    return calls


def need_strace() -> None:
    """Skip the test, saying why, where strace cannot trace a daemon that owns files of other groups."""
    if shutil.which("strace") is None:
        pytest.skip("NOT PROVED HERE: strace is missing; install it (`make test-faults` does)")
    if os.geteuid() != 0:
        pytest.skip("NOT PROVED HERE: tracing needs root, and so do files of another group; run as root")
