"""The JSON of values that several verbs print. A stable interface: fields are added, never renamed or removed.

A *version* is::

    {"job", "tag", "epoch", "sequence", "version": "e00007-s000042-<tag>",
     "state": "open"|"sealed"|"prepared"|"committed"|"deleting"|"aborted",
     "size_bytes", "created_s": seconds since 1970, "world_size", "ranks": [rank, ...],
     "persist": bool, "pinned": bool, "passed_over": why automatic resume does so, or "", "save_dir",
     "copies": {"memory"|"tier1"|"peer"|"tier2":
                {"state": "absent"|"copying"|"verified"|"failed"|"evicted", "error", "damaged": bool}}}

A *version name* is ``{"job", "tag", "epoch", "sequence", "version"}``. ``ranks`` are those whose partitions are known
where the command reads; sizes are of these partitions.
"""

from __future__ import annotations

from typing import Any

from cairn_api.names import VersionId
from cairnd.model import CopyState, Tier, Version, VersionState

Document = dict[str, Any]

_ALIVE = (VersionState.SEALED, VersionState.PREPARED, VersionState.COMMITTED)


def name_document(job: str, version: VersionId) -> Document:
    """A version name."""
    return {
        "job": job, "tag": version.tag, "epoch": version.epoch, "sequence": version.sequence, "version": str(version),
    }  # fmt: skip


def version_document(version: Version, size_bytes: int) -> Document:
    """A version."""
    return {
        **name_document(version.job, version.id),
        "state": version.state.value,
        "size_bytes": size_bytes,
        "created_s": round(version.created_s, 3),
        "world_size": version.world_size,
        "ranks": sorted(version.ranks),
        "persist": version.wants_tier2,
        "pinned": version.pinned,
        "passed_over": version.passed_over,
        "save_dir": version.save_dir,
        "copies": {
            tier.value: {"state": copy.state.value, "error": copy.error, "damaged": copy.damaged}
            for tier, copy in sorted(version.copies.items())
        },
    }


def waiting(version: Version) -> bool:
    """Whether the version is on its way to tier 2 and not there yet."""
    gone = version.copy(Tier.TIER2).state is CopyState.EVICTED
    return version.wants_tier2 and version.state in _ALIVE and not version.has(Tier.TIER2) and not gone
