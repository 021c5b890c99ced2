"""An environment for child processes in which torch finds an entry point of our choice, installed or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
SOURCE_ROOTS = [str(REPOSITORY / root) for root in ("proto", "client", "daemon")]


def environment(folder: Path, target: str = "cairn_autoload:register", **more: str) -> dict[str, str]:
    """Variables under which ``import torch`` loads *target*.

    A distribution of the same name that comes earlier on the path hides the installed one, so this is the only one.
    """
    metadata = folder / "cairn_checkpoint-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cairn-checkpoint\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[torch.backends]\ncairn = {target}\n")
    ours = {name: value for name, value in os.environ.items() if not name.startswith("CAIRN_")}
    ours.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    path = os.pathsep.join([str(folder), *SOURCE_ROOTS, *filter(None, [ours.get("PYTHONPATH", "")])])
    return {**ours, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **more}


def run(program: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run *program* in a fresh interpreter."""
    return subprocess.run(  # noqa: PLW1510 - the tests look at the status themselves
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=100
    )
