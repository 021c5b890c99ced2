"""Which tensors nothing but a known optimizer's step changes: those may be copied while training goes on.

What a program promises with ``Client.guard`` is checked as far as PyTorch allows: every in-place operation raises a
tensor's version, except those on a ``.data`` alias and in other libraries' kernels.
"""

# ruff: noqa: SLF001 - a tensor's version has only a private name

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from cairn_api.errors import ConfigurationError, SaveFailedError

LEAST_BYTES = 1 << 20
"""Smaller tensors are copied at once: to track them costs as much as to copy them."""

Tensors = Callable[[], Iterable[torch.Tensor]]

_Place = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]

_FSDP_MARKS = ("_is_flat_param", "_fsdp_flattened")
"""On parameters whose memory FSDP frees and allocates again during forward and backward."""


class Guards:
    """The optimizers whose steps wait. *before_step* is called at the start of each step of each of them."""

    def __init__(self, before_step: Callable[[], None]) -> None:
        self._before_step = before_step
        self._more: WeakKeyDictionary[torch.optim.Optimizer, Tensors] = WeakKeyDictionary()
        self._hooks: list[Any] = []
        self._map = AddressMap()

    def add(self, optimizer: torch.optim.Optimizer, more: Tensors) -> None:
        """Make the steps of *optimizer* wait; see :meth:`cairn.Client.guard`."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigurationError(
                f"a {type(optimizer).__name__} cannot be guarded: it is no torch.optim.Optimizer",
                hint='guard the torch optimizer inside of it, or set capture = "blocking"',
            )
        if optimizer not in self._more:
            self._hooks.append(optimizer.register_step_pre_hook(self._hook))
        self._more[optimizer] = more

    def now(self) -> Guarded | None:
        """What is guarded at this moment; None when nothing is."""
        return Guarded(self._tensors, self._map) if self._more else None

    def _tensors(self) -> Iterator[torch.Tensor]:
        for optimizer, more in self._more.items():
            yield from _own_tensors(optimizer)
            yield from more()

    def remove_all(self) -> None:
        """Let go of all optimizers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._more.clear()

    def _hook(self, optimizer: object, args: object, kwargs: object) -> None:  # noqa: ARG002 - as torch calls it
        self._before_step()


class AddressMap:
    """Where guarded tensors lie: what was found out at one save is used again at the next, if it is still so.

    Whether a tensor can wait takes a dozen questions to torch. They are asked once for each tensor and each place where
    it has lain; a tensor is known again by itself, its address, dtype, shape and strides. No tensor is kept alive.
    """

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        """Of the ranges of addresses that are guarded, by rising address. Replaced, never changed."""
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], _Place]] = {}
        self._in_map: list[_Place] = []

    def look(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Those of *tensors* that can wait; from then on the map is theirs."""
        known: dict[int, tuple[weakref.ref[torch.Tensor], _Place]] = {}
        found: list[torch.Tensor] = []
        for tensor in tensors:
            before = self._known.get(id(tensor))
            if before is None or before[0]() is not tensor or before[1] != _place_of(tensor):
                if not _can_wait(tensor):
                    continue
                before = (weakref.ref(tensor), _place_of(tensor))
            known[id(tensor)] = before
            found.append(tensor)
        self._known = known
        in_map = [place for _, place in known.values()]
        if in_map != self._in_map:
            self._in_map = in_map
            self.starts, self.ends = _ranges(found)
        return found


def _ranges(tensors: Iterable[torch.Tensor]) -> tuple[list[int], list[int]]:
    """Starts and ends of the addresses of *tensors*, where they touch one another as one range."""
    starts: list[int] = []
    ends: list[int] = []
    for start, end in sorted(map(_addresses, tensors)):
        if ends and start <= ends[-1]:
            ends[-1] = max(end, ends[-1])
        else:
            starts.append(start)
            ends.append(end)
    return starts, ends


class Guarded:
    """The guarded tensors of one moment, as ranges of addresses, and their versions then.

    *tensors* are asked for when the first large tensor turns up; nothing may change between the two. *known* is what an
    earlier look at them has found.
    """

    def __init__(self, tensors: Tensors, known: AddressMap) -> None:
        self._tensors: Tensors | None = tensors
        self._map = known
        self._versions: list[tuple[torch.Tensor, int]] = []
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._waiting: set[int] = set()

    def may_wait(self, storage: torch.UntypedStorage) -> bool:
        """Whether all of *storage* is guarded. It is watched from then on."""
        if self._tensors is not None:
            guarded = self._map.look(self._tensors())
            self._versions = [(tensor, tensor._version) for tensor in guarded]
            self._starts, self._ends = self._map.starts, self._map.ends
            self._tensors = None
        start = storage.data_ptr()
        place = bisect_right(self._starts, start) - 1
        if place < 0 or start + storage.nbytes() > self._ends[place]:
            return False
        self._waiting.add(start)
        return True

    def check(self, state: object) -> None:
        """Raise :class:`SaveFailedError` if a tensor that waited was changed since; *state* is what names it."""
        for tensor, version in self._versions:
            storage = tensor.untyped_storage().data_ptr()
            if tensor._version != version and storage in self._waiting:
                raise SaveFailedError(
                    f"{_name_of(storage, state)} was changed while it was being copied, and not by the step of a "
                    "guarded optimizer",
                    hint="call client.wait_copied() before you change parameters or optimizer state yourself, or set "
                    'capture = "blocking"',
                )


def _own_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        if isinstance(state, Mapping):
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _can_wait(tensor: torch.Tensor) -> bool:
    """Whether *tensor* is plain, large, and densely packed: then its addresses are all its own."""
    if tensor.numel() * tensor.element_size() < LEAST_BYTES or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False
    if tensor.layout is not torch.strided or tensor.device.type not in ("cpu", "cuda") or tensor.is_inference():
        return False
    if any(getattr(tensor, mark, False) for mark in _FSDP_MARKS) or tensor.data_ptr() == 0:
        return False
    start, end = _addresses(tensor)
    return end - start == tensor.numel() * tensor.element_size()


def _place_of(tensor: torch.Tensor) -> _Place:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _addresses(tensor: torch.Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    steps = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return start, start + (steps + 1) * tensor.element_size()


def _name_of(storage: int, state: object) -> str:
    return next((path for path, found in _walk(state, "the state") if found == storage), "a tensor of the state")


def _walk(value: object, path: str) -> Iterator[tuple[str, int]]:
    """The paths of all tensors in nested containers, each with the address of its storage."""
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided:
            yield path, value.untyped_storage().data_ptr()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _walk(item, f"{path}[{number}]")
