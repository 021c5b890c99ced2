"""What media do to files: bits flip, ranges turn to zeros, writes are cut short, go astray or never happen.

Nothing here goes through Cairn, and no fault changes a file's times: a disk that rots tells nobody.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

from cairnd.manifest import encode

_SECTOR_BYTES = 512
_PAGE_BYTES = 4096

Snapshot = Mapping[str, bytes]
"""The files of a tree by their path below its root."""

Change = Callable[[Random, bytes], bytes]


def snapshot(root: Path) -> dict[str, bytes]:
    """All files below *root*; links and what is no file are passed over."""
    paths = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
    return {
        str(path.relative_to(root)): path.read_bytes() for path in paths if path.is_file() and not path.is_symlink()
    }


def reset(root: Path, wanted: Snapshot) -> None:
    """Make the files below *root* those of *wanted*. Empty folders may stay."""
    present = snapshot(root)
    for name in present.keys() - wanted.keys():
        (root / name).unlink()
    for name, data in wanted.items():
        if present.get(name) != data:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_bytes(data)


def overwrite(path: Path, data: bytes) -> None:
    """Give the file other bytes in the same place, as the medium would: inode, mode and times stay."""
    before = path.stat()
    fd = os.open(path, os.O_WRONLY)
    try:
        os.ftruncate(fd, len(data))
        os.pwrite(fd, data, 0)
    finally:
        os.close(fd)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap(first: Path, second: Path) -> None:
    """Exchange the bytes of two files: two writes that went to each other's place."""
    one, other = first.read_bytes(), second.read_bytes()
    overwrite(first, other)
    overwrite(second, one)


def _span(random: Random, data: bytes) -> tuple[int, int]:
    """A range of *data*: often a sector or a page, sometimes a few bytes, sometimes any."""
    length = min(
        len(data), random.choice((random.randint(1, 8), _SECTOR_BYTES, _PAGE_BYTES, random.randint(1, 20_000)))
    )
    start = random.randrange(len(data) - length + 1)
    return start, start + length


def flip_bit(random: Random, data: bytes) -> bytes:
    """One bit."""
    changed = bytearray(data)
    changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def zero_range(random: Random, data: bytes) -> bytes:
    """A range reads as zeros."""
    start, end = _span(random, data)
    return data[:start] + bytes(end - start) + data[end:]


def randomise_range(random: Random, data: bytes) -> bytes:
    """A range reads as anything."""
    start, end = _span(random, data)
    return data[:start] + random.randbytes(end - start) + data[end:]


def cut(random: Random, data: bytes) -> bytes:
    """The file ends early, perhaps at once."""
    return data[: random.choice((0, len(data) - 1, random.randrange(len(data))))]


def extend(random: Random, data: bytes) -> bytes:
    """The file goes on."""
    return data + random.choice((bytes(1), bytes(_SECTOR_BYTES), random.randbytes(random.randint(1, 5000)), data))


def never_written(random: Random, data: bytes) -> bytes:
    """From some page on, what the file held before it was written: the zeros of reserved space."""
    start = random.randrange(-(-len(data) // _PAGE_BYTES)) * _PAGE_BYTES
    return data[:start] + bytes(len(data) - start)


def swap_blocks(random: Random, data: bytes, block_bytes: int = _PAGE_BYTES) -> bytes:
    """Two blocks inside the file change places; what is too short for that loses a bit."""
    count = len(data) // block_bytes
    if count < 2:
        return flip_bit(random, data)
    first, second = sorted(random.sample(range(count), 2))
    blocks = [data[at : at + block_bytes] for at in range(0, len(data), block_bytes)]
    blocks[first], blocks[second] = blocks[second], blocks[first]
    return b"".join(blocks)


CHANGES: Mapping[str, Change] = {
    "bit flipped": flip_bit,
    "range zeroed": zero_range,
    "range randomised": randomise_range,
    "cut": cut,
    "extended": extend,
    "never written": never_written,
    "blocks swapped": swap_blocks,
}
"""What happens to one file by itself. Each may come out equal by chance; who needs damage draws again."""

DATA_FIELDS = ("digest", "size")
FIELDS = (*DATA_FIELDS, "path", "ranks", "world", "version")


def edit(random: Random, data: bytes, fields: Sequence[str], *, sound: bool) -> bytes:
    """A manifest that states another value in one of *fields*; *sound*: with a checksum that is true of it."""
    document = json.loads(data)
    checksum = document.pop("crc64nvme")
    part = random.choice(document["partitions"])
    field = random.choice(fields)
    if field == "digest":
        part["blocks"][random.randrange(len(part["blocks"]))] = f"{random.getrandbits(64):016x}"
    elif field == "size":
        part["size_bytes"] += random.choice((-1, 1, _PAGE_BYTES))
    elif field == "path":
        part["path"] += ".old"
    elif field == "ranks":
        document["ranks"] = random.choice(([], [*document["ranks"], len(document["ranks"])]))
    elif field == "world":
        document["world_size"] += 1
    else:
        document["version"] = f"e99999-s000001-{random.randrange(1000)}"
    if sound:
        return encode(document)
    return json.dumps({**document, "crc64nvme": checksum}, sort_keys=True, separators=(",", ":")).encode()
