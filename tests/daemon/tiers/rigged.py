"""A file system over the real one that records the order of calls and misbehaves on request."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from cairnd.tiers.filesystem import AnyPath, OsFileSystem


class RiggedFileSystem(OsFileSystem):
    """Records ``(call, name)`` and, before each call, asks *fault* whether to raise."""

    def __init__(self, root: Path, fault: Callable[[str, str], OSError | None] = lambda _call, _name: None) -> None:
        self.root = root
        self.fault = fault
        self.calls: list[tuple[str, str]] = []
        self.open_fds: dict[int, str] = {}
        self.longest_write_bytes = 1 << 40

    def names(self, call: str) -> list[str]:
        return [name for made, name in self.calls if made == call]

    def _note(self, call: str, target: AnyPath | int) -> None:
        name = self.open_fds.get(target, "?") if isinstance(target, int) else os.path.relpath(target, self.root)
        self.calls.append((call, name))
        error = self.fault(call, name)
        if error is not None:
            raise error

    def open(self, path: AnyPath, flags: int, mode: int = 0o600) -> int:
        self._note("open direct" if flags & os.O_DIRECT else "open", path)
        fd = super().open(path, flags, mode)
        self.open_fds[fd] = os.path.relpath(path, self.root)
        return fd

    def close(self, fd: int) -> None:
        name = self.open_fds.pop(fd)
        super().close(fd)
        self.calls.append(("close", name))

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self._note("pwrite", fd)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            # The kernel refuses odd lengths here, so all is written and only the answer is short.
            return min(super().pwrite(fd, data, offset), self.longest_write_bytes)
        return super().pwrite(fd, data[: self.longest_write_bytes], offset)

    def fallocate(self, fd: int, offset: int, size_bytes: int) -> None:
        self._note("fallocate", fd)
        super().fallocate(fd, offset, size_bytes)

    def ftruncate(self, fd: int, size_bytes: int) -> None:
        self._note("ftruncate", fd)
        super().ftruncate(fd, size_bytes)

    def fsync(self, fd: int) -> None:
        self._note("fsync", fd)
        super().fsync(fd)

    def fsync_folder(self, path: AnyPath) -> None:
        self._note("fsync_folder", path)
        super().fsync_folder(path)

    def rename(self, source: AnyPath, target: AnyPath) -> None:
        self._note("rename", target)
        super().rename(source, target)

    def link(self, source: AnyPath, target: AnyPath) -> None:
        self._note("link", target)
        super().link(source, target)

    def unlink(self, path: AnyPath) -> None:
        self._note("unlink", path)
        super().unlink(path)

    def mkdir(self, path: AnyPath, mode: int) -> None:
        self._note("mkdir", path)
        super().mkdir(path, mode)

    def rmdir(self, path: AnyPath) -> None:
        super().rmdir(path)  # refused when the folder is not empty, which changes nothing
        self._note("rmdir", path)


class NotesProtection(RiggedFileSystem):
    """Records what would be made immutable, without doing so: not every user may, and it would outlive the test."""

    def set_immutable(self, path: AnyPath, *, immutable: bool) -> bool:
        self._note("protect" if immutable else "unprotect", path)
        return True


def failing(call: str, code: int, *, nth: int = 1, name: str = "") -> Callable[[str, str], OSError | None]:
    """A fault that makes the *nth* such call (whose target's name ends with *name*) fail with *code*, once."""
    seen = 0

    def fault(made: str, target: str) -> OSError | None:
        nonlocal seen
        if made != call or not target.endswith(name):
            return None
        seen += 1
        return OSError(code, os.strerror(code)) if seen == nth else None

    return fault


def durability_gaps(calls: list[tuple[str, str]]) -> list[str]:
    """What a power cut after *calls* could lose, by the rules of :mod:`cairnd.tiers.atomic`.

    A file that was written must be synced before it is renamed or linked; every folder in which a name was made,
    renamed or removed must be synced afterwards.
    """
    gaps = []
    unsynced_files: set[str] = set()
    unsynced_folders: dict[str, str] = {}
    last_synced = ""
    for call, name in calls:
        folder = Path(name).parent.as_posix()
        if call in ("pwrite", "ftruncate"):
            unsynced_files.add(name)
        elif call == "fsync":
            unsynced_files.discard(name)
            last_synced = name
        elif call in ("rename", "link"):
            gaps += [f"{file} was published before it was synced" for file in sorted(unsynced_files)]
            if not last_synced:
                gaps.append(f"{name} was published and nothing was synced")
            unsynced_folders[folder] = name
        elif call in ("mkdir", "unlink", "rmdir"):
            unsynced_folders[folder] = name
        elif call == "fsync_folder":
            unsynced_folders.pop(name, None)
        if call == "rmdir":
            unsynced_folders.pop(name, None)
    return gaps + [f"{folder} was not synced after {name}" for folder, name in unsynced_folders.items()]
