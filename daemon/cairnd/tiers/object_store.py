"""What an object store must do. The docstrings are the specification; ``tests/conformance`` holds every store to it.

Keys and prefixes are relative to the store's own root and pass :mod:`cairnd.tiers.keys`. Every failure is one of
Cairn's errors: ``UnavailableError`` (not answering, throttled: the same call may succeed later), ``ConfigurationError``
(credentials, bucket, permission, name), ``OverloadedError`` (full), :class:`~cairnd.tiers.errors.NotFoundError`,
``VersionError`` (an object is not what it should be). Credentials never appear in a text. Stores are thread-safe; all
calls block, none without end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from cairnd.digests import Digest


class ObjectInfo(NamedTuple):
    """One object: its size in bytes and when the store says it was last written (seconds since the Unix epoch)."""

    key: str
    size_bytes: int
    modified_s: float


class Capabilities(NamedTuple):
    """What a store is able to do, as seen by :meth:`ObjectStore.probe`, not as its vendor promises."""

    name: str
    """The kind of store, for people: ``file``, ``s3``, ``memory``."""

    conditional_put: bool
    """Whether :meth:`ObjectStore.put_if_absent` is atomic. If not, one node alone may decide versions."""

    ranged_reads: bool
    """Whether :meth:`ObjectStore.read_into` fetches only what it is asked for."""

    checks_source: bool = False
    """Whether :meth:`ObjectStore.upload` compares all that it reads with the source's digest before the object appears.

    If so, nobody needs to read the source first.
    """


class BinarySource(NamedTuple):
    """What to upload: a file, by path or by a descriptor that stays the caller's, of exactly *size_bytes*.

    With its *digest* the bytes need not be hashed again, and a store that verifies checksums compares what arrived with
    what was captured.
    """

    file: Path | int
    size_bytes: int
    digest: Digest | None = None


class ObjectStore(Protocol):
    """Bytes by key, in tier 2."""

    @property
    def capabilities(self) -> Capabilities:
        """What :meth:`probe` found; before that, what this kind of store is able to do."""

    def probe(self, key: str) -> Capabilities:
        """Find out by putting under *key* twice, if absent; the second must fail. Removes *key* again.

        *key* is one that no other process uses. Also proves that the store answers, takes the credentials and may be
        written to.
        """

    def put(self, key: str, data: bytes) -> None:
        """Put a small object, replacing what was there; durable when this returns."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Put a small object if there is none. True: ours was created. False: there is one already.

        False may also mean that ours was created and the reply got lost; the caller reads back and compares. For the
        same reason it is allowed to repeat the call. Where ``capabilities.conditional_put`` is false this looks first
        and then puts, which excludes nobody.
        """

    def upload(
        self,
        key: str,
        source: BinarySource,
        *,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
        deadline_s: float,
    ) -> None:
        """Put a large object, replacing what was there; durable when this returns.

        *progress* is told how many bytes were sent so far. *cancelled* is asked every now and then; once it says yes,
        :class:`~cairnd.tiers.errors.UploadCancelledError` is raised. After *deadline_s* seconds ``UnavailableError``
        is raised, if need be a few seconds later, spent on cleaning up. The object appears whole or not at all: a
        source that is shorter or longer than it says, that cannot be read or (see :attr:`Capabilities.checks_source`)
        does not match its digest raises ``VersionError``, and whatever the failure, no part stays behind (if the store
        can then be told so; else :meth:`abort_stale_uploads` finds it).
        """

    def get(self, key: str, max_bytes: int) -> bytes:
        """A small object; one of more than *max_bytes* raises ``VersionError``."""

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* from *offset* of an object; one that ends before raises ``VersionError``.

        When this raises, the contents of the buffer are undefined.
        """

    def info(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, or None when there is none. Never answered from a cache."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects below *prefix* (empty, or ending with ``/``), by key. Never answered from a cache."""

    def list_folders(self, prefix: str) -> Sequence[str]:
        """The names directly below *prefix* that have objects below them, without ``/``, sorted.

        A name whose objects were all deleted may linger (SeaweedFS keeps empty folders for a while).
        """

    def delete(self, key: str) -> None:
        """Remove an object, if there is one."""

    def abort_stale_uploads(self, prefix: str, older_than_s: float) -> int:
        """Remove what unfinished uploads below *prefix* left, if begun longer ago than this; returns how many."""
