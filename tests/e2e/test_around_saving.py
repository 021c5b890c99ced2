"""DeepSpeed trainings in which something is in the way: one rank, the tag, the daemon, or Cairn itself."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
import torch

import cairn
from tests.daemon_process import DaemonProcess
from tests.e2e.conftest import Node
from tests.e2e.trainer import Running, Trainer, block_for

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(300)]


def saved_tags(daemon: DaemonProcess) -> list[str]:
    """The tags that could be restored, newest first."""
    with cairn.connect(job="run-7", runtime_dir=str(daemon.runtime_dir), world_size=1) as client:
        return [version["version"].split("-", 2)[2] for version in client.versions()]


def contents(folder: Path) -> dict[str, str]:
    """A digest of every partition below *folder*."""
    files = sorted(path for path in folder.rglob("*.pt") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_fails_to_save_and_every_rank_raises(node: Node, trainer: Trainer, rank: int) -> None:
    daemon = node()
    trainer.block = block_for(daemon)
    poisoned = ["--stage", 3, "--steps", 3, "--save-at", 1, 3, "--poison-at", 2, "--poison-rank", rank]
    outcome = trainer.run(*poisoned)
    for events in outcome.events:
        assert [event["saved"] for event in events if "saved" in event] == ["global_step1", "global_step3"]
        (failure,) = [event for event in events if "save_error" in event]
        assert failure["step"] == 2
        assert failure["save_error"] == "SaveFailedError"
        assert f"rank {rank}: " in failure["message"]
        assert "No space left on device (planted)" in failure["message"]
        assert "Next step: " in failure["message"]
    assert saved_tags(daemon) == ["global_step3", "global_step1"]
    assert not (trainer.save_dir / "global_step2").exists()


def test_latest_stays_when_the_last_save_failed(node: Node, trainer: Trainer) -> None:
    trainer.block = block_for(node())
    outcome = trainer.run("--stage", 1, "--steps", 2, "--save-at", 1, "--poison-at", 2)
    assert outcome.of("save_error", rank=1)
    assert (trainer.save_dir / "latest").read_text() == "global_step1"


@pytest.mark.parametrize("validation", ["Warn", "Fail"])
def test_ranks_that_disagree_about_the_tag(node: Node, trainer: Trainer, validation: str) -> None:
    daemon = node()
    trainer.block = block_for(daemon)
    outcome = trainer.run("--steps", 1, "--save-at", 1, "--tag", "best{rank}", "--tag-validation", validation)
    for rank in range(2):
        (failure,) = outcome.of("save_error", rank)
        assert failure["save_error"] == "ConfigurationError"
        assert "'best0'" in failure["message"]
        assert "'best1'" in failure["message"]
    assert saved_tags(daemon) == []


def test_a_plain_checkpoint_is_taken_over_and_given_back(tmp_path: Path, node: Node, trainer: Trainer) -> None:
    expected = Trainer(tmp_path / "uninterrupted").run("--stage", 1, "--steps", 5).losses()
    trainer.run("--stage", 1, "--steps", 2, "--save-at", 2)
    before = contents(trainer.save_dir)

    # Cairn meets a save_dir that plain DeepSpeed wrote: the first act of everybody who migrates.
    daemon = node()
    trainer.block = block_for(daemon, save_dir_files="copy")
    there = trainer.run(
        "--stage", 1, "--steps", 4, "--save-at", 4, "--save-16bit-at", 3, "--load-dir", trainer.save_dir
    )
    assert there.of("loaded")[0]["step"] == 2
    assert there.losses() == {step: expected[step] for step in (3, 4)}
    assert saved_tags(daemon) == ["global_step4"], "save_16bit_model makes a file, not a version"
    weights = torch.load(trainer.save_dir / "pytorch_model.bin", weights_only=True)
    assert sorted(weights) == ["0.bias", "0.weight", "2.bias", "2.weight", "3.bias", "3.weight"]
    assert before.items() <= contents(trainer.save_dir).items(), "what plain DeepSpeed saved is as it was"

    # A tag that Cairn does not know but that lies there as plain files can be asked for by name; another one cannot.
    old = trainer.run("--stage", 1, "--steps", 3, "--load-dir", trainer.save_dir, "--load-tag", "global_step2")
    assert old.losses() == {3: expected[3]}
    missing = trainer.start("--stage", 1, "--steps", 3, "--load-dir", trainer.save_dir, "--load-tag", "global_step3")
    for event in missing.wait().events:
        assert event[-1]["load_error"] == "VersionError"
        assert "global_step3" in event[-1]["message"]
        assert "global_step4" in event[-1]["message"]

    # And back again: loading can be switched off, and so can Cairn, with the daemon gone.
    daemon.kill9()
    back = trainer.run("--stage", 1, "--steps", 5, "--load-dir", trainer.save_dir, block={})
    assert back.of("loaded")[0]["step"] == 4
    assert back.losses() == {5: expected[5]}


def test_enable_load_false_reads_plain_paths_only(node: Node, trainer: Trainer) -> None:
    daemon = node()
    trainer.block = block_for(daemon)
    trainer.run("--steps", 2, "--save-at", 2)
    loaded = trainer.run(
        "--steps", 2, "--load-dir", trainer.folder / "nowhere", block=block_for(daemon, enable_load=False)
    )
    assert loaded.of("loaded")[0]["loaded"] is None
    assert not (trainer.folder / "nowhere").exists()
    # Without the setting the job's newest version is found, wherever it was saved from.
    loaded = trainer.run("--steps", 2, "--load-dir", trainer.folder / "elsewhere")
    assert loaded.of("loaded")[0]["step"] == 2
    assert (trainer.folder / "elsewhere" / "latest").read_text() == "global_step2"


def test_a_tag_saved_again_without_cairn_leaves_tier1_alone(
    node: Node,
    trainer: Trainer,
    protected: bool,
) -> None:
    if not protected:
        pytest.skip("as root, only on a file system with immutable files can links be safe (and else none are made)")
    daemon = node()
    trainer.block = block_for(daemon)
    trainer.run("--stage", 1, "--steps", 2, "--save-at", 2, "--tag", "best")
    before = contents(daemon.tier1_path)
    assert len(before) == 3
    assert all(file.is_symlink() for file in (trainer.save_dir / "best").glob("*.pt"))

    plain = trainer.start("--stage", 1, "--steps", 3, "--save-at", 3, "--tag", "best", block={}).wait()
    assert not plain.of("saved"), "plain DeepSpeed cannot write through the links"
    assert contents(daemon.tier1_path) == before

    # Saved again with Cairn: a new version, and save_dir shows that one.
    again = trainer.run("--stage", 1, "--steps", 4, "--save-at", 4, "--tag", "best", "--load-dir", trainer.save_dir)
    assert again.of("loaded")[0]["step"] == 2
    assert before.items() <= contents(daemon.tier1_path).items()
    state = torch.load(trainer.save_dir / "best" / "mp_rank_00_model_states.pt", weights_only=False)
    assert state["step"] == 4


def test_the_daemon_is_killed_while_a_training_runs(node: Node, trainer: Trainer) -> None:
    daemon = node()
    trainer.block = block_for(daemon)
    running = trainer.start("--stage", 2, "--steps", 6, "--save-at", *range(1, 7), "--pause-s", 0.5)
    wait_for_saves(running, 2)
    daemon.restart()
    outcome = running.wait()
    assert outcome.statuses == [0, 0], outcome.output[-4000:]
    assert [event["saved"] for event in outcome.of("saved")] == [f"global_step{step}" for step in range(1, 7)]
    resumed = trainer.run("--stage", 2, "--steps", 6, "--load-dir", trainer.save_dir)
    assert resumed.of("loaded")[0]["step"] == 6


def test_all_ranks_die_right_after_commit_and_the_version_is_finished(
    tmp_path: Path, node: Node, trainer: Trainer
) -> None:
    trainer.block = block_for(node())
    trainer.run("--stage", 2, "--steps", 1, "--save-at", 1, "--kill-at", 1, kills=True)
    decision = tmp_path / "bucket" / "run-7" / ".cairn" / "decisions" / "e00001-s000001-global_step1.json"
    deadline_s = time.monotonic() + 60
    while not decision.exists():
        assert time.monotonic() < deadline_s, "the version did not reach the bucket without its trainers"
        time.sleep(0.05)


def test_without_a_daemon_the_training_does_not_start(tmp_path: Path) -> None:
    alone = Trainer(tmp_path / "alone", {"job": "run-7", "runtime_dir": str(tmp_path), "connect_timeout_s": 0.2})
    outcome = alone.start("--steps", 1).wait()
    # Which status is torch's affair: with its traceback printed, a rank whose peer is gone first may abort at exit.
    assert all(outcome.statuses), outcome.output[-6000:]
    for rank in range(2):
        assert any(f"[rank{rank}]: " in line and "UnavailableError" in line for line in outcome.output.splitlines())
    assert "systemctl start cairnd" in outcome.output
    assert not outcome.of("loss")


def wait_for_saves(running: Running, number: int) -> None:
    deadline_s = time.monotonic() + 60
    while sum("saved" in event for event in running.events()) < number:
        assert running.alive(), "a rank has ended"
        assert time.monotonic() < deadline_s, "no saves"
        time.sleep(0.05)
