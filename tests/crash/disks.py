"""File systems of a test's own: an ext4 or xfs image that can lose power, a small tmpfs. All need root."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

# linux: _IOR('X', 125, __u32) and xfs' XFS_FSOP_GOING_FLAGS_NOLOGFLUSH, which ext4 took over under another name.
_FS_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2

_RELEASE_S = 10.0

_MAKE = {
    # -m 0: no blocks set aside for root, so that "full" means the same for every user.
    "ext4": ("mkfs.ext4", "-q", "-F", "-m", "0"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
}


class Mount:
    """A mounted file system at ``path``; a context manager that unmounts and leaves nothing behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)

    def mount(self) -> None:
        """Mount it (again)."""
        raise NotImplementedError

    def unmount(self) -> None:
        """Unmount it; fails when a process still uses it."""
        _command("umount", self.path)

    def remount(self, options: str) -> None:
        """Change its options while it is in use: ``ro``, ``rw``."""
        _command("mount", "-o", f"remount,{options}", self.path)

    def __enter__(self) -> Self:
        self.mount()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path.is_mount():
            # --lazy: after a failed test a process may still sit on it, and its kill comes later.
            _command("umount", "--lazy", self.path)


class LoopDisk(Mount):
    """A new file system of *kind* (``ext4`` or ``xfs``) in an image file below *folder*."""

    def __init__(self, folder: Path, kind: str, size_bytes: int) -> None:
        super().__init__(folder / "disk")
        self.image = folder / "disk.img"
        with self.image.open("wb") as file:
            file.truncate(size_bytes)
        _command(*_MAKE[kind], self.image)

    def mount(self) -> None:
        _command("mount", "-o", "loop", self.image, self.path)

    def cut_power(self) -> None:
        """Stop all writing at once, as a power cut would: what is not in the journal or on its place is lost."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _FS_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def power_on(self) -> None:
        """After a cut, with no process left on the disk: mount again, which replays the journal."""
        self.unmount()
        deadline_s = time.monotonic() + _RELEASE_S
        # What else holds it (a copy of the mount namespace) would have the dead file system mounted once more.
        while self._is_attached():
            if time.monotonic() > deadline_s:
                raise OSError(f"{self.image} is still in use: see `losetup -a`, and `grep {self.path} /proc/*/mounts`")
            time.sleep(0.005)
        self.mount()

    def _is_attached(self) -> bool:
        for path in Path("/sys/block").glob("loop*/loop/backing_file"):
            with suppress(FileNotFoundError):  # detached since it was listed
                if path.read_text().strip() == str(self.image):
                    return True
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.image.unlink()


class Tmpfs(Mount):
    """A file system in memory, bounded in bytes and in files."""

    def __init__(self, folder: Path, size_bytes: int, files: int) -> None:
        super().__init__(folder / "tmpfs")
        self._options = f"size={size_bytes},nr_inodes={files}"

    def mount(self) -> None:
        _command("mount", "-t", "tmpfs", "-o", self._options, "tmpfs", self.path)


def need_disks(*kinds: str) -> None:
    """Skip the test, saying why, where images of *kinds* cannot be made and mounted."""
    if os.geteuid() != 0:
        pytest.skip("NOT PROVED HERE: power cuts and full disks need root for loop devices; run as root")
    if not Path("/dev/loop-control").exists():
        pytest.skip("NOT PROVED HERE: power cuts and full disks need loop devices, and this kernel shows none")
    for kind in kinds:
        if shutil.which(_MAKE[kind][0]) is None:
            pytest.skip(f"NOT PROVED HERE: {_MAKE[kind][0]} is missing; install it (`make test-faults` does)")


def need_mounts() -> None:
    """Skip the test, saying why, where nothing can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("NOT PROVED HERE: a full file system needs root for mounting a small one; run as root")


def _command(*words: object) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
