"""A store read without its daemon (``--store``): tier 1's folder, or a bucket. Nothing is changed, nothing is locked.

What exists is found by the code that the daemon itself runs at its start (:mod:`cairnd.upkeep.recovery`,
:mod:`cairnd.restore.inventory`), and judged by the same verifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cairn_api.errors import CairnError, ConfigurationError, VersionError
from cairn_api.names import VersionId, parse_version
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.health import Health, read_records
from cairnd.cli.source import Blocks, Check, Listed, Listing, blocks_by, file_blocks
from cairnd.clock import SystemClock
from cairnd.events import EventLog
from cairnd.manifest import NOTE_FORMAT, decode
from cairnd.model import Partition, Tier, Version
from cairnd.replication.bucket import BucketRepository
from cairnd.restore.inventory import merged, view
from cairnd.tiers.errors import NotFoundError
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.tiers.stores import open_store
from cairnd.upkeep import recovery
from cairnd.upkeep.looking import Unseen
from cairnd.upkeep.verifier import Finding, GoneError, check_tier1, check_tier2

_READER = "0" * 32
"""The node id of a process that never writes."""

_NO_TREE = "name the daemon's tier1_path, or the bucket by its URL (file:///folder, s3://bucket/prefix)"


def open_offline(store: str, options: Mapping[str, str]) -> StoredVersions:
    """The source that ``--store`` names: a URL is a bucket, anything else a folder of tier 1.

    Raises :class:`ConfigurationError` when nothing of Cairn's can be there, and what the object store raises.
    """
    if "://" in store:
        return BucketVersions(BucketRepository(open_store(store, options), _READER), store)
    if options:
        raise ConfigurationError("--storage-option belongs to a bucket, and --store names a folder", hint=_NO_TREE)
    return Tier1Versions(Path(store).absolute())


class StoredVersions:
    """What both kinds of stores have in common. Subclasses fill the catalog and read bytes."""

    tier: Tier

    def __init__(self) -> None:
        clock = SystemClock()
        self._catalog = Catalog(clock, EventLog(clock))
        self._damaged: list[Finding] = []
        """Versions whose records cannot be believed: they are not in the catalog."""
        self._left_alone: dict[tuple[str, VersionId], CairnError] = {}
        """Versions whose records nobody could read: they are not in the catalog either."""
        self._warnings: list[str] = []
        """What else of the jobs that were read cannot be believed."""

    def jobs(self) -> list[str]:
        raise NotImplementedError

    def versions(self, job: str | None) -> Listing:
        found, warnings = [], []
        for name in self.jobs() if job is None else [job]:
            try:
                self._load(name)
            except VersionError as error:
                warnings.append(f"job {name} is not listed: {error.message}")
                continue
            found += [Listed(version, version.size_bytes) for version in self._catalog.versions(name)]
            warnings += [
                f"{name}/{finding.id} is not listed: {finding.problem}"
                for finding in self._damaged
                if finding.job == name
            ]
            warnings += [
                f"{name}/{version_id} is not listed: it could not be looked at: {error.message}"
                for (owner, version_id), error in self._left_alone.items()
                if owner == name
            ]
        return Listing(found, warnings + self._warnings, knows_tier2=self.tier is Tier.TIER2)

    def describe(self, job: str, text: str) -> Version:
        self._load(job)
        return self._catalog.find(job, text)

    def verify(self, job: str, text: str | None, *, deep: bool, report: Callable[[Check], None]) -> None:
        self._load(job)
        damaged = [item for item in self._damaged if item.job == job and text in (None, str(item.id))]
        unseen = Unseen()
        left_alone = {name: error for (owner, name), error in self._left_alone.items() if owner == job}
        versions = list(self._catalog.versions(job))
        if text is not None:
            versions = [] if damaged or text in map(str, left_alone) else [self._catalog.find(job, text)]
        total = sum(version.size_bytes for version in versions) if deep else 0
        state = Check(0, total, len(damaged), len(damaged), tuple(damaged))
        report(state)
        for version in versions:
            begun = state = replace(state, findings=())
            silence = unseen.given_up(self.tier)
            if silence is not None:
                unseen.note(version.id, self.tier, self.tier, silence)
                continue

            def read(count_bytes: int) -> None:
                nonlocal state
                state = replace(state, done_bytes=state.done_bytes + count_bytes)
                report(state)

            try:
                for finding in self._check(version, read, deep=deep):
                    report(replace(state, findings=(finding,)))
            except GoneError:
                continue
            except CairnError as failure:
                unseen.note(version.id, self.tier, self.tier, failure)
                continue
            unseen.seen(self.tier)
            state = replace(
                state,
                done_bytes=begun.done_bytes + (version.size_bytes if deep else 0),
                versions_checked=begun.versions_checked + 1,
                copies_checked=begun.copies_checked + 1,
            )
            report(state)
        for name, error in left_alone.items():
            if text in (None, str(name)):
                unseen.note(name, self.tier, self.tier, error)
        unseen.tell()

    @contextmanager
    def reading(self, version: Version, progress: Callable[[int, int], None]) -> Iterator[Blocks]:
        del progress  # nothing is fetched beforehand
        yield lambda partition: self._blocks(version, partition)

    def close(self) -> None:
        """Nothing is held open."""

    def _load(self, job: str) -> None:
        raise NotImplementedError

    def _check(self, version: Version, progress: Callable[[int], None], *, deep: bool) -> Iterator[Finding]:
        raise NotImplementedError

    def _blocks(self, version: Version, partition: Partition) -> Iterator[memoryview]:
        raise NotImplementedError


class Tier1Versions(StoredVersions):
    """The tier 1 folder *root* of one node: its manifests say what exists."""

    tier = Tier.TIER1

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._fs = OsFileSystem()
        self._tier1 = LocalTier(self._fs, root)
        _check_tree(self._tier1)
        found = recovery.scan(self._tier1)
        pinned, requested = recovery.notes(self._tier1, layout.PINS), recovery.notes(self._tier1, layout.REQUESTS)
        health, unread = read_records(self._tier1)
        self._warnings += [f"the record {key} is damaged: what it said of its version is not shown" for key in unread]
        for version in found.versions:
            health.get((version.job, version.id), Health()).apply(version)
            version.pinned = (version.job, version.id) in pinned
            version.requested = (version.job, version.id) in requested
            self._catalog.add(version)
        for folder, problem in found.quarantined:
            _, job, name = folder.split("/")
            self._damaged.append(Finding(job, parse_version(name), Tier.TIER1, "", problem))
        self._left_alone = {layout.version_of(folder): error for folder, error in found.left_alone.items()}

    def jobs(self) -> list[str]:
        damaged = {finding.job for finding in self._damaged}
        return sorted({*self._catalog.jobs(), *damaged, *(job for job, _ in self._left_alone)})

    def _load(self, job: str) -> None:
        """Everything was read at once: there is one folder to look through."""

    def _check(self, version: Version, progress: Callable[[int], None], *, deep: bool) -> Iterator[Finding]:
        for finding in check_tier1(self._tier1, version, deep=deep, progress=progress):
            # Without its manifest it does not exist any more: the daemon deletes that before the data.
            if not self._tier1.exists(layout.manifest(version.job, version.id)):
                raise GoneError(f"{version} was deleted while it was looked at", hint="choose another version")
            yield finding

    def _blocks(self, version: Version, partition: Partition) -> Iterator[memoryview]:
        fd = self._tier1.open_read(layout.partition(version.job, version.id, partition.path))
        try:
            yield from file_blocks(self._fs, fd, partition.size_bytes, partition.path)
        finally:
            self._fs.close(fd)


class BucketVersions(StoredVersions):
    """A bucket: its decision keys say what exists. Each job is read when it is first asked for."""

    tier = Tier.TIER2

    def __init__(self, bucket: BucketRepository, url: str) -> None:
        super().__init__()
        self._bucket = bucket
        self._jobs = bucket.jobs()
        self._loaded: set[str] = set()
        if not self._jobs:
            raise ConfigurationError(f"there is nothing of Cairn's at {url}", hint=_NO_TREE, context={"location": url})

    def jobs(self) -> list[str]:
        return self._jobs

    def _load(self, job: str) -> None:
        if job in self._loaded:
            return
        seen = view(self._bucket, job, _nothing_is_known)
        for version_id, manifests in seen.manifests.items():
            version = merged(manifests)
            version.pinned, version.requested = version_id in seen.pins, version_id in seen.requests
            self._catalog.add(version)
        for version_id, problem in seen.damaged.items():
            self._damaged.append(Finding(job, version_id, Tier.TIER2, "", problem))
        self._warnings += [claim.problem for claim in seen.epochs if claim.problem]
        self._loaded.add(job)

    def _check(self, version: Version, progress: Callable[[int], None], *, deep: bool) -> Iterator[Finding]:
        return check_tier2(self._bucket, version, deep=deep, progress=progress)

    def _blocks(self, version: Version, partition: Partition) -> Iterator[memoryview]:
        key = layout.Bucket.partition(version.job, version.id, partition.path)
        return blocks_by(lambda offset, block: self._bucket.store.read_into(key, offset, block), partition.size_bytes)


def _nothing_is_known(version: VersionId) -> bool:
    del version
    return False


def _check_tree(tier1: LocalTier) -> None:
    """Raise :class:`ConfigurationError` unless this is a tier 1 tree that this release reads."""
    try:
        document = decode(tier1.read_small(layout.LAYOUT_KEY), NOTE_FORMAT, layout.LAYOUT_KEY)
    except NotFoundError as error:
        raise ConfigurationError(f"{tier1.root} is not a tier 1 folder of Cairn's", hint=_NO_TREE) from error
    except VersionError as error:
        raise VersionError(f"{tier1.root}: {error.message}", hint=recovery.LAYOUT_DAMAGED) from error
    if document.get("layout") != layout.LAYOUT_VERSION:
        raise ConfigurationError(
            f"{tier1.root} has layout {document.get('layout')!r}, this Cairn reads layout {layout.LAYOUT_VERSION}",
            hint="use the version of Cairn that wrote it",
        )
