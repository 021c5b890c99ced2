"""What happens around ``DeepSpeedEngine``'s own methods, for engines that use Cairn; others see no difference.

Needed because DeepSpeed reads and writes ``latest``, looks for files and decides on a tag without asking its
checkpoint engine.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from cairn.integrations.deepspeed.engine import CairnCheckpointEngine, Call
from cairn.integrations.deepspeed.guarding import wrap_writers
from cairn.integrations.deepspeed.jobs import settle
from cairn.integrations.deepspeed.restoring import choose

log = logging.getLogger("cairn")

_Method = Callable[..., Any]
_Around = Callable[[Any, CairnCheckpointEngine, _Method, inspect.BoundArguments], Any]


def wrap_training_engine() -> None:
    """Wrap the methods, once per process."""
    wrap_writers()
    for name, around in (
        ("save_checkpoint", _around_save),
        ("save_16bit_model", _around_save_16bit_model),
        ("load_checkpoint", _around_load),
        ("_take_model_step", _around_step),
    ):
        method = getattr(DeepSpeedEngine, name)
        if not hasattr(method, "_cairn_wraps"):
            setattr(DeepSpeedEngine, name, _wrapped(method, around))


def _wrapped(method: _Method, around: _Around) -> _Method:
    signature = inspect.signature(method)

    @wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = self.checkpoint_engine
        if not isinstance(engine, CairnCheckpointEngine):
            return method(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        return around(self, engine, lambda: method(*call.args, **call.kwargs), call)

    wrapper._cairn_wraps = method  # type: ignore[attr-defined]  # noqa: SLF001 - our own mark
    return wrapper


def _around_save(training: Any, engine: CairnCheckpointEngine, method: _Method, call: inspect.BoundArguments) -> Any:
    """DeepSpeed would write ``latest`` whatever came of the save, and not in one step. So commit() does it instead."""
    if training.zero_nvme_offload_optimizer():
        _warn_of_nvme_offload()
    save_latest, call.arguments["save_latest"] = call.arguments["save_latest"], False
    with engine.during(Call(call.arguments["save_dir"], save_latest=bool(save_latest), training=training)):
        return method()


@cache
def _warn_of_nvme_offload() -> None:
    log.warning("what the NVMe offload keeps is written to save_dir by DeepSpeed itself; it is not in the version")


def _around_save_16bit_model(
    training: Any,  # noqa: ARG001 - one signature for all
    engine: CairnCheckpointEngine,
    method: _Method,
    call: inspect.BoundArguments,
) -> Any:
    with engine.during(Call(call.arguments["save_dir"], plain_files=True)):
        return method()


def _around_step(
    training: Any,
    engine: CairnCheckpointEngine,
    method: _Method,
    call: inspect.BoundArguments,  # noqa: ARG001 - one signature for all
) -> Any:
    """Pipelines take this step too. One that was left out, because gradients overflowed, has made no moments yet."""
    skipped_steps = training.skipped_steps
    result = method()
    if training.skipped_steps == skipped_steps:
        engine.prepare(training)
    return result


def _around_load(training: Any, engine: CairnCheckpointEngine, method: _Method, call: inspect.BoundArguments) -> Any:
    """Choose a version and put its files in place before DeepSpeed looks; then it loads that tag as it always does."""
    settle()
    if training.load_universal_checkpoint():  # made by ds_to_universal from exported files
        return method()
    # With ZeRO-3 and without optimizer states DeepSpeed reads all shards itself (engine.py, _load_checkpoint).
    whole = training.zero_optimization_partition_weights() and not call.arguments["load_optimizer_states"]
    tag = call.arguments["tag"]
    loading = choose(engine.settings, call.arguments["load_dir"], None if tag is None else str(tag), whole=whole)
    if loading is None:
        return method()
    call.arguments["tag"] = loading.tag
    with engine.loading(loading):
        return method()
