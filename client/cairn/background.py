"""What is left of a save when the training goes on: done in order, on a thread that the end of the program waits for.

The thread is no daemon thread, so the interpreter waits for it before anything is torn down: the last save of a
program is finished although nothing follows it, also when the program ends with an exception. It exists only while
there is work.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable

from cairn.ranks import Json, Ranks

log = logging.getLogger("cairn")


class Background:
    """See the module. Safe to use from several threads. *failed* receives what a piece of work raises."""

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._work: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    @property
    def inside(self) -> bool:
        """Whether the caller is the work itself."""
        return threading.current_thread() is self._thread

    def submit(self, work: Callable[[], object]) -> None:
        """Do *work* once everything submitted before is done: here and now if no thread can be started."""
        with self._changed:
            self._work.append(work)
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._run, name="cairn-overlap", daemon=False)
            try:
                self._thread.start()
            except RuntimeError as error:
                log.info("a save is finished before training goes on: %s", error)
                self._thread = threading.current_thread()
            except BaseException:  # Control-C: nobody may wait for a thread that never ran
                if not self._thread.is_alive():
                    self._thread = None
                raise
            else:
                return
        self._run()

    def settle(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is left to do, at most *timeout_s*; whether that is so. Does not wait for itself."""
        if self.inside or os.getpid() != self._pid:  # a forked child has the queue and not the thread
            return True
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._work:
                    self._thread = None
                    self._changed.notify_all()
                    return
                work = self._work.popleft()
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised by the client's next call
                self._failed(error)
            del work  # and with it the tensors that it kept


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
