"""Attacks with descriptors, buffers, tables and counts."""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

from cairn_api.v1 import save_pb2, types_pb2
from cairn_api.wire import pack_column
from tests.daemon.lab import memfd
from tests.hostile.attacker import PAGE, Attack, Attacker
from tests.hostile.peer import GoneError

_MANY = 1_000_000


def _memfd(size_bytes: int = PAGE, *, flags: int = os.MFD_ALLOW_SEALING, reserved: bool = True) -> int:
    fd = os.memfd_create("test", flags | os.MFD_CLOEXEC)
    if reserved:
        os.posix_fallocate(fd, 0, size_bytes)
    else:
        os.ftruncate(fd, size_bytes)
    return fd


def _sealed(seals: int) -> int:
    fd = _memfd()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _reopened(flags: int) -> int:
    fd = _memfd()
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    finally:
        os.close(fd)


def _file(folder: str) -> int:
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.posix_fallocate(fd, 0, PAGE)
    return fd


def _pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


NOT_BUFFERS: Mapping[str, Callable[[], int]] = {
    "a file": lambda: _file(tempfile.gettempdir()),
    "a file of tmpfs": lambda: _file("/dev/shm"),  # noqa: S108 - without a name
    "a pipe": _pipe,
    "a folder": lambda: os.open("/", os.O_RDONLY),
    "a device": lambda: os.open("/dev/zero", os.O_RDWR),
    "a socket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).detach(),
    "an eventfd": lambda: os.eventfd(1),
    "an epoll": lambda: _detached(select.epoll()),
    "a pidfd": lambda: os.pidfd_open(os.getpid()),
    "a memfd that cannot be sealed": lambda: _memfd(flags=0),
    "a memfd whose seals are sealed": lambda: _sealed(fcntl.F_SEAL_SEAL),
    "a memfd that nobody may write": lambda: _sealed(fcntl.F_SEAL_WRITE),
    "a memfd that is too small": lambda: _memfd(PAGE // 2),
    "a memfd that is too large": lambda: _memfd(2 * PAGE),
    "an empty memfd": lambda: _memfd(0, reserved=False),
    "a memfd with holes": lambda: _memfd(reserved=False),
    "a memfd for reading": lambda: _reopened(os.O_RDONLY),
    "a path of a memfd": lambda: _reopened(os.O_PATH),
}


def _detached(poll: select.epoll) -> int:
    fd = os.dup(poll.fileno())
    poll.close()
    return fd


def offers_what_is_no_buffer(a: Attacker) -> None:
    """Anything but a whole, sealable memfd of the granted size is refused."""
    a.join()
    what = a.chance.choice(tuple(NOT_BUFFERS))
    fd = NOT_BUFFERS[what]()
    try:
        assert not a.offer(fd), f"{what} was accepted"
    finally:
        os.close(fd)


def changes_its_size_afterwards(a: Attacker) -> None:
    """Once it is accepted nobody can shrink, grow or map it anew for writing."""
    a.join()
    fd = memfd(b"x" * 500)
    try:
        assert a.offer(fd)
        attempts: tuple[Callable[[], object], ...] = (
            lambda: os.ftruncate(fd, 0),
            lambda: os.ftruncate(fd, 2 * PAGE),
            lambda: os.pwrite(fd, b"y", 0),
            lambda: mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
            lambda: os.posix_fallocate(fd, 0, 2 * PAGE),
        )
        for attempt in attempts:
            try:
                attempt()
            except PermissionError:
                continue
            raise AssertionError("an accepted buffer could be changed")
    finally:
        os.close(fd)


def shrinks_while_it_is_offered(a: Attacker) -> None:
    """A race between the daemon's checks and the owner's ftruncate."""
    a.join()
    fd = memfd(size_bytes=64 * PAGE)
    ended = threading.Event()

    def shrink() -> None:
        while not ended.is_set():
            with suppress(OSError):
                os.ftruncate(fd, 0)
                os.posix_fallocate(fd, 0, 64 * PAGE)

    racing = threading.Thread(target=shrink)
    racing.start()
    try:
        for _ in range(5):
            segment = a.offer(fd, 64 * PAGE)
            if segment:
                a.create()
                a.seal(segment, size_bytes=64 * PAGE)
                a.prepare()
                a.commit()
                break
    finally:
        ended.set()
        racing.join()
        os.close(fd)


def writes_after_publishing(a: Attacker) -> None:
    """An older mapping cannot be taken away: its owner can damage its own checkpoint, and nothing else."""
    a.join()
    size_bytes = 256 * PAGE
    fd = memfd(size_bytes=size_bytes)
    memory = mmap.mmap(fd, size_bytes)
    ended = threading.Event()

    def scribble() -> None:
        while not ended.is_set():
            memory[a_place()] = 7

    def a_place() -> int:
        return int.from_bytes(os.urandom(4)) % size_bytes

    try:
        segment = a.offer(fd, size_bytes)
        assert segment
        a.create()
        scribbling = threading.Thread(target=scribble)
        scribbling.start()
        try:
            records = save_pb2.RecordTable(
                offsets=pack_column([64]), lengths=pack_column([size_bytes - 4096]),
                descriptor_crc_offsets=pack_column([size_bytes - 2048]),
                directory_crc_offsets=pack_column([size_bytes - 64]),
            )  # fmt: skip
            a.seal(segment, size_bytes=size_bytes, records=records, digests=pack_column([64, 1000, 1, 1]))
            a.prepare()
            a.commit()
            wait = save_pb2.WaitRequest(job=a.job, id=a.id, durability=types_pb2.DURABILITY_TIER1, timeout_s=10)
            a.call("Wait", wait)
        finally:
            ended.set()
            scribbling.join()
    finally:
        memory.close()
        os.close(fd)


def sends_too_many_descriptors(a: Attacker) -> None:
    """Of 0 to 253 descriptors in one message none stays open."""
    a.join()
    count = a.chance.choice((0, 2, 4, 5, 64, 253))
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    try:
        with suppress(GoneError):
            request = {"op": "offer", "segment": a.name(), "size": PAGE, "grant": a.grant()}
            assert count <= 1 or not a.asked(request, fds)
        with suppress(GoneError):
            a.asked({"op": "end_hold", "hold": "x"}, fds)
    finally:
        for fd in fds:
            os.close(fd)


def lies_about_sizes(a: Attacker) -> None:
    """Sizes that are no sizes, in a grant, an offer and a partition."""
    a.join()
    for size_bytes in (0, 1, PAGE - 1, 2**40, 2**63, 2**64 - PAGE):
        a.refused("Grant", save_pb2.GrantRequest(job=a.job, size_bytes=size_bytes))
    fd = memfd()
    try:
        for size in (0, -1, PAGE - 1, 2 * PAGE, 2**63, 2**70, "x", None, [1], 1e999, True):
            assert not a.offer(fd, size=size)  # the grant is for one page
        for name in ("", "x", "../x", "0" * 31, "G" * 32, 5, None):
            assert not a.offer(fd, segment=name)
    finally:
        os.close(fd)
    a.create()
    segment = a.share()
    for size_bytes in (0, PAGE + 1, 2**40, 2**64 - 1):
        assert a.seal(segment, size_bytes=size_bytes) is None


def takes_all_memory_and_leaves(a: Attacker) -> None:
    """As many grants and buffers as it is given, dropped at once with the connection."""
    a.join()
    for _ in range(a.chance.choice((5, 40))):
        if a.chance.random() < 0.5:
            a.grant(a.chance.choice((PAGE, 2**20)))
        else:
            a.share()


def counts_too_high(a: Attacker) -> None:
    """Worlds, ranks, names and texts far beyond any training."""
    a.join()
    for world_size in (0, 2**31, 2**32 - 1):
        assert a.create(world_size=world_size) is None
        claim = save_pb2.ClaimEpochRequest(
            job=a.job, epoch=a.id.epoch + 1, nonce="n", world_size=world_size, claim=True
        )
        a.refused("ClaimEpoch", claim)
    for epoch in (0, 999_999_999, 2**32 - 1):
        claim = save_pb2.ClaimEpochRequest(job=a.job, epoch=epoch, nonce="n", world_size=1, claim=True)
        a.refused("ClaimEpoch", claim)
    assert a.create(rank=1) is None
    assert a.create(id=types_pb2.VersionId(epoch=a.id.epoch, sequence=2**32 - 1, tag="t")) is None
    match a.chance.randrange(8):
        case 0:
            assert a.create(id=types_pb2.VersionId(epoch=a.id.epoch, sequence=1, tag="t" * _MANY)) is None
        case 1:
            assert a.create(save_dir="x" * _MANY) is None
        case 2:
            assert a.create(attributes={str(number): "x" * 1000 for number in range(10_000)}) is None
        case 3:
            assert a.create(node_ranks=range(5 * _MANY)) is None
        case 4:
            a.create()
            assert a.prepare(names=tuple(f"n{number}" for number in range(_MANY // 4))) is None
        case 5:
            a.create()
            a.seal(a.share())
            a.prepare()
            shared = [save_pb2.SharedName(name=f"n{number}", rank=number) for number in range(200_000)]
            a.commit(shared_names=shared)
        case 6:
            a.create()
            assert a.seal(a.share(), globals=["x" * 1000] * 20_000) is None
        case _:
            a.create(world_size=_MANY)
            assert a.prepare((), rank=2**32 - 1) is None
    reason = save_pb2.AbortRequest(job=a.job, id=a.id, reason="because\n" * _MANY)
    a.call("Abort", reason)


def lies_in_record_tables(a: Attacker) -> None:
    """Records that overlap, descend, leave the partition or are too many; checksums for places that are none."""
    a.join()
    a.create()
    size_bytes = 64 * PAGE
    segment = a.share(size_bytes=size_bytes)
    good = ([64, 1000], [100, 100], [200, 1200], [3000, 3010])
    tables: tuple[tuple[list[int], list[int], list[int], list[int]], ...] = (
        ([64, 100], [100, 100], [0, 0], [0, 0]), ([1000, 64], [100, 100], [0, 0], [0, 0]),
        ([64], [2**64 - 1], [0], [0]), ([2**64 - 1], [1], [0], [0]), ([64], [100], [70], [0]),
        ([64], [100], [200], [200]),
        ([64], [100], [2**64 - 2], [0]), ([64, 65], [0], [0], [0]), ([64], [100], [200, 0], [0]), ([64], [100], [], []),
        ([0] * _MANY, [0] * _MANY, [0] * _MANY, [0] * _MANY), ([0] * (_MANY + 1), [0], [0], [0]),
    )  # fmt: skip
    offsets, lengths, descriptors, directory = a.chance.choice(tables)
    bad = save_pb2.RecordTable(
        offsets=pack_column(offsets), lengths=pack_column(lengths), descriptor_crc_offsets=pack_column(descriptors),
        directory_crc_offsets=pack_column(directory),
    )  # fmt: skip
    assert a.seal(segment, size_bytes=size_bytes, records=bad) is None
    assert a.seal(segment, size_bytes=size_bytes, records=save_pb2.RecordTable(offsets=b"1234567")) is None
    records = save_pb2.RecordTable(
        offsets=pack_column(good[0]), lengths=pack_column(good[1]), descriptor_crc_offsets=pack_column(good[2]),
        directory_crc_offsets=pack_column(good[3]),
    )  # fmt: skip
    for digests in ([64], [0, 10, 1, 1], [64, 101, 1, 1], [64, 0, 1, 1], [64, 2**64 - 1, 1, 1], [64, 50, 1, 2**32],
                    [64, 50, 1, 1, 100, 50, 1, 1], [150, 900, 1, 1], [64, 1, 1, 1] * 5):  # fmt: skip
        assert a.seal(segment, size_bytes=size_bytes, records=records, digests=pack_column(digests)) is None
    # In the right places, but not of these bytes: found out when the piece is read again.
    a.seal(segment, size_bytes=size_bytes, records=records, digests=pack_column([64, 100, 7, 7]))
    a.prepare()
    a.commit()


MEMORY_ATTACKS: tuple[Attack, ...] = (
    offers_what_is_no_buffer, offers_what_is_no_buffer, offers_what_is_no_buffer, changes_its_size_afterwards,
    shrinks_while_it_is_offered, writes_after_publishing, sends_too_many_descriptors, lies_about_sizes,
    takes_all_memory_and_leaves, counts_too_high, counts_too_high, lies_in_record_tables, lies_in_record_tables,
)  # fmt: skip
