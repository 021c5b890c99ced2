"""A trainer that does nothing wrong while others attack its daemon."""

from __future__ import annotations

import time
from pathlib import Path

import torch

import cairn
from tests.crash.trainer import DiaryWriter, same, state_of

JOB = "honest"
_PAUSE_S = 0.1


def save_until(runtime_dir: str, diary_path: str, stop: str) -> None:
    """Save, wait for tier 1 and load, again and again until there is a file *stop*; the diary says how it went."""
    torch.set_num_threads(1)
    diary = DiaryWriter(Path(diary_path))
    with cairn.connect(job=JOB, runtime_dir=runtime_dir) as client:
        step = 0
        while not Path(stop).exists():
            step += 1
            tag = f"step{step}"
            try:
                with client.create(tag) as checkpoint:
                    checkpoint.save("model.pt", state_of(tag, "model.pt"))
                client.wait(tag, durability="tier1", timeout=60)
                equal = same(client.load(tag, "model.pt"), state_of(tag, "model.pt"))
                diary.note("saved" if equal else "wrong", tag)
            except cairn.CairnError as error:
                diary.note("failed", f"{tag}: {type(error).__name__}: {error}")
            time.sleep(_PAUSE_S)
