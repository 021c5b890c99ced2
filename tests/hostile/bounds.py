"""A bound on memory for what is read in this process: beyond it Python raises MemoryError, which no reader may."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MORE_BYTES = 1 << 30


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Lets this process map at most 1 GiB more than it does now."""
    mapped_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + _MORE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
