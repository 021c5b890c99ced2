"""A file system on a disk that writes down what it is told, and that fails once when asked to; needs root and FUSE."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.crash import block_log, faulty_daemon
from tests.crash.block_log import Record
from tests.crash.disks import Mount, need_disks

SIZE_BYTES = 160 * 1024 * 1024
"""The daemon keeps 64 MiB free; the rest is room for some versions."""

_MAKE = {
    # 4096: the block size of large disks. -m 0: no blocks set aside for root. -E: nothing is left to be written later,
    # in the background.
    "ext4": (
        "mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-J", "size=4",
        "-E", "lazy_itable_init=0,lazy_journal_init=0",
    ),
    # --unsupported: below 300 MiB. The small log is replayed in a sixth of the time, and comes round to its start.
    "xfs": ("mkfs.xfs", "-q", "-f", "--unsupported", "-l", "size=8m"),
}  # fmt: skip

EMPTY_NAME, LOG_NAME = "empty.img", "block.log"

_END_TIMEOUT_S = 5.0


class LoggedDisk(Mount):
    """A new file system of *kind* (``ext4`` or ``xfs``) below *folder*, on a loop device, on :mod:`block_log`.

    ``empty_path`` is what the disk was when its log began. Leaving the context unmounts, and ends the server.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        super().__init__(folder / "disk")
        self.kind = kind
        self.empty_path = folder / EMPTY_NAME
        self.log_path = folder / LOG_NAME
        self._image_path = folder / "disk.img"
        self._served_path = folder / "served"
        self._served_path.mkdir()
        with self._image_path.open("wb") as file:
            file.truncate(SIZE_BYTES)
        _command(*_MAKE[kind], self._image_path)
        _command("fallocate", "--dig-holes", self._image_path)
        _command("cp", "--sparse=always", self._image_path, self.empty_path)
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def diary_path(self) -> Path:
        """A file whose lines are ordered with the writes of the disk."""
        return self._served_path / block_log.DIARY

    def records(self) -> list[Record]:
        """What the disk was told so far."""
        return block_log.read_log(self.log_path)

    @property
    def control_path(self) -> Path:
        """Written to, it makes the disk fail once (see :mod:`block_log`)."""
        return self._served_path / block_log.CONTROL

    def mount(self) -> None:
        if self._server is None:
            self._serve()
        _command("mount", "-o", "loop", self._served_path / block_log.DISK, self.path)

    def mount_again(self) -> None:
        """Unmount and mount: what was in the page cache only is gone, and the journal is replayed."""
        self.unmount()
        self.mount()

    def _serve(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.block_log", self._served_path, self._image_path, self.log_path],
            env=faulty_daemon.environment(),
            stdout=subprocess.PIPE,
        )
        assert self._server.stdout is not None, "it was asked for"
        if self._server.stdout.readline() != b"ready\n":
            raise AssertionError(f"the block server ended with {self._server.wait()}")

    def _end_server(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        if str(self._served_path) in Path("/proc/self/mounts").read_text():
            _command("umount", "--lazy", self._served_path)
        # It ends with the last use of the disk. After a failed test that may not come: its end then makes that fail.
        with suppress(subprocess.TimeoutExpired):
            server.wait(_END_TIMEOUT_S)
        server.kill()
        server.communicate()

    def __enter__(self) -> Self:
        with ExitStack() as failing:
            failing.callback(self._end_server)
            self.mount()
            failing.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.path.is_mount():
                self.unmount()
            super().__exit__(kind, error, trace)
        finally:
            self._end_server()
            self._image_path.unlink()


def need_logged_disks(*kinds: str) -> None:
    """Skip the test, saying why, where disks with a log cannot be made."""
    need_disks(*kinds)
    if not Path("/dev/fuse").exists():
        pytest.skip("NOT PROVED HERE: the block log needs /dev/fuse; load the module fuse, or give it to the container")
    if shutil.which("fallocate") is None:
        pytest.skip("NOT PROVED HERE: fallocate is missing; install util-linux")


def _command(*words: object) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
