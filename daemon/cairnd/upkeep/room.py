"""Whether tier 1 has the room that is needed, in words for the operator."""

from __future__ import annotations

from pathlib import Path

from cairn_api.errors import OverloadedError
from cairnd import layout
from cairnd.settings import TIER1_RESERVED_BYTES


def complaint(root: Path, total_bytes: int, free_bytes: int) -> str:
    """What is wrong with a file system of *total_bytes* of which *free_bytes* are free, and the next step; or empty."""
    if total_bytes < TIER1_RESERVED_BYTES:
        return (
            f"tier 1 at {root} is on a file system of {total_bytes} bytes, less than the {TIER1_RESERVED_BYTES} that "
            "are kept free for records, so no save can succeed; put tier1_path on a larger one"
        )
    if free_bytes < TIER1_RESERVED_BYTES:
        return (
            f"tier 1 at {root} is full: {free_bytes} bytes are free, {TIER1_RESERVED_BYTES} are kept for records, so "
            "the next save deletes versions or fails; free space there, put tier1_path on a larger disk, or lower "
            "num_of_version_in_retention"
        )
    return ""


def refusal(
    root: Path, size_bytes: int, job: str, beyond_disk: int, beyond_limit: int, limit_bytes: int
) -> OverloadedError:
    """Why *size_bytes* more are refused: so many are missing on the disk, and so many below *limit_bytes*."""
    if beyond_disk >= beyond_limit:
        free_bytes = size_bytes + TIER1_RESERVED_BYTES - beyond_disk
        reason = f"{free_bytes} bytes are free in {root}, {TIER1_RESERVED_BYTES} must stay free for records"
        step = f"free space there (nothing in {layout.QUARANTINE} is needed) or put tier1_path on a larger disk"
    else:
        used_bytes = limit_bytes + beyond_limit - size_bytes
        reason = f"versions take {used_bytes} of the {limit_bytes} bytes of tier1_limit_bytes"
        step = "raise tier1_limit_bytes"
    return OverloadedError(
        f"tier 1 has no room for {size_bytes} bytes: {reason}, so {max(beyond_disk, beyond_limit)} bytes are "
        "missing, and nothing more may be deleted",
        hint=f"{step}, lower num_of_version_in_retention, delete a version that nobody needs (`cairn list`, `cairn "
        "unpin VERSION`, `cairn prune VERSION`), or check why tier 2 lags (`cairn status`)",
        context={"size_bytes": size_bytes, "job": job},
    )
