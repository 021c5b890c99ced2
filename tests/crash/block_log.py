"""A disk whose every write and flush is written down: one file served through ``/dev/fuse``, with its log beside it.

``python -m tests.crash.block_log <mount point> <image> <log>`` mounts a folder with three files:

* ``disk``: the image. With a loop device on it, each write that the kernel sends to the disk is a :class:`Record`, and
  each cache flush that it asks for arrives as an fsync and is one too.
* ``diary``: what is appended here becomes a record as well, so that the order of what a client was told and of what
  the disk was told is one order.
* ``control``: takes ``write N``, ``flush N``, ``bytes HEX`` or ``off``: the N-th write or flush from then on, or the
  first write that holds these bytes, or none, fails with EIO, once. A failed write stores nothing.

The loop device sends one request at a time and the server answers one at a time, so a flush covers exactly the writes
before it in the log. The protocol is spoken by hand (linux/fuse.h, version 7.31, a stable interface of the kernel): the
few requests that a loop device makes need no library and no package.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

_Bytes = bytes | memoryview

DISK, DIARY, CONTROL = "disk", "diary", "control"

_HEADER = struct.Struct("<cQI")
"""Of a record in the log file: kind, offset, length of what follows."""

WRITE, FLUSH, NOTE, REFUSED = b"W", b"F", b"N", b"E"


class Record(NamedTuple):
    """One event of the log. ``offset`` and ``data`` are of writes; notes have their text in ``data``."""

    kind: bytes
    offset: int
    data: bytes


def read_log(path: Path) -> list[Record]:
    """All records of a log in the order of events. A torn last one (the server was killed) is left out."""
    raw = path.read_bytes()
    records = []
    at = 0
    while at + _HEADER.size <= len(raw):
        kind, offset, length = _HEADER.unpack_from(raw, at)
        at += _HEADER.size
        if at + length > len(raw):
            break
        records.append(Record(kind, offset, raw[at : at + length]))
        at += length
    return records


class _Op(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    RELEASEDIR = 29
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


_UNANSWERED = frozenset({_Op.FORGET, _Op.BATCH_FORGET, _Op.INTERRUPT})
_REQUEST = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, ...
_REPLY = struct.Struct("<IiQ")  # length, negative errno, unique
_INIT = struct.Struct("<IIIIHHIIHH32x")
_ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("<QQQQII")
_OPEN = struct.Struct("<QIi")
_TRANSFER = struct.Struct("<QQIIQII")  # fuse_read_in and fuse_write_in: handle, offset, size, ...
_STATFS = struct.Struct("<QQQQQIIII24x")

_VERSION = (7, 31)
_MAX_PAGES_FLAG, _BIG_WRITES_FLAG = 1 << 22, 1 << 5
_MOST_BYTES = 1024 * 1024
_MOST_PAGES = _MOST_BYTES // 4096
_DIRECT_IO = 1  # FOPEN_DIRECT_IO: neither diary nor control is cached
_FOR_EVER_S = 10**6

_ROOT = 1
_NODES = {2: DISK, 3: DIARY, 4: CONTROL}
_NUMBERS = {name: number for number, name in _NODES.items()}


class BlockServer:
    """Answers the kernel's requests about the three files until the folder is unmounted."""

    def __init__(self, device: int, image: int, log: int) -> None:
        """*device* is an open and mounted ``/dev/fuse``; *image* and *log* are open files."""
        self._device = device
        self._image = image
        self._log = log
        self._size_bytes = os.fstat(image).st_size
        self._diary = bytearray()
        self._countdown: dict[bytes, int] = {}
        self._pattern = b""
        self._end = -1
        """Where the last write ended; one that goes on there is its rest: loop devices overlook that a rest failed."""
        self._handlers: dict[int, Callable[[int, memoryview], _Bytes]] = {
            _Op.INIT: self._init,
            _Op.LOOKUP: self._lookup,
            _Op.GETATTR: lambda node, _: struct.pack("<QII", 0, 0, 0) + self._attributes(node),
            _Op.SETATTR: lambda node, _: struct.pack("<QII", 0, 0, 0) + self._attributes(node),
            _Op.OPEN: lambda node, _: _OPEN.pack(node, 0 if _NODES[node] == DISK else _DIRECT_IO, 0),
            _Op.OPENDIR: lambda node, _: _OPEN.pack(node, 0, 0),
            _Op.READ: self._read,
            _Op.WRITE: self._write,
            _Op.FSYNC: self._fsync,
            _Op.STATFS: lambda *_: _STATFS.pack(0, 0, 0, 0, 0, 4096, 255, 4096, 0),
            _Op.FLUSH: lambda *_: b"",
            _Op.RELEASE: lambda *_: b"",
            _Op.RELEASEDIR: lambda *_: b"",
            _Op.DESTROY: lambda *_: b"",
        }

    def serve(self) -> None:
        """Answer until the folder is unmounted."""
        while True:
            try:
                request = os.read(self._device, _MOST_BYTES + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.EINTR, errno.ENOENT):  # ENOENT: the request was interrupted
                    continue
                raise
            _, operation, unique, node, *_ = _REQUEST.unpack_from(request)
            if operation in _UNANSWERED:
                continue
            try:
                handler = self._handlers.get(operation)
                if handler is None:
                    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
                self._answer(unique, 0, handler(node, memoryview(request)[_REQUEST.size :]))
            except OSError as error:
                self._answer(unique, -(error.errno or errno.EIO), b"")

    def _answer(self, unique: int, status: int, body: _Bytes) -> None:
        size_bytes = _REPLY.size + len(memoryview(body))
        with suppress(FileNotFoundError):  # who asked was killed meanwhile
            os.writev(self._device, [_REPLY.pack(size_bytes, status, unique), body])

    def _init(self, _node: int, body: memoryview) -> bytes:
        _, _, readahead_bytes, offered = struct.unpack_from("<IIII", body)
        flags = offered & (_MAX_PAGES_FLAG | _BIG_WRITES_FLAG)
        return _INIT.pack(*_VERSION, readahead_bytes, flags, 16, 12, _MOST_BYTES, 1, _MOST_PAGES, 0)

    def _lookup(self, node: int, body: memoryview) -> bytes:
        number = _NUMBERS.get(bytes(body).rstrip(b"\0").decode())
        if node != _ROOT or number is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return _ENTRY.pack(number, 0, _FOR_EVER_S, 0, 0, 0) + self._attributes(number)

    def _attributes(self, node: int) -> bytes:
        size_bytes = {DISK: self._size_bytes, DIARY: len(self._diary)}.get(_NODES.get(node, ""), 0)
        mode = stat.S_IFDIR | 0o700 if node == _ROOT else stat.S_IFREG | 0o600
        return _ATTRIBUTES.pack(node, size_bytes, -(-size_bytes // 512), *[0] * 6, mode, 1, 0, 0, 0, 4096, 0)

    def _read(self, node: int, body: memoryview) -> _Bytes:
        _, offset, length, *_ = _TRANSFER.unpack_from(body)
        if _NODES[node] == DISK:
            return os.pread(self._image, length, offset)
        return bytes(self._diary[offset : offset + length]) if _NODES[node] == DIARY else b""

    def _write(self, node: int, body: memoryview) -> bytes:
        _, offset, length, *_ = _TRANSFER.unpack_from(body)
        data = body[_TRANSFER.size : _TRANSFER.size + length]
        if _NODES[node] == DISK:
            if offset != self._end:
                self._check_refusal(WRITE, data)
            self._end = offset + length
            os.pwrite(self._image, data, offset)
            self._note(WRITE, offset, data)
        elif _NODES[node] == DIARY:
            self._diary += data
            self._note(NOTE, 0, data)
        else:
            self._arm(bytes(data).decode())
        return struct.pack("<II", length, 0)

    def _fsync(self, node: int, _body: memoryview) -> bytes:
        if _NODES.get(node) == DISK:
            self._check_refusal(FLUSH, memoryview(b""))
            self._end = -1
            self._note(FLUSH, 0, b"")
        return b""

    def _arm(self, command: str) -> None:
        word, _, value = command.strip().partition(" ")
        self._countdown.clear()
        self._pattern = b""
        if word == "bytes":
            self._pattern = bytes.fromhex(value)
        elif word in ("write", "flush"):
            self._countdown[WRITE if word == "write" else FLUSH] = int(value)
        elif word != "off":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def _check_refusal(self, kind: bytes, data: memoryview) -> None:
        if kind in self._countdown:
            self._countdown[kind] -= 1
            refused = self._countdown[kind] == 0
        else:
            refused = bool(self._pattern) and kind == WRITE and self._pattern in bytes(data)
        if refused:
            self._countdown.clear()
            self._pattern = b""
            self._note(REFUSED, 0, kind)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _note(self, kind: bytes, offset: int, data: _Bytes) -> None:
        os.writev(self._log, [_HEADER.pack(kind, offset, len(memoryview(data))), data])


def _mount(device: int, mount_point: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode={stat.S_IFDIR:o},user_id={os.getuid()},group_id={os.getgid()}"
    nosuid_nodev = 2 | 4
    if libc.mount(b"block-log", mount_point.encode(), b"fuse", ctypes.c_ulong(nosuid_nodev), options.encode()):
        raise OSError(ctypes.get_errno(), f"mount of {mount_point}: {os.strerror(ctypes.get_errno())}")


def main() -> int:
    """Mount, say ``ready`` on standard output, serve until unmounted."""
    mount_point, image_path, log_path = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C is for the test, which unmounts
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    image = os.open(image_path, os.O_RDWR | os.O_CLOEXEC)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    _mount(device, mount_point)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    BlockServer(device, image, log).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
