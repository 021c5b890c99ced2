"""What a client counts about itself; ``Client.statistics()`` shows it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counters:
    """Totals since the client connected. Changed by the training thread and, while it goes on, by the end of a save."""

    saves: int = 0
    """Versions that were committed."""
    skipped_saves: int = 0
    """Versions left out on all ranks because a buffer was missing."""
    failed_saves: int = 0
    partitions: int = 0
    streamed_partitions: int = 0
    """Sent as bytes because memory could not be shared or was not granted."""
    fallback_captures: int = 0
    """States that the fast layout cannot express; serialised by torch.save instead."""
    captured_bytes: int = 0
    stall_s: float = 0.0
    """Seconds that the training thread spent in create, save and commit."""
    overlapped_partitions: int = 0
    """Part of their bytes was copied while training went on."""
    late_bytes: int = 0
    """Bytes copied while training went on; ``captured_bytes`` counts them too."""
    step_wait_s: float = 0.0
    """Seconds that steps of guarded optimizers waited for such copies."""
    reconnects: int = 0
    loads: int = 0

    @contextmanager
    def stall(self, *, counted: bool = True) -> Iterator[None]:
        """Counts the time that the training thread spends in the block, unless another thread is in it."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            if counted:
                self.stall_s += time.perf_counter() - start_s

    def as_dict(self) -> dict[str, int | float]:
        """All counters by name."""
        return asdict(self)
