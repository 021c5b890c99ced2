"""A partition as a stream of bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.transport.stream import put_messages, receive
from cairn_api.errors import InternalError
from cairn_api.framing import framed
from cairn_api.v1 import restore_pb2, save_pb2
from cairn_api.wire import STREAM_CHUNK_BYTES


def data_of(requests: Iterator[bytes]) -> list[bytes]:
    """What a peer that leaves its messages to protobuf reads."""
    first, *others = (save_pb2.PutRequest.FromString(message) for message in requests)
    assert first.WhichOneof("part") == "header"
    assert all(message.WhichOneof("part") == "data" for message in others)
    return [message.data for message in others]


@settings(deadline=None, max_examples=30)  # copying megabytes takes as long as the machine is busy
@given(
    st.lists(st.sampled_from([0, 1, STREAM_CHUNK_BYTES - 1, STREAM_CHUNK_BYTES, STREAM_CHUNK_BYTES + 3]), max_size=5)
)
def test_messages_hold_all_bytes_in_order_and_none_is_too_large(sizes: list[int]) -> None:
    windows = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
    pieces = data_of(put_messages(save_pb2.PutHeader(name="model.pt", size_bytes=sum(sizes)), windows))
    assert all(0 < len(piece) <= STREAM_CHUNK_BYTES for piece in pieces)
    assert b"".join(pieces) == b"".join(windows)


def test_a_message_stays_true_when_its_window_is_reused() -> None:
    scratch = bytearray(4)

    def windows() -> Iterator[memoryview]:
        for value in (1, 2):
            scratch[:] = bytes([value]) * 4
            yield memoryview(scratch)

    assert data_of(put_messages(save_pb2.PutHeader(size_bytes=8), windows())) == [b"\1" * 4, b"\2" * 4]


def test_a_plan_that_does_not_keep_its_word_is_noticed() -> None:
    header = save_pb2.PutHeader(name="model.pt", size_bytes=5)
    assert data_of(put_messages(header, [b"12345"])) == [b"12345"]
    with pytest.raises(InternalError, match="planned with 5 bytes and came out with 4"):
        list(put_messages(header, [b"1234"]))


def test_what_was_sent_arrives_whichever_way_it_was_framed() -> None:
    by_hand = framed(restore_pb2.ReadReply.DATA_FIELD_NUMBER, b"123")
    by_protobuf = restore_pb2.ReadReply(data=b"45").SerializeToString()
    split = b"\x0a\x81\x00" + b"6"  # a length in more bytes than it needs
    assert receive([by_hand, by_protobuf, b"", split], 6, "a")[:] == b"123456"


@pytest.mark.parametrize(("sizes", "how"), [([4], "fewer"), ([], "fewer"), ([3, 3], "more"), ([6], "more")])
def test_a_wrong_number_of_bytes_is_noticed(sizes: list[int], how: str) -> None:
    messages = [restore_pb2.ReadReply(data=b"x" * size).SerializeToString() for size in sizes]
    with pytest.raises(InternalError, match=f"{how} than the 5 bytes of a"):
        receive(messages, 5, "a")
