"""Capture buffers: do they work here, what limits them, and how their pages are made."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator

from cairn_api.errors import ErrorKind
from cairnd.cli.doctor import system
from cairnd.cli.doctor.findings import Finding, ok, problem, warning
from cairnd.cli.doctor.subject import Subject
from cairnd.cli.text import size_text
from cairnd.session.memory import F_SEAL_FUTURE_WRITE

CHECK, LIMITS, HUGE_PAGES = "shared_memory", "limits", "huge_pages"
_PROBE_BYTES = 4 * 1024 * 1024
_DAEMON_BYTES = 256 * 1024 * 1024
_FEW_DESCRIPTORS = 4096
_TOO_FEW_DESCRIPTORS = 256
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | F_SEAL_FUTURE_WRITE


def check(subject: Subject) -> Iterator[Finding]:
    """Whether a buffer can be made, reserved and sealed, as every save needs it."""
    del subject
    try:
        fd = os.memfd_create("cairn-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        yield problem(
            CHECK, f"memfd_create fails: {error.strerror}", "use Linux 4.14 or newer, and allow it in seccomp"
        )
        return
    try:
        os.posix_fallocate(fd, 0, _PROBE_BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            fix, kind = "give this process's control group more memory", ErrorKind.WAIT
        else:
            fix, kind = "use Linux 5.1 or newer (F_SEAL_FUTURE_WRITE)", ErrorKind.FIX_CONFIGURATION
        yield problem(CHECK, f"a capture buffer cannot be reserved and sealed: {error.strerror}", fix, kind)
        return
    else:
        yield _sealed(fd)
    finally:
        os.close(fd)


def _sealed(fd: int) -> Finding:
    try:
        mmap.mmap(fd, _PROBE_BYTES).close()
        os.ftruncate(fd, 0)
    except PermissionError:
        return ok(CHECK, "memfd, fallocate and seals work (/dev/shm and its size do not matter)")
    return problem(CHECK, "seals of a memfd are accepted and not kept", "use a kernel of Linux's own, 5.1 or newer")


def check_limits(subject: Subject) -> Iterator[Finding]:
    """Memory of the control groups, and descriptors: of the daemon, and of the trainers that were named."""
    daemon = subject.daemon
    if daemon is None:
        yield ok(LIMITS, "the daemon does not run, so its own limits were not looked at")
    elif not daemon.pid:
        yield ok(LIMITS, "the daemon is in another pid namespace, so its limits were not looked at")
    else:
        yield from _daemon_memory(subject, daemon.pid)
        yield _descriptors(subject, daemon.pid, "the daemon", "LimitNOFILE=65536 in its unit")
    for pid in subject.pids:
        if not (subject.machine / "proc" / str(pid)).is_dir():
            yield problem(LIMITS, f"there is no process {pid}", "give the process id of a trainer with --pid")
            continue
        yield from _trainer_memory(subject, pid)
        yield from _locked_memory(subject, pid)
        yield _descriptors(subject, pid, f"process {pid}", "`ulimit -n 65536` before the trainer starts")
    if not subject.pids:
        yield ok(LIMITS, "buffers count as memory of the trainer that fills them: --pid looks at a trainer's limits")


def _daemon_memory(subject: Subject, pid: int) -> Iterator[Finding]:
    limit, budget = system.memory_limit(pid, subject.machine), subject.settings.capture_limit_bytes()
    fix = (
        f"set MemoryMax of its unit (or the container's limit) to {size_text(budget + _DAEMON_BYTES)} or more, or none"
    )
    if limit is None:
        yield ok(LIMITS, "no control group limits the daemon's memory")
        return
    facts = f"the daemon may use {size_text(limit.limit_bytes)} ({limit.where}), {size_text(limit.free_bytes)} are free"
    if limit.limit_bytes < _DAEMON_BYTES or limit.free_bytes < _DAEMON_BYTES // 4:
        yield problem(LIMITS, f"{facts}: it needs {size_text(_DAEMON_BYTES)} itself, and may be killed", fix)
    elif limit.limit_bytes < budget + _DAEMON_BYTES:
        yield warning(
            LIMITS,
            f"{facts}: less than capture_memory_bytes ({size_text(budget)}), all of which may count as the daemon's "
            "when saves go as byte streams or outlive their trainer",
            fix,
        )
    else:
        yield ok(LIMITS, facts)


def _trainer_memory(subject: Subject, pid: int) -> Iterator[Finding]:
    limit, budget = system.memory_limit(pid, subject.machine), subject.settings.capture_limit_bytes()
    if limit is None:
        yield ok(LIMITS, f"no control group limits the memory of process {pid}")
        return
    facts = (
        f"process {pid} may use {size_text(limit.limit_bytes)} ({limit.where}), {size_text(limit.free_bytes)} are free"
    )
    fix = "raise the limit of the trainer's container or job by the size of what it saves, times `buffers` (2)"
    if limit.free_bytes < _DAEMON_BYTES // 4:
        yield problem(LIMITS, f"{facts}: no capture buffer fits, so saves go as byte streams", fix, ErrorKind.WAIT)
    elif limit.limit_bytes < budget:
        yield warning(
            LIMITS,
            f"{facts}: less than capture_memory_bytes ({size_text(budget)}), and buffers count as the trainer's memory",
            fix,
        )
    else:
        yield ok(LIMITS, facts)


def _locked_memory(subject: Subject, pid: int) -> Iterator[Finding]:
    """Cairn locks no memory itself; some CUDA drivers count buffers that are registered for GPU copies."""
    limit, budget = (
        system.process_limit(pid, "Max locked memory", subject.machine),
        subject.settings.capture_limit_bytes(),
    )
    if limit is not None and limit < budget and (subject.machine / "dev/nvidiactl").exists():
        yield warning(
            LIMITS,
            f"process {pid} may lock {size_text(limit)}: some drivers count capture buffers that GPUs copy into, and "
            "then these are not registered, and copies are slower",
            "`ulimit -l unlimited` before the trainer starts (--ulimit memlock=-1 for a container)",
        )


def _descriptors(subject: Subject, pid: int, who: str, how: str) -> Finding:
    limit = system.process_limit(pid, "Max open files", subject.machine)
    if limit is None or limit >= _FEW_DESCRIPTORS:
        return ok(LIMITS, f"{who} may open {limit or 'any number of'} files")
    facts = f"{who} may open {limit} files; each buffer, partition and upload takes some"
    return (problem if limit < _TOO_FEW_DESCRIPTORS else warning)(LIMITS, facts, how)


def check_huge_pages(subject: Subject) -> Iterator[Finding]:
    """How pages of shared memory are made: it decides what a new buffer costs, not what a save costs."""
    path = subject.machine / "sys/kernel/mm/transparent_hugepage/shmem_enabled"
    try:
        text = path.read_text()
    except OSError:
        yield ok(HUGE_PAGES, "this kernel has no huge pages for shared memory")
        return
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen in ("never", "deny"):
        yield warning(
            HUGE_PAGES,
            f"shared memory gets small pages only ({chosen}): a new capture buffer costs five to ten times as much, "
            "which the first save shows (or `preallocate` hides); later saves reuse their buffers and gain little",
            f"echo advise > {path}; for good: a line `w {path} - - - - advise` in /etc/tmpfiles.d/cairn.conf",
        )
    else:
        yield ok(HUGE_PAGES, f"capture buffers may have huge pages ({chosen})")
