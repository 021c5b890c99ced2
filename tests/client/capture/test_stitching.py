"""Plans that use an earlier plan again: always the bytes that planning from nothing gives."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from struct import unpack
from typing import Any

import pytest
import torch

from cairn.capture import native, plan, stitching
from cairn.capture.plan import Planner
from cairn.capture.stitching import NotPlainError, stitch
from tests.client.capture.images import assert_same, check_digests, filled, image_of, loaded, through_torch


def state_of(step: int = 1) -> dict[str, Any]:
    """What a training saves: tensors in nested containers, and Python values that change at each save."""
    flat = torch.arange(60, dtype=torch.float32)
    tied = torch.full((5, 4), 0.5, dtype=torch.bfloat16)
    module = OrderedDict(weight=flat[:20].view(4, 5).t(), bias=flat[20:30], tied=tied)
    module._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as nn.Module.state_dict() leaves it
    return {
        "module": module,
        "optimizer": {
            "state": {0: {"step": torch.tensor(step), "exp_avg": torch.rand(3, 3)}, 1: {"empty": torch.empty(0, 2)}},
            "param_groups": [{"lr": 1e-3 / step, "params": (0, 1)}],
        },
        "again": [tied, module["bias"], tied],
        "f8": torch.ones(7).to(torch.float8_e4m3fn),
        "grad": torch.ones(2, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "step": step,
        "name": f"step {step}",
    }


def test_a_plain_state_is_stitched() -> None:
    stitch(state_of(), None)  # does not say NotPlainError


def test_the_template_is_used_again_while_python_values_change(monkeypatch: pytest.MonkeyPatch) -> None:
    state, planner = state_of(), Planner()
    planner.plan(state)
    monkeypatch.setattr(stitching, "_make_template", _refuse)
    for step in (2, 70_000, 3 << 40):
        state["step"], state["name"] = step, "x" * (step % 1000)
        state["optimizer"]["param_groups"][0]["lr"] = 1 / step
        state["module"]["bias"].add_(1.0)
        image = filled(planner.plan(state))
        assert_same(loaded(image, weights_only=False), through_torch(state))
        with zipfile.ZipFile(BytesIO(image)) as archive:
            assert archive.testzip() is None


def _refuse(*_: object) -> None:
    raise AssertionError("planned from nothing")


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a value": lambda state: state.update(step=5),
    "a name": lambda state: state["module"].update(other=state["module"].pop("bias")),
    "the order": lambda state: state["module"].move_to_end("weight"),
    "a shape": lambda state: state["module"].update(bias=state["module"]["bias"].view(2, 5)),
    "a dtype": lambda state: state.update(f8=state["f8"].view(torch.uint8)),
    "strides": lambda state: state["module"].update(weight=state["module"]["weight"].t()),
    "a storage": lambda state: state["module"].update(bias=state["module"]["bias"].clone()),
    "all storages": lambda state: state.update(module={key: item.clone() for key, item in state["module"].items()}),
    "a tensor object": lambda state: state["module"].update(bias=state["module"]["bias"].detach()),
    "what is tied": lambda state: state["again"].__setitem__(0, state["again"][0].clone()),
    "what is the same object": lambda state: state["again"].__setitem__(0, state["again"][0].detach()),
    "the gradient flag": lambda state: state["module"]["bias"].requires_grad_(),
    "swapped tensors": lambda state: state["again"].reverse(),
    "one more": lambda state: state.update(more=torch.ones(3)),
    "one less": lambda state: state.pop("f8"),
    "an attribute": lambda state: setattr(state["f8"], "note", "mine"),
    "a negative view": lambda state: state.update(neg=torch.ones(2, dtype=torch.complex64).conj().imag),
    "a storage itself": lambda state: state.update(storage=state["f8"].untyped_storage()),
    "a sparse tensor": lambda state: state.update(f8=torch.eye(3).to_sparse()),
    "a meta tensor": lambda state: state.update(f8=torch.ones(3, device="meta")),
    "a quantized tensor": lambda state: state.update(f8=torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
    "a part of a view": lambda state: state["module"].update(bias=state["module"]["bias"][2:4]),
    "memory released": lambda state: (
        state["module"].update(bias=(fresh := torch.ones(9))), fresh.untyped_storage().resize_(0), fresh.resize_(0)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("library", [True, False], ids=["native", "torch"])
def test_whatever_changes_the_plan_is_that_of_a_new_planner(
    change: str, monkeypatch: pytest.MonkeyPatch, *, library: bool
) -> None:
    if not library:
        monkeypatch.setattr(native, "_library", lambda: None)
    state, planner = state_of(), Planner()
    planner.plan(state)
    CHANGES[change](state)
    again = filled(planner.plan(state))
    assert again == image_of(state)
    assert_same(loaded(again, weights_only=False), through_torch(state))
    assert filled(planner.plan(state)) == again


def test_stitched_and_general_plans_hold_the_same() -> None:
    state = state_of()
    stitched, general = Planner().plan(state), plan._plan_generally(state)
    assert stitched.globals == general.globals
    assert (stitched.records.lengths[3:-3], len(stitched.records)) == (
        general.records.lengths[3:-3],
        len(general.records),
    )
    assert_same(loaded(filled(stitched), weights_only=False), loaded(filled(general), weights_only=False))


def test_a_stitched_image_loads_with_weights_only() -> None:
    state = state_of()
    del state["name"]
    assert_same(loaded(image_of(state), weights_only=True), through_torch(state))


def test_tied_tensors_come_back_as_one() -> None:
    state = state_of()
    back = loaded(image_of(state), weights_only=False)
    assert back["again"][0] is back["again"][2] is back["module"]["tied"]
    assert back["again"][1] is back["module"]["bias"]
    assert back["module"]["weight"].untyped_storage()._cdata == back["module"]["bias"].untyped_storage()._cdata


def test_a_state_that_holds_the_marker_itself_takes_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stitching, "_MARKER", unpack(">d", b"@ABCDEFG")[0])
    monkeypatch.setattr(stitching, "_MARKER_BYTES", b"G@ABCDEFGQ")
    state = {"tensor": torch.ones(3), "text": "G@ABCDEFGQ"}
    with pytest.raises(NotPlainError):
        stitch(state, None)
    assert_same(loaded(image_of(state), weights_only=False), through_torch(state))


def test_many_shared_names_do_not_collide_with_the_memo() -> None:
    # Far more memo entries before and between the fragments than the least base.
    state = {f"name {i}": (f"value {i}", torch.full((2,), float(i))) for i in range(3000)}
    assert_same(loaded(image_of(state), weights_only=True), state)


def test_what_may_wait_is_copied_later() -> None:
    big, other, small = torch.rand(1 << 19), torch.rand(1 << 19), torch.rand(8)
    state, planner = {"big": big, "other": other, "small": small, "step": 1}, Planner()
    for _ in range(2):
        expected = torch.frombuffer(image_of(state), dtype=torch.uint8)
        planned = planner.plan(state)
        image = torch.zeros(planned.size_bytes, dtype=torch.uint8)
        digests, remainder = planned.write_into(image, lambda tensor: tensor.data_ptr() == big.data_ptr())
        assert remainder is not None
        assert remainder.size_bytes == big.nbytes
        assert [storage.data_ptr() for storage in remainder.storages] == [big.data_ptr()]
        small.add_(1.0)
        other.add_(1.0)  # neither was left for later
        digests += remainder.copy()
        check_digests(digests, image, planned)
        different = int(torch.count_nonzero(image != expected))
        assert different <= 8 * len(planned.records), "all but the checksums is as it was"
    image = torch.zeros(planner.plan(state).size_bytes, dtype=torch.uint8)
    assert planner.plan(state).write_into(image, lambda _: False).remainder is None
