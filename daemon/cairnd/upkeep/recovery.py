"""Start-up: who owns the tree, what survived, what has to be swept. Idempotent; safe to be killed at any line.

A version exists in tier 1 if its manifest is whole and its files have the stated sizes. What has no manifest was never
promised and is removed. What has a damaged one is moved aside for the operator, never deleted. No pointer file is read.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cairn_api.errors import CairnError, ConfigurationError, OverloadedError, UnavailableError, VersionError
from cairn_api.names import RESERVED_NAME, VersionId, check_job, check_node, parse_version
from cairnd import layout
from cairnd.catalog.health import Health
from cairnd.manifest import NOTE_FORMAT, NodeManifest, decode, encode
from cairnd.model import Copy, CopyState, Tier, Version, VersionState
from cairnd.tiers.errors import NotFoundError
from cairnd.tiers.filesystem import FileSystem
from cairnd.tiers.local import LocalTier

_QUARANTINED = re.compile("[0-9a-f]{8}")
"""Names of the folders that :func:`quarantine` makes."""


@dataclass(slots=True)
class Recovered:
    """What a scan of tier 1 found. ``swept`` and ``foreign`` are keys, ``quarantined`` are keys with the reason.

    ``lost``: those of the swept ones that all ranks had agreed on, so that their loss has to be told. ``unreadable``:
    versions that lie in quarantine with their manifests, since now or earlier.
    """

    versions: list[Version] = field(default_factory=list)
    swept: list[str] = field(default_factory=list)
    lost: list[tuple[str, VersionId]] = field(default_factory=list)
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    unreadable: set[tuple[str, VersionId]] = field(default_factory=set)


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
        raise VersionError(
            f"{tier.root}: {error.message}",
            hint="restore this file from a backup, or delete it: the daemon then gives itself a new node id, and finds "
            "every version as before",
        ) from error
    if document.get("layout") != layout.LAYOUT_VERSION:
        raise ConfigurationError(
            f"{tier.root} has layout {document.get('layout')!r}, this Cairn writes layout {layout.LAYOUT_VERSION}",
            hint="run the version of Cairn that wrote it, or give this daemon an empty tier1_path",
        )
    return check_node(str(document.get("node")))


def scan(tier: LocalTier) -> Recovered:
    """Read tier 1 without changing it: also what ``--store PATH`` shows."""
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
        # On a full disk what is swept makes the room; whoever takes in what was found writes it then.
        with suppress(OverloadedError):
            tier.put_small(layout.health(job, version_id), Health(lost=True).encode())
    for key in found.swept:
        tier.delete_tree(key)
    for key, _ in found.quarantined:
        quarantine(tier, key)
    found.unreadable = unreadable(tier)
    for version in found.versions:
        tier.delete_tree(layout.incoming_folder(version.job, version.id))
    return found


def quarantine(tier: LocalTier, key: str) -> str:
    """Move what lies at *key* below the quarantine folder; returns where it is now."""
    target = layout.quarantined(tier.token_hex(4), key)
    tier.move(key, target)
    return target


def unreadable(tier: LocalTier) -> set[tuple[str, VersionId]]:
    """Versions that were saved here and lie in quarantine because their manifests are damaged.

    Whoever asks for the newest version must not be told that there is none, until the operator has deleted them.
    """
    found: set[tuple[str, VersionId]] = set()
    for entry in tier.list_folder(layout.QUARANTINE) if tier.exists(layout.QUARANTINE) else ():
        jobs = layout.quarantined(entry.name, layout.VERSIONS) if _QUARANTINED.fullmatch(entry.name) else ""
        for job_entry in tier.list_folder(jobs) if jobs and tier.exists(jobs) else ():
            if not job_entry.is_folder or not _valid_job(job_entry.name):
                continue
            for folder in tier.list_folder(layout.quarantined(entry.name, layout.job_folder(job_entry.name))):
                version_id = _valid_version(folder.name)
                if version_id is not None:
                    manifest = layout.quarantined(entry.name, layout.manifest(job_entry.name, version_id))
                    if tier.exists(manifest):  # else only a partition was moved, and the version is listed
                        found.add((job_entry.name, version_id))
    return found


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
        if tier.exists(layout.sealed(job, version_id)):
            found.lost.append((job, version_id))
        return
    except (VersionError, UnavailableError) as error:  # damaged, or on a part of the disk that cannot be read
        found.quarantined.append((folder, error.message))
        return
    version = manifest.version(VersionState.PREPARED)
    if version.complete:
        version.state = VersionState.COMMITTED
    problem = check_sizes(tier, version)
    version.copies[Tier.TIER1] = Copy(CopyState.FAILED, problem, damaged=True) if problem else Copy(CopyState.VERIFIED)
    found.versions.append(version)


def check_sizes(tier: LocalTier, version: Version) -> str:
    """What is wrong with the files of *version* by name and size; empty if nothing."""
    for partition in version.partitions:
        try:
            identity = tier.identity(layout.partition(version.job, version.id, partition.path))
        except CairnError as error:
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
            hint="create the folder on local NVMe, owned by cairnd's user, or set tier1_path to another one",
        ) from error
    return root
