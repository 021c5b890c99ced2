"""Overlapped capture: training goes on while a save is copied, and every version holds what was saved."""

from __future__ import annotations

import copy
import io
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import cairn
from cairn import session
from cairn.capture.plan import Remainder
from cairn.overlap import Overlap
from cairn.save.handover import HandOver
from cairn.transport.calls import Caller
from cairn.transport.connection import Connection
from cairn.transport.save_calls import SaveCalls
from cairn.transport.writers import Writers
from cairn.unsettled import tell_again
from tests.client.conftest import Connect
from tests.client.test_two_ranks import run_two
from tests.daemon_process import DaemonProcess

WIDTH = 600
"""A weight of 600 x 600 takes 1.4 MB: enough to be copied late."""


class Net(torch.nn.Module):
    """Large weights, and buffers that change in every forward pass."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.norm = torch.nn.BatchNorm1d(WIDTH)
        self.second = torch.nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(WIDTH, WIDTH))

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        self.seen += data.T @ data
        out: torch.Tensor = self.second(self.norm(self.first(data)).relu())
        return out


class Training:
    """A model, its optimizer and an average of its weights, which is changed between steps."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> None:
        torch.manual_seed(1)
        self.model = Net()
        self.optimizer = make(self.model.parameters())
        self.average = copy.deepcopy(self.model)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
        }

    def step(self) -> None:
        self.model(torch.randn(8, WIDTH)).square().mean().backward()
        with torch.no_grad():
            for mean, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(weight, 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def frozen(state: object) -> Any:
    """What a blocking copy of *state* holds."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class Gate:
    """Holds late copies up until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        original_copy, original_wait = Remainder.copy, Overlap.wait_copied

        def copy_behind_gate(remainder: Remainder) -> Any:
            assert self._open.wait(60), "the gate was never opened"
            return original_copy(remainder)

        def wait_at_gate(overlap: Overlap) -> None:
            self._open.set()
            original_wait(overlap)

        monkeypatch.setattr(Remainder, "copy", copy_behind_gate)
        monkeypatch.setattr(Overlap, "wait_copied", wait_at_gate)

    def open(self) -> None:
        """Let copies run. Whoever waits for a copy opens it too, so that what does not wait comes first."""
        self._open.set()

    def shut(self) -> None:
        """Hold up the copies of the next save."""
        self._open.clear()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open()


@pytest.fixture
def overlapped(connect: Connect) -> Connect:
    return lambda **settings: connect(capture="overlapped", **settings)


def save(client: cairn.Client, tag: str, state: object) -> Any:
    """Save *state* and return what the version must hold."""
    expected = frozen(state)
    with client.create(tag) as checkpoint:
        checkpoint.save("state.pt", state)
    return expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_version_holds_what_was_saved_while_training_goes_on(overlapped: Connect, gate: Gate, name: str) -> None:
    client = overlapped()
    training = Training(OPTIMIZERS[name])
    client.guard(training.optimizer)
    for number in range(5):
        gate.shut()
        expected = save(client, f"step{number}", training.state())
        training.step()  # opens the gate, if it waits; if not, the copy gets what the step has changed
        gate.open()
        assert same(client.load(f"step{number}", "state.pt"), expected)
    counted = client.statistics()
    assert counted["saves"] == counted["overlapped_partitions"] == 5
    assert counted["late_bytes"] > 5 * 2 * 4 * WIDTH * WIDTH
    assert counted["step_wait_s"] > 0


def test_nothing_is_copied_late_but_what_is_guarded(overlapped: Connect, gate: Gate) -> None:
    client = overlapped()
    training, other = Training(), Training()
    for each in (training, other):
        each.step()
    client.guard(training.optimizer)
    together = torch.randn(2, WIDTH, WIDTH)  # one storage, half of it a parameter
    halves = torch.optim.SGD([torch.nn.Parameter(together[0])], lr=1.0)
    client.guard(halves)
    state = {"training": training.state(), "other": other.state(), "halves": [together[0], together[1]]}
    expected = save(client, "step1", state)
    other.step()
    together.zero_()
    gate.open()
    assert same(client.load("step1", "state.pt"), expected)


def test_a_change_behind_the_guards_back_fails_the_save_and_names_the_tensor(overlapped: Connect, gate: Gate) -> None:
    client = overlapped()
    training = Training()
    client.guard(training.optimizer)
    save(client, "step1", training.state())
    with torch.no_grad():
        training.model.second.weight.clamp_(-0.1, 0.1)
    gate.open()
    with pytest.raises(cairn.SaveFailedError, match=r"the state\['model'\]\['second.weight'\] was changed") as raised:
        client.create("step2")
    assert "wait_copied" in raised.value.hint
    assert client.latest() is None
    expected = save(client, "step3", training.state())
    client.wait_copied()
    with torch.no_grad():
        training.model.second.weight.zero_()
    assert same(client.load("step3", "state.pt"), expected)


def test_a_failed_save_is_raised_once_by_whatever_comes_next(overlapped: Connect, gate: Gate) -> None:
    client = overlapped()
    training = Training()
    client.guard(training.optimizer)
    calls: list[Callable[[], object]] = [lambda: client.wait("good", "captured", 20), client.close]
    good = save(client, "good", training.state())
    gate.open()
    client.settle()
    for number, call in enumerate(calls):
        gate.shut()
        save(client, f"bad{number}", training.state())
        with torch.no_grad():
            training.model.first.weight.add_(1)
        gate.open()
        with pytest.raises(cairn.SaveFailedError, match=f"bad{number} was not committed"):
            call()
        if number == 0:
            assert same(client.load("good", "state.pt"), good)


def test_memory_that_is_replaced_meanwhile_is_still_what_was_saved(overlapped: Connect, gate: Gate) -> None:
    client = overlapped()
    training = Training()
    training.step()
    client.guard(training.optimizer)
    parameters = dict(training.model.named_parameters())  # themselves, as with keep_vars=True
    expected = save(client, "step1", {"parameters": parameters, "optimizer": training.optimizer.state_dict()})
    other = Training()
    other.step()
    training.optimizer.load_state_dict(other.optimizer.state_dict())
    training.model.first.weight.data = torch.zeros(WIDTH, WIDTH)
    gate.open()
    assert same(client.load("step1", "state.pt", weights_only=False), expected)


def test_without_a_guard_everything_is_copied_at_once_and_one_message_says_so(
    overlapped: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    client = overlapped()
    training = Training()
    for number in range(2):
        with caplog.at_level(logging.WARNING):
            expected = save(client, f"step{number}", training.state())
        training.step()
        assert same(client.load(f"step{number}", "state.pt"), expected)
    assert [record.message for record in caplog.records if "overlapped" in record.message] == [
        'capture = "overlapped": nothing is copied later: no optimizer is guarded, see Client.guard'
    ]
    assert client.statistics()["late_bytes"] == 0


def test_a_stream_is_sent_at_once(overlapped: Connect, caplog: pytest.LogCaptureFixture) -> None:
    client = overlapped(transport="stream")
    training = Training()
    client.guard(training.optimizer)
    with caplog.at_level(logging.WARNING):
        expected = save(client, "step1", training.state())
    training.step()
    assert same(client.load("step1", "state.pt"), expected)
    assert "byte stream is sent at once" in caplog.text
    assert client.statistics()["streamed_partitions"] == 1


def test_only_torch_optimizers_can_be_guarded(overlapped: Connect) -> None:
    with pytest.raises(cairn.ConfigurationError, match="a Net cannot be guarded"):
        overlapped().guard(Net())  # type: ignore[arg-type]


def test_blocking_capture_ignores_guards(connect: Connect) -> None:
    client = connect()
    training = Training()
    client.guard(training.optimizer)
    expected = save(client, "step1", training.state())
    with torch.no_grad():
        training.model.first.weight.add_(1)
    assert same(client.load("step1", "state.pt"), expected)
    assert client.statistics()["overlapped_partitions"] == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_save_that_is_given_up_in_mid_copy_leaves_no_copy_running(
    overlapped: Connect, gate: Gate, error: type[BaseException]
) -> None:
    client = overlapped(buffers=1)
    training = Training()
    client.guard(training.optimizer)
    with pytest.raises(error), client.create("given-up") as checkpoint:
        checkpoint.save("state.pt", training.state())
        raise error
    gate.open()
    training.step()
    expected = save(client, "next", training.state())
    training.step()
    assert same(client.load("next", "state.pt"), expected)
    assert [item["version"] for item in client.versions()] == ["e00001-s000002-next"]


@pytest.mark.usefixtures("gate")
def test_a_daemon_that_is_restarted_in_mid_copy_gets_whole_buffers_only(
    overlapped: Connect, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = overlapped()
    training = Training()
    client.guard(training.optimizer)
    telling = threading.Event()

    def told(*arguments: Any) -> Any:
        telling.set()
        return tell_again(*arguments)

    monkeypatch.setattr(session, "tell_again", told)
    expected = save(client, "step1", training.state())
    daemon.restart()
    assert telling.wait(30)
    training.step()
    client.wait("step1", "tier1", 30)
    assert same(client.load("step1", "state.pt"), expected)
    assert client.statistics()["reconnects"] == 1
    expected = save(client, "step2", training.state())
    assert same(client.load("step2", "state.pt"), expected)


def test_a_save_makes_no_grpc_call_on_the_training_thread(
    overlapped: Connect, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = overlapped()
    training = Training()
    client.guard(training.optimizer)
    gate.open()
    original = Caller.stub
    called: list[str] = []

    def noted(connection: Connection, service: Any, name: str) -> Any:
        if threading.current_thread() is threading.main_thread():
            called.append(name)
        return original(connection, service, name)

    for number in range(4):
        if number == 3:  # all buffers are made
            monkeypatch.setattr(Caller, "stub", staticmethod(noted))
        with client.create(f"step{number}") as checkpoint:
            checkpoint.save("state.pt", training.state())
            checkpoint.save("small.pt", {"step": torch.tensor(number)})  # nothing of it is copied late
        assert called == []
        client.wait(f"step{number}", "tier1", 60)
        for thread in threading.enumerate():
            if thread.name == "cairn-prefault":
                thread.join()
    called.clear()
    assert client.load("step3", "small.pt")["step"] == 3


@pytest.mark.parametrize("moment", ["before the commit", "while a buffer is handed over"])
def test_a_daemon_without_room_after_a_restart_gets_what_was_copied_late_as_a_stream(
    overlapped: Connect, gate: Gate, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    client = overlapped()
    training = Training()
    client.guard(training.optimizer)
    gate.open()
    expected = frozen(training.state())
    checkpoint = client.create("step1")
    checkpoint.save("state.pt", training.state())
    client.wait_copied()
    original = SaveCalls.seal

    def restarting(calls: SaveCalls, *arguments: Any) -> None:
        monkeypatch.setattr(SaveCalls, "seal", original)
        daemon.restart()
        original(calls, *arguments)

    monkeypatch.setattr("cairn.transport.shared_memory.free_memory_bytes", lambda: 0)
    if moment == "before the commit":
        daemon.restart()
    else:
        monkeypatch.setattr(SaveCalls, "seal", restarting)
    checkpoint.commit()
    client.wait("step1", "tier1", 60)
    assert same(client.load("step1", "state.pt"), expected)
    assert client.statistics()["reconnects"] == 1


def prefaulted() -> None:
    """Wait until no spare buffer is being made."""
    for thread in threading.enumerate():
        if thread.name == "cairn-prefault":
            thread.join()


@pytest.mark.parametrize("guarded", [True, False])
def test_a_budget_that_is_too_small_never_has_a_save_overwritten(tmp_path: Path, guarded: bool) -> None:
    """Three buffers for two saves of two partitions, and a disk so slow that the last save is still being written."""
    one, other = (torch.nn.Parameter(torch.zeros(750_000)) for _ in range(2))
    with DaemonProcess(tmp_path / "node", capture_memory_bytes=12 << 20, tier1_write_bytes_per_s=6 << 20) as daemon:
        client = cairn.connect(job="run-7", runtime_dir=str(daemon.runtime_dir), capture="overlapped")
        if guarded:
            client.guard(torch.optim.SGD([one]))
        for number in (1, 2, 3):
            with torch.no_grad():
                one.fill_(number)
                other.fill_(-number)
            with client.create(f"step{number}") as checkpoint:
                checkpoint.save("one.pt", {"w": one})
                checkpoint.save("other.pt", {"w": other})
            client.wait_copied()
            prefaulted()
        client.wait("step3", "tier1", timeout=60)
        for number in (2, 3):
            assert torch.all(client.load(f"step{number}", "one.pt")["w"] == number)
            assert torch.all(client.load(f"step{number}", "other.pt")["w"] == -number)
        client.close()


@pytest.mark.parametrize("capture", ["blocking", "overlapped"])
def test_the_flag_of_a_save_that_failed_goes_to_the_next(connect: Connect, capture: str) -> None:
    client = connect(capture=capture, persistent_time_interval=3600)
    flags = []

    def flagged(tag: str, state: object) -> None:
        checkpoint = client.create(tag)
        assert checkpoint._item is not None
        flags.append(checkpoint._item.opening.persist)
        with suppress(cairn.CairnError):
            checkpoint.save("state.pt", state)
        checkpoint.commit()
        client._session.background.settle()

    with suppress(cairn.CairnError):
        flagged("step1", {"f": lambda: 0})  # cannot be pickled
    with suppress(cairn.CairnError):  # with overlapped capture the failure is raised here
        flagged("step2", {"x": 1})
    flagged("step3", {"x": 1})
    if capture == "blocking":
        assert flags == [True, True, False]
    else:
        assert flags == [True, True]


def test_a_failed_save_is_written_to_the_log_once(
    overlapped: Connect, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    client = overlapped()
    training = Training()
    client.guard(training.optimizer)
    with caplog.at_level(logging.WARNING):
        save(client, "step1", training.state())
        with torch.no_grad():
            training.model.second.weight.zero_()
        gate.open()
        client._leave_at_exit()  # nothing follows that could raise it
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "version e00001-s000001-step1 was not committed"
    ]


def test_control_c_at_any_line_of_a_save_leaves_no_buffer_as_being_filled(overlapped: Connect, gate: Gate) -> None:
    client = overlapped()
    training = Training()
    client.guard(training.optimizer)
    gate.open()
    state = training.state()
    watched = {HandOver._fill.__code__, Writers.begin.__code__}

    def interrupt_at(wanted: int) -> Callable[..., Any]:
        seen = set()

        def trace(frame: Any, event: str, _: object) -> Any:
            if frame.f_code not in watched:
                return None
            # A with statement's line comes again at its end, just before it lets go: no signal is handled there.
            if event == "line" and (frame.f_code, frame.f_lineno) not in seen:
                seen.add((frame.f_code, frame.f_lineno))
                if len(seen) == wanted:
                    raise KeyboardInterrupt
            return trace

        return trace

    wanted, checkpoint = 0, None
    for wanted in count(1):
        checkpoint = client.create(f"step{wanted}")
        sys.settrace(interrupt_at(wanted))
        try:
            checkpoint.save("state.pt", state)
        except KeyboardInterrupt:
            sys.settrace(None)
            checkpoint.abort()
            with client._session.pool.writers.none_now() as whole:
                assert whole, f"after line {wanted}"
        else:
            break
        finally:
            sys.settrace(None)
    assert wanted > 10
    assert checkpoint is not None
    checkpoint.commit()
    assert same(client.load(f"step{wanted}", "state.pt"), frozen(state))


def test_a_forked_child_does_not_wait_for_the_parents_copy(overlapped: Connect, gate: Gate) -> None:
    client = overlapped()
    training = Training(OPTIMIZERS["sgd"])
    client.guard(training.optimizer)
    expected = save(client, "step1", training.state())
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            client.wait_copied()
            client.settle()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    gate.open()
    assert same(client.load("step1", "state.pt"), expected)


_PROGRAM = """
import cairn, torch
client = cairn.connect(job="run-7", runtime_dir={runtime_dir!r}, capture="overlapped")
model = torch.nn.Linear(3000, 3000)
optimizer = torch.optim.AdamW(model.parameters())
client.guard(optimizer)
with client.create("last") as checkpoint:
    checkpoint.save("model.pt", {{"weight": torch.ones(3)}})
    checkpoint.save("optimizer.pt", {{"model": model.state_dict()}})
{end}
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [("", 0), ("raise ZeroDivisionError", 1), ("raise SystemExit(3)", 3), ("client.close()", 0)],
    ids=["end", "exception", "exit", "close"],
)
def test_the_last_save_of_a_program_is_finished(daemon: DaemonProcess, connect: Connect, end: str, status: int) -> None:
    script = _PROGRAM.format(runtime_dir=str(daemon.runtime_dir), end=end)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == status, result.stderr
    client = connect()
    assert client.load("last", "model.pt")["weight"].sum() == 3
    assert client.load("last", "optimizer.pt")["model"]["weight"].shape == (3000, 3000)


_TRAINING = """
model = torch.nn.Linear(1000, 1000)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
def step():
    model(torch.ones(2, 1000)).sum().backward()
    optimizer.step()
def save(tag, **more):
    with client.create(tag) as checkpoint:
        checkpoint.save("model.pt" if rank == 0 else "other.pt", {"model": model.state_dict(), **more})
    return checkpoint.version
"""


def test_what_fails_on_one_rank_is_raised_on_both_by_the_next_create(daemon: DaemonProcess, tmp_path: Path) -> None:
    script = f"""
client = connect(capture="overlapped")
{_TRAINING}
client.guard(optimizer)
print(save("step1"))
step()
print(client.latest())
checkpoint = client.create("step2", raise_immediately=False)
checkpoint.save("model.pt", {{"model": model.state_dict(), "bad": (lambda: None) if rank == 1 else None}})
print(checkpoint.commit())
step()
told(lambda: save("step3"))
print(save("step4"))
distributed.barrier()
client.close()
distributed.destroy_process_group()
"""
    for output in run_two(daemon, tmp_path, script):
        lines = output.splitlines()
        assert lines[:3] == ["e00001-s000001-step1", "e00001-s000001-step1", "e00001-s000002-step2"]
        assert lines[3].startswith("SaveFailedError: rank 0: version e00001-s000002-step2 was not committed: rank 1:")
        assert lines[4].endswith("step4")


def test_an_exchange_after_a_save_waits_for_its_turn(daemon: DaemonProcess, tmp_path: Path) -> None:
    # On rank 1 the copy, and so the exchange that commits, is held up until the program is at its next exchange; on the
    # other, the program gets there when that commit has begun. Without turns the ranks would mix the two up.
    script = f"""
client = connect(capture="overlapped")
{_TRAINING}
client.guard(optimizer)
import threading
from cairn.background import Background
from cairn.capture.plan import Remainder
from cairn.ranks import GlooRanks
at_exchange, copy, settle = threading.Event(), Remainder.copy, Background.settle
committing, all_gather = threading.Event(), GlooRanks.all_gather
def gathering(ranks, step, value, timeout_s):
    if step.startswith("commit"):
        committing.set()
    return all_gather(ranks, step, value, timeout_s)
GlooRanks.all_gather = gathering
checkpoint = client.create("step1")
def held_up(remainder):
    at_exchange.wait(10)
    return copy(remainder)
def settling(background, timeout_s=None):
    at_exchange.set()
    return settle(background, timeout_s)
if rank == 1:
    Remainder.copy, Background.settle = held_up, settling
checkpoint.save("model.pt", {{"model": model.state_dict()}})
checkpoint.commit()
if rank == 0:
    committing.wait(10)
told(lambda: client.ranks.all_gather("mine", rank, 30))
told(client.latest)
client.close()
distributed.destroy_process_group()
"""
    for output in run_two(daemon, tmp_path, script):
        assert output.splitlines() == ["[0, 1]", "e00001-s000001-step1"]


def test_the_last_save_of_two_ranks_outlives_their_process_group(
    daemon: DaemonProcess, tmp_path: Path, connect: Connect
) -> None:
    script = f"""
client = connect(capture="overlapped")
{_TRAINING}
client.guard(optimizer)
from cairn.capture.plan import Remainder
original = Remainder.copy
def slow(remainder):
    time.sleep(1)
    return original(remainder)
Remainder.copy = slow
save("last")
distributed.barrier()
distributed.destroy_process_group()
"""
    run_two(daemon, tmp_path, script)
    assert str(connect().latest()) == "e00001-s000001-last"


def test_a_rank_that_dies_in_mid_copy_fails_the_save_of_the_other(
    daemon: DaemonProcess, tmp_path: Path, connect: Connect
) -> None:
    script = f"""
client = connect(capture="overlapped")
{_TRAINING}
client.guard(optimizer)
from cairn.capture.plan import Remainder
if rank == 1:
    Remainder.copy = lambda remainder: os._exit(1)
save("step1")
if rank == 0:
    told(lambda: client.wait("step1", "captured", 30))
os._exit(0)
"""
    printed, _ = run_two(daemon, tmp_path, script, None)
    assert "SaveFailedError: version e00001-s000001-step1 was not committed" in printed
    assert connect().latest() is None


@pytest.mark.gpu
def test_a_gpu_state_is_copied_on_a_stream_of_its_own(overlapped: Connect, gate: Gate) -> None:
    if not torch.cuda.is_available():
        pytest.skip("NO GPU HERE: late copies from a GPU are not tested on this machine")
    client = overlapped()
    training = Training()
    training.model.cuda()
    training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=0.1)
    client.guard(training.optimizer)
    for number in range(3):
        gate.shut()
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            state = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
            expected = save(client, f"step{number}", state)
            training.model(torch.randn(8, WIDTH, device="cuda")).square().mean().backward()
            training.optimizer.step()
        gate.open()
        torch.cuda.synchronize()
        loaded = client.load(f"step{number}", "state.pt", map_location="cuda")
        assert same(loaded, expected)
    assert client.statistics()["late_bytes"] > 0
