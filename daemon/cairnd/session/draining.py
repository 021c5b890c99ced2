"""One partition from its capture buffer to its file in tier 1: sealed, digested and written in one pass.

The digest of a block is taken while the block before it is being written. The processor is busy for a tenth of the
time that the disk takes, so this is done at the speed of the disk; deeper queues or other block sizes than 16 MiB
were not faster on any disk tried.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future, wait

from cairn_api.errors import InternalError
from cairnd.digests import BLOCK_BYTES, Digest, SealingPass
from cairnd.session.saves import Received


class Draining:
    """Writes the partition *item*. With *digesting*, a pool of threads, digests are taken there, one block ahead.

    Calls block and come one at a time, from any thread. After an error nothing here uses the buffer or the file any
    more, and the caller discards the file.
    """

    def __init__(self, item: Received, digesting: Executor | None) -> None:
        if item.segment is None or item.writer is None:
            raise InternalError(f"partition {item.name!r} was sealed without its bytes or without a place in tier 1")
        self.size_bytes = item.size_bytes
        self._segment = item.segment
        self._writer = item.writer
        self._sealing = SealingPass(item.size_bytes, item.records)
        self._digesting = digesting

    def write(self, start: int, stop: int) -> None:
        """Digest and write the bytes from *start*, where the last call ended, to *stop*: whole pages, or the end."""
        with self._segment.view(self.size_bytes) as view:
            if self._digesting is None:
                for offset in range(start, stop, BLOCK_BYTES):
                    with view[offset : min(offset + BLOCK_BYTES, stop)] as block:
                        self._sealing.process(block, offset)
                        self._writer.write(block, offset)
            else:
                self._write_behind(self._digesting, view, start, stop)

    def finish(self) -> Digest:
        """Make the file durable under its temporary name; returns its digest."""
        self._writer.finish()
        return self._sealing.finish()

    def _write_behind(self, digesting: Executor, view: memoryview, start: int, stop: int) -> None:
        ahead: Future[None] = digesting.submit(self._digest, view, start, stop)
        try:
            for offset in range(start, stop, BLOCK_BYTES):
                ahead.result()
                if offset + BLOCK_BYTES < stop:
                    ahead = digesting.submit(self._digest, view, offset + BLOCK_BYTES, stop)
                with view[offset : min(offset + BLOCK_BYTES, stop)] as block:
                    self._writer.write(block, offset)
        finally:
            wait([ahead])  # a thread that still fills checksums must not outlive the view

    def _digest(self, view: memoryview, offset: int, stop: int) -> None:
        with view[offset : min(offset + BLOCK_BYTES, stop)] as block:
            self._sealing.process(block, offset)
