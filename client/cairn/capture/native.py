"""Copies spans of memory at the speed of the machine, with a small C library, in one call without the interpreter lock.

The library is optional: a wheel for another architecture, or one built where there was no compiler, has none, and then
:func:`available` is false and the callers copy with torch. Some processors also take the checksums of what they copy
almost for nothing; where :func:`can_digest` is false, the daemon takes all of them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import zlib
from array import array
from functools import cache
from pathlib import Path

from cairn_api.errors import InternalError

_LOG = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("libcairncopy.so")
"""Beside this module in a wheel as in a source tree. ``native.so`` would be imported instead of this module."""

_MOST_THREADS = 8
"""A bound for nodes with many cores: every rank starts its own, and a few fill the memory's bandwidth."""

UNIT_BYTES = 4 << 20
"""A digest is of no more than this: of nothing beyond the next offset that is a multiple of it."""

DIGESTED_FROM_BYTES = 256 << 10
"""Shorter spans are not digested while copying: to send and put together their digests takes as long as taking them."""

_DIGEST_COLUMNS = 4
_DIGEST_BYTES = 8 * _DIGEST_COLUMNS
_CRC64NVME_REFLECTED = 0x9A6C9329AC4BC9B5


def available() -> bool:
    """Whether :func:`copy` works here."""
    return _library() is not None


def can_digest() -> bool:
    """Whether :func:`copy_digesting` works here."""
    return _digesting_library() is not None


def copy(
    targets: array[int],
    sources: array[int],
    lengths: array[int],
    threads: int = 1,
    *,
    target_base: int = 0,
    source_base: int = 0,
) -> None:
    """Copy ``lengths[i]`` bytes from ``sources[i]`` to ``targets[i]``, for all i, without the GIL.

    The arrays have type code ``"Q"`` and hold addresses, or what becomes addresses when the base is added. They and the
    memory that they name must stay as they are meanwhile. No target may overlap another span. The calling thread works
    too, and waits for none of the *threads* that does not get to run. May be called from several threads at once.
    """
    library = _library()
    if library is None:
        raise InternalError("the copy library is not here", hint="ask available() first")
    _copy(library, targets, sources, lengths, threads, target_base, source_base)


def copy_digesting(
    offsets: array[int], sources: array[int], lengths: array[int], threads: int = 1, *, target_base: int
) -> array[int]:
    """As :func:`copy`; returns the checksums of spans of at least :data:`DIGESTED_FROM_BYTES`, taken on the way.

    They are rows of four numbers: offset from *target_base* and length of a piece, both in bytes, its CRC-64/NVME and
    its CRC-32. The pieces cover those spans, in the order of the spans, and are cut where the offset is a multiple of
    :data:`UNIT_BYTES`. They are of what was stored, whoever may have changed the source meanwhile.
    """
    library = _digesting_library()
    if library is None:
        raise InternalError("checksums cannot be taken while copying here", hint="ask can_digest() first")
    size_bytes = sum(lengths)
    most = size_bytes // UNIT_BYTES + 2 * (size_bytes // DIGESTED_FROM_BYTES)
    digests = array("Q", bytes(_DIGEST_BYTES * most))
    count = _copy(library, offsets, sources, lengths, threads, target_base, 0, digests)
    return digests[: _DIGEST_COLUMNS * count]


def _copy(
    library: ctypes.CDLL,
    targets: array[int],
    sources: array[int],
    lengths: array[int],
    threads: int,
    target_base: int,
    source_base: int,
    digests: array[int] | None = None,
    digested_from_bytes: int = DIGESTED_FROM_BYTES,
) -> int:
    if not len(targets) == len(sources) == len(lengths) or {targets.typecode, sources.typecode, lengths.typecode} != {
        "Q"
    }:
        raise InternalError("spans are three arrays of unsigned 64-bit numbers, of one length")
    count: int = library.cairn_copy(
        targets.buffer_info()[0], sources.buffer_info()[0], lengths.buffer_info()[0], len(lengths),
        target_base, source_base, max(1, threads),
        None if digests is None else digests.buffer_info()[0], digested_from_bytes,
    )  # fmt: skip
    return count


def idle_threads(local_ranks: int) -> int:
    """How many threads this rank should copy with, when *local_ranks* ranks of this node save at once: 1 to 8."""
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // max(1, local_ranks)))


@cache
def _library() -> ctypes.CDLL | None:
    if not LIBRARY.exists():
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
        pointer, number = ctypes.c_void_p, ctypes.c_uint64
        library.cairn_copy.argtypes = (pointer, pointer, pointer, number, number, number, number, pointer, number)
        library.cairn_copy.restype = number
        library.cairn_can_digest.restype = ctypes.c_int
    except (OSError, AttributeError) as error:
        _LOG.warning("the copy library cannot be loaded, so saves stall training longer: %s", error)
        return None
    return library


@cache
def _digesting_library() -> ctypes.CDLL | None:
    """The library, if it takes checksums here and they are right: a wrong one would cost a whole version."""
    library = _library()
    if library is None or not library.cairn_can_digest():
        return None
    sample = bytearray(index * 89 & 255 for index in range(1000))
    copied = bytearray(len(sample))
    source, target = (ctypes.addressof(ctypes.c_char.from_buffer(block)) for block in (sample, copied))
    digest = array("Q", bytes(_DIGEST_BYTES))
    spans = array("Q", [0]), array("Q", [source]), array("Q", [len(sample)])
    _copy(library, *spans, threads=1, target_base=target, source_base=0, digests=digest, digested_from_bytes=0)
    if copied == sample and digest.tolist() == [0, len(sample), _crc64nvme(sample), zlib.crc32(sample)]:
        return library
    _LOG.warning("this processor's checksums are wrong, so the daemon takes them: training pays more for a save")
    return None


def _crc64nvme(content: bytes | bytearray) -> int:
    """CRC-64/NVME, bit by bit, straight from its definition: to check the fast one."""
    state = (1 << 64) - 1
    for byte in content:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (_CRC64NVME_REFLECTED if state & 1 else 0)
    return state ^ ((1 << 64) - 1)
