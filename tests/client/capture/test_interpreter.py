"""The interpreter's settings come back as they were, whoever changed them meanwhile."""

from __future__ import annotations

import gc
import sys
from contextlib import ExitStack

import pytest

from cairn.capture.interpreter import collector_paused, lock_returned_quickly


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_paused_and_left_as_it_was(enabled: bool) -> None:
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(KeyError), collector_paused():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


@pytest.mark.parametrize("usual_s", [0.005, 0.05, 0.000123])
def test_the_switch_interval_is_short_until_the_last_of_several_saves_ends(usual_s: float) -> None:
    before_s = sys.getswitchinterval() + 0.5e-6
    try:
        sys.setswitchinterval(usual_s)
        exact_s = sys.getswitchinterval()
        for _ in range(3):  # Python rounds down at every change: repeated saves must not eat the interval up
            with ExitStack() as first:
                first.enter_context(lock_returned_quickly())
                with lock_returned_quickly():
                    assert sys.getswitchinterval() < 1e-4
                assert sys.getswitchinterval() < 1e-4
            assert sys.getswitchinterval() == exact_s
    finally:
        sys.setswitchinterval(before_s)
