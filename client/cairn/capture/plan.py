"""A state dict as a planned file image: its size and records are known before a tensor byte is copied.

Planning pickles the skeleton and lays out the archive; it reads no tensor bytes. ``write_into`` then fills a shared
memory buffer, every byte of it copied once, and ``windows`` yields the same image piece by piece.
"""

from __future__ import annotations

import io
import pickletools
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain

import torch

from cairn.capture.copying import byte_views, copy_all
from cairn.capture.interpreter import collector_paused, lock_returned_quickly
from cairn.capture.pickling import InexpressibleError, PickledState, name_when_read, pickle_state
from cairn.capture.regions import Region
from cairn.capture.zip_layout import ALIGNMENT_BYTES, Record, RecordTable, lay_out
from cairn_api.errors import ConfigurationError, InternalError

__all__ = ["CapturePlan", "RecordTable", "plan"]


class CapturePlan:
    """One state, ready to be copied once.

    Attributes:
        size_bytes: length of the image.
        records: where each record lies and which CRC-32 fields are still zero.
        globals: every ``module.qualname`` that unpickling the image will resolve, sorted.
        fallback_reason: why the image holds ordinary ``torch.save`` bytes, else None. The record table is then empty,
            because those bytes carry true CRCs already.

    The plan keeps the state's storages alive until the image has been written, or the plan is dropped. What is copied
    is the tensors' content at that time; shapes and Python values are those at planning.
    """

    def __init__(
        self,
        size_bytes: int,
        records: RecordTable,
        global_names: tuple[str, ...],
        fixed: bytearray,
        fixed_lengths: Sequence[int],
        regions: Sequence[Region],
        fallback_reason: str | None = None,
    ) -> None:
        self.size_bytes = size_bytes
        self.records = records
        self.globals = global_names
        self.fallback_reason = fallback_reason
        self._fixed = fixed
        self._fixed_lengths = fixed_lengths
        self._regions: Sequence[Region] | None = regions

    def write_into(self, image: torch.Tensor | memoryview) -> None:
        """Fill the first ``size_bytes`` of *image*, a writable contiguous buffer of bytes in CPU memory.

        Every byte has arrived, also from GPUs, when this returns: changing the tensors afterwards changes nothing. The
        copies are one call without the interpreter lock. GPU work queued on the caller's current streams is waited for.
        May be called once.
        """
        target = _as_bytes(image)
        if target.numel() < self.size_bytes:
            raise InternalError(f"the image needs {self.size_bytes} bytes, the buffer has {target.numel()}")
        with collector_paused(), lock_returned_quickly():
            pieces = self._pieces()
            lengths = [piece.numel() for piece in pieces]
            copy_all(target[: self.size_bytes].split_with_sizes(lengths), pieces)
            del pieces
        self._regions = None

    def windows(self, window_bytes: int) -> Iterator[memoryview]:
        """The image as consecutive chunks of *window_bytes*, the last one shorter, for stream transports.

        All chunks share one scratch buffer: each is valid only until the next is asked for. The state must not change
        until the last chunk has been made. May be called once, instead of :meth:`write_into`.
        """
        if window_bytes <= 0:
            raise InternalError(f"a window of {window_bytes} bytes")
        pieces = self._pieces()
        scratch = bytearray(min(window_bytes, self.size_bytes))
        window = torch.frombuffer(scratch, dtype=torch.uint8)
        sources: list[torch.Tensor] = []
        filled = 0
        for piece in pieces:
            start = 0
            while start < piece.numel():
                part = piece[start : start + len(scratch) - filled]
                sources.append(part)
                start += part.numel()
                filled += part.numel()
                if filled == len(scratch):
                    yield _filled(window, sources, scratch)
                    sources, filled = [], 0
        if filled:
            yield _filled(window, sources, scratch)
        self._regions = None

    def _pieces(self) -> list[torch.Tensor]:
        """The whole image in order: fixed bytes and storages in turn, as uint8 views."""
        if self._regions is None:
            raise InternalError("this plan was written already and has let go of its tensors")
        for region in self._regions:
            # A view over memory that is gone would read outside of it.
            if region.storage.nbytes() < region.start + region.length:
                raise ConfigurationError(
                    "a tensor's storage shrank between planning the save and copying it",
                    hint="save from one thread, between two training steps",
                )
        fixed = torch.frombuffer(self._fixed, dtype=torch.uint8).split_with_sizes(list(self._fixed_lengths))
        holes = byte_views([(region.storage, region.start, region.length) for region in self._regions])
        return [*chain.from_iterable(zip(fixed, holes, strict=False)), fixed[-1]]


def plan(state: object) -> CapturePlan:
    """Plan the image of anything ``torch.save`` could save.

    Raises:
        ConfigurationError: part of *state* cannot be pickled; the message says which.
    """
    try:
        pickled = pickle_state(state)
    except InexpressibleError as error:
        return _ordinary(state, str(error))
    layout = lay_out(_records(pickled))
    regions = [region for region in pickled.regions if region.length]
    return CapturePlan(layout.size_bytes, layout.records, pickled.globals, layout.ribs, layout.rib_lengths, regions)


def _records(pickled: PickledState) -> list[Record]:
    """torch's records, with data.pkl moved behind the tensors: their positions then depend on sizes alone."""
    data = [Record(f"data/{key}", region.length) for key, region in enumerate(pickled.regions)]
    # torch logs this id when it loads a file. It hashes names and content; ours hashes the pickle, which names both.
    identity = f"{len(pickled.content):020d}{zlib.crc32(pickled.content):020d}"
    return [
        Record.of(".format_version", b"1"),
        Record.of(".storage_alignment", b"%d" % ALIGNMENT_BYTES),
        Record.of("byteorder", sys.byteorder.encode()),
        *data,
        Record.of("data.pkl", pickled.content),
        Record.of("version", b"3\n"),
        Record.of(".data/serialization_id", identity.encode()),
    ]


def _ordinary(state: object, reason: str) -> CapturePlan:
    """The plan of what ``torch.save`` itself writes, already made, in ordinary memory."""
    sink = io.BytesIO()
    try:
        torch.save(state, sink)
    except Exception as error:
        raise ConfigurationError(
            f"the state holds {reason}, and torch.save cannot save it either: {type(error).__name__}: {error}",
            hint="leave it out of the state, or move it to the CPU first",
        ) from error
    content = bytearray(sink.getbuffer())
    return CapturePlan(
        len(content), RecordTable.empty(), _globals_in(content), content, [len(content)], [], fallback_reason=reason
    )


def _globals_in(image: bytearray) -> tuple[str, ...]:
    with zipfile.ZipFile(io.BytesIO(image)) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    named = (str(argument) for opcode, argument, _ in pickletools.genops(content) if opcode.name == "GLOBAL")
    return tuple(sorted({name_when_read(*argument.split(" ")) for argument in named}))


def _as_bytes(image: torch.Tensor | memoryview) -> torch.Tensor:
    if not isinstance(image, torch.Tensor):
        if image.readonly:
            raise InternalError("the capture buffer is read-only")
        return torch.frombuffer(image, dtype=torch.uint8)
    if image.dtype is not torch.uint8 or image.dim() != 1 or not image.is_contiguous() or not image.is_cpu:
        raise InternalError("a capture buffer is one contiguous row of uint8 in CPU memory")
    return image


def _filled(window: torch.Tensor, sources: Sequence[torch.Tensor], scratch: bytearray) -> memoryview:
    lengths = [source.numel() for source in sources]
    filled = sum(lengths)
    copy_all(window[:filled].split_with_sizes(lengths), sources)
    return memoryview(scratch)[:filled].toreadonly()
