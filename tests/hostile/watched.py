"""A daemon under hostile input, and what must be true of it afterwards: the same process, answering, not grown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from cairn_api.v1 import admin_pb2
from tests.crash.ranks import descriptors, wait_until
from tests.daemon_process import DaemonProcess
from tests.hostile.peer import Peer

STATUS_DEADLINE_S = 30.0
"""The deadline that clients give a call that needs no disk."""

MOST_GROWTH_BYTES = 64 * 1024 * 1024

_COMPLAINTS = re.compile(
    r"Traceback|unforeseen error|background task failed|Unexpected \[|never retrieved|never awaited|"
    r" (ERROR|CRITICAL) |Exception ignored|Fatal Python error"
)


class Watched:
    """Watches *daemon* from when it is made: see :meth:`check`."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon
        self.pid = daemon.pid
        self.peer = Peer(daemon.runtime_dir)
        self.peer.hello()
        self._log_bytes = 0
        self.rss_bytes = self.descriptors = 0
        self.most_rss_bytes = 0
        self.settle()

    def settle(self) -> None:
        """From here memory and descriptors are counted: once everything that is made at first use has been made."""
        self.status()
        self.rss_bytes, self.descriptors = rss_bytes(self.pid), len(self._held())

    def status(self) -> admin_pb2.StatusReply:
        """The daemon's status, within the deadline."""
        return self.peer.status(STATUS_DEADLINE_S)

    @property
    def growth_bytes(self) -> int:
        """How much memory the daemon has gained since :meth:`settle`."""
        return rss_bytes(self.pid) - self.rss_bytes

    def complaints(self) -> list[str]:
        """Lines of the log since the last call that tell of a defect."""
        log = self.daemon.log_path.read_bytes()[self._log_bytes :]
        self._log_bytes += len(log)
        lines = log.decode(errors="replace").splitlines()
        found = [number for number, line in enumerate(lines) if _COMPLAINTS.search(line)]
        return ["\n".join(line[:300] for line in lines[number : number + 40]) for number in found[:3]]

    def check(self, *, clients: int = 1, growth_bytes: int = MOST_GROWTH_BYTES) -> list[str]:
        """What is wrong with the daemon now that everybody but *clients* has left: nothing, if all is well."""
        if not self.daemon.running or self.daemon.pid != self.pid:
            return [f"the daemon ended: {self.daemon.log[-3000:]}"]
        wrong = []
        try:
            wait_until(lambda: self.status().clients <= clients, "everybody who left is forgotten", STATUS_DEADLINE_S)
            wait_until(
                lambda: len(self._held()) <= self.descriptors,
                "descriptors are given back",
                STATUS_DEADLINE_S,
                describe=self._held,
            )
            wait_until(
                lambda: self.growth_bytes < growth_bytes,
                "memory is given back",
                STATUS_DEADLINE_S,
                describe=lambda: f"{self.growth_bytes / 2**20:.0f} MiB more",
            )
        except (AssertionError, grpc.RpcError) as error:
            wrong.append(str(error)[:2000])
        return wrong + [f"the log tells of a defect: {complaint}" for complaint in self.complaints()]

    def _held(self) -> list[str]:
        # The newest version of each job stays in memory when its trainer is gone, until somebody needs the room.
        return [what for what in descriptors(self.pid) if not what.startswith("/memfd:")]

    def close(self) -> None:
        """Leave."""
        self.peer.close()


@contextmanager
def watched(daemon: DaemonProcess) -> Iterator[Watched]:
    """Watch *daemon*, and leave it at the end."""
    watcher = Watched(daemon)
    try:
        yield watcher
    finally:
        watcher.close()


def rss_bytes(pid: int) -> int:
    """Resident memory of a process, without the shared memory that clients made and it maps."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")) * 1024
