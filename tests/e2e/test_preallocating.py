"""A training takes capture memory with its first step, before any save; gives it back; and does without if need be."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from tests.daemon_process import DaemonProcess
from tests.e2e.conftest import Node
from tests.e2e.trainer import Trainer, block_for

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(300)]

HUGE_PAGE_BYTES = 2 << 20
KIND = ["--stage", 2, "--width", 512]
PARTITIONS = 3
"""The model, and the optimizer of each rank; 4 to 7 MiB each."""


def granted_bytes(daemon: DaemonProcess) -> int:
    command = [sys.executable, "-m", "cairnd.cli.main", "status", "--json", "--runtime-dir", str(daemon.runtime_dir)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    return int(json.loads(shown.stdout)["memory_granted_bytes"])


def test_memory_is_taken_with_the_first_step_and_given_back(node: Node, trainer: Trainer) -> None:
    daemon = node()
    trainer.block = block_for(daemon)
    running = trainer.start(*KIND, "--steps", 100_000, "--pause-s", 0.05)
    try:
        deadline_s = time.monotonic() + 60
        while granted_bytes(daemon) < PARTITIONS * 2 * HUGE_PAGE_BYTES:
            assert running.alive(), running.wait().output[-6000:]
            assert time.monotonic() < deadline_s, "no buffers were made"
    finally:
        for process in running.processes:
            process.kill()
            process.wait()
    deadline_s = time.monotonic() + 60
    while granted_bytes(daemon):
        assert time.monotonic() < deadline_s, "memory of a dead training was kept"


def test_a_budget_that_is_too_small_costs_nothing_but_time(node: Node, trainer: Trainer) -> None:
    trainer.block = block_for(node(capture_memory_bytes=2 * HUGE_PAGE_BYTES))
    options = [*KIND, "--steps", 2, "--save-at", 2]
    saved = trainer.run(*options)
    warnings = [line for line in saved.output.splitlines() if "the first saves will be slower" in line]
    assert all(
        "WARNING" in line and "bytes, 1 x the partitions" in line and "capture_memory_bytes" in line
        for line in warnings
    )
    assert len(warnings) == 2, f"one of each rank:\n{saved.output[-6000:]}"
    assert [event["saved"] for event in saved.of("saved")] == ["global_step2"]
    resumed = trainer.run(*KIND, "--steps", 3, "--load-dir", trainer.save_dir)
    assert [bool(event["loaded"]) for event in resumed.of("loaded")] == [True]
