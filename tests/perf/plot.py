"""The whole bill as a picture: stall and training time lost, stacked, for each contender and state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.perf.contenders import CONTENDERS
from tests.perf.goals import OURS
from tests.perf.results import Run

_LIMIT_S_PER_GB = 0.12


def plot(runs: Sequence[Run], path: Path) -> None:
    """Write a PNG with one panel per run, in seconds per GB."""
    import matplotlib as mpl  # noqa: PLC0415 - not a dependency of the tests

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - as above

    figure, axes = plt.subplots(1, len(runs), figsize=(5.2 * len(runs) + 1.5, 5), squeeze=False, layout="constrained")
    for axis, run in zip(axes[0], runs, strict=True):
        names = [name for name in reversed(tuple(CONTENDERS)) if run.median(name, "bill_s") is not None]
        stalls = [run.per_gb(name, "busy_stall_s") or 0.0 for name in names]
        lost = [
            max(0.0, (run.per_gb(name, "bill_s") or 0.0) - stall) for name, stall in zip(names, stalls, strict=True)
        ]
        colours = [("#1f6f8b", "#9ccfdd") if name.startswith(OURS) else ("#8b5a1f", "#e3c39a") for name in names]
        axis.barh(names, stalls, color=[dark for dark, _ in colours], label="stall")
        axis.barh(
            names, lost, left=stalls, color=[light for _, light in colours], label="training time lost to the drain"
        )
        axis.axvline(_LIMIT_S_PER_GB, color="black", linestyle="--", linewidth=0.8, label="goal")
        axis.set_title(f"{run.state}, {run.size_gb:.1f} GB, {run.ranks} process{'es' if run.ranks > 1 else ''}")
        axis.set_xlabel("s per GB, until fsynced")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
