"""Two settings of the Python interpreter that a save changes for a moment, as it makes very many objects at once."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_HAND_OVER_INTERVAL_S = 1e-5

_lock = threading.Lock()
_hurrying = 0
_usual_interval_s = 0.0


@contextmanager
def collector_paused() -> Iterator[None]:
    """No cycle collection meanwhile, if it was on before.

    A save makes tens of objects per tensor and no garbage: with 20,000 tensors, collecting in between took half of the
    time. Whatever is only needed inside should be gone before this ends, because the collector then looks at the rest.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def lock_returned_quickly() -> Iterator[None]:
    """Other threads give the interpreter lock back within 10 microseconds instead of the usual 5 milliseconds.

    torch hands the lock over whenever it makes or frees a tensor object. Beside one busy Python thread each of those
    can cost a whole switch interval, which for 20,000 tensors adds up to many seconds.
    """
    global _hurrying, _usual_interval_s  # noqa: PLW0603 - the setting itself is global to the process
    with _lock:
        if not _hurrying:
            # Python keeps whole microseconds and cuts off the rest: half of one more, or each save would lose one.
            _usual_interval_s = sys.getswitchinterval() + 0.5e-6
            sys.setswitchinterval(_HAND_OVER_INTERVAL_S)
        _hurrying += 1
    try:
        yield
    finally:
        with _lock:
            _hurrying -= 1
            if not _hurrying:
                sys.setswitchinterval(_usual_interval_s)
