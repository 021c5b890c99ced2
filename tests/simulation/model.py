"""What was promised to whom, and whether it still holds: knows the bytes that were saved and nothing of Cairn's state.

It reads disks and the bucket directly, with the decoder of manifests as the only part of Cairn that it believes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cairn_api.errors import CairnError
from cairn_api.names import RESERVED_NAME, VersionId, parse_version, stored_path
from cairnd import layout
from cairnd.manifest import NodeManifest
from cairnd.model import Version, VersionState
from tests.simulation.bucket import Bucket
from tests.simulation.machine import TIER1

if TYPE_CHECKING:
    from tests.simulation.kernel import Process
    from tests.simulation.machine import Machine

_LOOKED_S = 0.1
"""Longer than one request takes, if it is not held up."""

Key = tuple[VersionId, str]
"""A version and its launch's nonce: two launches that never saw each other may make the same name."""


@dataclass(slots=True, eq=False)
class Saved:
    """One attempt to save. ``homes``: the machine of each rank. ``told``: machines that said "it is in tier 1"."""

    id: VersionId
    nonce: str
    homes: tuple[int, ...]
    persist: bool
    parts: dict[tuple[int, str], bytes] = field(default_factory=dict)
    prepared: set[int] = field(default_factory=set)
    agreed: bool = False
    captured_by: list[Process] = field(default_factory=list)
    """Daemons that held it when every rank's commit had returned: with a daemon that dies its memory may go."""
    shared: frozenset[tuple[int, str]] = frozenset()
    told: set[int] = field(default_factory=set)
    told_tier2: bool = False
    requested: set[int] = field(default_factory=set)
    """Machines that answered a request to persist it."""
    let_go: set[int] = field(default_factory=set)
    """Machines that deleted their copy by right."""
    rotten: set[int] = field(default_factory=set)
    """Machines on whose disk some of its bytes were damaged."""
    rotten_unseen: list[Process] = field(default_factory=list)
    """Daemons that had read some of it, found it intact, and by their settings need not look again."""
    rotted_s: float = 0.0
    """When a bit of it flipped last, on any disk."""
    rotten_tier2: bool = False

    @property
    def world_size(self) -> int:
        return len(self.homes)

    @property
    def everybody_prepared(self) -> bool:
        """Whether agreement can only be, or have been, to commit."""
        return self.prepared == set(range(self.world_size))

    def paths(self, machine: int | None = None) -> dict[str, bytes]:
        """What must be read at each path; only of ranks on *machine*, if given."""
        return {
            stored_path(name, rank, shared_name=(rank, name) in self.shared): data
            for (rank, name), data in self.parts.items()
            if machine is None or self.homes[rank] == machine
        }


class Model:
    """One job. What is wrong is collected in ``violations``."""

    def __init__(self, job: str, bucket: Bucket, now: Callable[[str], None]) -> None:
        self.job = job
        self.saved: dict[Key, Saved] = {}
        self.violations: list[str] = []
        self.machines: list[Machine] = []
        self.pinned: dict[VersionId, set[int]] = {}
        self.reading: dict[tuple[int, Key], set[object]] = {}
        """Who reads a version on a machine now, under a lease."""
        self.keep = 1
        self.tier2_keep = 1
        self.tight = False
        """Whether disks may be so full that the byte limit's rule counts."""
        self.resumed: list[tuple[int, VersionId]] = []
        """Epochs that were claimed, with the version that each launch went on from."""
        self.promises = 0
        self.deletions = 0
        self.loads = 0
        self._bucket = bucket
        self.note = now
        bucket.on_change = self._bucket_changed

    def violation(self, text: str) -> None:
        """Something that must never happen."""
        self.note(f"VIOLATION {text}")
        self.violations.append(text)

    def changed(self, machine: Machine, version: Version) -> None:
        """A daemon moved a version, or a copy of it, to another state."""
        saved = self.saved.get((version.id, version.nonce))
        if version.state is not VersionState.ABORTED or saved is None or machine.process not in saved.captured_by:
            return
        # What all ranks agreed on may be lost to a disk that fails, and to a later launch that went on without it.
        to_the_disk = version.reason.startswith("lost before tier 1") and machine.disk.failed
        if not to_the_disk and self.verdict(version.id) != "aborted":
            self.violation(f"{machine.name} aborts {version.id}, which was committed: {version.reason}")

    # Disks

    def on_unlink(self, machine: Machine, path: str) -> None:
        """A daemon removes a file."""
        parts = path.removeprefix(f"{TIER1}/").split("/")
        if parts[:2] != [layout.VERSIONS, self.job] or len(parts) < 4:
            return
        version = parse_version(parts[2])
        if parts[3] != RESERVED_NAME:
            if self._manifest(machine, version) is not None:
                self.violation(f"{machine.name} removes {path} of a version that is still listed")
            return
        if parts[4:] != ["manifest.json"]:
            return
        manifest = self._manifest(machine, version)
        saved = None if manifest is None else self.saved.get((version, manifest.nonce))
        if saved is None or machine.number not in saved.told:
            return  # nobody was told: its writer takes back what it could not finish
        self.deletions += 1
        wrong = self._why_not_from_tier1(machine, saved)
        if wrong:
            self.violation(f"{machine.name} deletes {saved.id} from tier 1: {wrong}")
        saved.let_go.add(machine.number)

    def _why_not_from_tier1(self, machine: Machine, saved: Saved) -> str:
        if machine.number in saved.rotten:
            return ""
        if machine.number in self.pinned.get(saved.id, ()):
            return "it is pinned"
        if self.reading.get((machine.number, (saved.id, saved.nonce))):
            return "a restore reads it"
        newer = [version for version in self.listed(machine) if version > saved.id]
        if len(newer) < self.keep and not self.tight:
            return f"only {len(newer)} newer ones are there, {self.keep} are to be kept"
        waits = saved.persist or machine.number in saved.requested
        if waits and not self.tight and self.verdict(saved.id) is None:
            return "it waits for tier 2"
        if not self._has_floor_above(saved.id):
            return "no newer version could be restored"
        return ""

    def _has_floor_above(self, version: VersionId) -> bool:
        return any(
            saved.id > version and (self.whole_in_tier1(saved, or_rotten=True) or self.verdict(saved.id) == "committed")
            for saved in self.saved.values()
        )

    def whole_in_tier1(self, saved: Saved, *, or_rotten: bool = False) -> bool:
        """Whether every machine of its ranks lists it; *or_rotten* also where a manifest rots unread."""
        for home in set(saved.homes):
            manifest = self._manifest(self.machines[home], saved.id)
            rotten = or_rotten and home in saved.rotten and self._has_manifest(self.machines[home], saved.id)
            if manifest is None and rotten:
                continue
            if manifest is None or manifest.nonce != saved.nonce:
                return False
        return True

    def _has_manifest(self, machine: Machine, version: VersionId) -> bool:
        return machine.disk.contents(f"{TIER1}/{layout.manifest(self.job, version)}") is not None

    def listed(self, machine: Machine) -> list[VersionId]:
        """Versions of which *machine* has a manifest."""
        found = []
        for path in machine.disk.files():
            parts = path.removeprefix(f"{TIER1}/").split("/")
            if parts[:2] == [layout.VERSIONS, self.job] and parts[3:] == [RESERVED_NAME, "manifest.json"]:
                found.append(parse_version(parts[2]))
        return found

    def _manifest(self, machine: Machine, version: VersionId) -> NodeManifest | None:
        data = machine.disk.contents(f"{TIER1}/{layout.manifest(self.job, version)}")
        if data is None:
            return None
        try:
            return NodeManifest.decode(data)
        except CairnError:
            return None

    def check_disk(self, machine: Machine) -> None:
        """After a crash, or at rest: what is listed is whole, what was promised is listed."""
        for version in self.listed(machine):
            manifest = self._manifest(machine, version)
            saved = None if manifest is None else self.saved.get((version, manifest.nonce))
            if manifest is None:
                if not any(machine.number in item.rotten for item in self.saved.values() if item.id == version):
                    self.violation(f"{machine.name} has a torn manifest of {version}")
            elif saved is None:
                self.violation(f"{machine.name} lists {version}, which nobody saved")
            elif machine.number not in saved.rotten:
                self._check_listed(machine, saved, manifest)
        for saved in self.saved.values():
            if machine.number in saved.told - saved.let_go - saved.rotten:
                manifest = self._manifest(machine, saved.id)
                if (manifest is None or manifest.nonce != saved.nonce) and not self.intact_in_tier2(saved):
                    self.violation(f"{machine.name} has lost {saved.id}, which it said was in tier 1")

    def _check_listed(self, machine: Machine, saved: Saved, manifest: NodeManifest) -> None:
        if not saved.everybody_prepared:
            self.violation(f"{machine.name} lists {saved.id}, which only ranks {sorted(saved.prepared)} prepared")
        everything = saved.paths()
        for partition in manifest.partitions:
            found = machine.disk.contents(f"{TIER1}/{layout.partition(self.job, saved.id, partition.path)}")
            if found != everything.get(partition.path):
                self.violation(f"{machine.name} lists {saved.id}, and its {partition.path} is not what was saved")
        missing = saved.paths(machine.number).keys() - {partition.path for partition in manifest.partitions}
        if missing:
            self.violation(f"{machine.name} lists {saved.id} without {sorted(missing)}")

    # The bucket

    def decision(self, version: VersionId) -> dict[str, object] | None:
        """What the bucket has decided."""
        data = self._bucket.get(layout.Bucket.decision(self.job, version))
        return None if data is None else dict(json.loads(data))

    def verdict(self, version: VersionId) -> str | None:
        """``committed``, ``deleted``, ``aborted`` or None."""
        decision = self.decision(version)
        return None if decision is None else str(decision["verdict"])

    def claimed_by(self, epoch: int) -> str:
        """The nonce of the launch that owns *epoch* in the bucket."""
        data = self._bucket.get(layout.Bucket.epoch(self.job, epoch))
        return "" if data is None else str(json.loads(data)["nonce"])

    def intact_in_tier2(self, saved: Saved) -> bool:
        """Whether the bucket offers *saved*, with all of its bytes."""
        decision = self.decision(saved.id)
        return (
            decision is not None
            and decision["verdict"] == "committed"
            and decision["nonce"] == saved.nonce
            and not self._missing_in_bucket(saved)
        )

    def _missing_in_bucket(self, saved: Saved) -> list[str]:
        return [
            path
            for path, data in saved.paths().items()
            if self._bucket.get(layout.Bucket.partition(self.job, saved.id, path)) != data
        ]

    def _bucket_changed(self, key: str, old: bytes | None, new: bytes | None) -> None:
        decisions, epochs = layout.Bucket.decisions(self.job), layout.Bucket.epochs(self.job)
        if key.startswith(decisions):
            self._decided(parse_version(key.removeprefix(decisions).removesuffix(".json")), old, new)
        elif key.startswith(epochs):
            if old is not None and old != new:
                self.violation(f"the claim {key} is changed")
        elif key.startswith(f"{self.job}/e"):
            version = parse_version(key.split("/")[1])
            if new is None and self.verdict(version) not in ("deleted", "aborted"):
                self.violation(f"{key} is removed while its version is {self.verdict(version)}")
            changed = old is not None and new is not None and old != new and self.verdict(version) == "committed"
            if changed and not any(item.rotten_tier2 for item in self.saved.values() if item.id == version):
                self.violation(f"{key} of a committed version is changed")

    def _decided(self, version: VersionId, old: bytes | None, new: bytes | None) -> None:
        if new is None:
            self.violation(f"the decision about {version} is removed")
            return
        before = "" if old is None else json.loads(old)["verdict"]
        document = json.loads(new)
        after = document["verdict"]
        if (before, after) not in {
            ("", "committed"), ("", "aborted"), ("committed", "deleted"), ("committed", "committed"),
            ("deleted", "deleted"), ("aborted", "aborted"),
        } or (before == "committed" == after and old != new):  # fmt: skip
            self.violation(f"the decision about {version} goes from {before!r} to {after!r}")
        if (before, after) == ("", "committed"):
            self._committed(version, document["nonce"])
        elif (before, after) == ("", "aborted"):
            self._aborted(version)
        elif (before, after) == ("committed", "deleted"):
            self._tombstoned(version)

    def _committed(self, version: VersionId, nonce: str) -> None:
        saved = self.saved.get((version, nonce))
        if saved is None or not saved.everybody_prepared:
            self.violation(f"{version} is committed in the bucket, and not all ranks prepared it")
        elif not saved.rotten_tier2 and (missing := self._missing_in_bucket(saved)):
            self.violation(f"{version} is committed in the bucket without {missing}")

    def _aborted(self, version: VersionId) -> None:
        newer = [resumed for epoch, resumed in self.resumed if epoch > version.epoch and resumed >= version]
        for saved in self.saved.values():
            if saved.id == version and newer and self.whole_in_tier1(saved) and saved.told == set(saved.homes):
                self.note(f"{version} is fenced off although {newer[0]} was resumed from and all nodes have it")

    def _tombstoned(self, version: VersionId) -> None:
        self.deletions += 1
        pin = self._bucket.objects.get(layout.Bucket.pin(self.job, version))
        if pin is not None and self._bucket.hurried:
            # Nobody can look and delete in one step; but who deletes has to have looked just before.
            looked_s = self._bucket.listings.get((self._bucket.writer, layout.Bucket.pins(self.job)), 0.0)
            put_s, now_s = pin[1], self._bucket.objects[layout.Bucket.decision(self.job, version)][1]
            if put_s < looked_s or now_s - looked_s > _LOOKED_S:
                self.violation(f"{version} is deleted from tier 2 although it is pinned there")
        newer = [saved for saved in self.saved.values() if saved.id > version and self.verdict(saved.id) == "committed"]
        if len({saved.id for saved in newer}) < self.tier2_keep:
            self.violation(f"{version} is deleted from tier 2 with only {len(newer)} newer ones there")
        if not self._has_floor_above(version):
            self.violation(f"{version} is deleted from tier 2 and no newer one could be restored")

    # At the end

    def must_be_offered(self) -> Saved | None:
        """The newest version that was promised, is intact and was not left behind by a later launch."""
        best: Saved | None = None
        for saved in self.saved.values():
            if any(epoch > saved.id.epoch and saved.id > resumed for epoch, resumed in self.resumed):
                continue
            here = saved.told >= set(saved.homes) and not saved.rotten & set(saved.homes) and self.whole_in_tier1(saved)
            if (here or (saved.told_tier2 and self.intact_in_tier2(saved))) and self.verdict(saved.id) != "aborted":
                best = saved if best is None or saved.id > best.id else best
        return best
