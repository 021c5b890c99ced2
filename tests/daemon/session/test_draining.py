"""From sealed to tier 1: digest and write at the same time, the operator's limits, and what a failure leaves alone."""

from __future__ import annotations

import asyncio
import errno
import gc
import hashlib
import os
import threading
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from awscrt.checksums import crc64nvme

from cairn_api.errors import SaveFailedError
from cairn_api.names import VersionId
from cairnd.digests import BLOCK_BYTES, digest_of
from cairnd.model import VersionState
from cairnd.records import PieceDigests, RecordTable
from cairnd.sealing import SealingPass
from cairnd.session.draining import WRITE_BYTES
from cairnd.session.throttle import Throttle
from tests.clock import ManualClock
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import Lab, Rank, eventually, gone, held_fds, state
from tests.daemon.tiers.rigged import RiggedFileSystem, failing

PATIENCE_S = 20.0
MIB = 1024 * 1024


def noise(size_bytes: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(b"%d" % seed).digest(size_bytes)


async def begin(rank: Rank, parts: dict[str, bytes], **known: Any) -> VersionId:
    """A save up to sealed; it is being written when this returns."""
    version = rank.next()
    rank.create(version)
    for name, data in parts.items():
        rank.seal(version, name, data, **known)
    await rank.prepare(version, list(parts))
    rank.commit(version)
    return version


@pytest.mark.parametrize("threads", [1, 2, 5])
async def test_any_number_of_threads_writes_the_same_bytes_and_digests(make_lab: MakeLab, threads: int) -> None:
    lab = await make_lab(drain_threads=threads, capture_memory_bytes=256 * MIB)
    (rank,) = await Rank.launch(lab)
    sizes = (1, 4096, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES - 4097)
    parts = {f"part-{number}": noise(size, number) for number, size in enumerate(sizes)}
    version = await rank.save(parts)
    for partition in lab.version(version).partitions:
        assert lab.file(version, partition.name).read_bytes() == parts[partition.name]
        assert partition.digest == digest_of([memoryview(parts[partition.name])])


class OneAhead(RiggedFileSystem):
    """Ends no write before all that is written next was sealed; three writes."""

    def __init__(self, root: Path, digested: threading.Semaphore) -> None:
        super().__init__(root)
        self._digested = digested
        self.met = 0

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        if len(data) == WRITE_BYTES and offset < 2 * WRITE_BYTES:
            self.met += self._digested.acquire(timeout=PATIENCE_S)
        return super().pwrite(fd, data, offset)


async def test_what_is_written_next_is_sealed_meanwhile(make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = await make_lab(capture_memory_bytes=512 * MIB)
    digested = threading.Semaphore(0)
    process = SealingPass.process

    def told(sealing: SealingPass, block: memoryview, offset: int) -> None:
        process(sealing, block, offset)
        if offset >= WRITE_BYTES and (offset + len(block)) % WRITE_BYTES == 0:
            digested.release()

    monkeypatch.setattr(SealingPass, "process", told)
    lab.app.tier1._fs = fs = OneAhead(lab.tier1, digested)
    (rank,) = await Rank.launch(lab)
    data = bytes(3 * WRITE_BYTES)
    version = await rank.save({"model.pt": data})
    assert fs.met == 2
    assert lab.file(version, "model.pt").read_bytes() == data


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
async def test_one_partition_that_fails_ends_the_version_and_holds_nothing(
    make_lab: MakeLab, threads: int, call: str
) -> None:
    lab = await make_lab(drain_threads=threads, capture_memory_bytes=256 * MIB)
    gc.collect()
    before = held_fds(lab.tier1)
    (rank,) = await Rank.launch(lab)
    lab.app.tier1._fs = RiggedFileSystem(lab.tier1, failing(call, errno.EIO, nth=2))
    version = await begin(rank, {"a": noise(2 * BLOCK_BYTES), "b": noise(2 * BLOCK_BYTES), "c": b"c"})
    await eventually(lambda: state(lab, version) is VersionState.ABORTED)
    await eventually(lambda: gone(lab, version))
    (failure,) = rank.client.take_failures()
    assert isinstance(failure, SaveFailedError)
    await lab.app.saves.discarded()
    while lab.app.memory.segments:
        lab.app.memory.release(next(iter(lab.app.memory.segments.values())))
    lab.app.memory.wait_unmapped()
    # Collected, because the rigged file system's frame holds the error that it raised, with its views.
    await eventually(lambda: gc.collect() >= 0 and held_fds(lab.tier1) == before)
    following = await rank.save({"a": b"next"})
    assert lab.file(following, "a").read_bytes() == b"next"


async def test_a_limit_spaces_the_writes_out(make_lab: MakeLab) -> None:
    """5 MiB at 1 MiB/s, in steps of 1 MiB: the first at once, each of the others a second later."""
    lab = await make_lab(tier1_write_bytes_per_s=MIB)
    lab.app.tier1._fs = fs = RiggedFileSystem(lab.tier1)
    (rank,) = await Rank.launch(lab)
    data = noise(5 * MIB)

    def writes() -> int:
        return sum(1 for call, name in fs.calls if call == "pwrite" and "/incoming/" in f"/{name}")

    sleepers = lab.clock.sleepers
    version = await begin(rank, {"model.pt": data})
    for second in range(1, 5):
        await eventually(lambda: lab.clock.sleepers > sleepers)
        await eventually(lambda done=second: writes() == done)  # type: ignore[misc]
        await lab.settle()
        assert writes() == second
        assert state(lab, version) is VersionState.SEALED
        lab.clock.advance(0.5)
        await lab.settle()
        assert writes() == second
        lab.clock.advance(0.5)
    await eventually(lambda: state(lab, version) is VersionState.COMMITTED)
    assert lab.file(version, "model.pt").read_bytes() == data


def captured(size_bytes: int) -> tuple[bytes, RecordTable, PieceDigests]:
    """One record between two ribs, and what a client digests of it while it copies."""
    data = noise(size_bytes)
    first, last = 64, size_bytes - 64
    edges = [first, *range(4 * MIB, last, 4 * MIB), last]
    rows = [
        (start, stop - start, crc64nvme(data[start:stop]), zlib.crc32(data[start:stop]))
        for start, stop in pairwise(edges)
    ]
    return data, RecordTable([first], [last - first], [0], [0]), PieceDigests([item for row in rows for item in row])


@pytest.mark.parametrize("bytes_per_s", [0, 30 * MIB])
async def test_what_clients_digested_is_put_together_whatever_the_steps_of_the_writes(
    make_lab: MakeLab, bytes_per_s: int
) -> None:
    lab = await make_lab(tier1_write_bytes_per_s=bytes_per_s, capture_memory_bytes=256 * MIB)
    (rank,) = await Rank.launch(lab)
    data, records, digests = captured(70 * MIB + 5)
    version = await begin(rank, {"model.pt": data}, records=records, digests=digests)
    while state(lab, version) is VersionState.SEALED:
        lab.clock.advance(0.05)
        await lab.settle()
    assert lab.file(version, "model.pt").read_bytes() == data
    (partition,) = lab.version(version).partitions
    assert partition.digest == digest_of([memoryview(data)])


@pytest.mark.parametrize("one_in", [1, 2])
async def test_bytes_that_a_client_did_not_digest_end_the_version_when_they_are_checked(
    make_lab: MakeLab, one_in: int
) -> None:
    lab = await make_lab(recheck_one_in=one_in, capture_memory_bytes=256 * MIB)
    (rank,) = await Rank.launch(lab)
    data, records, digests = captured(20 * MIB)
    damaged = bytearray(data)
    damaged[9 * MIB] ^= 1  # in the third of five pieces: with one in two, the turn of every other save
    ends = []
    for _ in range(2):
        version = await begin(rank, {"model.pt": bytes(damaged)}, records=records, digests=digests)
        await eventually(lambda version=version: state(lab, version) is not VersionState.SEALED)  # type: ignore[misc]
        ends.append(state(lab, version))
    noticed = [end is VersionState.ABORTED for end in ends]
    assert noticed == [True, True] if one_in == 1 else sorted(noticed) == [False, True]
    for failure in rank.client.take_failures():
        assert "not what its client copied" in failure.message


async def test_a_throttle_saves_nothing_up_while_idle_and_zero_is_no_limit() -> None:
    clock = ManualClock()
    throttle = Throttle(clock, 100)
    await throttle.take(50)
    clock.advance(60)
    await throttle.take(200)  # at once, although it is more than a second's worth
    waiting = asyncio.ensure_future(throttle.take(1))
    for advance_s, done in ((1.9, False), (0.2, True)):
        clock.advance(advance_s)
        for _ in range(3):
            await asyncio.sleep(0)
        assert waiting.done() is done
        if not done:
            assert clock.sleepers == 1
    free = Throttle(clock, 0)
    for _ in range(3):
        await free.take(10**12)


async def test_a_repeated_record_table_is_checked_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    (rank,) = await Rank.launch(lab)
    data = bytes(100)
    checked: list[RecordTable] = []
    check = RecordTable._check

    def counted(table: RecordTable, size_bytes: int) -> None:
        checked.append(table)
        check(table, size_bytes)

    monkeypatch.setattr(RecordTable, "_check", counted)
    segment = rank.offer(data)
    version = rank.next()
    rank.create(version)
    for end in (20, 20, 21, 21):  # the same call comes again, as after a reconnection
        lab.app.saves.seal(
            rank.client, version, rank=0, name="model.pt", segment_name=segment.name, size_bytes=len(data),
            records=RecordTable([10], [end - 10], [30], [60]), globals_=(), digests=PieceDigests(),
        )  # fmt: skip
    assert [table.lengths[0] for table in checked] == [10, 11]


def in_page_cache(path: Path) -> bool:
    """Whether a read of the file's start would be answered from memory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(4096)], 0, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


async def test_neither_tier1_nor_the_folder_bucket_fills_the_page_cache(lab: Lab, tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.write_bytes(noise(MIB))
    fd = os.open(probe, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    try:
        if in_page_cache(probe):
            pytest.skip("NOT PROVED HERE: this file system is memory")
        os.close(os.open(probe, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"NOT PROVED HERE: {error}")
    (rank,) = await Rank.launch(lab)
    version = await rank.save({"model.pt": noise(BLOCK_BYTES + 5)}, persist=True)
    await eventually(lambda: lab.object(version, "model.pt").exists())
    assert not in_page_cache(lab.file(version, "model.pt"))
    assert not in_page_cache(lab.object(version, "model.pt"))
    assert lab.object(version, "model.pt").read_bytes() == noise(BLOCK_BYTES + 5)
