"""Capture buffers on real memory."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
    big = Segment.create(256 << 20)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        start = time.perf_counter()
        big.populate()
        end = time.perf_counter()
    finally:
        stop.set()
        thread.join()
        big.close()
    assert sum(start < moment < end for moment in ticks) >= 3, f"no other thread ran in {end - start:.3f} s"


def _target(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except FileNotFoundError:  # the descriptor with which the folder was read
        return ""
