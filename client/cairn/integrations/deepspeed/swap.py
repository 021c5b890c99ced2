"""Changing what a name stands for in one step: whole folders, and small files."""

from __future__ import annotations

import ctypes
import errno
import os
import uuid
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_SUPPORTED = frozenset((errno.ENOSYS, errno.EINVAL, errno.ENOTSUP))


def exchange(new: Path, old: Path) -> None:
    """Let two existing names of one file system trade places; nobody ever sees *old* missing (renameat2(2)).

    Where the kernel or the file system cannot do that (NFS), two renames: for an instant *old* does not exist.
    """
    try:
        _rename_exchange(new, old)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        aside = hidden_beside(old)
        old.rename(aside)
        new.rename(old)
        aside.rename(new)


def _rename_exchange(one: Path, other: Path) -> None:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # a C library from before 2018
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def hidden_beside(path: Path) -> Path:
    """A fresh name in the folder of *path* that tools looking for checkpoints pass over."""
    return path.with_name(f"{hidden_prefix(path)}{uuid.uuid4().hex[:12]}")


def hidden_prefix(path: Path) -> str:
    """How the names that :func:`hidden_beside` makes for *path* begin."""
    return f".{path.name}.cairn-"


def write_whole(path: Path, text: str) -> None:
    """Replace the content of *path*: after a crash it is the old one or the new one, never a part."""
    temporary = hidden_beside(path)
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
