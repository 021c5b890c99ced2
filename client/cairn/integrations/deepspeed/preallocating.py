"""What a DeepSpeed training is going to save, and how large that is, told before its first save.

Asked after a step of the optimizer: only then do its moments exist. Nothing is copied or laid out, no hook of the model
runs and no rank waits for another: the names are DeepSpeed's own, the sizes are sums over tensors and a little larger
than needed. A file whose tensors are not known here is left out, and the first save makes its buffer itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from cairn.integrations.deepspeed.guarding import FLAT, tensors_in, torch_optimizers

_FOLDER = "save_dir"
_TAG = "tag"
"""Stand for what the first save will be given; names of partitions are relative to both."""

_FILE_BYTES = 1 << 20
"""Room for what is in a file beside tensors: the configuration, the scheduler, the script's ``client_state``."""

_TENSOR_BYTES = 512
"""Room for a tensor's name, header and alignment, and for what DeepSpeed notes of a parameter."""


def sizes_of(training: Any) -> dict[str, int]:
    """By partition that this rank will save, about how many bytes it will have, rounded up."""
    sizes: dict[str, int] = {}
    optimizer = _optimizer_bytes(training)
    in_model_file = 0 if training.zero_optimization() else optimizer
    parameters = list(training.module.parameters())
    if isinstance(training, PipelineEngine):
        sizes.update(_layers(training))
        model = 0
    else:
        model = sum(map(_bytes_of, _saved_tensors(training, parameters)))
    # A mixture of experts is written expert by expert, each to a file of its own; their layout is DeepSpeed's affair.
    if training.save_non_zero_checkpoint and in_model_file is not None and not training.has_moe_layers:
        sizes[_name_by(training._get_ckpt_name)] = model + in_model_file  # noqa: SLF001 - DeepSpeed names its files there
    if training.save_zero_checkpoint and optimizer is not None:
        sizes[_name_by(training._get_zero_ckpt_name)] = optimizer  # noqa: SLF001 - as above
    around_bytes = _FILE_BYTES + _TENSOR_BYTES * len(parameters)
    return {name: size_bytes + around_bytes for name, size_bytes in sizes.items()}


def _name_by(path_of: Callable[[str, str], str]) -> str:
    return os.path.relpath(path_of(_FOLDER, _TAG), os.path.join(_FOLDER, _TAG))  # noqa: PTH118 - as DeepSpeed joins


def _saved_tensors(training: Any, parameters: list[torch.nn.Parameter]) -> Iterator[torch.Tensor]:
    """What the model's file holds beside the optimizer. Under ZeRO-3 a parameter is an empty tensor here, and there."""
    yield from parameters
    for module in training.module.modules():
        left_out = module._non_persistent_buffers_set  # noqa: SLF001 - torch has no other way to ask
        yield from (buffer for name, buffer in module.named_buffers(recurse=False) if name not in left_out)
    if training.zero_optimization_partition_gradients():
        for parameter in parameters:
            if not parameter.requires_grad:  # stored once more, from host memory; there it is the same tensor
                fragment = getattr(parameter, "ds_tensor", parameter)
                if fragment.data_ptr() != parameter.data_ptr() or fragment.device.type != "cpu":
                    yield fragment


def _optimizer_bytes(training: Any) -> int | None:
    """The optimizer's state and the float32 partitions; None when they are not known or not in memory."""
    outer = training.optimizer
    inner = torch_optimizers(outer)
    if not inner or (type(outer) not in FLAT and outer not in inner) or training.zero_nvme_offload_optimizer():
        return None
    tensors = [tensor for optimizer in inner for state in optimizer.state.values() for tensor in state.values()]
    # The first of these attributes is what is trained; the others are in the model already.
    tensors += [getattr(outer, name) for name in FLAT.get(type(outer), ())[:1]]
    return sum(map(_bytes_of, tensors_in(tensors)))


def _layers(training: Any) -> Mapping[str, int]:
    """The files of a pipeline's layers, which DeepSpeed deals out to the ranks itself."""
    recorder = _Recorder()
    training.module.save_state_dict(_FOLDER, checkpoint_engine=recorder)
    return recorder.sizes


class _Recorder:
    """Takes the place of a checkpoint engine and notes what would be saved."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: no file follows."""

    def preserves_storage_sharing(self) -> bool:
        """False, as of Cairn's engine: no clones."""
        return False

    def save(self, state_dict: Mapping[str, object], path: str) -> None:
        """Note the size."""
        self.sizes[os.path.relpath(path, _FOLDER)] = sum(map(_bytes_of, tensors_in(list(state_dict.values()))))


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.nbytes + _TENSOR_BYTES
