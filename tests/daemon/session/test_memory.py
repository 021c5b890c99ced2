"""Capture memory with real memfds: what is granted, what is accepted, what the seals forbid."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
import threading
import uuid
from collections.abc import Iterator

import pytest

from cairn_api.errors import ConfigurationError, OverloadedError
from cairnd.metrics import Metrics
from cairnd.session.memory import CaptureMemory, Segment
from tests.daemon.lab import memfd

PAGE = 4096
LIMIT = 16 * PAGE
ME, OTHER = 1, 2


@pytest.fixture
def memory() -> Iterator[CaptureMemory]:
    memory = CaptureMemory(LIMIT, Metrics())
    yield memory
    for segment in list(memory.segments.values()):
        memory.release(segment)


def accept(
    memory: CaptureMemory, fd: int, *, grant: str, size: int = PAGE, client: int = ME, name: str | None = None
) -> Segment:
    """Offer *fd* as the side socket does: what is refused stays the caller's and is closed."""
    try:
        return memory.accept(client, 0, grant, name or uuid.uuid4().hex, fd, size)
    except BaseException:
        os.close(fd)
        raise


def test_grants_are_counted_until_they_are_given_back(memory: CaptureMemory) -> None:
    memory.grant(ME, "job", 6 * PAGE)
    segment = accept(memory, memfd(), grant=memory.grant(ME, "job", PAGE))
    assert memory.free_bytes == LIMIT - 7 * PAGE
    with pytest.raises(OverloadedError) as caught:
        memory.grant(OTHER, "job", 10 * PAGE)
    assert str(10 * PAGE) in caught.value.message
    assert str(LIMIT) in caught.value.message
    assert "capture_memory_bytes" in caught.value.hint
    memory.drop_grants(ME)
    assert memory.free_bytes == LIMIT - PAGE  # the accepted buffer is no longer a grant
    memory.release(segment)
    memory.release(segment)
    assert memory.free_bytes == LIMIT


@pytest.mark.parametrize("size_bytes", [0, -PAGE, 1, PAGE + 1])
def test_odd_sizes_are_not_granted(memory: CaptureMemory, size_bytes: int) -> None:
    with pytest.raises(ConfigurationError):
        memory.grant(ME, "job", size_bytes)


def test_one_client_cannot_use_up_the_buffers_of_all(memory: CaptureMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cairnd.session.memory._MAX_BUFFERS_PER_CLIENT", 3)
    for _ in range(3):
        memory.grant(ME, "job", PAGE)
    with pytest.raises(OverloadedError, match="too many"):
        memory.grant(ME, "job", PAGE)
    memory.grant(OTHER, "job", PAGE)


def test_a_grant_is_used_once_and_by_its_client(memory: CaptureMemory) -> None:
    grant = memory.grant(ME, "job", PAGE)
    with pytest.raises(ConfigurationError, match="not granted"):
        accept(memory, memfd(), grant=grant, client=OTHER)
    accept(memory, memfd(), grant=grant)
    with pytest.raises(ConfigurationError, match="not granted"):
        accept(memory, memfd(), grant=grant)
    with pytest.raises(ConfigurationError, match="not granted"):
        accept(memory, memfd(), grant="made-up")


def test_a_name_is_used_once(memory: CaptureMemory) -> None:
    name = uuid.uuid4().hex
    accept(memory, memfd(), grant=memory.grant(ME, "job", PAGE), name=name)
    grant = memory.grant(ME, "job", PAGE)
    with pytest.raises(ConfigurationError, match="exists"):
        accept(memory, memfd(), grant=grant, name=name)
    accept(memory, memfd(), grant=grant)  # the refusal did not use it up


@pytest.mark.parametrize("name", ["", "x", "\ud800", "../../etc", "A" * 32])
def test_names_are_checked(memory: CaptureMemory, name: str) -> None:
    with pytest.raises(ConfigurationError):
        memory.accept(ME, 0, memory.grant(ME, "job", PAGE), name, 0, PAGE)


@pytest.mark.parametrize(("offered", "said"), [(2 * PAGE, 2 * PAGE), (PAGE, 2 * PAGE), (2 * PAGE, PAGE)])
def test_a_buffer_of_another_size_is_refused(memory: CaptureMemory, offered: int, said: int) -> None:
    grant = memory.grant(ME, "job", PAGE)
    with pytest.raises(ConfigurationError, match="granted"):
        accept(memory, memfd(size_bytes=offered), grant=grant, size=said)


def test_holes_are_refused(memory: CaptureMemory) -> None:
    fd = os.memfd_create("holes", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4 * PAGE)
    os.posix_fallocate(fd, 0, PAGE)
    with pytest.raises(ConfigurationError, match="holes"):
        accept(memory, fd, grant=memory.grant(ME, "job", 4 * PAGE), size=4 * PAGE)


def unsealable() -> int:
    fd = os.memfd_create("plain", 0)
    os.posix_fallocate(fd, 0, PAGE)
    return fd


def sealed_before() -> int:
    fd = memfd()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    return fd


def write_sealed() -> int:
    fd = memfd()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return fd


def disk_file() -> int:
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        file.write(bytes(PAGE))
        file.flush()
        return os.dup(file.fileno())


def folder() -> int:
    return os.open("/", os.O_RDONLY)


def pipe_end() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def read_only() -> int:
    fd = memfd()
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "make",
    [unsealable, sealed_before, write_sealed, disk_file, folder, pipe_end, read_only],
    ids=lambda make: make.__name__,
)
def test_what_is_no_fresh_memfd_is_refused(memory: CaptureMemory, make: object) -> None:
    assert callable(make)
    with pytest.raises(ConfigurationError):
        accept(memory, make(), grant=memory.grant(ME, "job", PAGE))
    assert memory.segments == {}


def test_after_acceptance_nobody_else_can_write_or_shrink(memory: CaptureMemory) -> None:
    fd = memfd(b"before")
    theirs = mmap.mmap(fd, PAGE)  # mapped before the offer, as a client does
    mine = os.dup(fd)
    segment = accept(memory, fd, grant=memory.grant(ME, "job", PAGE))
    try:
        theirs[:6] = b"after!"  # the two mappings that exist go on working
        with segment.view(6) as view:
            assert bytes(view) == b"after!"
            view[0:1] = b"A"
        assert theirs[:1] == b"A"
        with pytest.raises(PermissionError):
            mmap.mmap(mine, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        for act in (
            lambda: os.pwrite(mine, b"x", 0),
            lambda: os.ftruncate(mine, 0),
            lambda: os.ftruncate(mine, 2 * PAGE),
            lambda: fcntl.fcntl(mine, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        ):
            with pytest.raises(OSError, match="not permitted") as caught:
                act()
            assert caught.value.errno == errno.EPERM
        again = os.open(f"/proc/self/fd/{mine}", os.O_RDWR)  # a new description does not help either
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", 0)
        os.close(again)
    finally:
        theirs.close()
        os.close(mine)


def test_a_file_is_refused_before_its_server_could_be_asked(
    memory: CaptureMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    grant, fd = memory.grant(ME, "job", PAGE), pipe_end()
    asked, fstat = list[int](), os.fstat

    def noted(fd: int) -> os.stat_result:
        asked.append(fd)
        return fstat(fd)

    monkeypatch.setattr(os, "fstat", noted)
    with pytest.raises(ConfigurationError, match="no memfd"):
        accept(memory, fd, grant=grant)
    assert fd not in asked, "a file system in user space may never answer this"


def test_a_released_buffer_is_unmapped_on_another_thread(memory: CaptureMemory) -> None:
    segment = accept(memory, memfd(), grant=memory.grant(ME, "job", PAGE))
    busy = threading.Event()
    memory._unmapper.submit(busy.wait)
    memory.release(segment)
    assert memory.free_bytes == LIMIT, "the next grant does not wait"
    assert os.fstat(segment.fd).st_size == PAGE
    busy.set()
    memory.wait_unmapped()
    assert segment.memory.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(segment.fd)
