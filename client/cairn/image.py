"""A partition in this process's memory: mapped without a copy, or read into memory of its own, and unpickled there.

The image of a partition is its zip file, byte for byte. Tensors are views of it, so that one mapping or one read serves
all of them; what is touched for the first time costs a page fault, and nothing else is read. Writing to a tensor
changes only this process's copy of the page.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import pickle
import sys
from contextlib import suppress
from typing import IO, Any, NamedTuple, cast

import torch
from torch import _weights_only_unpickler
from torch._guards import detect_fake_mode
from torch.serialization import _load, _open_zipfile_reader, _serialization_tls

from cairn.capture.globals import load, under_allow_list
from cairn.capture.interpreter import collector_paused
from cairn.reading import Piece, read_pieces, unreadable
from cairn.unpickling import NotPlainError, load_plain

_ZIP_MAGIC = b"PK\x03\x04"
_ALIGNMENT_RECORD = ".storage_alignment"
_USUAL_ALIGNMENT = 64
_HEADER_BYTES = 30
"""The fixed part of a local header."""
LENGTHS_BYTES = 4
"""The last of it: how long the name and the extra field are that come between it and the record."""
_OWN_BYTES = 8192
"""A tensor of at most this size gets memory of its own: whoever keeps a random state must not keep the whole image."""


class Image:
    """The bytes of one partition. ``memory`` lives as long as the last tensor that was loaded from it.

    ``presumed`` is where :meth:`load` took the bytes of records to begin without having looked.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        self.presumed: list[Presumed] = []
        self.size_bytes = len(memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    @classmethod
    def mapped(cls, fd: int, size_bytes: int) -> Image:
        """The first *size_bytes* of a file, mapped privately; nothing is read yet. *fd* stays the caller's."""
        return cls(mmap.mmap(fd, size_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE))

    @classmethod
    def copied(cls, fd: int, size_bytes: int) -> Image:
        """The same, read into memory of this process alone, with huge pages where the system has them.

        Raises :class:`UnavailableError` when the file cannot be read.
        """
        memory = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        image = cls(memory)
        read_pieces(fd, [Piece(0, image.address, size_bytes)])
        return image

    def load(self, *, map_location: Any, weights_only: bool, own_bytes: int = _OWN_BYTES, presume: bool = False) -> Any:
        """``torch.load`` of it, under the allow-list if *weights_only*. Tensors of up to *own_bytes* are no views.

        With *presume* no header beside a tensor is read, which on a file outside the page cache would read most of the
        file: its length is what torch's rule of alignment makes it, and the caller checks ``presumed`` later.

        Raises :class:`ConfigurationError` as :func:`cairn.capture.globals.load` does.
        """
        if self._by_storage(weights_only):
            self.memory.seek(0)
            with collector_paused(), _open_zipfile_reader(cast("IO[bytes]", self.memory)) as reader:
                if not reader.has_record("constants.pkl"):  # of a compiled module
                    return self._read(reader, map_location, own_bytes, weights_only=weights_only, presume=presume)
        return load(io.BytesIO(self.memory), map_location=map_location, weights_only=weights_only)

    def load_of(self, fd: int, *, map_location: Any, weights_only: bool) -> Any:
        """:meth:`load` of the file *fd* that is mapped here. To read a header costs less than to map the page it is on.

        Raises :class:`UnavailableError` too, when the file cannot be read.
        """
        try:
            loaded = self.load(map_location=map_location, weights_only=weights_only, presume=True)
        except Exception:
            if self._presumed_rightly(fd):
                raise
        else:
            if self._presumed_rightly(fd):
                return loaded
        return self.load(map_location=map_location, weights_only=weights_only)

    def _presumed_rightly(self, fd: int) -> bool:
        try:
            return all(record.holds_in(fd) for record in self.presumed)
        except OSError as error:
            raise unreadable(str(error)) from error

    def _by_storage(self, weights_only: bool) -> bool:
        """Whether the tensors can be views of the image, as far as can be said without looking into the zip."""
        if self.memory[: len(_ZIP_MAGIC)] != _ZIP_MAGIC or detect_fake_mode(None) is not None:
            return False
        # torch.load knows what that means
        return weights_only or "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ

    def _read(self, opened: Any, map_location: Any, own_bytes: int, *, weights_only: bool, presume: bool) -> Any:
        records = _Records(torch.frombuffer(self.memory, dtype=torch.uint8).untyped_storage(), own_bytes)

        def reader() -> Any:
            self.presumed = []
            return _Presuming(opened, self.presumed) if presume and _Presuming.can(opened) else opened

        if _is_plain(opened) and (map_location is None or str(map_location) == "cpu"):
            offset_of = reader().get_record_offset

            def storage(key: str, size_bytes: int) -> torch.UntypedStorage:
                start = offset_of(f"data/{key}")
                return records[start : start + size_bytes]

            with suppress(NotPlainError):
                location = "cpu" if map_location is None else None
                return load_plain(opened.get_record("data.pkl"), storage, location=location)
        unpickler = _weights_only_unpickler if weights_only else pickle

        def read() -> Any:
            return _load(  # type: ignore[no-untyped-call]
                reader(), map_location, unpickler, overall_storage=records, encoding="utf-8"
            )

        return under_allow_list(read) if weights_only else read()


def _is_plain(reader: Any) -> bool:
    """Whether the records are what they look like: in this machine's byte order, and wanted at all."""
    if not reader.has_record("byteorder") or _serialization_tls.skip_data:
        return False
    return bool(reader.get_record("byteorder") == sys.byteorder.encode())


class Presumed(NamedTuple):
    """The local header of a record lies at *header*, and the bytes of the record at *start* if its length is usual."""

    header: int
    start: int

    @property
    def lengths_offset(self) -> int:
        """Where the header says how long its variable part is."""
        return self.header + _HEADER_BYTES - LENGTHS_BYTES

    def holds_in(self, fd: int) -> bool:
        """Whether that is so in the file *fd*."""
        return self.holds(int.from_bytes(os.pread(fd, LENGTHS_BYTES, self.lengths_offset), sys.byteorder))

    def holds(self, lengths: int) -> bool:
        """Whether *lengths*, the four bytes found there, say the same."""
        return self.header + _HEADER_BYTES + (lengths & 0xFFFF) + (lengths >> 16) == self.start


class _Presuming:
    """A reader that computes where records begin from the zip's directory alone."""

    def __init__(self, reader: Any, presumed: list[Presumed]) -> None:
        self._reader = reader
        self._presumed = presumed
        aligned = reader.has_record(_ALIGNMENT_RECORD)
        self._alignment = int(reader.get_record(_ALIGNMENT_RECORD)) if aligned else _USUAL_ALIGNMENT

    @classmethod
    def can(cls, reader: Any) -> bool:
        """Whether the file's writer promised to keep the rule, and this torch knows it."""
        return reader.has_record(".format_version") and hasattr(reader, "get_record_offset_no_read")

    def get_record_offset(self, name: str) -> int:
        header = self._reader.get_record_header_offset(name)
        size_bytes = self._reader.get_record_size(name)
        start = int(self._reader.get_record_offset_no_read(header, name, size_bytes, self._alignment))
        self._presumed.append(Presumed(header, start))
        return start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


class _Records:
    """What torch takes its storages from: ``records[start:stop]`` is the storage of one record."""

    def __init__(self, whole: torch.UntypedStorage, own_bytes: int) -> None:
        self._whole = whole
        self._own_bytes = own_bytes

    def __getitem__(self, span: slice) -> torch.UntypedStorage:
        storage: torch.UntypedStorage = self._whole[span]
        if span.stop - span.start > self._own_bytes:
            return storage
        return torch.UntypedStorage(storage.nbytes()).copy_(storage)  # type: ignore[no-untyped-call]
