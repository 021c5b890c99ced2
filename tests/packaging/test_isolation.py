"""Each side runs where the other side's dependencies are absent: an import of them fails as if not installed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

READY_TIMEOUT_S = 60

BLOCKER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked by the test)", name=name)

sys.meta_path.insert(0, Absent())
"""

DAEMON_BLOCKED = ("torch", "cairn", "deepspeed", "numpy")
CLIENT_BLOCKED = (
    "cairnd", "fsspec", "s3fs", "aiobotocore", "botocore", "awscrt", "isal", "prometheus_client", "rich",
    "grpc_health", "grpc_reflection", "deepspeed",
)  # fmt: skip


def script(blocked: tuple[str, ...], body: str) -> str:
    return BLOCKER.format(blocked=blocked) + textwrap.dedent(body)


def run(blocked: tuple[str, ...], body: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script(blocked, body)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_blocker_blocks() -> None:
    outcome = run(("torch",), "import torch")
    assert outcome.returncode == 1
    assert "blocked by the test" in outcome.stderr


def test_importing_the_client_needs_nothing_of_the_daemon() -> None:
    outcome = run(
        CLIENT_BLOCKED,
        """
        import cairn
        assert callable(cairn.connect)
        assert "cairnd" not in sys.modules
        """,
    )
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("module", ["cairnd.app", "cairnd.cli.main"])
def test_importing_the_daemon_needs_nothing_of_the_client(module: str) -> None:
    outcome = run(DAEMON_BLOCKED, f"import {module}")
    assert outcome.returncode == 0, outcome.stderr


def test_the_daemon_starts_and_serves_without_torch(tmp_path: Path) -> None:
    body = """
        import runpy
        sys.argv[0] = "cairnd"
        runpy.run_module("cairnd", run_name="__main__", alter_sys=True)
        """
    runtime, notify = tmp_path / "run", tmp_path / "notify"
    runtime.mkdir(mode=0o755)
    flags = ["--runtime-dir", str(runtime), "--tier1-path", str(tmp_path / "tier1")]
    flags += ["--persistent-storage-path", f"file://{tmp_path}/bucket", "--capture-memory-bytes", str(64 * 1024 * 1024)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(notify))
        listener.settimeout(READY_TIMEOUT_S)
        log = tmp_path / "log"
        with log.open("w") as stream:
            daemon = subprocess.Popen(
                [sys.executable, "-c", script(DAEMON_BLOCKED, body), *flags],
                env=os.environ | {"NOTIFY_SOCKET": str(notify)},
                stderr=stream,
            )
        try:
            listener_says_ready(listener, daemon, log)
            status = [sys.executable, "-m", "cairnd.cli.main", "--runtime-dir", str(runtime), "status", "--json"]
            answer = subprocess.run(status, capture_output=True, text=True, check=False, timeout=60)
            assert answer.returncode == 0, answer.stderr
        finally:
            daemon.send_signal(signal.SIGTERM)
            try:
                code = daemon.wait(timeout=60)
            except subprocess.TimeoutExpired:
                daemon.kill()
                code = daemon.wait()
        assert code == 0, log.read_text()


def listener_says_ready(listener: socket.socket, daemon: subprocess.Popen[bytes], log: Path) -> None:
    """Read notifications until ``READY=1``; a daemon that dies first is reported with its log."""
    listener.settimeout(0.2)
    for _ in range(int(READY_TIMEOUT_S / 0.2)):
        try:
            message = listener.recv(4096)
        except TimeoutError:
            assert daemon.poll() is None, log.read_text()
            continue
        if b"READY=1" in message.splitlines():
            return
    pytest.fail(f"no READY=1 within {READY_TIMEOUT_S} s:\n{log.read_text()}")
