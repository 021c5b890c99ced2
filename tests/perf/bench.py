"""``make bench``: what a save costs, as ratios to floors that are measured in the same run on the same machine.

Machines are shared and noisy, so absolute figures do not travel; ratios do. Floors: one plain memcpy of the same bytes
into pre-faulted shared memory, and ``torch.save`` with and without fsync. Rounds of all contenders alternate, so that a
slow moment of the machine hits each of them. Prints a table; ``--json FILE`` keeps the samples.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

import cairn
from tests.daemon_process import DaemonProcess

GIB = 1 << 30


def adam_state(size_bytes: int) -> dict[str, object]:
    """A model in bf16 with fp32 master weights and two moments, 14 bytes a parameter, in 4 tensors a layer."""
    layers = 61
    numel = size_bytes // 14 // layers
    generator = torch.Generator().manual_seed(1)
    state: dict[str, object] = {"step": 1000, "lr": 3e-4}
    for layer in range(layers):
        master = torch.rand(numel, generator=generator)
        state[f"layer.{layer}"] = {
            "weight": master.to(torch.bfloat16), "master": master, "exp_avg": master * 0.1, "exp_avg_sq": master * 0.01,
        }  # fmt: skip
    return state


def small_state(count: int = 20_000) -> dict[str, object]:
    """Many small tensors of 4 to 64 KB."""
    return {f"t{i}": torch.full((1024 * (1 + i % 16),), float(i)) for i in range(count)}


def tensors_of(state: object) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [item for value in state.values() for item in tensors_of(value)] if isinstance(state, dict) else []


def touch(state: object) -> None:
    """One training step, as far as a checkpoint is concerned: every value changes in place."""
    for tensor in tensors_of(state):
        tensor.mul_(1.0001)


class Memcpy:
    """The floor: the same bytes into shared memory that was faulted in before."""

    def __init__(self, size_bytes: int) -> None:
        fd = os.memfd_create("floor")
        os.posix_fallocate(fd, 0, size_bytes)
        self._memory = mmap.mmap(fd, size_bytes)
        os.close(fd)
        self._source = torch.ones(size_bytes, dtype=torch.uint8)
        self._size_bytes = size_bytes
        self._target = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self()

    def __call__(self) -> None:
        ctypes.memmove(self._target, self._source.data_ptr(), self._size_bytes)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def torch_save(state: object, path: Path, *, sync: bool) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def measure(name: str, state: dict[str, object], folder: Path, rounds: int) -> dict[str, object]:
    """All contenders on one state; seconds per round."""
    size_bytes = sum(tensor.nbytes for tensor in tensors_of(state))
    memcpy = Memcpy(size_bytes)
    samples: dict[str, list[float]] = {
        key: [] for key in ("memcpy", "torch_save", "torch_save_fsync", "stall", "tier1", "tier2")
    }
    rss: list[int] = []
    with DaemonProcess(folder, capture_memory_bytes=4 * size_bytes + GIB) as daemon:
        process = psutil.Process(daemon.pid)
        client = cairn.connect(job="bench", runtime_dir=str(daemon.runtime_dir), persistent_time_interval=0)
        cpu_before = process.cpu_times()
        first_stall = 0.0
        for number in range(rounds + 2):
            touch(state)
            started = time.perf_counter()
            with client.create(f"step{number}") as checkpoint:
                checkpoint.save("state.pt", state)
            stall = time.perf_counter() - started
            client.wait(f"step{number}", durability="tier1", timeout=600)
            tier1 = time.perf_counter() - started
            client.wait(f"step{number}", durability="tier2", timeout=600)
            tier2 = time.perf_counter() - started
            info = process.memory_full_info()
            rss.append(info.uss)
            if number == 0:
                first_stall = stall
            if number < 2:
                continue  # the pool has two buffers: both are warm from here on
            samples["stall"].append(stall)
            samples["tier1"].append(tier1)
            samples["tier2"].append(tier2)
            samples["memcpy"].append(timed(memcpy))
            samples["torch_save"].append(timed(lambda: torch_save(state, folder / "plain.pt", sync=False)))
            samples["torch_save_fsync"].append(timed(lambda: torch_save(state, folder / "synced.pt", sync=True)))
        cpu_after = process.cpu_times()
        cpu_s = (cpu_after.user + cpu_after.system - cpu_before.user - cpu_before.system) / (rounds + 2)
        client.close()
        rss_file = process.memory_info()
    medians = {key: statistics.median(values) for key, values in samples.items()}
    return {
        "state": name,
        "size_bytes": size_bytes,
        "rounds": rounds,
        "first_stall_s": first_stall,
        "median_s": medians,
        "samples_s": samples,
        "daemon_cpu_s_per_gb": cpu_s / (size_bytes / 1e9),
        "daemon_private_bytes": max(rss),
        "daemon_rss_bytes": rss_file.rss,
        "ratios": {
            "stall / memcpy": medians["stall"] / medians["memcpy"],
            "first stall / warm stall": first_stall / medians["stall"],
            "stall / torch.save": medians["stall"] / medians["torch_save"],
            "stall / torch.save + fsync": medians["stall"] / medians["torch_save_fsync"],
            "time to tier 1 / torch.save + fsync": medians["tier1"] / medians["torch_save_fsync"],
            "time to tier 2 / torch.save + fsync": medians["tier2"] / medians["torch_save_fsync"],
        },
    }


def report(result: dict[str, object]) -> str:
    medians, ratios = result["median_s"], result["ratios"]
    assert isinstance(medians, dict)
    assert isinstance(ratios, dict)
    lines = [f"{result['state']}: {result['size_bytes'] / 1e9:.2f} GB, median of {result['rounds']} rounds"]  # type: ignore[operator]
    lines += [f"  {key:<22} {value:8.3f} s" for key, value in medians.items()]
    lines.append(f"  {'first stall':<22} {result['first_stall_s']:8.3f} s")
    lines += [f"  {key:<38} {value:8.2f} x" for key, value in ratios.items()]
    lines.append(f"  daemon: {result['daemon_cpu_s_per_gb']:.2f} CPU-s per GB to both tiers, "
                 f"{result['daemon_private_bytes'] / 2**20:.0f} MiB private memory")  # type: ignore[operator]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size-gb", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where tier 1 and the bucket lie; default: a temporary folder here")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    states: dict[str, Callable[[], dict[str, object]]] = {
        "adam": lambda: adam_state(int(arguments.size_gb * 1e9)),
        "small": small_state,
    }
    results = []
    for name, make in states.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder or Path.cwd(), prefix="bench-") as folder:
            results.append(measure(name, make(), Path(folder), arguments.rounds))
            print(report(results[-1]), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, peak of this process {peak / 2**30:.1f} GiB")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
