"""Which tier 1 files were read and found intact since the daemon started.

A file is hashed once per daemon start, or again when its identity changed (published files are never written, so a
changed identity is itself suspicious), or at every use if ``verify_on_load = always``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cairn_api.errors import CairnError, VersionError
from cairnd.catalog.hashing import Hashing, Progress
from cairnd.clock import Clock
from cairnd.digests import Digest
from cairnd.metrics import Metrics
from cairnd.model import Partition
from cairnd.tiers.errors import explained, is_damage
from cairnd.tiers.filesystem import FileSystem
from cairnd.tiers.local import FileIdentity, LocalTier

Digested = Callable[[int, float], None]
"""Told of each digest pass: the bytes that were hashed and the seconds that took, reading included."""


class DamagedError(VersionError):
    """A copy's bytes are not what its manifest says, or cannot be read."""


class VerifiedFiles:
    """A cache of identities that were hashed. Thread-safe; ``check`` blocks.

    *always* is the policy for all copies: at every load, rather than once.
    """

    def __init__(
        self, fs: FileSystem, tier: LocalTier, hashing: Hashing, clock: Clock, metrics: Metrics, *, always: bool
    ) -> None:
        self.always = always
        self._fs = fs
        self._tier = tier
        self._hashing = hashing
        self._clock = clock
        self._metrics = metrics
        self._known: dict[str, tuple[FileIdentity, Digest]] = {}
        self._lock = threading.Lock()

    def knows(self, key: str, partition: Partition) -> bool:
        """Whether :meth:`check` would hash nothing, unless the file was replaced meanwhile."""
        with self._lock:
            known = self._known.get(key)
        return not self.always and known is not None and known[1] == partition.digest

    def check(
        self,
        key: str,
        partition: Partition,
        *,
        again: bool = False,
        progress: Progress = lambda _: None,
        digested: Digested = lambda _bytes, _seconds: None,
    ) -> None:
        """Raise :class:`DamagedError` unless the file's bytes match the partition's digest.

        Raises what else keeps it from reading the file: that says nothing about its bytes.
        *progress* is called with the bytes read so far, now and then while a file is hashed, and *digested* when it is.
        """
        expected = partition.digest
        assert expected is not None, "only published partitions are checked"
        try:
            identity = self._tier.identity(key)
            with self._lock:
                known = self._known.get(key)
            if known == (identity, expected) and not self.always and not again:
                return
            found = None
            if identity.size_bytes == expected.size_bytes:
                with self.timed(identity.size_bytes, digested):
                    found = self._digest(key, expected.size_bytes, progress)
        except CairnError as error:
            if not is_damage(error):
                raise  # no descriptors, no memory, no rights: nothing is known to be wrong with the file
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

    @contextmanager
    def timed(self, size_bytes: int, digested: Digested) -> Iterator[None]:
        """Count a digest pass over *size_bytes*, and tell *digested*. Passes are never hidden in another figure."""
        started_s = self._clock.monotonic_s()
        yield
        duration_s = self._clock.monotonic_s() - started_s
        self._metrics.stage_seconds.labels("digest").observe(duration_s)
        self._metrics.stage_bytes.labels("digest").inc(size_bytes)
        digested(size_bytes, duration_s)

    def _digest(self, key: str, size_bytes: int, progress: Progress) -> Digest:
        fd = self._tier.open_read(key)
        try:
            with explained("read", key):  # a bad sector is damage like any other
                return self._hashing.of_file(fd, size_bytes, progress)
        finally:
            self._fs.close(fd)

    def _damaged(self, key: str, why: str) -> DamagedError:
        return DamagedError(
            f"tier 1 copy {key} is damaged: {why}", hint="it is restored from another copy if there is one"
        )
