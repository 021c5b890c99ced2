"""Contenders that write a file and wait for it: torch.save and safetensors, with and without fsync."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from tests.perf.contender import Contender, fsync_file
from tests.perf.page_cache import PageCache
from tests.perf.states import State, copy_into


class TorchSave(Contender):
    """``torch.save``, loaded by ``torch.load``, and again with ``mmap=True``."""

    name = "torch.save"

    def save(self, state: State) -> None:
        self.number += 1
        torch.save(state, self.path())

    def load(self, *, mmap: bool = False) -> State:
        """The newest save in new tensors, or in tensors that are mapped and not read yet."""
        loaded: State = torch.load(self.path(), map_location="cpu", weights_only=True, mmap=mmap)
        return loaded

    def load_into(self, live: State, *, mmap: bool = False) -> object:
        loaded = self.load(mmap=mmap)
        copy_into(live, loaded)
        return loaded

    def measure_restores(self, live: State, cache: PageCache) -> dict[str, float]:
        return {
            "load_warm": self.warm(cache, self.load),
            **super().measure_restores(live, cache),
            "mmap_load_warm": self.warm(cache, lambda: self.load(mmap=True)),
            "mmap_live_warm": self.warm(cache, lambda: self.load_into(live, mmap=True)),
            "mmap_live_cold": self.cold(cache, lambda: self.load_into(live, mmap=True)),
        }


class TorchSaveFsync(TorchSave):
    """``torch.save`` that is on disk when it returns; its files are those of :class:`TorchSave`."""

    name = "torch.save+fsync"
    restores = False

    def save(self, state: State) -> None:
        super().save(state)
        fsync_file(self.path())

    def finish(self) -> None:
        pass


class Safetensors(Contender):
    """``safetensors.torch.save_file``; scalars go into its metadata."""

    name = "safetensors"

    @classmethod
    def why_not(cls) -> str:
        return "" if importlib.util.find_spec("safetensors") else "safetensors is not installed"

    def save(self, state: State) -> None:
        from safetensors.torch import save_file  # noqa: PLC0415 - not a dependency of the tests

        self.number += 1
        scalars = {key: repr(value) for key, value in state.items() if not isinstance(value, dict)}
        save_file(flatten(state["tensors"]), self.path(), metadata=scalars)

    def load_into(self, live: State) -> object:
        from safetensors.torch import load_file  # noqa: PLC0415 - as above

        loaded = load_file(self.path())
        flat = flatten(live["tensors"])
        copy_into(flat, {key: loaded[key] for key in flat})
        return loaded


class SafetensorsFsync(Safetensors):
    """safetensors that is on disk when it returns."""

    name = "safetensors+fsync"
    restores = False

    def save(self, state: State) -> None:
        super().save(state)
        fsync_file(self.path())

    def finish(self) -> None:
        pass


def flatten(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Nested names joined by dots."""
    flat: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        flat.update({prefix + key: value} if isinstance(value, torch.Tensor) else flatten(value, f"{prefix}{key}."))
    return flat
