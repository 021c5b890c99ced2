"""The capture buffers of this rank: which version owns each, and which may be overwritten.

A segment belongs to its version until the daemon says that it is free. The one that held the same partition last time
is taken first: it has the right size and its pages are warm.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cairn.transport.shared_memory import Segment, segment_bytes
from cairn.transport.writers import Writers
from cairn_api.errors import ConfigurationError, OverloadedError, SaveFailedError
from cairn_api.names import VersionId

_WASTE_FACTOR = 2
"""A free segment more than this times too large is left for the partition it was made for."""


@dataclass(slots=True, eq=False)
class _Slot:
    segment: Segment
    partition: str
    owner: VersionId | None


@dataclass(slots=True)
class Pool:
    """See the module. Safe to use from several threads.

    *share* has a new segment granted, lets it be made and hands it to the daemon (and raises
    :class:`OverloadedError` when the budget is spent); *release* tells the daemon that one is gone.

    ``writers`` are filling a segment. They are kept out while segments are offered to a restarted daemon: a buffer must
    not be duplicated half-written.
    """

    share: Callable[[int, Callable[[], Segment]], None]
    release: Callable[[Segment], None]
    pin: Callable[[Segment], None] = lambda _: None
    """Registers a new segment's pages with the GPU's driver; a no-op without one."""
    writers: Writers = field(default_factory=Writers)
    _slots: list[_Slot] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _making: threading.Lock = field(default_factory=threading.Lock)
    """One segment is made at a time: two threads would only take pages, and memory, from each other."""
    _saves_waiting: int = 0
    _no_save_waits: threading.Condition = field(default_factory=threading.Condition)
    _generation: int = 0
    _closed: bool = False

    def acquire(self, owner: VersionId, partition: str, size_bytes: int) -> str:
        """The name of a segment of at least *size_bytes* for *partition* of version *owner*.

        Raises :class:`OverloadedError` when neither the daemon's budget nor this machine has room for a new one, and
        :class:`NoSharedMemoryError` when memory cannot be shared here at all.
        """
        if (name := self._take(owner, partition, size_bytes, _WASTE_FACTOR)) is not None:
            return name
        with self._before_spares(), self._making:
            # Perhaps the spare that was just being made.
            if (name := self._take(owner, partition, size_bytes, _WASTE_FACTOR)) is not None:
                return name
            try:
                return self._add(owner, partition, size_bytes)
            except OverloadedError:
                # Any fitting buffer is better than none; failing that, those too small make room for one that fits.
                if (name := self._take(owner, partition, size_bytes, None)) is not None:
                    return name
                if not self._give_back_free():
                    raise
            return self._add(owner, partition, size_bytes)

    def segment(self, name: str) -> Segment:
        """The segment of that name as it is now; be one of ``writers`` as long as it is used."""
        with self._lock:
            for slot in self._slots:
                if slot.segment.name == name:
                    return slot.segment
        raise SaveFailedError("the capture buffer of this save was lost", hint="save again")

    @contextmanager
    def mapping_of(self, fd: int) -> Iterator[ctypes.Array[ctypes.c_char] | None]:
        """The memory behind *fd* where this process has it mapped as a segment; nobody writes to a segment meanwhile.

        None if it is no segment of this process, or if one is being written to just now.
        """
        wanted = os.fstat(fd)
        with self.writers.none_now() as whole:
            with self._lock:
                segments = [slot.segment for slot in self._slots] if whole else []
                found = next((item for item in segments if os.path.samestat(os.fstat(item.fd), wanted)), None)
                memory = None if found is None else found.memory
            yield memory

    def prepare_spare(self, partition: str, size_bytes: int, wanted: int) -> bool:
        """Make one more free segment for *partition* unless *wanted* large enough exist; says whether it did.

        For idle moments: a save that needs a segment goes first, so that it waits for one spare at most.
        """
        with self._no_save_waits:
            self._no_save_waits.wait_for(lambda: not self._saves_waiting)
        with self._making:
            with self._lock:
                made = [slot for slot in self._slots if slot.partition == partition]
                if sum(slot.segment.size_bytes >= size_bytes for slot in made) >= wanted:
                    return False
            self._add(None, partition, size_bytes)
        return True

    def free(self, names: Iterable[str], *, but: VersionId | None = None) -> set[VersionId]:
        """These segments may be overwritten, except those of *but*, a version that the daemon may not know yet.

        Returns the versions that own none any more.
        """
        wanted = set(names)
        with self._lock:
            touched = set()
            for slot in self._slots:
                if slot.segment.name in wanted and slot.owner not in (None, but):
                    touched.add(slot.owner)
                    slot.owner = None
            return touched - {slot.owner for slot in self._slots}

    def discard(self, owner: VersionId) -> list[str]:
        """Let go of all segments of *owner*, which is lost; their names, for the daemon to be told."""
        with self._lock:
            gone = [slot for slot in self._slots if slot.owner == owner]
            self._slots = [slot for slot in self._slots if slot.owner != owner]
        for slot in gone:
            slot.segment.close()
        return [slot.segment.name for slot in gone]

    def forget(self, names: Iterable[str]) -> None:
        """Let go of these segments, which the daemon does not know and therefore never says that they are free."""
        wanted = set(names)
        with self._lock:
            gone = [slot for slot in self._slots if slot.segment.name in wanted]
            self._slots = [slot for slot in self._slots if slot.segment.name not in wanted]
        for slot in gone:
            slot.segment.close()

    def older_than(self, version: VersionId) -> int:
        """How many other versions own segments."""
        with self._lock:
            return len({slot.owner for slot in self._slots} - {None, version})

    def owned_by(self, owner: VersionId) -> list[Segment]:
        """The segments that hold bytes of *owner*."""
        with self._lock:
            return [slot.segment for slot in self._slots if slot.owner == owner]

    def keep_only(self, owners: Iterable[VersionId]) -> None:
        """The daemon is a new one and knows no segment: those that hold nothing of *owners* go."""
        kept = set(owners)
        with self._lock:
            self._generation += 1
            gone = [slot for slot in self._slots if slot.owner not in kept]
            self._slots = [slot for slot in self._slots if slot.owner in kept]
        for slot in gone:
            slot.segment.close()

    def replace(self, old: Segment, new: Segment) -> None:
        """*new* holds the bytes of *old* from now on."""
        with self._lock:
            for slot in self._slots:
                if slot.segment is old:
                    slot.segment = new
        old.close()

    def close(self) -> None:
        """Let go of all segments. The daemon keeps what versions it still needs."""
        with self._lock:
            self._closed = True
            slots, self._slots = self._slots, []
        for slot in slots:
            slot.segment.close()

    @contextmanager
    def _before_spares(self) -> Iterator[None]:
        with self._no_save_waits:
            self._saves_waiting += 1
        try:
            yield
        finally:
            with self._no_save_waits:
                self._saves_waiting -= 1
                self._no_save_waits.notify_all()

    def _take(self, owner: VersionId, partition: str, size_bytes: int, waste_factor: int | None) -> str | None:
        with self._lock:
            fitting = [slot for slot in self._slots if slot.owner is None and slot.segment.size_bytes >= size_bytes]
            if waste_factor is not None:
                limit_bytes = waste_factor * segment_bytes(size_bytes)
                fitting = [slot for slot in fitting if slot.segment.size_bytes <= limit_bytes]
            if not fitting:
                return None
            best = min(fitting, key=lambda slot: (slot.partition != partition, slot.segment.size_bytes))
            best.owner, best.partition = owner, partition
            return best.segment.name

    def _add(self, owner: VersionId | None, partition: str, size_bytes: int) -> str:
        while True:
            generation = self._generation
            segment = self._make(size_bytes)
            with self._lock:
                if generation == self._generation and not self._closed:
                    self._slots.append(_Slot(segment, partition, owner))
                    return segment.name
            segment.close()  # the daemon was replaced meanwhile, and the new one may never have seen this segment
            if self._closed:
                raise ConfigurationError("this Cairn client is closed", hint="connect again")

    def _make(self, size_bytes: int) -> Segment:
        made: list[Segment] = []

        def make() -> Segment:
            if not made:
                made.append(Segment.create(segment_bytes(size_bytes)))
            return made[0]

        try:
            self.share(segment_bytes(size_bytes), make)
            made[0].populate()
            self.pin(made[0])
        except BaseException:
            for segment in made:
                segment.close()
            raise
        made[0].protect()
        return made[0]

    def _give_back_free(self) -> bool:
        with self._lock:
            gone = [slot for slot in self._slots if slot.owner is None]
            self._slots = [slot for slot in self._slots if slot.owner is not None]
        for slot in gone:
            self.release(slot.segment)
            slot.segment.close()
        return bool(gone)
