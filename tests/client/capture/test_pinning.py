"""Registering buffers: nothing at all without CUDA, pinned for torch with it."""

from __future__ import annotations

import mmap

import pytest
import torch

from cairn.capture import pinning


def test_without_cuda_there_is_nothing_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert pinning.register(memoryview(bytearray(4096))) is False
    assert pinning.register(torch.empty(4096, dtype=torch.uint8)) is False


@pytest.mark.gpu
def test_a_registered_buffer_is_pinned_until_unregistered() -> None:
    if not torch.cuda.is_available():
        pytest.skip("NO GPU HERE: registering memory with CUDA is not tested on this machine")
    pages = mmap.mmap(-1, 1 << 20)
    buffer = torch.frombuffer(pages, dtype=torch.uint8)
    buffer.fill_(0)
    assert pinning.register(buffer)
    try:
        assert buffer.is_pinned()
    finally:
        pinning.unregister(buffer)
    assert not buffer.is_pinned()
