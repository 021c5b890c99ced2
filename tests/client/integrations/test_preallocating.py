"""The first save of a DeepSpeed training finds its buffers made: of its partitions, of their size, and no more."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.client.integrations.entry_point import REPOSITORY
from tests.daemon_process import DaemonProcess
from tests.e2e.trainer import environment

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(200)]

TRAINING = REPOSITORY / "tests" / "client" / "integrations" / "preallocating_training.py"
WASTE_LIMIT = 1.3
HUGE_PAGE_BYTES = 2 << 20


def first_save(
    folder: Path, daemon: DaemonProcess, *, ranks: int = 2, stage: int = 0, bf16: bool = False, pipeline: bool = False,
    **block: object,
) -> list[dict[str, Any]]:  # fmt: skip
    """What each rank of a training tells about its first save."""
    block = {"job": "run-7", "runtime_dir": str(daemon.runtime_dir), "save_dir_files": "placeholder", **block}
    options = {"stage": stage, "bf16": bf16, "pipeline": pipeline, "save_dir": str(folder / "save"), "block": block}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {**environment(folder), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    variables["PYTHONPATH"] += f":{REPOSITORY}"
    processes = [
        subprocess.Popen(
            [sys.executable, str(TRAINING), json.dumps(options)], text=True,
            env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    lines = [[line for line in output.splitlines() if line.startswith("told: ")] for output in outputs]
    assert all(lines), "\n".join(outputs)[-6000:]
    return [json.loads(line.removeprefix("told: ")) for (line,) in lines]


def check_made_ahead(told: dict[str, Any]) -> None:
    assert told["before_training"] == 0, "a training that takes no step holds no memory"
    assert set(told["held"]) == set(told["sizes"])
    made: dict[str, tuple[str, int]] = told["made_ahead"]
    assert sorted(name for name, _ in made.values()) == sorted(told["sizes"])
    for partition, buffer in told["held"].items():
        assert buffer in made, f"the first save made a buffer for {partition} itself"
        name, size_bytes = made[buffer]
        assert name == partition
        assert size_bytes <= WASTE_LIMIT * told["sizes"][partition] + HUGE_PAGE_BYTES
    assert told["streamed"] == 0


@pytest.mark.parametrize(
    ("stage", "bf16", "files"),
    [(0, False, (1, 0)), (0, True, (1, 0)), (1, True, (2, 1)), (2, False, (2, 1)), (3, True, (2, 2))],
    ids=["zero0", "zero0-bf16", "zero1-bf16", "zero2", "zero3-bf16"],
)
def test_the_first_save_makes_no_buffer(
    tmp_path: Path, daemon: DaemonProcess, stage: int, *, bf16: bool, files: tuple[int, int]
) -> None:
    ranks = first_save(tmp_path, daemon, stage=stage, bf16=bf16)
    assert tuple(len(told["sizes"]) for told in ranks) == files
    for told in ranks:
        check_made_ahead(told)


def test_nor_does_a_pipeline_or_an_overlapped_save(tmp_path: Path, daemon: DaemonProcess) -> None:
    (told,) = first_save(tmp_path / "pipeline", daemon, ranks=1, stage=1, pipeline=True)
    assert len(told["sizes"]) == 5
    check_made_ahead(told)
    (told,) = first_save(tmp_path / "overlapped", daemon, ranks=1, stage=2, capture="overlapped")
    check_made_ahead(told)


def test_nothing_is_made_ahead_of_byte_streams_or_without_a_job(tmp_path: Path, daemon: DaemonProcess) -> None:
    (told,) = first_save(tmp_path / "streamed", daemon, ranks=1, transport="stream")
    assert (told["made_ahead"], told["streamed"]) == ({}, 1)
    (told,) = first_save(tmp_path / "unnamed", daemon, ranks=1, job=None)
    assert told["made_ahead"] == {}
    assert len(told["held"]) == 1
