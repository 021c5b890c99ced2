"""A small, deterministic DeepSpeed training that knows nothing of Cairn: its JSON decides what saves it.

Every rank appends one JSON line per event to ``<events>.<rank>``; losses are exact (``float.hex``). The data of a step
depends on step and rank alone, so a resumed training sees what an uninterrupted one sees.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import PipelineModule
from torch import distributed

WIDTH = 48
BATCH = 4


class Unsavable:
    """Makes a save fail on the rank that has it, in the middle of its state."""

    def __reduce__(self) -> str:
        raise OSError(28, "No space left on device (planted)")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0)
    parser.add_argument("--events", required=True)
    parser.add_argument("--save-dir", required=True)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--parallel", choices=["data", "pipeline", "experts"], default="data")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--steps", type=int, required=True, help="train until this step")
    parser.add_argument("--save-at", type=int, nargs="*", default=[])
    parser.add_argument("--save-16bit-at", type=int, default=0)
    parser.add_argument("--tag", help="save under this tag instead of global_step<N>; {rank} is replaced")
    parser.add_argument("--tag-validation", default="Warn")
    parser.add_argument("--poison-at", type=int, default=0, help="at this step one rank cannot be saved")
    parser.add_argument("--poison-rank", type=int, default=0)
    parser.add_argument("--kill-at", type=int, default=0, help="SIGKILL every rank after this step")
    parser.add_argument("--pause-s", type=float, default=0.0, help="after each step")
    parser.add_argument("--load-dir", help="load before training; default: start afresh")
    parser.add_argument("--load-tag")
    parser.add_argument("--no-optimizer-states", action="store_true")
    parser.add_argument("--weights", help="rank 0 writes the final weights here")
    parser.add_argument("--block", default="", help='JSON of the "cairn" block')
    return parser.parse_args(arguments)


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    given: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4}},
        "zero_optimization": {"stage": options.stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": options.bf16},
        "checkpoint": {"tag_validation": options.tag_validation},
    }
    if options.block:
        given["cairn"] = json.loads(options.block)
    return given


def network(width: int) -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(width, 2 * width), torch.nn.Tanh(), torch.nn.Linear(2 * width, width), torch.nn.LayerNorm(width)
    )


def loss_of(output: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    deviation: torch.Tensor = output - data.roll(1, dims=1)
    return deviation.square().mean()


class Experts(torch.nn.Module):
    """A mixture of two experts, one on each rank, between layers that all ranks have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = torch.nn.Linear(width, width)
        self.experts = MoE(width, torch.nn.Linear(width, width), num_experts=2, ep_size=2, k=1, min_capacity=0)
        self.after = torch.nn.LayerNorm(width)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        mixed, balance, _ = self.experts(self.before(data))
        output: torch.Tensor = self.after(mixed) + balance
        return output


def initialized(options: argparse.Namespace) -> Any:
    """The DeepSpeed engine."""
    model: torch.nn.Module = network(options.width)
    parameters: Any = None
    if options.parallel == "pipeline":
        model = PipelineModule(list(network(options.width)), num_stages=2, loss_fn=loss_of, partition_method="uniform")
    elif options.parallel == "experts":
        torch.manual_seed(1)
        model = Experts(options.width)
        parameters = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "all"}
        )
    return deepspeed.initialize(model=model, model_parameters=parameters, config=configuration(options))[0]


class Training:
    """One rank."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rank = int(os.environ["RANK"])
        self.log = Path(f"{options.events}.{self.rank}").open("a", buffering=1)  # noqa: SIM115 - open as long as the process
        self.engine = initialized(options)
        self.step = 0

    def tell(self, **event: object) -> None:
        self.log.write(json.dumps({"step": self.step, "time": time.time(), **event}) + "\n")

    def load(self) -> None:
        options = self.options
        try:
            path, state = self.engine.load_checkpoint(
                options.load_dir, tag=options.load_tag, load_optimizer_states=not options.no_optimizer_states
            )
        except Exception as error:
            self.tell(load_error=type(error).__name__, message=str(error))
            raise
        self.step = state["step"] if path else 0
        self.tell(loaded=path)

    def train(self) -> None:
        while self.step < self.options.steps:
            self.step += 1
            loss = self.advance()
            self.tell(loss=float(loss).hex())
            self.save()
            if self.step == self.options.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.options.pause_s)

    def advance(self) -> torch.Tensor:
        pipeline = self.options.parallel == "pipeline"
        torch.manual_seed(1000 * self.step + (0 if pipeline else self.rank))  # a pipeline's ends need the same data
        data = torch.randn(BATCH, self.options.width, dtype=torch.bfloat16 if self.options.bf16 else torch.float32)
        if pipeline:
            mean: torch.Tensor = self.engine.train_batch(data_iter=iter([(data, data)]))
            return mean
        loss = loss_of(self.engine(data), data)
        self.engine.backward(loss)
        self.engine.step()
        return loss

    def save(self) -> None:
        options = self.options
        if self.step == options.save_16bit_at:
            self.engine.save_16bit_model(options.save_dir)
            self.tell(saved_16bit=True)
        if self.step not in options.save_at and self.step != options.poison_at:
            return
        state: dict[str, object] = {"step": self.step}
        if self.step == options.poison_at and self.rank == options.poison_rank:
            state["poison"] = Unsavable()
        tag = options.tag.format(rank=self.rank) if options.tag else None
        start = time.perf_counter()
        try:
            self.engine.save_checkpoint(options.save_dir, tag=tag, client_state=state)
        except Exception as error:  # noqa: BLE001 - the test reads what it was
            self.tell(save_error=type(error).__name__, message=str(error))
        else:
            self.tell(saved=tag or f"global_step{self.step}", stall_s=time.perf_counter() - start)

    def finish(self) -> None:
        parameters = list(self.engine.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.options.stage == 3):
            if self.options.weights and self.rank == 0:
                torch.save([parameter.detach().clone() for parameter in parameters], self.options.weights)
        self.tell(finished=True, modules=sorted(name for name in sys.modules if name.partition(".")[0] == "cairn")[:1])
        distributed.barrier()
        distributed.destroy_process_group()


def main() -> None:
    options = parse()
    logging.basicConfig(level=logging.INFO)
    deepspeed.init_distributed("gloo", verbose=False)
    training = Training(options)
    if options.load_dir:
        training.load()
    training.train()
    training.finish()


if __name__ == "__main__":
    main()
