"""Facts about the machine that several checks need, read from /proc, /sys and the unit's files below a given root."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNIT_FOLDERS = ("lib/systemd/system", "usr/lib/systemd/system", "run/systemd/system", "etc/systemd/system")
_UNIT = "cairnd.service"
_SPANS_S = {"": 1.0, "s": 1.0, "sec": 1.0, "ms": 0.001, "m": 60.0, "min": 60.0, "h": 3600.0}
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a path lies. ``options`` are those of the mount and of its file system."""

    point: str
    kind: str
    source: str
    options: frozenset[str]


def mount_of(path: Path, machine: Path) -> Mount | None:
    """The mount that holds *path*, from ``/proc/self/mountinfo``: the last of those with the longest matching point."""
    real, best = os.path.realpath(path), None
    for line in (machine / "proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, source, *rest) = left.split(), right.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        if real == point or real.startswith(point.rstrip("/") + "/"):
            options = frozenset([*fields[5].split(","), *(rest[0].split(",") if rest else [])])
            if best is None or len(point) >= len(best.point):
                best = Mount(point, kind, source, options)
    return best


def memory_bytes() -> int:
    """What the machine has."""
    return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def unit_installed(machine: Path) -> bool:
    """Whether the systemd unit is there."""
    return any((machine / folder / _UNIT).is_file() for folder in _UNIT_FOLDERS)


def unit_setting(machine: Path, name: str) -> str:
    """What the unit and its drop-ins set last; empty if nothing."""
    value = ""
    for path in _unit_files(machine):
        for line in path.read_text(errors="replace").splitlines():
            key, found, rest = line.partition("=")
            if found and key.strip() == name:
                value = rest.strip()
    return value


def seconds_of(span: str) -> float | None:
    """A time span of systemd's, such as ``120`` or ``1min 30s``; None for ``infinity`` and what is no span."""
    parts = re.findall(r"([\d.]+)\s*([a-z]*)", span)
    if not parts or any(unit not in _SPANS_S for _, unit in parts):
        return None
    return sum(float(number) * _SPANS_S[unit] for number, unit in parts)


def bytes_of(size: str) -> int | None:
    """A size of systemd's, such as ``8G`` or ``50%`` of memory; None for ``infinity`` and what is no size."""
    found = re.fullmatch(r"([\d.]+)([KMGT%]?)", size)
    if found is None:
        return None
    if found[2] == "%":
        return int(memory_bytes() * float(found[1]) / 100)
    return int(float(found[1]) * _SIZES[found[2]])


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit of a control group, and how many of its bytes are free, page cache counted as free."""

    limit_bytes: int
    free_bytes: int
    where: Path


def memory_limit(pid: int | str, machine: Path) -> MemoryLimit | None:
    """The tightest memory limit on a process, of all its control groups (version 1 and 2); None without any."""
    limits = list(_memory_limits(pid, machine))
    return min(limits, key=lambda limit: limit.free_bytes, default=None)


_UNLIMITED_BYTES = 1 << 60
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def _memory_limits(pid: int | str, machine: Path) -> Iterator[MemoryLimit]:
    root = machine / "sys/fs/cgroup"
    for line in (machine / "proc" / str(pid) / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots, files = [root, root / "unified"], _V2
        elif "memory" in controllers.split(","):
            roots, files = [root / "memory"], _V1
        else:
            continue
        for base in roots:
            folder = base / path.lstrip("/")
            # In a container its own group may be the root of what is mounted, while the path is the host's.
            for place in [folder, *folder.parents] if folder.is_dir() else [base]:
                limit = _limit_in(place, *files)
                if limit is not None:
                    yield limit
                if place == base:
                    break


def _limit_in(place: Path, limit_file: str, used_file: str, cache_keys: tuple[str, ...]) -> MemoryLimit | None:
    try:
        text = (place / limit_file).read_text().strip()
        if text == "max" or int(text) >= _UNLIMITED_BYTES:
            return None
        used_bytes = int((place / used_file).read_text())
        stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such controller here, or a root group, which has no limit
        return None
    cache_bytes = sum(int(stat.get(key, 0)) for key in cache_keys)
    return MemoryLimit(int(text), max(int(text) - used_bytes + cache_bytes, 0), place)


def process_limit(pid: int | str, name: str, machine: Path) -> int | None:
    """A soft limit of a process, by its name in ``/proc/PID/limits``; None if there is none."""
    for line in (machine / "proc" / str(pid) / "limits").read_text().splitlines():
        if line.startswith(name):
            soft = line.removeprefix(name).split()[0]
            return None if soft == "unlimited" else int(soft)
    return None


def _unit_files(machine: Path) -> Iterator[Path]:
    units = [machine / folder / _UNIT for folder in _UNIT_FOLDERS]
    yield from [path for path in units if path.is_file()][-1:]  # the folder of the administrator replaces the others
    for folder in _UNIT_FOLDERS:
        yield from sorted((machine / folder / f"{_UNIT}.d").glob("*.conf"))
