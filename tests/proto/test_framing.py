"""Messages framed by hand are those of protobuf."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn_api.framing import framed, unframed
from cairn_api.v1 import restore_pb2, save_pb2

SIZES = [0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152, 5_000_000]
DATA = save_pb2.PutRequest.DATA_FIELD_NUMBER


@pytest.mark.parametrize("size", SIZES)
def test_both_ways_agree_with_protobuf(size: int) -> None:
    data = bytes([size % 251]) * size
    by_protobuf = save_pb2.PutRequest(data=data).SerializeToString()
    assert framed(DATA, memoryview(data)) == by_protobuf
    assert bytes(unframed(DATA, by_protobuf) or b"") == data
    assert unframed(restore_pb2.ReadReply.DATA_FIELD_NUMBER, restore_pb2.ReadReply(data=data).SerializeToString()) == (
        data or None
    )  # proto3 leaves an empty field out


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x12",
        b"\x12\x80",
        b"\x12\x03ab",
        b"\x12\x03abcd",
        b"\x12\x80\x80\x80\x80\x80\x01a",
        b"\x12\xff\xff\xff\xff\xff",
        b"\x12\x01a\x12\x01b",
        save_pb2.PutRequest(header=save_pb2.PutHeader(name="a")).SerializeToString(),
    ],
)
def test_anything_else_is_left_to_protobuf(message: bytes) -> None:
    assert unframed(DATA, message) is None


@given(st.binary(max_size=40))
def test_what_is_taken_is_what_protobuf_would_read(message: bytes) -> None:
    message = b"\x12" + message
    data = unframed(DATA, message)
    if data is not None:
        assert save_pb2.PutRequest.FromString(message).data == data
