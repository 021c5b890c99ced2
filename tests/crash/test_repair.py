"""A damaged copy is set aside, counted and made again from another tier, and that stays so."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

import cairn
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.manifest import NodeManifest
from cairnd.model import Version, VersionState
from cairnd.replication.bucket import BucketRepository
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.tiers.stores.file import FileStore
from cairnd.upkeep import verifier
from tests.crash import media, ranks
from tests.crash.corruption import command
from tests.crash.served import state_of
from tests.crash.trainer import same
from tests.daemon.lab import JOB
from tests.daemon_process import DaemonProcess
from tests.promises import Evidence, proof_size

RESTORES = proof_size(16, 100)
PER_DAEMON = 10
UPLOADS = proof_size(6, 30)

SEED = int(os.environ.get("CAIRN_CRASH_SEED") or secrets.randbelow(10**6))
"""Printed with the figures; set it to draw the same faults again."""

NAMES = ("model.pt", "zero/rank_0.pt")


@dataclass(frozen=True, slots=True)
class Damaged:
    """A version of which one file was damaged. ``left``: its bytes since then, None if it is missing."""

    version: VersionId
    key: str
    kind: str
    left: bytes | None

    def __str__(self) -> str:
        return f"{self.version}: {self.key}: {self.kind}"


class Node:
    """One daemon with versions in both tiers, and the judges of its stores."""

    def __init__(self, folder: Path, keep: int = 100) -> None:
        self.daemon = DaemonProcess(folder, num_of_version_in_retention=keep)
        self._fs = OsFileSystem()
        self._tier1 = LocalTier(self._fs, self.daemon.tier1_path)
        self._bucket = BucketRepository(FileStore(self._fs, self.daemon.bucket_path), "0" * 32)

    def connect(self) -> cairn.Client:
        """As a training would."""
        return cairn.connect(job=JOB, runtime_dir=str(self.daemon.runtime_dir))

    def save(self, tags: Sequence[str]) -> list[VersionId]:
        """One version of each tag, in both tiers."""
        found = []
        with self.connect() as client:
            for tag in tags:
                with client.create(tag) as checkpoint:
                    for name in NAMES:
                        checkpoint.save(name, state_of(tag, name))
                found.append(client.wait(tag, "tier2", 60))
        return found

    def damage(self, random: Random, root: Path, version: VersionId, key: str) -> Damaged:
        """Something happens to the file *key* below *root*."""
        path = root / key
        before = path.read_bytes()
        kind = random.choice([*media.CHANGES, "missing"])
        after: bytes | None = None
        if kind == "missing":
            path.unlink()
        else:
            after = before
            while after == before:
                after = media.CHANGES[kind](random, before)
            media.overwrite(path, after)
        return Damaged(version, key, kind, after)

    def problems(self, version: VersionId, *, in_bucket: bool = False) -> list[str]:
        """What the verifier says of a copy, every byte read."""
        entry = Version(JOB, version, VersionState.COMMITTED, 1, "")
        if in_bucket:
            found = verifier.check_tier2(self._bucket, entry, deep=True, progress=lambda _: None)
        else:
            found = verifier.check_tier1(self._tier1, entry, deep=True, progress=lambda _: None)
        return [finding.text for finding in found]

    def wait_until_whole(self, damaged: Damaged, *, in_bucket: bool = False) -> None:
        """Wait until the verifier says nothing any more."""
        ranks.wait_until(
            lambda: not self.problems(damaged.version, in_bucket=in_bucket),
            f"the repair of {damaged}",
            describe=lambda: f"{self.problems(damaged.version, in_bucket=in_bucket)}\n{self.daemon.log}",
        )

    def in_quarantine(self, damaged: Damaged) -> bool:
        """Whether what was left of the file lies in quarantine under its own name. What is missing cannot."""
        if damaged.left is None:
            return True
        found = (self.daemon.tier1_path / layout.QUARANTINE).glob(f"*/{damaged.key}")
        return any(path.read_bytes() == damaged.left for path in found)

    def prune(self) -> None:
        """``cairn prune``: what retention lets go is gone afterwards."""
        status, said = command("--runtime-dir", str(self.daemon.runtime_dir), "--job", JOB, "prune")
        assert status == 0, said

    def verify(self) -> int:
        """``cairn verify --deep``; its exit status, 1 when anything is damaged."""
        status, said = command("--runtime-dir", str(self.daemon.runtime_dir), "--job", JOB, "verify", "--deep")
        assert status in (0, 1), said
        return status


def restored_equal(client: cairn.Client, version: VersionId, from_tiers: set[str]) -> str:
    """What is wrong with a restore of *version*; empty if nothing."""
    with client.restore(str(version)) or pytest.fail("nothing to restore") as restored:
        if restored.from_tier not in from_tiers:
            return f"it came from {restored.from_tier}"
        if not all(same(restored.load(name), state_of(version.tag, name)) for name in NAMES):
            return "it is not what was saved"
    return ""


@pytest.mark.promise("repair")
@pytest.mark.timeout(180 + 6 * RESTORES)
def test_a_damaged_tier1_copy_is_made_again_from_tier2(
    tmp_path: Path, evidence: Evidence, figures: Callable[[str], None]
) -> None:
    random = Random(SEED)  # noqa: S311 - choices of faults, not secrets
    tried, wrong = 0, list[str]()
    while tried < RESTORES:
        node = Node(tmp_path / str(tried))
        with node.daemon as daemon:
            versions = node.save([f"step{number}" for number in range(PER_DAEMON)])
            daemon.kill9()
            faults = []
            for number, version in enumerate(versions):
                name = random.choice(NAMES)
                data, manifest = layout.partition(JOB, version, name), layout.manifest(JOB, version)
                faults.append(node.damage(random, daemon.tier1_path, version, manifest if number % 3 == 0 else data))
            daemon.start()
            with node.connect() as client:
                for fault in faults:
                    problem = restored_equal(client, fault.version, {"tier1", "tier2"})
                    if problem:
                        wrong.append(f"{fault}: {problem}")
            wrong += _judge(node, faults)
            counted = ranks.status(daemon).verify_failures
            if counted < len([fault for fault in faults if not _is_lost_manifest(fault)]):
                wrong.append(f"{counted} verify failures counted of {list(map(str, faults))}")
            daemon.restart()
            wrong += [f"after a restart: {problem}" for problem in _judge(node, faults)]
            with node.connect() as client:
                for fault in faults:
                    problem = restored_equal(client, fault.version, {"tier1"})
                    if problem:
                        wrong.append(f"after a restart: {fault}: {problem}")
            tried += len(faults)
    figures(f"repairs of tier 1: {tried} restores, {len(wrong)} problems (seed {SEED})")
    evidence(tried=tried, broken=len(wrong), detail=f"{tried} repaired from tier 2, also after a restart")
    assert not wrong, "\n".join(wrong[:5])


def _is_lost_manifest(fault: Damaged) -> bool:
    """Without its manifest a copy looks as if it had never been finished: no failure of a check, but made again too."""
    return fault.left is None and fault.key.endswith("manifest.json")


def _judge(node: Node, faults: Sequence[Damaged]) -> list[str]:
    """Wait until tier 1 is whole; what is missing then."""
    for fault in faults:
        node.wait_until_whole(fault)
    return [f"{fault} is not in quarantine" for fault in faults if not node.in_quarantine(fault)]


@pytest.mark.promise("repair")
@pytest.mark.timeout(180 + 10 * UPLOADS)
def test_a_damaged_object_is_found_by_verify_and_uploaded_again(
    tmp_path: Path, evidence: Evidence, figures: Callable[[str], None]
) -> None:
    random = Random(SEED)  # noqa: S311 - choices of faults, not secrets
    tried, wrong = 0, list[str]()
    while tried < UPLOADS:
        node = Node(tmp_path / str(tried))
        with node.daemon as daemon:
            versions = node.save([f"step{number}" for number in range(PER_DAEMON // 2)])
            (path,) = daemon.tier1_path.rglob(f"{versions[0]}/.cairn/manifest.json")
            node_id = NodeManifest.decode(path.read_bytes()).node
            faults = []
            for number, version in enumerate(versions):
                name = random.choice(NAMES)
                data = layout.Bucket.partition(JOB, version, name)
                record = layout.Bucket.node(JOB, version, node_id)
                faults.append(node.damage(random, daemon.bucket_path, version, record if number % 3 == 2 else data))
            assert node.verify() == 1
            for fault in faults:
                node.wait_until_whole(fault, in_bucket=True)
            assert node.verify() == 0
            daemon.kill9()
            media.reset(daemon.tier1_path, {})  # another machine: only the bucket is left
            daemon.start()
            with node.connect() as client:
                for fault in faults:
                    problem = restored_equal(client, fault.version, {"tier2"})
                    if problem:
                        wrong.append(f"{fault}: {problem}")
            tried += len(faults)
    figures(f"repairs of tier 2: {tried} uploads, {len(wrong)} problems (seed {SEED})")
    evidence(tried=tried, broken=len(wrong), detail=f"{tried} uploaded again from tier 1")
    assert not wrong, "\n".join(wrong[:5])


def test_retention_does_not_count_what_was_found_damaged_before_a_restart(tmp_path: Path) -> None:
    """Both copies of the newest version are rotten: the older one is all there is, also after a restart."""
    node, random = Node(tmp_path, keep=2), Random(SEED)  # noqa: S311 - choices of faults, not secrets
    with node.daemon as daemon:
        old, rotten = node.save(["step1", "step2"])
        for root, key in (
            (daemon.tier1_path, layout.partition(JOB, rotten, NAMES[0])),
            (daemon.bucket_path, layout.Bucket.partition(JOB, rotten, NAMES[0])),
        ):
            media.overwrite(root / key, media.flip_bit(random, (root / key).read_bytes()))
        assert node.verify() == 1
        daemon.restart()
        with node.connect() as client, client.restore() or pytest.fail("nothing to restore") as restored:
            assert restored.candidate.version == old
        (new,) = node.save(["step3"])
        node.prune()
        for version in (old, new):
            assert not node.problems(version)
            assert not node.problems(version, in_bucket=True)
        node.save(["step4"])
        node.prune()
        assert node.problems(old), "two intact versions have replaced it"
