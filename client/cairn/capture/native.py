"""Copies spans of memory at the speed of the machine, with a small C library, in one call without the interpreter lock.

The library is optional: a wheel for another architecture, or one built where there was no compiler, has none, and then
:func:`available` is false and the callers copy with torch.
"""

from __future__ import annotations

import ctypes
import logging
import os
from array import array
from functools import cache
from pathlib import Path

from cairn_api.errors import InternalError

_LOG = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("libcairncopy.so")
"""Beside this module in a wheel as in a source tree. ``native.so`` would be imported instead of this module."""

_MOST_THREADS = 8
"""A bound for nodes with many cores: every rank starts its own, and a few fill the memory's bandwidth."""


def available() -> bool:
    """Whether :func:`copy` works here."""
    return _library() is not None


def copy(targets: array[int], sources: array[int], lengths: array[int], threads: int = 1) -> None:
    """Copy ``lengths[i]`` bytes from address ``sources[i]`` to address ``targets[i]``, for all i, without the GIL.

    The arrays have type code ``"Q"``; they and the memory that they name must stay as they are meanwhile. No target may
    overlap another span. The calling thread works too, and waits for none of the *threads* that does not get to run.
    May be called from several threads at once.
    """
    library = _library()
    if library is None:
        raise InternalError("the copy library is not here", hint="ask available() first")
    if not len(targets) == len(sources) == len(lengths) or {targets.typecode, sources.typecode, lengths.typecode} != {
        "Q"
    }:
        raise InternalError("spans are three arrays of unsigned 64-bit numbers, of one length")
    library.cairn_copy(
        targets.buffer_info()[0], sources.buffer_info()[0], lengths.buffer_info()[0], len(lengths), max(1, threads)
    )


def idle_threads(local_ranks: int) -> int:
    """How many threads this rank should copy with, when *local_ranks* ranks of this node save at once: 1 to 8."""
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // max(1, local_ranks)))


@cache
def _library() -> ctypes.CDLL | None:
    if not LIBRARY.exists():
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.cairn_copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p) + (ctypes.c_uint64,) * 2
        library.cairn_copy.restype = None
    except (OSError, AttributeError) as error:
        _LOG.warning("the copy library cannot be loaded, so saves stall training longer: %s", error)
        return None
    return library
