"""Everything ``torch.save`` can hold comes back from an image the same as from ``torch.save``."""

from __future__ import annotations

import argparse
import random
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch import nn

from tests.client.capture.images import assert_same, bits, image_of, loaded, through_torch, typed_storage

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*prototype stage"),
    pytest.mark.filterwarnings("ignore:.*[Qq]uantiz"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:Sparse"),
    pytest.mark.filterwarnings("ignore:ComplexHalf"),
    pytest.mark.filterwarnings("ignore:.*invariant checks"),
]

# Quantized and sub-byte dtypes have no plain tensors; a quantized one is among the states below.
DTYPES = sorted(
    (
        dtype
        for dtype in torch.storage._dtype_to_storage_type_map().keys() | torch.storage._new_dtypes()
        if not str(dtype).startswith(("torch.q", "torch.bits"))
    ),
    key=str,
)


class Marked(torch.Tensor):
    """A tensor subclass with state of its own."""


class Colour(Enum):
    RED = 1


@dataclass
class Progress:
    """A user's class that holds a tensor."""

    step: int
    loss: torch.Tensor


class Outer:
    class Inner:
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Outer.Inner)

        __hash__ = None  # type: ignore[assignment]


class Reduced:
    """Pickled as a call, the tensor made anew every time."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __reduce__(self) -> tuple[object, ...]:
        return _from_tensor, (torch.tensor(self.values)[1:3],)


def _from_tensor(tensor: torch.Tensor) -> Reduced:
    return Reduced(tensor.tolist())


def _trained_optimizer() -> torch.optim.Optimizer:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    return optimizer


def _scheduler_state() -> dict[str, Any]:
    scheduler = torch.optim.lr_scheduler.OneCycleLR(_trained_optimizer(), max_lr=0.1, total_steps=10)
    return {key: value for key, value in scheduler.state_dict().items() if not callable(value)}


def _marked() -> torch.Tensor:
    tensor = torch.randn(3).as_subclass(Marked)
    tensor.note = "kept"  # type: ignore[attr-defined]
    return tensor


def _with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.ds_id = 7  # type: ignore[attr-defined]
    return tensor


def _hook_free_gradient() -> torch.Tensor:
    tensor = torch.randn(3, requires_grad=True)
    torch.autograd.backward((tensor * 2).sum())
    return tensor


def _quantized_per_channel() -> torch.Tensor:
    scales, zeros = torch.tensor([0.1, 0.2]), torch.tensor([0, 3])
    return torch.quantize_per_channel(torch.randn(2, 5), scales, zeros, 0, torch.qint8)


def _storage_beside_its_tensor() -> list[Any]:
    tensor = torch.arange(4.0)
    return [tensor, typed_storage(tensor), tensor[1:]]


def _same_object_twice() -> dict[str, Any]:
    tensor = torch.randn(5)
    return {"a": tensor, "b": [tensor, tensor]}


_FLAT = torch.arange(64.0)

SAFE: dict[str, Callable[[], object]] = {
    "nothing": dict,
    "none": lambda: None,
    "plain containers": lambda: {"a": [1, 2.5, "x", None, True], "b": (1, (2,)), 3: {"c": b"\x00\xff"}, "d": 2**70},
    "sets and counters": lambda: {"s": {1, 2}, "c": Counter("hello"), "o": OrderedDict(a=1), "b": bytearray(b"xyz")},
    "complex and sizes": lambda: [1 + 2j, torch.Size([1, 2]), torch.float32, torch.device("cpu"), torch.strided],
    "scalar tensor": lambda: torch.tensor(3.5),
    "empty tensors": lambda: [torch.empty(0), torch.empty(0, 3, dtype=torch.int8), torch.empty(2, 0).bfloat16()],
    "transposed": lambda: torch.arange(12.0).view(3, 4).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.arange(3.0).expand(5, 3),
    "strided": lambda: torch.arange(20.0)[::3],
    "conjugate": lambda: torch.randn(4, dtype=torch.cfloat).conj(),
    "negative bit": lambda: torch.randn(4, dtype=torch.cfloat).conj().imag,
    "requires grad": _hook_free_gradient,
    "parameter": lambda: nn.Parameter(torch.randn(2, 2)),
    "frozen parameter": lambda: nn.Parameter(torch.arange(3), requires_grad=False),
    "parameter with attribute": lambda: _with_attribute(nn.Parameter(torch.randn(2))),
    "tensor with attribute": lambda: _with_attribute(torch.randn(2)),
    "meta": lambda: torch.empty(3, 4, device="meta", dtype=torch.bfloat16),
    "sparse coo": lambda: torch.eye(4).to_sparse().coalesce(),
    "sparse csr": lambda: torch.eye(4).to_sparse_csr(),
    "sparse bsc": lambda: torch.eye(4).to_sparse_bsc((2, 2)),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 2, torch.quint8),
    "quantized per channel": _quantized_per_channel,
    "whole storages": lambda: [torch.arange(4.0).untyped_storage(), typed_storage(torch.arange(4))],
    "storage beside its tensor": _storage_beside_its_tensor,
    "same object twice": _same_object_twice,
    "optimizer": lambda: _trained_optimizer().state_dict(),
    "scheduler": _scheduler_state,
    "module state": lambda: nn.LSTM(3, 4, 2).state_dict(),
    "random states": lambda: {"torch": torch.get_rng_state(), "python": random.getstate()},
    "lone surrogate": lambda: {"\ud800": 1},
}

NEEDS_TRUST: dict[str, Callable[[], object]] = {
    "subclass": _marked,
    "argparse": lambda: argparse.Namespace(lr=0.1, weight=torch.ones(2)),
    "defaultdict": lambda: defaultdict(list, {"a": [torch.ones(1)]}),
    "path": lambda: {PosixPath("/data"): Path("relative")},
    "user class": lambda: Progress(3, torch.tensor(0.5)),
    "enum, range, slice": lambda: [Colour.RED, range(3), slice(1, 2), frozenset({1})],
    "classes and functions": lambda: [Progress, _from_tensor, len, torch.add, type(None), type(...), ...],
    "nested class": Outer.Inner,
    "module": lambda: nn.Linear(2, 3),
    "exceptions": lambda: [OSError, ConnectionError],
}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", SAFE)
def test_safe_states_load_under_weights_only(name: str, mmap: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = SAFE[name]()
    path = tmp_path / "image.pt"
    path.write_bytes(image_of(state))
    expected = through_torch(state)
    assert_same(torch.load(path, mmap=mmap, weights_only=True), expected)
    assert_same(torch.load(path, mmap=mmap, weights_only=False), expected)


@pytest.mark.parametrize("name", NEEDS_TRUST)
def test_python_objects_round_trip(name: str) -> None:
    torch.manual_seed(0)
    state = NEEDS_TRUST[name]()
    assert_same(loaded(image_of(state), weights_only=False), through_torch(state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_its_bits(dtype: torch.dtype) -> None:
    raw = torch.arange(64, dtype=torch.uint8)
    raw = raw % 2 if dtype is torch.bool else raw
    tensor = raw.view(dtype)[1:4].clone()
    restored = loaded(image_of([tensor]), weights_only=True)[0]
    assert restored.dtype is dtype
    assert bits(restored) == bits(tensor)


def test_fresh_tensors_of_reduce_survive_a_second_pass() -> None:
    # The slice in __reduce__ forces the second pass, in which the object makes a new tensor.
    restored = loaded(image_of({"made": Reduced([1.0, 2.0, 3.0, 4.0]), "view": _FLAT[3:5]}), weights_only=False)
    assert restored["made"].values == [2.0, 3.0]
    assert restored["view"].tolist() == [3.0, 4.0]


def test_recursive_structures() -> None:
    state: dict[str, Any] = {"tensor": torch.ones(2)}
    state["self"] = state
    restored = loaded(image_of(state), weights_only=True)
    assert restored["self"] is restored
    assert restored["tensor"].tolist() == [1, 1]


def test_backward_hooks_warn_as_torch_does_and_stay_behind() -> None:
    tensor = torch.ones(2, requires_grad=True)
    tensor.register_hook(lambda gradient: gradient)  # type: ignore[no-untyped-call]
    with pytest.warns(UserWarning, match="backward hook"):
        image = image_of({"t": tensor})
    assert loaded(image, weights_only=True)["t"]._backward_hooks == OrderedDict()


def test_other_default_device_and_inference_mode_do_not_matter() -> None:
    with torch.device("meta"):
        image = image_of({"t": torch.ones(3, device="cpu")})
    assert loaded(image, weights_only=True)["t"].tolist() == [1, 1, 1]
    with torch.inference_mode():
        image = image_of({"t": torch.ones(3), "u": torch.arange(9)[2:4]})
    assert loaded(image, weights_only=True)["u"].tolist() == [2, 3]


def test_no_warning_is_raised_on_the_way() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_of(SAFE["optimizer"]())
