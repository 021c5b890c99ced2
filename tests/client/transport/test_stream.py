"""A partition as a stream of bytes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.transport.stream import chunks, put_requests
from cairn_api.errors import InternalError
from cairn_api.v1 import save_pb2
from cairn_api.wire import STREAM_CHUNK_BYTES


@settings(deadline=None, max_examples=30)  # copying megabytes takes as long as the machine is busy
@given(
    st.lists(st.sampled_from([0, 1, STREAM_CHUNK_BYTES - 1, STREAM_CHUNK_BYTES, STREAM_CHUNK_BYTES + 3]), max_size=5)
)
def test_chunks_hold_all_bytes_in_order_and_none_is_too_large(sizes: list[int]) -> None:
    windows = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
    pieces = list(chunks(windows))
    assert all(0 < len(piece) <= STREAM_CHUNK_BYTES for piece in pieces)
    assert b"".join(pieces) == b"".join(windows)


def test_a_chunk_stays_true_when_its_window_is_reused() -> None:
    scratch = bytearray(4)

    def windows() -> object:
        for value in (1, 2):
            scratch[:] = bytes([value]) * 4
            yield memoryview(scratch)

    assert list(chunks(windows())) == [b"\1" * 4, b"\2" * 4]  # type: ignore[arg-type]


def test_a_plan_that_does_not_keep_its_word_is_noticed() -> None:
    header = save_pb2.PutHeader(name="model.pt", size_bytes=5)
    assert len(list(put_requests(header, [b"12345"]))) == 2
    with pytest.raises(InternalError, match="planned with 5 bytes and came out with 4"):
        list(put_requests(header, [b"1234"]))
