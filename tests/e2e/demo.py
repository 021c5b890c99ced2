"""``make demo``: the whole way of a checkpoint, on this machine, in about a minute.

Two ranks train with DeepSpeed (ZeRO-2, CPU) and know nothing of Cairn but a block in their JSON. They are killed and
resume; then the node loses its disk, and they resume on "another node" from the bucket. An uninterrupted training of
the same kind says what the weights have to be; the exit status says whether they are.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from cairnd.cli.main import main as cairn_command
from tests.daemon_process import DaemonProcess
from tests.e2e.trainer import Running, Trainer, block_for, can_protect, same_weights, unprotect

STEPS = 12
FIRST_SAVES = (3, 6)
SECOND_SAVES = (9,)
MODEL = ["--stage", 2, "--width", 1024]
PATIENCE_S = 120.0


class Timeline:
    """Prints what happens, with the seconds since the start, in 80 columns."""

    def __init__(self) -> None:
        self._start_s = time.time()

    def tell(self, text: str, at_s: float | None = None) -> None:
        seconds = (time.time() if at_s is None else at_s) - self._start_s
        print(f"{seconds:6.1f} s  {text}", flush=True)

    def tell_all(self, lines: Iterable[tuple[float, str]]) -> None:
        for at_s, text in sorted(lines):
            self.tell(text, at_s)

    def head(self, text: str) -> None:
        print(f"\n{text}", flush=True)


def daemon_events(daemon: DaemonProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in daemon.log.splitlines() if line.startswith("{")]


def wait_for(what: str, found: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not found():
        if time.monotonic() > deadline_s:
            raise SystemExit(f"demo: {what} did not happen within {PATIENCE_S:g} s")
        time.sleep(0.05)


def copied(daemon: DaemonProcess, version: str, tier: str) -> dict[str, Any] | None:
    """The event with which *version* arrived in *tier*."""
    wanted = {"event": "copy_verified", "version": version, "tier": tier}
    return next((event for event in daemon_events(daemon) if wanted.items() <= event.items()), None)


def size_of(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.glob('*.pt')) / 1e6:.1f} MB"


def kill_all(running: Running) -> None:
    for process in running.processes:
        process.send_signal(signal.SIGKILL)
    running.wait()


def told_of_saves(running: Running, daemon: DaemonProcess, epoch: int) -> list[tuple[float, str]]:
    """What each save cost the training, and when it had arrived where: (time, text) in any order."""
    lines = []
    for number, save in enumerate((event for event in running.events() if "saved" in event), start=1):
        version = f"e{epoch:05d}-s{number:06d}-{save['saved']}"
        folder = daemon.tier1_path / "jobs" / "run-7" / version
        lines.append(
            (save["time"], f"{save['saved']} saved, {size_of(folder)}; training waited {save['stall_s']:.2f} s")
        )
        for tier, where in (("tier1", "on the local disk"), ("tier2", "in the bucket")):
            event = copied(daemon, version, tier)
            if event is not None:
                later = f"{event['time_s'] - save['time']:.2f} s later"
                lines.append((event["time_s"], f"    {save['saved']} is {where}, {later}"))
    return lines


def demonstrate(folder: Path, nodes: ExitStack) -> bool:
    """The demo in *folder*; whether the weights are what they have to be."""
    timeline = Timeline()
    (folder / "bucket").mkdir()
    timeline.head(f"1. An uninterrupted training of {STEPS} steps, without Cairn")
    Trainer(folder / "uninterrupted").run(*MODEL, "--steps", STEPS, "--weights", folder / "expected.pt")
    timeline.tell("done; its weights are what the others have to arrive at")

    trainer = on_node_a(folder, nodes, timeline)
    on_node_b(folder, nodes, timeline, trainer)

    timeline.head("7. The weights")
    equal = same_weights(folder / "expected.pt", folder / "recovered.pt")
    count = sum(tensor.numel() for tensor in torch.load(folder / "recovered.pt"))
    timeline.tell(f"{count:,} parameters: {'the same, bit for bit' if equal else 'DIFFERENT'}")
    return equal


def on_node_a(folder: Path, nodes: ExitStack, timeline: Timeline) -> Trainer:
    """Killed trainers, a killed daemon, and in the end a lost node."""
    settings: dict[str, Any] = {"protect_files": "true"} if can_protect(folder) else {}
    timeline.head("2. The same with Cairn in its JSON, killed after its second save")
    daemon = nodes.enter_context(
        DaemonProcess(
            folder / "node-a", persistent_storage_path=f"file://{folder / 'bucket'}", log_format="json", **settings
        )
    )
    timeline.tell("node A: cairnd is up, with a bucket in a folder")
    trainer = Trainer(folder / "training", block_for(daemon))
    training = trainer.start(*MODEL, "--steps", STEPS, "--save-at", *FIRST_SAVES, "--pause-s", 0.5)
    wait_for("the second save", lambda: sum("saved" in event for event in training.events()) == len(FIRST_SAVES))
    kill_all(training)
    killed = (time.time(), "SIGKILL to all ranks; the daemon goes on alone")
    last = f"e00001-s{len(FIRST_SAVES):06d}-global_step{FIRST_SAVES[-1]}"
    wait_for("the upload", lambda: copied(daemon, last, "tier2"))
    timeline.tell_all([*told_of_saves(training, daemon, epoch=1), killed])

    timeline.head("3. New processes on the same node")
    resume(timeline, trainer, "--steps", 10, "--save-at", *SECOND_SAVES)
    last = f"e00002-s000001-global_step{SECOND_SAVES[-1]}"
    wait_for("the upload", lambda: copied(daemon, last, "tier2"))

    timeline.head("4. What the administrator sees")
    cairn_command(["list", "--runtime-dir", str(daemon.runtime_dir), "--job", "run-7"])

    timeline.head("5. The daemon is killed too, and started again: its memory is empty")
    daemon.restart()
    timeline.tell("node A: cairnd is up again")
    resume(timeline, trainer, "--steps", 11)

    timeline.head("6. Node A is lost, with its disk and the save_dir; node B has only the bucket")
    daemon.kill9()
    unprotect(folder)
    shutil.rmtree(daemon.tier1_path)
    shutil.rmtree(trainer.save_dir)
    timeline.tell("node A is gone")
    return trainer


def on_node_b(folder: Path, nodes: ExitStack, timeline: Timeline, trainer: Trainer) -> None:
    """A new daemon with an empty disk, which shares nothing with the lost node but the bucket."""
    daemon = nodes.enter_context(
        DaemonProcess(folder / "node-b", persistent_storage_path=f"file://{folder / 'bucket'}")
    )
    trainer.block = block_for(daemon)
    timeline.tell("node B: cairnd is up, with an empty disk")
    resume(timeline, trainer, "--steps", STEPS, "--weights", folder / "recovered.pt")


def resume(timeline: Timeline, trainer: Trainer, *options: object) -> None:
    """Train on from the newest checkpoint, and say where it came from."""
    training = trainer.start(*MODEL, "--load-dir", trainer.save_dir, *options)
    outcome = training.wait()
    if any(outcome.statuses):
        raise SystemExit(f"demo: a training failed:\n{outcome.output[-4000:]}")
    (loaded,) = outcome.of("loaded")
    source = next(line.rsplit(" ", 1)[1] for line in outcome.output.splitlines() if ":cairn:loading " in line)
    timeline.tell(f"resumed after step {loaded['step']}, from {source}", loaded["time"])
    for save in outcome.of("saved"):
        timeline.tell(f"{save['saved']} saved; training waited {save['stall_s']:.2f} s", save["time"])


def main() -> int:
    folder = Path(tempfile.mkdtemp(prefix="cairn-demo-"))
    try:
        with ExitStack() as nodes:
            return 0 if demonstrate(folder, nodes) else 1
    finally:
        unprotect(folder)
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
