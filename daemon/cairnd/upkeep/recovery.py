"""Start-up: who owns the tree, what survived, what has to be swept. Idempotent; safe to be killed at any line.

A version exists in tier 1 if its manifest is whole and its files have the stated sizes. What has no manifest was never
promised and is removed. What has a damaged one is moved aside for the operator, never deleted. No pointer file is read.

What cannot be looked at, removed or moved, on a disk with errors or one that is full, is left alone and told: it is not
used, keeps nothing else from being done, and the next start tries again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from cairn_api.errors import CairnError, ConfigurationError, OverloadedError, VersionError
from cairn_api.names import RESERVED_NAME, VersionId, check_job, check_node, parse_version
from cairnd import layout
from cairnd.catalog.health import Health
from cairnd.manifest import NOTE_FORMAT, NodeManifest, decode, encode
from cairnd.model import Copy, CopyState, Tier, Version, VersionState
from cairnd.tiers.errors import NotFoundError, is_damage
from cairnd.tiers.filesystem import FileSystem, FolderEntry
from cairnd.tiers.local import LocalTier

_QUARANTINED = re.compile("[0-9a-f]{8}")
"""Names of the folders that :func:`quarantine` makes."""


@dataclass(slots=True)
class Recovered:
    """What a scan of tier 1 found. ``swept`` and ``foreign`` are keys, ``quarantined`` are keys with the reason.

    ``lost``: those without a manifest that all ranks had agreed on, so that their loss has to be told. ``unreadable``:
    versions that were saved and cannot be described; those in quarantine lie there since now or earlier.
    ``left_alone``: keys that could not be looked at, removed or moved, with what prevented it; those of ``quarantined``
    that are there too are where they were.
    """

    versions: list[Version] = field(default_factory=list)
    swept: list[str] = field(default_factory=list)
    lost: list[tuple[str, VersionId]] = field(default_factory=list)
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    unreadable: set[tuple[str, VersionId]] = field(default_factory=set)
    left_alone: dict[str, CairnError] = field(default_factory=dict)


def lock(tier: LocalTier) -> int:
    """Take the tree for this process; returns the descriptor that holds the lock (it dies with the process)."""
    tier.open_to_all(RESERVED_NAME)
    try:
        return tier.lock(layout.LOCK_KEY)
    except BlockingIOError as error:
        raise ConfigurationError(
            f"another cairnd owns {tier.root}", hint="stop it, or give this daemon another tier1_path"
        ) from error


def identify(tier: LocalTier) -> str:
    """The durable random id of this tree, made at first use. Refuses a tree of another layout version."""
    try:
        document = decode(tier.read_small(layout.LAYOUT_KEY), NOTE_FORMAT, layout.LAYOUT_KEY)
    except NotFoundError:
        node = tier.token_hex(16)
        tier.put_small(
            layout.LAYOUT_KEY, encode({"format": NOTE_FORMAT, "layout": layout.LAYOUT_VERSION, "node": node})
        )
        return node
    except VersionError as error:
        raise VersionError(f"{tier.root}: {error.message}", hint=LAYOUT_DAMAGED) from error
    if document.get("layout") != layout.LAYOUT_VERSION:
        raise ConfigurationError(
            f"{tier.root} has layout {document.get('layout')!r}, this Cairn writes layout {layout.LAYOUT_VERSION}",
            hint="run the version of Cairn that wrote it, or give this daemon an empty tier1_path",
        )
    return check_node(str(document.get("node")))


LAYOUT_DAMAGED = (
    "restore this file from a backup, or delete it: the daemon then gives itself a new node id, and finds every "
    "version as before"
)


def scan(tier: LocalTier) -> Recovered:
    """Read tier 1 without changing it: also what ``--store PATH`` shows.

    Raises what a folder of versions that cannot be listed raises: nobody may be told that there is nothing in it.
    """
    found = Recovered()
    if not tier.exists(layout.VERSIONS):
        return found
    for job_entry in tier.list_folder(layout.VERSIONS):
        job = job_entry.name
        if not job_entry.is_folder or not _valid_job(job):
            found.foreign.append(job)
            continue
        for entry in tier.list_folder(layout.job_folder(job)):
            version_id = _valid_version(entry.name)
            if not entry.is_folder or version_id is None:
                found.foreign.append(f"{job}/{entry.name}")
                continue
            _scan_version(tier, job, version_id, found)
    return found


def recover(tier: LocalTier) -> Recovered:
    """Scan, then sweep what was never promised and move damaged manifests aside."""
    found = scan(tier)
    for job, version_id in found.lost:  # before the trace of it goes
        _note_lost(tier, job, version_id, found)
    found.swept = [key for key in found.swept if _attempt(tier.delete_tree, key, found)]
    for key, _ in found.quarantined:
        if not _attempt(partial(quarantine, tier), key, found):
            found.unreadable.add(layout.version_of(key))
    moved, unlisted = unreadable(tier)
    found.unreadable |= moved
    found.left_alone.update(unlisted)
    for version in found.versions:
        _attempt(tier.delete_tree, layout.incoming_folder(version.job, version.id), found)
    _attempt(tier.delete_tree, layout.FETCHED, found)
    return found


def _attempt(act: Callable[[str], object], key: str, found: Recovered) -> bool:
    """Whether *act* succeeded with *key*, which is left alone otherwise."""
    try:
        act(key)
    except CairnError as error:
        found.left_alone[key] = error
        return False
    return True


def _note_lost(tier: LocalTier, job: str, version_id: VersionId, found: Recovered) -> None:
    """Record the loss beside what else is known of the version; where that fails, its folder stays to tell of it."""
    key, folder = layout.health(job, version_id), layout.version_folder(job, version_id)
    try:
        known = Health.decode(tier.read_small(key), key)
    except CairnError:
        known = Health()
    try:
        tier.put_small(key, replace(known, lost=True).encode())
    except OverloadedError:
        pass  # on a full disk what is swept makes the room; whoever takes in what was found writes it then
    except CairnError as error:
        found.left_alone[folder] = error
        found.swept.remove(folder)


def quarantine(tier: LocalTier, key: str) -> str:
    """Move what lies at *key* below the quarantine folder; returns where it is now."""
    target = layout.quarantined(tier.token_hex(4), key)
    tier.exists(key)  # what cannot be looked at leaves no empty folders there, at each start
    tier.move(key, target)
    return target


def unreadable(tier: LocalTier) -> tuple[set[tuple[str, VersionId]], dict[str, CairnError]]:
    """Versions that were saved here and lie in quarantine because their manifests are damaged.

    Whoever asks for the newest version must not be told that there is none, until the operator has deleted them. With
    the folders that could not be listed, and why.
    """
    found: set[tuple[str, VersionId]] = set()
    unlisted: dict[str, CairnError] = {}
    for entry in _listed(tier, layout.QUARANTINE, unlisted):
        if not _QUARANTINED.fullmatch(entry.name):
            continue
        for job_entry in _listed(tier, layout.quarantined(entry.name, layout.VERSIONS), unlisted):
            if not job_entry.is_folder or not _valid_job(job_entry.name):
                continue
            jobs = layout.quarantined(entry.name, layout.job_folder(job_entry.name))
            for folder in _listed(tier, jobs, unlisted):
                version_id = _valid_version(folder.name)
                if version_id is not None:
                    manifest = layout.quarantined(entry.name, layout.manifest(job_entry.name, version_id))
                    if _may_exist(tier, manifest):  # else only a partition was moved, and the version is listed
                        found.add((job_entry.name, version_id))
    return found, unlisted


def _listed(tier: LocalTier, key: str, unlisted: dict[str, CairnError]) -> list[FolderEntry]:
    try:
        return tier.list_folder(key) if tier.exists(key) else []
    except CairnError as error:
        unlisted[key] = error
        return []


def _may_exist(tier: LocalTier, key: str) -> bool:
    """Whether *key* is there, or something that does not let anybody see whether it is."""
    try:
        return tier.exists(key)
    except CairnError:
        return True


def notes(tier: LocalTier, folder: str) -> set[tuple[str, VersionId]]:
    """The versions named by small records below *folder* (pins, requests)."""
    found: set[tuple[str, VersionId]] = set()
    if not tier.exists(folder):
        return found
    for job_entry in tier.list_folder(folder):
        if not job_entry.is_folder or not _valid_job(job_entry.name):
            continue
        for entry in tier.list_folder(f"{folder}/{job_entry.name}"):
            version_id = _valid_version(entry.name.removesuffix(".json"))
            if version_id is not None and entry.name.endswith(".json"):
                found.add((job_entry.name, version_id))
    return found


def asked_by_itself(tier: LocalTier, job: str, version_id: VersionId) -> bool:
    """Whether the request to persist a version was the daemon's own; one that cannot be read was somebody's."""
    key = layout.request(job, version_id)
    try:
        return decode(tier.read_small(key), NOTE_FORMAT, key).get("by_itself") is True
    except CairnError:
        return False


def _scan_version(tier: LocalTier, job: str, version_id: VersionId, found: Recovered) -> None:
    folder, key = layout.version_folder(job, version_id), layout.manifest(job, version_id)
    try:
        manifest = NodeManifest.decode(tier.read_small(key), key)
        if (manifest.job, manifest.id) != (job, version_id):
            raise VersionError(f"{key} describes {manifest.job}/{manifest.id}")
    except NotFoundError:
        found.swept.append(folder)
        if _may_exist(tier, layout.sealed(job, version_id)):
            found.lost.append((job, version_id))
        return
    except OverloadedError:
        raise  # no descriptors, no memory: the next start finds out
    except CairnError as error:
        if is_damage(error):  # its bytes, or what kind of thing it is, or on a part of the disk that cannot be read
            found.quarantined.append((folder, error.message))
        else:
            _leave(folder, error, found)
        return
    version = manifest.version(VersionState.PREPARED)
    if version.complete:
        version.state = VersionState.COMMITTED
    try:
        problem = check_sizes(tier, version)
    except CairnError as error:
        _leave(folder, error, found)
        return
    version.copies[Tier.TIER1] = Copy(CopyState.FAILED, problem, damaged=True) if problem else Copy(CopyState.VERIFIED)
    found.versions.append(version)


def _leave(folder: str, error: CairnError, found: Recovered) -> None:
    """Nobody can look at the version in *folder*, which says nothing about it."""
    found.left_alone[folder] = error
    found.unreadable.add(layout.version_of(folder))


def check_sizes(tier: LocalTier, version: Version) -> str:
    """What is wrong with the files of *version* by name and size; empty if nothing.

    Raises what keeps it from looking.
    """
    for partition in version.partitions:
        try:
            identity = tier.identity(layout.partition(version.job, version.id, partition.path))
        except CairnError as error:
            if not is_damage(error):
                raise
            return f"{partition.path}: {error.message}"
        if identity.size_bytes != partition.size_bytes:
            return f"{partition.path} has {identity.size_bytes} bytes, its manifest says {partition.size_bytes}"
    return ""


def _valid_job(name: str) -> bool:
    try:
        check_job(name)
    except ConfigurationError:
        return False
    return True


def _valid_version(name: str) -> VersionId | None:
    try:
        return parse_version(name)
    except ConfigurationError:
        return None


def open_tree(fs: FileSystem, path: str) -> Path:
    """The root of tier 1, made if its parent exists. Raises :class:`ConfigurationError` when it cannot be used."""
    root = Path(path)
    try:
        with suppress(FileExistsError):
            fs.mkdir(root, 0o755)
        # Also if it was there: whoever made it may have ended before this. Who may not read the parent did not make it.
        with suppress(PermissionError):
            fs.fsync_folder(f"{root.parent}/.")  # the parent may be reached through a link
        if not fs.access(root, os.W_OK | os.X_OK):
            raise PermissionError(f"user {os.geteuid()} may not write there")
    except OSError as error:
        raise ConfigurationError(
            f"tier 1 at {path} cannot be used: {error}",
            hint="create the folder on local NVMe, owned by cairnd's user, or set tier1_path to another one; "
            "`cairn doctor` tells what stands in its way",
        ) from error
    return root
