"""One step: a daemon starts and does a phase with so many inodes or so much space left; then again, with all of it.

The daemon is not restarted in between, unless it refused to start. Steps go from nothing left to the first with which
the phase succeeds at once, so that what is missing is missed at each stage in turn.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from cairn_api.errors import CairnError
from tests.crash.disks import LoopDisk, Mount, Tmpfs
from tests.crash.ground import Ground, Promises
from tests.crash.phases import Phase, copy_template, make_template
from tests.crash.points import do_it_again, judge, remove
from tests.crash.serial_daemon import NO_RESERVE

BLOCK_BYTES = 4096
_FILES = 200
_MIB = 1024 * 1024
_SIZES = " bytes and ", "bytes are free"


@dataclass(frozen=True, slots=True)
class Scene:
    """*phase* with the disk of *where* (tier1 or bucket) short of *what* (inodes or blocks), on a *kind* of disk."""

    phase: Phase
    where: str
    what: str
    kind: str = "tmpfs"

    def __str__(self) -> str:
        return f"{self.phase.name}: {self.what} of {self.where} on {self.kind}"


@dataclass(slots=True)
class Step:
    """What came of one. ``told``: the error, empty if there was room enough. ``problems``: promises broken."""

    left: int
    told: str = ""
    problems: list[str] = field(default_factory=list)


class Ballast:
    """What another program writes to a disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "somebody-elses"
        self._folder.mkdir()

    def leave_inodes(self, inodes: int) -> None:
        """Make empty files until so many more can be made."""
        made = []
        try:
            for number in count():
                path = self._folder / f"file-{number}"
                path.touch()
                made.append(path)
        except OSError:
            for path in made[len(made) - inodes :]:
                path.unlink()

    def leave_bytes(self, size_bytes: int) -> None:
        """Take the space but for so much."""
        with (self._folder / "bytes").open("ab") as file:
            found = os.statvfs(self._folder)
            os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - size_bytes)

    def drop(self) -> None:
        """Free it."""
        shutil.rmtree(self._folder)


class Stage:
    """The disk of one scene and where its steps start from."""

    def __init__(self, scene: Scene, template: Path, promises: Promises, disk: Mount, folder: Path) -> None:
        self._scene = scene
        self._template = template
        self._promises = promises
        self._disk = disk
        self._folder = folder

    def step(self, left: int) -> Step:
        """Do the phase with *left* inodes or blocks left, then with all."""
        phase, step = self._scene.phase, Step(left)
        ground = Ground(self._folder / str(left), self._promises.copy())
        if self._scene.where == "tier1":
            ground.tier1_disk = self._disk.path
        else:
            ground.bucket_disk = self._disk.path
        copy_template(self._template, ground)
        phase.damage(ground)
        for path in (ground.tier1_path, ground.bucket_path):
            path.mkdir(exist_ok=True)
        ballast = Ballast(self._disk.path)
        self._fill(ballast, left)
        try:
            ground.start(phase.settings, disturbed=True, environment={NO_RESERVE: "1"})
            self._disturbed(ground, step)
            step.problems += judge(ground, phase)
            ballast.drop()
            if not ground.daemon.running:
                ground.daemon.start()
            do_it_again(ground, phase, step.problems)
        except (CairnError, AssertionError) as error:
            step.problems.append(f"{type(error).__name__}: {error}")
        finally:
            ground.daemon.kill9()
            self._clear(ground)
        return step

    def _fill(self, ballast: Ballast, left: int) -> None:
        if self._scene.what == "inodes":
            ballast.leave_inodes(left)
        else:
            ballast.leave_bytes(left * BLOCK_BYTES)

    def _disturbed(self, ground: Ground, step: Step) -> None:
        phase = self._scene.phase
        if not ground.daemon.came_up:
            step.told = ground.daemon.log
        else:
            try:
                phase.act(ground)
            except CairnError as error:
                step.told = str(error)
            step.told = step.told or ground.shown
        if step.told and not ("Next step:" in step.told and any(part in step.told for part in _SIZES)):
            step.problems.append(f"it names no sizes or no next step: {step.told}")

    def _clear(self, ground: Ground) -> None:
        remove(ground.folder)
        for path in self._disk.path.iterdir():
            if path.name != "lost+found":
                remove(path)


@contextmanager
def stage(scene: Scene, folder: Path) -> Iterator[Stage]:
    """Make the disk and the template of *scene*; root only."""
    template = folder / "template"
    template.mkdir(parents=True)
    promises = make_template(scene.phase, template)
    disk = Tmpfs(folder, 16 * _MIB, _FILES) if scene.kind == "tmpfs" else LoopDisk(folder, scene.kind, 16 * _MIB)
    with disk:
        yield Stage(scene, template, promises, disk, folder)
