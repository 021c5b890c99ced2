"""The goals for speed, each a limit on a ratio within one run, and where a peer is ahead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.perf.contenders import PEERS
from tests.perf.results import Run

OURS = "Cairn"
OVERLAPPED = "Cairn overlapped"
DAEMON_MEMORY_LIMIT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Goal:
    """What was measured, and the most (or with *at_least* the least) that it may be."""

    text: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def goals_of(run: Run) -> list[Goal]:
    """Every goal for which the run has measured both sides of the ratio."""
    return [*_saving(run), *_restoring(run)]


def _saving(run: Run) -> Iterator[Goal]:
    memcpy_limit = 2.0 if run.state == "small" else 1.1
    if (stall := run.ratio(OURS, "stall_s", "memcpy")) is not None:
        yield Goal("warm stall / memcpy", stall, memcpy_limit)
    warm_s = run.median(OURS, "stall_s")
    for metric, text in (("first_stall_s", "first stall"), ("preallocated_stall_s", "first stall, preallocated")):
        if warm_s and (first_s := run.median(OURS, metric)) is not None:
            yield Goal(f"{text} / warm stall", first_s / warm_s, 1.5)
    if (overlapped := run.ratio(OVERLAPPED, "stall_s", "memcpy")) is not None:
        yield Goal("overlapped stall / memcpy", overlapped, 0.05)
    if (bill := run.per_gb(OURS, "bill_s")) is not None:
        yield Goal("stall + lost, s per GB", bill, 0.12)
        others = {name: value for name in PEERS if (value := run.per_gb(name, "bill_s")) is not None}
        best = min(others, key=lambda name: others[name], default="")
        if best and others[best] > 0:  # noise can make nothing of a small bill
            yield Goal(f"stall + lost / that of {best}", bill / others[best], 1.0)
    if (written := run.paired(OURS, "raw_write_s", "drain_s")) is not None:
        yield Goal("raw O_DIRECT write / tier 1 write", written, 0.9, True)
    if (cpu := run.per_gb(OURS, "daemon_cpu_s")) is not None:
        yield Goal("daemon's CPU-seconds per GB", cpu, 0.15)


def _restoring(run: Run) -> Iterator[Goal]:
    def ratio(metric: str, contender: str, other: str) -> float | None:
        value, reference = run.median(OURS, metric), run.median(contender, other)
        return None if value is None or not reference else value / reference

    if (mapped := ratio("memory_load", "torch.save", "load_warm")) is not None:
        yield Goal("load from memory / warm torch.load", mapped, 0.01)
    if (live := run.ratio(OURS, "memory_live", "memcpy")) is not None:
        yield Goal("memory into live tensors / memcpy", live, 1.2)
    if (warm := ratio("load_warm", "torch.save", "mmap_load_warm")) is not None:
        yield Goal("load from warm tier 1 / mmap torch.load", warm, 1.1)
    if (warm_live := ratio("live_warm", "torch.save", "mmap_live_warm")) is not None:
        yield Goal("warm tier 1 into live tensors / the same by mmap torch.load", warm_live, 1.1)
    if (cold := run.paired(OURS, "raw_read_s", "live_cold")) is not None:
        yield Goal("raw O_DIRECT read / cold tier 1 into live tensors", cold, 0.9, True)


_COMPARED = {
    "first_stall_s": "first stall",
    "stall_s": "warm stall",
    "durable_s": "time to durable",
    "bill_s": "stall + lost",
    "cpu_s": "CPU time",
    "extra_bytes": "extra memory",
    "live_warm": "warm restore",
    "live_cold": "cold restore",
}


def ahead_of_us(run: Run) -> list[str]:
    """Sentences, one for each measure in which some peer is better than Cairn, naming the best one."""
    found = []
    for metric, text in _COMPARED.items():
        ours = run.median(OURS, metric)
        others = {name: value for name in PEERS if (value := run.median(name, metric)) is not None}
        if ours is None or not others:
            continue
        best = min(others, key=lambda name: others[name])
        if others[best] < ours:
            behind = "" if others[best] <= 0 else f" ({ours / others[best]:.2f} x)"
            found.append(f"{text}: {best} {_shown(metric, others[best])}, Cairn {_shown(metric, ours)}{behind}")
    return found


def _shown(metric: str, value: float) -> str:
    return f"{value / 1e9:.2f} GB" if metric == "extra_bytes" else f"{value:.3f} s"
