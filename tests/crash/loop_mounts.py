"""File systems on images in memory, mounted nowhere: made for mounting thousands of images, one after the other.

An image is a memfd behind a loop device, and the mount is a descriptor that no folder leads to (fsopen, fsmount), used
through ``/proc``. The kernel takes all of it back when the process ends, however it ends.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Numbers from linux/loop.h, linux/fs.h and linux/mount.h; the system calls have the same ones on every architecture
# that Cairn runs on.
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_AUTOCLEAR = 4
_LOOP_CONFIG_BYTES = 304
_LOOP_FLAGS_OFFSET = 60
_BLKFLSBUF = 0x1261
_FS_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6

_OPTIONS = {"ext4": (), "xfs": ("nouuid",)}
"""nouuid: two processes mount images with the same name."""

_MOST_ATTEMPTS = 50


class MemoryImage:
    """A sparse image of *size_bytes* in memory. ``fd`` is its file; closed with :meth:`close` or with the process."""

    def __init__(self, name: str, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size_bytes)

    def load(self, path: Path) -> None:
        """Take over the data of the sparse file *path*, with its holes."""
        with path.open("rb") as file:
            for start, stop in extents(file.fileno()):
                os.pwrite(self.fd, os.pread(file.fileno(), stop - start, start), start)

    def make_like(self, other: MemoryImage) -> None:
        """Become equal to *other*, of the same size."""
        for start, stop in extents(self.fd):
            os.pwrite(self.fd, os.pread(other.fd, stop - start, start), start)
        for start, stop in extents(other.fd):
            os.pwrite(self.fd, os.pread(other.fd, stop - start, start), start)

    def close(self) -> None:
        """Give the memory back, once no loop device uses it."""
        os.close(self.fd)


def extents(fd: int) -> Iterator[tuple[int, int]]:
    """The ranges of a sparse file that hold data, as (start, stop)."""
    stop = 0
    while True:
        try:
            start = os.lseek(fd, stop, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        stop = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, stop


class LoopDevice:
    """A loop device on *image*; it goes with :meth:`close` or with the process."""

    def __init__(self, image: MemoryImage) -> None:
        for _ in range(_MOST_ATTEMPTS):
            with _opened("/dev/loop-control", os.O_RDWR) as control:
                self.path = Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
            config = bytearray(_LOOP_CONFIG_BYTES)
            struct.pack_into("<I", config, 0, image.fd)
            # struct loop_config: fd, block size, struct loop_info64, whose flags come after 52 bytes
            struct.pack_into("<I", config, _LOOP_FLAGS_OFFSET, _LO_FLAGS_AUTOCLEAR)
            with _opened(self.path, os.O_RDWR) as device:
                try:
                    fcntl.ioctl(device, _LOOP_CONFIGURE, bytes(config))
                except OSError as error:
                    if error.errno != errno.EBUSY:  # somebody else was faster
                        raise
                    continue
                # Kept for reading only: the kernel may refuse to mount what somebody else has open for writing.
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                return
        raise OSError(errno.EBUSY, "no free loop device")

    def forget_cache(self) -> None:
        """Drop what the kernel has cached of the device, after its image was changed from below."""
        fcntl.ioctl(self._fd, _BLKFLSBUF, 0)

    def close(self) -> None:
        """Give the device back."""
        os.close(self._fd)


@contextmanager
def mounted(device: LoopDevice, kind: str) -> Iterator[Path]:
    """The root of the file system of *kind* on *device*, with its journal replayed.

    What is written there is given up at the end: nothing is flushed. Raises ``OSError`` for what cannot be mounted.
    """
    device.forget_cache()
    context = _call(_FSOPEN, kind.encode(), _CLOEXEC)
    try:
        _call(_FSCONFIG, context, _SET_STRING, b"source", str(device.path).encode(), 0)
        for option in _OPTIONS[kind]:
            _call(_FSCONFIG, context, _SET_FLAG, option.encode(), None, 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        mount = _call(_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        root = Path(f"/proc/{os.getpid()}/fd/{mount}")  # not "self": other processes may be given the path
        yield root
        with _opened(root, os.O_RDONLY | os.O_DIRECTORY) as folder:
            fcntl.ioctl(folder, _FS_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
    finally:
        os.close(mount)


@contextmanager
def _opened(path: str | Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _call(number: int, *arguments: int | bytes | None) -> int:
    result = int(_LIBC.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


_LIBC = ctypes.CDLL(None, use_errno=True)
