"""What Cairn promises, which tests prove it, and the table of what they found.

A test that proves a promise carries ``@pytest.mark.promise(<id>)`` and reports with the fixture ``evidence``; one that
plants a bug and catches it carries ``@pytest.mark.planted(<id>)``. ``tests/conftest.py`` collects what they report in
:data:`RESULTS` and prints the table; ``python -m tests.promises`` writes it into the README (`make prove`).
A promise without a proof in the run is shown as such, with the reason for which its tests were skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("CAIRN_PROMISES") or ROOT / ".cache" / "promises.json")
README = ROOT / "README.md"
_BEGIN, _END = "<!-- promises: written by `make prove` -->", "<!-- end of promises -->"


def full_run() -> bool:
    """Whether the run is a full one (`make prove`) and not the sized-down one of `make test-faults`."""
    return os.environ.get("CAIRN_PROOF") == "full"


def proof_size(sized_down: int, full: int) -> int:
    """How often to try: *sized_down* in `make test-faults`, *full* in `make prove`."""
    return full if full_run() else sized_down


@dataclass(frozen=True, slots=True)
class Promise:
    """One row: what holds, whatever is done to Cairn; the ``unit`` that is counted, and how many a full run tries."""

    text: str
    unit: str
    goal: int


PROMISES: Mapping[str, Promise] = {
    "kill": Promise("`kill -9` of the daemon while 4 ranks save: nothing promised is lost or torn", "kills", 1000),
    "rank": Promise("a rank killed or stopped at any moment harms nobody else and leaves nothing behind", "kills", 10),
    "power_ext4": Promise("power cut on ext4: nothing promised is lost or torn", "cuts", 1000),
    "power_xfs": Promise("power cut on xfs: nothing promised is lost or torn", "cuts", 1000),
    "replay": Promise("whatever a disk kept of unflushed writes, torn or reordered, it recovers", "images", 10_000),
    "syscall_kill": Promise("killed in the n-th durable call, also of recovery: nothing lost or torn", "points", 100),
    "syscall_error": Promise(
        "the n-th durable call fails (EIO, ENOSPC): no false promise, nothing torn", "points", 100
    ),
    "fsync_once": Promise("a disk whose fsync fails once and then says yes is never believed", "failures", 2),
    "corruption": Promise(
        "bytes flipped, cut or swapped in memory, either tier or manifests are found", "faults", 10_000
    ),
    "repair": Promise("a damaged tier 1 copy is set aside and made again, bit for bit, from tier 2", "restores", 100),
    "no_space": Promise("out of space or inodes at every point: a clear error, older versions intact", "points", 50),
    "limits": Promise("memory, descriptors, shared memory run out, the disk is slow: no SIGBUS, no hang", "cases", 5),
    "pause": Promise("paused processes and clocks that jump by 40 days change no decision", "cases", 4),
    "recovery": Promise("recovery twice finds the same; 10,000 versions are ready in 5 s", "versions", 10_000),
    "simulation": Promise("clock, disks, bucket, crashes and order of events by one seed: as the model", "seeds", 1000),
    "bad_input": Promise("no message, manifest, setting or name crashes or hangs the daemon", "inputs", 100_000),
    "aggressor": Promise("a hostile client on gRPC and side socket: no crash, no hang, bounded memory", "attacks", 500),
    "soak": Promise("saves, loads and faults for 30 minutes: memory, descriptors, files stay flat", "seconds", 1800),
}

PLANTED: Mapping[str, str] = {
    "no_file_sync": "files are not synced",
    "no_folder_sync": "folders are not synced",
    "manifest_first": "the manifest is written before the data",
    "swallowed_sync_error": "a failed fsync is taken for success",
    "trusts_latest": "a pointer file is believed instead of the manifests",
    "deletes_too_early": "the old version is deleted before the new one is safe",
    "no_digest_at_restore": "a restore skips the digests",
    "sweeps_live_session": "recovery removes the files of a save that is under way",
}


@dataclass(slots=True)
class Result:
    """What one test reported. ``broken``: how often the promise was broken; ``tried``: of how many."""

    promise: str
    planted: str
    outcome: str
    reason: str = ""
    tried: int = 0
    broken: int = 0
    detail: str = ""
    seconds: float = 0.0
    full: bool = False
    commit: str = ""


class Evidence:
    """The fixture ``evidence`` of a test: ``evidence(tried=1000, broken=0, detail="41,000 saves promised")``."""

    def __init__(self, result: Result) -> None:
        self._result = result

    def __call__(self, *, tried: int, broken: int = 0, detail: str = "") -> None:
        """Add to what was tried and found broken; report before asserting, so that a failure has its figures too."""
        self._result.tried += tried
        self._result.broken += broken
        self._result.detail = "; ".join(filter(None, [self._result.detail, detail]))


def commit() -> str:
    """The commit under test, short; with ``+`` when files were changed since."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def read_results() -> dict[str, Result]:
    """Results by test, as collected so far."""
    if not RESULTS.exists():
        return {}
    return {test: Result(**fields) for test, fields in json.loads(RESULTS.read_text()).items()}


def keep_results(results: Mapping[str, Result]) -> None:
    """Add *results* to those collected before; a test that ran again replaces its own."""
    together = {**read_results(), **results}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({test: asdict(result) for test, result in sorted(together.items())}, indent=1))


def table(results: Iterable[Result]) -> list[str]:
    """The rows of the table as Markdown, heading first."""
    by_promise: dict[str, list[Result]] = {name: [] for name in PROMISES}
    caught: dict[str, list[Result]] = {name: [] for name in PLANTED}
    for result in results:
        if result.promise:
            by_promise[result.promise].append(result)
        if result.planted:
            caught[result.planted].append(result)
    lines = ["| promise | tried | broken | |", "|---|--:|--:|---|"]
    lines += [_row(PROMISES[name], found) for name, found in by_promise.items()]
    outcomes = {name: _caught(found) for name, found in caught.items()}
    missed = [f"{PLANTED[name]}: {outcome}" for name, outcome in outcomes.items() if outcome]
    notes = "; ".join(missed) or ", ".join(PLANTED.values())
    lines.append(f"| planted bugs that their harness catches | {len(PLANTED)} bugs | {len(missed)} | {notes} |")
    return lines


def _caught(found: list[Result]) -> str:
    """Empty if each harness that had to catch a planted bug did, else what is missing."""
    if any(result.outcome == "failed" for result in found):
        return "**not caught**"
    if all(result.outcome == "passed" for result in found) and found:
        return ""
    return "not proved here: " + "; ".join(sorted({item.reason for item in found}) or ["its tests did not run"])


def _row(promise: Promise, found: list[Result]) -> str:
    ran = [result for result in found if result.outcome in ("passed", "failed")]
    if not ran:
        reasons = sorted({result.reason for result in found if result.reason}) or ["its tests did not run"]
        return f"| {promise.text} | | | **not proved here**: {'; '.join(reasons)} |"
    tried, broken = sum(result.tried for result in ran), sum(result.broken for result in ran)
    notes = [result.detail for result in ran if result.detail]
    notes += sorted({f"**a test failed**: {result.reason}" for result in ran if result.outcome == "failed"})
    notes += sorted({f"in part not proved here: {item.reason}" for item in found if item.outcome == "skipped"})
    seconds = sum(result.seconds for result in ran)
    notes.append(f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s")
    return f"| {promise.text} | {tried:,} {promise.unit} | {broken} | {'; '.join(notes)} |"


def write_readme(results: Iterable[Result]) -> None:
    """Put the table between its markers in the README."""
    found = list(results)
    text = README.read_text()
    before, _, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise SystemExit(f"{README} lacks the markers {_BEGIN} and {_END}")
    commits = sorted({result.commit for result in found if result.commit})
    kind = "a full run" if all(result.full for result in found) else "a run that was partly sized down"
    about = f"*Figures of {kind} ({datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, commit {', '.join(commits)}).*"
    README.write_text("\n".join([before + _BEGIN, about, "", *table(found), "", _END + after]))


def main() -> int:
    """Print the table of the results collected so far, or write it into the README."""
    parser = argparse.ArgumentParser(prog="python -m tests.promises", description=main.__doc__)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--forget", action="store_true", help="forget the results collected so far, and print nothing")
    arguments = parser.parse_args()
    if arguments.forget:
        RESULTS.unlink(missing_ok=True)
        return 0
    results = read_results().values()
    if arguments.readme:
        write_readme(results)
    sys.stdout.write("\n".join(table(results)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
