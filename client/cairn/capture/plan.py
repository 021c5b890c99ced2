"""A state dict as a planned file image: its size and records are known before a tensor byte is copied.

Planning pickles the skeleton and lays out the archive; it reads no tensor bytes. ``write_into`` then fills a shared
memory buffer, every byte of it copied once, and ``windows`` yields the same image piece by piece.
"""

from __future__ import annotations

import ctypes
import io
import logging
import pickletools
import time
import zipfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch

from cairn.capture import native
from cairn.capture.copying import Spans, copy_all, copy_spans
from cairn.capture.interpreter import collector_paused, lock_returned_quickly
from cairn.capture.pickling import InexpressibleError, name_when_read, pickle_state
from cairn.capture.stitching import NotPlainError, Template, first_records, last_records, stitch
from cairn.capture.zip_layout import Layout, Record, RecordTable, lay_out
from cairn_api.errors import ConfigurationError, InternalError

__all__ = ["CapturePlan", "Planner", "RecordTable", "Remainder", "Written", "plan"]

log = logging.getLogger("cairn")

LATE_BYTES = 1 << 20
"""Spans shorter than this are never left for later: copying them costs less than keeping account of them."""


FRESH_S = 0.02
"""A plan younger than this is written without looking at each address once more, which takes as long as a tenth of the
copy of small tensors. A thread that frees what is being saved could do so during the copy as well."""


class Remainder:
    """The part of an image that :meth:`CapturePlan.write_into` has left for later; it keeps the memory alive.

    Attributes:
        size_bytes: how much that is.
        storages: where it lies. A tensor may be given other memory meanwhile; this stays what is copied.
    """

    def __init__(self, image: torch.Tensor, spans: Spans, threads: int) -> None:
        self.size_bytes = sum(spans.lengths)
        spans.check()
        self.storages = [_storage_of(holder) for holder in spans.holders]
        self._image = image
        self._spans = replace(spans, holders=self.storages, pointers=[storage.data_ptr() for storage in self.storages])
        self._threads = threads

    def copy(self) -> array[int]:
        """Copy it: one call without the interpreter lock, from any thread; returns when every byte has arrived.

        Returns the checksums that were taken on the way, as ``Written.digests``.
        """
        self._spans.check()
        return copy_spans(self._image, self._spans, self._threads)


class Written(NamedTuple):
    """What :meth:`CapturePlan.write_into` has done.

    Attributes:
        digests: the checksums of pieces of the image that were taken while they were copied, in rows of four numbers:
            offset and length in bytes, CRC-64/NVME, CRC-32. Each piece lies within one record and within one aligned
            block of :data:`cairn.capture.native.UNIT_BYTES`.
        remainder: what is left to copy, with checksums of its own.
    """

    digests: array[int]
    remainder: Remainder | None


class CapturePlan:
    """One state, ready to be copied once.

    Attributes:
        size_bytes: length of the image.
        records: where each record lies and which CRC-32 fields are still zero.
        globals: every ``module.qualname`` that unpickling the image will resolve, sorted.
        fallback_reason: why the image holds ordinary ``torch.save`` bytes, else None. The record table is then empty,
            because those bytes carry true CRCs already.

    The plan keeps the state's memory alive until the image has been written, or the plan is dropped. What is copied
    is the tensors' content at that time; shapes and Python values are those at planning.
    """

    def __init__(
        self, layout: Layout, global_names: tuple[str, ...], spans: Spans, fallback_reason: str | None = None
    ) -> None:
        self.size_bytes = layout.size_bytes
        self.records = layout.records
        self.globals = global_names
        self.fallback_reason = fallback_reason
        self._layout = layout
        self._spans: Spans | None = spans
        self._made_s = time.monotonic()

    def write_into(
        self,
        image: torch.Tensor | memoryview,
        may_wait: Callable[[torch.UntypedStorage], bool] | None = None,
        *,
        threads: int | None = None,
    ) -> Written:
        """Fill the first ``size_bytes`` of *image*, a writable contiguous buffer of bytes in CPU memory.

        Every byte has arrived, also from GPUs, when this returns: changing the tensors afterwards changes nothing. The
        copies are one call without the interpreter lock. GPU work queued on the caller's current streams is waited for.
        May be called once. *threads* is how many may copy, by default one per core.

        With *may_wait*, what takes at least 1 MiB of a storage for which it says True is left out, and is to be copied
        by the ``remainder`` that is returned then.
        """
        target = _as_bytes(image)
        if target.numel() < self.size_bytes:
            raise InternalError(f"the image needs {self.size_bytes} bytes, the buffer has {target.numel()}")
        threads = native.idle_threads(1) if threads is None else threads
        spans, remainder = self._take_spans(), None
        with collector_paused(), lock_returned_quickly():
            if time.monotonic() - self._made_s > FRESH_S:
                spans.check()
            if may_wait is not None:
                late = [index for index in range(len(spans.lengths)) if _is_late(spans, index, may_wait)]
                if late:
                    remainder = Remainder(target, spans.subset(late), threads)
                    excluded = set(late)
                    spans = spans.subset([index for index in range(len(spans.lengths)) if index not in excluded])
            digests = copy_spans(target, spans, threads)
            self._write_ribs(target)
        return Written(digests, remainder)

    def windows(self, window_bytes: int) -> Iterator[memoryview]:
        """The image as consecutive chunks of *window_bytes*, the last one shorter, for stream transports.

        All chunks share one scratch buffer: each is valid only until the next is asked for. The state must not change
        until the last chunk has been made. May be called once, instead of :meth:`write_into`.
        """
        if window_bytes <= 0:
            raise InternalError(f"a window of {window_bytes} bytes")
        spans = self._take_spans()
        spans.check()
        ribs = torch.frombuffer(self._layout.ribs, dtype=torch.uint8).split_with_sizes(
            self._layout.rib_lengths.tolist()
        )
        pieces = [*chain.from_iterable(zip(ribs, spans.views(), strict=False)), ribs[-1]]
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

    def _take_spans(self) -> Spans:
        spans, self._spans = self._spans, None
        if spans is None:
            raise InternalError("this plan was written already and has let go of its tensors")
        return spans

    def _write_ribs(self, target: torch.Tensor) -> None:
        layout = self._layout
        if native.available():
            start = ctypes.addressof(ctypes.c_char.from_buffer(layout.ribs))
            native.copy(
                layout.rib_offsets, layout.rib_starts, layout.rib_lengths,
                target_base=target.data_ptr(), source_base=start,
            )  # fmt: skip
            return
        lengths = layout.rib_lengths.tolist()
        ribs = torch.frombuffer(layout.ribs, dtype=torch.uint8).split_with_sizes(lengths)
        places = zip(layout.rib_offsets, lengths, strict=True)
        copy_all([target[offset : offset + length] for offset, length in places], ribs)


class Planner:
    """Plans the states of one partition, save after save, and keeps what the next plan can use again.

    It keeps no tensor alive. Not to be used by two threads at once.
    """

    def __init__(self) -> None:
        self._template: Template | None = None

    def plan(self, state: object) -> CapturePlan:
        """Plan the image of anything ``torch.save`` could save.

        Raises:
            ConfigurationError: part of *state* cannot be pickled; the message says which.
        """
        try:
            with collector_paused():
                stitched, self._template = stitch(state, self._template)
                layout = stitched.layout
                holders = [stitched.tensors[owner] for owner in stitched.owners]
                spans = Spans(
                    layout.hole_offsets, stitched.addresses, stitched.lengths, holders, stitched.pointers,
                    stitched.on_cpu,
                )  # fmt: skip
                return CapturePlan(layout, stitched.globals, spans)
        except NotPlainError as reason:
            log.debug("the state is planned the general way: %s", reason)
            self._template = None
            return _plan_generally(state)


def plan(state: object) -> CapturePlan:
    """Plan a state that will not be planned again; see :meth:`Planner.plan`."""
    return Planner().plan(state)


def _plan_generally(state: object) -> CapturePlan:
    try:
        pickled = pickle_state(state)
    except InexpressibleError as error:
        return _ordinary(state, str(error))
    data = [Record(f"data/{key}", region.length) for key, region in enumerate(pickled.regions)]
    layout = lay_out([*first_records(), *data, *last_records(pickled.content)])
    regions = [region for region in pickled.regions if region.length]
    pointers = [region.storage.data_ptr() for region in regions]
    spans = Spans(
        layout.hole_offsets,
        array("Q", (pointer + region.start for pointer, region in zip(pointers, regions, strict=True))),
        array("Q", (region.length for region in regions)),
        [region.storage for region in regions],
        pointers,
        on_cpu=all(region.storage.device.type == "cpu" for region in regions),
    )
    return CapturePlan(layout, pickled.globals, spans)


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
    layout = Layout(
        len(content), RecordTable.empty(), content, array("Q", [0]), array("Q", [0]), array("Q", [len(content)])
    )
    nothing = Spans(array("Q"), array("Q"), array("Q"), [], [], on_cpu=True)
    return CapturePlan(layout, _globals_in(content), nothing, fallback_reason=reason)


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


def _is_late(spans: Spans, index: int, may_wait: Callable[[torch.UntypedStorage], bool]) -> bool:
    return spans.lengths[index] >= LATE_BYTES and may_wait(_storage_of(spans.holders[index]))


def _storage_of(holder: torch.Tensor | torch.UntypedStorage) -> torch.UntypedStorage:
    return holder if isinstance(holder, torch.UntypedStorage) else holder.untyped_storage()


def _filled(window: torch.Tensor, sources: Sequence[torch.Tensor], scratch: bytearray) -> memoryview:
    lengths = [source.numel() for source in sources]
    filled = sum(lengths)
    copy_all(window[:filled].split_with_sizes(lengths), sources)
    return memoryview(scratch)[:filled].toreadonly()
