"""Capture buffers on real memory."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cairn.transport import shared_memory
from cairn.transport.shared_memory import NoSharedMemoryError, Segment, free_memory_bytes, segment_bytes
from cairn_api.errors import OverloadedError

SIZE_BYTES = 4 * 1024 * 1024


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create(SIZE_BYTES)
    yield made
    made.close()


@pytest.mark.parametrize(("size_bytes", "expected"), [(0, 1), (1, 1), (2 << 20, 1), ((2 << 20) + 1, 2)])
def test_sizes_are_whole_huge_pages(size_bytes: int, expected: int) -> None:
    assert segment_bytes(size_bytes) == expected * 2 * 1024 * 1024


def test_what_is_written_is_in_the_memfd(segment: Segment) -> None:
    segment.populate()
    segment.image[:3] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    segment.protect()
    assert os.pread(segment.fd, 4, 0) == b"\1\2\3\0"
    assert os.fstat(segment.fd).st_blocks * 512 >= SIZE_BYTES, "all memory is reserved"


def test_a_protected_segment_cannot_be_written_to_by_accident() -> None:
    script = """
from cairn.transport.shared_memory import Segment
segment = Segment.create(4096)
image = segment.image
image[0] = 1
segment.protect()
assert image[0] == 1
segment.unprotect()
image[0] = 2
segment.protect()
print("still here", flush=True)
image[0] = 3
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "still here\n")


def test_only_few_pages_are_protected_because_a_save_would_wait_for_many(segment: Segment) -> None:
    large = Segment.create(64 << 20)
    try:
        for each in (segment, large):
            each.populate()
            each.protect()
        assert _permissions(segment) == "r--s"
        assert _permissions(large) == ("r--s" if _mapped_by_huge_pages(large) else "rw-s")
        segment.unprotect()
        assert _permissions(segment) == "rw-s"
    finally:
        large.close()


def test_populating_again_does_not_change_what_is_protected() -> None:
    large = Segment.create(64 << 20)
    try:
        large.populate()
        large.protect()
        before = _permissions(large)
        large.unprotect()
        large.populate()
        large.protect()
        assert _permissions(large) == before
    finally:
        large.close()


def test_where_huge_pages_need_advice_all_memory_is_reserved_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = tmp_path / "shmem_enabled"
    setting.write_text("always within_size [advise] never deny force\n")
    monkeypatch.setattr(shared_memory, "_SHMEM_HUGE_PAGES", setting)
    advised = Segment.create(SIZE_BYTES)
    try:
        assert os.fstat(advised.fd).st_blocks * 512 >= SIZE_BYTES
        assert _resident_bytes(advised) == SIZE_BYTES, "mapped before it was reserved, or its pages would be small"
    finally:
        advised.close()


def test_a_machine_without_room_is_an_error_before_anything_is_reserved() -> None:
    with pytest.raises(OverloadedError, match="does not fit into memory"):
        Segment.create((free_memory_bytes() // 4096 + 1_000_000) * 4096)


def test_full_shared_memory_is_an_error_and_leaves_no_descriptor() -> None:
    # A limit on file size is the way to a refused fallocate that needs no privilege.
    script = f"""
import os, resource, signal
from cairn.transport.shared_memory import Segment
from cairn_api.errors import OverloadedError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, {resource.RLIM_INFINITY}))
before = os.listdir("/proc/self/fd")
try:
    Segment.create(4 << 20)
except OverloadedError as error:
    assert os.listdir("/proc/self/fd") == before
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("refused\n", "")


def test_a_system_without_memfd_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(NoSharedMemoryError, match="Function not implemented"):
        Segment.create(4096)


def test_a_sealed_segment_is_duplicated_with_its_bytes_and_its_name(segment: Segment) -> None:
    segment.image.fill_(7)
    before = segment.sealed
    fcntl.fcntl(segment.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x0010)
    assert (before, segment.sealed) == (False, True)
    copy = segment.duplicate()
    try:
        assert (copy.name, copy.sealed) == (segment.name, False)
        assert torch.equal(copy.image, segment.image)
        segment.image[0] = 8
        assert copy.image[0] == 7
    finally:
        copy.close()


def test_a_forked_child_holds_neither_mapping_nor_descriptor(segment: Segment) -> None:
    reader, writer = os.pipe()
    fd = segment.fd

    def unregister() -> None:
        raise RuntimeError("the GPU's driver does not survive a fork")

    segment.before_close = unregister
    pid = os.fork()
    if pid == 0:
        held = [entry.name for entry in Path("/proc/self/fd").iterdir() if _target(entry).startswith("/memfd:cairn")]
        mapped = "cairn-capture" in Path("/proc/self/maps").read_text()
        os.write(writer, f"{held} {mapped}".encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    assert os.read(reader, 100) == b"[] False"
    os.close(reader)
    assert os.fstat(fd).st_size == SIZE_BYTES, "the parent's stays open"
    assert segment.before_close is unregister
    segment.before_close = None


def test_populating_does_not_hold_the_interpreter() -> None:
    usual_s = sys.getswitchinterval() + 0.5e-6  # Python cuts it down to whole microseconds
    seen: list[str] = []

    def look(begun: threading.Event, ended: threading.Event) -> None:
        begun.wait()
        seen.append("after" if ended.is_set() else "meanwhile")

    for _ in range(10):  # where all cores are busy the other thread may come too late: once in time is proof
        begun, ended = threading.Event(), threading.Event()
        other = threading.Thread(target=look, args=(begun, ended))
        big = Segment.create(256 << 20)
        sys.setswitchinterval(3600)  # nobody is interrupted: the other thread runs only where this one lets it
        try:
            other.start()
            begun.set()
            big.populate()
            ended.set()
        finally:
            sys.setswitchinterval(usual_s)
            begun.set()
            other.join()
            big.close()
        if seen[-1] == "meanwhile":
            break
    assert seen[-1] == "meanwhile", seen


def _mapping(segment: Segment) -> list[str]:
    """The lines of this segment in /proc/self/smaps."""
    inode = str(os.fstat(segment.fd).st_ino)
    lines = Path("/proc/self/smaps").read_text().splitlines()
    (start,) = [number for number, line in enumerate(lines) if "cairn-capture" in line and inode in line.split()]
    return lines[start : start + 24]


def _permissions(segment: Segment) -> str:
    return _mapping(segment)[0].split()[1]


def _kib(segment: Segment, key: str) -> int:
    return next(int(line.split()[1]) for line in _mapping(segment) if line.startswith(f"{key}:"))


def _resident_bytes(segment: Segment) -> int:
    return _kib(segment, "Rss") * 1024


def _mapped_by_huge_pages(segment: Segment) -> bool:
    return _kib(segment, "ShmemPmdMapped") > 0


def _target(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except FileNotFoundError:  # the descriptor with which the folder was read
        return ""
