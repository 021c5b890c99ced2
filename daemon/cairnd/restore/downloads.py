"""Brings partitions from a bucket into tier 1: block by block, each compared with its digest before it is written.

Whose failure it was decides what follows. Bytes that the bucket does not have, or has wrong, condemn its copy. A place
in tier 1 that takes no file says nothing about the bucket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from cairn_api.errors import CairnError, ConfigurationError, UnavailableError, VersionError
from cairnd import layout
from cairnd.catalog.verified import DamagedError, VerifiedFiles
from cairnd.digests import BLOCK_BYTES
from cairnd.model import Partition, Version
from cairnd.replication.bucket import BucketRepository
from cairnd.replication.storage import Storage
from cairnd.restore.pace import Meter
from cairnd.tiers.local import LocalTier
from cairnd.upkeep.verifier import block_buffer, compare_block
from cairnd.workers import Workers, to_the_end


class PlaceError(UnavailableError):
    """Tier 1 takes no file at this place."""


class Downloads:
    """At most *concurrency* at a time."""

    def __init__(
        self,
        tier1: LocalTier,
        verified: VerifiedFiles,
        storage: Storage,
        workers: Workers,
        *,
        make_room: Callable[..., Awaitable[None]],
        concurrency: int,
    ) -> None:
        self._tier1 = tier1
        self._verified = verified
        self._storage = storage
        self._workers = workers
        self._make_room = make_room
        self._slots = asyncio.Semaphore(concurrency)

    async def bring(
        self,
        url: str,
        version: Version,
        partition: Partition,
        key: str,
        temporary: str,
        meter: Meter,
        *,
        deleting: bool = True,
    ) -> None:
        """Bring *partition* from the bucket at *url* to *key*, by way of *temporary*; *deleting* may make room for it.

        Raises :class:`DamagedError` when the bucket's copy is missing or damaged, what the bucket raises when it does
        not answer, :class:`PlaceError` when tier 1 takes no file there, :class:`OverloadedError` when it has no room.
        """
        async with self._slots:
            await self._make_room(partition.size_bytes, version.job, deleting=deleting)
            bucket = await self._storage.bucket(url)
            try:
                download = self._workers.run(self._download, bucket, version, partition, key, temporary, meter)
                await to_the_end(download)  # what ends later than its fetch would escape the clean-up
            except PlaceError:
                raise
            except UnavailableError as error:
                self._storage.note_failure(url, error)
                raise

    def _download(
        self,
        bucket: BucketRepository,
        version: Version,
        partition: Partition,
        key: str,
        temporary: str,
        meter: Meter,
    ) -> None:
        assert partition.digest is not None, "versions of the bucket have digests"
        at, source = meter.reader(partition), layout.Bucket.partition(version.job, version.id, partition.path)
        read, view = partial(bucket.store.read_into, source), block_buffer()
        with _placing(key):
            writer = self._tier1.begin(key, temporary, partition.size_bytes)
        try:
            for number, offset in enumerate(range(0, partition.size_bytes, BLOCK_BYTES)):
                meter.check()
                problem = compare_block(partition, number, read, view)
                if problem:
                    raise DamagedError(f"{source} in tier 2 is damaged: {problem}")
                block = view[: min(BLOCK_BYTES, partition.size_bytes - offset)]
                with _placing(key):
                    writer.write(block, offset)
                at(offset + len(block))
            with _placing(key):
                writer.finish()
                self._tier1.publish(writer, key)
                self._tier1.sync_folders([key])
                self._verified.trust(key, partition)
        except BaseException:
            with suppress(CairnError):  # what went wrong first is what tells; a temporary file left behind is swept
                writer.discard()
            raise


@contextmanager
def _placing(key: str) -> Iterator[None]:
    """Tell failures of tier 1 from those of the bucket. A lack of space or of descriptors stays what it is."""
    try:
        yield
    except (VersionError, UnavailableError, ConfigurationError) as error:
        raise PlaceError(
            f"tier 1 takes no file at {key}: {error.message}",
            hint=error.hint or "look at this folder of tier 1: something removes or replaces what lies there",
            context=error.context,
        ) from error
