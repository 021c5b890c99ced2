"""Unpickling states of plain tensors and plain values, which nearly all states are, by Python's own unpickler in C.

torch's weights-only unpickler is a loop in Python and takes a few times as long. What the one here finds for a name is
out of a table of four kinds, of which none can run code of the pickle's choice: ``OrderedDict``, a description of a
storage, and two objects without attributes that make a tensor and a parameter. Every other name is refused, and so is
all that needs more than such a table; whoever calls then has torch read the pickle, by its rules. It takes a few things
that torch refuses and that are as harmless: values such as ``frozenset``, and attributes set on tensors and dicts.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.serialization import StorageType

_PROTOCOL_2 = pickle.PROTO + b"\x02"
_CPU = torch.device("cpu")
_STORAGES = frozenset(
    f"{kind}Storage"
    for kind in (
        *("Double", "Float", "Half", "BFloat16", "ComplexFloat", "ComplexDouble"),
        *("Long", "Int", "Short", "Char", "Byte", "Bool"),
    )
)


class NotPlainError(Exception):
    """The pickle is none of a plain state, or it is damaged: torch shall read it, or say what is wrong."""


def load_plain(pickled: bytes, storage: Callable[[str, int], torch.UntypedStorage], *, location: str | None) -> Any:
    """The state that is pickled in *pickled*, the ``data.pkl`` of a file of ``torch.save``.

    ``storage(key, size_bytes)`` is the storage of the record *key*; each is asked for once. Tensors that were saved
    from elsewhere than *location* are refused; None accepts all. Raises :class:`NotPlainError`.
    """
    # The cache is the only way past find_class: what this process has unpickled by number before.
    if not pickled.startswith(_PROTOCOL_2) or copyreg._extension_cache:  # type: ignore[attr-defined]  # noqa: SLF001
        raise NotPlainError("another protocol, or registered extensions")
    unpickler = _Unpickler(pickled, storage, location)
    try:
        state = unpickler.load()
    except Exception as error:
        raise NotPlainError(str(error)) from error
    if unpickler.unused:
        raise NotPlainError("a storage that belongs to no tensor")
    return state


class _Stored(NamedTuple):
    """A storage on its way into a tensor, which takes it out of the list of the *unused*."""

    storage: torch.UntypedStorage
    dtype: torch.dtype
    unused: list[None]


class _RebuildTensor:
    """Stands for ``torch._utils._rebuild_tensor_v2``. A pickle can call it, and there is nothing in it to set."""

    __slots__ = ()

    def __call__(
        self, stored: object, offset: int, size: Any, stride: Any, requires_grad: bool, hooks: object
    ) -> torch.Tensor:
        if type(stored) is not _Stored or hooks:
            raise NotPlainError("no plain tensor")
        stored.unused.pop()
        tensor = torch.empty((0,), dtype=stored.dtype, device=_CPU).set_(stored.storage, offset, size, stride)
        if requires_grad:
            tensor.requires_grad = True
        return tensor


class _RebuildParameter:
    """Stands for ``torch._utils._rebuild_parameter``, likewise."""

    __slots__ = ()

    def __call__(self, data: object, requires_grad: bool, hooks: object) -> torch.nn.Parameter:
        if type(data) is not torch.Tensor or hooks:
            raise NotPlainError("no plain parameter")
        return torch.nn.Parameter(data, requires_grad)


_KNOWN: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
}


class _Unpickler(pickle.Unpickler):
    """``unused`` has an entry for each storage that no tensor has taken."""

    def __init__(
        self, pickled: bytes, storage: Callable[[str, int], torch.UntypedStorage], location: str | None
    ) -> None:
        super().__init__(io.BytesIO(pickled))
        self.unused: list[None] = []
        self._storage = storage
        self._location = location
        self._storages: dict[str, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        if module == "torch" and name in _STORAGES:
            return StorageType(name)  # type: ignore[no-untyped-call]
        if (found := _KNOWN.get((module, name))) is None:
            raise NotPlainError(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        what, kind, key, location, count = pid
        if what != "storage" or type(kind) is not StorageType or self._location not in (None, location):
            raise NotPlainError("no plain storage")
        dtype = kind.dtype
        storage = self._storages.get(key)
        if storage is None:
            storage = self._storages[key] = self._storage(key, count * dtype.itemsize)
        self.unused.append(None)
        return _Stored(storage, dtype, self.unused)
