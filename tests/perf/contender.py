"""What every contender can do: save, say when the save is durable, load, and clean up.

A contender belongs to one rank process. All ranks use it in the same order, so it may talk to its like on other ranks.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.perf.page_cache import PageCache
from tests.perf.states import State

if TYPE_CHECKING:
    from tests.perf.floors import Floors


@dataclass(frozen=True, slots=True)
class Place:
    """Where a contender works: a folder on the disk under test, which rank of how many it is, how much each saves.

    ``meet`` returns when all ranks have called it.
    """

    folder: Path
    rank: int
    world_size: int
    state_bytes: int
    meet: Callable[[], None]

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds that *work* takes when all ranks begin it at the same moment; its result is dropped afterwards."""
        self.meet()
        started_s = time.perf_counter()
        result = work()
        taken_s = time.perf_counter() - started_s
        del result
        return taken_s


class Contender:
    """One way of saving a state. Subclasses fill in :meth:`save`, and what else they can do."""

    name = ""
    """In tables, in JSON and for ``--only``."""
    restores = True
    """Whether its restore is measured; False when another contender writes the very same files."""
    warm_ups = 1
    """Saves after the first that are not measured: what a contender uses in turn has all been used before."""
    preallocates = False
    """Whether :meth:`preallocate` makes the first save cheaper."""
    overlaps = False
    """Whether tensors may change only after :meth:`before_update`, which then belongs to the stall."""

    goes_direct = False
    """Whether it writes past the page cache, and is therefore compared with doing so next to each of its saves."""

    def __init__(self, place: Place) -> None:
        self.floors: Floors | None = None
        """The machine's, once the rounds begin: a virtual disk changes its speed from one second to the next."""
        self.place = place
        self.folder = place.folder / f"{self.name}-{place.rank}"
        self.number = 0

    @classmethod
    def why_not(cls) -> str:
        """Why it cannot take part here; empty when it can."""
        return ""

    def open(self, state: State) -> None:  # noqa: ARG002 - for some
        """Make what the saves of *state* after it reuse. The save that follows is the first one."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def preallocate(self) -> None:
        """Prepare the first save, as a training script that knows the sizes can; returns when all is prepared."""

    def save(self, state: State) -> None:
        """Save *state*; returns when training may go on. The time it takes is the stall."""
        raise NotImplementedError

    def before_update(self) -> None:
        """Called when forward and backward are over and the optimizer is about to change the tensors."""

    def finish(self) -> None:
        """Return when the newest save is on disk, fsynced. Called once a save, also from another thread."""
        for path in self.files():
            fsync_file(path)

    def settle(self) -> None:
        """Return when nothing is left to do in the background that training would have long behind it."""

    def helpers(self) -> list[int]:
        """Ids of the processes that work for this contender only, each told by one rank."""
        return []

    def files(self) -> list[Path]:
        """The files of the newest save, for page cache control and fsync."""
        path = self.path()
        return [item for item in sorted(path.rglob("*")) if item.is_file()] if path.is_dir() else [path]

    def path(self) -> Path:
        """Where the newest save lies: a file or a folder."""
        return self.folder / f"step{self.number}"

    def load_into(self, live: State) -> object:
        """Load the newest save into the existing tensors of *live*; returns what may be dropped after the timing."""
        raise NotImplementedError

    def measure_restores(self, live: State, cache: PageCache) -> dict[str, float]:
        """Seconds of each way of loading the newest save, by name."""
        return {
            "live_warm": self.warm(cache, lambda: self.load_into(live)),
            "live_cold": self.cold(cache, lambda: self.load_into(live)),
        }

    def warm(self, cache: PageCache, load: Callable[[], object]) -> float:
        """Seconds of *load* with the files in the page cache."""
        cache.read(self.files())
        return self.place.timed(load)

    def cold(self, cache: PageCache, load: Callable[[], object]) -> float:
        """Seconds of *load* with the files on the disk only."""
        cache.drop(self.files())
        return self.place.timed(load)

    def discard(self) -> None:
        """Remove all saves."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        """Let go of buffers and files; it may be opened again."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def shut_down(self) -> None:
        """End processes. It is not opened again."""


def fsync_file(path: Path) -> None:
    """Force a file to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
