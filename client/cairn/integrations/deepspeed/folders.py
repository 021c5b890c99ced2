"""Building a marked folder and putting it in the place of whatever has its name."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cairn.integrations.deepspeed import swap
from cairn.integrations.deepspeed.marks import (
    MARKER,
    Kind,
    Marks,
    Shown,
    foreign,
    overwritten,
    placeholder_text,
    read_marks,
)
from cairn_api.names import VersionId

log = logging.getLogger("cairn")

_COPY_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Wanted:
    """One file as it is to be shown: a link to *target*, a copy of what *open_bytes* gives, or else a placeholder."""

    path: str
    target: Path | None = None
    open_bytes: Callable[[], BinaryIO] | None = None


def place(folder: Path, job: str, version: VersionId, files: Mapping[str, Wanted], source: str = "") -> None:
    """Let *folder* show *files* of a version, swapped whole: nobody ever sees two versions mixed.

    Nothing that others wrote is lost: a folder with checkpoint files that are not Cairn's is kept beside the new one,
    and from any other folder what is not Cairn's moves into the new one. Raises :class:`OSError`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = swap.hidden_beside(folder)
    fresh.mkdir()
    try:
        shown = {name: _show(fresh / name, wanted, job, version, folder) for name, wanted in files.items()}
        (fresh / MARKER).write_text(Marks(job, version, source, shown).to_text())
        if os.path.lexists(folder):
            swap.exchange(fresh, folder)
        else:
            fresh.rename(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    # What the swap has put under a hidden name, and what earlier swaps left there when they were killed.
    for old in folder.parent.glob(f"{swap.hidden_prefix(folder)}*"):
        _retire(old, folder)


def _show(path: Path, wanted: Wanted, job: str, version: VersionId, folder: Path) -> Shown:
    path.parent.mkdir(parents=True, exist_ok=True)
    if wanted.target is not None:
        path.symlink_to(wanted.target)
        return Shown(Kind.LINK, wanted.path)
    if wanted.open_bytes is not None:
        with wanted.open_bytes() as source, path.open("wb") as copy:
            shutil.copyfileobj(source, copy, _COPY_BYTES)
            copy.flush()
            os.fsync(copy.fileno())
        made = path.stat()
        return Shown(Kind.COPY, wanted.path, made.st_size, made.st_mtime_ns)
    path.write_text(placeholder_text(job, version, folder))
    return Shown(Kind.PLACEHOLDER, wanted.path)


def _retire(old: Path, folder: Path) -> None:
    """Remove a folder that was swapped out, but not what others put into it."""
    if old.is_symlink() or not old.is_dir():
        old.unlink()
        return
    marks = read_marks(old)
    if overwritten(old, marks) if marks else any(old.glob("*.pt")):
        aside = _free_name(folder)
        old.rename(aside)
        log.warning("%s held files that Cairn did not put there; they are kept in %s", folder, aside)
        return
    for name in foreign(old, marks):
        if not os.path.lexists(folder / name):
            (old / name).rename(folder / name)
    shutil.rmtree(old)


def _free_name(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.replaced-{number}")).exists():
        number += 1
    return aside
