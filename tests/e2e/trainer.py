"""Runs ``train.py`` on two ranks and reads what they told; the daemon beside it is real."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch

from cairnd.tiers.filesystem import OsFileSystem
from tests.client.integrations.entry_point import REPOSITORY
from tests.client.integrations.entry_point import environment as environment_with_entry_point
from tests.daemon_process import DaemonProcess

TRAIN = REPOSITORY / "tests" / "e2e" / "train.py"
RUN_TIMEOUT_S = 100
WORLD_SIZE = 2


def environment(folder: Path) -> dict[str, str]:
    """Variables for a training: the entry point of the installed distribution, or one like it."""
    try:
        installed = bool(distribution("cairn-checkpoint").entry_points)
    except PackageNotFoundError:
        installed = False
    ours = environment_with_entry_point(folder / "entry-point")
    if installed:
        ours["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    # Compiled once for all runs: a rank that is killed while compiling leaves a lock that stops all later ones.
    cache = REPOSITORY / ".cache" / "torch-extensions" / f"deepspeed-{version('deepspeed')}"
    ours.setdefault("TORCH_EXTENSIONS_DIR", str(cache))
    return ours


@dataclass(frozen=True)
class Outcome:
    """What the ranks of one run told, and how they ended."""

    statuses: list[int]
    events: list[list[dict[str, Any]]]
    output: str

    def losses(self, rank: int = 0) -> dict[int, str]:
        """Exact loss by step."""
        return {event["step"]: event["loss"] for event in self.events[rank] if "loss" in event}

    def of(self, kind: str, rank: int = 0) -> list[dict[str, Any]]:
        """The events of one kind: ``saved``, ``save_error``, ``loaded``, ``finished``, ..."""
        return [event for event in self.events[rank] if kind in event]


@dataclass
class Trainer:
    """Trainings that share a folder, and so the ``save_dir`` in it."""

    folder: Path
    block: Mapping[str, object] = field(default_factory=dict)
    world_size: int = WORLD_SIZE
    _runs: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._environment = environment(self.folder)

    @property
    def save_dir(self) -> Path:
        """Where all runs save to."""
        return self.folder / "save"

    def start(self, *options: object, block: Mapping[str, object] | None = None) -> Running:
        """Start a run. *block* replaces the trainer's; an empty one leaves Cairn out of the JSON."""
        self._runs += 1
        block = self.block if block is None else block
        stem = self.folder / f"run{self._runs}"
        command = [sys.executable, str(TRAIN), "--events", str(stem), "--save-dir", str(self.save_dir)]
        command += [str(option) for option in options]
        command += ["--block", json.dumps(block)] if block else []
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(self.world_size)}
        processes = []
        for rank in range(self.world_size):
            variables = {**self._environment, **rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with Path(f"{stem}.out{rank}").open("wb") as output:
                processes.append(subprocess.Popen(command, env=variables, stdout=output, stderr=output))
        return Running(stem, processes)

    def run(self, *options: object, block: Mapping[str, object] | None = None, kills: bool = False) -> Outcome:
        """Start a run and wait for its end; every rank must end well unless *kills* says that they are killed."""
        outcome = self.start(*options, block=block).wait()
        expected = -9 if kills else 0
        assert outcome.statuses == [expected] * self.world_size, outcome.output[-6000:]
        return outcome


@dataclass(frozen=True)
class Running:
    """A run in progress."""

    stem: Path
    processes: Sequence[subprocess.Popen[bytes]]

    def events(self, rank: int = 0) -> list[dict[str, Any]]:
        """What *rank* has told so far."""
        path = Path(f"{self.stem}.{rank}")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def alive(self) -> bool:
        """Whether all ranks are running."""
        return all(process.poll() is None for process in self.processes)

    def wait(self) -> Outcome:
        """Wait until all ranks have ended; they are killed when that takes too long, or when one ends badly alone."""
        try:
            for process in self.processes:
                process.wait(RUN_TIMEOUT_S)
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        ranks = range(len(self.processes))
        return Outcome(
            statuses=[process.returncode for process in self.processes],
            events=[self.events(rank) for rank in ranks],
            output="".join(Path(f"{self.stem}.out{rank}").read_text() for rank in ranks),
        )


def block_for(daemon: DaemonProcess, **more: object) -> dict[str, object]:
    """The JSON block that lets a training use *daemon*; every save goes to the bucket."""
    return {"job": "run-7", "runtime_dir": str(daemon.runtime_dir), "persistent_time_interval": 0, **more}


def same_weights(one: Path, other: Path) -> bool:
    """Whether two files of `--weights` hold the same tensors, bit for bit."""
    pairs = zip(torch.load(one), torch.load(other), strict=True)
    return all(torch.equal(left.view(torch.uint8), right.view(torch.uint8)) for left, right in pairs)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def can_protect(folder: Path) -> bool:
    """Whether files can be made immutable here, which is what keeps root from overwriting them through a link."""
    probe = folder / "immutable-probe"
    probe.touch()
    able = OsFileSystem().set_immutable(probe, immutable=True)
    OsFileSystem().set_immutable(probe, immutable=False)
    probe.unlink()
    return able


def unprotect(folder: Path) -> None:
    """Make what a daemon has protected removable."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            OsFileSystem().set_immutable(path, immutable=False)
