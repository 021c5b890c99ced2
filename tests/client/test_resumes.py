"""Resumes that die before they save anything count against their version; those that end otherwise do not."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cairn
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.catalog.health import Health
from tests.daemon_process import DaemonProcess

JOB = "run-7"
ROOT = Path(__file__).parents[2]
RESUME = """
    import os, signal, sys
    import cairn
    client = cairn.connect(job={job!r}, runtime_dir={runtime_dir!r})
    {how}
    {then}
"""
RESTORES = "restored = client.restore(); restored.close(); print(restored.candidate.version.tag, flush=True)"
LOADS = """
    version = client.latest()
    client.load(version, "model.pt")
    client.load(version, "model.pt")
    print(version.tag, flush=True)
"""


def resume(daemon: DaemonProcess, then: str, how: str = RESTORES) -> str:
    """A launch that resumes and then does *then*; the tag that it resumed from."""
    how = textwrap.indent(textwrap.dedent(how).strip(), "    ").strip()
    program = textwrap.dedent(RESUME.format(job=JOB, runtime_dir=str(daemon.runtime_dir), how=how, then=then))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout, done.stderr
    return done.stdout.strip()


def save(client: cairn.Client, *tags: str) -> None:
    for tag in tags:
        with client.create(tag) as checkpoint:
            checkpoint.save("model.pt", {"x": torch.ones(10)})
        client.wait(tag, "tier1", 30)


def run(daemon: DaemonProcess, *arguments: str) -> str:
    command = [sys.executable, "-m", "cairnd.cli.main", "--runtime-dir", str(daemon.runtime_dir), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path, pass_over_after_resumes=1) as running:
        yield running


def test_after_some_deaths_an_older_version_is_taken(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, pass_over_after_resumes=2) as daemon, _connected(daemon) as client:
        save(client, "step1", "step2")
        assert resume(daemon, KILLED, LOADS) == "step2"
        assert resume(daemon, "raise RuntimeError('the loss is not a number')") == "step2"
        daemon.restart()
        assert resume(daemon, KILLED) == "step1"
        assert "passed-over" in run(daemon, "list")
        assert "2 resumes in a row died on it" in " ".join(json.loads(run(daemon, "status", "--json"))["problems"])
        (newest, _) = json.loads(run(daemon, "list", "--json"))["versions"]
        assert newest["passed_over"]
        assert "takes e00001-s000002-step2 again" in run(daemon, "mark", "step2", "--sound")
        assert resume(daemon, KILLED) == "step2"


@pytest.mark.parametrize("then", ["", "sys.exit(1)", "client.close(); raise RuntimeError('later')"])
def test_a_launch_that_ends_otherwise_speaks_against_nothing(daemon: DaemonProcess, then: str) -> None:
    with _connected(daemon) as client:
        save(client, "step1", "step2")
    assert [resume(daemon, then) for _ in range(2)] == ["step2"] * 2


def test_a_save_proves_the_version_that_it_was_resumed_from(daemon: DaemonProcess) -> None:
    with _connected(daemon) as client:
        save(client, "step1", "step2")
    saves = "from tests.client.test_resumes import save; save(client, 'step3'); "
    assert resume(daemon, saves + KILLED) == "step2"
    assert resume(daemon, KILLED) == "step3"
    assert resume(daemon, KILLED) == "step2"


def test_an_operator_marks_a_version(daemon: DaemonProcess) -> None:
    with _connected(daemon) as client:
        save(client, "step1", "step2")
        run(daemon, "mark", "step2", "--pass-over", "its loss exploded")
        with client.restore() or pytest.fail("nothing to restore") as restored:
            assert restored.candidate.version.tag == "step1"
        assert client.load("step2", "model.pt")["x"].sum() == 10, "by its name it is loaded"
    assert "its loss exploded" in run(daemon, "show", "step2")


def test_a_record_that_cannot_be_written_keeps_nobody_from_the_next_daemon(daemon: DaemonProcess) -> None:
    with _connected(daemon) as client:
        save(client, "step1")
    folder = daemon.tier1_path / ".cairn/health"
    folder.mkdir()
    (folder / JOB).touch()  # where a folder belongs
    with _connected(daemon) as client, client.restore() or pytest.fail("nothing to restore"):
        daemon.restart()
        save(client, "step2")


def test_a_version_that_was_lost_with_its_daemon_keeps_nobody_from_starting(tmp_path: Path) -> None:
    lost = VersionId(1, 1, "step1")
    record = tmp_path / "tier1" / layout.health(JOB, lost)
    record.parent.mkdir(parents=True)
    record.write_bytes(Health(lost=True).encode())
    with DaemonProcess(tmp_path) as daemon, _connected(daemon) as client:
        assert client.restore() is None, "nothing was ever durable: training begins"
        assert str(lost) in run(daemon, "status"), "and the operator is told"
        save(client, "step1")
        assert str(lost) + " was captured" not in " ".join(run(daemon, "status").split())


def _connected(daemon: DaemonProcess) -> cairn.Client:
    return cairn.connect(job=JOB, runtime_dir=str(daemon.runtime_dir))
