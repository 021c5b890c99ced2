"""What a run measured, and the arithmetic on it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GB = 1e9

Samples = dict[str, list[float]]

_SUMMED = frozenset({"cpu_s", "daemon_cpu_s", "extra_bytes"})
"""Ranks add up; of every other figure the slower or worse rank counts."""


@dataclass(slots=True)
class Run:
    """One state saved by a number of ranks. Samples are one per round, in seconds or bytes as their names say."""

    state: str
    ranks: int
    rounds: int
    size_bytes: int
    """In the tensors of all ranks together."""
    floors: Samples = field(default_factory=dict)
    contenders: dict[str, Samples] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Contenders that did not take part, or not to the end, and why."""

    @property
    def size_gb(self) -> float:
        """In 10^9 bytes."""
        return self.size_bytes / GB

    def floor(self, name: str) -> float:
        """The median of a floor in seconds."""
        return statistics.median(self.floors[name])

    def median(self, contender: str, metric: str) -> float | None:
        """The median of a metric, or None when it was not measured."""
        values = self.contenders.get(contender, {}).get(metric)
        return statistics.median(values) if values else None

    def per_gb(self, contender: str, metric: str) -> float | None:
        """The median of a metric for each 10^9 bytes saved."""
        value = self.median(contender, metric)
        return None if value is None else value / self.size_gb

    def ratio(self, contender: str, metric: str, floor: str) -> float | None:
        """How many times as long as a floor, median by median."""
        value = self.median(contender, metric)
        return None if value is None else value / self.floor(floor)

    def paired(self, contender: str, metric: str, other: str) -> float | None:
        """The median, over the rounds, of one metric through another that was measured right beside it."""
        samples = self.contenders.get(contender, {})
        pairs = zip(samples.get(metric, ()), samples.get(other, ()), strict=False)
        ratios = [value / reference for value, reference in pairs if reference > 0]
        return statistics.median(ratios) if ratios else None


def merged(runs: Sequence[Run]) -> Run:
    """The runs of all ranks as one: the slower rank's times, the sum of CPU time and memory."""
    first = runs[0]
    result = Run(first.state, first.ranks, first.rounds, sum(run.size_bytes for run in runs))
    result.floors = _merged([run.floors for run in runs])
    result.skipped = {name: reason for run in runs for name, reason in run.skipped.items()}
    result.contenders = {
        name: _merged([run.contenders[name] for run in runs])
        for name in first.contenders
        if all(name in run.contenders for run in runs)
    }
    return result


def joined(runs: Sequence[Run]) -> list[Run]:
    """Runs of the same state, size and number of ranks as one run with the rounds of all of them."""
    found: dict[tuple[str, int, int], Run] = {}
    for run in runs:
        key = (run.state, run.ranks, run.size_bytes)
        if key not in found:
            found[key] = Run(run.state, run.ranks, 0, run.size_bytes)
        whole = found[key]
        whole.rounds += run.rounds
        whole.skipped.update(run.skipped)
        _extend(whole.floors, run.floors)
        for name, samples in run.contenders.items():
            _extend(whole.contenders.setdefault(name, {}), samples)
    return list(found.values())


def _extend(samples: Samples, more: Mapping[str, list[float]]) -> None:
    for metric, values in more.items():
        samples.setdefault(metric, []).extend(values)


def _merged(samples: Sequence[Mapping[str, list[float]]]) -> Samples:
    return {
        metric: [
            sum(values) if metric in _SUMMED else max(values)
            for values in zip(*(item[metric] for item in samples), strict=True)
        ]
        for metric in samples[0]
    }


def add_sample(samples: Samples, **values: float) -> None:
    """Append one value to each named metric."""
    for name, value in values.items():
        samples.setdefault(name, []).append(value)


def run_from_json(document: Mapping[str, Any]) -> Run:
    """The inverse of ``dataclasses.asdict``."""
    return Run(**document)
