"""A tier 1 with thousands of versions, drawn by ``layout.py`` and written in seconds, and what crashes leave in one.

Saving so many through a daemon would take an hour of syncs; what a scan reads is the same.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cairn_api.names import VersionId
from cairnd import layout
from cairnd.digests import digest_of
from cairnd.manifest import NodeManifest
from cairnd.model import Partition
from tests.crash.trainer import JOB, PARTITIONS

_SEQUENCES = 200
"""Versions of one launch."""


def version_number(number: int) -> VersionId:
    """The id of the *number*-th version, counted from 0."""
    return VersionId(1 + number // _SEQUENCES, 1 + number % _SEQUENCES, f"global_step{number}")


def write_versions(tier1_path: Path, count: int, seed: int, start: int = 0) -> list[VersionId]:
    """Add *count* whole versions with small partitions to tier 1; returns their ids, oldest first."""
    made = []
    for number in range(start, start + count):
        version = version_number(number)
        data = {name: random.Random(f"{seed}/{number}/{name}").randbytes(300) for name in sorted(PARTITIONS)}  # noqa: S311
        partitions = tuple(
            Partition(name, name, 0, len(content), digest_of([memoryview(content)]), ("collections.OrderedDict",))
            for name, content in data.items()
        )
        manifest = NodeManifest(
            JOB, version, "0" * 32, f"{seed:032x}", 1, (0,), partitions, "/save", False, False, 1.7e9 + number,
            os.geteuid(), os.getegid(), {},
        )  # fmt: skip
        for name, content in data.items():
            _write(tier1_path / layout.partition(JOB, version, name), content)
        _write(tier1_path / layout.manifest(JOB, version), manifest.encode())
        made.append(version)
    return made


@dataclass(frozen=True, slots=True)
class Spoiled:
    """What was added to a sound tree. Recovery removes the files of ``swept`` and moves ``damaged`` aside."""

    swept: tuple[Path, ...]
    damaged: tuple[Path, ...]


def spoil(tier1_path: Path, sound: list[VersionId], count: int, seed: int) -> Spoiled:
    """Add *count* each of: saves without a manifest, versions with a damaged one, leftovers in a sound version."""
    generator = random.Random(seed)  # noqa: S311 - kinds of damage, not secrets
    swept, damaged = [], []
    # Beyond the sound ones, so that a version is never both.
    added = write_versions(tier1_path, 2 * count, seed, start=len(sound))
    for version in added[:count]:
        (tier1_path / layout.manifest(JOB, version)).unlink()
        _write(tier1_path / layout.incoming(JOB, version, 1), b"half a partition")
        swept.append(tier1_path / layout.version_folder(JOB, version))
    for version in added[count:]:
        path = tier1_path / layout.manifest(JOB, version)
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        another = (tier1_path / layout.manifest(JOB, sound[0])).read_bytes()
        path.write_bytes(generator.choice((whole[: generator.randrange(len(whole))], bytes(flipped), another)))
        damaged.append(tier1_path / layout.version_folder(JOB, version))
    for version in generator.sample(sound, count):
        path = tier1_path / layout.incoming(JOB, version, generator.randrange(1, 9))
        _write(path, b"left behind")
        swept.append(path)
    return Spoiled(tuple(swept), tuple(damaged))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below *folder*, by its relative path."""
    found = {}
    for path, _, names in os.walk(folder):
        for name in names:
            full = os.path.join(path, name)  # noqa: PTH118 - 30,000 times
            with open(full, "rb") as file:
                found[os.path.relpath(full, folder)] = file.read()
    return found


def reading_seconds(folder: Path) -> float:
    """How long this machine takes for a plain walk that reads every file below *folder*."""
    start_s = time.monotonic()
    contents(folder)
    return time.monotonic() - start_s


def quarantined(tier1_path: Path) -> dict[str, dict[str, bytes]]:
    """What lies in quarantine: files by key of what was moved there. Fails when something was moved twice."""
    found: dict[str, dict[str, bytes]] = {}
    for place in sorted((tier1_path / layout.QUARANTINE).glob(f"*/{layout.VERSIONS}/*/*")):
        key = str(place.relative_to(tier1_path / layout.QUARANTINE)).partition("/")[2]
        assert key not in found, f"{key} is in quarantine twice"
        found[key] = contents(place)
    return found


def empty_quarantine(tier1_path: Path) -> None:
    """What an operator does after having looked."""
    shutil.rmtree(tier1_path / layout.QUARANTINE)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
