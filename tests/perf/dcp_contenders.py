"""PyTorch's distributed checkpoint, synchronous and asynchronous, and torchsnapshot."""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save

from tests.perf.contender import Contender, Place
from tests.perf.states import State, tensors_of

_OTHER_DESCRIPTORS = 1000


class DcpSave(Contender):
    """``torch.distributed.checkpoint.save``, which fsyncs its files."""

    name = "DCP save"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.folder = place.folder / self.name  # one folder: ranks write a checkpoint together

    def save(self, state: State) -> None:
        self.number += 1
        save(self._named(state), checkpoint_id=self.path())

    def finish(self) -> None:
        pass

    def load_into(self, live: State) -> object:
        return load(self._named(live), checkpoint_id=self.path())

    def _named(self, state: State) -> dict[str, Any]:
        """Ranks hold different states: without names of their own they count as copies, and one is left out."""
        return {f"rank{self.place.rank}": state}


class DcpAsync(DcpSave):
    """``async_save`` with its default staging: new memory at each save, written by a thread."""

    name = "DCP async, thread"
    restores = False
    checkpointer = AsyncCheckpointerType.THREAD
    shared_staging = False

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._stager: DefaultStager | None = None
        self._saving: Future[Any] | None = None

    def open(self, state: State) -> None:
        super().open(state)
        if self.shared_staging:
            wanted, allowed = len(tensors_of(state)) + _OTHER_DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            if wanted > allowed:  # once they are used up, nothing else in this process can be measured either
                raise RuntimeError(f"it takes a descriptor per tensor, and `ulimit -n` of {allowed} is too low")
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=False,
                    use_shared_memory=True,
                    use_async_staging=False,
                    use_non_blocking_copy=False,
                )
            )

    def save(self, state: State) -> None:
        self.number += 1
        answer = async_save(
            self._named(state),
            checkpoint_id=self.path(),
            async_checkpointer_type=self.checkpointer,
            async_stager=self._stager,
        )
        self._saving = cast("Future[Any]", answer)

    def finish(self) -> None:
        assert self._saving is not None
        self._saving.result()

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
        self._stager = self._saving = None
        super().close()


class DcpAsyncShared(DcpAsync):
    """The same with staging into shared memory that is kept from save to save."""

    name = "DCP async, thread, shared staging"
    shared_staging = True


class DcpAsyncProcess(DcpAsyncShared):
    """Written by a process, out of shared staging memory that is kept from save to save."""

    name = "DCP async, process"
    checkpointer = AsyncCheckpointerType.PROCESS

    def save(self, state: State) -> None:
        if self.helpers():
            super().save(state)
            return
        with _errors_to(self.place.folder / f"dcp-process-{self.place.rank}.log"):  # it logs each step of each save
            super().save(state)
            self.finish()  # the process is started by a thread

    def helpers(self) -> list[int]:
        process = _async_process_executor._CHECKPOINT_PROCESS
        pid = None if process is None else process._save_process.pid
        return [] if pid is None else [pid]

    def shut_down(self) -> None:
        process = _async_process_executor._CHECKPOINT_PROCESS
        if process is not None:
            _async_process_executor._CHECKPOINT_PROCESS = None
            process._save_process.terminate()
            process._save_process.join()


@contextmanager
def _errors_to(path: Path) -> Iterator[None]:
    """Processes started meanwhile write their standard error to *path*; so does this one."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with path.open("ab") as log:
            os.dup2(log.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class TorchSnapshot(Contender):
    """``Snapshot.async_take``; it does not fsync, so that is done and counted after it."""

    name = "torchsnapshot async"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.folder = place.folder / self.name
        self._pending: Any = None

    @classmethod
    def why_not(cls) -> str:
        if importlib.util.find_spec("torchsnapshot") is None:
            return "torchsnapshot is not installed"
        try:
            importlib.import_module("torchsnapshot")
        except Exception as error:  # noqa: BLE001 - whatever an old package raises beside a new torch is its reason
            return f"torchsnapshot cannot be imported: {type(error).__name__}: {error}"
        return ""

    def save(self, state: State) -> None:
        from torchsnapshot import Snapshot, StateDict  # noqa: PLC0415 - not a dependency of the tests

        self.number += 1
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        self._pending = Snapshot.async_take(str(self.path()), {"state": StateDict(**state)})

    def finish(self) -> None:
        self._pending.wait()
        super().finish()

    def load_into(self, live: State) -> object:
        from torchsnapshot import Snapshot, StateDict  # noqa: PLC0415 - as above

        return Snapshot(str(self.path())).restore({"state": StateDict(**live)})

    def close(self) -> None:
        self._pending = None
        super().close()
