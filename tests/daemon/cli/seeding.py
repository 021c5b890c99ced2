"""Stores with known contents, made through the daemon's own library: what a daemon that has stopped leaves behind."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cairn_api.names import VersionId, stored_path
from cairnd import layout
from cairnd.digests import digest_of
from cairnd.manifest import NOTE_FORMAT, NodeManifest, encode
from cairnd.model import Partition
from cairnd.replication.bucket import BucketRepository, EpochClaim
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.tiers.object_store import BinarySource, ObjectStore
from cairnd.tiers.stores import open_store
from cairnd.upkeep import recovery

CREATED_S = 1_700_000_000.0
NONCE = "5" * 32
BUCKET_NODE = "b" * 32


@dataclass
class Seed:
    """One version: bytes by path. A path below ``by-rank/<rank>/`` is that rank's, others are rank 0's."""

    tag: str
    epoch: int = 1
    sequence: int = 1
    job: str = "run-7"
    files: Mapping[str, bytes] = field(default_factory=dict)
    world_size: int = 1
    ranks: Sequence[int] = (0,)
    persist: bool = False
    save_dir: str = "/data/checkpoints"
    globals: tuple[str, ...] = ("torch._utils._rebuild_tensor_v2", "argparse.Namespace")

    @property
    def id(self) -> VersionId:
        return VersionId(self.epoch, self.sequence, self.tag)

    @property
    def size_bytes(self) -> int:
        return sum(len(data) for data in self.files.values())

    def manifest(self, node: str) -> NodeManifest:
        return NodeManifest(
            job=self.job, id=self.id, node=node, nonce=NONCE, world_size=self.world_size, ranks=tuple(self.ranks),
            partitions=tuple(self._partition(path, data) for path, data in self.files.items()),
            save_dir=self.save_dir, persist=self.persist, file_marks=False, created_s=CREATED_S,
            uid=os.getuid(), gid=os.getgid(), attributes={"torch": "2.13.0"},
        )  # fmt: skip

    def _partition(self, path: str, data: bytes) -> Partition:
        rank, name = 0, path
        if path.startswith("by-rank/"):
            _, number, name = path.split("/", 2)
            rank = int(number)
        assert stored_path(name, rank, shared_name=name != path) == path
        return Partition(name, path, rank, len(data), digest_of([memoryview(data)] if data else []), self.globals)


def some_bytes(size_bytes: int, seed: int = 1) -> bytes:
    """The same bytes for the same arguments."""
    return hashlib.shake_128(str(seed).encode()).digest(size_bytes)


def three_versions() -> list[Seed]:
    """Two of one tag, one of another; by-rank names, an empty partition, one of two blocks."""
    return [
        Seed("global_step1", sequence=1, files={"model.pt": some_bytes(5000, 1)}),
        Seed(
            "global_step2",
            sequence=2,
            files={
                "model.pt": some_bytes(16 * 1024 * 1024 + 12345, 2),
                "optim/states.pt": some_bytes(4096, 3),
                "by-rank/1/model.pt": some_bytes(777, 4),
                "empty.pt": b"",
            },
            world_size=2,
            ranks=(0, 1),
        ),
        Seed("global_step1", epoch=2, sequence=1, files={"model.pt": some_bytes(6000, 5)}),
    ]


def seed_tier1(root: Path, seeds: Sequence[Seed], pins: Sequence[Seed] = ()) -> Path:
    """A tier 1 folder as a stopped daemon leaves it."""
    recovery.open_tree(OsFileSystem(), str(root))
    tier1 = LocalTier(OsFileSystem(), root)
    node = recovery.identify(tier1)
    for seed in seeds:
        for number, (path, data) in enumerate(seed.files.items()):
            key = layout.partition(seed.job, seed.id, path)
            writer = tier1.begin(key, layout.incoming(seed.job, seed.id, number), len(data))
            if data:
                writer.write(memoryview(data), 0)
            writer.finish()
            tier1.publish(writer, key)
        tier1.put_small(layout.manifest(seed.job, seed.id), seed.manifest(node).encode())
        tier1.delete_tree(layout.incoming_folder(seed.job, seed.id))
    for seed in pins:
        tier1.put_small(layout.pin(seed.job, seed.id), encode({"format": NOTE_FORMAT, "reason": "seeded"}))
    return root


def seed_bucket(folder: Path, seeds: Sequence[Seed], pins: Sequence[Seed] = ()) -> str:
    """A bucket below *folder* with committed versions; returns its URL."""
    url = f"file://{folder}"
    fill_bucket(open_store(url, {}), folder.parent, seeds, pins)
    return url


def fill_bucket(store: ObjectStore, staging: Path, seeds: Sequence[Seed], pins: Sequence[Seed] = ()) -> None:
    """Committed versions in *store*; *staging* is a folder for files on their way."""
    bucket = BucketRepository(store, BUCKET_NODE)
    for seed in seeds:
        bucket.claim_epoch(seed.job, EpochClaim(seed.epoch, NONCE, seed.world_size, None))
        for path, data in seed.files.items():
            staged = staging / "staged"
            staged.write_bytes(data)
            bucket.store.upload(
                layout.Bucket.partition(seed.job, seed.id, path),
                BinarySource(staged, len(data)),
                progress=_ignore,
                cancelled=lambda: False,
                deadline_s=60.0,
            )
            staged.unlink()
        bucket.put_manifest(seed.manifest(BUCKET_NODE))
        assert bucket.commit(seed.job, seed.id, seed.world_size) is not None
    for seed in pins:
        bucket.pin(seed.job, seed.id, "seeded")


def damage(path: Path, at: int) -> None:
    """Flip one bit of a published (read-only) file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def _ignore(sent_bytes: int) -> None:
    """Nobody watches the upload."""
    del sent_bytes
