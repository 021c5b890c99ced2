"""What of a DeepSpeed training overlapped capture may copy late: what only its optimizer's step changes.

The hook is the one of the torch optimizer inside DeepSpeed's. Everything that DeepSpeed does in a step before it calls
that one concerns gradients; all parameters, flat partitions and moments are changed by it or after it. That is known
of exactly the classes named here. With any other, such as ZenFlow, SuperOffload and the hybrid engine, which change
parameters at other times, everything is copied at once.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from functools import cache, partial, wraps
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.tensor_fragment import tensor_fragment

from cairn.client import Client
from cairn.integrations.deepspeed.jobs import wait_copied

log = logging.getLogger("cairn")

_ENGINES = (DeepSpeedEngine, PipelineEngine)

FLAT: dict[type, tuple[str, ...]] = {
    DeepSpeedZeroOptimizer: ("single_partition_of_fp32_groups", "bit16_groups_flat"),
    DeepSpeedZeroOptimizer_Stage3: ("fp32_partitioned_groups_flat",),
    BF16_Optimizer: ("fp32_groups_flat_partition", "bf16_groups_flat"),
    FP16_Optimizer: ("fp32_groups_flat", "fp16_groups_flat"),
    FP16_UnfusedOptimizer: ("fp32_groups", "fp16_groups"),
}
"""By DeepSpeed's optimizer, the attributes that hold (lists of) flat buffers which its state and the module view.

The first one holds what the torch optimizer inside trains, and is saved.
"""

_WRITERS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (DeepSpeedEngine, ("load_module_state_dict", "offload_states", "reload_states", "destroy")),
    (PipelineEngine, ("load_module_state_dict",)),
    (DeepSpeedZeroOptimizer_Stage3, ("set_full_hp_param", "set_local_hp_param")),
    (tensor_fragment, ("get_hp_fragment",)),
)
"""What else changes such tensors, also for ``deepspeed.utils.safe_set_full_fp32_param`` and its like."""


def guard_training(client: Client, training: Any) -> None:
    """Guard the optimizers of *training*, or say once why that cannot be."""
    reason = _obstacle(training)
    if reason is not None:
        _tell(reason)
        return
    outer = training.optimizer
    also = partial(_flat_tensors, weakref.ref(outer))  # the client must not keep a training's memory
    for optimizer in torch_optimizers(outer):
        client.guard(optimizer, also)


def wrap_writers() -> None:
    """Make all methods that change such tensors outside of a step wait for the copy, once per process."""
    for owner, names in _WRITERS:
        for name in names:
            method = owner.__dict__.get(name)
            if method is not None and not hasattr(method, "_cairn_waits"):
                setattr(owner, name, _waiting(method))


def _waiting(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        wait_copied()
        return method(*args, **kwargs)

    wrapper._cairn_waits = method  # type: ignore[attr-defined]  # noqa: SLF001 - our own mark
    return wrapper


def _obstacle(training: Any) -> str | None:
    """Why nothing of *training* may be copied late; None when it may."""
    if type(training) not in _ENGINES:
        return f"a {type(training).__name__} may change parameters outside of a step"
    outer = training.optimizer
    if type(outer) not in FLAT and not isinstance(outer, torch.optim.Optimizer):
        return f"a {type(outer).__name__} may change parameters outside of a step"
    if getattr(training, "zenflow", False):
        return "ZenFlow changes parameters outside of a step"
    if getattr(outer, "swap_optimizer", False):
        return "the optimizer's state is swapped to NVMe"
    inner = torch_optimizers(outer)
    if not inner:
        return f"the optimizer inside of {type(outer).__name__} is none of torch's"
    if any("use_muon" in group for optimizer in inner for group in optimizer.param_groups):
        return "Muon changes momenta while gradients are reduced"
    return None


def torch_optimizers(outer: Any) -> list[torch.optim.Optimizer]:
    """The optimizers of torch inside of DeepSpeed's, or *outer* itself if it is one; none of other kinds."""
    if isinstance(outer, torch.optim.Optimizer):
        return [outer]
    inner = (getattr(outer, "optimizer", None), getattr(outer, "backup_optimizer", None))
    return [optimizer for optimizer in inner if isinstance(optimizer, torch.optim.Optimizer)]


def _flat_tensors(reference: weakref.ref[Any]) -> Iterator[torch.Tensor]:
    outer = reference()
    for name in FLAT.get(type(outer), ()):
        yield from tensors_in(getattr(outer, name, None))


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


@cache
def _tell(reason: str) -> None:
    log.warning('capture = "overlapped": everything is copied at once, because %s', reason)
