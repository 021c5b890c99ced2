"""Tier 1's file system: its kind and options, whether it does what Cairn asks, and whether there is room."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from cairn_api.errors import ErrorKind
from cairnd.cli.doctor import system
from cairnd.cli.doctor.findings import Finding, not_permitted, ok, problem, warning
from cairnd.cli.doctor.stored import Stored
from cairnd.cli.doctor.subject import Subject
from cairnd.cli.text import size_text
from cairnd.settings import TIER1_RESERVED_BYTES

SPACE, FILE_SYSTEM, SPEED = "tier1.space", "tier1.file_system", "tier1.speed"
_PROVED = ("ext4", "xfs")
_VOLATILE = ("tmpfs", "ramfs")
_REMOTE = ("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs", "9p", "beegfs", "glusterfs")
_NO_BARRIER = frozenset({"nobarrier", "barrier=0"})
_FEW_INODES = 10_000
_TOO_FEW_INODES = 100
_PROBE_BYTES = 8 * 1024 * 1024
_SLOW_BYTES_PER_S = 100e6
_SLOW_SYNC_S = 0.2
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)


def check_space(subject: Subject, stored: Stored) -> Iterator[Finding]:
    """Bytes and inodes, against the reserve and against what the known versions need."""
    folder = existing(subject.tier1)
    found = os.statvfs(folder)
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    facts, reserve = f"{size_text(free)} of {size_text(total)} are free in {folder}", size_text(TIER1_RESERVED_BYTES)
    larger = "put tier1_path on a larger file system, or free space there"
    if total < TIER1_RESERVED_BYTES:
        yield problem(
            SPACE,
            f"{facts}: less than the {reserve} that are kept free for records, so no save can succeed",
            "put tier1_path on a larger file system",
        )
    elif free < TIER1_RESERVED_BYTES:
        yield problem(
            SPACE,
            f"{facts}, {reserve} are kept free for records: the next save deletes versions, or fails",
            larger,
            ErrorKind.WAIT,
        )
    else:
        yield ok(SPACE, facts)
    limit = subject.settings.tier1_limit_bytes
    if limit > total:
        yield warning(
            SPACE,
            f"tier1_limit_bytes is {size_text(limit)} on a file system of {size_text(total)}: it never takes effect",
            "lower tier1_limit_bytes, or set it to 0",
        )
    if found.f_files:
        yield _inodes(found.f_favail, folder)
    yield from _needed(subject, stored, free)


def _inodes(free: int, folder: Path) -> Finding:
    fix = "remove small files there, or make the file system with more inodes (mkfs.ext4 -i, xfs needs none)"
    if free < _TOO_FEW_INODES:
        return problem(SPACE, f"{free} inodes are free in {folder}: saves will fail", fix, ErrorKind.WAIT)
    if free < _FEW_INODES:
        return warning(SPACE, f"{free} inodes are free in {folder}; each partition takes one", fix)
    return ok(SPACE, f"{free} inodes are free")


def _needed(subject: Subject, stored: Stored, free_bytes: int) -> Iterator[Finding]:
    """Whether the versions that retention keeps, and the one that is being saved, fit together."""
    by_job = stored.by_job()
    if not by_job:
        return
    settings = subject.settings
    used = sum(version.size_bytes for versions in by_job.values() for version in versions)
    room = used + max(free_bytes - TIER1_RESERVED_BYTES, 0)
    if settings.tier1_limit_bytes:
        room = min(room, settings.tier1_limit_bytes)
    largest = {job: max(version.size_bytes for version in versions[:3]) for job, versions in by_job.items()}
    keep = settings.num_of_version_in_retention
    least, full = sum(largest.values()) * 2, sum(largest.values()) * (keep + 1)
    facts = (
        f"versions of {', '.join(f'{job} ({size_text(size)})' for job, size in sorted(largest.items()))} have "
        f"{size_text(room)} of room in tier 1"
    )
    fix = "put tier1_path on a larger file system, raise tier1_limit_bytes, or lower num_of_version_in_retention"
    if room < least:
        yield problem(
            SPACE,
            f"{facts}: less than the version that is kept and the one that is being saved need",
            fix,
            ErrorKind.WAIT,
        )
    elif room < full:
        yield warning(SPACE, f"{facts}: less than {keep} of each and one that is being saved need", fix)
    else:
        yield ok(SPACE, f"{facts}: enough for {keep} of each and one that is being saved")


def check_file_system(subject: Subject) -> Iterator[Finding]:
    """Its kind and options, and whether O_DIRECT and fsync work there, tried on a file without a name."""
    folder = existing(subject.tier1)
    mount = system.mount_of(folder, subject.machine)
    if mount is None:
        yield warning(FILE_SYSTEM, f"{folder} is on no known mount", "look at /proc/self/mountinfo")
        return
    what = f"tier 1 is on {mount.kind} ({mount.source} at {mount.point})"
    local = "set tier1_path to a folder on a local disk with ext4 or xfs"
    if mount.kind in _VOLATILE:
        yield warning(FILE_SYSTEM, f"{what}: memory, so nothing in it survives a restart of the machine", local)
    elif mount.kind in _REMOTE or mount.kind.startswith("fuse"):
        yield warning(
            FILE_SYSTEM, f"{what}: what a power cut or a lost server leaves of it is not known, and it is slow", local
        )
    elif mount.kind == "overlay":
        yield warning(
            FILE_SYSTEM, f"{what}: a container's own layer, which goes with the container", f"mount a volume: {local}"
        )
    elif mount.kind not in _PROVED:
        yield warning(FILE_SYSTEM, f"{what}: Cairn's power-cut tests run on ext4 and xfs only", local)
    else:
        yield ok(FILE_SYSTEM, what)
    yield from _options(mount)
    if "ro" not in mount.options:
        yield from _probe(subject, folder)


def _options(mount: system.Mount) -> Iterator[Finding]:
    barriers_off = ", ".join(sorted(mount.options & _NO_BARRIER))
    remount = f"mount -o remount,{{}} {mount.point}, and in /etc/fstab"
    if "ro" in mount.options:
        yield problem(
            FILE_SYSTEM,
            f"{mount.point} is mounted read-only; the kernel does that when a disk reports errors",
            f"look at dmesg, then {remount.format('rw')}",
        )
    if barriers_off:
        yield problem(
            FILE_SYSTEM,
            f"{mount.point} is mounted with {barriers_off}: a power cut may lose what was synced",
            remount.format("barrier=1"),
        )
    if "data=writeback" in mount.options:
        yield warning(
            FILE_SYSTEM,
            f"{mount.point} is mounted with data=writeback: Cairn syncs data before it publishes it, but its power-cut "
            "tests run with data=ordered",
            f"mount {mount.point} with data=ordered",
        )


def _probe(subject: Subject, folder: Path) -> Iterator[Finding]:
    """Write, sync and time a few MiB. Only in tier 1's own folder may the file have a name for a moment."""
    try:
        fd, direct = _open_unnamed(folder, named=folder == subject.tier1)
    except OSError as error:
        if isinstance(error, PermissionError) and os.geteuid() != subject.daemon_user()[0]:
            yield not_permitted(FILE_SYSTEM, f"whether files can be made in {folder}")
            return
        yield problem(FILE_SYSTEM, f"no file can be made in {folder}: {error.strerror}", _fix_of_making(folder, error))
        return
    if fd is None:
        yield ok(FILE_SYSTEM, f"not tried by writing: tier1_path is not there yet, and {folder} takes no unnamed files")
        return
    try:
        block = mmap.mmap(-1, _PROBE_BYTES)  # aligned, as O_DIRECT needs it
        block.write(os.urandom(4096) * (_PROBE_BYTES // 4096))
        os.posix_fallocate(fd, 0, _PROBE_BYTES)
        begun_s = time.monotonic()
        written = os.pwrite(fd, block, 0)
        os.fsync(fd)
        write_s = time.monotonic() - begun_s
        begun_s = time.monotonic()
        os.pwrite(fd, memoryview(block)[:4096], 0)
        os.fsync(fd)
        sync_s = time.monotonic() - begun_s
    except OSError as error:
        kind = ErrorKind.WAIT if error.errno in (errno.ENOSPC, errno.EDQUOT) else ErrorKind.RETRY
        yield problem(
            FILE_SYSTEM,
            f"writing and syncing {size_text(_PROBE_BYTES)} in {folder} failed: {error.strerror}",
            "free space there"
            if kind is ErrorKind.WAIT
            else "look at dmesg, and replace the disk if it reports errors",
            kind,
        )
        return
    finally:
        os.close(fd)
    if direct:
        yield ok(FILE_SYSTEM, "O_DIRECT, fallocate and fsync work")
    else:
        yield warning(
            FILE_SYSTEM,
            "fallocate and fsync work, O_DIRECT does not: saves go through the page cache, which takes memory and "
            "processor time from training",
            "set tier1_path to a folder on a local disk with ext4 or xfs",
        )
    yield _speed(written / write_s, sync_s)


def _fix_of_making(folder: Path, error: OSError) -> str:
    if error.errno == errno.EPERM:  # modes and owners give EACCES
        return f"`lsattr -d {folder}` shows an i or an a if it is immutable: chattr -ia {folder}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free space or inodes there"
    return "let the daemon's user own tier1_path, on a file system that is mounted for writing"


def _speed(bytes_per_s: float, sync_s: float) -> Finding:
    facts = (
        f"{size_text(_PROBE_BYTES)} were written and synced at {size_text(bytes_per_s)}/s, a small sync took "
        f"{sync_s * 1000:.0f} ms"
    )
    if bytes_per_s < _SLOW_BYTES_PER_S or sync_s > _SLOW_SYNC_S:
        return warning(
            SPEED,
            f"{facts} (one look, while other checks ran): slow for tier 1",
            "set tier1_path to a folder on local NVMe; look with `iostat -x` at who else writes there",
        )
    return ok(SPEED, facts)


def _open_unnamed(folder: Path, *, named: bool) -> tuple[int | None, bool]:
    """A file without a name, with O_DIRECT if that works; None where neither that nor a name of its own is allowed."""
    for direct in (os.O_DIRECT, 0):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | direct, 0o600), bool(direct)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
    if not named:
        return None, False
    path = folder / f".cairn-doctor-{secrets.token_hex(8)}"
    for direct in (os.O_DIRECT, 0):
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | direct, 0o600)
        except OSError as error:
            path.unlink(missing_ok=True)  # some file systems make the file and then refuse the flag
            if error.errno != errno.EINVAL or not direct:
                raise
            continue
        path.unlink()
        return fd, bool(direct)
    return None, False


def existing(path: Path) -> Path:
    """*path*, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
