"""Re-reads copies and says what is wrong with them. Independent of the write path: it is the judge of every crash test.

Quick: manifests and sizes. Deep: every digest of every copy. The functions block, read a bounded amount of memory at a
time, need no running daemon and change nothing; setting damaged copies aside is the caller's decision.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from awscrt import checksums

from cairn_api.errors import CairnError, VersionError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.digests import BLOCK_BYTES
from cairnd.manifest import NodeManifest
from cairnd.model import Partition, Tier, Version
from cairnd.replication.bucket import BucketRepository, Verdict
from cairnd.tiers.errors import explained, is_damage
from cairnd.tiers.local import LocalTier

ReadBlock = Callable[[int, memoryview], None]


class GoneError(VersionError):
    """The version was deleted while it was looked at: nothing is wrong with what is missing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as its manifest says. ``path`` is empty when it concerns the whole copy."""

    job: str
    id: VersionId
    tier: Tier
    path: str
    problem: str

    @property
    def text(self) -> str:
        """The problem with the path in front, if there is one."""
        return f"{self.path}: {self.problem}".removeprefix(": ")


def check_tier1(
    tier1: LocalTier, version: Version, *, deep: bool, progress: Callable[[int], None]
) -> Iterator[Finding]:
    """Findings about the tier 1 copy of *version*; *progress* is told bytes as they are read.

    Raises what keeps it from looking (no descriptors, no memory, no rights): that says nothing about the copy.
    """

    def finding(path: str, problem: str) -> Finding:
        return Finding(version.job, version.id, Tier.TIER1, path, problem)

    key = layout.manifest(version.job, version.id)
    try:
        manifest = NodeManifest.decode(tier1.read_small(key), key)
    except CairnError as error:
        if not is_damage(error):
            raise
        yield finding("", error.message)
        return
    if (manifest.job, manifest.id) != (version.job, version.id):
        yield finding("", f"its manifest describes {manifest.job}/{manifest.id}")
    for partition in manifest.partitions:
        data_key = layout.partition(version.job, version.id, partition.path)
        try:
            size_bytes = tier1.identity(data_key).size_bytes
            if size_bytes != partition.size_bytes:
                yield finding(partition.path, f"it has {size_bytes} bytes, the manifest says {partition.size_bytes}")
            elif deep:
                file = tier1.open_uncached(data_key)  # the page cache may hold what the disk has lost
                try:
                    problem = _compare(partition, file.read_into, progress)
                finally:
                    file.close()
                if problem:
                    yield finding(partition.path, problem)
        except CairnError as error:
            if not is_damage(error):
                raise
            yield finding(partition.path, error.message)


def check_tier2(
    bucket: BucketRepository, version: Version, *, deep: bool, progress: Callable[[int], None]
) -> Iterator[Finding]:
    """Findings about the bucket's copy of *version*: decision, node manifests, sizes; deep: bytes.

    Raises what the bucket does when it does not answer, or refuses to: that says nothing about the copy. Raises
    :class:`GoneError` when any daemon deleted the version.
    """
    findings = _findings_in_tier2(bucket, version, deep=deep, progress=progress)
    for first in findings:
        if is_deleted(bucket, version):  # the tombstone comes before its data goes
            raise GoneError(f"{version} was deleted in tier 2 while it was looked at", hint="choose another version")
        yield first
        yield from findings


def is_deleted(bucket: BucketRepository, version: Version) -> bool:
    """Whether the decision key says that *version* was deleted, by whichever daemon."""
    try:
        decision = bucket.decision(version.job, version.id)
    except CairnError as error:
        if not is_damage(error):
            raise
        return False
    return decision is not None and decision.verdict is Verdict.DELETED


def _findings_in_tier2(
    bucket: BucketRepository, version: Version, *, deep: bool, progress: Callable[[int], None]
) -> Iterator[Finding]:

    def finding(path: str, problem: str) -> Finding:
        return Finding(version.job, version.id, Tier.TIER2, path, problem)

    try:
        decision = bucket.decision(version.job, version.id)
        if decision is None or decision.verdict is not Verdict.COMMITTED:
            yield finding("", f"its decision key says {decision.verdict if decision else 'nothing'}")
            return
        manifests = bucket.committed(version.job, version.id, decision)
    except CairnError as error:
        if not is_damage(error):
            raise
        yield finding("", error.message)
        return
    for partition in {item.path: item for manifest in manifests for item in manifest.partitions}.values():
        key = layout.Bucket.partition(version.job, version.id, partition.path)
        try:
            info = bucket.store.info(key)
            if info is None:
                yield finding(partition.path, "it is missing")
            elif info.size_bytes != partition.size_bytes:
                yield finding(
                    partition.path, f"it has {info.size_bytes} bytes, the manifest says {partition.size_bytes}"
                )
            elif deep:
                problem = _compare(partition, partial(bucket.store.read_into, key), progress)
                if problem:
                    yield finding(partition.path, problem)
        except CairnError as error:
            if not is_damage(error):
                raise
            yield finding(partition.path, error.message)


def _compare(partition: Partition, read: ReadBlock, progress: Callable[[int], None]) -> str:
    """What is wrong with the bytes that *read* delivers; empty if nothing. Raises as :func:`compare_block` does."""
    assert partition.digest is not None, "manifests state digests"
    view = block_buffer()
    for number in range(len(partition.digest.blocks)):
        problem = compare_block(partition, number, read, view)
        if problem:
            return problem
        progress(min(BLOCK_BYTES, partition.size_bytes - number * BLOCK_BYTES))
    return ""


def block_buffer() -> memoryview:
    """Page-aligned memory for one block. Nobody closes it: an error on its way up may hold a view of it.

    Raises :class:`OverloadedError` when there is none.
    """
    with explained("take", "memory for a block"):
        return memoryview(mmap.mmap(-1, BLOCK_BYTES))


def compare_block(partition: Partition, number: int, read: ReadBlock, buffer: memoryview) -> str:
    """What is wrong with block *number* as *read* delivers it into *buffer*; empty if nothing.

    Raises what keeps it from reading: that says nothing about the bytes.
    """
    assert partition.digest is not None, "manifests state digests"
    offset = number * BLOCK_BYTES
    block = buffer[: min(BLOCK_BYTES, partition.size_bytes - offset)]
    try:
        with explained("read", partition.path):
            read(offset, block)
    except CairnError as error:
        if not is_damage(error):
            raise
        cause = error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else error.message
        return f"block {number} cannot be read: {reason}"
    if checksums.crc64nvme(block) != partition.digest.blocks[number]:
        return f"block {number} does not match its digest"
    return ""
