"""Recovery of a tier 1 with thousands of versions: fast, the same when repeated, and safe to be killed at any point."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cairnd import layout
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.upkeep import recovery
from tests.crash import many_versions, ranks
from tests.crash.test_power_cut import SEED
from tests.crash.trainer import JOB, Trainers
from tests.daemon_process import DaemonProcess
from tests.promises import Evidence, full_run, proof_size

VERSIONS = proof_size(1_000, 10_000)
KILLS = proof_size(8, 50)
SPOILED = proof_size(25, 100)
"""Of each kind, before each recovery that is killed."""

_READY_S, _LIST_S = 5.0, 1.0
_MEASUREMENTS = 3


@pytest.mark.promise("recovery")
@pytest.mark.timeout(600)
def test_thousands_of_versions_are_ready_at_once_and_the_same_twice(
    tmp_path: Path, trainers: Trainers, evidence: Evidence
) -> None:
    tier1_path = tmp_path / "tier1"
    made = many_versions.write_versions(tier1_path, VERSIONS, SEED)
    before = many_versions.contents(tier1_path / layout.VERSIONS)
    read_s = min(many_versions.reading_seconds(tier1_path / layout.VERSIONS) for _ in range(_MEASUREMENTS))
    listings, ready_s, list_s = [], [], []
    with _daemon(tmp_path) as daemon:
        for _ in range(_MEASUREMENTS):
            daemon.kill9()
            start_s = time.monotonic()
            daemon.start()
            ready_s.append(time.monotonic() - start_s)
            start_s = time.monotonic()
            listings.append(_list(daemon))
            list_s.append(time.monotonic() - start_s)
        unlike = sum(listing != listings[0] for listing in listings)
        missing = {str(version) for version in made} ^ {entry["version"] for entry in listings[0]}
        changed = many_versions.contents(tier1_path / layout.VERSIONS).items() ^ before.items()
        slow = full_run() and (min(ready_s) > _READY_S or min(list_s) > _LIST_S)
        evidence(
            tried=VERSIONS,
            broken=unlike + len(missing) + len(changed) + slow,
            detail=(
                f"{VERSIONS:,} versions ready {min(ready_s):.1f} s after exec ({min(ready_s) / read_s:.1f} times a "
                f"plain read of the same files), `cairn list` {min(list_s):.1f} s"
            ),
        )
        assert not unlike, "recovered twice, listed differently"
        assert not missing
        assert not changed, "recovery wrote to sound versions"
        assert not slow, f"ready after {ready_s} s, listed in {list_s} s"
        trainer = trainers.start(ranks.save_once, str(daemon.runtime_dir), str(tmp_path / "diary"), "one-more")
        assert trainer.end() == 0, f"{trainer.log}\n{daemon.log}"
        newest = max(recovery.scan(LocalTier(OsFileSystem(), tier1_path)).versions, key=lambda version: version.id)
        assert newest.id.tag == "one-more", "what is saved next is newer than all"


@pytest.mark.promise("recovery")
@pytest.mark.timeout(1200)
def test_recovery_that_is_killed_at_any_point_is_repeated_with_the_same_result(
    tmp_path: Path, figures: Callable[[str], None], evidence: Evidence
) -> None:
    tier1_path = tmp_path / "tier1"
    moments = random.Random(SEED)  # noqa: S311 - moments of kills, not secrets
    sound = many_versions.write_versions(tier1_path, VERSIONS // 4, SEED)
    before = many_versions.contents(tier1_path / layout.VERSIONS)
    wrong: list[str] = []
    in_the_middle = rounds = kills = 0
    with _daemon(tmp_path) as daemon:
        daemon.kill9()
        while kills < KILLS:
            rounds += 1
            spoiled = many_versions.spoil(tier1_path, sound, SPOILED, SEED + rounds)
            damaged = {str(path.relative_to(tier1_path)): many_versions.contents(path) for path in spoiled.damaged}
            for _ in range(moments.randint(1, 4)):  # a recovery is killed, and so may be the one after it
                in_the_middle += _kill_recovering(daemon, spoiled, moments)
                kills += 1
                lost = set(sound) - {
                    found.id for found in recovery.scan(LocalTier(OsFileSystem(), tier1_path)).versions
                }
                wrong += [f"lost to recovery: {version}" for version in lost]
            daemon.start()
            daemon.kill9()
            after = many_versions.contents(tier1_path / layout.VERSIONS)
            wrong += sorted(f"round {rounds}: {path}" for path in before.keys() ^ after.keys())
            wrong += [
                f"round {rounds}: {path} changed"
                for path in before.keys() & after.keys()
                if before[path] != after[path]
            ]
            wrong += [f"round {rounds}: {path} was left" for path in spoiled.swept if path.exists()]
            if many_versions.quarantined(tier1_path) != damaged:
                wrong.append(f"round {rounds}: quarantine holds something else than what was damaged")
            many_versions.empty_quarantine(tier1_path)
    evidence(tried=0, broken=len(wrong), detail=f"recovery killed {kills} times, {in_the_middle} in mid-sweep")
    figures(f"kills of recovery: {kills} kills in {rounds} rounds, {in_the_middle} in mid-sweep, seed {SEED}")
    assert not wrong
    assert in_the_middle, "no kill came in the middle of a sweep"


def _kill_recovering(daemon: DaemonProcess, spoiled: many_versions.Spoiled, moments: random.Random) -> bool:
    """Start the daemon and kill it at a random point of its recovery; whether it had begun to sweep and not ended."""
    entries = [path for path in (*spoiled.swept, *spoiled.damaged) if path.exists()]
    started = len(_events(daemon, "daemon_started"))
    daemon.launch()
    if entries and moments.random() < 0.8:
        awaited = moments.choice(entries)
        ranks.wait_until(
            lambda: not awaited.exists() or len(_events(daemon, "daemon_started")) > started or not daemon.running,
            f"recovery of {awaited}",
            describe=lambda: daemon.log[-4000:],
        )
        assert daemon.running, f"recovery ended the daemon:\n{daemon.log[-4000:]}"
    else:
        time.sleep(moments.uniform(0, 1.0))
    daemon.kill9()
    left = sum(path.exists() for path in entries)
    return 0 < left < len(entries)


def _events(daemon: DaemonProcess, name: str) -> list[str]:
    return [line for line in daemon.log.splitlines() if f" {name} " in line]


def _daemon(folder: Path) -> DaemonProcess:
    return DaemonProcess(folder, persistent_storage_path="", num_of_version_in_retention=10**6)


def _list(daemon: DaemonProcess) -> list[dict[str, Any]]:
    """What ``cairn list`` says, without what changes with time."""
    command = [sys.executable, "-m", "cairnd.cli.main", "--runtime-dir", str(daemon.runtime_dir), "list", "--job", JOB]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    versions: list[dict[str, Any]] = json.loads(done.stdout)["versions"]
    return versions
