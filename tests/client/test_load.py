"""Loading from each tier, choosing again when a version is damaged, and asking for what is not there."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

import cairn
from cairn.capture import native
from cairn.transport import calls
from cairn.transport.connection import Connection
from cairn.transport.restore_calls import RestoreCalls
from cairn_api.errors import CairnError
from cairn_api.v1 import restore_pb2_grpc
from cairnd import layout
from tests.client.conftest import Connect
from tests.daemon_process import DaemonProcess


def save(client: cairn.Client, tag: str, value: float, *, durability: str = "tier2", save_dir: str = "") -> None:
    with client.create(tag, save_dir) as checkpoint:
        checkpoint.save("model.pt", {"x": torch.full((50_000,), value)})
    client.wait(tag, durability, 30)


def value_of(client: cairn.Client, tag: str) -> float:
    return float(client.load(tag, "model.pt")["x"].mean())


def damage(path: Path) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"damage")


def test_each_tier_gives_the_same_tensors(daemon: DaemonProcess) -> None:
    runtime_dir = str(daemon.runtime_dir)
    with cairn.connect(job="run-7", runtime_dir=runtime_dir) as client:
        save(client, "step1", 1.0)
        with client.restore("step1") or pytest.fail("nothing to restore") as restored:
            assert restored.from_tier == "memory"
            assert float(restored.load("model.pt")["x"].mean()) == 1.0
    daemon.restart()
    with cairn.connect(job="run-7", runtime_dir=runtime_dir) as client:
        with client.restore("step1") or pytest.fail("nothing to restore") as restored:
            assert restored.from_tier == "tier1"
            loaded = restored.load("model.pt")["x"]
            with restored.open("model.pt") as file:
                assert torch.equal(torch.load(file, weights_only=True)["x"], loaded)
        assert float(loaded.mean()) == 1.0
        loaded.zero_()
        assert value_of(client, "step1") == 1.0, "writing to a mapped tensor stays in this process"
    daemon.kill9()
    shutil.rmtree(daemon.tier1_path)
    daemon.tier1_path.mkdir()
    daemon.start()
    with cairn.connect(job="run-7", runtime_dir=runtime_dir) as client:
        assert [(item["version"], item["tiers"]) for item in client.versions()] == [("e00001-s000001-step1", ["tier2"])]
        with client.restore() or pytest.fail("nothing to restore") as restored:
            assert float(restored.load("model.pt")["x"].mean()) == 1.0


def test_the_stream_transport_loads_too(connect: Connect) -> None:
    client = connect(transport="stream")
    save(client, "step1", 4.0)
    assert value_of(client, "step1") == 4.0


def test_a_damaged_version_is_never_returned(daemon: DaemonProcess, connect: Connect) -> None:
    save(connect(), "step1", 1.0, durability="tier1")
    save(connect(), "step2", 2.0, durability="tier1")
    daemon.kill9()
    shutil.rmtree(daemon.bucket_path)
    daemon.bucket_path.mkdir()
    (path,) = [path for path in daemon.tier1_path.rglob("model.pt") if "step2" in str(path)]
    damage(path)
    daemon.start()
    client = connect()
    restored = client.restore()
    assert restored is not None
    with restored:
        assert restored.candidate.version.tag == "step1", "all ranks went on to the next older version"
        assert float(restored.load("model.pt")["x"].mean()) == 1.0
    with pytest.raises(cairn.VersionError, match="step2"):
        client.load("step2", "model.pt")


def test_a_damaged_copy_in_tier_1_is_replaced_from_tier_2(daemon: DaemonProcess, connect: Connect) -> None:
    save(connect(), "step1", 1.0)
    daemon.kill9()
    (path,) = daemon.tier1_path.rglob("model.pt")
    damage(path)
    daemon.start()
    assert value_of(connect(), "step1") == 1.0


def test_a_tag_by_its_name_its_newest_version_and_an_exact_version(connect: Connect) -> None:
    client = connect(num_of_version_in_retention=5)
    save(client, "best", 1.0)
    save(client, "last", 2.0)
    save(client, "best", 3.0)
    assert value_of(client, "best") == 3.0
    assert value_of(client, "e00001-s000001-best") == 1.0
    assert float(client.load(cairn.VersionId(1, 2, "last"), "model.pt")["x"].mean()) == 2.0
    with pytest.raises(cairn.VersionError, match=r"no version of 'bast'; there are: last, best"):
        client.load("bast", "model.pt")
    with pytest.raises(cairn.VersionError, match=r"no partition 'modell.pt' \(it has model.pt\)"):
        client.load("best", "modell.pt")


def test_only_what_was_saved_from_a_directory(connect: Connect) -> None:
    client = connect(num_of_version_in_retention=5)
    save(client, "step1", 1.0, save_dir="/a")
    save(client, "step1", 2.0, save_dir="/b")
    chosen = client.choose(save_dir="/a")
    assert chosen is not None
    assert chosen.version.sequence == 1
    assert client.choose(save_dir="/c") is None
    with client.fetch(chosen, ["model.pt"]) as restored:
        assert float(restored.load("model.pt")["x"].mean()) == 1.0
        with pytest.raises(cairn.ConfigurationError, match="was not fetched"):
            restored.load("other.pt")


def test_progress_is_told(connect: Connect) -> None:
    client = connect()
    save(client, "step1", 1.0)
    told: list[tuple[int, int]] = []
    restored = client.restore(
        "step1", progress=lambda progress: told.append((progress.done_bytes, progress.total_bytes))
    )
    assert restored is not None
    restored.close()
    assert told[-1][0] == told[-1][1] > 200_000


def test_a_location_that_the_operator_does_not_allow(connect: Connect) -> None:
    for setting in ("persistent_storage_path", "load_path"):
        with pytest.raises(cairn.ConfigurationError, match=r"does not allow the storage location 'file:///elsewhere'"):
            connect(**{setting: "file:///elsewhere"}).latest()


def test_the_launch_records_what_it_resumed_from(connect: Connect) -> None:
    first = connect(num_of_version_in_retention=9)
    for number in (1, 2, 3):
        save(first, f"step{number}", float(number))
    second = connect()
    assert float(second.load("step1", "model.pt")["x"].mean()) == 1.0
    save(second, "other", 4.0)
    # The second launch went on from step 1: steps 2 and 3 are another future, loaded only by name.
    third = connect()
    chosen = third.choose()
    assert chosen is not None
    assert chosen.version in (cairn.VersionId(2, 1, "other"), cairn.VersionId(1, 1, "step1"))
    assert value_of(third, "step3") == 3.0


def asked_by_grpc(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the calls that are made by gRPC from now on."""
    asked: list[str] = []
    real = calls.Caller.stub

    def counted(connection: Connection, service: calls.Service, name: str) -> Callable[..., Any]:
        asked.append(name)
        return real(connection, service, name)

    monkeypatch.setattr(calls.Caller, "stub", staticmethod(counted))
    return asked


@pytest.mark.parametrize("always", [False, True])
def test_what_is_near_and_verified_is_loaded_without_grpc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always: bool
) -> None:
    policy = "always" if always else "cached"
    with (
        DaemonProcess(tmp_path / "node", persistent_storage_path="", verify_on_load=policy) as daemon,
        cairn.connect(job="run-7", runtime_dir=str(daemon.runtime_dir)) as client,
    ):
        save(client, "step1", 1.0, durability="tier1")
        asked = asked_by_grpc(monkeypatch)
        for again in (False, True):
            assert value_of(client, "step1") == 1.0
            assert ("Fetch" in asked) is (always or not again)
            asked.clear()


def test_who_saved_it_loads_into_live_tensors_from_the_buffer_itself(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native.available():
        pytest.skip("the copy library is not here")
    runtime_dir = str(daemon.runtime_dir)
    live = {"x": torch.zeros(50_000)}
    with cairn.connect(job="run-7", runtime_dir=runtime_dir) as client:
        with monkeypatch.context() as patched:
            patched.setattr("cairn.live.read_pieces", None)
            for number in range(1, 6):  # the two buffers are filled anew
                save(client, f"step{number}", float(number), durability="tier1")
                for tag in (max(1, number - 1), number):
                    client.load(f"step{tag}", "model.pt", into=live)
                    assert set(live["x"].tolist()) == {float(tag)}
        with ExitStack() as unfinished:  # somebody may be filling the very buffer
            client._session.pool.writers.begin(unfinished)
            live["x"].zero_()
            client.load("step5", "model.pt", into=live)
        assert set(live["x"].tolist()) == {5.0}
    with cairn.connect(job="run-7", runtime_dir=runtime_dir) as client:
        monkeypatch.setattr("cairn.live._copy_pieces", None)
        live["x"].zero_()
        client.load("step5", "model.pt", into=live)
        assert set(live["x"].tolist()) == {5.0}


def test_a_daemon_that_falls_silent_is_given_up_and_not_asked_again(
    daemon: DaemonProcess, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect()
    save(client, "step1", 1.0)
    chosen = client.choose() or pytest.fail("nothing to restore")
    monkeypatch.setattr(calls, "SILENCE_TIMEOUT_S", 0.3)
    connection = client._session.restoring._caller.current()
    monkeypatch.setattr(connection, "welcome", replace(connection.welcome, calls=frozenset()))
    asked = asked_by_grpc(monkeypatch)
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        with pytest.raises(cairn.UnavailableError, match="sent nothing"):
            client.fetch(chosen, ["model.pt"])
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    assert asked.count("Fetch") == 1
    monkeypatch.undo()
    assert value_of(client, "step1") == 1.0


def test_what_is_read_for_a_restore_only_goes_with_it(daemon: DaemonProcess, connect: Connect) -> None:
    first = connect()
    with first.create("step1") as checkpoint:
        checkpoint.save("model.pt", {"x": torch.ones(1000)})
        checkpoint.save("other.pt", {"x": torch.ones(1000)})
        version = checkpoint.version or pytest.fail("the save never began")
    first.wait("step1", "tier2", 30)
    first.close()
    daemon.kill9()
    shutil.rmtree(daemon.tier1_path)
    daemon.tier1_path.mkdir()
    daemon.start()
    client = connect()
    loaded = client.load("step1", "model.pt")["x"]
    wait_for(lambda: not (daemon.tier1_path / layout.version_folder("run-7", version)).exists())
    assert float(loaded.mean()) == 1.0, "the mapping outlives the file's name"


class Cancelling(restore_pb2_grpc.RestoreServicer):
    """Cancels every Resolve."""

    calls = 0

    def Resolve(self, request: object, context: grpc.ServicerContext) -> None:  # noqa: ARG002, N802 - as generated
        self.calls += 1
        context.abort(grpc.StatusCode.CANCELLED, "no more")


class Repeating:
    """A source that would let a call be repeated for ever."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def current(self, deadline_s: float) -> Connection:  # noqa: ARG002
        return self.connection

    def failed(self, connection: Connection, error: CairnError, deadline_s: float) -> None:
        """Nothing speaks against another try."""


def test_what_a_living_daemon_cancels_is_not_repeated(daemon: DaemonProcess, tmp_path: Path) -> None:
    servicer = Cancelling()
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        restore_pb2_grpc.add_RestoreServicer_to_server(servicer, server)
        server.add_insecure_port(f"unix:{tmp_path}/other.sock")
        server.start()
        connection = Connection.open(str(daemon.runtime_dir), "run-7", 0, cairn.__version__)
        connection.channel.close()
        connection.channel = grpc.insecure_channel(f"unix:{tmp_path}/other.sock")
        restore = RestoreCalls(calls.Caller(Repeating(connection), "run-7", 30.0))
        with pytest.raises(cairn.UnavailableError, match="no more"):
            restore.resolve()
        assert servicer.calls == 1
        connection.close()
        server.stop(None).wait()


def buffers_of(daemon: DaemonProcess) -> int:
    """Capture buffers that the daemon holds."""
    count = 0
    for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            count += "/memfd:cairn-capture" in str(link.readlink())
    return count


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_memory_of_a_trainer_that_is_gone_is_mapped_until_the_tensors_go(daemon: DaemonProcess) -> None:
    runtime_dir = str(daemon.runtime_dir)
    with cairn.connect(job="run-7", runtime_dir=runtime_dir) as client:
        save(client, "step1", 1.0, durability="tier1")
    with cairn.connect(job="run-7", runtime_dir=runtime_dir) as client:
        loaded = client.load("step1", "model.pt")["x"]
        assert "/memfd:cairn-capture" in maps_at(loaded.data_ptr())
        for number in range(2, 5):  # what the new trainer saves must not reach the mapped tensors
            save(client, f"step{number}", float(number), durability="tier1")
        assert float(loaded.mean()) == 1.0
        held = buffers_of(daemon)
        del loaded
        save(client, "step9", 9.0, durability="tier1")  # the daemon looks for what it may give up
        wait_for(lambda: buffers_of(daemon) < held)


def test_memory_that_will_be_filled_again_is_copied(connect: Connect) -> None:
    client = connect()
    save(client, "step1", 1.0, durability="tier1")
    loaded = client.load("step1", "model.pt")["x"]
    assert "/memfd:cairn-capture" not in maps_at(loaded.data_ptr())
    for number in range(2, 5):
        save(client, f"step{number}", float(number), durability="tier1")
    assert float(loaded.mean()) == 1.0


def test_no_save_is_left_out_for_a_load_that_is_over(connect: Connect) -> None:
    client = connect(buffers=1, when_no_buffer="skip")
    state = {"x": torch.ones(3)}
    for number in range(5):
        with client.create(f"step{number}") as checkpoint:
            assert not checkpoint.skipped
            checkpoint.save("model.pt", state)
        client.wait(f"step{number}", "tier1", timeout=20)
        client.load(f"step{number}", "model.pt", into={"x": torch.zeros(3)})


def test_an_opened_file_of_the_memory_tier_keeps_its_bytes_when_the_buffer_is_filled_again(connect: Connect) -> None:
    client = connect()
    save(client, "step1", 1.0, durability="tier1")
    with client.restore("step1") or pytest.fail("nothing to restore") as restored:
        assert restored.from_tier == "memory"
        file = restored.open("model.pt")
    for step in (2, 3, 4):
        save(client, f"step{step}", float(step), durability="tier1")
    with file:
        assert float(torch.load(file, weights_only=True)["x"].mean()) == 1.0


def test_memory_that_the_budget_cannot_spare_is_copied(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path / "small", capture_memory_bytes=4 << 20) as daemon:  # two buffers of 2 MiB
        runtime_dir = str(daemon.runtime_dir)
        with cairn.connect(job="run-7", runtime_dir=runtime_dir) as client:
            save(client, "step1", 1.0, durability="tier1")
        with cairn.connect(job="run-7", runtime_dir=runtime_dir) as client:
            with client.restore("step1") or pytest.fail("nothing to restore") as restored:
                assert restored.from_tier == "memory"
                loaded = restored.load("model.pt")["x"]
            assert "/memfd:cairn-capture" not in maps_at(loaded.data_ptr())
            for number in range(2, 5):
                save(client, f"step{number}", float(number), durability="tier1")
            assert float(loaded.mean()) == 1.0


def maps_at(address: int) -> str:
    """The line of this process's memory map that holds *address*."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < last:
            return line
    raise AssertionError("no such address")


def test_values_go_into_live_tensors_from_every_tier(daemon: DaemonProcess) -> None:
    runtime_dir = str(daemon.runtime_dir)
    live = {"x": torch.zeros(50_000)}
    for transport in ("auto", "stream"):
        for restarted in (False, True):
            with cairn.connect(job="run-7", runtime_dir=runtime_dir, transport=transport) as client:
                if not restarted:
                    save(client, "step1", 3.0, durability="tier1")
                live["x"].zero_()
                loaded = client.load("step1", "model.pt", into=live)
                assert loaded["x"] is live["x"]
                assert float(live["x"].mean()) == 3.0
                with pytest.raises(cairn.ConfigurationError, match=r"x was saved with shape \(50000,\), not \(4,\)"):
                    client.load("step1", "model.pt", into={"x": torch.zeros(4)})
            daemon.restart()


@pytest.mark.parametrize("always", [False, True])
def test_the_first_digest_pass_is_told_apart(tmp_path: Path, always: bool) -> None:
    policy = "always" if always else "cached"
    # Without a bucket: what is uploaded is hashed too, and a load that comes later finds it done.
    with DaemonProcess(tmp_path / "node", persistent_storage_path="", verify_on_load=policy) as daemon:
        for tier in ("memory", "tier1"):
            with cairn.connect(job="run-7", runtime_dir=str(daemon.runtime_dir)) as client:
                if tier == "memory":
                    save(client, "step1", 1.0, durability="tier1")
                for again in (False, True):
                    with client.restore("step1") or pytest.fail("nothing to restore") as restored:
                        assert restored.from_tier == tier
                        assert (restored.digested_bytes > 200_000) is (always or not again)
                        assert (restored.digest_s > 0) is (always or not again)
            daemon.restart()
