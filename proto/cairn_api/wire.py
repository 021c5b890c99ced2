"""Constants of the protocol that both ends must agree on."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

PROTOCOL_VERSION = 1
"""Raised when an older peer would misunderstand a newer one; a daemon refuses any other number, naming both."""

GRPC_SOCKET_NAME = "cairnd.sock"
SIDE_SOCKET_NAME = "side.sock"
DEFAULT_RUNTIME_DIR = "/run/cairn"

TOKEN_METADATA = "cairn-token"  # noqa: S105 - the name of a header, not a secret
ERROR_METADATA = "cairn-error-bin"

SIDE_PACKET_BYTES = 64 * 1024
"""Largest side-socket message; every message is one JSON object."""

BRIEF_BYTES = 40 * 1024
"""Largest packed request or reply of a call that is made on the side socket, where it travels as base64."""

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
"""Largest gRPC message either side accepts: a record table of about a million tensors, never bulk data."""

STREAM_CHUNK_BYTES = 2 * 1024 * 1024
"""Bytes per message of a partition sent as a stream; 1 MiB did as well, 256 KiB and 16 MiB were slower."""

SLOWEST_STREAM_BYTES_PER_S = 20_000_000
"""A stream that is slower is given up by both ends."""

PAGE_BYTES = 4096
SEGMENT_ALIGNMENT_BYTES = 2 * 1024 * 1024
"""Shared buffers are rounded up to this, so that they can be backed by huge pages."""


def pack_column(numbers: Iterable[int]) -> bytes:
    """A column of a ``RecordTable`` as it travels: unsigned 64-bit numbers, little-endian."""
    column = array("Q", numbers)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def unpack_column(packed: bytes) -> array[int]:
    """What :func:`pack_column` packed. Raises :class:`ValueError` for a length that is not a multiple of 8 bytes."""
    column = array("Q")
    column.frombytes(packed)
    if sys.byteorder == "big":
        column.byteswap()
    return column
