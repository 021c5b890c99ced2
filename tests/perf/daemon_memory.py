"""How much memory the daemon needs besides the capture buffers while 4 GB are saved."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

import cairn
from tests.daemon_process import DaemonProcess
from tests.perf.states import make_state, size_of, train_step
from tests.perf.usage import status_bytes

_SAVES = 3
_PERIOD_S = 0.01


class DaemonMemory(NamedTuple):
    """Bytes: what was saved at once, and the daemon's largest resident memory with and without shared memory."""

    state_bytes: int
    peak_rss_bytes: int
    peak_without_shared_bytes: int


def measure_daemon_memory(folder: Path, size_bytes: int) -> DaemonMemory:
    """Save a state of *size_bytes* several times, and watch the daemon until each save is in tier 1."""
    state = make_state("adam", size_bytes)
    state_bytes = size_of(state)
    ended = threading.Event()
    peaks = {"all": 0, "unshared": 0}
    with DaemonProcess(folder, persistent_storage_path="", capture_memory_bytes=2 * state_bytes) as daemon:

        def watch() -> None:
            while not ended.wait(_PERIOD_S):
                shared_bytes = status_bytes(daemon.pid, "RssShmem")
                unshared_bytes = status_bytes(daemon.pid, "RssAnon", "RssFile")
                peaks["all"] = max(peaks["all"], unshared_bytes + shared_bytes)
                peaks["unshared"] = max(peaks["unshared"], unshared_bytes)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with cairn.connect(job="bench", runtime_dir=str(daemon.runtime_dir), buffers=1) as client:
                for number in range(_SAVES):
                    train_step(state)
                    with client.create(f"step{number}") as checkpoint:
                        checkpoint.save("state.pt", state)
                    client.wait(f"step{number}", durability="tier1")
        finally:
            ended.set()
            watcher.join()
    return DaemonMemory(state_bytes, peaks["all"], peaks["unshared"])
