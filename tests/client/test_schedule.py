"""The persist flag on a simulated clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn.schedule import persist_due


@pytest.mark.parametrize(
    ("now_s", "flagged_s", "persisted_s", "interval_s", "inherited", "due"),
    [
        (0.0, None, None, 100.0, False, True),  # the very first save of a job
        (50.0, None, 0.0, 100.0, False, False),  # a launch soon after another one's copy
        (100.0, None, 0.0, 100.0, False, True),
        (150.0, 100.0, 20.0, 100.0, False, False),  # flagged lately, not there yet: the bucket is slow
        (200.0, 100.0, 20.0, 100.0, False, True),
        (200.0, 100.0, 150.0, 100.0, False, False),  # the interval restarts when the copy is safe
        (250.0, 100.0, 150.0, 100.0, False, True),
        (101.0, 100.0, 100.5, 100.0, True, True),  # a flagged version was aborted
        (101.0, 100.0, 100.5, 0.0, False, True),  # 0 persists every version
    ],
)
def test_table(
    now_s: float, flagged_s: float | None, persisted_s: float | None, interval_s: float, inherited: bool, due: bool
) -> None:
    assert persist_due(now_s, flagged_s, persisted_s, interval_s, inherited=inherited) is due


@given(
    step_s=st.floats(1, 50),
    interval_s=st.floats(1, 500),
    upload_s=st.floats(0, 300),
    failures=st.sets(st.integers(0, 199), max_size=20),
)
def test_a_long_run_persists_neither_too_often_nor_too_rarely(
    step_s: float, interval_s: float, upload_s: float, failures: set[int]
) -> None:
    flagged_s: float | None = None
    persisted_s: float | None = None
    uploads: list[float] = []
    flags: list[float] = []
    inherited = False
    for number in range(200):
        now_s = number * step_s
        for done_s in [done_s for done_s in uploads if done_s <= now_s]:
            uploads.remove(done_s)
            persisted_s = done_s
        due = persist_due(now_s, flagged_s, persisted_s, interval_s, inherited=inherited)
        if inherited:
            assert due, "the flag of an aborted version was lost"
        elif due and flags:
            assert now_s - flags[-1] >= interval_s
        elif not due:
            assert flags, "the first save is due"
            assert now_s - flags[-1] < interval_s + upload_s + step_s
        inherited = False
        if due:
            flagged_s = now_s
            flags.append(now_s)
            if number in failures:
                inherited = True
            else:
                uploads.append(now_s + upload_s)
