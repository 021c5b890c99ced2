"""One point: one durable call of a phase fails, or is the daemon's last. What is left is judged, and must work again.

After a kill the daemon recovers, dies and recovers once more, and both must find the same. After an error it runs on.
Then the phase is done again without a fault, and a training saves.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import dropwhile
from pathlib import Path

from cairn_api.errors import CairnError
from cairnd.model import Tier
from cairnd.replication.bucket import Verdict
from cairnd.restore import inventory
from cairnd.upkeep import verifier
from tests.crash import oracle, ranks
from tests.crash.ground import Ground, Promises
from tests.crash.phases import Phase, copy_template, make_template
from tests.crash.syscalls import FAULTS, Call, fault_command, read_trace, record_command
from tests.crash.trainer import JOB

_ATTEMPTS = 6
_DEFECTS = ("Traceback", " defect ", "unforeseen error", "InternalError")
_AT_ONCE = 2
_OF_START = re.compile(r"\w+ (\.|tier1(/\.cairn(/lock)?|/jobs)?|bucket(/\.cairn(/\S+)?)?)( bucket/\.cairn/\S+)?")
"""Paths of the calls that every start makes, looking for its lock and probing the bucket."""


@dataclass(frozen=True, slots=True)
class Point:
    """*fault* in the call *what*, which is the *number*-th of its name."""

    phase: str
    call: str
    number: int
    what: str
    fault: str

    def __str__(self) -> str:
        return f"{self.phase}: {self.fault} in {self.what} (the {self.number}th {self.call})"


@dataclass(slots=True)
class Outcome:
    """What came of a point. ``problems``: promises broken. ``told``: the error that somebody was told of.

    ``missed``: why the fault did not happen where it should. ``calls``: the durable calls that were made all the same.
    """

    point: Point
    problems: list[str] = field(default_factory=list)
    told: str = ""
    missed: str = ""
    calls: Sequence[Call] = ()


@dataclass(frozen=True, slots=True)
class Recording:
    """A phase without a fault: where it starts from, and every durable call that it makes."""

    phase: Phase
    template: Path
    promises: Promises
    calls: Sequence[Call]
    folder: Path

    def points(self, faults: Iterable[str] = FAULTS) -> list[Point]:
        """Each call with each fault."""
        return [
            Point(self.phase.name, call.name, call.number, call.what(self.folder), fault)
            for call in self.calls
            for fault in faults
        ]


def record(phase: Phase, folder: Path, fault: str = "") -> Recording:
    """Make the template of *phase* below *folder*, and run the phase once under strace (with a planted *fault*)."""
    template = folder / f"{phase.name}-template"
    template.mkdir(parents=True)
    promises = make_template(phase, template)
    return _record(phase, template, promises, folder / f"{phase.name}-recorded", fault)


def _record(phase: Phase, template: Path, promises: Promises, folder: Path, fault: str) -> Recording:
    remove(folder)
    ground, log_path = _ground(phase, template, promises, folder), folder / "strace.log"
    ground.start(phase.settings, record_command(log_path), fault)
    try:
        phase.act(ground)
        assert phase.done(ground), f"{phase.name} is not done without any fault:\n{ground.daemon.log}"
    finally:
        ground.daemon.kill9()
    calls = [call for call in read_trace(log_path) if call.changes and _concerns(call, ground)]
    remove(folder)
    if phase.after_start:
        calls = list(dropwhile(lambda call: _OF_START.fullmatch(call.what(folder)) is not None, calls))
    return Recording(phase, template, promises, calls, folder)


def run(recording: Recording, points: Sequence[Point], folder: Path, fault: str = "") -> list[Outcome]:
    """Run *points*, some at a time.

    A read more or less, and an ``openat`` comes under another number: such a point is looked for and tried again.
    """

    def one(number: int, point: Point) -> Outcome:
        own = folder / str(number)  # short: a socket's path has to fit into 108 bytes
        outcome = _run(recording, point, own, fault)
        for attempt in range(1, _ATTEMPTS):
            if not outcome.missed:
                break
            remove(own)
            found = _found_again(recording, outcome.calls, own, point)
            if found is None:
                again = folder / f"{number}-{attempt}"
                now = _record(recording.phase, recording.template, recording.promises, again, fault)
                found = _found_again(recording, now.calls, again, point)
            outcome = _run(recording, found or point, own, fault)
        if not outcome.problems:
            remove(own)
        return outcome

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(one, range(len(points)), points))


def _found_again(recording: Recording, calls: Sequence[Call], folder: Path, point: Point) -> Point | None:
    """*point* with the number that it has among *calls*: it is the same how-manieth of those that look alike."""
    alike = [call.number for call in recording.calls if call.what(recording.folder) == point.what]
    found = [call.number for call in calls if call.what(folder) == point.what]
    place = alike.index(point.number)
    return replace(point, number=found[place]) if place < len(found) else None


def _run(recording: Recording, point: Point, folder: Path, fault: str) -> Outcome:
    phase, outcome = recording.phase, Outcome(point)
    ground, log_path = _ground(phase, recording.template, recording.promises, folder), folder / "strace.log"
    tracer = fault_command(log_path, point.call, point.number, point.fault)
    ground.start(phase.settings, tracer, fault)
    try:
        if ground.daemon.came_up:
            try:
                phase.act(ground)
            except CairnError as error:
                outcome.told = str(error)
                if not error.hint:
                    outcome.problems.append(f"no next step is told with {error}")
        trace = read_trace(log_path)
        outcome.missed = _missed(trace, point, ground)
        if outcome.missed:
            outcome.calls = [call for call in trace if call.changes and _concerns(call, ground)]
            return outcome
        if point.fault != "KILL":
            outcome.problems += _judge_error(ground, trace)
        outcome.told = outcome.told or ground.shown
        _judge_what_is_left(ground, phase, point, outcome)
        do_it_again(ground, phase, outcome.problems)
    except (CairnError, AssertionError, OSError) as error:
        outcome.problems.append(f"{type(error).__name__}: {error}")
    finally:
        ground.daemon.kill9()
    return outcome


def _ground(phase: Phase, template: Path, promises: Promises, folder: Path) -> Ground:
    ground = Ground(folder, promises.copy())
    copy_template(template, ground)
    phase.damage(ground)
    return ground


def _concerns(call: Call, ground: Ground) -> bool:
    # The folder itself: the names of tier 1 and of the bucket are made durable in it.
    return call.below(ground.tier1_path, ground.bucket_path) or str(ground.folder) in call.paths


def _missed(trace: Sequence[Call], point: Point, ground: Ground) -> str:
    """Why *point* did not happen; empty if it did."""
    if point.fault == "KILL":
        hits = [call for call in trace if (call.name, call.number) == (point.call, point.number)]
        hits = [] if ground.daemon.running else hits
    else:
        hits = [call for call in trace if call.injected]
    hits = [call for call in hits if call.changes and _concerns(call, ground)]
    found = [call.what(ground.folder) for call in hits]
    return "" if found == [point.what] else f"{found or 'nothing'} was hit"


def _judge_error(ground: Ground, trace: Sequence[Call]) -> list[str]:
    """What is wrong while the daemon that met the error still runs, or has refused to start."""
    problems = []
    if ground.daemon.came_up and not ground.daemon.running:
        problems.append("the error ended the daemon")
    if not ground.daemon.came_up and "Next step:" not in ground.daemon.log:
        problems.append(f"it does not start and says no next step: {ground.daemon.log}")
    for number, call in enumerate(trace):
        if call.injected and call.name == "fsync":
            if any(version.tag == "disturbed" for version in ground.promises.tier1):
                problems.append("a save was promised whose fsync had failed")
            later = [other for other in trace[number + 1 :] if call.paths[0] in other.paths]
            bad = [other.name for other in later if other.name in ("fsync", "rename", "linkat")]
            if bad and not _is_folder(call, trace):
                problems.append(f"{call.paths[0]} was used after its fsync had failed: {bad}")
    return problems


def _is_folder(synced: Call, trace: Sequence[Call]) -> bool:
    """Whether what was synced is a folder: no file of this name was made or written."""
    return not any(call.name in ("pwrite64", "fallocate", "fchmod") and synced.paths[0] in call.paths for call in trace)


def _judge_what_is_left(ground: Ground, phase: Phase, point: Point, outcome: Outcome) -> None:
    outcome.problems += judge(ground, phase)
    if point.fault != "KILL" and ground.daemon.came_up:
        return
    before = oracle.examine(ground.tier1_path, JOB, ground.promises.tried)
    for _ in range(2):
        ground.daemon.restart()
        found = _recovered(ground)
        # Retention may go on where it was stopped; nothing else may change what there is.
        if not set(found.listed) <= set(before.listed) or oracle.lost(before.listed, found, phase.keep):
            outcome.problems.append(f"recovery made {found} of {before}")
        before = found
    outcome.problems += judge(ground, phase)


def _recovered(ground: Ground) -> oracle.Found:
    """What there is once nothing is unfinished any more: retention may be deleting a version just now."""
    found: list[oracle.Found] = []

    def finished() -> bool:
        found[:] = [oracle.examine(ground.tier1_path, JOB, ground.promises.tried)]
        return not found[0].unfinished

    ranks.wait_until(finished, "the sweep of what is unfinished", describe=lambda: found)
    return found[0]


def do_it_again(ground: Ground, phase: Phase, problems: list[str]) -> None:
    """Do *phase* without a fault, and a save; adds to *problems* what does not work or is not right afterwards."""
    phase.act(ground)
    if not phase.done(ground) and " recovery_failed " in ground.daemon.log:
        ground.daemon.restart()  # what one start has left alone, the next one cleans up
    if not phase.done(ground):
        problems.append(f"doing it again does not work:\n{ground.daemon.log}")
    with ground.client() as client:
        if phase.settings.get("persistent_storage_path") == "":
            ground.save(client, "after")
        else:
            ground.save_and_persist(client, "after")
    problems += judge(ground, phase, spoilt="")
    problems += ground.wrong
    problems += [f"the log has {word!r}" for word in _DEFECTS if word in ground.daemon.log]


def judge(ground: Ground, phase: Phase, spoilt: str | None = None) -> list[str]:
    """What is lost or torn in either tier, by files and bytes; with a running daemon also what it shows."""
    spoilt = phase.spoilt if spoilt is None else spoilt
    promises = ground.promises
    found = oracle.examine(ground.tier1_path, JOB, promises.tried) if ground.tier1_path.exists() else None
    problems = []
    if found is not None:
        torn = {name: why for name, why in found.torn.items() if not (spoilt and name.endswith(f"-{spoilt}"))}
        problems += [f"torn: {name}: {why}" for name, why in torn.items()]
        problems += [f"lost: {version}" for version in oracle.lost(promises.tier1, found, phase.keep)]
    if not ground.bucket_path.exists():
        return problems
    seen = inventory.view(ground.bucket, JOB, lambda _: False)
    problems += [f"torn in the bucket: {version}: {why}" for version, why in seen.damaged.items()]
    there = []
    for version, manifests in sorted(seen.manifests.items()):
        copy = inventory.merged(manifests)
        try:
            findings = list(verifier.check_tier2(ground.bucket, copy, deep=True, progress=lambda _: None))
        except verifier.GoneError:
            continue  # since the look: retention runs on
        if version in ground.decided(Verdict.DELETED):
            continue
        there.append(version)
        problems += [f"torn in the bucket: {version}: {item.path}: {item.problem}" for item in findings]
    lost = oracle.lost(promises.tier2, oracle.Found(tuple(there), {}, ()), phase.keep)
    problems += [f"lost in the bucket: {version}" for version in lost]
    tombs = {version for version, decision in seen.decisions.items() if decision.verdict is Verdict.DELETED}
    problems += [f"{version} came back from the dead" for version in promises.dead & set(there)]
    promises.dead |= tombs
    if ground.daemon.running:
        with ground.operator() as operator:
            shown = {item.version.id for item in operator.versions(JOB).versions if item.version.has(Tier.TIER2)}
        wrong = shown - ground.decided(Verdict.COMMITTED)  # read after: what waits is being persisted meanwhile
        problems += [f"{version} is shown in the bucket and was not decided" for version in wrong]
    return problems


def remove(folder: Path) -> None:
    """Remove a point's folder, protected files included."""
    if folder.exists():
        # A protected file stays until its flag is cleared. A file system without such flags has none to clear.
        subprocess.run(["chattr", "-R", "-f", "-i", str(folder)], check=False)
        subprocess.run(["rm", "-rf", str(folder)], check=True)
