"""Loading into tensors that exist: equal afterwards, refused as a whole when something does not fit."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cairn.live import copy_into, load_into
from cairn.reading import Piece, read_pieces
from cairn_api.errors import ConfigurationError, UnavailableError


def state(seed: int) -> dict[str, Any]:
    """Many small tensors, some large ones and some that are no plain memory, all of them set by *seed*."""
    torch.manual_seed(seed)
    tied = torch.rand(300)
    return {
        "step": seed,
        "small": {f"t{number}": torch.rand(number % 70) for number in range(1500)},
        "large": [torch.rand(3_000_000), torch.rand(1000, 1000).to(torch.bfloat16)],
        "pair": (tied, tied),
        "column": torch.rand(64, 64).t(),
        "scalar": torch.tensor(float(seed)),
        "flags": torch.rand(100) > 0.5,
        "complex": torch.rand(50, dtype=torch.complex64).conj(),
        "ordered": OrderedDict(weight=torch.nn.Parameter(torch.rand(5000)), name="layer"),
    }


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [item for key in sorted(value) for item in flat(value[key])]
    return [item for entry in value for item in flat(entry)] if isinstance(value, (list, tuple)) else [value]


def assert_equal(ours: Any, theirs: Any) -> None:
    for mine, other in zip(flat(ours), flat(theirs), strict=True):
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


def bytes_of(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "state.pt"
    torch.save(state(1), path)
    return path


def restore(path: Path, into: Any) -> Any:
    fd = os.open(path, os.O_RDONLY)
    try:
        return load_into(fd, path.stat().st_size, into, weights_only=True)
    finally:
        os.close(fd)


def test_all_values_are_the_saved_ones_and_all_tensors_the_given_ones(saved: Path) -> None:
    live = state(2)
    held = [(item, item.data_ptr()) for item in flat(live) if isinstance(item, torch.Tensor)]
    restored = restore(saved, live)
    assert_equal(restored, state(1))
    assert restored["step"] == 1
    assert type(restored["ordered"]) is OrderedDict
    found = [item for item in flat(restored) if isinstance(item, torch.Tensor)]
    assert all(mine is item and mine.data_ptr() == address for mine, (item, address) in zip(found, held, strict=True))


def test_without_a_file_the_values_are_copied(saved: Path) -> None:
    assert_equal(copy_into(torch.load(saved), state(2)), state(1))


def test_what_was_tied_in_the_save_need_not_be_tied_now(saved: Path) -> None:
    live = {**state(2), "pair": (torch.zeros(300), torch.zeros(300))}
    assert_equal(restore(saved, live), state(1))


def test_values_count_and_not_how_they_lie_in_memory(saved: Path) -> None:
    live = {**state(2), "column": torch.zeros(64, 64), "complex": torch.zeros(50, dtype=torch.complex64)}
    live["large"][0] = torch.zeros(6_000_000)[::2]
    assert_equal(restore(saved, live), state(1))


def test_a_module_and_an_optimizer_are_loaded_in_place(tmp_path: Path) -> None:
    def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Linear(100, 100)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.rand(3, 100)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = trained()
    path = tmp_path / "both.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    other, other_optimizer = trained()
    into = {"model": other.state_dict(), "optimizer": other_optimizer.state_dict()}
    versions = [parameter._version for parameter in other.parameters()]
    restore(path, into)
    assert_equal(other.state_dict(), model.state_dict())
    assert_equal(flat(other_optimizer.state_dict()["state"]), flat(optimizer.state_dict()["state"]))
    assert all(now._version > before for now, before in zip(other.parameters(), versions, strict=True))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda live: live["small"].pop("t7"), r"small\.t7 is not in the given state"),
        (lambda live: live["small"].update(more=torch.ones(1)), r"small\.more was not saved"),
        (lambda live: live["large"].__setitem__(0, torch.ones(5)), r"large\.0 was saved with shape \(3000000,\), not"),
        (lambda live: live["large"].append(torch.ones(5)), r"large has 2 entries in the save and 3"),
        (lambda live: live.update(scalar=torch.tensor(1)), r"scalar was saved as torch.float32, not torch.int64"),
        (lambda live: live.update(scalar=2.0), r"scalar was saved as a tensor, and the given state has a float"),
        (lambda live: live.update(step=torch.tensor(1)), r"step was saved as a int, not as a tensor"),
        (lambda live: live.update(large=None), r"large is a list in the save and a NoneType"),
        (lambda live: live.update(flags=torch.ones(100, dtype=torch.bool, device="meta")), r"flags has no memory"),
        (lambda live: live.update(flags=torch.ones(1, dtype=torch.bool).expand(100)), r"flags is expanded"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_changes(
    saved: Path, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    live = state(2)
    change(live)
    before = bytes_of(live)
    with pytest.raises(ConfigurationError, match=told) as caught:
        restore(saved, live)
    assert "nothing was changed" in caught.value.hint
    assert bytes_of(live) == before


@pytest.mark.parametrize("nested", [True, False])
def test_an_optimizer_without_state_is_told_how_to_make_it(tmp_path: Path, nested: bool) -> None:
    parameters = [torch.nn.Parameter(torch.rand(10)) for _ in range(20)]
    for parameter in parameters:
        parameter.grad = torch.ones(10)
    trained, fresh = torch.optim.AdamW(parameters), torch.optim.AdamW(parameters)
    trained.step()
    saved, into = [{"optimizer": it.state_dict()} if nested else it.state_dict() for it in (trained, fresh)]
    torch.save(saved, tmp_path / "state.pt")
    with pytest.raises(ConfigurationError, match=r"of an optimizer that has no state yet\. Next step") as caught:
        restore(tmp_path / "state.pt", into)
    assert "take one step before this load" in caught.value.hint
    fresh.step()
    into = {"optimizer": fresh.state_dict()} if nested else fresh.state_dict()
    assert_equal(restore(tmp_path / "state.pt", into), saved)


def test_only_some_of_many_differences_are_told(saved: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"t\d+ is not in the given state \(and 1495 more\)"):
        restore(saved, {**state(2), "small": {}})


def test_pieces_of_every_size_and_distance_land_where_they_belong(tmp_path: Path) -> None:
    data = os.urandom(40_000_000)
    path = tmp_path / "bytes"
    path.write_bytes(data)
    spans = [(0, 1), (1, 100), (164, 4096), (10_000, 17_000_000), (17_010_000, 1), (30_000_000, 10_000_000), (50, 5000)]
    spans += [(20_000_000 + number * 40, 8) for number in range(3000)]
    target = torch.zeros(sum(length for _, length in spans), dtype=torch.uint8)
    pieces, at = [], target.data_ptr()
    for offset, length in spans:
        pieces.append(Piece(offset, at, length))
        at += length
    fd = os.open(path, os.O_RDONLY)
    try:
        read_pieces(fd, pieces)
        assert target.numpy().tobytes() == b"".join(data[offset : offset + length] for offset, length in spans)
        with pytest.raises(UnavailableError, match="it ends at 40000000"):
            read_pieces(fd, [Piece(39_999_990, target.data_ptr(), 20)])
    finally:
        os.close(fd)
