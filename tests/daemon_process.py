"""A real daemon in a process of its own, for the tests of everything that talks to one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cairn_api.wire import GRPC_SOCKET_NAME, SIDE_SOCKET_NAME

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0


class DaemonProcess:
    """``python -m cairnd`` on folders below *folder*; ready when the constructor returns. A context manager.

    *tier1_path* may lie elsewhere, on a disk of the test's own; *program* replaces ``-m cairnd``. *settings* become
    flags (``capture_memory_bytes=1 << 30`` is ``--capture-memory-bytes 1073741824``). The process is always reaped, and
    its log stays in ``log_path``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        persistent_storage_path: str | None = None,
        tier1_path: Path | None = None,
        program: Sequence[str] = ("-m", "cairnd"),
        **settings: object,
    ) -> None:
        self.runtime_dir = folder / "run"
        self.tier1_path = tier1_path or folder / "tier1"
        self.bucket_path = folder / "bucket"
        for path in (self.runtime_dir, self.tier1_path, self.bucket_path):
            path.mkdir(parents=True, exist_ok=True)
        self.log_path = folder / "cairnd.log"
        self._environment = {**os.environ, **(environment or {})}
        flags = {
            "runtime_dir": self.runtime_dir,
            "tier1_path": self.tier1_path,
            "persistent_storage_path": (
                f"file://{self.bucket_path}" if persistent_storage_path is None else persistent_storage_path
            ),
            **settings,
        }
        self._command = [sys.executable, *program]
        for name, value in flags.items():
            self._command += [f"--{name.replace('_', '-')}", str(value)]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        """The process id of the running daemon."""
        return self._running().pid

    @property
    def running(self) -> bool:
        """Whether the process has been started and has not ended by itself or by a fault."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """All that daemons started here have logged."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def start(self) -> None:
        """Start it and wait until both sockets answer."""
        self.launch()
        try:
            self._wait_ready(time.monotonic() + START_TIMEOUT_S)
        except BaseException:
            self.kill9()
            raise

    def launch(self) -> None:
        """Start it and do not wait: for who kills it before it is ready."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environment)

    def kill9(self) -> None:
        """SIGKILL, and reap."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> int:
        """SIGTERM, and reap; the exit status. One that does not end in time is killed and fails the test."""
        process = self._running()
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(STOP_TIMEOUT_S)
        finally:
            self.kill9()

    def ended(self) -> bool:
        """Whether it was started and has ended by itself, or by somebody else's signal."""
        return self._process is not None and self._process.poll() is not None

    def restart(self) -> None:
        """SIGKILL and start again on the same folders."""
        self.kill9()
        self.start()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise AssertionError("the daemon is not running")
        return self._process

    def _wait_ready(self, deadline_s: float) -> None:
        while not (
            _answers(self.runtime_dir / SIDE_SOCKET_NAME, socket.SOCK_SEQPACKET)
            and _answers(self.runtime_dir / GRPC_SOCKET_NAME, socket.SOCK_STREAM)
        ):
            if self._running().poll() is not None or time.monotonic() > deadline_s:
                raise AssertionError(f"the daemon did not become ready:\n{self.log}")
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill9()


def _answers(path: Path, kind: socket.SocketKind) -> bool:
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True
