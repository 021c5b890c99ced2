"""The judge of every crash test: what the tiers hold, read by recovery's scan and the verifier, not by the write path.

A *promise* is a line that a trainer appended to its diary, which lies on a disk that is never cut.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cairn_api.errors import CairnError
from cairn_api.names import VersionId, parse_version
from cairnd import layout
from cairnd.model import Partition, Tier, Version, VersionState
from cairnd.replication.bucket import BucketRepository
from cairnd.restore.inventory import merged, view
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.tiers.stores import open_store
from cairnd.upkeep import recovery, verifier
from tests.crash.trainer import PARTITIONS, same, state_of

_READER = "0" * 32
"""The node id of a process that never writes."""

_RECORD_BYTES = 256 * 1024
"""Records of tier 1 are smaller; of what is larger, recovery looks at the size only."""

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - made and removed by tempfile


@dataclass(frozen=True, slots=True)
class Found:
    """What a tier lists. ``torn``: is listed and is not what was saved, with the reason."""

    listed: tuple[VersionId, ...]
    torn: dict[str, str]
    unfinished: tuple[str, ...]
    """Keys without a manifest, which recovery sweeps; in the bucket, versions with data and no decision."""


@dataclass(slots=True)
class Diary:
    """What trainers wrote down: versions they began, and those that they were promised, in the order of events."""

    tried: set[VersionId] = field(default_factory=set)
    promised: set[VersionId] = field(default_factory=set)
    """``commit`` returned for these, or a wait for tier 1 as well: what the trainer was told to wait for."""
    durable: set[VersionId] = field(default_factory=set)
    """These were promised to lie in tier 1."""
    persisted: set[VersionId] = field(default_factory=set)
    """These were promised to lie in tier 2."""
    loaded: list[VersionId] = field(default_factory=list)
    begun_afresh: int = 0
    """How often a trainer found no version to load."""
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    read_bytes: int = 0

    @classmethod
    def read(cls, path: Path) -> Diary:
        """The diary at *path*; empty if nobody has written yet."""
        diary = cls()
        diary.read_on(path)
        return diary

    def read_on(self, path: Path) -> None:
        """Take in what was written to *path* since the last call; the last line may still be being written."""
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self.read_bytes)
            written = file.read()
        whole = written[: written.rfind(b"\n") + 1]
        self.read_bytes += len(whole)
        for line in whole.decode().splitlines():
            self._note(line)

    def _note(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word in ("tried", "promised", "durable", "persisted"):
            versions: set[VersionId] = getattr(self, word)
            versions.add(parse_version(rest))
        elif word == "loaded":
            self.loaded.append(parse_version(rest))
        elif word == "afresh":
            self.begun_afresh += 1
        elif word == "wrong":
            self.wrong.append(rest)
        elif word == "failed":
            self.failed.append(rest)
        else:
            raise AssertionError(f"a trainer wrote {line!r}")


class Contents:
    """Compares the tensors in partitions with those that trainers saved: right digests of wrong bytes do not pass.

    What was compared once is not read again as long as its digest, which the verifier has just found true, is the same.
    """

    def __init__(self) -> None:
        self._compared: set[tuple[VersionId, str, int]] = set()

    def problems(self, folder: Path, version: Version) -> list[str]:
        """What is wrong with the partitions of *version*, which lie in *folder* as plain files."""
        found = []
        for partition in version.partitions:
            assert partition.digest is not None, "manifests state digests"
            key = (version.id, partition.path, partition.digest.crc64nvme)
            if key in self._compared:
                continue
            problem = self._problem(folder, version, partition)
            if problem:
                found.append(f"{partition.path}: {problem}")
            else:
                self._compared.add(key)
        return found

    @staticmethod
    def _problem(folder: Path, version: Version, partition: Partition) -> str:
        try:
            state = torch.load(folder / partition.path, weights_only=True)
        except Exception as error:  # noqa: BLE001 - whatever torch raises, this partition cannot be loaded
            return f"torch.load: {type(error).__name__}: {error}"
        return "" if same(state, state_of(version.id.tag, partition.name)) else "it is not what was saved"


def examine(
    tier1_path: Path,
    job: str,
    tried: Iterable[VersionId] | None = None,
    *,
    partitions: frozenset[str] = PARTITIONS,
    contents: Contents | None = None,
) -> Found:
    """Scan tier 1 and read every byte of every listed version of *job*; changes nothing.

    With *tried*, a version that no trainer began, or that lacks one of its *partitions*, is torn too; with *contents*,
    one whose tensors are not those of its tag.
    """
    tier = LocalTier(OsFileSystem(), tier1_path)
    scanned = recovery.scan(tier)
    torn = dict(scanned.quarantined)
    begun = None if tried is None else set(tried)
    listed = []
    for version in scanned.versions:
        if version.job != job:
            continue
        listed.append(version.id)
        problems = [
            f"{finding.path}: {finding.problem}"
            for finding in verifier.check_tier1(tier, version, deep=True, progress=lambda _: None)
        ]
        if begun is not None:
            problems += _unlike_saved(version, begun, partitions)
        if contents is not None and not problems:
            problems = contents.problems(tier1_path / layout.version_folder(job, version.id), version)
        if problems:
            torn[str(version.id)] = "; ".join(problems)
    return Found(tuple(sorted(listed)), torn, tuple(scanned.swept))


def examine_bucket(
    bucket_path: Path, job: str, tried: Iterable[VersionId], *, partitions: frozenset[str], contents: Contents
) -> Found:
    """Read every byte of every version that a reader of the bucket (a folder) is offered; changes nothing.

    One that is offered without a decision key that says so, or not offered although it does, is torn.
    """
    begun = set(tried)
    bucket = BucketRepository(open_store(f"file://{bucket_path}", {}), _READER)
    seen = view(bucket, job, lambda _: False)
    committed = {name for name, verdict in _decisions(bucket_path, job).items() if verdict == "committed"}
    torn = {str(version): problem for version, problem in seen.damaged.items()}
    offered = {str(version) for version in seen.manifests}
    for name in offered ^ committed - torn.keys():
        torn[name] = "it is offered without a decision" if name in offered else "it is decided and not offered"
    for version_id, manifests in seen.manifests.items():
        version = merged(manifests)
        problems = [
            f"{finding.path}: {finding.problem}"
            for finding in verifier.check_tier2(bucket, version, deep=True, progress=lambda _: None)
        ]
        problems += _unlike_saved(version, begun, partitions)
        if not problems:
            problems = contents.problems(bucket_path / layout.Bucket.version(job, version_id), version)
        if problems:
            torn[str(version_id)] = "; ".join(problems)
    return Found(tuple(sorted(seen.manifests)), torn, tuple(_undecided(bucket_path, job)))


def _unlike_saved(version: Version, begun: set[VersionId], partitions: frozenset[str]) -> list[str]:
    problems = []
    if version.id not in begun:
        problems.append("nobody began it")
    names = sorted(item.name for item in version.partitions)
    if version.state is not VersionState.COMMITTED or names != sorted(partitions):
        problems.append(f"it is {version.state} with {names}")
    return problems


def _decisions(bucket_path: Path, job: str) -> dict[str, str]:
    """What the decision keys say, read without Cairn; one that is no JSON says what is in it."""
    said = {}
    for path in (bucket_path / layout.Bucket.decisions(job)).glob("*.json"):
        try:
            said[path.stem] = str(json.loads(path.read_bytes())["verdict"])
        except (ValueError, KeyError, TypeError):
            said[path.stem] = repr(path.read_bytes()[:80])
    return said


def _undecided(bucket_path: Path, job: str) -> list[str]:
    folder, decided = bucket_path / job, _decisions(bucket_path, job)
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    return [name for name in names if name.startswith("e") and name not in decided]


def lost(promised: Iterable[VersionId], found: Found, keep: int) -> set[VersionId]:
    """Promised versions that are gone although retention, which keeps the newest *keep*, had no right to delete them.

    Deletion begins only after newer versions are durable, so a version may be missing only when *keep* newer ones are
    there.
    """
    listed = sorted(found.listed)
    present = set(listed)
    oldest_kept = listed[-keep] if len(listed) >= keep else None
    return {
        version for version in promised if version not in present and (oldest_kept is None or version > oldest_kept)
    }


def unlike_recoveries(tier1_path: Path) -> list[str]:
    """How recovery fails to be idempotent on the tree at *tier1_path*, which is left as it is; empty if it does not.

    It runs twice on a likeness in memory: it has to find what a scan of the tree finds, and the second time nothing
    to do.
    """
    scanned = _names(recovery.scan(LocalTier(OsFileSystem(), tier1_path)))
    with tempfile.TemporaryDirectory(dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None) as folder:
        likeness = Path(folder) / "tier1"
        _make_likeness(tier1_path, likeness)
        tier = LocalTier(OsFileSystem(), likeness)
        try:
            first, second = recovery.recover(tier), recovery.recover(tier)
        except CairnError as error:
            return [f"recovery failed: {error}"]
    problems = []
    if _names(first) != scanned:
        problems.append(f"a scan finds {scanned}, recovery {_names(first)}")
    if _names(second) != _names(first):
        problems.append(f"recovery finds {_names(first)}, the second time {_names(second)}")
    if second.swept or second.quarantined:
        problems.append(f"the second recovery sweeps {second.swept} and sets {second.quarantined} aside")
    return problems


def _names(found: recovery.Recovered) -> list[str]:
    return sorted(f"{version} {version.state} {version.copy(Tier.TIER1).state}" for version in found.versions)


def _make_likeness(source: Path, target: Path) -> None:
    """The same names, records and sizes; what is no record is a hole."""
    target.mkdir()
    for entry in os.scandir(source):
        path = target / entry.name
        if entry.is_dir(follow_symlinks=False):
            _make_likeness(Path(entry.path), path)
        elif entry.is_symlink():
            path.symlink_to(Path(entry.path).readlink())
        elif (size_bytes := entry.stat().st_size) <= _RECORD_BYTES and entry.name.endswith(".json"):
            path.write_bytes(Path(entry.path).read_bytes())
        else:
            with path.open("wb") as file:
                file.truncate(size_bytes)
