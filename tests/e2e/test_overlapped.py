"""A DeepSpeed training whose JSON asks for overlapped capture is killed, resumes, ends: the losses stay the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import Node
from tests.e2e.trainer import Trainer, block_for, same_weights

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(400)]

WIDTH = 512
"""Wide enough that what a rank saves is copied late."""


@pytest.mark.fault
@pytest.mark.parametrize(
    ("stage", "bf16"),
    [(0, False), (0, True), (1, True), (2, False), (3, True)],
    ids=["zero0", "zero0-bf16", "zero1-bf16", "zero2", "zero3-bf16"],
)
def test_killed_and_resumed(tmp_path: Path, node: Node, trainer: Trainer, stage: int, *, bf16: bool) -> None:
    kind: list[object] = ["--stage", stage, "--width", WIDTH, *(["--bf16"] if bf16 else [])]
    uninterrupted = Trainer(tmp_path / "uninterrupted").run(*kind, "--steps", 6, "--weights", tmp_path / "expected")
    expected = uninterrupted.losses(0), uninterrupted.losses(1)

    trainer.block = block_for(node(), capture="overlapped")
    killed = trainer.run(*kind, "--steps", 6, "--save-at", 1, 2, 3, "--kill-at", 4, kills=True)
    assert killed.losses() == {step: expected[0][step] for step in range(1, 5)}
    assert "are copied while training goes on" in killed.output
    assert "copied at once" not in killed.output
    step = int((trainer.save_dir / "latest").read_text().removeprefix("global_step"))
    assert step >= 2, "each save waits for the one before"

    # The save at the last step has no step after it, and the script destroys the process group before it ends.
    resumed = trainer.run(*kind, "--steps", 5, "--save-at", 5, "--load-dir", trainer.save_dir)
    assert resumed.of("loaded")[0]["step"] >= step
    for rank in range(2):
        assert resumed.losses(rank).items() <= expected[rank].items()
    assert (trainer.save_dir / "latest").read_text() == "global_step5"
    ended = trainer.run(*kind, "--steps", 6, "--load-dir", trainer.save_dir, "--weights", tmp_path / "weights")
    assert ended.of("loaded")[0]["step"] == 5
    assert ended.losses(1) == {6: expected[1][6]}
    assert same_weights(tmp_path / "weights", tmp_path / "expected")


@pytest.mark.fault
@pytest.mark.parametrize(("parallel", "stage"), [("pipeline", 1), ("experts", 2)])
def test_pipelines_and_experts_are_saved_as_without_cairn_and_resume(
    tmp_path: Path, node: Node, trainer: Trainer, parallel: str, stage: int
) -> None:
    kind = ["--parallel", parallel, "--stage", stage, "--width", WIDTH, "--bf16", "--save-at", 1, 2, 3]
    plain = Trainer(tmp_path / "plain")
    expected = plain.run(*kind, "--steps", 4)
    trainer.block = block_for(node(), capture="overlapped", save_dir_files="copy", num_of_version_in_retention=3)
    saved = trainer.run(*kind, "--steps", 3)
    assert "are copied while training goes on" in saved.output
    assert "copied at once" not in saved.output
    assert _files_like(plain.save_dir, trainer.save_dir) >= 3 * 5
    resumed = trainer.run(*kind, "--steps", 4, "--load-dir", trainer.save_dir)
    for rank in range(2):
        assert resumed.of("loaded", rank)[0]["step"] == 3
        assert resumed.losses(rank) == {4: expected.losses(rank)[4]}


def test_a_save_that_fails_on_one_rank_is_raised_on_both_by_the_next(node: Node, trainer: Trainer) -> None:
    trainer.block = block_for(node(), capture="overlapped")
    outcome = trainer.run(
        "--stage", 3, "--width", WIDTH, "--steps", 4, "--save-at", 1, 3, 4, "--poison-at", 2, "--poison-rank", 1
    )
    for rank in range(2):
        (error,) = outcome.of("save_error", rank)
        assert error["step"] == 3
        assert error["save_error"] == "SaveFailedError"
        assert "global_step2 was not committed: rank 1" in error["message"]
    assert (trainer.save_dir / "latest").read_text() == "global_step4"
    assert sorted(path.name for path in trainer.save_dir.glob("global_step*")) == ["global_step1", "global_step4"]


def test_what_is_shown_in_save_dir_is_what_was_saved(tmp_path: Path, node: Node, trainer: Trainer) -> None:
    kind = ["--stage", 2, "--width", WIDTH, "--steps", 3, "--save-at", 1, 2, 3]
    plain = Trainer(tmp_path / "plain")
    plain.run(*kind)
    trainer.block = block_for(node(), capture="overlapped", save_dir_files="copy", num_of_version_in_retention=3)
    trainer.run(*kind)
    assert _files_like(plain.save_dir, trainer.save_dir) == 9


def _files_like(one: Path, other: Path) -> int:
    """How many files *one* has, all of which *other* has with the same tensors."""
    names = sorted(path.relative_to(one) for path in one.glob("*/*.pt"))
    assert names == sorted(path.relative_to(other) for path in other.glob("*/*.pt"))
    for name in names:
        left, right = (torch.load(folder / name, weights_only=False) for folder in (one, other))
        assert _tensors(left, "") == _tensors(right, ""), name
    return len(names)


def _tensors(value: object, path: str) -> list[tuple[str, bytes]]:
    if isinstance(value, torch.Tensor):
        return [(path, value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())]
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in _tensors(item, f"{path}/{key}")]
    if isinstance(value, (list, tuple)):
        return [found for number, item in enumerate(value) for found in _tensors(item, f"{path}/{number}")]
    return []
