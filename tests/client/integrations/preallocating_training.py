"""One rank of a DeepSpeed training that takes a step, waits for what is made in the background, and saves.

Prints one JSON line: the free buffers before the first save, and for each partition of it the one that holds it.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from torch import distributed

from cairn.integrations.deepspeed.jobs import job_for

WIDTH = 1024


def network() -> list[torch.nn.Module]:
    """With a frozen layer, tied weights, and buffers of which one is not saved."""
    first, last = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
    frozen = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(requires_grad=False)
    tied = torch.nn.Linear(WIDTH, WIDTH)
    tied.weight = first.weight
    last.register_buffer("average", torch.ones(1_000_000))
    last.register_buffer("cache", torch.ones(5_000_000), persistent=False)
    return [first, frozen, tied, last]


def start(options: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    model: torch.nn.Module
    if options["pipeline"]:
        model = PipelineModule([torch.nn.Linear(WIDTH, WIDTH) for _ in range(3)], num_stages=1, loss_fn=loss_of)
    else:
        model = torch.nn.Sequential(*network())
    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {"stage": options["stage"]},
            "bf16": {"enabled": options["bf16"]},
            "cairn": options["block"],
        },
    )
    return engine


def loss_of(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return (output - label).square().mean()


def train(engine: Any, options: dict[str, Any]) -> None:
    """Until the optimizer has taken one step."""
    data = torch.randn(2, WIDTH, dtype=torch.bfloat16 if options["bf16"] else torch.float32)
    if options["pipeline"]:
        engine.train_batch(iter([(data, data)] * 2))
        return
    for _ in range(2):
        assert not made()
        engine.backward(loss_of(engine(data), data))
        engine.step()


def made() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "cairn-prefault"]


def main() -> None:
    options = json.loads(sys.argv[1])
    deepspeed.init_distributed("gloo", verbose=False)
    engine = start(options)
    client = job_for(engine.checkpoint_engine.settings, options["save_dir"]).client
    for thread in made():
        thread.join()
    pool = client._session.pool
    before_training = len(pool._slots)
    train(engine, options)
    for thread in made():
        thread.join()
    made_ahead = {slot.segment.name: (slot.partition, slot.segment.size_bytes) for slot in pool._slots}
    engine.save_checkpoint(options["save_dir"])
    client.settle()
    version = client.versions()[0]
    held = {slot.partition: slot.segment.name for slot in pool._slots if str(slot.owner) == version["version"]}
    told = {
        "before_training": before_training,
        "made_ahead": made_ahead,
        "held": held,
        "sizes": {name: size for _, name, rank, size in version["partitions"] if rank == client.ranks.rank},
        "streamed": client.statistics()["streamed_partitions"],
    }
    sys.stdout.write(f"told: {json.dumps(told)}\n")
    distributed.barrier()
    client.close()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
