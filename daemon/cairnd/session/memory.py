"""Capture memory: a budget in bytes, and the shared buffers ("segments") that were granted from it.

The daemon grants bytes *before* a rank creates the buffer and counts them until the last use here ends. A segment is a
memfd that both sides map: the rank writes tensors into it, the daemon fills zip checksums and writes it out. While a
version lives in a segment, the segment is that version's copy in the memory tier.

The seals SHRINK | GROW | FUTURE_WRITE | SEAL are set here, after both mappings exist: nothing can shrink the buffer
under a reader, and no third writable mapping can appear. What remains is that a hostile owner corrupts its own data.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import re
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import InitVar, dataclass, field

from cairn_api.errors import ConfigurationError, OverloadedError
from cairn_api.names import VersionId
from cairn_api.wire import PAGE_BYTES
from cairnd.metrics import Metrics
from cairnd.records import RecordTable

F_SEAL_FUTURE_WRITE = 0x0010
"""linux/fcntl.h; not in Python's fcntl module before 3.13."""

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE
_MAX_BUFFERS_PER_CLIENT = 4096
_NAME = re.compile(r"[0-9a-f]{32}")

log = logging.getLogger("cairnd")


@dataclass(slots=True, eq=False)
class Segment:
    """One shared buffer. ``owner``: the version whose bytes it holds; ``client``: who may refill it."""

    name: str
    fd: int
    memory: mmap.mmap
    size_bytes: int
    uid: int
    client: int | None
    job: str
    owner: tuple[str, VersionId] | None = None
    partition: tuple[int, str] | None = None
    readers: int = 0
    records: RecordTable | None = None
    """The last one that was valid here. Most saves lay their bytes out as the one before did."""

    def view(self, size_bytes: int) -> memoryview:
        """The first *size_bytes* as a writable view; release it before the segment is closed."""
        return memoryview(self.memory)[:size_bytes]


@dataclass(slots=True)
class _Grant:
    client: int
    job: str
    size_bytes: int


@dataclass(slots=True)
class CaptureMemory:
    """The budget and all segments. Used from the event loop's thread. ``pools`` makes a pool of threads with a name."""

    limit_bytes: int
    metrics: Metrics
    pools: InitVar[Callable[[int, str], Executor]] = ThreadPoolExecutor
    granted_bytes: int = 0
    segments: dict[str, Segment] = field(default_factory=dict)
    _grants: dict[str, _Grant] = field(default_factory=dict)
    _unmapper: Executor = field(init=False)

    def __post_init__(self, pools: Callable[[int, str], Executor]) -> None:
        self._unmapper = pools(1, "cairnd-unmap")
        self.metrics.memory_limit_bytes.set(self.limit_bytes)

    @property
    def free_bytes(self) -> int:
        """What could still be granted without taking anything back."""
        return self.limit_bytes - self.granted_bytes

    def grant(self, client: int, job: str, size_bytes: int) -> str:
        """Reserve *size_bytes* for *client* and return the name of the grant.

        Copies that dead clients left behind are given up first, oldest first. Raises :class:`OverloadedError` with
        the sizes when the budget does not hold it.
        """
        if size_bytes <= 0 or size_bytes % PAGE_BYTES:
            raise ConfigurationError(f"a capture buffer of {size_bytes} bytes is not a multiple of {PAGE_BYTES}")
        granted = sum(1 for item in self._grants.values() if item.client == client)
        if granted + len(self.of_client(client)) >= _MAX_BUFFERS_PER_CLIENT:
            raise OverloadedError("too many capture buffers", hint="restart the trainer, or save fewer, larger files")
        if size_bytes > self.free_bytes:
            raise OverloadedError(
                f"a capture buffer of {size_bytes} bytes does not fit: {self.granted_bytes} of {self.limit_bytes} "
                "bytes of capture memory are in use",
                hint="raise the daemon's capture_memory_bytes, or lower the client's `buffers`",
                context={"job": job, "size_bytes": size_bytes, "free_bytes": self.free_bytes},
            )
        name = secrets.token_hex(16)
        self._grants[name] = _Grant(client, job, size_bytes)
        self._count(size_bytes)
        return name

    def accept(self, client: int, uid: int, grant: str, name: str, fd: int, size_bytes: int) -> Segment:
        """Take in the buffer behind *fd* (which is then owned here) for a grant; maps and seals it.

        Raises :class:`ConfigurationError` when the descriptor is not a memfd of exactly the granted size; it then stays
        the caller's.
        """
        granted = self._grants.get(grant)
        if granted is None or granted.client != client:
            raise ConfigurationError("this capture buffer was not granted", hint="ask for a grant before offering it")
        if not _NAME.fullmatch(name):
            raise ConfigurationError(
                "a capture buffer's name has 32 hexadecimal digits", hint="name it by a random UUID"
            )
        if name in self.segments:
            raise ConfigurationError(f"a capture buffer named {name!r} exists", hint="use a new random name")
        try:
            # First of all: only memory has seals, and a file of FUSE or NFS would keep fstat waiting for its server.
            fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise ConfigurationError(
                f"the capture buffer is no memfd: {error}", hint="offer a memfd made with MFD_ALLOW_SEALING"
            ) from error
        if size_bytes != granted.size_bytes or os.fstat(fd).st_size != size_bytes:
            raise ConfigurationError(
                f"the capture buffer has {os.fstat(fd).st_size} bytes, {granted.size_bytes} were granted",
                hint="create the memfd with exactly the granted size",
            )
        try:
            memory = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise ConfigurationError(
                f"the capture buffer cannot be used: {error}", hint="offer a memfd made with MFD_ALLOW_SEALING"
            ) from error
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            memory.close()
            raise ConfigurationError(
                f"the capture buffer cannot be sealed: {error}",
                hint="create the memfd with MFD_ALLOW_SEALING and add no seals",
            ) from error
        # A fallocated memfd has all its pages; one that has not could fault in the middle of a write.
        if os.fstat(fd).st_blocks * 512 < size_bytes:
            memory.close()
            raise ConfigurationError(
                "the capture buffer has holes", hint="reserve all of it with posix_fallocate before offering it"
            )
        del self._grants[grant]
        segment = Segment(name, fd, memory, size_bytes, uid, client, granted.job)
        self.segments[name] = segment
        return segment

    def of_client(self, client: int) -> list[Segment]:
        """The segments that *client* offered, in the order in which it did."""
        return [segment for segment in self.segments.values() if segment.client == client]

    def of_version(self, job: str, version: VersionId) -> list[Segment]:
        """The segments that hold bytes of a version."""
        return [segment for segment in self.segments.values() if segment.owner == (job, version)]

    def orphans(self) -> Iterator[Segment]:
        """Segments whose client is gone, oldest first."""
        return iter([segment for segment in self.segments.values() if segment.client is None])

    def release(self, segment: Segment) -> None:
        """Give a segment's bytes back, and unmap and close it on a thread: that takes seconds for tens of GiB.

        The bytes count as free at once: whoever releases does so to have something else granted, and the kernel is
        given the pages back faster than the next buffer is filled with new ones. A machine that has less memory than it
        granted meanwhile is found out by the rank, which asks the kernel before it makes a buffer.
        """
        if self.segments.pop(segment.name, None) is None:
            return
        self._count(-segment.size_bytes)
        self._unmapper.submit(_unmap, segment)

    def wait_unmapped(self) -> None:
        """Block until all that was released is unmapped and closed."""
        self._unmapper.submit(lambda: None).result()

    def drop_grants(self, client: int) -> None:
        """Give back what *client* was granted and never used."""
        for name in [name for name, grant in self._grants.items() if grant.client == client]:
            self._count(-self._grants.pop(name).size_bytes)

    def drop_grant(self, client: int, name: str) -> None:
        """Give back one grant that *client* cannot use; does nothing if it has none of that name."""
        grant = self._grants.get(name)
        if grant is not None and grant.client == client:
            self._count(-self._grants.pop(name).size_bytes)

    def _count(self, size_bytes: int) -> None:
        self.granted_bytes += size_bytes
        self.metrics.memory_granted_bytes.set(self.granted_bytes)


def _unmap(segment: Segment) -> None:
    try:
        with suppress(BufferError):  # an error that is being reported holds a view: unmapped when that is gone
            segment.memory.close()
        os.close(segment.fd)
    except OSError:  # nobody awaits this
        log.exception("capture buffer %s could not be closed", segment.name)
