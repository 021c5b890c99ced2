"""What a checkpoint folder in ``save_dir`` looks like when Cairn made it, and how to tell that from any other.

Such a folder shows the files that DeepSpeed and its tools expect, and a marker ``.cairn.json`` that says which version
they are. Each file is a *link* into tier 1, a *copy*, or a *placeholder*: a few lines of text that ``torch.load``
refuses and a person understands. Files that are none of these were put there by somebody else; they are never
destroyed by a load.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from cairn_api.errors import ConfigurationError
from cairn_api.names import VersionId, check_job, check_partition, parse_version

MARKER = ".cairn.json"
_FORMAT = 1
_FIRST_LINE = "# A placeholder of Cairn, not a checkpoint file.\n"
"""No pickle and no zip begins like this."""
_LONGEST_MARKER_BYTES = 64 * 1024 * 1024


class Kind(StrEnum):
    """How one file is shown."""

    LINK = "link"
    COPY = "copy"
    PLACEHOLDER = "placeholder"


@dataclass(frozen=True, slots=True)
class Shown:
    """One file of a marked folder."""

    kind: Kind
    path: str
    """Where the partition lies below its version."""
    size_bytes: int = 0
    mtime_ns: int = 0
    """Of a copy, to notice when somebody overwrites it."""


@dataclass(frozen=True, slots=True)
class Marks:
    """The content of a marker."""

    job: str
    version: VersionId
    source: str = ""
    """URL of the bucket it was loaded from when that is not the job's own."""
    files: Mapping[str, Shown] = field(default_factory=dict)

    def to_text(self) -> str:
        """As it is written."""
        files = {
            name: {"kind": shown.kind, "path": shown.path}
            | ({"size": shown.size_bytes, "mtime_ns": shown.mtime_ns} if shown.kind is Kind.COPY else {})
            for name, shown in sorted(self.files.items())
        }
        return json.dumps(
            {
                "cairn": _FORMAT,
                "job": self.job,
                "version": str(self.version),
                **({"source": self.source} if self.source else {}),
                "files": files,
            },
            indent=1,
        )


def read_marks(folder: Path) -> Marks | None:
    """The marker of *folder*, or None when there is none that can be understood: then the folder is not Cairn's."""
    try:
        with (folder / MARKER).open() as file:
            record = json.loads(file.read(_LONGEST_MARKER_BYTES))
        if record["cairn"] != _FORMAT:
            return None
        files = {
            check_partition(name): Shown(
                Kind(item["kind"]), check_partition(item["path"]), item.get("size", 0), item.get("mtime_ns", 0)
            )
            for name, item in record["files"].items()
        }
        return Marks(check_job(record["job"]), parse_version(record["version"]), str(record.get("source", "")), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigurationError):
        return None


def placeholder_text(job: str, version: VersionId, folder: Path) -> str:
    """What a placeholder says to whoever looks into it."""
    return (
        f"{_FIRST_LINE}"
        f"The bytes are in Cairn: job {job}, version {version}.\n"
        f"DeepSpeed's load_checkpoint finds them by itself. For other tools write the files out:\n"
        f"  cairn export --job {job} {version} {folder}.export\n"
    )


def is_placeholder(path: Path) -> bool:
    """Whether *path* is a placeholder."""
    try:
        with path.open("rb") as file:
            return file.read(len(_FIRST_LINE)) == _FIRST_LINE.encode()
    except OSError:
        return False


def overwritten(folder: Path, marks: Marks) -> list[str]:
    """The marked files that somebody else has replaced by real ones since."""
    return [name for name, shown in marks.files.items() if _is_replaced(folder / name, shown)]


def _is_replaced(path: Path, shown: Shown) -> bool:
    if shown.kind is Kind.LINK:
        return path.is_file() and not path.is_symlink()
    if shown.kind is Kind.PLACEHOLDER:
        return path.is_file() and not is_placeholder(path)
    try:
        now = path.stat()
    except OSError:
        return False
    return (now.st_size, now.st_mtime_ns) != (shown.size_bytes, shown.mtime_ns)


def foreign(folder: Path, marks: Marks | None) -> list[str]:
    """Entries of *folder* that are not in its marker, such as what DeepSpeed's NVMe offload leaves there."""
    ours = {MARKER} | {name.partition("/")[0] for name in (marks.files if marks else ())}
    return sorted(entry.name for entry in os.scandir(folder) if entry.name not in ours)


def is_plain_checkpoint(folder: Path) -> bool:
    """Whether *folder* holds torch files that ``torch.load`` can read without Cairn and that are not Cairn's own.

    A marked folder whose every file has been replaced since (Cairn switched off, the tag saved again) counts too.
    """
    if not folder.is_dir():
        return False
    marks = read_marks(folder)
    if marks is not None:
        return bool(marks.files) and len(overwritten(folder, marks)) == len(marks.files)
    return any(path.is_file() and not is_placeholder(path) for path in folder.glob("*.pt"))
