"""Bulk bytes in and out of messages without protobuf, which would copy them once more on each side.

A message of one ``bytes`` field is encoded as the field's tag, the length and the bytes. Who writes and cuts that frame
itself sends and understands exactly the same messages, also those of a peer that leaves them to protobuf.
"""

from __future__ import annotations

_LENGTH_DELIMITED = 2
_MORE = 0x80
"""Set in every byte of a varint but the last; the other seven bits count."""
_LONGEST_LENGTH_BYTES = 5
"""Of a varint that could be the length of a message gRPC lets through."""


def framed(field: int, data: bytes | bytearray | memoryview) -> bytes:
    """The message whose only field, number *field* (1 to 15), holds *data*, flat bytes, which are copied once."""
    return b"".join((_tag(field), _varint(len(data)), data))


def unframed(field: int, message: bytes) -> memoryview | None:
    """The bytes in *message*, not copied; None if it is not just that field: then protobuf has to read it."""
    if message[:1] != _tag(field):
        return None
    length = 0
    for index, byte in enumerate(message[1 : 1 + _LONGEST_LENGTH_BYTES]):
        length |= (byte & ~_MORE) << 7 * index
        if byte < _MORE:
            data = memoryview(message)[2 + index :]
            return data if len(data) == length else None
    return None


def _tag(field: int) -> bytes:
    return bytes((field << 3 | _LENGTH_DELIMITED,))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= _MORE:
        encoded.append(value & 0xFF | _MORE)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
