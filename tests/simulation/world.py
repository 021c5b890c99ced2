"""One seed, one history: machines, a bucket and a job, with everything that may go wrong, until enough has happened.

A *step* is one event that the seed has put in its place: a callback of the event loop, a call of a disk, a request to
the bucket, a crash or another blow of fate. (A coroutine that is resumed is a callback; looking at the time or at a
file's size is no step.)
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from traceback import format_exception
from typing import Any

from cairn_api.errors import CairnError
from cairnd.core import Core
from cairnd.model import Tier, Version, VersionState
from tests.simulation.bucket import Bucket
from tests.simulation.disk import DiskFaults
from tests.simulation.kernel import SeededLoop, StuckError, Trace
from tests.simulation.machine import GoneError, Machine
from tests.simulation.model import Model
from tests.simulation.planted import SOUND, Plant
from tests.simulation.training import Launch

JOB = "run"
_RESERVED_BYTES = 64 * 1024 * 1024
"""What the daemon keeps free on any disk."""

_MOST_STEPS_MORE = 100_000
"""A history that is longer than its steps by so much is stuck."""

_MOST_STARTS = 3
_ROUND_S, _MOST_ROUNDS = 70.0, 12
"""How long a healed world is given: what is retried is retried after a minute at the latest."""


@dataclass(slots=True)
class Outcome:
    """What one seed came to."""

    seed: int
    steps: int
    digest: str
    violations: list[str]
    last: list[str]
    counts: dict[str, int] = field(default_factory=dict)

    def report(self) -> str:
        """For a person who has to find out why."""
        lines = [f"CAIRN_SIM_SEED={self.seed} replays this:", *self.violations, "what happened last:", *self.last]
        return "\n".join(lines)


class World:
    """Everything that there is, for one seed."""

    def __init__(self, seed: int, steps: int, *, plant: Plant = SOUND, whole_trace: bool = False) -> None:
        self._plant = plant
        self.chance = random.Random(f"cairn {seed}")  # noqa: S311 - to be repeated, not to be secret
        self.trace = Trace(whole=whole_trace)
        self.loop = SeededLoop(self.chance, self.trace)
        self._steps = steps
        self.loop.most_steps = _MOST_STEPS_MORE + 20 * steps
        self._whole = whole_trace
        self.bucket = Bucket(self.chance, checks_source=self.chance.random() < 0.5)
        self.model = Model(JOB, self.bucket, self.trace.note)
        self.counts = {"crashes": 0, "launches": 0, "restores": 0}
        chance = self.chance
        self.model.keep, self.model.tight = chance.randrange(1, 4), chance.random() < 0.3
        self.model.tier2_keep = chance.randrange(1, 4)
        # How bad this world is. Some are calm, so that what needs a long quiet time happens too.
        self.harshness = chance.choice((0.0, 0.3, 1.0, 1.0, 2.0))
        settings: dict[str, Any] = {
            "capture_memory_bytes": 4096 * chance.choice((24, 64, 256)),
            "num_of_version_in_retention": self.model.keep,
            "tier2_num_of_version_in_retention": self.model.tier2_keep,
            "tier2_delete_grace_s": chance.choice((1.0, 10.0, 60.0)),
            "drain_threads": chance.randrange(1, 5),
            "upload_concurrency": chance.randrange(1, 4),
            "recheck_one_in": 1,
            "verify_on_load": chance.choice(("cached", "always")),
            "drain_timeout_s": 30.0,
        }
        if self.model.tight and chance.random() < 0.5:
            settings["tier1_limit_bytes"] = 4096 * chance.randrange(20, 60)
        self.machines = [
            Machine(self.loop, number, self.bucket, settings, plant, self._started)
            for number in range(chance.randrange(1, 5))
        ]
        self.model.machines = self.machines
        for machine in self.machines:
            machine.disk.faults = self._disk_faults()
            machine.disk.on_unlink = lambda path, machine=machine: self.model.on_unlink(machine, path)  # type: ignore[misc]
        self._launches: list[tuple[Launch, list[asyncio.Task[None]]]] = []
        self._helpers: set[asyncio.Task[None]] = set()

    def run(self) -> Outcome:
        """Let it all happen; the loop is closed afterwards."""
        loop = self.loop
        try:
            loop.run_until_complete(self._history())
        except StuckError as error:
            self.model.violation(str(error))
        except Exception as error:  # noqa: BLE001 - a finding, and the seed has to be told with it
            self.model.violation(f"the world ended with {''.join(format_exception(error))}")
        finally:
            self._close()
        self.model.violations += [f"nobody handled: {trouble}" for trouble in loop.troubles]
        counts = {
            **self.counts, "promises": self.model.promises, "deletions": self.model.deletions,
            "loads": self.model.loads,
        }  # fmt: skip
        return Outcome(
            0,
            self.trace.steps,
            self.trace.digest,
            self.model.violations,
            self.trace.lines(0 if self._whole else 60),
            counts,
        )

    # What happens

    async def _history(self) -> None:
        for machine in self.machines:
            await self._raise(machine)
        fates = [
            (6, self._end_launch), (6, self._arm), (4, self._cut), (4, self._kill), (3, self._bucket_outage),
            (3, self._jump_clock), (3, self._prune), (3, self._pin), (3, self._persist), (3, self._read),
            (2, self._drain), (2, self._verify), (self._plant.rot, self._rot), (2, self._pause),
        ]  # fmt: skip
        weights = [weight for weight, _ in fates]
        while self.trace.steps < self._steps:
            if not any(not tasks[0].done() for _, tasks in self._launches) or self.chance.random() < 0.02:
                self._launch()
            await asyncio.sleep(self.chance.choice((0.01, 0.1, 1.0, 5.0)) * self.chance.random())
            if self.harshness and self.chance.random() < 0.3 * self.harshness:
                ((_, fate),) = self.chance.choices(fates, weights)
                self.trace.add(f"fate: {fate.__name__.removeprefix('_')}")
                await fate()
            for machine in self.machines:
                if not machine.up and machine.wanted and self.chance.random() < 0.2:
                    await self._raise(machine)
            self._check_defects()
        await self._heal()

    async def _raise(self, machine: Machine) -> None:
        if self.harshness and self.chance.random() < 0.1 and machine.starts:
            started = asyncio.ensure_future(machine.start())
            await asyncio.sleep(0)
            machine.arm(self.chance.randrange(1, 40))  # a crash during recovery
            await started
        else:
            await machine.start()
        if machine.up:
            self.model.check_disk(machine)

    def _started(self, machine: Machine, core: Core) -> None:
        process = machine.process

        def changed(version: Version) -> None:
            if process is not None and not process.dead:
                copies = " ".join(f"{tier}={copy.state}" for tier, copy in sorted(version.copies.items()))
                self.trace.note(f"{machine.name} {version.id} {version.state} {copies}")
                self.model.changed(machine, version)

        core.catalog.on_change(changed)

    def _launch(self) -> None:
        count = self.chance.randrange(1, len(self.machines) + 1)
        machines = self.chance.sample(self.machines, count)
        homes = [machine for machine in machines for _ in range(self.chance.randrange(1, 3))]
        launch = Launch(JOB, homes, self.model, keep=0)
        self.counts["launches"] += 1
        self._launches.append(
            (launch, [asyncio.ensure_future(launch.train()), asyncio.ensure_future(launch.keep_alive())])
        )

    async def _end_launch(self) -> None:
        """All ranks of a training die, one soon after the other."""
        running = [item for item in self._launches if not item[1][0].done()]
        if not running:
            return
        await self._bring_down(self.chance.choice(running))

    async def _bring_down(self, item: tuple[Launch, list[asyncio.Task[None]]]) -> None:
        launch, tasks = item
        self._launches.remove(item)
        ranks = list(launch.ranks)
        self.chance.shuffle(ranks)
        if self.chance.random() < 0.5:
            ranks[0].die()  # the others find out later
            await asyncio.sleep(self.chance.random() * 5.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for rank in ranks:
            if rank.alive:
                rank.die()

    def _crashed(self) -> None:
        self.counts["crashes"] += 1

    async def _arm(self) -> None:
        self.chance.choice(self.machines).arm(self.chance.randrange(1, 120))
        self._crashed()

    async def _cut(self) -> None:
        self.chance.choice(self.machines).power_cut()
        self._crashed()

    async def _kill(self) -> None:
        self.chance.choice(self.machines).kill()
        self._crashed()

    async def _bucket_outage(self) -> None:
        """For a while the way from one machine to the bucket is bad, or cut."""
        chance, way, bad = self.chance, self.chance.choice(self.machines).way, self.harshness * 0.15
        way.lost, way.lost_reply = bad * chance.random(), bad * chance.random()
        way.slow, way.broken_off = bad * 0.2 * chance.random(), bad * chance.random()
        way.down = chance.random() < 0.4

        async def end() -> None:
            await asyncio.sleep(chance.choice((1.0, 30.0, 200.0)))
            way.clear()

        self._help(end())

    async def _jump_clock(self) -> None:
        self.chance.choice(self.machines).clock.offset_s += self.chance.uniform(-40.0, 40.0) * 86400.0

    async def _pause(self) -> None:
        running = [launch for launch, tasks in self._launches if not tasks[0].done()]
        if running:
            launch = self.chance.choice(running)
            launch.pausing = not launch.pausing

    async def _with_version(self, do: Callable[[Core, Version], Awaitable[object]]) -> None:
        machine = self.chance.choice(self.machines)

        async def act(core: Core) -> None:
            versions = list(core.catalog.versions(JOB))
            if versions:
                await do(core, self.chance.choice(versions))

        async def ask() -> None:
            try:
                await machine.call(act)
            except (GoneError, CairnError) as error:
                self.trace.note(f"refused: {error}")

        self._help(ask())

    async def _prune(self) -> None:
        await self._with_version(lambda core, _version: core.keeper.apply(JOB))

    async def _pin(self) -> None:
        machine = self.chance.choice(self.machines)

        async def pin(core: Core) -> None:
            versions = [version for version in core.catalog.versions(JOB) if version.restorable]
            if not versions:
                return
            version, pinned = self.chance.choice(versions), self.chance.random() < 0.5
            holders = self.model.pinned.setdefault(version.id, set())
            if not pinned:
                holders.clear()
            before = version.copy(Tier.TIER1).state
            done = await core.keeper.pin(version, "simulated", pinned=pinned)
            if done and pinned and version.copy(Tier.TIER1).state is before:
                holders.add(machine.number)

        async def ask() -> None:
            try:
                await machine.call(pin)
            except (GoneError, CairnError) as error:
                self.trace.note(f"refused: {error}")

        self._help(ask())

    async def _persist(self) -> None:
        async def request(core: Core, version: Version) -> None:
            await core.persistence.request(version)

        await self._with_version(request)

    async def _verify(self) -> None:
        async def verify(core: Core, version: Version) -> None:
            async for _ in core.verification.verify([version], deep=self.chance.random() < 0.7):
                pass

        await self._with_version(verify)

    async def _read(self) -> None:
        """A program that only reads."""
        machines = self.chance.sample(self.machines, self.chance.randrange(1, len(self.machines) + 1))
        self.counts["restores"] += 1

        async def read() -> None:
            launch = Launch(JOB, machines, self.model, keep=0, reader=True)
            try:
                await asyncio.wait_for(launch.restore(), 300.0)
            except (CairnError, TimeoutError) as error:
                self.trace.note(f"a reader failed: {error}")
            finally:
                for rank in launch.ranks:
                    rank.die()

        self._help(read())

    async def _drain(self) -> None:
        machine = self.chance.choice(self.machines)

        async def drain() -> None:
            try:
                await machine.call(lambda core: core.drain())
            except (GoneError, CairnError) as error:
                self.trace.note(f"drain: {error!r}")
            machine.kill()

        self._help(drain())

    async def _rot(self) -> None:
        """A bit of a version flips, on a disk or in the bucket."""
        machine = self.chance.choice(self.machines)
        prefix = f"/tier1/jobs/{JOB}/"
        files = [path for path in machine.disk.rotten_candidates() if path.startswith(prefix)]
        if self.chance.random() < 0.5 and files:
            path = self.chance.choice(files)
            for saved in self.model.saved.values():
                if str(saved.id) == path.removeprefix(prefix).split("/")[0]:
                    saved.rotten.add(machine.number)
                    saved.rotted_s = self.loop.time()
                    if machine.settings.verify_on_load == "cached" and machine.process is not None:
                        saved.rotten_unseen.append(machine.process)
            machine.disk.rot(path)
            return
        keys = [key for key in sorted(self.bucket.objects) if key.startswith(f"{JOB}/e") and ".cairn" not in key]
        if keys:
            key = self.chance.choice(keys)
            for saved in self.model.saved.values():
                if str(saved.id) == key.split("/")[1]:
                    saved.rotten_tier2 = True
            self.bucket.rot(key)

    def _help(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)

    def _disk_faults(self) -> DiskFaults:
        chance, bad = self.chance, self.harshness * 0.04
        faults = DiskFaults(short=chance.choice((0.0, 0.1)))
        if bad and chance.random() < 0.4:
            faults.sync_error, faults.folder_sync_error = bad * chance.random(), bad * chance.random()
            faults.write_error = bad * 0.3 * chance.random()
        if self.model.tight:
            faults.capacity_bytes = _RESERVED_BYTES + 4096 * chance.randrange(30, 80)
        return faults

    def _check_defects(self) -> None:
        for machine in self.machines:
            problem = machine.defect()
            if problem:
                self.model.violation(f"the daemon of {machine.name} ended by itself: {problem}")
                machine.kill()
            if machine.up and machine.core is not None:
                for event in machine.core.events.remembered():
                    if event.name == "defect":
                        self.model.violation(f"a background task of {machine.name} failed: {event.text()}")

    # How it ends

    async def _heal(self) -> None:
        """Nothing fails any more: everybody comes back, and what was promised has to be there."""
        self.trace.note("everything heals")
        for item in list(self._launches):
            await self._bring_down(item)
        for machine in self.machines:
            machine.arm(0)
            machine.disk.faults = DiskFaults()
            machine.way.clear()
        for task in list(self._helpers):
            task.cancel()
        await asyncio.gather(*self._helpers, return_exceptions=True)
        if self.chance.random() < 0.7:
            for machine in self.machines:
                machine.power_cut()
        for machine in self.machines:
            for _ in range(_MOST_STARTS):
                if machine.up or await machine.start():
                    break
            else:
                self.model.violation(f"the daemon of {machine.name} does not start any more")
            self.model.check_disk(machine)
        for _ in range(_MOST_ROUNDS):
            await asyncio.sleep(_ROUND_S)
            if not any(machine.core.replicator.backlog() for machine in self.machines if machine.core is not None):
                break
        self._check_defects()
        for machine in self.machines:
            self.model.check_disk(machine)
            self._check_backlog(machine)
        await self._last_restore()

    def _check_backlog(self, machine: Machine) -> None:
        core = machine.core
        for version in core.catalog.versions(JOB) if core is not None else ():
            if version.state in (VersionState.OPEN, VersionState.SEALED):
                self.model.violation(f"{machine.name} leaves {version.id} {version.state} for ever")
        for version in core.replicator.backlog() if core is not None else ():
            saved = self.model.saved.get((version.id, version.nonce))
            if saved is None or saved.rotten or saved.rotten_tier2 or not version.complete:
                continue  # other nodes' parts may be gone for good
            if self.model.claimed_by(version.id.epoch) != version.nonce:
                continue  # two launches did not see each other's claim, and this one came second
            self.model.violation(f"{machine.name} still has to persist {version.id}: {version.copy(Tier.TIER2).error}")

    async def _last_restore(self) -> None:
        must = self.model.must_be_offered()
        homes = [self.machines[home] for home in must.homes] if must is not None else self.machines[:1]
        launch = Launch(JOB, homes, self.model, keep=0, reader=True)
        try:
            chosen = await launch.restore()
        except CairnError as error:
            if must is not None:
                self.model.violation(f"{must.id} was promised and is intact, and a restore says: {error}")
            return
        finally:
            for rank in launch.ranks:
                rank.die()
        if must is not None and (chosen is None or chosen.version < must.id):
            reasons = "; ".join(chosen.passed_over) if chosen is not None else "nothing is known"
            self.model.violation(
                f"{must.id} was promised and is intact, and {chosen.version if chosen else None} is offered: {reasons}"
            )

    def _close(self) -> None:
        async def end() -> None:
            for launch, tasks in self._launches:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for rank in launch.ranks:
                    if rank.alive:
                        rank.die()
            for machine in self.machines:
                machine.kill()
                await machine.gone()

        try:
            self.loop.run_until_complete(end())
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()


def simulate(seed: int, steps: int, *, plant: Plant = SOUND, whole_trace: bool = False) -> Outcome:
    """Run the world of *seed* until *steps* have happened, heal it, and judge. Equal arguments give equal outcomes."""
    with _quiet(), plant.patched():
        world = World(seed, steps, plant=plant, whole_trace=whole_trace)
        outcome = world.run()
    outcome.seed = seed
    return outcome


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of the daemons, and without collections of garbage at moments that no seed has chosen."""
    log = logging.getLogger("cairnd")
    level, collecting = log.level, gc.isenabled()
    log.setLevel(logging.CRITICAL + 1)
    gc.disable()
    try:
        yield
    finally:
        log.setLevel(level)
        if collecting:
            gc.enable()
            gc.collect()
