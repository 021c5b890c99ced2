"""When a save is flagged for tier 2. Pure: seconds come in, a decision comes out; only rank 0 asks.

The decision travels with the version number, so ranks and daemons never compare clocks.
"""

from __future__ import annotations


def persist_due(
    now_s: float, last_flagged_s: float | None, last_persisted_s: float | None, interval_s: float, *, inherited: bool
) -> bool:
    """Whether the save that starts at *now_s* is to be persisted. All times are of one monotonic clock.

    *last_flagged_s* is when this launch last flagged a save and *last_persisted_s* when any version of the job last
    reached tier 2 (None: never). Both must be at least *interval_s* ago: the first keeps a slow bucket from being
    sent every save, the second restarts the interval only when a version is really safe. *inherited* means that a
    flagged version was aborted: its flag passes to this save at once.
    """
    if interval_s <= 0 or inherited:
        return True
    flag_is_old = last_flagged_s is None or now_s - last_flagged_s >= interval_s
    copy_is_old = last_persisted_s is None or now_s - last_persisted_s >= interval_s
    return flag_is_old and copy_is_old
