"""Captures one partition and gives it to the daemon: in shared memory if that works, as a stream of bytes if not."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from cairn.overlap import LateCopy
from cairn.session import Session
from cairn.transport.messages import PartitionPlan
from cairn.transport.shared_memory import NoSharedMemoryError, segment_bytes
from cairn.transport.stream import WINDOW_BYTES
from cairn.unsettled import Unsettled
from cairn_api.errors import CairnError, OverloadedError

if TYPE_CHECKING:
    from cairn.capture.plan import CapturePlan, Planner
    from cairn.guards import Guarded

log = logging.getLogger("cairn")

_MOST_PLANNERS = 64
"""A rank saves a few partitions under the same names again and again; others are planned from nothing each time."""


class HandOver:
    """See the module; it remembers what was warned of, and whether memory can be shared on this system."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._memory_shared = session.settings.transport != "stream"
        self._warned: set[str] = set()
        self._planners: dict[str, Planner] = {}

    def give(self, item: Unsettled, name: str, state: object, failed: Callable[[BaseException], None]) -> None:
        """Hand *state* over as partition *name* of a version.

        Its bytes are copied when this returns, except those that overlapped capture may copy later; should that go
        wrong, *failed* is called, before the version can be committed.
        """
        from cairn.capture.interpreter import collector_paused  # noqa: PLC0415 - needs torch

        with collector_paused():  # until the plan's objects are gone, or the collector looks at every one of them
            planned = self._planner_of(name).plan(state)
            self._warn_about_globals(planned)
            partition = PartitionPlan(name, planned.size_bytes, planned.records, planned.globals)
            segment = self._segment_for(item, partition)
            if segment is None:
                item.open_once(self._session.saving)
                if self._session.settings.capture == "overlapped":
                    self._log_once("a state that goes as a byte stream is sent at once, not later")
                self._stream(item, partition, planned, state)
            else:
                self._fill(item, partition, planned, segment, state, failed)
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
        wanted = 1
        try:
            # The first of every partition comes first: the next save needs them all.
            for wanted in range(1, each + 1):
                for name, size_bytes in sizes.items():
                    if self._session.pool.prepare_spare(name, size_bytes, wanted):
                        log.debug("made a spare capture buffer for %s", name)
        except OverloadedError as error:
            if f"spares {wanted}" not in self._warned:
                self._warned.add(f"spares {wanted}")
                log.warning(
                    "capture memory does not hold %d bytes, %d x the partitions of this rank, so %s: %s",
                    wanted * sum(map(segment_bytes, sizes.values())), wanted,
                    "the first saves will be slower" if wanted == 1 else "a save soon after another waits for it",
                    error,
                )  # fmt: skip
        except CairnError as error:
            log.info("no spare capture buffers, so a later save may be slower: %s", error)

    def _planner_of(self, name: str) -> Planner:
        """What knows how partition *name* was laid out last time; one not saved any more is forgotten."""
        from cairn.capture.plan import Planner  # noqa: PLC0415 - needs torch

        planner = self._planners.pop(name, None) or Planner()
        self._planners[name] = planner
        if len(self._planners) > _MOST_PLANNERS:
            del self._planners[next(iter(self._planners))]
        return planner

    def _segment_for(self, item: Unsettled, partition: PartitionPlan) -> str | None:
        """The name of a buffer for *partition*, or None when it is to be streamed."""
        settings, version = self._session.settings, item.opening.version
        if not self._memory_shared:
            return None
        try:
            try:
                return self._session.pool.acquire(version, partition.name, partition.size_bytes)
            except OverloadedError:
                # The budget does not hold `buffers` of them: make do with fewer before giving up on shared memory.
                if not self._reuse_older(item):
                    raise
                return self._session.pool.acquire(version, partition.name, partition.size_bytes)
        except NoSharedMemoryError as error:
            if settings.transport == "shm":
                raise
            self._memory_shared = False
            log.warning("memory cannot be shared here, so saves go as byte streams, which is slower: %s", error)
        except OverloadedError as error:
            if settings.oversize == "fail":
                hint = f'{error.hint}; oversize = "stream" lets such saves go as byte streams, which is slower'
                raise OverloadedError(error.message, hint=hint, context=error.context) from error
            self._warn_once(
                f"oversize {partition.name}",
                f"{partition.name} ({partition.size_bytes} bytes) goes as a byte stream, which is slower: {error}",
            )
        return None

    def _reuse_older(self, item: Unsettled) -> bool:
        """Wait until an older version of this rank is safe and take its buffer; False if there is none to take."""
        session, version = self._session, item.opening.version
        older = session.pool.older_than(version)
        if not older:
            return False
        # To the daemon a buffer is free as long as it was not told what is in it.
        session.overlap.wait_copied()
        item.open_once(session.saving)
        item.seal_rest(session.saving)
        reply = session.saving.reserve(session.settings.buffer_wait_s, older)
        session.note_failures(reply.failures)
        for freed in session.pool.free(reply.free_segments, but=version):
            session.ledger.drop(freed)
        return reply.available

    def _fill(
        self,
        item: Unsettled,
        partition: PartitionPlan,
        planned: CapturePlan,
        name: str,
        state: object,
        failed: Callable[[BaseException], None],
    ) -> None:
        from cairn.capture import native  # noqa: PLC0415 - needs torch

        overlap = self._session.overlap
        guarded = self._guarded(planned)
        with ExitStack() as unfinished:
            self._session.pool.writers.begin(unfinished)
            segment = self._session.pool.segment(name)
            segment.unprotect()
            unfinished.callback(segment.protect)
            image = segment.image[: partition.size_bytes]
            may_wait = None if guarded is None else guarded.may_wait
            threads = native.idle_threads(self._session.local_ranks)
            digests, remainder = planned.write_into(image, may_wait, threads=threads)
            if guarded is not None and remainder is not None:
                late = LateCopy(remainder, guarded, state, failed)
                overlap.copy_later(
                    late, unfinished, lambda later: item.seal_later(partition.digested(digests + later), name)
                )
                self._tell_overlap(partition, remainder.size_bytes)
                return
            item.seal_later(partition.digested(digests), name)
        if self._session.settings.capture != "overlapped":  # else the commit does, off the training thread
            item.seal_rest(self._session.saving)

    def _guarded(self, planned: CapturePlan) -> Guarded | None:
        """What may be copied later; None, with one message, when nothing may although the settings ask for it."""
        if self._session.settings.capture != "overlapped":
            return None
        guarded = self._session.overlap.guarded()
        if guarded is None:
            self._log_once("nothing is copied later: no optimizer is guarded, see Client.guard")
        elif planned.fallback_reason is not None:
            self._log_once(f"a state is copied at once, not later: it holds {planned.fallback_reason}")
        return guarded

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

    def _tell_overlap(self, partition: PartitionPlan, late_bytes: int) -> None:
        topic = f"overlap {partition.name}"
        if topic not in self._warned:
            self._warned.add(topic)
            log.info(
                "%d of %d bytes of %s are copied while training goes on",
                late_bytes, partition.size_bytes, partition.name,
            )  # fmt: skip

    def _log_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning('capture = "overlapped": %s', text)

    def _warn_once(self, topic: str, text: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(text, stacklevel=2)
