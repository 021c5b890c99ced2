"""A training loop that keeps every core busy, to see what a drain takes away from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

_SIDE = 1024
_LEAST_S = 0.25


class Loop(NamedTuple):
    """*iterations* that took *seconds* in all."""

    iterations: int
    seconds: float


class TrainingLoad:
    """Matrix products on all cores of this rank; ``iteration_s`` is about what one takes."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        self._left = torch.rand(_SIDE, _SIDE, generator=generator)
        self._right = torch.rand(_SIDE, _SIDE, generator=generator)
        self._out = torch.empty(_SIDE, _SIDE)
        self.iteration_s = self.run(20).seconds / 20

    def iterations_for(self, duration_s: float) -> int:
        """How many last at least *duration_s* seconds when nothing disturbs them."""
        return 1 + int(max(_LEAST_S, duration_s) / self.iteration_s)

    def run(self, iterations: int, until: threading.Event | None = None) -> Loop:
        """*iterations*, and more until the event is set."""
        done = 0
        started_s = time.perf_counter()
        while done < iterations or (until is not None and not until.is_set()):
            torch.mm(self._left, self._right, out=self._out)
            done += 1
        return Loop(done, time.perf_counter() - started_s)


class Waiter:
    """Calls *finish* on a thread of its own; ``done`` is set when it returns."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self.done = threading.Event()
        self._finish = finish
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="bench-waiter")
        self._thread.start()

    def join(self) -> None:
        """Wait for it; raises what it raised."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._finish()
        except BaseException as error:  # noqa: BLE001 - raised again by join()
            self._failure = error
        finally:
            self.done.set()
