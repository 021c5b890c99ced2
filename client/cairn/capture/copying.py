"""Moving bytes into an image without holding the interpreter lock.

A Python loop over tensors hands the lock over once per tensor; beside one busy Python thread that turned 82 ms into
12.5 s. So all copies of one kind go down in a single call: to :mod:`cairn.capture.native` where its library is, which
also spares the cache, and else to torch.

With torch, only large storages are copied by several threads. It splits any copy of 32 KiB or more, and then waits for
its helper threads: beside a computation that keeps every core busy, each wait can take a scheduler's time slice, and
thousands of them took seconds where one thread took a tenth of one.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import methodcaller

import torch
from torch import _C

from cairn.capture import native
from cairn_api.errors import ConfigurationError

_SHARED_WORK_BYTES = 32 << 20
"""From here on a copy by torch (3 ms or more) is worth waiting for helper threads."""


@dataclass(frozen=True, slots=True)
class Spans:
    """What goes where: ``lengths[i]`` bytes at ``addresses[i]`` to ``offsets[i]`` of an image.

    They lie in the memory of ``holders[i]``, which was at ``pointers[i]`` when that was found out. Holders are tensors
    or their storages, and may hold several spans. ``on_cpu`` says that none of them lies on a GPU.
    """

    offsets: array[int]
    addresses: array[int]
    lengths: array[int]
    holders: Sequence[torch.Tensor | torch.UntypedStorage]
    pointers: list[int]
    on_cpu: bool

    def check(self) -> None:
        """Raises :class:`ConfigurationError` if memory is no longer where it was: to copy from there could crash."""
        if list(map(methodcaller("data_ptr"), self.holders)) != self.pointers:
            raise ConfigurationError(
                "a tensor's memory was released or moved between planning the save and copying it",
                hint="save from one thread, between two training steps",
            )

    def subset(self, indexes: Sequence[int]) -> Spans:
        """Only these spans, in the given order."""
        return Spans(
            array("Q", map(self.offsets.__getitem__, indexes)),
            array("Q", map(self.addresses.__getitem__, indexes)),
            array("Q", map(self.lengths.__getitem__, indexes)),
            [self.holders[index] for index in indexes],
            [self.pointers[index] for index in indexes],
            self.on_cpu,
        )

    def views(self) -> list[torch.Tensor]:
        """Each span as a row of uint8 on its device, without a copy."""
        return [
            _byte_view(
                holder if isinstance(holder, torch.UntypedStorage) else holder.untyped_storage(), address, length
            )
            for holder, address, length in zip(self.holders, self.addresses, self.lengths, strict=True)
        ]


def _byte_view(storage: torch.UntypedStorage, address: int, length: int) -> torch.Tensor:
    start = address - storage.data_ptr()
    whole = length == storage.nbytes()
    if storage.device.type == "cpu":
        # Of all ways to make a view, the old constructor alone keeps the interpreter lock. Tensor methods hand it over,
        # and with 20,000 tensors beside a busy thread they took three to ten times as long.
        return torch.ByteTensor(storage if whole else storage[start : start + length])
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage) if whole else empty.set_(storage, start, (length,), (1,))


def copy_spans(image: torch.Tensor, spans: Spans, threads: int) -> array[int]:
    """Copy all *spans* into *image*, a row of uint8 in CPU memory; returns when every byte has arrived.

    With the native library at most *threads* threads copy what is in CPU memory. For GPUs see :func:`copy_all`.
    :meth:`Spans.check` comes first, if anything ran since the addresses were read.

    Returns the checksums that were taken on the way, perhaps none: see :func:`cairn.capture.native.copy_digesting`.
    """
    if native.available() and spans.on_cpu:
        start = image.data_ptr()
        if native.can_digest():
            return native.copy_digesting(spans.offsets, spans.addresses, spans.lengths, threads, target_base=start)
        native.copy(spans.offsets, spans.addresses, spans.lengths, threads, target_base=start)
    else:
        copy_all(
            [image[offset : offset + length] for offset, length in zip(spans.offsets, spans.lengths, strict=True)],
            spans.views(),
            threads,
        )
    return array("Q")


def copy_all(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], threads: int = 1) -> None:
    """Copy each uint8 source into the CPU destination beside it; return when every byte has arrived.

    Sources on a GPU travel on a side stream that first waits for the caller's current stream of that device, and
    overlap with the copies on the CPU. Into memory that ``pinning.register`` has registered they run at full speed.
    """
    on_cpu: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    on_gpu: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for destination, source in zip(destinations, sources, strict=True):
        into, out_of = on_gpu.setdefault(source.device, ([], [])) if source.is_cuda else on_cpu
        into.append(destination)
        out_of.append(source)

    arrivals = [_start_from_gpu(device, into, out_of) for device, (into, out_of) in on_gpu.items()]
    try:
        _copy_on_cpu(*on_cpu, threads)
    finally:
        # Even after a failure no copy may still be running into memory that the caller is about to give back.
        for arrival in arrivals:
            arrival.synchronize()


def _copy_on_cpu(destinations: list[torch.Tensor], sources: list[torch.Tensor], threads: int) -> None:
    if native.available():
        native.copy(_addresses(destinations), _addresses(sources), array("Q", map(torch.numel, sources)), threads)
        return
    large = [source.numel() >= _SHARED_WORK_BYTES for source in sources]
    for shared in (True, False):
        chosen = [index for index, is_large in enumerate(large) if is_large is shared]
        if chosen:
            with _helper_threads(shared=shared):
                torch._foreach_copy_([destinations[index] for index in chosen], [sources[index] for index in chosen])


def _addresses(tensors: Sequence[torch.Tensor]) -> array[int]:
    return array("Q", (tensor.data_ptr() for tensor in tensors))


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
def _helper_threads(*, shared: bool) -> Iterator[None]:
    """Unless *shared*, torch's copies in this thread run in this thread alone.

    ``torch.set_num_threads`` would also change the process's other threads and MKL, so OpenMP is asked itself: its
    number of threads belongs to the calling thread. A torch built without OpenMP stays as it is.
    """
    openmp = ctypes.CDLL(_C.__file__)  # symbols of the libraries it depends on are found too
    if shared or not hasattr(openmp, "omp_set_num_threads"):
        yield
        return
    usual_count = openmp.omp_get_max_threads()
    openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        openmp.omp_set_num_threads(usual_count)
