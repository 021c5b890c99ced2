"""Which tier 1 files were read and found intact since the daemon started.

A file is hashed once per daemon start, or again when its identity changed (published files are never written, so a
changed identity is itself suspicious), or at every use if ``verify_on_load = always``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from cairn_api.errors import CairnError, OverloadedError, VersionError
from cairnd.digests import Digest, digest_of
from cairnd.metrics import Metrics
from cairnd.model import Partition
from cairnd.tiers.filesystem import FileSystem, read_exactly
from cairnd.tiers.local import FileIdentity, LocalTier

_PIECE_BYTES = 4 * 1024 * 1024
"""As much as is hashed at once (see :mod:`cairnd.digests`)."""


class DamagedError(VersionError):
    """A copy's bytes are not what its manifest says, or cannot be read."""


class VerifiedFiles:
    """A cache of identities that were hashed. Thread-safe; ``check`` blocks."""

    def __init__(self, fs: FileSystem, tier: LocalTier, metrics: Metrics, *, always: bool) -> None:
        self._fs = fs
        self._tier = tier
        self._metrics = metrics
        self._always = always
        self._known: dict[str, tuple[FileIdentity, Digest]] = {}
        self._lock = threading.Lock()

    def check(
        self, key: str, partition: Partition, *, again: bool = False, progress: Callable[[int], None] | None = None
    ) -> None:
        """Raise :class:`DamagedError` unless the file's bytes match the partition's digest.

        *progress* is called with the bytes read so far, now and then while a file is hashed.
        """
        expected = partition.digest
        assert expected is not None, "only published partitions are checked"
        try:
            identity = self._tier.identity(key)
            with self._lock:
                known = self._known.get(key)
            if known == (identity, expected) and not self._always and not again:
                return
            found = self._digest(key, progress) if identity.size_bytes == expected.size_bytes else None
        except OverloadedError:
            raise  # no descriptors, no memory: nothing is wrong with the file
        except CairnError as error:
            raise self._damaged(key, str(error)) from error
        if found is None:
            raise self._damaged(key, f"it has {identity.size_bytes} bytes, the manifest says {expected.size_bytes}")
        if found != expected:
            blocks = [
                number
                for number, pair in enumerate(zip(found.blocks, expected.blocks, strict=False))
                if pair[0] != pair[1]
            ]
            raise self._damaged(key, f"block {blocks[0] if blocks else '?'} does not match its digest")
        with self._lock:
            self._known[key] = (identity, expected)

    def trust(self, key: str, partition: Partition) -> None:
        """Note that the file was just written from bytes that matched."""
        assert partition.digest is not None, "only digested partitions are written"
        with self._lock:
            self._known[key] = (self._tier.identity(key), partition.digest)

    def forget(self, prefix: str) -> None:
        """Drop what is known of keys below *prefix*."""
        with self._lock:
            for key in [key for key in self._known if key.startswith(prefix)]:
                del self._known[key]

    def _digest(self, key: str, progress: Callable[[int], None] | None) -> Digest:
        fd = self._tier.open_read(key)
        try:
            return digest_of(self._blocks(fd, progress or (lambda _: None)))
        finally:
            self._fs.close(fd)

    def _blocks(self, fd: int, progress: Callable[[int], None]) -> Iterator[memoryview]:
        size_bytes = self._fs.fstat(fd).st_size
        buffer = memoryview(bytearray(min(_PIECE_BYTES, size_bytes)))
        for offset in range(0, size_bytes, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, size_bytes - offset)]
            read_exactly(self._fs, fd, piece, offset)
            yield piece
            progress(offset + len(piece))

    def _damaged(self, key: str, why: str) -> DamagedError:
        self._metrics.verify_failures.labels("tier1").inc()
        return DamagedError(
            f"tier 1 copy {key} is damaged: {why}", hint="it is restored from another copy if there is one"
        )
