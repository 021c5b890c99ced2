"""Removes the links that point from a user's ``save_dir`` into a version that is about to be evicted.

Links are made by the client, under the user's own uid. They are removed here only where that user is the daemon's own:
with other rights than the folder's owner, somebody could exchange a folder on the path for a link in the meantime.
Elsewhere links dangle until the client replaces them, which it does when it next looks.
"""

from __future__ import annotations

import os
from pathlib import Path

from cairnd.model import Version
from cairnd.tiers.filesystem import FileSystem


def remove_links(fs: FileSystem, version: Version, version_folder: Path) -> int:
    """Remove links into *version_folder* below the version's ``save_dir``; returns how many were removed."""
    if not version.file_marks or not version.save_dir.startswith("/") or version.uid != os.geteuid():
        return 0
    removed = 0
    for partition in version.partitions:
        link = Path(version.save_dir) / version.id.tag / partition.path
        target = str(version_folder / partition.path)
        try:
            if fs.readlink(link) == target:
                fs.unlink(link)
                removed += 1
        except (OSError, ValueError):
            continue  # not a link, not there, or not ours to remove: see the module's docstring
    return removed
