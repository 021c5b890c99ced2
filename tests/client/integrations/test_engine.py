"""The checkpoint engine called as DeepSpeed calls it, against a real daemon; one rank, no training."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cairn.settings import ClientSettings, load_settings
from cairn_api.errors import ConfigurationError, SaveFailedError, UnavailableError, VersionError
from tests.daemon_process import DaemonProcess

pytestmark = [
    pytest.mark.deepspeed,
    # What DeepSpeed and torch say to each other while they are imported is not ours to mend.
    pytest.mark.filterwarnings("default"),
]

Make = Callable[..., Any]


@pytest.fixture
def make(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes engines as the wrapped factory of DeepSpeed does; clients made meanwhile are closed at the end."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from cairn.integrations.deepspeed import jobs  # noqa: PLC0415 - imports DeepSpeed, which takes seconds
    from cairn.integrations.deepspeed.factory import make_engine  # noqa: PLC0415 - likewise

    def made(**block: object) -> Any:
        defaults = {"job": "run-7", "runtime_dir": str(daemon.runtime_dir), "save_dir_files": "link"}
        return make_engine(None, {**defaults, **block}, lambda: "plain")

    yield made
    for job in jobs._JOBS.values():
        job.client.close()
    jobs._JOBS.clear()


def info(save_dir: Path, tag: str = "global_step1") -> SimpleNamespace:
    """What DeepSpeed passes to ``create`` and ``commit``."""
    return SimpleNamespace(tag=tag, save_dir=str(save_dir), save_latest=True)


def save(engine: Any, save_dir: Path, tag: str = "global_step1", **states: object) -> None:
    """The calls of ``save_checkpoint`` on one rank."""
    engine.create(info(save_dir, tag))
    engine.makedirs(str(save_dir / tag), exist_ok=True)
    for name, state in states.items():
        engine.save(state_dict=state, path=os.path.join(save_dir, tag, f"{name}.pt"))  # noqa: PTH118 - as DeepSpeed does
    assert engine.commit(info(save_dir, tag)) is True


def saved(engine: Any, save_dir: Path) -> list[str]:
    """The tags of the job, newest first."""
    from cairn.integrations.deepspeed.jobs import job_for  # noqa: PLC0415 - as above

    return [item["version"].split("-", 2)[2] for item in job_for(engine.settings, str(save_dir)).client.versions()]


def test_what_was_saved_can_be_read_at_once_and_later(make: Make, tmp_path: Path) -> None:
    engine = make()
    state = {"weight": torch.arange(1000.0), "epoch": 3}
    save(engine, tmp_path, model=state)
    state["weight"].zero_()  # type: ignore[attr-defined]  # a tensor
    path = tmp_path / "global_step1" / "model.pt"
    loaded = engine.load(str(path))
    assert torch.equal(loaded["weight"], torch.arange(1000.0))
    deadline_s = time.monotonic() + 60
    while not path.is_symlink():
        assert time.monotonic() < deadline_s, "no link appeared"
        time.sleep(0.05)
    assert engine.load(str(path), map_location="cpu")["epoch"] == 3
    assert torch.load(path)["epoch"] == 3


def test_the_folder_of_a_tag_appears_with_the_commit_and_not_before(make: Make, tmp_path: Path) -> None:
    engine = make()
    engine.create(info(tmp_path))
    engine.makedirs(str(tmp_path / "global_step1"), exist_ok=True)
    engine.save({"x": 1}, str(tmp_path / "global_step1" / "model.pt"))
    assert not (tmp_path / "global_step1").exists()
    engine.makedirs(str(tmp_path / "other" / "folder"), exist_ok=True)
    assert (tmp_path / "other" / "folder").is_dir()
    engine.commit(info(tmp_path))
    assert (tmp_path / "global_step1" / "model.pt").is_file()


def test_a_save_of_nothing_makes_no_version(make: Make, tmp_path: Path) -> None:
    engine = make()
    save(engine, tmp_path)
    assert saved(engine, tmp_path) == []
    assert list(tmp_path.glob("global_step1*")) == []


def test_a_path_outside_the_tag_becomes_a_real_file(make: Make, tmp_path: Path) -> None:
    engine = make()
    engine.create(info(tmp_path))
    engine.save({"x": torch.ones(3)}, str(tmp_path / "pytorch_model.bin"))
    engine.commit(info(tmp_path))
    assert torch.equal(torch.load(tmp_path / "pytorch_model.bin")["x"], torch.ones(3))
    assert saved(engine, tmp_path) == []


def test_a_real_file_that_cannot_be_written_fails_in_commit(make: Make, tmp_path: Path) -> None:
    engine = make()
    (tmp_path / "pytorch_model.bin").write_text("the previous one")
    engine.create(info(tmp_path))
    engine.save({"x": 1}, str(tmp_path / "global_step1" / "model.pt"))
    engine.save(lambda: None, str(tmp_path / "pytorch_model.bin"))
    with pytest.raises(SaveFailedError, match="pickle"):
        engine.commit(info(tmp_path))
    assert (tmp_path / "pytorch_model.bin").read_text() == "the previous one"
    assert saved(engine, tmp_path) == []
    save(engine, tmp_path, model={"x": 2})
    assert saved(engine, tmp_path) == ["global_step1"]


def test_a_partition_that_cannot_be_saved_fails_in_commit(make: Make, tmp_path: Path) -> None:
    engine = make()
    engine.create(info(tmp_path))
    engine.save({"x": lambda: None}, str(tmp_path / "global_step1" / "model.pt"))
    engine.save({"x": 1}, str(tmp_path / "global_step1" / "optimizer.pt"))
    with pytest.raises(SaveFailedError, match="e00001-s000001-global_step1 was not committed"):
        engine.commit(info(tmp_path))
    assert saved(engine, tmp_path) == []
    assert not (tmp_path / "global_step1").exists()


def test_a_save_that_was_left_open_is_aborted_by_the_next(make: Make, tmp_path: Path) -> None:
    engine = make()
    engine.create(info(tmp_path, "abandoned"))
    engine.save({"x": 1}, str(tmp_path / "abandoned" / "model.pt"))
    save(engine, tmp_path, model={"x": 2})
    assert saved(engine, tmp_path) == ["global_step1"]


def test_a_commit_that_ranks_cannot_agree_on_ends_the_save_with_that_reason(
    make: Make, tmp_path: Path, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cairn.integrations.deepspeed.jobs import job_for  # noqa: PLC0415 - imports DeepSpeed

    engine = make()
    ranks = job_for(engine.settings, str(tmp_path)).client.ranks
    gather = type(ranks).all_gather

    def gone(self: Any, step: str, value: Any, timeout_s: float) -> Any:
        if step.startswith("saved for"):
            raise UnavailableError("rank 1 is gone (planted)", hint="start it again")
        return gather(self, step, value, timeout_s)

    monkeypatch.setattr(type(ranks), "all_gather", gone)
    with pytest.raises(UnavailableError, match="planted"):
        save(engine, tmp_path, "first", model={"x": 1})
    monkeypatch.undo()
    save(engine, tmp_path, model={"x": 2})
    assert saved(engine, tmp_path) == ["global_step1"]
    aborted = [line for line in daemon.log.splitlines() if "version_aborted" in line]
    assert [line for line in aborted if "rank 1 is gone (planted)" in line] == aborted
    assert len(aborted) == 1


def test_commit_must_follow_its_own_create(make: Make, tmp_path: Path) -> None:
    engine = make()
    with pytest.raises(ConfigurationError, match="without a create"):
        engine.commit(info(tmp_path))


def test_older_deepspeed_passes_the_tag_alone(make: Make, tmp_path: Path) -> None:
    from cairn.integrations.deepspeed.engine import Call  # noqa: PLC0415 - imports DeepSpeed

    engine = make()
    with pytest.raises(ConfigurationError, match="where 'best' is saved to is not known"):
        engine.create("best")
    with engine.during(Call(str(tmp_path), save_latest=True)):
        engine.create("best")
        engine.save({"x": 1}, str(tmp_path / "best" / "model.pt"))
        engine.commit("best")
    assert saved(engine, tmp_path) == ["best"]
    assert (tmp_path / "latest").read_text() == "best"


def test_a_call_that_fails_leaves_no_open_save(make: Make, tmp_path: Path) -> None:
    from cairn.integrations.deepspeed.engine import Call  # noqa: PLC0415 - imports DeepSpeed

    engine = make()
    with pytest.raises(AssertionError, match="tags differ"), engine.during(Call(str(tmp_path), save_latest=True)):
        engine.create(info(tmp_path, "best"))
        raise AssertionError("tags differ")  # as DeepSpeed does with tag_validation Fail, after create
    with pytest.raises(ConfigurationError, match="without a create"):
        engine.commit(info(tmp_path, "best"))
    assert saved(engine, tmp_path) == []
    assert not (tmp_path / "latest").exists()


def test_a_save_left_out_for_lack_of_a_buffer_does_not_move_latest(make: Make, tmp_path: Path) -> None:
    from cairn.integrations.deepspeed.engine import Call  # noqa: PLC0415 - imports DeepSpeed

    engine = make(buffers=1, when_no_buffer="skip")
    large = {"x": torch.zeros(100_000_000)}  # takes the daemon long enough to write that the next save finds no buffer
    for tag in ("first", "second"):
        with engine.during(Call(str(tmp_path), save_latest=True)):
            save(engine, tmp_path, tag, model=large)
    assert (tmp_path / "latest").read_text() == "first"
    assert not (tmp_path / "second").exists()
    assert saved(engine, tmp_path) == ["first"]


def test_a_lost_save_dir_or_a_file_of_a_lost_folder(make: Make, tmp_path: Path) -> None:
    engine = make()
    save(engine, tmp_path / "save", model={"x": 1})
    shutil.rmtree(tmp_path / "save" / "global_step1")
    with pytest.raises(FileNotFoundError):
        engine.load(str(tmp_path / "save" / "global_step1" / "model.pt"))


def test_a_placeholder_out_of_place_says_so(make: Make, tmp_path: Path) -> None:
    engine = make(save_dir_files="placeholder")
    save(engine, tmp_path, model={"x": 1})
    moved = tmp_path / "moved.pt"
    shutil.copy(tmp_path / "global_step1" / "model.pt", moved)
    with pytest.raises(ConfigurationError, match="the marker beside it is missing"):
        engine.load(str(moved))
    with pytest.raises(ConfigurationError, match="enable_load is false"):
        make(enable_load=False, job="other").load(str(tmp_path / "global_step1" / "model.pt"))
    with pytest.raises(VersionError, match="job other cannot reach"):
        make(job="other").load(str(tmp_path / "global_step1" / "model.pt"))


def test_a_job_without_a_name_gets_one_from_its_folder(make: Make, tmp_path: Path) -> None:
    from cairn.integrations.deepspeed.jobs import derived_job  # noqa: PLC0415 - imports DeepSpeed

    engine = make(job=None)
    folder = tmp_path / "Llama 7b, run №3"
    save(engine, folder, model={"x": 1})
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert derived_job(str(link)) == derived_job(f"{folder}/.")
    assert derived_job(str(folder)).startswith("Llama-7b-run-3-")
    assert derived_job("/") != derived_job("/...")
    assert saved(engine, folder) == ["global_step1"]


def test_blocks_that_are_wrong_or_off(make: Make, daemon: DaemonProcess) -> None:
    from cairn.integrations.deepspeed.factory import make_engine  # noqa: PLC0415 - imports DeepSpeed

    assert make(enabled=False) == "plain"
    with pytest.raises(ConfigurationError, match=r"unknown key 'persistant_time_interval'.*'persistent_time_interval'"):
        make(persistant_time_interval=1)
    with pytest.raises(ConfigurationError, match=r'"cairn": \{"enabled": true\}'):
        make_engine(None, True, lambda: "plain")
    with pytest.raises(UnavailableError, match="systemctl start cairnd"):
        make(runtime_dir=str(daemon.runtime_dir / "elsewhere"), connect_timeout_s=0.1)


def test_deepspeeds_own_pickle_policy_is_the_default(make: Make, tmp_path: Path) -> None:
    engine = make()
    save(engine, tmp_path, model={"path": tmp_path})
    assert engine.load(str(tmp_path / "global_step1" / "model.pt")) == {"path": tmp_path}
    strict = make(weights_only=True)
    with pytest.raises(ConfigurationError, match="weights_only"):
        strict.load(str(tmp_path / "global_step1" / "model.pt"))


def test_the_same_file_twice_in_a_row_costs_one_read_and_gives_private_containers(make: Make, tmp_path: Path) -> None:
    from cairn.integrations.deepspeed import restoring  # noqa: PLC0415 - imports DeepSpeed

    engine = make()
    save(engine, tmp_path, model={"module": {"w": torch.ones(4)}, "mp_world_size": 1})
    path = str(tmp_path / "global_step1" / "model.pt")
    loading = restoring.choose(engine.settings, str(tmp_path), None, whole=False)
    assert loading is not None
    with engine.loading(loading):
        first = engine.load(path)
        first["module"].clear()
        second = engine.load(path, map_location=lambda storage, location: storage)  # noqa: ARG005 - as DeepSpeed does
        assert torch.equal(second["module"]["w"], torch.ones(4))
        assert second["module"]["w"].data_ptr() != engine.load(path)["module"]["w"].data_ptr()
        assert loading.load(str(tmp_path / "elsewhere" / "model.pt"), None) is None
        assert loading.load(str(tmp_path / "global_step1" / "notes.pt"), None) is None


def test_what_each_rank_reads() -> None:
    from cairn.choice import Candidate, Part  # noqa: PLC0415 - beside the other
    from cairn.integrations.deepspeed.restoring import read_by_rank  # noqa: PLC0415 - imports DeepSpeed
    from cairn_api.names import VersionId  # noqa: PLC0415 - beside the other

    def candidate(*parts: tuple[str, int]) -> Candidate:
        held = {name: Part(name, name.rpartition("/")[2], rank, 1) for name, rank in parts}
        return Candidate(VersionId(1, 1, "t"), "n", 2, "/s", file_marks=True, parts=held)

    zero2 = candidate(
        ("mp_rank_00_model_states.pt", 0),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", 0),
        ("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", 1),
    )
    assert read_by_rank(zero2, 0) == {"mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"}
    assert read_by_rank(zero2, 1) == {"mp_rank_00_model_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"}
    assert read_by_rank(zero2, 2) == {"mp_rank_00_model_states.pt"}
    node_local = candidate(("mp_rank_00_model_states.pt", 0), ("by-rank/1/mp_rank_00_model_states.pt", 1))
    assert read_by_rank(node_local, 0) == {"mp_rank_00_model_states.pt"}
    assert read_by_rank(node_local, 1) == {"by-rank/1/mp_rank_00_model_states.pt"}
    assert read_by_rank(node_local, 5) == {"mp_rank_00_model_states.pt"}


def test_a_training_that_cannot_be_measured_goes_on(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make()
    with caplog.at_level("INFO", "cairn"):
        engine.prepare(object())
        engine.prepare(object())
    (message,) = [record.message for record in caplog.records if "ahead" in record.message]
    assert "the first save will be slower: AttributeError" in message
    save(engine, tmp_path, model={"x": 1})


def test_the_settings_of_the_block_and_of_the_environment(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAIRN_BUFFERS", "3")
    settings: ClientSettings = make(buffers=2, persistent_storage_path=None).settings
    assert settings.buffers == 3
    assert settings == load_settings(
        {}, os.environ,
        {"job": "run-7", "runtime_dir": settings.runtime_dir, "save_dir_files": "link", "weights_only": False},
    )  # fmt: skip
