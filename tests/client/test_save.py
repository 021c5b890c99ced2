"""One save after another against a real daemon."""

from __future__ import annotations

import time
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import cairn
from cairn.save import Checkpoint
from tests.client.conftest import Connect
from tests.daemon_process import DaemonProcess

WEIGHT = torch.arange(300_000, dtype=torch.float32)
STATE = {"weight": WEIGHT, "step": 7}


def same(loaded: Any) -> bool:
    return torch.equal(loaded["weight"], WEIGHT) and loaded["step"] == 7


def saved(client: cairn.Client, tag: str, **states: object) -> Checkpoint:
    with client.create(tag) as checkpoint:
        for name, state in (states or {"model.pt": STATE}).items():
            checkpoint.save(name, state)
    return checkpoint


def files(daemon: DaemonProcess, name: str) -> list[Path]:
    return sorted(daemon.tier1_path.rglob(name))


@pytest.mark.parametrize("transport", ["auto", "shm", "stream"])
def test_each_transport_stores_a_plain_torch_file(daemon: DaemonProcess, connect: Connect, transport: str) -> None:
    client = connect(transport=transport)
    assert client.latest() is None
    version = saved(client, "step1").version
    assert version == cairn.VersionId(1, 1, "step1")
    assert client.wait("step1", "tier1", 20) == client.wait(version, "tier2", 20) == version
    for root in (daemon.tier1_path, daemon.bucket_path):
        (path,) = root.rglob("model.pt")
        assert same(torch.load(path, weights_only=True))
        assert zipfile.ZipFile(path).testzip() is None
    assert same(client.load("step1", "model.pt"))
    assert client.latest() == version
    assert client.statistics()["streamed_partitions"] == (1 if transport == "stream" else 0)


def test_changing_the_tensors_after_save_changes_nothing(connect: Connect) -> None:
    client = connect()
    weight = WEIGHT.clone()
    with client.create("step1") as checkpoint:
        checkpoint.save("model.pt", {"weight": weight, "step": 7})
        weight.zero_()
    assert same(client.load("step1", "model.pt"))


def test_buffers_are_reused_and_their_sizes_may_change(connect: Connect) -> None:
    client = connect(buffers=2)
    for number in range(6):
        state = {"weight": torch.full((1000 * (1 + number * 700),), float(number))}
        saved(client, f"step{number}", **{"model.pt": state, "scalars.pt": {"step": number}})
        loaded = client.load(f"step{number}", "model.pt")
        assert torch.equal(loaded["weight"], state["weight"])
        assert client.load(f"step{number}", "scalars.pt") == {"step": number}


def test_a_saved_state_survives_its_buffers_being_reused(connect: Connect) -> None:
    client = connect(buffers=1)
    saved(client, "first", **{"model.pt": {"x": torch.zeros(100_000)}})
    loaded = client.load("first", "model.pt")["x"]
    for number in range(3):
        saved(client, f"later{number}", **{"model.pt": {"x": torch.ones(100_000)}})
    assert not loaded.any()


def test_an_exception_in_the_block_aborts_and_passes_through(connect: Connect) -> None:
    client = connect()
    with pytest.raises(ZeroDivisionError), client.create("step1") as checkpoint:
        checkpoint.save("model.pt", STATE)
        raise ZeroDivisionError
    assert client.latest() is None
    assert saved(client, "step1").version == cairn.VersionId(1, 2, "step1"), "a sequence number is never given twice"
    assert client.statistics()["failed_saves"] == 1


def test_a_failing_save_is_raised_at_once_or_by_commit(connect: Connect) -> None:
    client = connect()
    with pytest.raises(Exception, match="pickle") as raised, client.create("step1") as checkpoint:
        checkpoint.save("model.pt", {"bad": lambda: None})
    assert isinstance(raised.value, cairn.ConfigurationError)
    checkpoint = client.create("step2", raise_immediately=False)
    checkpoint.save("model.pt", {"bad": lambda: None})
    checkpoint.save("other.pt", STATE)
    assert checkpoint.failure is not None
    with pytest.raises(cairn.SaveFailedError, match="step2 was not committed"):
        checkpoint.commit()
    assert client.latest() is None
    saved(client, "step3")
    assert same(client.load("step3", "model.pt"))


@pytest.mark.parametrize("tag", ["../x", "", "a/b", ".hidden", "x" * 129])
def test_a_bad_tag_is_refused_and_names_the_rule(connect: Connect, tag: str) -> None:
    client = connect()
    with pytest.raises(cairn.ConfigurationError, match="is not allowed"):
        client.create(tag)
    assert saved(client, "good").version is not None


def test_a_bad_or_repeated_partition_name_is_refused(connect: Connect) -> None:
    client = connect()
    for names in (["../model.pt"], ["model.pt", "model.pt"]):
        with pytest.raises(cairn.ConfigurationError), client.create("step1") as checkpoint:
            for name in names:
                checkpoint.save(name, STATE)
    assert client.latest() is None


def test_a_checkpoint_that_ended_takes_nothing_more(connect: Connect) -> None:
    checkpoint = saved(connect(), "step1")
    for call in (lambda: checkpoint.save("more.pt", STATE), checkpoint.commit):
        with pytest.raises(cairn.ConfigurationError, match="has ended"):
            call()


def test_a_save_left_open_is_aborted_by_the_next(connect: Connect) -> None:
    client = connect()
    left = client.create("left")
    left.save("model.pt", STATE)
    saved(client, "next")
    with pytest.raises(cairn.ConfigurationError, match="has ended"):
        left.commit()
    assert [item["version"] for item in client.versions()] == ["e00001-s000002-next"]


def test_an_empty_save_is_refused(connect: Connect) -> None:
    client = connect()
    with pytest.raises(cairn.ConfigurationError, match="saved anything"), client.create("empty"):
        pass
    assert client.latest() is None
    saved(client, "step1")


def test_the_first_save_warns_of_what_a_safe_load_would_refuse(connect: Connect) -> None:
    client = connect()
    with pytest.warns(UserWarning, match=r"pathlib\.\w+.*weights_only=False"):
        saved(client, "step1", **{"model.pt": {"path": Path("/x"), "ok": OrderedDict(a=1)}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved(client, "step2", **{"model.pt": {"path": Path("/x")}})
    with pytest.raises(cairn.ConfigurationError, match="pathlib"):
        client.load("step2", "model.pt")
    assert client.load("step2", "model.pt", weights_only=False) == {"path": Path("/x")}


def test_epochs_count_launches_and_a_job_is_fenced_by_its_successor(connect: Connect) -> None:
    first = connect()
    saved(first, "a")
    first.wait("a", "tier2", 20)
    second = connect()
    assert saved(second, "a").version == cairn.VersionId(2, 1, "a")
    with pytest.raises(cairn.ConfigurationError, match=r"newer launch \(epoch 2\)"):
        first.create("b")
    assert str(second.latest()) == "e00002-s000001-a"


def test_waiting_for_what_does_not_exist(connect: Connect) -> None:
    client = connect()
    with pytest.raises(cairn.VersionError, match="no version of 'nothing'"):
        client.wait("nothing", "tier1", 1)
    with pytest.raises(cairn.ConfigurationError, match="no durability 'disk'"):
        client.wait("nothing", "disk", 1)


@pytest.mark.parametrize("durability", ["tier1", "tier2"])
def test_commit_waits_for_the_durability_that_is_set(daemon: DaemonProcess, connect: Connect, durability: str) -> None:
    client = connect(commit_durability=durability)
    saved(client, "step1")
    root = daemon.tier1_path if durability == "tier1" else daemon.bucket_path
    (path,) = root.rglob("model.pt")
    assert same(torch.load(path, weights_only=True))


def test_a_closed_client_says_so(connect: Connect) -> None:
    client = connect()
    client.close()
    client.close()
    for call in (lambda: client.create("x"), client.latest, lambda: client.wait("x")):
        with pytest.raises(cairn.ConfigurationError, match="closed"):
            call()


LARGE = torch.arange(4_000_000, dtype=torch.float32)


class TestSmallMemory:
    """A daemon that grants 8 MiB."""

    @pytest.fixture
    def daemon(self, tmp_path: Path) -> Any:
        with DaemonProcess(tmp_path / "node", capture_memory_bytes=8 << 20) as process:
            yield process

    def test_a_state_larger_than_the_grant_is_streamed(self, connect: Connect) -> None:
        client = connect()
        with pytest.warns(UserWarning, match="goes as a byte stream.*8388608.*Next step: raise") as warned:
            saved(client, "large", **{"model.pt": {"weight": LARGE}, "small.pt": {"x": 1}})
        assert torch.equal(client.load("large", "model.pt")["weight"], LARGE)
        assert client.statistics()["streamed_partitions"] == 1
        assert not [warning for warning in warned if "oversize" in str(warning.message)]  # it streams already

    def test_a_budget_for_one_buffer_is_used_by_one_save_after_the_other(self, connect: Connect) -> None:
        client = connect(oversize="fail", buffers=2)
        state = {"weight": torch.ones(1_250_000)}  # 5 MB of the 8 MiB that are granted
        for number in range(4):
            state["weight"].fill_(number)
            saved(client, f"step{number}", **{"model.pt": state})
        assert torch.equal(client.load("step3", "model.pt")["weight"], torch.full((1_250_000,), 3.0))
        assert client.statistics()["streamed_partitions"] == 0

    def test_or_fails_with_the_sizes(self, connect: Connect) -> None:
        client = connect(oversize="fail")
        with pytest.raises(cairn.OverloadedError, match=r'1677\d+ bytes does not fit.*8388608.*oversize = "stream"'):
            saved(client, "large", **{"model.pt": {"weight": LARGE}})
        saved(client, "small", **{"model.pt": {"x": 1}})
        assert client.load("small", "model.pt") == {"x": 1}

    def test_skipping_when_no_buffer_is_free(self, connect: Connect) -> None:
        client = connect(buffers=1, when_no_buffer="skip")
        results = [saved(client, f"step{number}", **{"model.pt": {"x": torch.ones(900_000)}}) for number in range(20)]
        skipped = [checkpoint for checkpoint in results if checkpoint.skipped]
        assert client.statistics()["skipped_saves"] == len(skipped)
        kept = [checkpoint.version for checkpoint in results if not checkpoint.skipped]
        assert client.latest() == kept[-1]


def test_the_buffers_of_later_saves_are_made_while_training_runs(connect: Connect) -> None:
    client = connect(buffers=2)
    before_bytes = client.daemon.memory_free_bytes
    saved(client, "step1")
    deadline_s = time.monotonic() + 60
    while connect().daemon.memory_free_bytes > before_bytes - 2 * (2 << 20):
        assert time.monotonic() < deadline_s, "no second buffer was made"


def test_a_buffer_made_ahead_is_the_one_that_is_used(connect: Connect) -> None:
    client = connect(buffers=1)
    free_bytes = client.daemon.memory_free_bytes
    client.preallocate({"model.pt": 1_300_000})
    deadline_s = time.monotonic() + 60
    while (left_bytes := connect(job="other").daemon.memory_free_bytes) == free_bytes:
        assert time.monotonic() < deadline_s, "no buffer was made"
    saved(client, "step1")
    assert connect(job="other").daemon.memory_free_bytes == left_bytes
    assert same(client.load("step1", "model.pt"))


def test_a_state_is_measured_and_every_buffer_of_it_is_made_ahead(connect: Connect) -> None:
    client = connect(buffers=2)
    free_bytes = client.daemon.memory_free_bytes
    client.preallocate({"model.pt": STATE, "scalars.pt": 1000})
    wanted_bytes = 2 * (2 << 20) + 2 * (2 << 20)
    deadline_s = time.monotonic() + 60
    while (left_bytes := connect(job="other").daemon.memory_free_bytes) > free_bytes - wanted_bytes:
        assert time.monotonic() < deadline_s, "not all buffers were made"
    for number in range(3):
        saved(client, f"step{number}", **{"model.pt": STATE, "scalars.pt": {"step": number}})
    assert connect(job="other").daemon.memory_free_bytes == left_bytes
    assert same(client.load("step2", "model.pt"))


def test_a_state_that_cannot_be_saved_cannot_be_measured(connect: Connect) -> None:
    with pytest.raises(cairn.ConfigurationError):
        connect().preallocate({"model.pt": {"open": (number for number in range(3))}})


@pytest.mark.parametrize("states", [5, None, ["model.pt"], {"model.pt": -1}, {"model.pt": 0}, {"model.pt": 3.5},
                                    {"model.pt": True}, {"model.pt": 1 << 80}, {"../x": 1000}, {"": 1000}])  # fmt: skip
def test_what_cannot_be_preallocated_is_refused_at_the_call(connect: Connect, states: Any) -> None:
    with pytest.raises(cairn.ConfigurationError):
        connect().preallocate(states)
