"""Reading past the page cache: every byte where it belongs, refusals noticed, errors are told."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cairn.capture import native
from cairn.direct import BLOCK_BYTES, is_cold, read_directly
from cairn.image import Image
from cairn.live import load_into
from cairn.reading import Piece
from cairn_api.errors import UnavailableError

pytestmark = pytest.mark.skipif(not native.available(), reason="the copy library was not built")


def written(path: Path, data: bytes) -> int:
    """A descriptor of *data* on disk, none of it in the page cache."""
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return fd


def gather(spans: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, list[Piece]]:
    """Memory for all *spans* one after the other, and the pieces that belong there."""
    target = torch.zeros(sum(length for _, length in spans), dtype=torch.uint8)
    pieces, at = [], target.data_ptr()
    for offset, length in spans:
        pieces.append(Piece(offset, at, length))
        at += length
    return target, pieces


@pytest.mark.parametrize("tail", [0, 1, 511, 4095])
def test_pieces_of_every_size_and_place_arrive(tmp_path: Path, tail: int) -> None:
    data = os.urandom(3 * BLOCK_BYTES + tail)
    spans = [(0, 1), (BLOCK_BYTES - 3, 7), (BLOCK_BYTES + 4096, 4096), (5, 2 * BLOCK_BYTES), (5, 300), (77, 0)]
    spans += [(2 * BLOCK_BYTES + 100 + number * 41, 9) for number in range(3000)]
    spans += [(len(data) - 5000, 5000), (len(data) - 1, 1)]
    target, pieces = gather(spans)
    fd = written(tmp_path / "bytes", data)
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        assert read_directly(fd, pieces)
        assert target.numpy().tobytes() == b"".join(data[offset : offset + length] for offset, length in spans)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == flags
        assert os.pread(fd, 3, 1) == data[1:4], "the descriptor reads odd places again"
    finally:
        os.close(fd)


def test_what_is_cached_is_told_from_what_is_not(tmp_path: Path) -> None:
    fd = written(tmp_path / "bytes", os.urandom(4 * BLOCK_BYTES))
    try:
        assert is_cold(fd, 4 * BLOCK_BYTES)
        assert is_cold(fd, 4 * BLOCK_BYTES), "asking leaves it as it was"
        assert len(os.pread(fd, 4 * BLOCK_BYTES, 0)) == 4 * BLOCK_BYTES
        assert not is_cold(fd, 4 * BLOCK_BYTES)
    finally:
        os.close(fd)
    memory = os.memfd_create("bytes")
    try:
        os.posix_fallocate(memory, 0, 4 * BLOCK_BYTES)
        assert not is_cold(memory, 4 * BLOCK_BYTES)
    finally:
        os.close(memory)


def test_a_file_system_that_refuses_is_noticed() -> None:
    target, pieces = gather([(0, 10)])
    fd = os.open("/proc/version", os.O_RDONLY)
    try:
        assert not read_directly(fd, pieces)
    finally:
        os.close(fd)
    assert not target.any()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_only_when_it_is_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    really = os.preadv

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        if offset >= BLOCK_BYTES and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return really(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    _, pieces = gather([(0, 3 * BLOCK_BYTES)])
    fd = written(tmp_path / "bytes", bytes(3 * BLOCK_BYTES))
    try:
        assert not read_directly(fd, pieces)
        assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT, "it is about to be read through the cache"
    finally:
        os.close(fd)


def test_a_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    _, pieces = gather([(0, 100), (9000, 2000)])
    fd = written(tmp_path / "bytes", bytes(10_001))
    try:
        with pytest.raises(UnavailableError, match="it ends at 10001"):
            read_directly(fd, pieces)
    finally:
        os.close(fd)


def test_a_failed_read_is_told_when_no_thread_reads_any_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    really = os.preadv

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        reads.append(offset)
        if offset == BLOCK_BYTES:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return really(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    _, pieces = gather([(0, 8 * BLOCK_BYTES)])
    fd = written(tmp_path / "bytes", bytes(8 * BLOCK_BYTES))
    try:
        with pytest.raises(UnavailableError, match="Input/output error") as caught:
            read_directly(fd, pieces)
    finally:
        os.close(fd)
    assert "cairn verify" in caught.value.hint
    assert BLOCK_BYTES in reads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cairn-direct")]


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    large = {f"large{number}": torch.rand(6_000_001) for number in range(3)}
    return {
        **large,
        **{f"small{number}": torch.rand(number) for number in range(300)},
        "column": torch.rand(70, 50).t(),
    }


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_a_cold_file_is_loaded_into_live_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool, refused: bool
) -> None:
    saved = state(1)
    torch.save(saved, tmp_path / "saved")
    data = (tmp_path / "saved").read_bytes()
    fd = written(tmp_path / "state.pt", data)
    used = []

    def spied(fd: int, pieces: Sequence[Piece]) -> bool:
        used.append(len(pieces))
        return not refused and read_directly(fd, pieces)

    monkeypatch.setattr("cairn.live.read_directly", spied)
    live = state(2)
    try:
        load_into(fd, len(data), live, weights_only=True, alone=alone)
    finally:
        os.close(fd)
    assert bool(used) is alone
    assert all(torch.equal(live[name], saved[name]) for name in saved)


def test_no_header_beside_a_tensor_is_read_before_the_tensors(tmp_path: Path) -> None:
    saved = {f"t{number}": torch.full((1_000_000,), float(number)) for number in range(60)}
    torch.save(saved, tmp_path / "saved")
    data = (tmp_path / "saved").read_bytes()
    fd = written(tmp_path / "state.pt", data)
    live = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    try:
        load_into(fd, len(data), live, weights_only=True, alone=True)
        assert is_cold(fd, len(data)), "the file went past the page cache"
    finally:
        os.close(fd)
    assert all(torch.equal(live[name], saved[name]) for name in saved)


@pytest.mark.parametrize("alone", [False, True])
def test_a_header_of_unusual_length_is_noticed_and_honoured(tmp_path: Path, alone: bool) -> None:
    saved = {"a": torch.rand(1001), "b": torch.rand(20_000_000), "column": torch.rand(70, 50).t()}
    torch.save(saved, tmp_path / "usual.pt")
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(tmp_path / "usual.pt") as source, zipfile.ZipFile(path, "w") as target:
        for item in source.infolist():  # without torch's padding: other header lengths, and nothing is aligned
            target.writestr(item.filename, source.read(item))
    fd = written(path, path.read_bytes())
    live = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    try:
        load_into(fd, path.stat().st_size, live, weights_only=True, alone=alone)
        mapped = Image.mapped(fd, path.stat().st_size).load_of(fd, map_location=None, weights_only=True)
    finally:
        os.close(fd)
    for loaded in (live, mapped):
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
