"""One partition from its capture buffer to its file in tier 1: sealed, digested and written in one pass.

What is written next is sealed meanwhile. The processor is busy for a tenth of the time that the disk takes, so this is
done at the speed of the disk. It is written 64 MiB at a time: with 16 MiB the disk stood still between any two, for 7 %
of the time, and several threads took more of the processor.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future, wait

from cairn_api.errors import InternalError
from cairnd.digests import BLOCK_BYTES, Digest
from cairnd.sealing import SealingPass
from cairnd.session.saves import Received

WRITE_BYTES = 4 * BLOCK_BYTES


class Draining:
    """Writes the partition *item*. With *digesting*, a pool of threads, the next bytes are sealed there.

    Of the pieces that the client digested, those whose numbers are in *rechecked* are digested again. Calls block and
    come one at a time, from any thread. After an error nothing here uses the buffer or the file any more, and the
    caller discards the file.
    """

    def __init__(self, item: Received, digesting: Executor | None, rechecked: range) -> None:
        if item.segment is None or item.writer is None:
            raise InternalError(f"partition {item.name!r} was sealed without its bytes or without a place in tier 1")
        self.size_bytes = item.size_bytes
        self._segment = item.segment
        self._writer = item.writer
        self._sealing = SealingPass(item.size_bytes, item.records, item.digests, rechecked)
        self._sealed_bytes = 0
        self._digesting = digesting

    def write(self, start: int, stop: int) -> None:
        """Seal and write the bytes from *start*, where the last call ended, to *stop*: whole pages, or the end.

        Raises :class:`SaveFailedError` when they are not what the client digested.
        """
        with self._segment.view(self.size_bytes) as view:
            ahead: Future[None] | None = None
            try:
                for offset in range(start, stop, WRITE_BYTES):
                    end = min(offset + WRITE_BYTES, stop)
                    if ahead is not None:
                        ahead.result()
                    self._seal(view, end)
                    ahead = None
                    if self._digesting is not None and end < stop:
                        ahead = self._digesting.submit(self._seal, view, min(end + WRITE_BYTES, stop))
                    with view[offset:end] as block:
                        self._writer.write(block, offset)
            finally:
                if ahead is not None:
                    wait([ahead])  # a thread that still fills checksums must not outlive the view

    def finish(self) -> Digest:
        """Make the file durable under its temporary name; returns its digest."""
        self._writer.finish()
        return self._sealing.finish()

    def _seal(self, view: memoryview, stop: int) -> None:
        """Up to *stop* at least, in whole blocks: no piece that a client digested lies in two of them."""
        while self._sealed_bytes < stop:
            start = self._sealed_bytes
            end = min(start + BLOCK_BYTES, self.size_bytes)
            with view[start:end] as block:
                self._sealing.process(block, start)
            self._sealed_bytes = end
