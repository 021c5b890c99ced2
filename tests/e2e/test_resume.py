"""A DeepSpeed training is killed, resumes, loses its disk, resumes: every loss stays the same, bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.daemon_process import DaemonProcess
from tests.e2e.conftest import Node
from tests.e2e.trainer import Trainer, block_for, same_weights, unprotect

READER = Path(__file__).with_name("plain_reader.py")
PERSIST_TIMEOUT_S = 60.0
PLAIN_ENVIRONMENT = {"PATH": os.defpath, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "DS_ACCELERATOR": "cpu"}


def read_without_cairn(*folders: Path) -> str:
    result = subprocess.run(
        [sys.executable, str(READER), *map(str, folders)],
        env=PLAIN_ENVIRONMENT,
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def wait_for_decision(bucket: Path, version: str) -> None:
    """Wait until *version* is published in the bucket."""
    decision = bucket / "run-7" / ".cairn" / "decisions" / f"{version}.json"
    deadline_s = time.monotonic() + PERSIST_TIMEOUT_S
    while not decision.exists():
        assert time.monotonic() < deadline_s, f"{version} did not reach the bucket"
        time.sleep(0.05)


@pytest.mark.deepspeed
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("stage", "bf16"),
    [(0, False), (1, True), (2, False), (3, True)],
    ids=["zero0", "zero1-bf16", "zero2", "zero3-bf16"],
)
def test_killed_and_resumed_from_every_tier(
    tmp_path: Path,
    node: Node,
    trainer: Trainer,
    stage: int,
    protected: bool,
    *,
    bf16: bool,
) -> None:
    kind: list[object] = ["--stage", stage, *(["--bf16"] if bf16 else [])]
    uninterrupted = Trainer(tmp_path / "uninterrupted").run(*kind, "--steps", 8, "--weights", tmp_path / "expected")
    expected = uninterrupted.losses(0), uninterrupted.losses(1)
    assert len(expected[0]) == 8

    daemon = node()
    trainer.block = block_for(daemon, save_dir_files="auto" if protected else "link")
    killed = trainer.run(*kind, "--steps", 8, "--save-at", 2, 4, "--kill-at", 5, kills=True)
    assert killed.losses() == {step: expected[0][step] for step in range(1, 6)}
    assert (trainer.save_dir / "latest").read_text() == "global_step4"

    resumed = trainer.run(
        *kind, "--steps", 6, "--save-at", 6, "--load-dir", trainer.save_dir, "--weights", tmp_path / "step6"
    )
    assert resumed.of("loaded")[0]["step"] == 4
    for rank in range(2):
        assert resumed.losses(rank) == {step: expected[rank][step] for step in (5, 6)}

    # What lies in save_dir and in the bucket is there for programs that know nothing of Cairn.
    version = "e00002-s000001-global_step6"
    shown = trainer.save_dir / "global_step6"
    assert all(file.is_symlink() and daemon.tier1_path in file.resolve().parents for file in shown.glob("*.pt"))
    wait_for_decision(tmp_path / "bucket", version)
    listing = read_without_cairn(shown, tmp_path / "bucket" / "run-7" / version, trainer.save_dir / "global_step4")
    files = {0: 1, 1: 3, 2: 3, 3: 4}[stage]
    assert [line.split()[0] for line in listing.splitlines() if line[0].isdigit()] == [str(files)] * 3
    assert listing.count("Done testing") == 3
    if stage >= 2:
        check_fp32_weights(trainer, tmp_path / "step6")

    # The node is lost, with its disk and save_dir; another one has nothing but the bucket.
    lose(daemon, trainer)
    other = node("other-node")
    trainer.block = block_for(other, save_dir_files="link")
    recovered = trainer.run(*kind, "--steps", 8, "--load-dir", trainer.save_dir, "--weights", tmp_path / "recovered")
    assert recovered.of("loaded")[0]["step"] == 6
    for rank in range(2):
        assert recovered.losses(rank) == {step: expected[rank][step] for step in (7, 8)}
    assert same_weights(tmp_path / "expected", tmp_path / "recovered")
    assert (trainer.save_dir / "latest").read_text() == "global_step6"
    assert len(list((trainer.save_dir / "global_step6").glob("*.pt"))) == files
    if stage == 3:
        # Without optimizer states DeepSpeed reads the shards of all ranks itself, past every checkpoint engine.
        shutil.rmtree(trainer.save_dir)
        trainer.block = block_for(other, save_dir_files="placeholder")
        only_weights = trainer.run(*kind, "--steps", 7, "--load-dir", trainer.save_dir, "--no-optimizer-states")
        assert only_weights.losses()[7] == expected[0][7]


CONVERT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import zero_to_fp32
torch.save(zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(sys.argv[1]), sys.argv[2])
"""
"""The command line of DeepSpeed's script also needs huggingface_hub, to cut the result into pieces."""


def check_fp32_weights(trainer: Trainer, weights: Path) -> None:
    """The script that DeepSpeed leaves in save_dir joins the shards that ``latest`` names."""
    result = subprocess.run(
        [sys.executable, "-c", CONVERT, str(trainer.save_dir), str(trainer.folder / "fp32.pt")],
        env=PLAIN_ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    joined = torch.load(trainer.folder / "fp32.pt")
    parameters = torch.load(weights)
    assert list(joined) == ["0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"]
    assert all(torch.equal(one.to(other.dtype), other) for one, other in zip(joined.values(), parameters, strict=True))


def lose(daemon: DaemonProcess, trainer: Trainer) -> None:
    daemon.kill9()
    unprotect(daemon.tier1_path)
    shutil.rmtree(daemon.tier1_path)
    shutil.rmtree(trainer.save_dir)
