"""Captures one partition and gives it to the daemon: in shared memory if that works, as a stream of bytes if not."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from cairn.session import Session
from cairn.transport.messages import PartitionPlan
from cairn.transport.shared_memory import NoSharedMemoryError
from cairn.transport.stream import WINDOW_BYTES
from cairn.unsettled import Unsettled
from cairn_api.errors import CairnError, OverloadedError
from cairn_api.names import VersionId

if TYPE_CHECKING:
    from cairn.capture.plan import CapturePlan

log = logging.getLogger("cairn")


class HandOver:
    """See the module; it remembers what was warned of, and whether memory can be shared on this system."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._memory_shared = session.settings.transport != "stream"
        self._warned: set[str] = set()

    def give(self, item: Unsettled, name: str, state: object) -> None:
        """Hand *state* over as partition *name* of a version; its bytes are copied when this returns."""
        from cairn.capture import plan as capture  # noqa: PLC0415 - needs torch

        planned = capture.plan(state)
        self._warn_about_globals(planned)
        partition = PartitionPlan(name, planned.size_bytes, planned.records, planned.globals)
        segment = self._segment_for(item.opening.version, partition)
        if segment is None:
            self._stream(item, partition, planned, state)
        else:
            self._fill(item, partition, planned, segment)
        counters = self._session.counters
        counters.fallback_captures += planned.fallback_reason is not None
        counters.partitions += 1
        counters.captured_bytes += partition.size_bytes

    def prefault(self, sizes: Mapping[str, int], each: int) -> None:
        """In the background, bring the number of buffers for partitions of these *sizes* in bytes to *each*."""
        if self._memory_shared and sizes:
            work = threading.Thread(target=self._prefault, args=(dict(sizes), each), name="cairn-prefault", daemon=True)
            work.start()

    def _prefault(self, sizes: Mapping[str, int], each: int) -> None:
        try:
            for name, size_bytes in sizes.items():
                while self._session.pool.prepare_spare(name, size_bytes, each):
                    log.debug("made a spare capture buffer for %s", name)
        except CairnError as error:
            log.info("no spare capture buffers, so a later save may be slower: %s", error)

    def _segment_for(self, version: VersionId, partition: PartitionPlan) -> str | None:
        """The name of a buffer for *partition*, or None when it is to be streamed."""
        settings = self._session.settings
        if not self._memory_shared:
            return None
        try:
            try:
                return self._session.pool.acquire(version, partition.name, partition.size_bytes)
            except OverloadedError:
                # The budget does not hold `buffers` of them: make do with fewer before giving up on shared memory.
                if not self._reuse_older(version):
                    raise
                return self._session.pool.acquire(version, partition.name, partition.size_bytes)
        except NoSharedMemoryError as error:
            if settings.transport == "shm":
                raise
            self._memory_shared = False
            log.warning("memory cannot be shared here, so saves go as byte streams, which is slower: %s", error)
        except OverloadedError as error:
            if settings.oversize == "fail":
                raise
            self._warn_once(
                f"oversize {partition.name}",
                f"{partition.name} ({partition.size_bytes} bytes) goes as a byte stream, which is slower: {error}",
            )
        return None

    def _reuse_older(self, version: VersionId) -> bool:
        """Wait until an older version of this rank is safe and take its buffer; False if there is none to take."""
        session = self._session
        older = session.pool.older_than(version)
        if not older:
            return False
        reply = session.saving.reserve(session.settings.buffer_wait_s, older)
        session.note_failures(reply.failures)
        for freed in session.pool.free(reply.free_segments):
            session.ledger.drop(freed)
        return reply.available

    def _fill(self, item: Unsettled, partition: PartitionPlan, planned: CapturePlan, name: str) -> None:
        pool = self._session.pool
        with pool.writing:
            segment = pool.segment(name)
            segment.unprotect()
            try:
                planned.write_into(segment.image[: partition.size_bytes])
            finally:
                segment.protect_soon()
            item.partitions[partition.name] = (partition, name)
        self._session.saving.seal(item.opening.version, partition, name)

    def _stream(self, item: Unsettled, partition: PartitionPlan, planned: CapturePlan, state: object) -> None:
        import torch  # noqa: PLC0415 - a client that only lists versions needs no torch

        from cairn.capture import plan as capture  # noqa: PLC0415 - as above

        if torch.cuda.is_available():
            torch.cuda.synchronize()  # gRPC reads the windows on a thread that does not know this one's streams
        plans = [planned]

        def windows() -> Iterable[memoryview]:
            # A plan lets go of its tensors once read to the end; another attempt plans the same bytes again.
            return (plans.pop() if plans else capture.plan(state)).windows(WINDOW_BYTES)

        self._session.saving.put(item.opening.version, partition, windows)
        item.partitions[partition.name] = (partition, "")
        self._session.counters.streamed_partitions += 1

    def _warn_about_globals(self, planned: CapturePlan) -> None:
        """At the first save that has any: a load is too late to find out."""
        if "globals" in self._warned or not self._session.settings.weights_only:
            return
        from cairn.capture.globals import outside_allow_list  # noqa: PLC0415 - needs torch

        if outside := outside_allow_list(planned.globals):
            self._warn_once(
                "globals",
                f"this state refers to {', '.join(outside)}, which a load with weights_only=True refuses. It is saved "
                "as it is; to load it, pass weights_only=False if you trust whoever can write these checkpoints, or "
                "torch.serialization.add_safe_globals",
            )

    def _warn_once(self, topic: str, text: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(text, stacklevel=2)
