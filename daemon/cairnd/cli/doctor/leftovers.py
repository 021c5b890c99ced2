"""What crashes, killed daemons and people have left in tier 1 and in the runtime folder, with sizes."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from cairn_api.names import RESERVED_NAME
from cairn_api.wire import GRPC_SOCKET_NAME, SIDE_SOCKET_NAME
from cairnd import layout
from cairnd.cli.doctor.findings import Finding, from_error, listed, ok, problem, warning
from cairnd.cli.doctor.stored import Stored
from cairnd.cli.doctor.subject import Subject
from cairnd.cli.text import count_text, size_text
from cairnd.tiers.atomic import TEMPORARY_SUFFIX

CHECK = "leftovers"
_STALE_S = 3600.0
_OWN_NAMES = frozenset({RESERVED_NAME, layout.VERSIONS, "lost+found"})


def check(subject: Subject, stored: Stored) -> Iterator[Finding]:
    """See the module."""
    found = [*_in_runtime_folder(subject), *_lock(subject)]
    if subject.tier1.is_dir():
        found += [*_in_tier1(subject, stored), *_quarantine(subject)]
    yield from found
    if not found:
        yield ok(CHECK, "nothing was left behind")


def _in_runtime_folder(subject: Subject) -> Iterator[Finding]:
    names = [name for name in (GRPC_SOCKET_NAME, SIDE_SOCKET_NAME) if _is_socket(subject.runtime_dir / name)]
    if names and subject.daemon is None:
        yield warning(
            CHECK,
            f"{', '.join(names)} in {subject.runtime_dir}, where nobody listens: its daemon was killed, or is starting",
            "start cairnd (systemctl start cairnd), which replaces them",
        )


def _lock(subject: Subject) -> Iterator[Finding]:
    """Who owns the tree, from the kernel's table: taking the lock, even for a moment, could stop a daemon's start."""
    owner = lock_owner(subject.tier1 / layout.LOCK_KEY, subject.machine)
    if owner is None:
        return
    if subject.daemon is None:
        yield problem(
            CHECK,
            f"process {owner} owns {subject.tier1} and does not listen in {subject.runtime_dir}: it hangs, is "
            "starting, or has another runtime_dir",
            f"look at it (ps {owner}; journalctl -u cairnd), and give its runtime_dir with --runtime-dir or stop it",
        )
    elif subject.daemon.pid not in (0, owner) and owner:
        yield problem(
            CHECK,
            f"process {owner} owns {subject.tier1}, and process {subject.daemon.pid} listens in {subject.runtime_dir}",
            "one tier1_path and one runtime_dir belong to one daemon: stop one of them",
        )


def lock_owner(path: Path, machine: Path) -> int | None:
    """The process that holds the lock on *path*; 0 for one in another pid namespace; None if nobody does."""
    try:
        inode, device = path.stat().st_ino, _device(path)
    except OSError:
        return None
    for line in (machine / "proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] != "FLOCK":
            continue
        major, minor, number = fields[5].split(":")
        if number == str(inode) and (int(major, 16), int(minor, 16)) == device:
            return max(int(fields[4]), 0)
    return None


def _device(path: Path) -> tuple[int, int] | None:
    """Major and minor of the file system that holds *path*, as the kernel's tables have them; None if it is not known.

    ``st_dev`` is another on btrfs and on overlays.
    """
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        about = dict(line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines())
    finally:
        os.close(fd)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, device = line.split()[:3]
        if mount == about["mnt_id"].strip():
            major, minor = device.split(":")
            return int(major), int(minor)
    return None


def _in_tier1(subject: Subject, stored: Stored) -> Iterator[Finding]:
    root, scanned = subject.tier1, stored.scan()
    # While a daemon runs, what it is writing at the moment looks the same as what one left.
    unfinished = [key for key in scanned.swept if subject.daemon is None or _age_s(root / key) > _wait_s(subject)]
    if unfinished:
        yield warning(
            CHECK,
            f"{_listed(unfinished, 'unfinished version')}, no manifest ({_sizes(root, unfinished)}): never promised",
            "nothing: cairnd removes them at its next start",
        )
    for key, why in scanned.quarantined:
        yield problem(
            CHECK,
            f"the manifest of {key} is damaged: {why}",
            "restart cairnd, which moves it to the quarantine folder; `cairn list` shows where else the version is",
        )
    for key, error in scanned.left_alone.items():
        yield from_error(CHECK, f"{key} cannot be looked at, and is not used", error)
    incoming = [
        layout.incoming_folder(version.job, version.id)
        for version in scanned.versions
        if _is_stale(subject, root / layout.incoming_folder(version.job, version.id))
    ]
    if _is_stale(subject, root / layout.FETCHED):
        incoming.append(layout.FETCHED)
    if incoming:
        yield warning(
            CHECK,
            f"{_listed(incoming, 'partial download')} ({_sizes(root, incoming)})",
            "nothing: cairnd removes them at its next start",
        )
    temporary = [
        path.relative_to(root).as_posix()
        for path in (root / RESERVED_NAME).rglob(f".*{TEMPORARY_SUFFIX}")
        if any(time.time() - found.st_mtime > _STALE_S for found in _stats(path))
    ]
    if temporary:
        yield warning(
            CHECK,
            f"{_listed(temporary, 'temporary file')} of records ({_sizes(root, temporary)})",
            f"stop the daemon, then find {root / RESERVED_NAME} -name '.*{TEMPORARY_SUFFIX}' -delete",
        )
    foreign = [f"{layout.VERSIONS}/{name}" for name in scanned.foreign]
    foreign += sorted(entry.name for entry in stored.tier.list_folder("") if entry.name not in _OWN_NAMES)
    if foreign:
        yield warning(
            CHECK,
            f"{_listed(foreign, 'name')} that Cairn did not make ({_sizes(root, foreign)}): it neither reads nor "
            "removes them, and they take space",
            f"move them out of {root}",
        )


def _quarantine(subject: Subject) -> Iterator[Finding]:
    folder = subject.tier1 / layout.QUARANTINE
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    if files:
        size_bytes = sum(found.st_size for path in files for found in _stats(path))
        yield warning(
            CHECK,
            f"{count_text(len(files), 'file')} of damaged copies in {folder} ({size_text(size_bytes)})",
            f"copy what you want to look at, then rm -r {folder}/*",
        )


def _wait_s(subject: Subject) -> float:
    return max(subject.settings.commit_timeout_s + subject.settings.lease_s, _STALE_S)


def _is_stale(subject: Subject, folder: Path) -> bool:
    """Whether there is something in *folder* that no running daemon is still at work on."""
    if not any(path.is_file() for path in folder.rglob("*")):
        return False
    return subject.daemon is None or _age_s(folder) > _wait_s(subject)


def _age_s(folder: Path) -> float:
    """Seconds since anything in *folder* was written."""
    times = [found.st_mtime for path in (folder, *folder.rglob("*")) for found in _stats(path)]
    return time.time() - max(times, default=time.time())


def _listed(keys: Iterable[str], noun: str) -> str:
    names = list(keys)
    return f"{count_text(len(names), noun)} ({listed(names)})"


def _sizes(root: Path, keys: Iterable[str]) -> str:
    total = 0
    for key in keys:
        path = root / key
        for item in (path, *path.rglob("*")) if path.is_dir() else (path,):
            total += sum(found.st_size for found in _stats(item) if stat.S_ISREG(found.st_mode))
    return size_text(total)


def _stats(path: Path) -> Iterator[os.stat_result]:
    """What *path* is, unless a daemon that runs has moved or removed it since it was listed."""
    with suppress(FileNotFoundError):
        yield path.lstat()


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False
