"""What verbs read from: a daemon, or a store while the daemon is down. They do not know which.

Both speak in the daemon's own values (:mod:`cairnd.model`). Two things are known less well through a daemon, because
the wire does not carry them: digests of single blocks (``Digest.blocks`` is empty) and who asked for a persist later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from cairnd.digests import BLOCK_BYTES
from cairnd.model import Partition, Version
from cairnd.tiers.errors import explained
from cairnd.tiers.filesystem import FileSystem, read_exactly
from cairnd.upkeep.verifier import Finding


@dataclass(frozen=True, slots=True)
class Listed:
    """A version in a listing, perhaps without its partitions, and their size."""

    version: Version
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Listing:
    """Versions by job, newest first. ``warnings``: what could not be read, so that the list may be incomplete.

    ``knows_tier2``: whether it would show a copy in tier 2 if there is one; tier 1's folder alone does not tell.
    """

    versions: list[Listed]
    warnings: list[str]
    knows_tier2: bool = True


@dataclass(frozen=True, slots=True)
class Check:
    """How far a verification is; ``findings`` are those since the last one."""

    done_bytes: int
    total_bytes: int
    versions_checked: int
    copies_checked: int
    findings: tuple[Finding, ...] = ()


Blocks = Callable[[Partition], Iterator[memoryview]]
"""The bytes of a partition, in order, in pieces that are valid until the next one is asked for. Not yet verified."""


class Source(Protocol):
    """Everything that verbs read. All methods raise Cairn's errors."""

    def jobs(self) -> list[str]:
        """Names of all jobs that have versions here, sorted."""

    def versions(self, job: str | None) -> Listing:
        """Versions of *job*, or of all jobs that the caller may see."""

    def describe(self, job: str, text: str) -> Version:
        """One version with its partitions, by its full name or by its tag (the newest one of that tag)."""

    def verify(self, job: str, text: str | None, *, deep: bool, report: Callable[[Check], None]) -> None:
        """Check the copies of one version, or of all: manifests and sizes, and with *deep* every digest.

        *report* is called as it goes on, and once more at the end.
        """

    def reading(self, version: Version, progress: Callable[[int, int], None]) -> AbstractContextManager[Blocks]:
        """Bring the partitions near and keep them from being deleted meanwhile.

        *progress* gets ``(done, total)`` bytes of what a daemon fetches; a store reads only while blocks are asked for.
        """

    def close(self) -> None:
        """Let go of the connection or store."""


def blocks_by(read_into: Callable[[int, memoryview], None], size_bytes: int) -> Iterator[memoryview]:
    """*size_bytes* bytes as blocks of one buffer, each filled by ``read_into(offset, block)`` when it is asked for."""
    buffer = memoryview(bytearray(min(BLOCK_BYTES, size_bytes)))
    for offset in range(0, size_bytes, BLOCK_BYTES):
        block = buffer[: min(BLOCK_BYTES, size_bytes - offset)]
        read_into(offset, block)
        yield block


def file_blocks(fs: FileSystem, fd: int, size_bytes: int, what: str) -> Iterator[memoryview]:
    """The first *size_bytes* of an open file. Errors name *what* is read."""

    def read_into(offset: int, block: memoryview) -> None:
        with explained("read", what):
            read_exactly(fs, fd, block, offset)

    return blocks_by(read_into, size_bytes)
