"""Whether tier 1's file system has the room that nothing can do without, in words for the operator."""

from __future__ import annotations

from pathlib import Path

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
