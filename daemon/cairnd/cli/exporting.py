"""Copies a version into a plain folder: checked while it is copied, synced, and given its name at the very end."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cairn_api.errors import ConfigurationError, VersionError
from cairn_api.names import VersionId
from cairnd.cli.source import Blocks
from cairnd.digests import Digest, digest_of
from cairnd.model import Partition, Version
from cairnd.tiers.errors import explained
from cairnd.tiers.filesystem import OsFileSystem

SUMS_NAME = "SHA256SUMS"
LATEST_NAME = "latest"


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One file: its path below the folder, its CRC-64/NVME as 16 hex digits, its SHA-256 if that was asked for."""

    path: str
    size_bytes: int
    crc64nvme: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export made. ``moved_aside``: where what was there before is now."""

    version: VersionId
    folder: Path
    files: tuple[ExportedFile, ...]
    moved_aside: Path | None


@dataclass(frozen=True, slots=True)
class Target:
    """Where an export goes: ``folder`` appears at the end; ``latest`` (if any) then names it."""

    folder: Path
    latest: Path | None
    force: bool

    @classmethod
    def choose(cls, directory: Path, tag: str, *, tag_folder: bool, force: bool) -> Target:
        """Raises :class:`ConfigurationError` before any work is done if the export would have nowhere to go."""
        if tag_folder and tag == LATEST_NAME:
            raise ConfigurationError(
                f"the tag {tag!r} and DeepSpeed's file of that name cannot be in one folder",
                hint="export without --tag-folder",
            )
        folder = directory / tag if tag_folder else directory
        with explained("look into", folder):
            try:
                occupied = any(folder.iterdir())
            except FileNotFoundError:
                occupied = False
        if occupied and not force:
            raise ConfigurationError(
                f"{folder} is not empty", hint="choose another folder, or move what is there aside with --force"
            )
        return cls(folder, directory / LATEST_NAME if tag_folder else None, force)


def export(
    version: Version, blocks: Blocks, target: Target, *, sums: bool, progress: Callable[[int, int], None]
) -> Exported:
    """Write all partitions of *version*; *progress* gets ``(done, total)`` bytes.

    Raises :class:`VersionError` when bytes do not match their digest, and what
    :func:`cairnd.tiers.errors.from_os_error` makes of a full or forbidden disk. Nothing is left behind then.
    """
    if not version.partitions:
        raise VersionError(
            f"{version} has no partitions here", hint=f"run `cairn show {version.id} --job {version.job}`"
        )
    if sums and any(item.path == SUMS_NAME for item in version.partitions):
        raise ConfigurationError(
            f"a partition of {version} is itself called {SUMS_NAME}", hint="export it without --sums"
        )
    parent = target.folder.parent
    with explained("make the folder", parent):
        parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{target.folder.name}.{secrets.token_hex(4)}.export"
    try:
        files = tuple(_copy_all(version, blocks, temporary, progress, sums=sums))
        if sums:
            listing = "".join(f"{item.sha256}  {item.path}\n" for item in files)
            _write(temporary / SUMS_NAME, listing.encode())
        _sync_folders(temporary)
        moved_aside = _publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Exported(version.id, target.folder, files, moved_aside)


def _copy_all(
    version: Version, blocks: Blocks, folder: Path, progress: Callable[[int, int], None], *, sums: bool
) -> Iterator[ExportedFile]:
    with explained("make the folder", folder):
        folder.mkdir()
    done_bytes, total_bytes = 0, version.size_bytes

    def advance(count_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += count_bytes
        progress(done_bytes, total_bytes)

    for partition in sorted(version.partitions, key=lambda item: item.path):
        path = folder / partition.path
        sha256 = hashlib.sha256() if sums else None
        with explained("make the folder", path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        found = _copy(partition, blocks, path, sha256.update if sha256 is not None else _ignore, advance)
        _compare(version, partition, found)
        yield ExportedFile(
            partition.path, found.size_bytes, f"{found.crc64nvme:016x}", sha256.hexdigest() if sha256 else None
        )


def _ignore(block: memoryview) -> None:
    """Nobody asked for SHA-256."""
    del block


def _copy(
    partition: Partition,
    blocks: Blocks,
    path: Path,
    hashed: Callable[[memoryview], None],
    advance: Callable[[int], None],
) -> Digest:
    """Copy one partition to a new synced file; returns the digest of what was written."""
    with explained("create", path):
        file = path.open("xb", buffering=0)

    def passing() -> Iterator[memoryview]:
        for block in blocks(partition):
            with explained("write", path):
                _write_all(file.fileno(), block)
            hashed(block)
            yield block
            advance(len(block))

    with file:
        digest = digest_of(passing())
        with explained("sync", path):
            os.fsync(file.fileno())
    return digest


def _compare(version: Version, partition: Partition, found: Digest) -> None:
    """The source may know less than all digests: none of a version that is only in memory, or none of single blocks."""
    expected = partition.digest
    problem = ""
    if found.size_bytes != partition.size_bytes:
        problem = f"it has {found.size_bytes} bytes instead of {partition.size_bytes}"
    elif expected is not None and expected.blocks and found.blocks != expected.blocks:
        number = next(n for n, pair in enumerate(zip(found.blocks, expected.blocks, strict=True)) if pair[0] != pair[1])
        problem = f"block {number} does not match its digest"
    elif expected is not None and found.crc64nvme != expected.crc64nvme:
        problem = "it does not match its digest"
    if problem:
        raise VersionError(
            f"{partition.path} of {version} is damaged: {problem}",
            hint=f"run `cairn verify {version.id} --job {version.job} --deep` to see which copies are intact",
            context={"version": version.id, "partition": partition.path},
        )


def _publish(temporary: Path, target: Target) -> Path | None:
    """Give the finished folder its name; returns where its predecessor went."""
    folder, moved_aside = target.folder, None
    with explained("publish", folder):
        try:
            temporary.rename(folder)  # over nothing, or over an empty folder
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise ConfigurationError(
                    f"{folder} is a mount point and cannot be replaced", hint="export to a folder below it"
                ) from error
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not target.force:
                raise
            moved_aside = folder.with_name(f"{folder.name}.replaced-{secrets.token_hex(4)}")
            folder.rename(moved_aside)
            temporary.rename(folder)
        if target.latest is not None:
            staged = target.latest.with_name(f".{LATEST_NAME}.{secrets.token_hex(4)}")
            _write(staged, folder.name.encode())
            staged.replace(target.latest)
        OsFileSystem().fsync_folder(folder.parent)
    return moved_aside


def _write(path: Path, data: bytes) -> None:
    with explained("write", path), path.open("xb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(data))
        os.fsync(file.fileno())


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _sync_folders(folder: Path) -> None:
    fs = OsFileSystem()
    for name, _, _ in os.walk(folder):
        with explained("sync the folder", name):
            fs.fsync_folder(name)
