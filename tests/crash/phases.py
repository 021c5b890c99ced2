"""What a daemon does while its system calls are made to fail, one phase at a time, and how to do it again afterwards.

A phase starts from folders that an unharmed daemon left (made once, copied for each point), acts, and can say whether
what it was to bring about has come about. Clients live in the test's own process: a start of torch for each of a
thousand points would be most of the time.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from cairn_api.names import VersionId
from cairnd import layout
from cairnd.model import CopyState, Tier
from cairnd.replication.bucket import Verdict
from cairnd.tiers.filesystem import OsFileSystem
from tests.crash import oracle
from tests.crash.ground import BUCKET, TIER1, DisturbedDaemon, Ground, Promises
from tests.crash.trainer import JOB, PARTITIONS

_OTHER_GROUP = 4242
_COPY_FAILED, _NOT_PRUNED = "copy_failed", ("delete_failed", "prune_local_only")


class Phase(ABC):
    """See the module. ``after_start``: what the daemon does before that is as in other phases, and left to them.
    ``spoilt``: the tag of a version that is damaged until the phase is done.
    """

    name: str
    settings: Mapping[str, object] = {"persistent_storage_path": "", "num_of_version_in_retention": 10}
    keep = 10
    after_start = False
    spoilt = ""

    def prepare(self, ground: Ground) -> None:  # noqa: B027 - most need nothing
        """Make the folders from which each point starts; the ground's daemon runs until this returns."""

    def damage(self, ground: Ground) -> None:  # noqa: B027 - most need nothing
        """Change the folders while no daemon runs; done for each point."""

    @abstractmethod
    def act(self, ground: Ground) -> None:
        """What is to be disturbed. Raises :class:`cairn.CairnError` when it is told of a failure."""

    @abstractmethod
    def done(self, ground: Ground) -> bool:
        """Whether all that the phase is to bring about is so."""


class FirstStart(Phase):
    """The first start on an empty folder: layout, node id, lock."""

    name = "first_start"

    def prepare(self, ground: Ground) -> None:
        ground.daemon.stop()
        shutil.rmtree(ground.tier1_path)

    def act(self, ground: Ground) -> None:
        with ground.operator() as operator:
            operator.status()

    def done(self, ground: Ground) -> bool:
        return (ground.tier1_path / layout.LAYOUT_KEY).exists()


class Recovery(Phase):
    """A start that sweeps unfinished saves and downloads, and moves a damaged manifest aside."""

    name = "recovery"
    spoilt = "damaged"

    def prepare(self, ground: Ground) -> None:
        with ground.client() as client:
            for tag in ("good", "unfinished", "damaged", "newest"):
                ground.save(client, tag)
        good, unfinished, damaged, newest = sorted(ground.promises.tier1)
        ground.promises.tier1 -= {unfinished, damaged}
        ground.daemon.stop()
        tier1 = ground.tier1
        tier1.delete(layout.manifest(JOB, unfinished))
        manifest = ground.tier1_path / layout.manifest(JOB, damaged)
        document = manifest.read_bytes()
        manifest.unlink()
        manifest.write_bytes(document.replace(b'"world_size"', b'"world_sire"'))
        for key in (
            layout.incoming(JOB, unfinished, 1),
            layout.incoming(JOB, newest, 1),
            f"{layout.FETCHED}/0123456789abcdef/{JOB}/{good}/model.pt",
        ):
            tier1.put_small(key, b"left behind")

    def act(self, ground: Ground) -> None:
        with ground.operator() as operator:
            operator.status()

    def done(self, ground: Ground) -> bool:
        found = oracle.examine(ground.tier1_path, JOB, ground.promises.tried)
        left = [ground.tier1_path / layout.FETCHED]
        left += [ground.tier1_path / layout.incoming_folder(JOB, version) for version in found.listed]
        return not found.unfinished and not found.torn and not any(path.exists() for path in left)


class Save(Phase):
    """One save from the connect to its manifest in tier 1, files protected."""

    name = "save"
    after_start = True
    settings: Mapping[str, object] = {**Phase.settings, "protect_files": "true"}

    def damage(self, ground: Ground) -> None:
        # Its files get another group than the client's, so that they have to be handed over.
        folder = ground.tier1_path / layout.job_folder(JOB)
        folder.mkdir(parents=True)
        os.chown(folder, -1, _OTHER_GROUP)
        folder.chmod(0o2750)

    def act(self, ground: Ground) -> None:
        with ground.client() as client:
            ground.save(client, "disturbed")

    def done(self, ground: Ground) -> bool:
        return any(version.tag == "disturbed" for version in ground.promises.tier1)


class PlainSave(Save):
    """One save, files not protected."""

    name = "plain_save"
    settings = Phase.settings


class Persist(Phase):
    """A version that lies in tier 1 is asked for in a bucket that has never been used."""

    name = "persist"
    settings: Mapping[str, object] = {"num_of_version_in_retention": 10}

    def prepare(self, ground: Ground) -> None:
        ground.daemon.stop()
        ground.daemon = DisturbedDaemon(ground.folder, {**Phase.settings, "num_of_version_in_retention": 1})
        with ground.client() as client:
            # The first save of a launch is flagged to be persisted, and the bucket would have it before it is asked.
            flagged = ground.save(client, "flagged")
            ground.save(client, "one")
        with ground.operator() as operator:
            operator.prune(JOB, None, dry_run=False)
        ground.promises.tier1.discard(flagged)
        ground.daemon.stop()

    def act(self, ground: Ground) -> None:
        version, failures = max(ground.promises.tried), ground.daemon.log.count(_COPY_FAILED)
        with ground.operator() as operator:
            operator.persist(JOB, str(version))
            ground.settle(operator, lambda: self.done(ground) or ground.daemon.log.count(_COPY_FAILED) > failures)
            copy = operator.describe(JOB, str(version)).copy(Tier.TIER2)
        if copy.state is CopyState.VERIFIED:
            ground.promises.tier2.add(version)
        ground.shown = copy.error

    def done(self, ground: Ground) -> bool:
        return ground.promises.tier1 <= ground.decided(Verdict.COMMITTED)


class Prune(Phase):
    """Retention lets a version go in both tiers: links, manifest, data; tombstone, then the data."""

    name = "prune"
    after_start = True
    settings: Mapping[str, object] = {"num_of_version_in_retention": 1, "tier2_delete_grace_s": 0}
    keep = 1

    def prepare(self, ground: Ground) -> None:
        ground.daemon.stop()
        ground.daemon = DisturbedDaemon(ground.folder, Persist.settings)
        with ground.client() as client:
            for tag in ("old", "new"):
                ground.save_and_persist(client, tag)
        ground.daemon.stop()

    def damage(self, ground: Ground) -> None:
        for name in PARTITIONS:
            path = ground.tier1_path / layout.partition(JOB, min(ground.promises.tried), name)
            OsFileSystem().set_immutable(path, immutable=True)

    def act(self, ground: Ground) -> None:
        def failures() -> list[str]:
            return [line for line in ground.daemon.log.splitlines() if any(event in line for event in _NOT_PRUNED)]

        before = len(failures())
        with ground.operator() as operator:
            operator.prune(JOB, None, dry_run=False)
            ground.settle(operator, lambda: self.done(ground) or len(failures()) > before)
        ground.shown = "".join(failures()[before:][-1:])

    def done(self, ground: Ground) -> bool:
        old = min(ground.promises.tried)
        decision = ground.bucket.decision(JOB, old)
        gone = not (ground.tier1_path / layout.version_folder(JOB, old)).exists()
        # Empty folders do no harm: a bucket has none.
        swept = decision is not None and decision.swept and not any(ground.bucket.store.list(f"{JOB}/{old}/"))
        return gone and swept


class Restore(Phase):
    """A node that lost its tier 1 loads from the bucket, which puts a proper copy into tier 1."""

    name = "restore"
    after_start = True
    settings = Persist.settings

    def prepare(self, ground: Ground) -> None:
        ground.daemon.stop()
        ground.daemon = DisturbedDaemon(ground.folder, Persist.settings)
        with ground.client() as client:
            version = ground.save_and_persist(client, "one")
        ground.daemon.stop()
        ground.promises.tier1.clear()
        self.lose(ground, version)

    def lose(self, ground: Ground, version: VersionId) -> None:
        """Take the tier 1 copy away."""
        ground.tier1.delete_tree(layout.version_folder(JOB, version))

    def act(self, ground: Ground) -> None:
        with ground.client() as client:
            loaded = ground.load_newest(client)
        with ground.operator() as operator:
            ground.settle(operator, lambda: True)  # what the end of the restore sets off
        if loaded != max(ground.promises.tier2):
            ground.wrong.append(f"{loaded} was loaded, {max(ground.promises.tier2)} is the newest")

    def done(self, ground: Ground) -> bool:
        return set(oracle.examine(ground.tier1_path, JOB).listed) == ground.promises.tried


class Repair(Restore):
    """A damaged tier 1 copy is set aside while a training loads, and made again from the bucket."""

    name = "repair"
    spoilt = "one"

    def lose(self, ground: Ground, version: VersionId) -> None:
        path = ground.tier1_path / layout.partition(JOB, version, "model.pt")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.unlink()
        path.write_bytes(data)

    def done(self, ground: Ground) -> bool:
        return super().done(ground) and not oracle.examine(ground.tier1_path, JOB).torn


PHASES: tuple[Phase, ...] = (FirstStart(), Recovery(), Save(), Persist(), Prune(), Restore(), Repair())


def make_template(phase: Phase, folder: Path) -> Promises:
    """What each point of *phase* starts from, below *folder*; returns what was promised by then."""
    ground = Ground(folder, Promises())
    ground.daemon = DisturbedDaemon(folder, phase.settings)
    try:
        phase.prepare(ground)
    finally:
        ground.daemon.kill9()
    return ground.promises


def copy_template(template: Path, ground: Ground) -> None:
    """A point's own tier 1 and bucket."""
    ground.folder.mkdir()
    for source, target in ((TIER1, ground.tier1_path), (BUCKET, ground.bucket_path)):
        if (template / source).exists():
            shutil.copytree(template / source, target, symlinks=True)
