"""Cairn itself: a real daemon, and a client in each rank process."""

from __future__ import annotations

import shutil
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import cairn
from tests.daemon_process import DaemonProcess
from tests.perf.contender import Contender, Place
from tests.perf.page_cache import PageCache
from tests.perf.states import State, tensors_of

_PARTITION = "state.pt"
_PREFAULT_THREAD = "cairn-prefault"
_NEVER_S = 1e9


class Cairn(Contender):
    """``create``, ``save``, ``commit``; durable is tier 1."""

    name = "Cairn"
    warm_ups = 2  # two capture buffers
    goes_direct = True
    preallocates = True
    durability = "tier1"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.folder = place.folder / self.name
        self.daemon: DaemonProcess | None = None
        self._client: cairn.Client | None = None
        self._partition_bytes = 0

    @property
    def client(self) -> cairn.Client:
        """The client of this rank while it is open."""
        assert self._client is not None
        return self._client

    def open(self, state: State) -> None:  # noqa: ARG002 - as in the base class
        if self.place.rank == 0 and self.daemon is None:
            self.daemon = self._start()
        self.place.meet()
        self._client = self._connect()

    def _start(self) -> DaemonProcess:
        # Without tier 2 the figures are those of tier 1 alone: otherwise the first save would be uploaded at once.
        storage = None if self.durability == "tier2" else ""
        budget_bytes = 4 * self.place.world_size * self.place.state_bytes + (1 << 30)
        return DaemonProcess(
            self.folder, persistent_storage_path=storage, capture_memory_bytes=budget_bytes, tier2_delete_grace_s=20
        )

    def _connect(self) -> cairn.Client:
        return cairn.connect(
            job="bench",
            runtime_dir=str(self.folder / "run"),
            world_size=self.place.world_size,
            persistent_time_interval=_NEVER_S,
            capture="overlapped" if self.overlaps else "blocking",
        )

    def preallocate(self) -> None:
        self.client.preallocate({_PARTITION: self._partition_bytes})
        self.settle()

    def save(self, state: State) -> None:
        self.number += 1
        before_bytes = self.client.statistics()["captured_bytes"]
        with self.client.create(self._tag()) as checkpoint:
            checkpoint.save(_PARTITION, state)
        self._partition_bytes = int(self.client.statistics()["captured_bytes"] - before_bytes)

    def finish(self) -> None:
        self.client.wait(self._tag(), durability=self.durability)

    def settle(self) -> None:
        for thread in threading.enumerate():
            if thread.name == _PREFAULT_THREAD:
                thread.join()

    def helpers(self) -> list[int]:
        return [] if self.daemon is None else [self.daemon.pid]

    def path(self) -> Path:
        return next((self.folder / "tier1" / "jobs" / "bench").glob(f"*-{self._tag()}"))

    def load(self) -> Any:
        """The newest save."""
        return self.client.load(self._tag(), _PARTITION, map_location="cpu")

    def load_into(self, live: State) -> object:
        return self.client.load(self._tag(), _PARTITION, map_location="cpu", into=live)

    def measure_restores(self, live: State, cache: PageCache) -> dict[str, float]:
        timed = self.place.timed
        self._be_born_again()
        result = {
            "memory_first_load": timed(self.load),
            "memory_load": timed(self.load),
            "memory_live": timed(lambda: self.load_into(live)),
        }
        self._lose_memory()
        result["first_live_cold"] = self.cold(cache, lambda: self.load_into(live))
        assert self.floors is not None
        result["raw_read_s"] = self.floors.read(cache)
        result["live_cold"] = self.cold(cache, lambda: self.load_into(live))
        result["load_warm"] = self.warm(cache, self.load)
        result["live_warm"] = self.warm(cache, lambda: self.load_into(live))
        return result

    def _be_born_again(self) -> None:
        """What restores from memory is a new process: the one that saved, and may save again, is gone."""
        self.client.close()
        self.place.meet()
        self._client = self._connect()

    def _lose_memory(self) -> None:
        """Have a new daemon on the same folders: it knows of tier 1 only, and has verified no file."""
        self.client.close()
        self.place.meet()
        if self.daemon is not None:
            self.daemon.restart()
        self.place.meet()
        self._client = self._connect()

    def discard(self) -> None:
        pass  # retention removes old versions

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = None
        self.place.meet()
        self.shut_down()  # it would keep the last version in memory, beside the contenders that come next
        if self.place.rank == 0:
            shutil.rmtree(self.folder)
        self.place.meet()

    def shut_down(self) -> None:
        if self.daemon is not None:
            self.daemon.kill9()
        self.daemon = None

    def _tag(self) -> str:
        return f"step{self.number}"


class CairnTier2(Cairn):
    """Durable is the bucket, here a folder on the same disk: the drain goes on until the upload is done."""

    name = "Cairn to tier 2 file://"
    restores = False
    preallocates = False
    durability = "tier2"


class CairnOverlapped(Cairn):
    """The copy goes on during forward and backward; the stall is what is left of it when the optimizer steps."""

    name = "Cairn overlapped"
    restores = False
    preallocates = False
    overlaps = True

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._optimizer: torch.optim.Optimizer | None = None

    @classmethod
    def why_not(cls) -> str:
        if "capture" in {item.name for item in fields(cairn.ClientSettings)} and hasattr(cairn.Client, "guard"):
            return ""
        return "this client has no overlapped capture"

    def open(self, state: State) -> None:
        super().open(state)
        self._optimizer = torch.optim.SGD(tensors_of(state), lr=0.0)
        self.client.guard(self._optimizer)

    def before_update(self) -> None:
        self.client.wait_copied()  # what a step of the guarded optimizer begins with

    def close(self) -> None:
        super().close()
        self._optimizer = None
