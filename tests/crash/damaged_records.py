"""Damages what belongs to no version: epoch claims, job records, the layout's own file, pins and requests.

One fault a round. A record that is read must be found damaged by whoever reads it, and no version may be out of reach
because of it. What no reader could notice is counted apart, by why.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from cairn_api.errors import CairnError
from cairnd import layout
from cairnd.model import Tier
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.upkeep.recovery import identify
from tests.crash import media
from tests.crash.corruption import Figures, Rounds, command, is_defect
from tests.crash.small_world import KEEP, World
from tests.daemon.lab import Lab

BY_NAME = "of pins and requests only the names count"
ABSENT = "a record that is missing looks like one that was never written"
EARLIER = "a record in an earlier state of its own is sound"

_PLACES: Mapping[str, tuple[Tier, str]] = {
    "epoch claim": (Tier.TIER2, "/.cairn/epochs/"),
    "job record": (Tier.TIER1, f"{layout.JOB_RECORDS}/"),
    "layout": (Tier.TIER1, layout.LAYOUT_KEY),
    "pin in tier 1": (Tier.TIER1, f"{layout.PINS}/"),
    "pin in tier 2": (Tier.TIER2, "/.cairn/pins/"),
    "request in tier 2": (Tier.TIER2, "/.cairn/requests/"),
}
_NOT_READ = ("pin", "request")
_READ_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class RecordFault:
    """What was done to which record. ``apart``: why nobody can notice; empty if somebody must."""

    kind: str
    place: str
    keys: tuple[str, ...]
    apart: str

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}: {', '.join(self.keys)}"


class RecordRounds:
    """Round after round on one world; see the module. ``figures`` counts what somebody must notice."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._random = Random(seed)  # noqa: S311 - choices of faults, not secrets
        self._rounds = Rounds(world, seed)
        self.figures: Figures = self._rounds.figures
        self.apart: Counter[str] = Counter()

    async def run(self, faults: int) -> Figures:
        """At least so many faults that somebody must notice."""
        started_s = time.monotonic()
        while self.figures.faults < faults:
            self._world.reset()
            fault = self._put()
            if fault.apart:
                self.apart[fault.apart] += 1
            else:
                self.figures.faults += 1
                self.figures.kinds[fault.kind] += 1
                self.figures.places[fault.place] += 1
            said = self._ask_command(fault)
            noticed = await self._start(fault)
            if not fault.apart and not all(key in noticed for key in fault.keys):
                self.figures.unnoticed.append(f"{fault}: the daemon says {noticed!r}")
            if not fault.apart and fault.place != "job record" and not all(key in said for key in fault.keys):
                self.figures.unsaid.append(f"{fault}: cairn --store says {said!r}")
        self.figures.seconds += time.monotonic() - started_s
        return self.figures

    def _put(self) -> RecordFault:
        random = self._random
        read = [place for place in _PLACES if not place.startswith(_NOT_READ)]
        place = random.choice(read if random.random() < _READ_SHARE else list(_PLACES))
        tier, where = _PLACES[place]
        files, root = self._world.files[tier], self._world.root(tier)
        keys = sorted(key for key in files if where in key)
        key = random.choice(keys)
        others = [other for other in keys if files[other] != files[key]]
        kinds = [*media.CHANGES, "missing", *(["swapped", "misdirected"] if others else [])]
        if place == "job record":
            kinds.append("earlier state")
        kind = random.choice(kinds)
        hit: tuple[str, ...] = (key,)
        apart = BY_NAME if place.startswith(_NOT_READ) else ""
        if kind == "missing":
            (root / key).unlink()
            apart = ABSENT
        elif kind == "swapped":
            other = random.choice(others)
            media.swap(root / key, root / other)
            hit = (key, other)
        elif kind == "misdirected":
            media.overwrite(root / key, files[random.choice(others)])
        elif kind == "earlier state":
            media.overwrite(root / key, self._world.earlier_records[key])
            apart = EARLIER
        else:
            after = files[key]
            while after == files[key]:
                after = media.CHANGES[kind](random, files[key])
            media.overwrite(root / key, after)
        return RecordFault(kind, place, hit, apart)

    def _ask_command(self, fault: RecordFault) -> str:
        tier, _ = _PLACES[fault.place]
        root = self._world.root(tier)
        status, said = command("--json", "--store", str(root) if tier is Tier.TIER1 else f"file://{root}", "list")
        if is_defect(status, said):
            self.figures.unsaid.append(f"{fault}: cairn --store failed: {said}")
        return said

    async def _start(self, fault: RecordFault) -> str:
        """What a daemon says that starts on this; every version must be within its reach, if it starts."""
        try:
            identify(LocalTier(OsFileSystem(), self._world.root(Tier.TIER1)))  # what a start begins with
        except CairnError as error:
            return str(error)
        lab = await Lab(self._world.folder, num_of_version_in_retention=KEEP).start(run=False)
        try:
            said = list(lab.app.left_alone)
            said += [await lab.app.inventory.refresh(job) for job in self._world.jobs]
            await self._rounds.restore_all(lab, (), str(fault))
        finally:
            await lab.close()
        return " ".join(said)
