"""Where a folder lies: on a disk of this node, or on something that other nodes see too."""

from __future__ import annotations

import re
from pathlib import Path

LOCAL_TYPES = frozenset(
    ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "reiserfs", "tmpfs", "xfs", "zfs")
)
"""File systems that one node mounts at a time. Whatever is not named here is taken for shared, the careful guess."""

_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPE = re.compile(r"\\([0-7]{3})")


def type_of(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that holds *path* (absolute, resolved), such as ``ext4`` or ``nfs4``; "" if unknown.

    *mounts* is the text of proc_pid_mountinfo(5), read from the kernel when absent.
    """
    longest, found = -1, ""
    for line in (_MOUNTS.read_text() if mounts is None else mounts).splitlines():
        before, _, after = line.partition(" - ")
        point = Path(_ESCAPE.sub(lambda match: chr(int(match[1], 8)), before.split()[4]))
        # Of two mounts on one point the later one is seen.
        if path.is_relative_to(point) and len(point.parts) >= longest:
            longest, found = len(point.parts), after.split()[0]
    return found


def is_local(path: Path) -> bool:
    """Whether *path*, or its nearest ancestor that exists, lies on a file system of this node alone."""
    return type_of(path.resolve()) in LOCAL_TYPES
