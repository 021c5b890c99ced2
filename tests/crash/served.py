"""The same damage, judged by a real daemon and a real client: what ``restore`` gives is what was saved, or an error."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import torch

import cairn
from cairn_api.errors import CairnError
from cairnd import layout
from cairnd.manifest import NodeManifest
from cairnd.model import Tier
from tests.crash import faulty_daemon, media
from tests.crash.corruption import Fault, Faults, Figures, command, is_defect
from tests.crash.small_world import KEEP, OTHER_JOB, Stored, World
from tests.crash.trainer import same
from tests.daemon.lab import JOB
from tests.daemon_process import DaemonProcess

NAMES = ("model.pt", "zero/rank_0.pt", "zero/rank_1.pt")
_VERSIONS = {JOB: 12, OTHER_JOB: 4}
_TIERS = 3
"""A third of the versions is in both tiers, in tier 1 and in tier 2 each."""


def state_of(version: str, name: str) -> dict[str, object]:
    """What partition *name* of a version holds: tensors of the same sizes in all, so that files can be mixed up."""
    seed = int.from_bytes(f"{version}/{name}".encode(), "little") % 2**63
    generator = torch.Generator().manual_seed(seed)
    return {"layers": [torch.rand(rows, 64, generator=generator) for rows in (24, 40)], "step": torch.tensor(seed)}


def tag_of(number: int) -> str:
    """Tags of one length, so that manifests are as long as one another."""
    return f"step{number:03d}"


class Served:
    """Daemons on a world that clients made. *fault* plants a bug in them."""

    def __init__(self, folder: Path, seed: int, *, fault: str = "") -> None:
        self._folder = folder
        self._fault = fault
        self._random = Random(seed)  # noqa: S311 - choices of faults, not secrets
        self.figures = Figures(seed)
        self._world = self._build()

    def run(self, faults: int, *, stop_at_first: bool = False) -> Figures:
        """At least so many faults; with *stop_at_first* until a restore was wrong."""
        started_s = time.monotonic()
        while self.figures.faults < faults and not (stop_at_first and self.figures.wrong):
            self._world.reset()
            drawn = Faults(self._world, self._random).draw()
            self.figures.count(drawn)
            with self._daemon() as daemon:
                self._verify(daemon)
                self._restore(daemon, drawn)
                if "Traceback" in daemon.log:
                    self.figures.unsaid.append(f"the daemon's log: {daemon.log}")
        self.figures.seconds += time.monotonic() - started_s
        return self.figures

    def _daemon(self) -> DaemonProcess:
        return DaemonProcess(
            self._folder,
            environment=faulty_daemon.environment(),
            program=faulty_daemon.program(self._fault),
            num_of_version_in_retention=KEEP,
        )

    def _build(self) -> World:
        with self._daemon() as daemon:
            for job, count in _VERSIONS.items():
                with cairn.connect(job=job, runtime_dir=str(daemon.runtime_dir)) as client:
                    for number in range(count):
                        with client.create(tag_of(number)) as checkpoint:
                            for name in NAMES:
                                checkpoint.save(name, state_of(f"{job}/{tag_of(number)}", name))
                        client.wait(tag_of(number), "tier1" if number % _TIERS == 1 else "tier2", 60)
        return self._read()

    def _read(self) -> World:
        """The world as it lies on the disk, with every third version taken away from tier 1."""
        files = {
            Tier.TIER1: media.snapshot(self._folder / "tier1"),
            Tier.TIER2: media.snapshot(self._folder / "bucket"),
        }
        stored, node = [], ""
        for job, count in _VERSIONS.items():
            manifests = [NodeManifest.decode(data) for data in _manifests(files[Tier.TIER1], job)]
            assert len(manifests) == count
            for manifest in sorted(manifests, key=lambda item: item.id):
                node = manifest.node
                in_bucket = layout.Bucket.decision(job, manifest.id) in files[Tier.TIER2]
                gone = in_bucket and manifest.id.sequence % _TIERS == 0
                held = {tier for tier, there in ((Tier.TIER1, not gone), (Tier.TIER2, in_bucket)) if there}
                parts = {
                    part.path: files[Tier.TIER1][layout.partition(job, manifest.id, part.path)]
                    for part in manifest.partitions
                }
                stored.append(Stored(job, manifest.id, frozenset(held), parts))
                if gone:
                    folder = layout.version_folder(job, manifest.id)
                    files[Tier.TIER1] = {k: v for k, v in files[Tier.TIER1].items() if not k.startswith(f"{folder}/")}
        decisions = sorted(key for key in files[Tier.TIER2] if "/decisions/" in key)
        return World(self._folder, node, files, tuple(stored), tuple(decisions), {})

    def _verify(self, daemon: DaemonProcess) -> None:
        """In every second round the daemon has looked at all copies when it is asked for them."""
        if self._random.random() < 0.5:
            return
        for job in self._world.jobs:
            for verb in (["verify", "--deep"], ["list"]):
                status, said = command("--runtime-dir", str(daemon.runtime_dir), "--job", job, *verb)
                if is_defect(status, said):
                    self.figures.unsaid.append(f"cairn {verb} failed: {said}")

    def _restore(self, daemon: DaemonProcess, faults: list[Fault]) -> None:
        about = "; ".join(map(str, faults))
        with ExitStack() as connected:
            clients = {
                job: connected.enter_context(cairn.connect(job=job, runtime_dir=str(daemon.runtime_dir)))
                for job in self._world.jobs
            }
            for item in self._world.stored:
                try:
                    restored = clients[item.job].restore(str(item.id))
                except CairnError as error:
                    self.figures.refused += 1
                    if Faults.must_succeed(faults, item):
                        self.figures.withheld.append(f"{item}: {error}; {about}")
                    continue
                assert restored is not None, "a version that is named is found or refused"
                with restored:
                    self._compare(restored, item, about)
            for job, client in clients.items():
                self._compare_newest(client, job, about)

    def _compare(self, restored: cairn.Restored, item: Stored, about: str) -> None:
        """Bytes first: what they hold is loaded only if they are right, and must then be right too."""
        for path, data in item.parts.items():
            with restored.open(path) as file:
                read = file.read()
            if read != data or not same(restored.load(path), state_of(f"{item.job}/{item.id.tag}", path)):
                self.figures.wrong.append(f"{path} of {item}; {about}")
                return
        self.figures.equal += 1

    def _compare_newest(self, client: cairn.Client, job: str, about: str) -> None:
        """What a training would resume from is one of the versions, whole."""
        try:
            restored = client.restore()
        except CairnError:
            return
        if restored is None:
            self.figures.wrong.append(f"a training of {job} would begin from nothing; {about}")
            return
        with restored:
            (item,) = [item for item in self._world.stored if (item.job, item.id) == (job, restored.candidate.version)]
            self._compare(restored, item, about)


def _manifests(files: media.Snapshot, job: str) -> Iterator[bytes]:
    prefix = f"{layout.job_folder(job)}/"
    return (data for key, data in files.items() if key.startswith(prefix) and key.endswith("/.cairn/manifest.json"))


class CaptureBuffers:
    """The capture memory of a running daemon, damaged through the kernel: seals keep everybody else from writing."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def holding(self, data: bytes) -> list[int]:
        """Addresses in the daemon at which a buffer begins with *data*."""
        found = []
        with open(f"/proc/{self._pid}/mem", "rb") as memory:
            for line in Path(f"/proc/{self._pid}/maps").read_text().splitlines():
                if "memfd:cairn-capture" in line:
                    start, end = (int(text, 16) for text in line.split()[0].split("-"))
                    if end - start >= len(data):
                        memory.seek(start)
                        if memory.read(len(data)) == data:
                            found.append(start)
        return found

    def write(self, address: int, data: bytes) -> None:
        """Put *data* there."""
        fd = os.open(f"/proc/{self._pid}/mem", os.O_WRONLY)
        try:
            os.pwrite(fd, data, address)
        finally:
            os.close(fd)
