"""Runs as Markdown: one table of saving, one of restoring, the goals, and where peers are ahead."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tests.perf.contenders import CONTENDERS
from tests.perf.goals import Goal, ahead_of_us, goals_of
from tests.perf.results import GB, Run

_RESTORES = {
    "memory_first_load": ("memory tier: load, first (with digest pass)", "memcpy"),
    "memory_load": ("memory tier: load", "memcpy"),
    "memory_live": ("memory tier: into live tensors", "memcpy"),
    "first_live_cold": ("cold, into live tensors, first (with digest pass)", "direct_read"),
    "load_warm": ("warm: load", "memcpy"),
    "live_warm": ("warm: into live tensors", "memcpy"),
    "live_cold": ("cold: into live tensors", "direct_read"),
    "mmap_load_warm": ("warm, mmap: load", "memcpy"),
    "mmap_live_warm": ("warm, mmap: into live tensors", "memcpy"),
    "mmap_live_cold": ("cold, mmap: into live tensors", "direct_read"),
}
_FLOOR_NAMES = {"memcpy": "memcpy", "direct_read": "O_DIRECT read"}


def report(run: Run) -> str:
    """The whole report of one run."""
    ranks = f"{run.ranks} process" + ("es at the same moment" if run.ranks > 1 else "")
    parts = [
        f"## {run.state}: {run.size_gb:.2f} GB in all, {ranks}, medians of {run.rounds} rounds",
        _floors(run),
        _saves(run),
        _restores(run),
        _goals(goals_of(run)),
        _ahead(run),
        _skipped(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _floors(run: Run) -> str:
    texts = {
        "memcpy": "memcpy into warm shared memory",
        "direct_write": "O_DIRECT write + fsync",
        "direct_read": "O_DIRECT read",
    }
    lines = []
    for name, text in texts.items():
        if name in run.floors:
            seconds = run.floor(name)
            lines.append(f"{text} {seconds:.3f} s ({run.size_gb / seconds:.1f} GB/s)")
    others = [value for samples in run.contenders.values() for value in samples.get("others_cores", ())]
    disturbed = f" Others took {statistics.median(others):.2f} cores at the median." if others else ""
    return f"Floors: {', '.join(lines)}.{disturbed}" if lines else ""


def _saves(run: Run) -> str:
    rows = []
    for name in CONTENDERS:
        if not run.contenders.get(name, {}).get("stall_s"):
            continue
        rows.append([
            name,
            _number(run.median(name, "first_stall_s")),
            _number(run.median(name, "preallocated_stall_s")),
            _number(run.median(name, "stall_s")),
            _number(run.ratio(name, "stall_s", "memcpy"), 2),
            _number(run.median(name, "durable_s"), 2),
            _number(run.median(name, "lost_s")),
            f"**{_number(run.median(name, 'bill_s'))}**",
            f"**{_number(run.per_gb(name, 'bill_s'))}**",
            _number(run.per_gb(name, "cpu_s")),
            _number(run.per_gb(name, "daemon_cpu_s")),
            _number(run.per_gb(name, "machine_cpu_s")),
            _number(run.median(name, "extra_bytes"), 2, GB),
            _verdict(name, run.median(name, "corrupt")),
        ])  # fmt: skip
    heads = (
        "contender", "first stall s", "preallocated s", "warm stall s", "x memcpy", "durable s", "lost s",
        "stall + lost s", "s per GB", "CPU s/GB", "of it helpers", "machine CPU s/GB", "extra GB",
        "changed after the stall",
    )  # fmt: skip
    return _table(heads, rows)


def _restores(run: Run) -> str:
    rows = []
    for name in CONTENDERS:
        for metric, (text, floor) in _RESTORES.items():
            if (seconds := run.median(name, metric)) is not None:
                ratio = f"{seconds / run.floor(floor):.2f} x {_FLOOR_NAMES[floor]}"
                rows.append([name, text, _number(seconds, 4), ratio])
    return _table(("contender", "restore", "s", "against the floor"), rows)


def _goals(goals: Sequence[Goal]) -> str:
    rows = [
        [
            goal.text,
            f"{goal.value:.3f}",
            f"{'≥' if goal.at_least else '≤'} {goal.limit:g}",
            "met" if goal.met else "**missed**",
        ]
        for goal in goals
    ]
    return _table(("goal", "measured", "limit", ""), rows)


def _ahead(run: Run) -> str:
    found = ahead_of_us(run)
    return "Where a peer is ahead of Cairn:\n\n" + "\n".join(f"- {line}" for line in found) if found else ""


def _skipped(run: Run) -> str:
    return "\n".join(f"- {name} was left out: {reason}" for name, reason in run.skipped.items())


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, digits: int = 3, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def _verdict(name: str, corrupt: float | None) -> str:
    if corrupt is None:
        return ""
    if corrupt:
        return "**corrupt**"
    return "n/a" if CONTENDERS[name].overlaps else "intact"
