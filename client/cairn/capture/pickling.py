"""The pickle inside the archive, and the storages it refers to, without touching a tensor's bytes.

The stream is what ``torch.save`` would write (protocol 2, storages as persistent ids), with two differences, both
within what ``torch.load`` reads: parts of storages that no view reaches are left out, and the same bytes may be viewed
under several dtypes.

The state is pickled once as if every storage were kept whole under one dtype. Only when that turns out wrong is it
pickled a second time, with the regions known.
"""

# ruff: noqa: SLF001 - how torch pickles a tensor is known to torch's private names only

from __future__ import annotations

import _compat_pickle
import copyreg
import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from types import EllipsisType, FunctionType, NoneType, NotImplementedType
from typing import Any

import torch
from torch._tensor import _rebuild_from_type_v2
from torch._utils import _rebuild_qtensor, _rebuild_tensor_v2, _rebuild_tensor_v3, get_tensor_metadata
from torch.storage import TypedStorage, UntypedStorage
from torch.utils.hooks import warn_if_has_hooks

from cairn.capture.interpreter import collector_paused
from cairn.capture.regions import Region, Survey, Use, find
from cairn_api.errors import CairnError, ConfigurationError

PROTOCOL = 2
"""torch's weights-only unpickler reads the opcodes of protocol 2."""

_COPYABLE_DEVICES = frozenset({"cpu", "cuda"})
_REBUILDS = frozenset({_rebuild_tensor_v2, _rebuild_tensor_v3, _rebuild_qtensor})
LEGACY_CLASSES: Mapping[torch.dtype, type] = {
    dtype: getattr(torch, name) for dtype, name in torch.storage._dtype_to_storage_type_map().items()
}
"""Dtypes that torch saves as a typed storage; all others are saved as bytes with the dtype beside them."""

# pickle writes these three as type(None) and so on, not by name.
_TYPES_WITHOUT_A_NAME = frozenset({NoneType, EllipsisType, NotImplementedType})


# The pickler asks about every single object; these are most of them.
_NEVER_STORAGES = frozenset({torch.Tensor, str, int, float, bool, tuple, list, dict, type, OrderedDict, NoneType})


class InexpressibleError(Exception):
    """The fast layout cannot hold this state, but ``torch.save`` perhaps can. The text says what it is about."""


@dataclass(frozen=True, slots=True)
class PickledState:
    """``content`` is data.pkl; ``regions[i]`` belongs into record ``data/i``; ``globals`` is sorted."""

    content: bytes
    regions: list[Region]
    globals: tuple[str, ...]


def pickle_state(state: object) -> PickledState:
    """Pickle *state*, holding its storages, not its tensors.

    Raises:
        InexpressibleError: a storage lies on a device, or has no memory, in a way only torch can handle.
        ConfigurationError: some object cannot be pickled; the message names its place and type.
    """
    try:
        with collector_paused():
            return _pickle_in_passes(state)
    except (CairnError, InexpressibleError, MemoryError):
        raise
    except Exception as error:
        raise ConfigurationError(
            f"{_blame(state)} cannot be pickled: {type(error).__name__}: {error}",
            hint="leave it out of the state, or give its class a __reduce__ or __getstate__ method",
        ) from error


def _pickle_in_passes(state: object) -> PickledState:
    surveyor = _Surveyor()
    content = surveyor.pickle(state)
    cuts = surveyor.cuts()
    if cuts is None:
        return surveyor.result(content)
    cutter = _Cutter(cuts)
    return cutter.result(cutter.pickle(state))


class TorchPickler(pickle.Pickler):
    """Pickles tensors over :class:`Region` objects, and notes every global on the way."""

    def __init__(self) -> None:
        self._sink = io.BytesIO()
        super().__init__(self._sink, PROTOCOL)
        self._regions: list[Region] = []
        self._globals: set[str] = set()

    def pickle(self, state: object) -> bytes:
        self.dump(state)
        return self._sink.getvalue()

    def result(self, content: bytes) -> PickledState:
        return PickledState(content, self._regions, tuple(sorted(self._globals)))

    def _place(self, storage: UntypedStorage, use: Use) -> Region:
        """The region that holds this use; implemented by the two passes."""
        raise NotImplementedError

    def _number(self, region: Region) -> Region:
        """Give the region its record and persistent id, at first need."""
        if region.pid is None:
            kind: type = UntypedStorage
            count = region.length
            if region.dtype is not None and region.dtype in LEGACY_CLASSES:
                kind, count = LEGACY_CLASSES[region.dtype], region.length // region.dtype.itemsize
            region.pid = ("storage", kind, str(len(self._regions)), location_of(region.storage), count)
            self._regions.append(region)
        return region

    def persistent_id(self, obj: Any) -> tuple[object, ...] | None:
        kind = type(obj)
        if kind in _NEVER_STORAGES:
            return None
        if kind is Region:
            return obj.pid  # type: ignore[no-any-return]
        if kind is UntypedStorage:
            storage = obj
            use = Use(0, storage.nbytes(), None)
        elif issubclass(kind, TypedStorage):
            storage = obj._untyped_storage
            if obj.dtype not in LEGACY_CLASSES:
                raise TypeError(f"torch has no saved form for a TypedStorage of {obj.dtype}")
            use = Use(0, storage.nbytes(), obj.dtype, fixed=True)
        else:
            return None
        return self._place(storage, use).pid

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is torch.Tensor and _is_plain(obj):
            if obj._backward_hooks:
                warn_if_has_hooks(obj)
            metadata = get_tensor_metadata(obj)  # type: ignore[no-untyped-call]
            return self._rebuild(
                obj.untyped_storage(), obj.dtype, obj.storage_offset(), tuple(obj.size()), obj.stride(),
                (obj.requires_grad, OrderedDict()), (metadata,) if metadata else (),
            )  # fmt: skip
        if kind is OrderedDict and not obj and not obj.__dict__:
            return OrderedDict, ()  # one per tensor: its backward hooks, which are never saved
        reduce = copyreg.dispatch_table.get(kind)
        if reduce is None and isinstance(obj, (type, FunctionType)):
            if kind is not type or obj not in _TYPES_WITHOUT_A_NAME:
                self._note_global(obj, obj.__qualname__)
            return NotImplemented
        reduced: Any = reduce(obj) if reduce is not None else obj.__reduce_ex__(PROTOCOL)
        if type(reduced) is str:
            self._note_global(obj, reduced)
        elif isinstance(obj, torch.Tensor):
            return self._over_regions(reduced)
        return reduced

    def _over_regions(self, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
        """What torch reduces a tensor to, with the region in place of the storage."""
        function, arguments, *rest = reduced
        if function is _rebuild_from_type_v2:
            inner_function, kind, inner_arguments, state = arguments
            inner_function, inner_arguments = self._over_regions((inner_function, inner_arguments))
            return (function, (inner_function, kind, inner_arguments, state), *rest)
        if function not in _REBUILDS:
            return reduced
        storage, offset, size, stride, *others = arguments
        if function is _rebuild_qtensor:
            use = use_of(storage._untyped_storage, storage.dtype, offset, size, stride, fixed=True)
            region = self._place(storage._untyped_storage, use)
            return (function, (region, shifted(offset, region, use), size, stride, *others), *rest)
        requires_grad, hooks, *others = others
        if function is _rebuild_tensor_v3:
            dtype, *others = others
        else:
            dtype, storage = storage.dtype, storage._untyped_storage
        return (*self._rebuild(storage, dtype, offset, size, stride, (requires_grad, hooks), tuple(others)), *rest)

    def _rebuild(
        self,
        storage: UntypedStorage,
        dtype: torch.dtype,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        flags: tuple[bool, object],
        metadata: tuple[object, ...],
    ) -> tuple[Any, ...]:
        use = use_of(storage, dtype, offset, size, stride)
        region = self._place(storage, use)
        geometry = (region, shifted(offset, region, use), size, stride, *flags)
        if region.dtype in LEGACY_CLASSES:
            return _rebuild_tensor_v2, (*geometry, *metadata)
        return _rebuild_tensor_v3, (*geometry, dtype, *metadata)

    def _note_global(self, obj: Any, name: str) -> None:
        # Protocol 2 writes a nested name as getattr(parent, name), and both of those come by here too.
        if "." not in name:
            module = pickle.whichmodule(obj, name)  # type: ignore[attr-defined]  # typeshed leaves it out
            self._globals.add(name_when_read(module, name))


class _Surveyor(TorchPickler):
    """The first pass: every storage whole, under the dtype of its first use."""

    def __init__(self) -> None:
        super().__init__()
        self._surveys: dict[int, Survey] = {}

    def _place(self, storage: UntypedStorage, use: Use) -> Region:
        survey = self._surveys.get(storage._cdata)
        if survey is None:
            region = self._number(Region(storage, 0, storage.nbytes(), use.dtype))
            survey = self._surveys[storage._cdata] = Survey(region)
        survey.add(use)
        return survey.region

    def cuts(self) -> dict[int, list[Region]] | None:
        """By storage, the regions for a second pass, or None when the first pass stands."""
        if all(survey.is_settled() for survey in self._surveys.values()):
            return None
        return {key: survey.regions() for key, survey in self._surveys.items()}


class _Cutter(TorchPickler):
    """The second pass, over known regions.

    Objects that build fresh tensors whenever they are pickled bring storages that the first pass did not see; those are
    kept whole, as ``torch.save`` would.
    """

    def __init__(self, cuts: dict[int, list[Region]]) -> None:
        super().__init__()
        self._cuts = cuts

    def _place(self, storage: UntypedStorage, use: Use) -> Region:
        regions = self._cuts.get(storage._cdata)
        if regions is None:
            regions = self._cuts[storage._cdata] = [Region(storage, 0, storage.nbytes(), use.dtype)]
        region = find(regions, use)
        if region is None:
            raise ConfigurationError(
                "the state changed while it was being saved: a tensor now views bytes that it did not view before",
                hint="save from one thread, between two training steps",
            )
        return self._number(region)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor of exactly ``torch.Tensor`` is nothing but dtype, shape, strides and memory."""
    return (
        tensor.layout is torch.strided
        and (tensor.is_cpu or tensor.is_cuda)
        and not tensor.is_quantized
        and not tensor.is_nested
        and not tensor.__dict__
    )


def location_of(storage: UntypedStorage) -> str:
    """torch's tag for where *storage* lies; :class:`InexpressibleError` if its bytes cannot simply be copied."""
    device = storage.device
    if device.type not in _COPYABLE_DEVICES:
        raise InexpressibleError(f"a storage on device type {device.type!r}")
    location = _LOCATIONS.get(device)
    if location is None:
        location = _LOCATIONS[device] = torch.serialization.location_tag(storage)
    if storage.data_ptr() == 0 and storage.nbytes():
        raise InexpressibleError("a storage without memory of its own")
    return location


_LOCATIONS: dict[torch.device, str] = {}


def use_of(
    storage: UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    fixed: bool = False,
) -> Use:
    """The bytes from a strided view's first to its last element. ``offset`` and ``stride`` count elements."""
    last = offset
    for length, step in zip(size, stride, strict=True):
        if not length:
            return Use(0, 0, dtype, fixed)
        last += (length - 1) * step
    start, end = offset * dtype.itemsize, (last + 1) * dtype.itemsize
    if end > storage.nbytes():
        # Memory released under the tensor (``storage.resize_(0)``), or several elements per byte: keep all there is.
        return Use(0, storage.nbytes(), dtype, fixed)
    return Use(start, end, dtype, fixed)


def shifted(offset: int, region: Region, use: Use) -> int:
    """The view's offset, in elements, inside its region."""
    width = use.dtype.itemsize if use.dtype is not None else 1
    if use.start == use.end:
        return min(offset, region.length // width)
    return offset - region.start // width


def name_when_read(module: str, name: str) -> str:
    """The name an unpickler resolves. Protocol 2 spells globals as Python 2 did; a few do not come back the same."""
    module, name = _compat_pickle.REVERSE_NAME_MAPPING.get(
        (module, name), (_compat_pickle.REVERSE_IMPORT_MAPPING.get(module, module), name)
    )
    module, name = _compat_pickle.NAME_MAPPING.get(
        (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
    )
    return f"{module}.{name}"


def _blame(state: object) -> str:
    """Name the innermost object that fails, by its path through dicts, lists and tuples."""
    path, culprit = "the state", state
    while True:
        children: list[tuple[object, object]] = []
        if isinstance(culprit, Mapping):
            children = list(culprit.items())
        elif isinstance(culprit, (list, tuple)):
            children = list(enumerate(culprit))
        failing = next(((key, child) for key, child in children if not _can_be_pickled(child)), None)
        if failing is None:
            kind = type(culprit)
            return f"{path} (of type {kind.__module__}.{kind.__qualname__})"
        path, culprit = f"{path}[{failing[0]!r}]", failing[1]


def _can_be_pickled(obj: object) -> bool:
    try:
        _Surveyor().pickle(obj)
    except Exception:  # noqa: BLE001 - whatever it is, pickle_state reports it
        return False
    return True
