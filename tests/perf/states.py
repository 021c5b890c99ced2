"""The states that are saved: one of each kind that costs a checkpoint engine something else.

Every state carries Python scalars that change at each step, as the step and the learning rate of real training do: an
engine that caches too much writes the old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

State = dict[str, Any]

STATES = ("adam", "flat", "small")

_LAYERS = 61
_SMALL_TENSORS = 20_000


def make_state(name: str, size_bytes: int, rank: int = 0) -> State:
    """The state called *name* for one rank; *size_bytes* (of *adam*) scales the others with it. Ranks differ."""
    makers: Mapping[str, Callable[[int, torch.Generator], State]] = {"adam": _adam, "flat": _flat, "small": _small}
    generator = torch.Generator().manual_seed(1 + rank)
    return {"step": 1000, "lr": 3e-4, "rank": rank, "tensors": makers[name](size_bytes, generator)}


def _adam(size_bytes: int, generator: torch.Generator) -> State:
    """A model in bf16, its fp32 master weights and two moments: 14 bytes a parameter, 4 tensors a layer."""
    numel = size_bytes // 14 // _LAYERS // 64 * 64  # as the sizes of real layers; torchsnapshot cannot save odd ones
    state: State = {}
    for layer in range(_LAYERS):
        master = torch.rand(numel, generator=generator)
        state[f"layer.{layer}"] = {
            "weight": master.to(torch.bfloat16), "master": master, "exp_avg": master * 0.1, "exp_avg_sq": master * 0.01,
        }  # fmt: skip
    return state


def _flat(size_bytes: int, generator: torch.Generator) -> State:
    """Few large tensors: 4 of 512 MB when *adam* has 1 GB."""
    numel = size_bytes * 512 // 1000 // 4
    return {f"flat.{number}": torch.rand(numel, generator=generator) for number in range(4)}


def _small(size_bytes: int, generator: torch.Generator) -> State:
    """Many small tensors of 4 to 64 KB: 20,000 when *adam* has 1 GB."""
    count = max(1, _SMALL_TENSORS * size_bytes // 1_000_000_000)
    return {f"t{i}": torch.rand(1024 * (1 + i % 16), generator=generator) for i in range(count)}


def tensors_of(state: Mapping[str, Any]) -> list[torch.Tensor]:
    """Every tensor of a state, in order."""
    return list(_walk(state))


def _walk(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _walk(item)


def size_of(state: Mapping[str, Any]) -> int:
    """Bytes in the tensors of a state."""
    return sum(tensor.nbytes for tensor in _walk(state))


def train_step(state: State) -> None:
    """One training step, as far as a checkpoint is concerned: every value changes in place, scalars too."""
    torch._foreach_mul_(tensors_of(state), 1.001)
    state["step"] += 1
    state["lr"] *= 0.999


def copy_into(live: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """Copy the tensors of *loaded* into those of *live*, as an optimizer's ``load_state_dict`` into parameters does."""
    with torch.no_grad():
        torch._foreach_copy_(tensors_of(live), tensors_of(loaded))


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether all tensors are equal, bit by bit."""
    left, right = tensors_of(one), tensors_of(other)
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def clone(state: State) -> State:
    """A copy in memory of its own, scalars included."""
    return {
        key: value.clone() if isinstance(value, torch.Tensor) else clone(value) if isinstance(value, dict) else value
        for key, value in state.items()
    }
