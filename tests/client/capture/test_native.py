"""The copy library against plain memmove: every span pattern, every number of threads."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random

import pytest
from awscrt.checksums import crc64nvme
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.capture import native
from cairn_api.errors import InternalError

MIB = 1 << 20
GUARD = 0xA5

needs_library = pytest.mark.skipif(not native.available(), reason="the copy library was not built: no C compiler")

needs_digesting = pytest.mark.skipif(
    not native.can_digest(), reason="NOT PROVED HERE: this processor takes no checksums while it copies"
)


@dataclass
class Spans:
    """Spans between two blocks of memory, in any order, and what the target must hold after they are copied."""

    targets: array[int]
    sources: array[int]
    lengths: array[int]
    source: bytearray
    target: bytearray
    expected: bytearray

    @classmethod
    def make(cls, parts: list[tuple[int, int, int]], seed: int) -> Spans:
        """*parts* are lengths, each with the gap before it in the source and in the target, in bytes."""
        random = Random(seed)  # noqa: S311 - data of a test
        source_ends = list(accumulate(gap + length for length, gap, _ in parts))
        target_ends = list(accumulate(gap + length for length, _, gap in parts))
        source = bytearray(random.randbytes([0, *source_ends][-1] + 64))
        target = bytearray([GUARD]) * ([0, *target_ends][-1] + 64)
        expected = bytearray(target)
        for (length, _, _), source_end, target_end in zip(parts, source_ends, target_ends, strict=True):
            expected[target_end - length : target_end] = source[source_end - length : source_end]
        order = random.sample(range(len(parts)), len(parts))
        lengths = [parts[number][0] for number in order]
        return cls(
            array("Q", [_address(target) + target_ends[number] - parts[number][0] for number in order]),
            array("Q", [_address(source) + source_ends[number] - parts[number][0] for number in order]),
            array("Q", lengths),
            source,
            target,
            expected,
        )

    def copy(self, threads: int) -> None:
        native.copy(self.targets, self.sources, self.lengths, threads)

    def clear(self) -> None:
        ctypes.memset(_address(self.target), GUARD, len(self.target))


def _address(block: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


edges = st.sampled_from([0, 1, 63, 64, 127, 128, 8191, 8192, 8193, 8319, 8320, MIB - 1, MIB, MIB + 1, 2 * MIB + 77])
part = st.tuples(st.integers(0, 200_000) | edges, st.integers(0, 130), st.integers(0, 130))


@needs_library
@given(st.lists(part, max_size=30), st.integers(0, 9), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_every_byte_arrives_and_no_other_changes(parts: list[tuple[int, int, int]], threads: int, seed: int) -> None:
    spans = Spans.make(parts, seed)
    spans.copy(threads)
    assert spans.target == spans.expected


KIB256 = native.DIGESTED_FROM_BYTES
long_edges = st.sampled_from([KIB256 - 1, KIB256, KIB256 + 255, native.UNIT_BYTES, 2 * native.UNIT_BYTES + 77])


@needs_digesting
@given(
    st.lists(st.tuples(st.integers(0, 600_000) | long_edges, st.integers(0, 130), st.integers(0, 130)), max_size=8),
    st.integers(0, 3 * native.UNIT_BYTES),
    st.integers(1, 4),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_long_spans_are_digested_on_the_way(
    parts: list[tuple[int, int, int]], before: int, threads: int, seed: int
) -> None:
    spans = Spans.make(parts, seed)
    base = _address(spans.target) - before
    offsets = array("Q", [target - base for target in spans.targets])
    digests = native.copy_digesting(offsets, spans.sources, spans.lengths, threads, target_base=base)
    assert spans.target == spans.expected
    rows = list(zip(*(digests[column::4] for column in range(4)), strict=True))
    covered = []
    for offset, length, crc64, crc32 in rows:
        content = memoryview(spans.target)[offset - before : offset - before + length]
        assert (crc64, crc32) == (crc64nvme(content), zlib.crc32(content))
        assert offset // native.UNIT_BYTES == (offset + length - 1) // native.UNIT_BYTES
        covered.append((offset, offset + length))
    wanted: list[tuple[int, int]] = []
    for target, length in zip(spans.targets, spans.lengths, strict=True):
        if length >= KIB256:
            start = target - base
            cuts = [cut for cut in range(0, start + length, native.UNIT_BYTES) if start < cut]
            wanted += pairwise([start, *cuts, start + length])
    assert covered == wanted


@needs_digesting
def test_digests_are_of_what_was_stored_while_the_source_changes() -> None:
    size_bytes = 8 * MIB + 13
    spans = Spans.make([(size_bytes, 1, 1)], 0)
    offsets = array("Q", [target - _address(spans.target) for target in spans.targets])
    over = threading.Event()

    def scribble() -> None:
        number = 0
        while not over.is_set():
            number += 1
            ctypes.memset(_address(spans.source), number & 255, len(spans.source))

    writer = threading.Thread(target=scribble)
    writer.start()
    try:
        for _ in range(20):
            digests = native.copy_digesting(offsets, spans.sources, spans.lengths, target_base=_address(spans.target))
            for offset, length, crc64, crc32 in zip(*(digests[column::4] for column in range(4)), strict=True):
                content = memoryview(spans.target)[offset : offset + length]
                assert (crc64, crc32) == (crc64nvme(content), zlib.crc32(content))
    finally:
        over.set()
        writer.join()


@needs_library
def test_a_processor_whose_checksums_are_wrong_takes_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not native.can_digest():
        pytest.skip("NOT PROVED HERE: this processor takes no checksums while it copies")
    monkeypatch.setattr(zlib, "crc32", lambda _: 0)
    native._digesting_library.cache_clear()
    try:
        assert not native.can_digest()
        assert "checksums are wrong" in caplog.text
        with pytest.raises(InternalError, match="ask can_digest"):
            native.copy_digesting(array("Q"), array("Q"), array("Q"), target_base=0)
    finally:
        native._digesting_library.cache_clear()


@needs_library
@pytest.mark.parametrize("alignment", range(0, 130, 13))
@pytest.mark.parametrize("length", [8192, 8192 + 127, 3 * MIB + 5])
def test_every_alignment_of_a_long_span(length: int, alignment: int) -> None:
    for source_gap in (0, 1, 64):
        spans = Spans.make([(length, source_gap, alignment), (length, alignment, source_gap)], alignment)
        spans.copy(2)
        assert spans.target == spans.expected


@needs_library
def test_many_threads_copy_at_once_again_and_again() -> None:
    groups = [Spans.make([(150_000 + number, number, 64) for number in range(60)], number) for number in range(4)]
    wrong: list[int] = []

    def repeat(number: int) -> None:
        for _ in range(40):
            groups[number].clear()
            groups[number].copy(4)
            if groups[number].target != groups[number].expected:
                wrong.append(number)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_library
def test_a_child_forked_after_a_copy_can_copy() -> None:
    spans = Spans.make([(5 * MIB, 0, 0), (70_000, 1, 1)], 1)
    spans.copy(4)
    spans.clear()
    pid = os.fork()
    if pid == 0:
        spans.copy(4)
        os._exit(0 if spans.target == spans.expected else 1)
    assert os.waitpid(pid, 0)[1] == 0


@needs_library
def test_a_process_that_may_start_no_thread_copies_alone() -> None:
    script = """
import ctypes, resource
from array import array
from cairn.capture import native
size = 4 << 20
source, target = ctypes.create_string_buffer(b"x" * size, size), ctypes.create_string_buffer(size)
assert native.available()
spans = [array("Q", [ctypes.addressof(target)]), array("Q", [ctypes.addressof(source)]), array("Q", [size])]
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (0, before[1]))  # no room for a helper's stack
native.copy(*spans, 4)
resource.setrlimit(resource.RLIMIT_AS, before)
print(target.raw == source.raw)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("True\n", "")


@needs_library
@pytest.mark.parametrize(
    ("targets", "sources", "lengths"),
    [
        (array("Q", [1, 2]), array("Q", [1]), array("Q", [0])),
        (array("Q", [1]), array("Q", [1]), array("Q")),
        (array("Q", [1]), array("I", [1]), array("Q", [1])),
        (array("Q", [1]), array("Q", [1]), array("q", [1])),
    ],
)
def test_arrays_that_are_no_spans_are_refused(targets: array[int], sources: array[int], lengths: array[int]) -> None:
    with pytest.raises(InternalError, match="spans are"):
        native.copy(targets, sources, lengths)


@pytest.mark.parametrize("local_ranks", [1, 2, 10_000])
def test_threads_are_shared_among_the_ranks_of_a_node(local_ranks: int) -> None:
    cores = len(os.sched_getaffinity(0))
    assert 1 <= native.idle_threads(local_ranks) <= max(1, cores // local_ranks)


@pytest.fixture
def other_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The library is looked for here, and nothing is here yet."""
    path = tmp_path / native.LIBRARY.name
    monkeypatch.setattr(native, "LIBRARY", path)
    native._library.cache_clear()
    yield path
    native._library.cache_clear()


def test_without_the_library_it_says_so(other_library: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not other_library.exists()
    assert not native.available()
    assert not caplog.records, "a pure wheel is no fault"
    with pytest.raises(InternalError, match="not here"):
        native.copy(array("Q"), array("Q"), array("Q"))


def test_a_library_for_another_machine_is_told_and_not_used(
    other_library: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other_library.write_bytes(b"\x7fELF of another kind")
    assert not native.available()
    assert not native.available()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
