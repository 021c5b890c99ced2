"""What a ``save_dir`` shows of the versions saved from it: placeholders at once, links when a version is in tier 1.

One rank does this for its node; on a file system that nodes share, rank 0 does it for all of them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from cairn.agreement import shared_names
from cairn.integrations.deepspeed.filesystems import is_local, type_of
from cairn.integrations.deepspeed.folders import Wanted, place
from cairn.integrations.deepspeed.marks import Kind, Marks, is_placeholder, overwritten, read_marks
from cairn_api.errors import ConfigurationError
from cairn_api.names import RESERVED_NAME, VersionId, parse_version, stored_path

log = logging.getLogger("cairn")


class Tier1:
    """The published files of one job on this node's disk, as far as this process may see them."""

    def __init__(self, tier1_path: str, job: str) -> None:
        self._root = Path(tier1_path)
        self._versions = self._root / "jobs" / job

    def visible(self) -> bool:
        """Whether this process can look into the folder at all: it may run as another user or in a container."""
        return os.access(self._root, os.R_OK | os.X_OK)

    def holds(self, version: VersionId) -> bool:
        """Whether *version* is complete on this node, and this user may read it: its manifest comes last."""
        return os.access(self._versions / str(version) / RESERVED_NAME / "manifest.json", os.R_OK)

    def evicted(self, version: VersionId) -> bool:
        """Whether *version* made room for newer ones here. A tier 1 that is gone as a whole has evicted nothing."""
        if self.holds(version):
            return False
        newer = (entry.name for entry in self._versions.iterdir()) if self._versions.is_dir() else ()
        return any(other > version and self.holds(other) for other in map(_version, newer) if other is not None)

    def file(self, version: VersionId, path: str) -> Path | None:
        """The published file of a partition, or None when it is not there or must not be read."""
        file = self._versions / str(version) / path
        return file if os.access(file, os.R_OK) else None


class SaveDir:
    """One ``save_dir`` as this rank sees it. *nodes* are the node ids of all ranks, *mode* is ``save_dir_files``."""

    def __init__(self, path: str, job: str, tier1: Tier1, mode: str, rank: int, nodes: Sequence[str]) -> None:
        self.path = Path(path)
        self._job = job
        self._tier1 = tier1
        self._mode = mode
        self._rank = rank
        self._nodes = nodes
        self._shared = not is_local(self.path)
        self._changing = threading.Lock()  # the training thread and the one that makes links
        self.kind = self._kind()

    @property
    def in_charge(self) -> bool:
        """Whether this rank is the one that changes the folders here."""
        return self._rank == (0 if self._shared else self._nodes.index(self._nodes[self._rank]))

    def folder(self, tag: str) -> Path:
        """Where DeepSpeed looks for the files of *tag*."""
        return self.path / tag

    def show_saved(self, version: VersionId, names_by_rank: Sequence[Sequence[str]]) -> None:
        """Put placeholders for a version that was just committed in place. Raises :class:`OSError`."""
        elsewhere = set(shared_names(names_by_rank))
        files: dict[str, Wanted] = {}
        for rank, names in enumerate(names_by_rank):
            if self._shared or self._nodes[rank] == self._nodes[self._rank]:
                for name in names:
                    path = stored_path(name, rank, shared_name=(name, rank) in elsewhere)
                    files.setdefault(name, Wanted(path))
        with self._changing:
            place(self.folder(version.tag), self._job, version, files)

    def show(self, version: VersionId, files: Mapping[str, Wanted], source: str = "") -> None:
        """Show *files* (as placeholders or copies), linked instead where links are wanted and possible."""
        linked = files if source else {name: self._linked(version, wanted) for name, wanted in files.items()}
        with self._changing:
            if not self._matches(version, linked):
                place(self.folder(version.tag), self._job, version, linked, source)

    def settle(self, tag: str, version: VersionId) -> bool:
        """Turn the placeholders of a version into links or copies, if it is in tier 1 by now.

        True when nothing remains to be done: also when the folder shows another version by now.
        """
        folder = self.folder(tag)
        with self._changing:
            marks = self._own_marks(folder)
            if marks is None or marks.version != version:
                return True
            if not self._tier1.holds(version):
                return False
            self._bring_up_to_date(folder, marks)
        return True

    def repair(self) -> None:
        """Bring all folders up to date: links for what has reached tier 1, placeholders for what has left it."""
        with self._changing:
            for folder in sorted(self.path.iterdir()):
                marks = self._own_marks(folder)
                if marks is not None:
                    self._bring_up_to_date(folder, marks)

    def _own_marks(self, folder: Path) -> Marks | None:
        """The marks of a folder that this job may change: of its own versions, and not overwritten by somebody."""
        marks = read_marks(folder)
        if marks is None or marks.job != self._job or marks.source or marks.version.tag != folder.name:
            return None
        return None if overwritten(folder, marks) else marks

    def _bring_up_to_date(self, folder: Path, marks: Marks) -> None:
        copied = any(shown.kind is Kind.COPY and (folder / name).exists() for name, shown in marks.files.items())
        if copied and (self._mode == "copy" or not self._tier1.evicted(marks.version)):
            return  # copies need nothing from tier 1; those that `auto` made go when their version does
        files = {name: self._settled(marks.version, shown.path) for name, shown in marks.files.items()}
        if copied or any(not _shows(folder / name, marks.files[name].kind, item) for name, item in files.items()):
            place(folder, self._job, marks.version, files)

    def _matches(self, version: VersionId, files: Mapping[str, Wanted]) -> bool:
        """Whether the folder shows exactly this already: then nothing is written, and it may be read-only."""
        folder = self.folder(version.tag)
        marks = read_marks(folder)
        if marks is None or (marks.job, marks.version) != (self._job, version) or marks.files.keys() != files.keys():
            return False
        if overwritten(folder, marks):
            return False
        return all(_shows(folder / name, marks.files[name].kind, wanted) for name, wanted in files.items())

    def _settled(self, version: VersionId, path: str) -> Wanted:
        if self.kind is Kind.COPY and (file := self._tier1.file(version, path)) is not None:
            return Wanted(path, open_bytes=lambda: file.open("rb"))
        return self._linked(version, Wanted(path))

    def _linked(self, version: VersionId, wanted: Wanted) -> Wanted:
        if self.kind is not Kind.LINK:
            return wanted
        file = self._tier1.file(version, wanted.path)
        if file is None:
            return wanted
        if self._mode == "auto" and os.access(file, os.W_OK, effective_ids=True):
            _warn_once(
                self.path,
                f"this process could overwrite published files ({file}) through a link, so {self.path} gets copies; "
                "train as another user than root, or set protect_files in cairnd.toml, to save writing them twice",
            )
            return Wanted(wanted.path, open_bytes=lambda: file.open("rb"))
        return Wanted(wanted.path, target=file)

    def _kind(self) -> Kind:
        """What the files of a version in tier 1 are shown as here, with a warning when that is not what one expects."""
        if self._mode == "placeholder":
            return Kind.PLACEHOLDER
        one_node = len(set(self._nodes)) == 1
        reason = ""
        if not self._tier1.visible():
            reason = "tier 1 cannot be seen from this process"
        elif self._shared and (self._mode == "auto" or not one_node):
            reason = f"{self.path} lies on a file system that other nodes may see ({type_of(self.path) or 'unknown'})"
        if reason:
            if self.in_charge:
                _warn_once(
                    self.path,
                    f"{reason}, so it shows placeholders: DeepSpeed loads as always, and `cairn export` writes files "
                    "for other tools",
                )
            return Kind.PLACEHOLDER
        return Kind.COPY if self._mode == "copy" else Kind.LINK


def _version(name: str) -> VersionId | None:
    try:
        return parse_version(name)
    except ConfigurationError:
        return None


def _shows(path: Path, kind: Kind, wanted: Wanted) -> bool:
    if wanted.target is not None:
        return kind is Kind.LINK and path.is_symlink() and path.readlink() == wanted.target
    if wanted.open_bytes is not None:
        return kind is Kind.COPY and path.is_file()
    return kind is Kind.COPY or (kind is Kind.PLACEHOLDER and is_placeholder(path))


_WARNED: set[tuple[Path, str]] = set()


def _warn_once(path: Path, text: str) -> None:
    topic = (path, text.partition(" (")[0])
    if topic not in _WARNED:
        _WARNED.add(topic)
        log.warning("%s", text)
