"""Whether a copy in the bucket that was found damaged is whole again: only reading all of it tells.

Whoever finds the damage uploads its own part again, and the damage may lie in another node's. That node's daemon has
not heard of it, and no other can upload that part, so the copy stays damaged here until its objects have changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cairn_api.errors import CairnError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.model import Copy, CopyState, Tier, Version
from cairnd.replication.bucket import BucketRepository
from cairnd.tiers.object_store import ObjectInfo
from cairnd.workers import Workers

Check = Callable[[BucketRepository, Version, Callable[[int], None]], Iterable[tuple[str, str]]]
"""Reads all of a version's copy; gives paths (empty for the whole copy) with what is wrong. Told bytes as it reads."""


@dataclass(frozen=True, slots=True)
class _Sent:
    """This node's part was uploaded again. ``copy``: what was said then; a later finding makes this void.

    ``objects``: those of other nodes that were damaged, as they were listed.
    """

    copy: Copy
    objects: Mapping[str, ObjectInfo | None]


class ReadBack:
    """One copy at a time: it may take as long as everything that was ever uploaded of the version."""

    def __init__(self, catalog: Catalog, workers: Workers, check: Check) -> None:
        self._catalog = catalog
        self._workers = workers
        self._check = check
        self._one = asyncio.Lock()
        self._sent: dict[tuple[str, VersionId], _Sent] = {}

    def is_sent(self, version: Version) -> bool:
        """Whether this node's part was uploaded again since the copy was found damaged, and is not known to be bad."""
        known = self._sent.get((version.job, version.id))
        return known is not None and known.copy is version.copy(Tier.TIER2)

    async def is_due(self, version: Version, bucket: BucketRepository) -> bool:
        """Whether it is worth reading: not as long as the objects of other nodes are those that were damaged."""
        if not self.is_sent(version):
            return True
        before = self._sent[version.job, version.id].objects
        listed = await self._workers.run(_listed, bucket, version) if before else {}
        return not before or any(listed.get(key) != info for key, info in before.items())

    async def read(self, version: Version, bucket: BucketRepository, progress: Callable[[int], None]) -> bool:
        """Whether the copy is whole; if not, that is recorded, with whose part it is and what to do.

        False too if somebody else looked meanwhile: what was found then counts. Raises what keeps it from reading.
        """
        before = version.copy(Tier.TIER2)
        self._sent.pop((version.job, version.id), None)
        try:
            async with self._one:
                listed, found = await self._workers.run(self._read, version, bucket, progress)
        except CairnError:
            if version.copy(Tier.TIER2) is before:
                self._stays(version, "", {})
            raise
        if version.copy(Tier.TIER2) is not before:
            return False
        if not found:
            return True
        own = [(path, problem) for path, problem in found if version.partition(path) is not None]
        path, problem = (own or found)[0]
        step = "" if own else (
            f" (not this node's part, which was uploaded again: run `cairn verify {version.id} --deep --job "
            f"{version.job}` on the node that saved it, and its daemon uploads it again; if no node has it any more, "
            f"`cairn prune {version.id} --job {version.job}` deletes the version)"
        )  # fmt: skip
        text = f"{path}: {problem}".removeprefix(": ") + step
        if own:  # to be sent once more
            self._catalog.set_copy(version, Tier.TIER2, CopyState.FAILED, text)
        else:
            keys = [layout.Bucket.partition(version.job, version.id, path) for path, _ in found if path]
            self._stays(version, text, {key: listed.get(key) for key in keys})
        return False

    def _stays(self, version: Version, text: str, objects: Mapping[str, ObjectInfo | None]) -> None:
        self._catalog.set_copy(version, Tier.TIER2, CopyState.FAILED, text)
        self._sent[version.job, version.id] = _Sent(version.copy(Tier.TIER2), objects)

    def _read(
        self, version: Version, bucket: BucketRepository, progress: Callable[[int], None]
    ) -> tuple[dict[str, ObjectInfo], list[tuple[str, str]]]:
        listed = _listed(bucket, version)  # first: what is replaced while this reads is read again
        return listed, list(self._check(bucket, version, progress))


def _listed(bucket: BucketRepository, version: Version) -> dict[str, ObjectInfo]:
    return {info.key: info for info in bucket.store.list(layout.Bucket.version(version.job, version.id))}
