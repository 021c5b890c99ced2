"""What may wait is found out once, and again whenever a tensor is another one or lies elsewhere."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from cairn.guards import Guards

SIDE = 600


def guarded_by(optimizer: torch.optim.Optimizer) -> Guards:
    guards = Guards(lambda: None)
    guards.add(optimizer, tuple)
    return guards


def may_wait(guards: Guards, tensor: torch.Tensor) -> bool:
    guarded = guards.now()
    assert guarded is not None
    return guarded.may_wait(tensor.untyped_storage())


def test_what_is_known_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.zeros(SIDE, SIDE))
    optimizer = torch.optim.SGD([weight], lr=1.0)  # guards do not keep it
    guards = guarded_by(optimizer)
    assert may_wait(guards, weight)
    monkeypatch.setattr("cairn.guards._can_wait", lambda _: pytest.fail("asked again"))
    assert may_wait(guards, weight)


def test_a_tensor_with_other_memory_is_looked_at_again() -> None:
    weight = torch.nn.Parameter(torch.zeros(SIDE, SIDE))
    optimizer = torch.optim.SGD([weight], lr=1.0)  # guards do not keep it
    guards = guarded_by(optimizer)
    before = weight.data
    assert may_wait(guards, weight)
    weight.data = torch.zeros(SIDE, SIDE)
    assert may_wait(guards, weight)
    assert not may_wait(guards, before)
    whole = weight.data
    weight.data = whole[: SIDE // 2]  # at the same address: the rest of the memory is anybody's now
    assert not may_wait(guards, whole)
    weight.data = whole.as_strided((SIDE // 2, SIDE), (2 * SIDE, 1))  # as many elements, with gaps
    assert not may_wait(guards, whole)
    weight.data = whole
    assert may_wait(guards, whole)


def test_a_tensor_that_is_no_longer_trained_may_not_wait() -> None:
    first, second = (torch.nn.Parameter(torch.zeros(SIDE, SIDE)) for _ in range(2))
    optimizer = torch.optim.SGD([first, second], lr=1.0)
    guards = guarded_by(optimizer)
    assert may_wait(guards, second)
    optimizer.param_groups[0]["params"].pop()
    assert not may_wait(guards, second)
    assert may_wait(guards, first)


def test_no_tensor_is_kept_alive() -> None:
    weight = torch.nn.Parameter(torch.zeros(SIDE, SIDE))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guards = guarded_by(optimizer)
    assert may_wait(guards, weight)
    alive = weakref.ref(weight)
    del weight
    optimizer.param_groups[0]["params"].clear()
    gc.collect()
    assert alive() is None
