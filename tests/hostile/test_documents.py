"""Manifests, records and notes that nobody wrote: refused with the documented error, or believed and then usable.

"Usable" is the harder half: what is believed is shown, converted for the wire, compared and joined into keys; a number
that fits no field there would fail every listing that it appears in.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from cairn_api.errors import ConfigurationError, VersionError
from cairn_api.names import VersionId
from cairn_api.v1 import restore_pb2, save_pb2
from cairnd import layout
from cairnd.catalog.health import Health, read_records
from cairnd.catalog.jobs import JobBook, JobRecord
from cairnd.cli.documents import version_document
from cairnd.digests import Digest
from cairnd.manifest import DECISION_FORMAT, EPOCH_FORMAT, NodeManifest, encode
from cairnd.model import Partition, Tier, Version, VersionState
from cairnd.replication.bucket import BucketRepository
from cairnd.restore.inventory import view
from cairnd.rpc import convert
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.tiers.stores.file import FileStore
from cairnd.upkeep import recovery
from cairnd.workers import ThreadWorkers
from tests.hostile.bounds import bounded_memory
from tests.hostile.documents import forged
from tests.hostile.seeds import SEED
from tests.promises import Evidence, proof_size

pytestmark = pytest.mark.fault

EXAMPLES = proof_size(60, 3_000)
"""For each kind of document."""

JOB, VERSION, NODE = "run-7", VersionId(3, 1, "step"), "a" * 32


def _manifest(job: str = JOB, version: VersionId = VERSION) -> NodeManifest:
    part = Partition("model.pt", "model.pt", 0, 5, Digest(5, 2**63, (2**63,)), ("torch._utils._rebuild_tensor_v2",))
    return NodeManifest(
        job, version, NODE, "nonce", 1, (0,), (part,), "/save", True, False, 1.7e9, 1000, 1000, {"torch": "2.13.0"}
    )


def _document(packed: bytes) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(packed)
    del document["crc64nvme"]
    return document


class Store:
    """A tier 1 tree and a bucket with one sound version, of which one document at a time is replaced."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.tier1 = LocalTier(OsFileSystem(), root / "tier1")
        self.tier1.root.mkdir()
        self._bucket_root = root / "bucket"
        self.store = FileStore(OsFileSystem(), self._bucket_root)
        manifest = _manifest()
        self.tier1.put_small(layout.manifest(JOB, VERSION), manifest.encode())
        self.tier1.put_small(layout.job_record(JOB), JobRecord(JOB, 1000, 1000, "", 2, 3, "n", 1).encode())
        self.tier1.put_small(layout.health(JOB, VERSION), Health({Tier.TIER1: "x"}, ("a",), "y").encode())
        recovery.identify(self.tier1)
        keys = layout.Bucket
        self.store.put(keys.node(JOB, VERSION, NODE), manifest.encode())
        self.store.put(
            keys.decision(JOB, VERSION),
            encode(
                {
                    "format": DECISION_FORMAT, "verdict": "committed", "version": str(VERSION), "world_size": 1,
                    "nonce": "nonce", "manifests": {NODE: manifest.fingerprint()}, "job": JOB,
                }
            ),
        )  # fmt: skip
        self.store.put(
            keys.epoch(JOB, 3),
            encode(
                {
                    "format": EPOCH_FORMAT, "job": JOB, "epoch": 3, "nonce": "n", "world_size": 1,
                    "resumed_from": "e00002-s000001-step",
                }
            ),
        )  # fmt: skip

    @property
    def bucket(self) -> BucketRepository:
        """The bucket, of which nothing is remembered."""
        return BucketRepository(self.store, NODE)

    def path_of(self, key: str, *, in_bucket: bool) -> Path:
        """The file of a document."""
        return (self._bucket_root if in_bucket else self.tier1.root) / key


def _use_version(version: Version) -> None:
    """Everything that is done with a version because it is listed."""
    convert.version_to(version, partitions=True).SerializeToString()
    json.dumps(version_document(version, version.size_bytes)).encode()
    for item in version.partitions:
        layout.partition(version.job, version.id, item.path)
        layout.Bucket.partition(version.job, version.id, item.path)
    os.fsencode(version.save_dir)
    str(version), version.complete, version.size_bytes


def _read_manifest(store: Store) -> None:
    for version in recovery.scan(store.tier1).versions:
        _use_version(version)


def _read_jobs(store: Store) -> None:
    book = JobBook(store.tier1, ThreadWorkers("unused", 1))
    book.load()
    for record in book.all():
        record.encode()
        save_pb2.JoinReply(max_epoch=record.epoch + 1, persistent_storage_path=record.storage_url).SerializeToString()
        restore_pb2.ResolveReply(claimed_epoch=record.epoch).SerializeToString()


def _read_health(store: Store) -> None:
    records, _ = read_records(store.tier1)
    for health in records.values():
        version = _manifest().version(VersionState.COMMITTED)
        health.apply(version)
        _use_version(version)


def _read_bucket(store: Store) -> None:
    bucket = store.bucket
    seen = view(bucket, JOB, lambda _: False)
    for manifests in seen.manifests.values():
        for manifest in manifests:
            _use_version(manifest.version(VersionState.COMMITTED))
    for claim in seen.epochs:
        restore_pb2.ResolveReply(claimed_epoch=claim.epoch, tier2_error=claim.problem).SerializeToString()
        save_pb2.JoinReply(max_epoch=claim.epoch + 1).SerializeToString()
    json.dumps([seen.damaged[version] for version in seen.damaged]).encode()
    bucket.commit(JOB, VERSION, 1)
    bucket.prepared_everywhere(JOB, VERSION)
    bucket.undecided(JOB, before_epoch=9)
    bucket.mark_deleted(JOB, VERSION, 1.0)


KINDS: Mapping[str, tuple[str, bool, Callable[[Store], object]]] = {
    # the key of the document, whether it is in the bucket, and who reads it
    "manifest": (layout.manifest(JOB, VERSION), False, _read_manifest),
    "job record": (layout.job_record(JOB), False, _read_jobs),
    "health": (layout.health(JOB, VERSION), False, _read_health),
    "layout": (layout.LAYOUT_KEY, False, lambda store: recovery.identify(store.tier1)),
    "bucket manifest": (layout.Bucket.node(JOB, VERSION, NODE), True, _read_bucket),
    "decision": (layout.Bucket.decision(JOB, VERSION), True, _read_bucket),
    "epoch claim": (layout.Bucket.epoch(JOB, 3), True, _read_bucket),
}

READERS = frozenset(
    {
        "catalog/health.py", "catalog/jobs.py", "cli/doctor/health.py", "cli/offline.py", "manifest.py",
        "replication/bucket.py", "upkeep/recovery.py",
    }
)  # fmt: skip
"""Modules that call ``cairnd.manifest.decode``. One that is new belongs into KINDS with what it reads."""


def test_every_reader_of_documents_is_looked_at() -> None:
    root = Path(layout.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "decode":
                found.add(str(path.relative_to(root)))
    assert found == READERS


@pytest.fixture
def store(place: Path) -> Store:
    return Store(place / "store")


@pytest.mark.promise("bad_input")
@pytest.mark.timeout(120 + EXAMPLES // 10)
@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_wrote_is_refused_or_usable(kind: str, store: Store, evidence: Evidence) -> None:
    key, in_bucket, read = KINDS[kind]
    read(store)  # the sound one
    path = store.path_of(key, in_bucket=in_bucket)
    sound = path.read_bytes()
    document = _document(sound)
    tried = 0

    @seed(SEED)
    @settings(
        max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(forged(document))
    def read_forged(data: bytes) -> None:
        nonlocal tried
        tried += 1
        path.write_bytes(data)
        decision = store.path_of(layout.Bucket.decision(JOB, VERSION), in_bucket=True)
        kept = decision.read_bytes()
        try:
            read(store)
        except (VersionError, ConfigurationError):
            pass
        finally:
            decision.write_bytes(kept)

    failed: BaseException | None = None
    try:
        with bounded_memory():
            read_forged()
    except Exception as error:
        failed = error
        raise
    finally:
        evidence(tried=tried, broken=int(failed is not None))
