"""Loading from an image in memory: the same as ``torch.load``, mapped or copied, and nothing is kept for too long."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from cairn.image import Image
from cairn_api.errors import ConfigurationError


class Custom:
    """A class nobody trusts."""


def image(path: Path, *, copied: bool = False) -> Image:
    fd = os.open(path, os.O_RDONLY)
    try:
        return (Image.copied if copied else Image.mapped)(fd, path.stat().st_size)
    finally:
        os.close(fd)


def saved(path: Path, state: Any, **options: Any) -> Path:
    torch.save(state, path, **options)
    return path


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("weights_only", [False, True])
def test_tensors_are_those_that_torch_loads(tmp_path: Path, copied: bool, weights_only: bool) -> None:
    shared = torch.rand(5000)
    state: dict[str, Any] = {
        "small": torch.rand(3), "large": torch.rand(1_000_000), "views": (shared[:100], shared[100:]),
        "empty": torch.empty(0), "sparse": torch.eye(50).to_sparse(), "half": torch.rand(5000).to(torch.float16),
    }  # fmt: skip
    path = saved(tmp_path / "state.pt", state)
    loaded = image(path, copied=copied).load(map_location=None, weights_only=weights_only)
    expected = torch.load(path)
    for name in ("small", "large", "empty", "half"):
        assert torch.equal(loaded[name], expected[name])
    assert torch.equal(loaded["sparse"].to_dense(), expected["sparse"].to_dense())
    assert loaded["views"][0].untyped_storage().data_ptr() == loaded["views"][1].untyped_storage().data_ptr()
    assert loaded["large"].untyped_storage().nbytes() == 4_000_000, "a later save must not drag the image along"
    loaded["large"].zero_()
    assert torch.equal(torch.load(path)["large"], state["large"]), "writing stays in this process"


def test_an_image_lives_as_long_as_a_large_tensor_of_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "state.pt", {"random": torch.rand(500), "weights": torch.rand(100_000)})
    mapped = image(path)
    gone = weakref.ref(mapped.memory)
    loaded = mapped.load(map_location=None, weights_only=True)
    del mapped
    gc.collect()
    random, weights = loaded["random"], loaded["weights"]
    del loaded
    part = weights[10:]
    del weights
    assert gone() is not None
    assert part.sum() > 0
    del part
    assert gone() is None, "the small tensor has memory of its own"
    assert random.sum() > 0


def test_formats_without_records_load_too(tmp_path: Path) -> None:
    old = saved(tmp_path / "old.pt", {"x": torch.rand(10_000)}, _use_new_zipfile_serialization=False)
    assert torch.equal(image(old).load(map_location="cpu", weights_only=True)["x"], torch.load(old)["x"])


def test_a_location_is_honoured(tmp_path: Path) -> None:
    path = saved(tmp_path / "state.pt", {"x": torch.rand(10_000)})
    assert image(path).load(map_location="meta", weights_only=True)["x"].is_meta


def test_shapes_alone_are_loaded_under_a_fake_mode(tmp_path: Path) -> None:
    path = saved(tmp_path / "state.pt", {"x": torch.rand(10_000)})
    with FakeTensorMode():
        loaded = image(path).load(map_location=None, weights_only=True)["x"]
    assert isinstance(loaded, FakeTensor)
    assert loaded.shape == (10_000,)


def test_what_is_not_allowed_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "state.pt", {"x": Custom()})
    with pytest.raises(ConfigurationError, match=r"refers to .*Custom, which is outside the allow-list"):
        image(path).load(map_location=None, weights_only=True)
    assert type(image(path).load(map_location=None, weights_only=False)["x"]).__name__ == "Custom"


def test_a_pickle_that_is_forced_to_be_safe_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(Exception, match="Custom"):
        image(saved(tmp_path / "state.pt", {"x": Custom()})).load(map_location=None, weights_only=False)
