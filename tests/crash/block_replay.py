"""Makes the disks that a power cut may leave from a log of writes and flushes, and judges what each of them holds.

A disk may lose what it was told after its last flush: all of it, some writes and not others, whatever their order, and
of one write some 512-byte sectors and not the rest. So an image is all writes up to a flush, and any part of those
between that flush and the cut. Each is mounted, which replays the journal, and judged three times: as it is, after
recovery, and after recovery again.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from cairn_api.errors import CairnError
from cairn_api.names import VersionId, parse_version
from cairnd import layout
from cairnd.manifest import NOTE_FORMAT, decode
from cairnd.tiers.errors import NotFoundError
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.upkeep import recovery
from tests.crash import oracle
from tests.crash.block_log import FLUSH, NOTE, WRITE, Record, read_log
from tests.crash.logged_disk import EMPTY_NAME, LOG_NAME
from tests.crash.loop_mounts import LoopDevice, MemoryImage, mounted
from tests.crash.trainer import JOB

TIER1 = "tier1"
"""The folder on a recorded disk."""

_SECTOR_BYTES = 512
_SUPERBLOCK_END = 4096
"""ext4 writes its superblock, two sectors with one checksum, in place and takes it for written whole or not at all."""

_KEPT_SHARES = (0.1, 0.5, 0.9)
_TORN_SHARE = 0.3
_MOST_ATTEMPTS = 20

ALL, NONE = 0, -1
"""Seeds of images that have all of the unflushed writes, or none."""


class Image(NamedTuple):
    """One state of the disk: the power fails after *cut* records; *seed* chooses which unflushed writes survive."""

    cut: int
    seed: int


@dataclass(frozen=True, slots=True)
class Recording:
    """What was recorded on a disk of *kind*, empty at first; retention kept *keep* versions."""

    kind: str
    keep: int
    empty_path: Path
    log_path: Path

    def records(self) -> list[Record]:
        """The log."""
        return read_log(self.log_path)


@dataclass(slots=True)
class Judged:
    """What came of a number of images. All but the first must be empty."""

    images: int = 0
    versions: int = 0
    lost: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    """Recovery that changed what is listed, left something to sweep, or found something else the second time."""
    unmountable: list[str] = field(default_factory=list)

    @property
    def findings(self) -> list[str]:
        """All that was found, each with its image."""
        return [
            f"{kind}: {finding}"
            for kind in ("lost", "torn", "unlike", "unmountable")
            for finding in getattr(self, kind)
        ]

    @property
    def broken(self) -> int:
        """How many findings there are."""
        return len(self.findings)

    def add(self, other: Judged) -> None:
        """Count *other* too."""
        self.images += other.images
        self.versions += other.versions
        self.lost += other.lost
        self.torn += other.torn
        self.unlike += other.unlike
        self.unmountable += other.unmountable


def every_prefix(records: Sequence[Record]) -> list[Image]:
    """The disk before each write, with all that went before, and before each flush, with nothing since the last one.

    These are the cuts at which most was promised, for what the disk holds.
    """
    images = [Image(len(records), ALL)]
    for at, record in enumerate(records):
        if record.kind == WRITE:
            images.append(Image(at, ALL))
        elif record.kind == FLUSH:
            images.append(Image(at, NONE))
    return images


def choose_images(records: Sequence[Record], number: int, seed: int) -> list[Image]:
    """About *number* images, no two alike: every prefix, or some of them if they are more than half, and random ones.

    There are fewer when the log does not allow for so many.
    """
    chosen = random.Random(seed)  # noqa: S311 - chooses disks, not secrets
    states = _States(records)
    prefixes = every_prefix(records)
    images = {states.of(image): image for image in chosen.sample(prefixes, min(len(prefixes), number // 2))}
    cuts = [at for at, record in enumerate(records) if record.kind in (WRITE, FLUSH) and states.pending(at)]
    for _ in range(_MOST_ATTEMPTS * number):
        if len(images) >= number:
            break
        image = Image(chosen.choice(cuts), chosen.randrange(1, 2**32))
        images.setdefault(states.of(image), image)
    return sorted(images.values())


class _States:
    """Tells whether two images are alike: the same bytes on the disk, and the same promises."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        self._flushed: list[int] = []
        """For each cut, how many records the last flush covers."""
        self._notes: list[int] = []
        flushed = notes = 0
        for at, record in enumerate([*records, Record(FLUSH, 0, b"")]):
            self._flushed.append(flushed)
            self._notes.append(notes)
            notes += record.kind == NOTE
            if record.kind == FLUSH:
                flushed = at + 1

    def pending(self, cut: int) -> Sequence[Record]:
        """The writes that a power cut may lose."""
        return [record for record in self._records[self._flushed[cut] : cut] if record.kind == WRITE]

    def of(self, image: Image) -> tuple[int, ...]:
        """Equal for images that are alike."""
        kept = _surviving(self.pending(image.cut), image.seed)
        sizes = [size_bytes for _, size_bytes in kept]
        while sizes and not sizes[-1]:
            sizes.pop()
        return self._flushed[image.cut], self._notes[image.cut], *sizes


def judge(recording: Recording, images: Iterable[Image], *, stop_at_first: bool = False) -> Judged:
    """Make and judge *images*, in the order of their cuts; with *stop_at_first* until one is not as promised."""
    judged = Judged()
    with _Replay(recording) as replay:
        for image in sorted(images):
            replay.judge(image, judged)
            if judged.broken and stop_at_first:
                break
    return judged


@contextmanager
def made(recording: Recording, image: Image) -> Iterator[Path]:
    """The folder of tier 1 on *image*, mounted for this process and for its children."""
    with _Replay(recording) as replay, replay.mounted(image) as root:
        yield root / TIER1


def judge_into(result_path: str, recording: Recording, images: list[Image]) -> None:
    """:func:`judge` in a process of its own, which leaves its result in a file."""
    Path(result_path).write_text(json.dumps(asdict(judge(recording, images))))


def read_result(path: Path) -> Judged:
    """What :func:`judge_into` left."""
    return Judged(**json.loads(path.read_text()))


def _surviving(pending: Sequence[Record], seed: int) -> list[tuple[Record, int]]:
    """What the disk has of the writes after its last flush: each with the bytes of it that survive, perhaps none."""
    if seed in (ALL, NONE):
        return [(record, 0 if seed == NONE else len(record.data)) for record in pending]
    chosen = random.Random(seed)  # noqa: S311 - as above
    share = chosen.choice(_KEPT_SHARES)
    surviving = []
    for record in pending:
        sectors = len(record.data) // _SECTOR_BYTES
        kept_bytes = len(record.data) if chosen.random() < share else 0
        if kept_bytes and sectors > 1 and record.offset >= _SUPERBLOCK_END and chosen.random() < _TORN_SHARE:
            kept_bytes = chosen.randrange(1, sectors) * _SECTOR_BYTES
        surviving.append((record, kept_bytes))
    return surviving


class _Replay:
    """One image in memory, made over and over again from the log."""

    def __init__(self, recording: Recording) -> None:
        self._keep = recording.keep
        self._kind = recording.kind
        self._records = recording.records()
        size_bytes = recording.empty_path.stat().st_size
        self._flushed = MemoryImage("flushed", size_bytes)
        self._flushed.load(recording.empty_path)
        self._image = MemoryImage("image", size_bytes)
        self._device = LoopDevice(self._image)
        self._tried, self._promised = _diary_of(self._records)
        self._contents = oracle.Contents()
        self._node = ""
        self._applied = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.close()
        self._image.close()
        self._flushed.close()

    def judge(self, image: Image, judged: Judged) -> None:
        """Mount *image* and add what is found to *judged*."""
        judged.images += 1
        promised = {version for cut, version in self._promised if cut <= image.cut}
        try:
            with self.mounted(image) as root:
                self._judge_mounted(root / TIER1, promised, str(tuple(image)), judged)
        except OSError as error:
            judged.unmountable.append(f"{tuple(image)}: {error}")
        except CairnError as error:
            judged.unlike.append(f"{tuple(image)}: recovery failed: {error}")

    @contextmanager
    def mounted(self, image: Image) -> Iterator[Path]:
        """The root of the disk on *image*; cuts must not go back."""
        self._make(image)
        with mounted(self._device, self._kind) as root:
            yield root

    def _make(self, image: Image) -> None:
        for at in range(self._applied, image.cut):
            if self._records[at].kind == FLUSH:
                for record in self._records[self._applied : at]:
                    if record.kind == WRITE:
                        os.pwrite(self._flushed.fd, record.data, record.offset)
                self._applied = at + 1
        self._image.make_like(self._flushed)
        pending = [record for record in self._records[self._applied : image.cut] if record.kind == WRITE]
        for record, size_bytes in _surviving(pending, image.seed):
            os.pwrite(self._image.fd, record.data[:size_bytes], record.offset)

    def _judge_mounted(self, path: Path, promised: set[VersionId], name: str, judged: Judged) -> None:
        if not path.exists():
            if promised:
                judged.lost.append(f"{name}: all of tier 1")
            return
        tier = LocalTier(OsFileSystem(), path)
        before = oracle.examine(path, JOB, self._tried, contents=self._contents)
        judged.versions += len(before.listed)
        judged.torn += [f"{name}: {what}: {why}" for what, why in before.torn.items()]
        judged.lost += [f"{name}: {version}" for version in sorted(oracle.lost(promised, before, self._keep))]
        self._judge_records(tier, bool(promised), name, judged)
        recovered = [_outcome(recovery.recover(tier)) for _ in range(2)]
        after = oracle.examine(path, JOB, self._tried, contents=self._contents)
        expected = oracle.Found(before.listed, {}, ())
        if after != expected and not before.torn:
            judged.unlike.append(f"{name}: {before} became {after}")
        if recovered[1] != (recovered[0][0], (), ()):
            judged.unlike.append(f"{name}: recovery found {recovered[0]}, and then {recovered[1]}")

    def _judge_records(self, tier: LocalTier, anything_promised: bool, name: str, judged: Judged) -> None:
        """The daemon's own small files: the tree's identity and the job's policy are there, and are the same ever."""
        try:
            node = str(decode(tier.read_small(layout.LAYOUT_KEY), NOTE_FORMAT, layout.LAYOUT_KEY)["node"])
            if anything_promised:
                decode(tier.read_small(layout.job_record(JOB)), NOTE_FORMAT, layout.job_record(JOB))
        except NotFoundError as error:
            if anything_promised:
                judged.lost.append(f"{name}: {error}")
            return
        if self._node and node != self._node:
            judged.unlike.append(f"{name}: node {self._node} became {node}")
        self._node = node


def _diary_of(records: Sequence[Record]) -> tuple[set[VersionId], list[tuple[int, VersionId]]]:
    """Versions that trainers began, and those promised, each with the number of records up to its promise."""
    tried: set[VersionId] = set()
    promised: list[tuple[int, VersionId]] = []
    for cut, record in enumerate(records, 1):
        if record.kind == NOTE:
            word, _, rest = record.data.decode().strip().partition(" ")
            if word == "tried":
                tried.add(parse_version(rest))
            elif word == "promised":
                promised.append((cut, parse_version(rest)))
    return tried, promised


def _outcome(found: recovery.Recovered) -> tuple[tuple[VersionId, ...], tuple[str, ...], tuple[str, ...]]:
    """What of a recovery can be compared with another one."""
    return (
        tuple(sorted(version.id for version in found.versions)),
        tuple(found.swept),
        tuple(key for key, _ in found.quarantined),
    )


def main() -> int:
    """Judge one image of a recording again: ``python -m tests.crash.block_replay FOLDER KIND KEEP CUT SEED``."""
    folder, kind, keep, cut, seed = sys.argv[1:]
    recording = Recording(kind, int(keep), Path(folder) / EMPTY_NAME, Path(folder) / LOG_NAME)
    judged = judge(recording, [Image(int(cut), int(seed))])
    sys.stdout.write(f"{json.dumps(asdict(judged), indent=1)}\n")
    return 1 if judged.broken else 0


if __name__ == "__main__":
    sys.exit(main())
