"""Damages what is at rest, round after round, and judges: the verifier must say so, a restore must never be wrong.

A round draws a fault for most of the versions of a small world (some in both tiers, some in one), puts them on the disk
and then asks three parties: the verifier, which must accuse exactly the damaged copies; ``cairn --store``, which must
name them and survive; and a daemon's own start, look at the bucket and fetch, which must give equal bytes wherever one
copy is intact, and must otherwise refuse. What was not damaged has to be there afterwards.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from random import Random

from cairn_api.errors import CairnError, InternalError
from cairnd.cli.exits import EXIT_STATUS
from cairnd.cli.main import main
from cairnd.model import Tier, Version, VersionState
from cairnd.replication.bucket import BucketRepository
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.tiers.stores.file import FileStore
from cairnd.upkeep import verifier
from tests.crash import media
from tests.crash.small_world import KEEP, SMALL, Stored, World
from tests.daemon.lab import Lab

FORGED = "edited with a true checksum"
_INTACT_PER_ROUND = 2
_SECOND_FAULTS = 0.3
_COMMAND_EVERY = 4
"""The command is asked in one round of so many: starting it takes longer than all the rest."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done to which copies. ``commit_gone``: the record that makes the copy exist was taken away."""

    kind: str
    place: str
    tier: Tier
    hits: tuple[Stored, ...]
    commit_gone: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}: {', '.join(map(str, self.hits))}"


class Faults:
    """Draws the faults of one round and puts them on the disk; no copy is hit twice."""

    def __init__(self, world: World, random: Random) -> None:
        self._world = world
        self._random = random
        self._hit: set[tuple[Stored, Tier]] = set()

    def draw(self) -> list[Fault]:
        """Faults for all versions but a few."""
        random = self._random
        victims = random.sample(self._world.stored, len(self._world.stored) - _INTACT_PER_ROUND)
        spared = set(self._world.stored) - set(victims)
        self._hit |= {(item, tier) for item in spared for tier in Tier}
        faults = []
        for victim in victims:
            tiers = random.sample(sorted(victim.tiers), len(victim.tiers))
            wanted = tiers[: 2 if random.random() < _SECOND_FAULTS else 1]
            faults += [self._put(victim, tier) for tier in wanted if (victim, tier) not in self._hit]
        return faults

    @staticmethod
    def must_succeed(faults: Sequence[Fault], item: Stored) -> bool:
        """Whether some copy of *item* is as it was saved."""
        mine = [fault for fault in faults if item in fault.hits]
        # Whom to believe, if a manifest with a true checksum lies, is not for a daemon to guess.
        lies = any(fault.kind == FORGED and fault.tier is Tier.TIER1 for fault in mine)
        return not lies and any(all(fault.tier is not tier for fault in mine) for tier in item.tiers)

    def _put(self, victim: Stored, tier: Tier) -> Fault:
        self._hit.add((victim, tier))
        if tier is Tier.TIER1:
            place = self._random.choice(("tier 1 data", "tier 1 data", "tier 1 manifest"))
        else:
            place = self._random.choice(("tier 2 data", "tier 2 data", "tier 2 manifest", "tier 2 decision key"))
        if place.endswith("data"):
            return self._put_data(victim, tier, place)
        return self._put_record(victim, tier, place)

    def _put_data(self, victim: Stored, tier: Tier, place: str) -> Fault:
        path = self._random.choice(list(victim.parts))
        kinds = [*media.CHANGES, "missing", "version swapped", "misdirected"]
        kind = self._random.choice(kinds if path == SMALL else [*kinds, "partitions swapped"])
        root, key = self._world.root(tier), victim.data(tier, path)
        if kind == "partitions swapped":
            other = self._random.choice([name for name in victim.parts if name not in (path, SMALL)])
            media.swap(root / key, root / victim.data(tier, other))
            return Fault(kind, place, tier, (victim,))
        return self._put_file(kind, place, tier, victim, key, lambda other: other.data(tier, path))

    def _put_record(self, victim: Stored, tier: Tier, place: str) -> Fault:
        kinds = [*media.CHANGES, "missing", "version swapped", "misdirected"]
        if place.endswith("manifest"):
            kinds += ["edited", FORGED]
        key = self._world.record(victim, place)
        kind = self._random.choice(kinds)
        return self._put_file(kind, place, tier, victim, key, lambda other: self._world.record(other, place))

    def _put_file(
        self, kind: str, place: str, tier: Tier, victim: Stored, key: str, key_of: Callable[[Stored], str]
    ) -> Fault:
        """*kind* at *key*; ``key_of`` finds the same file of another version."""
        random, files, path = self._random, self._world.files[tier], self._world.root(tier) / key
        before, hits = files[key], (victim,)
        if kind == "missing":
            path.unlink()
            return Fault(kind, place, tier, hits, commit_gone=place in ("tier 1 manifest", "tier 2 decision key"))
        others = [item for item in self._world.stored if item != victim and tier in item.tiers]
        if kind == "version swapped":
            free = [item for item in others if (item, tier) not in self._hit]
            if not free:
                kind = "misdirected"
            else:
                other = random.choice(free)
                self._hit.add((other, tier))
                media.swap(path, self._world.root(tier) / key_of(other))
                return Fault(kind, place, tier, (victim, other))
        if kind == "misdirected":
            keys = [key_of(item) for item in others]
            if place == "tier 2 decision key":
                keys = [name for name in self._world.decisions if name != key]
            media.overwrite(path, files[random.choice(keys)])
        elif kind in ("edited", FORGED):
            # Of what tier 1's manifest says, only what can be held against the data is more than its own word.
            fields = media.DATA_FIELDS if place == "tier 1 manifest" and kind == FORGED else media.FIELDS
            media.overwrite(path, media.edit(random, before, fields, sound=kind == FORGED))
        else:
            after = before
            while after == before:
                after = media.CHANGES[kind](random, before)
            media.overwrite(path, after)
        return Fault(kind, place, tier, hits)


@dataclass(slots=True)
class Figures:
    """What the rounds came to. Every list must stay empty."""

    seed: int
    faults: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    equal: int = 0
    refused: int = 0
    seconds: float = 0.0
    unnoticed: list[str] = field(default_factory=list)
    """Damage that the verifier did not see."""
    wrong: list[str] = field(default_factory=list)
    """Restores that gave other bytes than were saved."""
    accused: list[str] = field(default_factory=list)
    """Intact copies that the verifier found damaged."""
    withheld: list[str] = field(default_factory=list)
    """Restores that were refused although a copy was intact."""
    lost: list[str] = field(default_factory=list)
    """Undamaged files that were gone afterwards."""
    unsaid: list[str] = field(default_factory=list)
    """Damage that ``cairn --store`` did not name, or that it did not survive."""

    @property
    def broken(self) -> int:
        """How often the promise was broken."""
        return len(self.unnoticed) + len(self.wrong)

    @property
    def problems(self) -> list[str]:
        """All that is not as it must be."""
        named = {
            "unnoticed": self.unnoticed, "wrong bytes": self.wrong, "accused though intact": self.accused,
            "withheld": self.withheld, "lost": self.lost, "not said by cairn --store": self.unsaid,
        }  # fmt: skip
        return [f"{name}: {item}" for name, items in named.items() for item in items]

    def count(self, faults: Sequence[Fault]) -> None:
        self.faults += len(faults)
        self.kinds.update(fault.kind for fault in faults)
        self.places.update(fault.place for fault in faults)

    def line(self, what: str) -> str:
        """For the report."""
        return (
            f"{what}: {self.faults} faults, {len(self.unnoticed)} unnoticed, {len(self.wrong)} restored wrong, "
            f"{self.equal} restored equal, {self.refused} refused, {len(self.problems) - self.broken} other problems "
            f"({self.seconds:.0f} s, seed {self.seed})"
        )


class Rounds:
    """Round after round on one world; see the module."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._random = Random(seed)  # noqa: S311 - choices of faults, not secrets
        self._fs = OsFileSystem()
        self._tier1 = LocalTier(self._fs, world.root(Tier.TIER1))
        self.figures = Figures(seed)

    async def run(self, faults: int) -> Figures:
        """At least so many faults."""
        started_s = time.monotonic()
        number = 0
        while self.figures.faults < faults:
            number += 1
            self._world.reset()
            drawn = Faults(self._world, self._random).draw()
            self.figures.count(drawn)
            about = f"round {number} of seed {self.figures.seed}"
            self._ask_verifier(drawn, about)
            if number % _COMMAND_EVERY == 1:
                self._ask_command(drawn, about)
            await self._restore(drawn, about)
            self._look_for_losses(drawn, about)
        self.figures.seconds += time.monotonic() - started_s
        return self.figures

    def _ask_verifier(self, faults: Sequence[Fault], about: str) -> None:
        by_copy = {(item, fault.tier): fault for fault in faults for item in fault.hits}
        bucket = BucketRepository(FileStore(self._fs, self._world.root(Tier.TIER2)), self._world.node)
        for item in self._world.stored:
            version = Version(item.job, item.id, VersionState.COMMITTED, 1, "")
            for tier in item.tiers:
                if tier is Tier.TIER1:
                    found = verifier.check_tier1(self._tier1, version, deep=True, progress=_unwatched)
                else:
                    found = verifier.check_tier2(bucket, version, deep=True, progress=_unwatched)
                problems = [f"{finding.path}: {finding.problem}" for finding in found]
                fault = by_copy.get((item, tier))
                if fault is not None and not problems:
                    self.figures.unnoticed.append(f"{about}: {fault}")
                if fault is None and problems:
                    self.figures.accused.append(f"{about}: {item} in {tier}: {problems}; {_listed(faults)}")

    def _ask_command(self, faults: Sequence[Fault], about: str) -> None:
        for tier, store in (
            (Tier.TIER1, str(self._world.root(Tier.TIER1))),
            (Tier.TIER2, f"file://{self._world.root(Tier.TIER2)}"),
        ):
            for job in self._world.jobs:
                here = [fault for fault in faults if fault.tier is tier]
                hits = {item: fault for fault in here for item in fault.hits if item.job == job}
                shown = [["show", str(item.id)] for item in list(hits)[:1]]
                named = set()
                for verb in (["list"], ["verify", "--deep"], *shown):
                    status, said = command("--json", "--store", store, "--job", job, *verb)
                    if is_defect(status, said):
                        self.figures.unsaid.append(f"{about}: cairn {verb} of {tier} failed: {said}; {_listed(faults)}")
                    named |= _accused(said, hits)
                # A copy without its commit record is none, for whoever reads the store alone.
                silent = {item for item in hits if item not in named and not hits[item].commit_gone}
                self.figures.unsaid += [f"{about}: {item} in {tier}: {hits[item]}" for item in silent]

    async def _restore(self, faults: Sequence[Fault], about: str) -> None:
        lab = await Lab(self._world.folder, num_of_version_in_retention=KEEP).start(run=False)
        try:
            for job in self._world.jobs:
                await lab.app.inventory.refresh(job)
            await self.restore_all(lab, faults, about)
        finally:
            await lab.close()

    async def restore_all(self, lab: Lab, faults: Sequence[Fault], about: str) -> None:
        """Fetch every version from *lab*, which has looked at its bucket, and compare; *faults* excuse refusals."""
        client = lab.app.clients.connect(0, 0, os.getpid()).number
        await asyncio.gather(*(self._restore_one(lab, client, item, faults, about) for item in self._world.stored))

    async def _restore_one(self, lab: Lab, client: int, item: Stored, faults: Sequence[Fault], about: str) -> None:
        fetcher = lab.app.fetcher
        try:
            version = lab.app.catalog.require(item.job, item.id)
            progress = [step async for step in fetcher.fetch(client, version, ())][-1]
        except CairnError as error:
            self.figures.refused += 1
            if Faults.must_succeed(faults, item):
                self.figures.withheld.append(f"{about}: {item}: {error}; {_listed(faults)}")
            return
        lease = lab.app.leases.get(progress.lease, client)
        found = {}
        for ready in progress.ready:
            fd, fetched = fetcher.open(lease, ready.path)
            found[ready.path] = os.pread(fd, fetched.size_bytes + 1, 0)
            os.close(fd)
        if found == item.parts:
            self.figures.equal += 1
        else:
            self.figures.wrong.append(f"{about}: {item}; {_listed(faults)}")

    def _look_for_losses(self, faults: Sequence[Fault], about: str) -> None:
        """What no fault touched lies where it was, or in quarantine. Data without a manifest may be swept."""
        damaged = {(item, fault.tier) for fault in faults for item in fault.hits}
        swept = {item for fault in faults if fault.commit_gone and fault.tier is Tier.TIER1 for item in fault.hits}
        for tier in (Tier.TIER1, Tier.TIER2):
            files = media.snapshot(self._world.root(tier))
            contents = set(files.values())
            for item in self._world.stored:
                if tier not in item.tiers or (tier is Tier.TIER1 and item in swept):
                    continue
                for path, data in item.parts.items():
                    kept = data in contents if (item, tier) in damaged else files.get(item.data(tier, path)) == data
                    if not kept and not self._is_hit(faults, item, tier):
                        self.figures.lost.append(f"{about}: {path} of {item} in {tier}; {_listed(faults)}")

    @staticmethod
    def _is_hit(faults: Sequence[Fault], item: Stored, tier: Tier) -> bool:
        """Whether a fault changed data of this copy itself, so that it need not be there any more."""
        return any(item in fault.hits and fault.tier is tier and fault.place.endswith("data") for fault in faults)


def is_defect(status: int, said: str) -> bool:
    """Whether ``cairn`` failed in a way that it did not foresee."""
    return status == EXIT_STATUS[InternalError.kind] or "Traceback" in said


def command(*words: str) -> tuple[int, str]:
    """Run ``cairn``; its exit status and all that it printed."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        status = main(words)
    return status, said.getvalue()


def _accused(said: str, hits: Iterable[Stored]) -> set[Stored]:
    """Which of *hits* an answer of ``cairn --json`` names as damaged."""
    document = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    findings = {finding["version"] for finding in document.get("findings", [])}
    warnings = " ".join(document.get("warnings", []))
    return {item for item in hits if str(item.id) in findings or str(item.id) in warnings}


def _listed(faults: Sequence[Fault]) -> str:
    return "; ".join(map(str, faults))


def _unwatched(count_bytes: int) -> None:
    del count_bytes
