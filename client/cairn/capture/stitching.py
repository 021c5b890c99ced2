"""Plans a state of plain tensors quickly, and the same state of the next save several times faster.

Pickling a tensor makes some fifteen Python objects, each of which the pickler asks about. So the state is pickled with
a marker in place of each tensor, which costs one question; then each marker is replaced by a fragment written directly.
Fragments, regions and archive positions depend on the tensors alone. They are kept in a :class:`Template`, which holds
no tensor and is trusted only when all that it was derived from is read again and found equal: the order of the tensors,
and of each its address, dtype, shape, strides and flags. Python values are pickled anew each time.
"""

# ruff: noqa: SLF001 - which storage a tensor has is known to torch's private names only

from __future__ import annotations

import os
import pickle
import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from operator import attrgetter
from struct import unpack
from typing import Any

import torch
from torch.storage import TypedStorage, UntypedStorage
from torch.utils.hooks import warn_if_has_hooks

from cairn.capture.fragments import FragmentWriter
from cairn.capture.pickling import (
    LEGACY_CLASSES,
    PROTOCOL,
    InexpressibleError,
    TorchPickler,
    location_of,
    shifted,
    use_of,
)
from cairn.capture.regions import Region, Survey, Use, find
from cairn.capture.zip_layout import ALIGNMENT_BYTES, Archive, Layout, Record
from cairn_api.errors import CairnError

_MARKER: float = unpack(">d", b"\x40" + os.urandom(7))[0]
_MARKER_BYTES = pickle.dumps(_MARKER, PROTOCOL)[2:-1] + pickle.BINPERSID
"""How the marker looks in a stream: ten bytes that no state holds but by a chance of 2**-56, and then it is noticed."""

_LEAST_MEMO_BASE = 1024


class NotPlainError(Exception):
    """The state holds something else than plain tensors and objects without tensors; the text says what."""


_Row = tuple[int, int, torch.dtype, tuple[int, ...], tuple[int, ...], bool, bool, bool, bool]
"""All that a template depends on, of one tensor: see :func:`_rows`."""

_IS_CPU = 6
_OWN_ATTRIBUTES = attrgetter("__dict__")


def _rows(tensors: list[torch.Tensor]) -> list[_Row]:
    """Address, offset, dtype, shape, strides, ``requires_grad``, ``is_cpu``, ``is_neg`` and ``is_conj`` of each tensor.

    Read tensor by tensor: after a training step none of them is in the processor's cache, and going through all of them
    once per property took more than twice as long. Raises :class:`NotPlainError` for what a template cannot express.
    """
    if any(map(_OWN_ATTRIBUTES, tensors)):
        raise NotPlainError("a tensor with attributes of its own")
    try:
        return [
            (
                tensor.data_ptr(), int(tensor.storage_offset()), tensor.dtype, tensor.shape, tensor.stride(),
                tensor.requires_grad, tensor.is_cpu, tensor.is_neg(), tensor.is_conj(),
            )
            for tensor in tensors
        ]  # fmt: skip
    except RuntimeError as error:  # a sparse tensor has no strides, a fake one no address
        raise NotPlainError(str(error)) from error


class _Geometry:
    """How one tensor lies in its storage; offset and strides count elements."""

    __slots__ = ("dtype", "offset", "requires_grad", "size", "stride")

    def __init__(self, row: _Row) -> None:
        _, self.offset, self.dtype, self.size, self.stride, self.requires_grad, *_ = row


@dataclass(frozen=True, slots=True)
class Stitched:
    """``layout`` of the whole archive; hole *i* is filled from ``lengths[i]`` bytes at ``addresses[i]``.

    These lie in the memory of ``tensors[owners[i]]``, which was at ``pointers[i]``.
    """

    layout: Layout
    globals: tuple[str, ...]
    tensors: list[torch.Tensor]
    owners: Sequence[int]
    pointers: list[int]
    addresses: array[int]
    lengths: array[int]
    on_cpu: bool


@dataclass(frozen=True, slots=True)
class Template:
    """What a state's tensors determine: see the module."""

    rows: list[_Row]
    repeats: dict[int, int]
    memo_base: int
    fragments: list[bytes]
    globals: frozenset[str]
    archive: Archive
    owners: list[int]
    pointers: list[int]
    addresses: array[int]
    lengths: array[int]
    on_cpu: bool


def stitch(state: object, template: Template | None) -> tuple[Stitched, Template]:
    """Plan *state*, with *template* of an earlier state if that fits; returns the template that did.

    Raises:
        NotPlainError: the general way has to be taken, which also explains what cannot be pickled at all.
    """
    skeleton = _Skeleton()
    content = skeleton.content(state)
    pieces = content.split(_MARKER_BYTES)
    if len(pieces) != len(skeleton.tensors) + 1:
        raise NotPlainError("the marker stands in the state itself")
    rows = _rows(skeleton.tensors)
    repeats = _repeats(skeleton.tensors)
    # Each entry of the memo was written with one of these two opcodes.
    memo_bound = content.count(pickle.BINPUT) + content.count(pickle.LONG_BINPUT)
    if template is None or template.memo_base < memo_bound or template.repeats != repeats or template.rows != rows:
        template = _make_template(skeleton.tensors, rows, repeats, memo_bound)

    content = b"".join(chain.from_iterable(zip_longest(pieces, template.fragments, fillvalue=b"")))
    archive = template.archive.copy()
    for record in last_records(content):
        archive.add(record)
    stitched = Stitched(
        archive.finish(), tuple(sorted(skeleton.globals | template.globals)), skeleton.tensors, template.owners,
        template.pointers, template.addresses, template.lengths, template.on_cpu,
    )  # fmt: skip
    return stitched, template


def first_records() -> list[Record]:
    """torch's records before the tensors."""
    return [
        Record.of(".format_version", b"1"),
        Record.of(".storage_alignment", b"%d" % ALIGNMENT_BYTES),
        Record.of("byteorder", sys.byteorder.encode()),
    ]


def last_records(content: bytes) -> list[Record]:
    """torch's records behind the tensors. *content* is data.pkl: tensor positions then depend on sizes alone."""
    # torch logs this id when it loads a file. It hashes names and content; ours hashes the pickle, which names both.
    identity = f"{len(content):020d}{zlib.crc32(content):020d}"
    return [
        Record.of("data.pkl", content),
        Record.of("version", b"3\n"),
        Record.of(".data/serialization_id", identity.encode()),
    ]


class _Skeleton(TorchPickler):
    """Pickles everything but tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    @property
    def globals(self) -> set[str]:
        return self._globals

    def content(self, state: object) -> bytes:
        """The stream, with the marker where the tensors belong."""
        try:
            return self.pickle(state)
        except (CairnError, NotPlainError, MemoryError):
            raise
        except Exception as error:
            raise NotPlainError(f"{type(error).__name__}: {error}") from error

    def persistent_id(self, obj: Any) -> Any:
        # Before any other thought: this is called for every object in the state.
        if type(obj) is torch.Tensor:
            self.tensors.append(obj)
            return _MARKER
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (UntypedStorage, TypedStorage)):
            raise NotPlainError("a storage without a tensor")
        return super().reducer_override(obj)

    def _place(self, storage: UntypedStorage, use: Use) -> Region:  # noqa: ARG002 - whatever they are
        raise NotPlainError("a tensor of a class of its own")


def _repeats(tensors: list[torch.Tensor]) -> dict[int, int]:
    """For each tensor that stood in the state before: its index, and the first one's."""
    first: dict[int, int] = {}
    for index, tensor in enumerate(map(id, tensors)):
        first.setdefault(tensor, index)
    if len(first) == len(tensors):
        return {}
    indexes = map(first.__getitem__, map(id, tensors))
    return {index: earlier for index, earlier in enumerate(indexes) if index != earlier}


def _make_template(tensors: list[torch.Tensor], rows: list[_Row], repeats: dict[int, int], memo_bound: int) -> Template:
    for tensor, (*_, is_neg, is_conj) in zip(tensors, rows, strict=True):
        if is_neg or is_conj:
            raise NotPlainError("a negative or conjugate view")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            raise NotPlainError("a tensor that is more than dtype, shape, strides and memory")
        if tensor._backward_hooks:
            warn_if_has_hooks(tensor)
    geometries = list(map(_Geometry, rows))
    try:
        places = _find_places(tensors, geometries)
    except InexpressibleError as error:
        raise NotPlainError(str(error)) from error
    memo_base = max(_LEAST_MEMO_BASE, 1 << memo_bound.bit_length())
    writer = FragmentWriter(memo_base)
    numbers: dict[int, int] = {}
    regions: list[Region] = []
    owners: list[int] = []
    fragments: list[bytes] = []
    remembered: dict[int, bytes] = {}
    again = set(repeats.values())
    for index, (geometry, (region, start)) in enumerate(zip(geometries, places, strict=True)):
        if index in repeats:
            fragments.append(remembered[repeats[index]])
            continue
        number = numbers.setdefault(id(region), len(regions))
        if number == len(regions):
            regions.append(region)
            owners.append(index)
        fragment = _fragment(writer, geometry, region, start, number)
        if index in again:
            fragment, remembered[index] = writer.remember(fragment)
        fragments.append(fragment)

    archive = Archive()
    for record in first_records():
        archive.add(record)
    for number, region in enumerate(regions):
        archive.add(Record(f"data/{number}", region.length))
    filled = [(region, owner) for region, owner in zip(regions, owners, strict=True) if region.length]
    return Template(
        rows, repeats, memo_base, fragments, frozenset(writer.globals), archive,
        owners=[owner for _, owner in filled],
        pointers=[rows[owner][0] for _, owner in filled],
        addresses=array("Q", (region.storage.data_ptr() + region.start for region, _ in filled)),
        lengths=array("Q", (region.length for region, _ in filled)),
        on_cpu=all(row[_IS_CPU] for row in rows),
    )  # fmt: skip


def _find_places(tensors: list[torch.Tensor], geometries: list[_Geometry]) -> list[tuple[Region, int]]:
    """For each tensor, its region and the offset in it in elements."""
    surveys: dict[int, Survey] = {}
    uses = []
    for tensor, geometry in zip(tensors, geometries, strict=True):
        storage = tensor.untyped_storage()
        use = use_of(storage, geometry.dtype, geometry.offset, geometry.size, geometry.stride)
        survey = surveys.get(storage._cdata)
        if survey is None:
            location_of(storage)
            survey = surveys[storage._cdata] = Survey(Region(storage, 0, storage.nbytes(), use.dtype))
        survey.add(use)
        uses.append((survey, use))
    cuts: dict[int, list[Region]] = {}
    places = []
    for geometry, (survey, use) in zip(geometries, uses, strict=True):
        key = id(survey)
        if key not in cuts:
            cuts[key] = [survey.region] if survey.is_settled() else survey.regions()
        region = find(cuts[key], use)
        if region is None:
            raise NotPlainError("a view that no region holds")
        places.append((region, shifted(geometry.offset, region, use)))
    return places


def _fragment(writer: FragmentWriter, geometry: _Geometry, region: Region, start: int, number: int) -> bytes:
    kind: type = UntypedStorage
    count = region.length
    typed = region.dtype is not None and region.dtype in LEGACY_CLASSES
    if typed:
        kind, count = LEGACY_CLASSES[geometry.dtype], region.length // geometry.dtype.itemsize
    pid = ("storage", kind, str(number), location_of(region.storage), count)
    dtype = None if typed else geometry.dtype
    return writer.tensor(pid, start, geometry.size, geometry.stride, dtype, requires_grad=geometry.requires_grad)
