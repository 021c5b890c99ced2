"""What is left of a save when the training goes on: done in order, on a thread that the end of the program waits for.

The interpreter waits for what was submitted before anything is torn down: the last save of a program is finished
although nothing follows it, also when the program ends with an exception. The thread stays from one save to the next:
to start one takes a visible part of the time that a save may cost.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from cairn.ranks import Json, Ranks

log = logging.getLogger("cairn")


class Background:
    """See the module. Safe to use from several threads. *failed* receives what a piece of work raises."""

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._work: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._turn = threading.Lock()
        """Held by the thread that works: all work is done in order, whoever does it."""
        self._worker: threading.Thread | None = None
        self._executor = ThreadPoolExecutor(1, "cairn-overlap")
        self._pid = os.getpid()

    @property
    def inside(self) -> bool:
        """Whether the caller is the work itself."""
        return threading.current_thread() is self._worker

    def submit(self, work: Callable[[], object]) -> None:
        """Do *work* once everything submitted before is done: here and now if there can be no thread."""
        self._work.append(work)
        try:
            self._executor.submit(self._work_once)
        except RuntimeError as error:
            log.info("a save is finished before training goes on: %s", error)
            while self._work:
                self._work_once()
        except BaseException:  # Control-C: nobody may wait for what nobody does
            with suppress(ValueError):
                self._work.remove(work)
            raise

    def settle(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is left to do, at most *timeout_s*; whether that is so. Does not wait for itself."""
        if self.inside or os.getpid() != self._pid:  # a forked child has the queue and not the thread
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not self._work and self._worker is None, timeout_s)

    def close(self) -> None:
        """Have the thread end once all work is done."""
        self._executor.shutdown(wait=False)

    def _work_once(self) -> None:
        with self._turn:
            with self._changed:
                if not self._work:  # done by whoever could not start a thread
                    return
                work = self._work.popleft()
                self._worker = threading.current_thread()
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised by the client's next call
                self._failed(error)
            del work  # and with it the tensors that it kept
            with self._changed:
                self._worker = None
                self._changed.notify_all()


class RanksInTurn:
    """*ranks* for everybody but the background: an exchange first waits for those that are pending there.

    All ranks hand the end of a save to the background at the same place in the program, so with this all exchanges
    have the same order on all ranks.
    """

    def __init__(self, ranks: Ranks, background: Background) -> None:
        self._ranks = ranks
        self._background = background

    @property
    def rank(self) -> int:
        """See :class:`cairn.ranks.Ranks`."""
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        """See :class:`cairn.ranks.Ranks`."""
        return self._ranks.world_size

    def all_gather(self, step: str, value: Json, timeout_s: float) -> list[Json]:
        """See :meth:`cairn.ranks.Ranks.all_gather`."""
        self._background.settle()
        return self._ranks.all_gather(step, value, timeout_s)
