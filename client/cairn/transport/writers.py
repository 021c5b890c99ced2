"""Who is filling a capture buffer at this moment: a restarted daemon must not be offered one that is half-written.

Control-C may end the filling of a buffer between any two instructions, so there is no count that could be left wrong:
each writer is a lock of its own, and what ends it is registered before it begins.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


class Writers:
    """See the module. Safe to use from several threads."""

    def __init__(self) -> None:
        self._beginning = threading.Lock()
        self._writers: set[threading.Lock] = set()

    def begin(self, unfinished: ExitStack) -> None:
        """A buffer is about to be filled, and is whole or given up when *unfinished* is closed, on whatever thread."""
        writer = threading.Lock()
        writer.acquire()
        unfinished.callback(self._end, writer)
        with self._beginning:
            self._writers.add(writer)

    def _end(self, writer: threading.Lock) -> None:
        writer.release()  # first: nobody waits for a lock that is free
        self._writers.discard(writer)

    @contextmanager
    def none_now(self) -> Iterator[bool]:
        """Whether all buffers are whole or given up; in the block nobody begins to fill one."""
        with self._beginning:
            yield not any(writer.locked() for writer in list(self._writers))

    @contextmanager
    def kept_out(self) -> Iterator[None]:
        """Wait until all buffers are whole or given up; meanwhile and in the block nobody begins to fill one."""
        with self._beginning:
            for writer in list(self._writers):
                with writer:
                    pass
            yield
