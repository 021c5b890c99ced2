"""Two ranks with one daemon: what they agree on, and that neither ever goes on alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.client.test_ranks import run_ranks
from tests.daemon_process import DaemonProcess

_PRELUDE = """
import cairn, torch
def connect(**settings):
    usual = {{"runtime_dir": {runtime_dir!r}, "collective_timeout_s": 60, "commit_timeout_s": 60}}
    return cairn.connect(job="run-7", **{{**usual, **settings}})
def told(call):
    try:
        print(call(), flush=True)
    except cairn.CairnError as error:
        print(f"{{type(error).__name__}}: {{error.message}}", flush=True)
"""


def run_two(daemon: DaemonProcess, folder: Path, script: str, statuses: tuple[int, ...] | None = (0, 0)) -> list[str]:
    prelude = _PRELUDE.format(runtime_dir=str(daemon.runtime_dir))
    return run_ranks(folder, prelude + script, 2, statuses)


def test_ranks_share_versions_and_each_reads_its_own(daemon: DaemonProcess, tmp_path: Path) -> None:
    script = """
client = connect()
with client.create("step1") as checkpoint:
    checkpoint.save("state.pt", {"rank": rank})
    if rank == 0:
        checkpoint.save("model.pt", {"model": torch.ones(3)})
client.wait("step1", "tier2", 30)
print(client.latest(), client.load("step1", "state.pt"), client.load("step1", "model.pt"))
print(sorted(client.choose("step1").candidate.parts))
client.close()
distributed.destroy_process_group()
"""
    outputs = run_two(daemon, tmp_path, script)
    for rank, output in enumerate(outputs):
        assert output.splitlines() == [
            f"e00001-s000001-step1 {{'rank': {rank}}} {{'model': tensor([1., 1., 1.])}}",
            "['by-rank/1/state.pt', 'model.pt', 'state.pt']",
        ]


def test_a_rank_that_disagrees_about_the_tag_stops_both(daemon: DaemonProcess, tmp_path: Path) -> None:
    script = """
client = connect()
told(lambda: client.create("step1" if rank == 0 else "step2"))
told(lambda: client.create("../x" if rank == 1 else "step1"))
told(client.latest)
client.close()
distributed.destroy_process_group()
"""
    expected = [
        "ConfigurationError: the ranks disagree about the tag: rank 0: 'step1'; rank 1: 'step2'",
        "ConfigurationError: rank 1: tag '../x' is not allowed",
        "None",
    ]
    for output in run_two(daemon, tmp_path, script):
        assert [line.split(": 1-128", maxsplit=1)[0] for line in output.splitlines()] == expected


def test_one_rank_that_fails_makes_commit_fail_on_both(daemon: DaemonProcess, tmp_path: Path) -> None:
    script = """
client = connect()
for number, bad in enumerate([None, 0, 1, None]):
    checkpoint = client.create(f"step{number}", raise_immediately=False)
    checkpoint.save(f"state-{rank}.pt", {"x": (lambda: 0) if bad == rank else 1})
    told(checkpoint.commit)
told(client.latest)
def block():
    with client.create("step4"):
        if rank == 1:
            raise cairn.OverloadedError("of my own")
told(block)
client.close()
distributed.destroy_process_group()
"""
    outputs = [output.splitlines() for output in run_two(daemon, tmp_path, script)]
    for output in outputs:
        assert output[0] == "e00001-s000001-step0"
        for line, rank in ((output[1], 0), (output[2], 1)):
            assert line.startswith(f"SaveFailedError: version e00001-s00000{rank + 2}-step{rank + 1} was not committed")
            assert f"rank {rank}: " in line
        assert output[3:5] == ["e00001-s000004-step3"] * 2
    assert outputs[0][5] == "SaveFailedError: version e00001-s000005-step4 was not committed: rank 1: of my own"
    assert outputs[1][5] == "OverloadedError: of my own"


@pytest.mark.parametrize("moment", ["save", "commit"])
def test_a_rank_that_dies_fails_the_others_commit_at_once(daemon: DaemonProcess, tmp_path: Path, moment: str) -> None:
    # Nobody here waits for as long as these deadlines: it is the death that ends the commit.
    script = f"""
import signal
client = connect(commit_timeout_s=3600, collective_timeout_s=3600)
checkpoint = client.create("step1", raise_immediately=False)
if rank == 1 and {moment == "save"}:
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save(f"state-{{rank}}.pt", {{"x": torch.ones(1000)}})
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
told(checkpoint.commit)
told(lambda: client.versions())
os._exit(0)
"""
    failed, versions = run_two(daemon, tmp_path, script, (0, -9))[0].splitlines()
    assert failed.startswith(
        "SaveFailedError: version e00001-s000001-step1 was not committed: the ranks could not agree"
    )
    assert versions == "[]"


def test_without_a_daemon_both_ranks_are_told(daemon: DaemonProcess, tmp_path: Path) -> None:
    script = """
def attempt_connect():
    if rank == 0:
        return connect()
    return connect(runtime_dir="/nowhere", connect_timeout_s=0.2)
told(attempt_connect)
told(lambda: connect(buffers=1 + rank, when_no_buffer="skip" if rank else "wait"))
distributed.destroy_process_group()
"""
    for output in run_two(daemon, tmp_path, script):
        first, second = output.splitlines()
        assert first.startswith("UnavailableError: rank 1: no daemon answers in /nowhere")
        assert second.startswith("ConfigurationError: the ranks disagree about the settings")


@contextmanager
def revived(daemon: DaemonProcess, pid_path: Path) -> Iterator[None]:
    """Keep *daemon* running whoever kills it; its process id is always in *pid_path*."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            if daemon.ended():
                daemon.restart()
                pid_path.write_text(str(daemon.pid))

    pid_path.write_text(str(daemon.pid))
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("moment", ["before commit", "after commit"])
def test_the_daemon_dies_under_two_ranks(daemon: DaemonProcess, tmp_path: Path, moment: str) -> None:
    pid_path = tmp_path / "pid"
    script = f"""
def kill_daemon():
    distributed.barrier()
    if rank == 0:
        os.kill(int(open({str(pid_path)!r}).read()), 9)
    distributed.barrier()
client = connect()
for number in range(3):
    checkpoint = client.create(f"step{{number}}", raise_immediately=False)
    checkpoint.save(f"state-{{rank}}.pt", {{"x": torch.full((100_000,), float(number))}})
    if {moment == "before commit"}:
        kill_daemon()
    told(lambda: checkpoint.commit().tag)
    if {moment == "after commit"}:
        kill_daemon()
    client.wait(f"step{{number}}", "tier1", 30)
    assert client.load(f"step{{number}}", f"state-{{rank}}.pt")["x"].mean() == number
    distributed.barrier()
client.close()
distributed.destroy_process_group()
"""
    with revived(daemon, pid_path):
        assert run_two(daemon, tmp_path, script) == ["step0\nstep1\nstep2\n"] * 2
