"""One save, from the training thread's view: create, save each partition, commit.

``saver`` begins a save with all ranks, ``checkpoint`` is one save in progress, ``handover`` captures a partition and
gives it to the daemon, ``commit`` agrees with all ranks and tells the daemon.
"""

from __future__ import annotations

from cairn.save.checkpoint import Checkpoint
from cairn.save.saver import Saver

__all__ = ["Checkpoint", "Saver"]
