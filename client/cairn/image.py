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
from contextlib import suppress
from typing import IO, Any, NamedTuple, cast

import torch
from torch import _weights_only_unpickler
from torch._guards import detect_fake_mode
from torch.serialization import _load, _open_zipfile_reader

from cairn.capture.globals import load, under_allow_list
from cairn.capture.interpreter import collector_paused
from cairn.reading import Piece, read_pieces

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
        if not self._by_storage(weights_only):
            return load(io.BytesIO(self.memory), map_location=map_location, weights_only=weights_only)
        unpickler = _weights_only_unpickler if weights_only else pickle

        def read() -> Any:
            self.memory.seek(0)
            self.presumed = []
            with _open_zipfile_reader(cast("IO[bytes]", self.memory)) as opened:
                reader = _Presuming(opened, self.presumed) if presume and _Presuming.can(opened) else opened
                whole = torch.frombuffer(self.memory, dtype=torch.uint8).untyped_storage()
                records = _Records(whole, own_bytes)
                return _load(  # type: ignore[no-untyped-call]
                    reader, map_location, unpickler, overall_storage=records, encoding="utf-8"
                )

        with collector_paused():
            return under_allow_list(read) if weights_only else read()

    def _by_storage(self, weights_only: bool) -> bool:
        """Whether the tensors can be views of the image: not in the formats before zip, nor in a compiled module."""
        if self.memory[: len(_ZIP_MAGIC)] != _ZIP_MAGIC or detect_fake_mode(None) is not None:
            return False
        if not weights_only and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" in os.environ:
            return False  # torch.load knows what that means
        self.memory.seek(0)
        with _open_zipfile_reader(cast("IO[bytes]", self.memory)) as reader:
            return not reader.has_record("constants.pkl")


class Presumed(NamedTuple):
    """The local header of a record lies at *header*, and the bytes of the record at *start* if its length is usual."""

    header: int
    start: int

    @property
    def lengths_offset(self) -> int:
        """Where the header says how long its variable part is."""
        return self.header + _HEADER_BYTES - LENGTHS_BYTES

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
