"""Overlapped capture: the large tensors that only an optimizer changes are copied while training goes on.

A save copies everything else at once. What may wait is copied by the background; a step of a guarded optimizer waits
for it before it changes anything. So training loses the part of the copy that is longer than forward and backward.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

from cairn.background import Background
from cairn.counters import Counters

if TYPE_CHECKING:
    import torch

    from cairn.capture.plan import Remainder
    from cairn.guards import Guarded, Guards, Tensors


class LateCopy:
    """What is left to copy of one partition.

    *failed* is told what went wrong. Made on the thread that saves, whose queued GPU work the copy waits for.
    """

    def __init__(
        self,
        remainder: Remainder,
        guarded: Guarded,
        state: object,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._remainder = remainder
        self._guarded = guarded
        self._state = state
        self._failed = failed
        self._whole = ExitStack()
        self._streams = _side_streams(remainder.storages)
        self._taken = threading.Lock()

    def take_over(self, unfinished: ExitStack) -> None:
        """Close *unfinished* when the buffer is whole, or given up."""
        self._whole = unfinished.pop_all()

    def cancel(self) -> bool:
        """Give the buffer up, unless the copy has begun; whether that is so."""
        cancelled = self._taken.acquire(blocking=False)
        if cancelled:
            self._whole.close()
        return cancelled

    def run(self, arrived: Callable[[array[int]], None]) -> int:
        """Copy it, once; how many bytes that was, 0 after a failure. *arrived* is told the checksums."""
        if not self._taken.acquire(blocking=False):
            return 0
        with self._whole:
            try:
                with ExitStack() as current:
                    for stream in self._streams:
                        current.enter_context(stream)
                    digests = self._remainder.copy()
                self._guarded.check(self._state)
                arrived(digests)
            except Exception as error:  # noqa: BLE001 - whatever it is, all ranks hear of it in the commit
                self._failed(error)
                return 0
        return self._remainder.size_bytes


def _side_streams(storages: Iterable[torch.UntypedStorage]) -> list[AbstractContextManager[object]]:
    """For each GPU a stream to be current while copying, which waits for what is queued on the present one so far."""
    devices = {storage.device for storage in storages if storage.is_cuda}
    if not devices:
        return []
    import torch  # noqa: PLC0415 - it is there: the storages are its own

    contexts: list[AbstractContextManager[object]] = []
    for device in devices:
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        contexts.append(torch.cuda.stream(side))
    return contexts


class Overlap:
    """See the module."""

    def __init__(self, background: Background, counters: Counters) -> None:
        self._background = background
        self._counters = counters
        self._guards: Guards | None = None
        self._changed = threading.Condition()
        self._pending: set[LateCopy] = set()
        self._pid = os.getpid()

    def guard(self, optimizer: torch.optim.Optimizer, more: Tensors) -> None:
        """See :meth:`cairn.Client.guard`."""
        if self._guards is None:
            from cairn.guards import Guards  # noqa: PLC0415 - a client that only lists versions needs no torch

            self._guards = Guards(self._before_step)
        self._guards.add(optimizer, more)

    def guarded(self) -> Guarded | None:
        """What may wait now; None when nothing is guarded."""
        return None if self._guards is None else self._guards.now()

    def copy_later(self, copy: LateCopy, unfinished: ExitStack, arrived: Callable[[array[int]], None]) -> None:
        """Have *copy* done in the background, and close *unfinished* there; before that, *arrived* tells of success."""

        def work() -> None:
            try:
                self._counters.late_bytes += copy.run(arrived)
            finally:
                self._done(copy)

        try:
            copy.take_over(unfinished)
            self._pending.add(copy)
            self._background.submit(work)
        except BaseException:  # Control-C: a copy that nobody makes must hold up no step
            if copy.cancel():
                self._done(copy)
            raise
        self._counters.overlapped_partitions += 1

    def wait_copied(self) -> None:
        """Wait until every byte of all saves so far is copied."""
        if self._pending and os.getpid() == self._pid:  # a forked child has no thread that copies
            with self._changed:
                self._changed.wait_for(lambda: not self._pending)

    def _done(self, copy: LateCopy) -> None:
        with self._changed:
            self._pending.discard(copy)
            self._changed.notify_all()

    def close(self) -> None:
        """Let go of the optimizers."""
        if self._guards is not None:
            self._guards.remove_all()

    def _before_step(self) -> None:
        if self._pending:
            start_s = time.perf_counter()
            try:
                self.wait_copied()
            finally:
                self._counters.step_wait_s += time.perf_counter() - start_s
