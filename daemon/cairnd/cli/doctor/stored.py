"""What tier 1 holds, read once for all checks that ask."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from cairn_api.errors import CairnError
from cairnd import layout
from cairnd.model import Version
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.upkeep import recovery


class Stored:
    """The tree at *root*, as a starting daemon would find it. Nothing is changed."""

    def __init__(self, root: Path) -> None:
        self.tier = LocalTier(OsFileSystem(), root)
        self._lock = threading.Lock()
        self._found: recovery.Recovered | None = None

    def scan(self) -> recovery.Recovered:
        """What there is; nothing if there is no tree yet. Raises what reading it raised, and what needs more rights."""
        with self._lock:
            if self._found is None:
                there = (self.tier.root / layout.VERSIONS).is_dir()
                found = recovery.scan(self.tier) if there else recovery.Recovered()
                for error in found.left_alone.values():
                    if os.geteuid() != 0 and isinstance(error.__cause__, PermissionError):
                        raise error
                self._found = found
            return self._found

    def by_job(self) -> dict[str, list[Version]]:
        """Versions by job, newest first; nothing if the tree cannot be read, which another check tells."""
        try:
            versions = self.scan().versions
        except CairnError:
            return {}
        by_job: dict[str, list[Version]] = {}
        for version in sorted(versions, key=lambda version: version.id, reverse=True):
            by_job.setdefault(version.job, []).append(version)
        return by_job
