"""Damage under a running daemon: capture memory after the save, and files that the daemon itself wrote or has read.

The daemon runs with ``verify_on_load = always``, under which it believes nothing that it read earlier. (With ``cached``
a file that it wrote, or has read once, is believed as long as it is the same file, until scrubbing or ``cairn verify
--deep`` reads it.) Each round saves one version, damages one copy or more of it, and restores it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random

from cairn_api.errors import CairnError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.model import Tier
from cairnd.session.memory import Segment
from tests.crash import media
from tests.crash.corruption import Figures
from tests.daemon.lab import JOB, Lab, Rank

_PARTS = ("model.pt", "zero/rank_0.pt", "zero/rank_1.pt")
_SIZE_BYTES = 12_000
_KINDS = {
    Tier.MEMORY: [kind for kind in media.CHANGES if kind not in ("cut", "extended")],
    Tier.TIER1: list(media.CHANGES),
    # Of an object that goes on, a restore reads what the manifest says; the verifier sees the rest.
    Tier.TIER2: [kind for kind in media.CHANGES if kind != "extended"],
}
_READ_BEFORE = 0.3
_MIXED_UP = 0.2


class LiveRounds:
    """Round after round on one daemon; see the module."""

    def __init__(self, folder: Path, seed: int, *, verify_on_load: str = "always") -> None:
        self._lab = Lab(folder, verify_on_load=verify_on_load, num_of_version_in_retention=2)
        self._random = Random(seed)  # noqa: S311 - choices of faults, not secrets
        self._last: dict[str, bytes] = {}
        self.figures = Figures(seed)

    async def run(self, faults: int) -> Figures:
        """At least so many faults."""
        started_s = time.monotonic()
        await self._lab.start()
        try:
            (rank,) = await Rank.launch(self._lab)
            while self.figures.faults < faults:
                await self._round(rank)
        finally:
            await self._lab.close()
        self.figures.seconds += time.monotonic() - started_s
        return self.figures

    async def _round(self, rank: Rank) -> None:
        lab, random = self._lab, self._random
        parts = {name: random.randbytes(_SIZE_BYTES) for name in _PARTS}
        persisted = random.random() < 0.5
        version = await rank.save(parts, persist=persisted)
        if persisted:
            await lab.reaches(version, Tier.TIER2)
        tiers = [Tier.MEMORY, Tier.TIER1, *([Tier.TIER2] if persisted else [])]
        if random.random() < _READ_BEFORE:
            await self._fetch(version, rank)
        # One partition in the nearest tiers: what lies behind an intact copy is not read.
        name, damaged = random.choice(_PARTS), tiers[: random.randint(1, len(tiers))]
        about = "; ".join([self._damage(version, name, parts[name], tier) for tier in damaged])
        found = await self._fetch(version, rank)
        if found is None:
            self.figures.refused += 1
            if len(damaged) < len(tiers):
                self.figures.withheld.append(about)
        elif found == parts:
            self.figures.equal += 1
        else:
            self.figures.wrong.append(about)
        for tier in damaged:
            if not lab.version(version).copy(tier).damaged and not self._repaired(version, tier):
                self.figures.unnoticed.append(f"{tier} of {version}: {about}")
        for segment in list(lab.app.memory.of_version(JOB, version)):
            lab.app.memory.release(segment)
        self._last = parts

    def _repaired(self, version: VersionId, tier: Tier) -> bool:
        """Whether the copy was found damaged and has been made again since."""
        told = [event for event in self._lab.events("copy_failed") if event.version == str(version)]
        return any(event.fields.get("tier") == str(tier) for event in told)

    async def _fetch(self, version: VersionId, rank: Rank) -> dict[str, bytes] | None:
        lab, client = self._lab, rank.client.number
        try:
            steps = [step async for step in lab.app.fetcher.fetch(client, lab.version(version), ())]
        except CairnError:
            return None
        lease = lab.app.leases.get(steps[-1].lease, client)
        found = {}
        for ready in steps[-1].ready:
            fd, fetched = lab.app.fetcher.open(lease, ready.path)
            found[ready.path] = os.pread(fd, fetched.size_bytes, 0)
            os.close(fd)
        lab.app.fetcher.end(lease)
        return found

    def _damage(self, version: VersionId, name: str, before: bytes, tier: Tier) -> str:
        kind = self._random.choice(_KINDS[tier])
        if self._random.random() < _MIXED_UP:
            kind = "partition of another version" if self._last else "bit flipped"
        after = self._last[name] if kind not in media.CHANGES else before
        while after == before:
            after = media.CHANGES[kind](self._random, before)
        if tier is Tier.MEMORY:
            with self._segment(version, name).view(_SIZE_BYTES) as view:
                view[:] = after
        else:
            make = layout.partition if tier is Tier.TIER1 else layout.Bucket.partition
            root = self._lab.tier1 if tier is Tier.TIER1 else self._lab.bucket_path
            media.overwrite(root / make(JOB, version, name), after)
        place = "capture memory" if tier is Tier.MEMORY else f"{tier} under a running daemon"
        self.figures.faults += 1
        self.figures.kinds[kind] += 1
        self.figures.places[place] += 1
        return f"{place}: {kind}"

    def _segment(self, version: VersionId, name: str) -> Segment:
        (segment,) = [
            segment
            for segment in self._lab.app.memory.of_version(JOB, version)
            if segment.partition is not None and segment.partition[1] == name
        ]
        return segment
