"""One capture buffer: a memfd that this rank writes tensors into and the daemon reads.

Writing to a fresh page costs eight times as much as writing to a warm one, so a segment and its mapping live as long as
they can and are filled with pages before they are needed. All space is reserved before a segment is used: a machine out
of memory is an error here, not a SIGBUS in the middle of a copy.

Where the operator allows huge pages for shared memory (``advise`` in
``/sys/kernel/mm/transparent_hugepage/shmem_enabled``), segments consist of them. A GiB is then ready in 0.05 s of CPU
time instead of 0.5, and the daemon's mapping of it in 0.001 s instead of 0.2.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import uuid
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cairn_api.errors import ConfigurationError, InternalError, OverloadedError
from cairn_api.wire import SEGMENT_ALIGNMENT_BYTES

if TYPE_CHECKING:
    import torch

_MADV_DONTFORK = 10
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14; older kernels say EINVAL and the first copy pays for the pages instead
_F_SEAL_FUTURE_WRITE = 0x0010  # not in Python's fcntl module before 3.13
_SHMEM_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_POPULATE_STEP_BYTES = 4 * 1024 * 1024
"""1 ms. As long as a step takes, the training cannot map or unmap memory: steps of 256 MiB held it up for 150 ms."""
_PROTECT_UP_TO_PAGES = 8192
"""0.5 ms: 32 MiB of small pages, 16 GiB of huge ones. Each small page of a segment costs 65 ns to protect."""
_OUT_OF_MEMORY = frozenset({errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = _libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class NoSharedMemoryError(ConfigurationError):
    """This system cannot make shared buffers at all (an old kernel, or a sandbox that forbids them)."""


class Segment:
    """See the module. Between :meth:`protect` and :meth:`unprotect` this process cannot write to it by accident, unless
    it has so many pages that a save would be much slower for it."""

    def __init__(self, name: str, fd: int, size_bytes: int) -> None:
        self.name = name
        self.fd = fd
        self.size_bytes = size_bytes
        self._map = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._image: torch.Tensor | None = None
        self._page_count = -(-size_bytes // mmap.PAGESIZE)
        self.before_close: Callable[[], None] | None = None
        """Undoes what was done to the mapping from outside, such as a registration with CUDA."""
        self._libc_call("madvise", self._address, size_bytes, _MADV_DONTFORK)
        _libc.madvise(self._address, size_bytes, _MADV_HUGEPAGE)  # a kernel built without them says EINVAL
        _SEGMENTS.add(self)

    @classmethod
    def create(cls, size_bytes: int) -> Segment:
        """A new segment of *size_bytes* (a multiple of the page size), with all its memory reserved.

        Raises :class:`OverloadedError` when the machine has not that much memory left or this process no descriptor,
        and :class:`NoSharedMemoryError`.
        """
        try:
            free_bytes = free_memory_bytes()
            if size_bytes > free_bytes:
                # Without this check the kernel would rather kill a process than refuse the pages.
                raise _no_memory(size_bytes, f"{free_bytes} bytes are free")
            fd = os.memfd_create("cairn-capture", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise OverloadedError(
                    f"a capture buffer of {size_bytes} bytes cannot be made: {error.strerror}",
                    hint="raise the trainer's limit of open files (ulimit -n)",
                    context={"size_bytes": size_bytes},
                ) from error
            raise NoSharedMemoryError(
                f"this system cannot make a memfd: {error.strerror}", hint='set transport = "stream"'
            ) from error
        segment: Segment | None = None
        try:
            os.ftruncate(fd, size_bytes)
            segment = cls(uuid.uuid4().hex, fd, size_bytes)
            if _huge_pages_by_advice():
                segment.populate()  # the advice is the mapping's: what fallocate takes would be small pages
            os.posix_fallocate(fd, 0, size_bytes)
            return segment
        except BaseException as error:
            if segment is None:
                os.close(fd)
            else:
                segment.close()
            if not isinstance(error, OSError):
                raise
            if error.errno in _OUT_OF_MEMORY:
                raise _no_memory(size_bytes, str(error.strerror)) from error
            raise NoSharedMemoryError(
                f"this system cannot share memory: {error.strerror}", hint='set transport = "stream"'
            ) from error

    @property
    def memory(self) -> ctypes.Array[ctypes.c_char]:
        """All of it, for those who need to know where it is mapped; it stays mapped as long as they keep this."""
        return (ctypes.c_char * self.size_bytes).from_buffer(self._map)

    @property
    def image(self) -> torch.Tensor:
        """All of the segment as a uint8 tensor of shape (size_bytes,); writable between unprotect and protect."""
        if self._image is None:
            import torch  # noqa: PLC0415 - a client that only lists versions needs no torch

            self._image = torch.frombuffer(self._map, dtype=torch.uint8)
        return self._image

    def populate(self) -> None:
        """Map all pages now, in steps without the GIL, so that the next copy runs at the speed of a warm buffer."""
        faults_before = _faults_of_this_thread()
        for start in range(0, self.size_bytes, _POPULATE_STEP_BYTES):
            length = min(_POPULATE_STEP_BYTES, self.size_bytes - start)
            if _libc.madvise(self._address + start, length, _MADV_POPULATE_WRITE):
                code = ctypes.get_errno()
                if code == errno.EINVAL:
                    return
                raise _no_memory(self.size_bytes, os.strerror(code))
        # One fault maps one page, so this tells small pages from huge ones; nothing is left to map the second time.
        if faults := _faults_of_this_thread() - faults_before:
            self._page_count = min(self._page_count, faults)

    def protect(self) -> None:
        """Make this process's mapping read-only, if that is cheap: from here the bytes belong to the daemon."""
        if self._page_count <= _PROTECT_UP_TO_PAGES:
            self._libc_call("mprotect", self._address, self.size_bytes, mmap.PROT_READ)

    def unprotect(self) -> None:
        """Make this process's mapping writable again."""
        if self._page_count <= _PROTECT_UP_TO_PAGES:
            self._libc_call("mprotect", self._address, self.size_bytes, mmap.PROT_READ | mmap.PROT_WRITE)

    @property
    def sealed(self) -> bool:
        """Whether a daemon has sealed it, after which no further process can map it for writing."""
        return bool(fcntl.fcntl(self.fd, fcntl.F_GET_SEALS) & _F_SEAL_FUTURE_WRITE)

    def duplicate(self) -> Segment:
        """A copy with the same name and no seals: what a restarted daemon is offered, as it has to map it itself."""
        copy = Segment.create(self.size_bytes)
        ctypes.memmove(copy._address, self._address, self.size_bytes)  # noqa: SLF001 - of the same class
        copy.name = self.name
        copy.protect()
        return copy

    def windows(self, size_bytes: int, window_bytes: int) -> Iterator[memoryview]:
        """The first *size_bytes* in order, in read-only views of *window_bytes*."""
        for start in range(0, size_bytes, window_bytes):
            with memoryview(self._map)[start : min(start + window_bytes, size_bytes)].toreadonly() as window:
                yield window

    def close(self) -> None:
        """Let go of it. The memory itself lives on until the daemon has let go too."""
        _SEGMENTS.discard(self)
        if self.fd >= 0:
            if self.before_close is not None:
                self.before_close()
                self.before_close = None
            self._image = None
            del self._map  # unmaps, and closes the descriptor's duplicate that Python's mmap keeps
            os.close(self.fd)
            self.fd = -1

    def _libc_call(self, name: str, address: int, size_bytes: int, argument: int) -> None:
        if getattr(_libc, name)(address, size_bytes, argument):
            reason = os.strerror(ctypes.get_errno())
            raise InternalError(f"{name} of a capture buffer failed: {reason}", hint='set transport = "stream"')


def _huge_pages_by_advice() -> bool:
    try:
        return "[advise]" in _SHMEM_HUGE_PAGES.read_text()
    except OSError:  # a kernel without them
        return False


def _faults_of_this_thread() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def segment_bytes(size_bytes: int) -> int:
    """The size of the segment for a partition of *size_bytes*: rounded up so that huge pages can back it."""
    return max(1, -(-size_bytes // SEGMENT_ALIGNMENT_BYTES)) * SEGMENT_ALIGNMENT_BYTES


def free_memory_bytes() -> int:
    """What the kernel would still give without swapping: of the machine, and of its own cgroup if that is less."""
    free = [_meminfo_available_bytes()]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            free += _cgroup_free_bytes(Path("/sys/fs/cgroup"), path, _CGROUP_V2)
        elif "memory" in controllers.split(","):
            free += _cgroup_free_bytes(Path("/sys/fs/cgroup/memory"), path, _CGROUP_V1)
    return min(free)


def _meminfo_available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise InternalError("/proc/meminfo has no MemAvailable", hint='set transport = "stream"')


# The files of a cgroup's limit and use in bytes, and the keys of memory.stat whose bytes the kernel gives up first.
_CGROUP_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def _cgroup_free_bytes(root: Path, path: str, files: tuple[str, str, tuple[str, ...]]) -> list[int]:
    limit_file, used_file, cache_keys = files
    folder = root / path.lstrip("/")
    if not folder.is_dir():  # in a container that sees its own cgroup as the root, and the path of the host's
        folder = root
    try:
        limit = (folder / limit_file).read_text().strip()
        if limit == "max":
            return []
        used_bytes = int((folder / used_file).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # no memory controller here, or a root cgroup, which has no limit
        return []
    return [max(0, int(limit) - used_bytes + sum(int(stat.get(key, 0)) for key in cache_keys))]


def _no_memory(size_bytes: int, reason: str) -> OverloadedError:
    return OverloadedError(
        f"a capture buffer of {size_bytes} bytes does not fit into memory ({reason})",
        hint="lower `buffers`, or give the trainer more memory",
        context={"size_bytes": size_bytes},
    )


_SEGMENTS: weakref.WeakSet[Segment] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # The mapping is not inherited (MADV_DONTFORK); the descriptor must not keep the memory alive in a data loader.
    for segment in list(_SEGMENTS):
        segment.before_close = None  # the parent's: this process has no mapping to undo anything of, and no CUDA
        segment.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
