"""A bucket that daemons share: :class:`cairnd.tiers.object_store.ObjectStore` in memory, with an unreliable way there.

Each request is atomic in the bucket. On the way it may be slow, get lost, or be carried out while its reply gets lost;
a download may break off with half of the bytes delivered.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cairn_api.errors import UnavailableError, VersionError
from cairnd.digests import digest_of
from cairnd.tiers.errors import NotFoundError, UploadCancelledError
from cairnd.tiers.filesystem import read_exactly
from cairnd.tiers.keys import check_key, check_prefix
from cairnd.tiers.object_store import BinarySource, Capabilities, ObjectInfo
from tests.simulation.disk import MountedDisk
from tests.simulation.kernel import Process

_HINT = "try again"


@dataclass(slots=True)
class WayFaults:
    """How likely a request is lost, its reply is lost, or it takes very long; and whether nothing gets through."""

    lost: float = 0.0
    lost_reply: float = 0.0
    slow: float = 0.0
    broken_off: float = 0.0
    down: bool = False
    was_slow: bool = False

    def clear(self) -> None:
        """Everything gets through again."""
        self.lost = self.lost_reply = self.slow = self.broken_off = 0.0
        self.down = False


class Bucket:
    """The objects. ``on_change`` is told of each change after it: the key, what was there, what is there now."""

    def __init__(self, chance: random.Random, *, checks_source: bool) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.checks_source = checks_source
        self.on_change: Callable[[str, bytes | None, bytes | None], None] = lambda _key, _old, _new: None
        self.writer = ""
        """The process whose request changes something now."""
        self.listings: dict[tuple[str, str], float] = {}
        """When a process last listed a prefix."""
        self.hurried = True
        """Whether ``writer`` was never held up on its way for long."""
        self._chance = chance

    def get(self, key: str) -> bytes | None:
        """An object, or None."""
        found = self.objects.get(key)
        return None if found is None else found[0]

    def put(self, key: str, data: bytes, now_s: float) -> None:
        """Put an object."""
        old = self.get(key)
        self.objects[key] = data, now_s
        self.on_change(key, old, data)

    def delete(self, key: str) -> None:
        """Remove an object, if there is one."""
        old = self.objects.pop(key, None)
        if old is not None:
            self.on_change(key, old[0], None)

    def below(self, prefix: str) -> list[ObjectInfo]:
        """A listing."""
        return [
            ObjectInfo(key, len(self.objects[key][0]), self.objects[key][1])
            for key in sorted(self.objects)
            if key.startswith(prefix)
        ]

    def rot(self, key: str) -> None:
        """Flip one bit of an object; nobody is told, and its listing does not change."""
        data, modified_s = self.objects[key]
        damaged = bytearray(data)
        damaged[self._chance.randrange(len(damaged))] ^= 1 << self._chance.randrange(8)
        self.objects[key] = bytes(damaged), modified_s


class BucketStore:
    """The bucket as one process reaches it."""

    def __init__(self, bucket: Bucket, faults: WayFaults, disk: MountedDisk, process: Process) -> None:
        self._bucket = bucket
        self._faults = faults
        self._disk = disk
        self._process = process
        self._chance = process.loop.chance

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("simulated", True, True, self._bucket.checks_source)

    def probe(self, key: str) -> Capabilities:
        self.put_if_absent(key, b"1")
        self.put_if_absent(key, b"2")
        self.delete(key)
        return self.capabilities

    def put(self, key: str, data: bytes) -> None:
        self._go("put", check_key(key))
        self._bucket.put(key, bytes(data), self._now_s())
        self._come_back()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._go("put if absent", check_key(key))
        created = self._bucket.get(key) is None
        if created:
            self._bucket.put(key, bytes(data), self._now_s())
        if self._happens(self._faults.lost_reply) and self._chance.random() < 0.5:
            return False  # the store has sent it again by itself, and was told that it is there
        self._come_back()
        return created

    def upload(
        self,
        key: str,
        source: BinarySource,
        *,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
        deadline_s: float,  # noqa: ARG002 - simulated uploads end before
    ) -> None:
        self._go("upload", check_key(key))
        assert isinstance(source.file, int)
        data = bytearray(source.size_bytes)
        read_exactly(self._disk, source.file, memoryview(data), 0)
        if self._bucket.checks_source and source.digest is not None and digest_of([memoryview(data)]) != source.digest:
            raise VersionError(f"the source of {key} is damaged")
        progress(len(data))
        self._go("upload ends", key)
        if cancelled():
            raise UploadCancelledError(f"the upload of {key} was cancelled")
        self._bucket.put(key, bytes(data), self._now_s())
        self._come_back()

    def get(self, key: str, max_bytes: int) -> bytes:
        self._go("get", check_key(key))
        found = self._bucket.get(key)
        if found is None:
            raise NotFoundError(f"there is no {key}")
        if len(found) > max_bytes:
            raise VersionError(f"{key} is too large")
        self._come_back()
        return found

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._go("read", check_key(key))
        found = self._bucket.get(key)
        if found is None:
            raise NotFoundError(f"there is no {key}")
        part = found[offset : offset + len(buffer)]
        if self._happens(self._faults.broken_off):
            buffer[: len(part) // 2] = part[: len(part) // 2]
            raise UnavailableError(f"the download of {key} broke off", hint=_HINT)
        if len(part) < len(buffer):
            raise VersionError(f"{key} ends early")
        buffer[:] = part
        self._come_back()

    def info(self, key: str) -> ObjectInfo | None:
        self._go("info", check_key(key))
        found = self._bucket.objects.get(key)
        self._come_back()
        return None if found is None else ObjectInfo(key, len(found[0]), found[1])

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._go("list", check_prefix(prefix))
        found = self._bucket.below(prefix)
        self._bucket.listings[self._process.name, prefix] = self._now_s()
        self._come_back()
        yield from found

    def list_folders(self, prefix: str) -> Sequence[str]:
        self._go("list folders", check_prefix(prefix))
        names = {key.removeprefix(prefix).split("/")[0] for key in self._bucket.objects if key.startswith(prefix)}
        names = {name for name in names if any(key.startswith(f"{prefix}{name}/") for key in self._bucket.objects)}
        self._come_back()
        return sorted(names)

    def delete(self, key: str) -> None:
        self._go("delete", check_key(key))
        self._bucket.delete(key)
        self._come_back()

    def abort_stale_uploads(self, prefix: str, older_than_s: float) -> int:  # noqa: ARG002 - none stays behind
        self._go("abort stale uploads", check_prefix(prefix))
        return 0

    def _go(self, what: str, key: str) -> None:
        duration_s = self._chance.random() * 0.02
        if self._happens(self._faults.slow):
            duration_s = self._chance.random() * 30.0
            self._faults.was_slow = True
        self._process.call(f"{what} {key}", duration_s)
        self._bucket.writer, self._bucket.hurried = self._process.name, not self._faults.was_slow
        if self._faults.down or self._happens(self._faults.lost):
            raise UnavailableError("the bucket does not answer", hint=_HINT)

    def _come_back(self) -> None:
        if self._happens(self._faults.lost_reply):
            raise UnavailableError("the bucket's reply did not arrive", hint=_HINT)

    def _happens(self, likelihood: float) -> bool:
        return likelihood > 0.0 and self._chance.random() < likelihood

    def _now_s(self) -> float:
        return 1_700_000_000.0 + self._process.loop.time()
