"""Which bytes of which storages a state needs: all of a storage, or only the parts that its views reach.

``torch.save`` keeps every storage whole, so a ten-element view of a 4 GiB buffer saves 4 GiB. Here a storage whose
views leave bytes uncovered is cut into *regions*: maximal runs of overlapping or adjacent views. Views that share
bytes share a region, so they alias each other again after loading.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from cairn_api.errors import ConfigurationError


class Use(NamedTuple):
    """One view of a storage, as the byte interval from its first to its last element; empty views have start == end.

    ``dtype`` is None for an explicit ``UntypedStorage``. A *fixed* use can only be expressed by a storage of that
    dtype: an explicit ``TypedStorage``, or a quantized tensor.
    """

    start: int
    end: int
    dtype: torch.dtype | None
    fixed: bool = False


@dataclass(slots=True, eq=False)
class Region:
    """Bytes ``[start, start + length)`` of a storage: one record of the archive.

    ``dtype`` is what all its views agree on, else None, and then the record is an untyped storage. ``pid`` is the
    persistent id that the pickle holds for it, set when the pickle first needs it.
    """

    storage: torch.UntypedStorage
    start: int
    length: int
    dtype: torch.dtype | None
    pid: tuple[object, ...] | None = None

    def holds(self, use: Use) -> bool:
        """Whether the view's bytes lie in this region and its dtype can be expressed over it."""
        in_reach = self.start <= use.start and use.end <= self.start + self.length
        return in_reach and (self.dtype is None or self.dtype is use.dtype)


@dataclass(slots=True)
class Survey:
    """All uses of one storage, gathered while pickling the state as if the storage were kept whole.

    ``whole`` says that one use alone covers the storage. ``agreed`` says that all uses have the dtype of the first.
    """

    region: Region
    whole: bool = False
    agreed: bool = True
    uses: list[Use] = field(default_factory=list)

    def add(self, use: Use) -> None:
        """Count one more view."""
        if use.end - use.start == self.region.length:
            self.whole = True
        if use.dtype is not self.region.dtype:
            self.agreed = False
        self.uses.append(use)

    def is_settled(self) -> bool:
        """Whether keeping the storage whole, under its first dtype, was right."""
        return self.agreed and (self.whole or self._covered())

    def regions(self) -> list[Region]:
        """The regions to store instead, by rising start, regions for empty views first.

        Raises:
            ConfigurationError: the same bytes are an explicit typed storage (or quantized) and something else.
        """
        if self.whole or self._covered():
            return [_region(self.region.storage, 0, self.region.length, self.uses)]
        reaching = sorted((use for use in self.uses if use.start < use.end), key=lambda use: use.start)
        empty_dtypes = dict.fromkeys(use.dtype for use in self.uses if use.start == use.end)
        regions = [Region(self.region.storage, 0, 0, dtype) for dtype in empty_dtypes]
        for run in _runs(reaching):
            # Views of wider elements must start on a multiple of their width inside the region too. The bytes
            # gained at the front are reached by no view of this region.
            width = max(_width(use) for use in run)
            start = run[0].start // width * width
            end = max(use.end for use in run)
            regions.append(_region(self.region.storage, start, end - start, run))
        return regions

    def _covered(self) -> bool:
        reached = 0
        for use in sorted(self.uses, key=lambda use: use.start):
            if use.start > reached:
                return False
            reached = max(reached, use.end)
        return reached == self.region.length


def find(regions: Sequence[Region], use: Use) -> Region | None:
    """The region that holds *use*. An empty view fits anywhere of its dtype; its position then means nothing."""
    if use.start == use.end:
        whole = next((region for region in regions if region.length and region.holds(use)), None)
        return whole or next((region for region in regions if region.dtype in (use.dtype, None)), None)
    low, high = 0, len(regions)
    while low < high:
        middle = (low + high) // 2
        if regions[middle].start + regions[middle].length < use.end:
            low = middle + 1
        else:
            high = middle
    return regions[low] if low < len(regions) and regions[low].holds(use) else None


def _runs(uses: Iterable[Use]) -> Iterable[list[Use]]:
    """Group uses, sorted by start, into maximal runs without a byte between them."""
    run: list[Use] = []
    end = 0
    for use in uses:
        if run and use.start > end:
            yield run
            run = []
        run.append(use)
        end = max(end, use.end)
    if run:
        yield run


def _region(storage: torch.UntypedStorage, start: int, length: int, uses: Sequence[Use]) -> Region:
    dtypes = {use.dtype for use in uses}
    if len(dtypes) > 1 and any(use.fixed for use in uses):
        shown = ", ".join(sorted(str(dtype or "untyped bytes") for dtype in dtypes))
        raise ConfigurationError(
            f"the same bytes are saved as several types ({shown}), one of them as a typed storage or quantized tensor",
            hint="save a clone of one of the two",
        )
    return Region(storage, start, length, dtypes.pop() if len(dtypes) == 1 else None)


def _width(use: Use) -> int:
    return use.dtype.itemsize if use.dtype is not None else 1
