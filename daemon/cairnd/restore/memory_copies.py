"""Versions in the memory tier, for restores: whether a buffer still holds what was digested, and who has it mapped.

A buffer is hashed before its first use here, and then believed like a file (``verify_on_load``): from commit to release
its owner's mapping is read-only.

A loader may map a buffer for as long as its tensors live, which is called a hold. That must never cost anybody a save:
a buffer is held only if its trainer is gone, so that nobody will ever fill it again, and only if what is left of the
capture budget would hold two more for each. Everybody else is given the bytes to copy.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from cairn_api.errors import ConfigurationError
from cairn_api.names import VersionId
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.hashing import Hashing
from cairnd.catalog.verified import VerifiedFiles
from cairnd.digests import Digest
from cairnd.model import Partition
from cairnd.restore.pace import Meter
from cairnd.session.memory import CaptureMemory, Segment
from cairnd.workers import Workers

_SPARE_FACTOR = 2
"""How often what is held must fit into the rest of the budget: a rank uses two buffers by default."""


@dataclass(frozen=True, slots=True)
class _Hold:
    client: int
    segment: Segment


class MemoryCopies:
    """Used from the event loop's thread."""

    def __init__(
        self,
        catalog: Catalog,
        memory: CaptureMemory,
        hashing: Hashing,
        verified: VerifiedFiles,
        workers: Workers,
    ) -> None:
        self._catalog = catalog
        self._memory = memory
        self._hashing = hashing
        self._verified = verified
        self._workers = workers
        self._known: dict[str, tuple[tuple[str, VersionId] | None, Digest]] = {}
        self._holds: dict[str, _Hold] = {}

    def knows(self, segment: Segment, partition: Partition) -> bool:
        """Whether :meth:`intact` would say yes without hashing."""
        return not self._verified.always and self._known.get(segment.name) == (segment.owner, partition.digest)

    async def intact(self, segment: Segment, partition: Partition, meter: Meter) -> bool:
        """Whether *segment* holds the bytes of *partition*. Nobody may let the segment go meanwhile."""
        digest = partition.digest
        if digest is None:
            return False
        if self.knows(segment, partition):
            return True
        found = await self._workers.run(self._hash, segment, partition, meter)
        if found != digest:
            self._known.pop(segment.name, None)
            return False
        self._known = {name: known for name, known in self._known.items() if name in self._memory.segments}
        self._known[segment.name] = (segment.owner, digest)
        return True

    def hold(self, client: int, segment: Segment) -> str | None:
        """Let *client* map *segment* until :meth:`end_hold`; the name of the hold, or None when it has to copy."""
        held = {id(hold.segment): hold.segment.size_bytes for hold in self._holds.values()}
        held[id(segment)] = segment.size_bytes
        if segment.client is not None or self._memory.free_bytes < _SPARE_FACTOR * sum(held.values()):
            return None
        name = secrets.token_hex(16)
        self._holds[name] = _Hold(client, segment)
        segment.readers += 1
        return name

    def end_hold(self, client: int, name: str) -> None:
        """The mapping is gone. Raises :class:`ConfigurationError` unless *client* has that hold."""
        hold = self._holds.get(name)
        if hold is None or hold.client != client:
            raise ConfigurationError("this hold of a buffer does not exist (any more)", hint="end a hold once")
        self._end(name)

    def client_gone(self, client: int) -> None:
        """End all holds of *client*: its mappings go with its process, and keep their pages until then."""
        for name in [name for name, hold in self._holds.items() if hold.client == client]:
            self._end(name)

    def _end(self, name: str) -> None:
        self._holds.pop(name).segment.readers -= 1
        self._catalog.wake()

    def _hash(self, segment: Segment, partition: Partition, meter: Meter) -> Digest:
        with segment.view(partition.size_bytes) as view, self._verified.timed(partition.size_bytes, meter.digested):
            return self._hashing.of_memory(view, meter.reader(partition))
