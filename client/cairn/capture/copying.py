"""Moving bytes into an image without holding the interpreter lock.

A Python loop over tensors hands the lock over once per tensor; beside one busy Python thread that turned 82 ms into
12.5 s. So all copies of one kind go down in a single call.

Only large storages are copied by several threads. torch splits any copy of 32 KiB or more, and then waits for its
helper threads: beside a computation that keeps every core busy, each wait can take a scheduler's time slice, and
thousands of them took seconds where one thread took a tenth of one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import _C

_SHARED_WORK_BYTES = 32 << 20
"""From here on a copy (3 ms or more) is worth waiting for helper threads."""


def byte_views(spans: Sequence[tuple[torch.UntypedStorage, int, int]]) -> list[torch.Tensor]:
    """Rows of uint8 over ``(storage, start, length)``, in bytes: no copy, on the storage's device."""
    return [_byte_view(storage, start, length) for storage, start, length in spans]


def _byte_view(storage: torch.UntypedStorage, start: int, length: int) -> torch.Tensor:
    whole = length == storage.nbytes()
    if storage.device.type == "cpu":
        # Of all ways to make a view, the old constructor alone keeps the interpreter lock. Tensor methods hand it over,
        # and with 20,000 tensors beside a busy thread they took three to ten times as long.
        return torch.ByteTensor(storage if whole else storage[start : start + length])
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage) if whole else empty.set_(storage, start, (length,), (1,))


def copy_all(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each uint8 source into the CPU destination beside it; return when every byte has arrived.

    Sources on a GPU travel on a side stream that first waits for the caller's current stream of that device, and
    overlap with the copies on the CPU. Into memory that ``pinning.register`` has registered they run at full speed.
    """
    small: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    large: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    on_gpu: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for destination, source in zip(destinations, sources, strict=True):
        if source.is_cuda:
            into, out_of = on_gpu.setdefault(source.device, ([], []))
        else:
            into, out_of = large if source.numel() >= _SHARED_WORK_BYTES else small
        into.append(destination)
        out_of.append(source)

    arrivals = [_start_from_gpu(device, into, out_of) for device, (into, out_of) in on_gpu.items()]
    try:
        if large[0]:
            torch._foreach_copy_(*large)
        if small[0]:
            with _without_helper_threads():
                torch._foreach_copy_(*small)
    finally:
        # Even after a failure no copy may still be running into memory that the caller is about to give back.
        for arrival in arrivals:
            arrival.synchronize()


def _start_from_gpu(
    device: torch.device, destinations: list[torch.Tensor], sources: list[torch.Tensor]
) -> torch.cuda.Event:
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        torch._foreach_copy_(destinations, sources, non_blocking=True)
        arrival: torch.cuda.Event = side.record_event()
    return arrival


@contextmanager
def _without_helper_threads() -> Iterator[None]:
    """torch's copies in this thread run in this thread alone.

    ``torch.set_num_threads`` would also change the process's other threads and MKL, so OpenMP is asked itself: its
    number of threads belongs to the calling thread. A torch built without OpenMP stays as it is.
    """
    openmp = ctypes.CDLL(_C.__file__)  # symbols of the libraries it depends on are found too
    if not hasattr(openmp, "omp_set_num_threads"):
        yield
        return
    usual_count = openmp.omp_get_max_threads()
    openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        openmp.omp_set_num_threads(usual_count)
