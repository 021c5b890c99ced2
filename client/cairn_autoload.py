"""Switches the DeepSpeed integration on from the JSON alone; runs in every ``import torch`` on the machine.

PyTorch calls every entry point of the group ``torch.backends`` at the end of ``import torch``. An exception here would
break that import for programs that never heard of Cairn, and slowness would be paid by all of them. So this module
uses the standard library only, reports what goes wrong instead of raising it, and does nothing but put one finder into
``sys.meta_path``. The finder waits for the DeepSpeed module that chooses a checkpoint engine; Cairn itself is imported
when a DeepSpeed configuration with a ``"cairn"`` block is seen, and never before.

Switched off by ``CAIRN_AUTOLOAD=0``, and by PyTorch's own ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``. The explicit form is
``import cairn.integrations.deepspeed``; it ends in :func:`watch` too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

FACTORY_MODULE = "deepspeed.runtime.checkpoint_engine.utils"
FACTORY = "create_checkpoint_engine"
BLOCK = "cairn"

_IMPORTERS = (FACTORY_MODULE, "deepspeed.runtime.checkpoint_engine", "deepspeed.runtime.engine")
"""Modules of DeepSpeed 0.17.1 to 0.19.8 that hold the factory under its own name."""
_OFF = frozenset(("0", "false", "no", "off"))


def register() -> None:
    """The entry point. Never raises; what goes wrong is told once on standard error."""
    try:
        if os.environ.get("CAIRN_AUTOLOAD", "").lower() not in _OFF:
            watch()
    except Exception as error:  # noqa: BLE001 - anything else would break `import torch` for unrelated programs
        _report(error)


def watch() -> None:
    """Wrap DeepSpeed's choice of a checkpoint engine, now or as soon as it is imported; once, however often called."""
    if FACTORY_MODULE in sys.modules:
        _wrap_factory(sys.modules[FACTORY_MODULE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Waits in ``sys.meta_path`` for one module, then leaves."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - the signature that importlib calls
        target: ModuleType | None = None,  # noqa: ARG002 - likewise
    ) -> ModuleSpec | None:
        """The module's ordinary spec, whose loader wraps the factory right after the module has run."""
        if name != FACTORY_MODULE:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_wrap(module: ModuleType) -> None:
                run(module)
                try:
                    _wrap_factory(module)
                except Exception as error:  # noqa: BLE001 - DeepSpeed without Cairn must go on working
                    _report(error)

            # The loader object stays the real one, so that tracebacks and inspect find the source as always.
            spec.loader.exec_module = run_and_wrap  # type: ignore[method-assign]
        return spec


def _wrap_factory(module: ModuleType) -> None:
    original: Callable[..., Any] = getattr(module, FACTORY)
    if hasattr(original, "_cairn_wraps"):
        return

    @wraps(original)
    def create_checkpoint_engine(*args: Any, **kwargs: Any) -> Any:
        config = args[0] if args else kwargs.get("config_params")
        block = _block_of(config)
        if block is None:
            return original(*args, **kwargs)
        from cairn.integrations.deepspeed.factory import make_engine  # noqa: PLC0415 - only now is Cairn wanted

        return make_engine(config, block, lambda: original(*args, **kwargs))

    create_checkpoint_engine._cairn_wraps = original  # type: ignore[attr-defined]  # noqa: SLF001 - our own mark
    for name in _IMPORTERS:
        holder = sys.modules.get(name)
        if holder is not None and getattr(holder, FACTORY, None) is original:
            setattr(holder, FACTORY, create_checkpoint_engine)


def _block_of(config: object) -> Any:
    """The ``"cairn"`` block of a ``DeepSpeedConfig``; None where there is none, or where the block itself says so.

    Other objects are passed to the factory too (None for inference), so a missing ``_param_dict`` means: not for us.
    """
    parameters = getattr(config, "_param_dict", None)
    block: Any = parameters.get(BLOCK) if isinstance(parameters, Mapping) else None
    if isinstance(block, Mapping) and block.get("enabled") is False and "CAIRN_ENABLED" not in os.environ:
        return None
    return block


def _report(error: Exception) -> None:
    sys.stderr.write(
        f"cairn: the DeepSpeed integration is not available in this process ({type(error).__name__}: {error}). "
        "Next step: set CAIRN_AUTOLOAD=0 to switch this hook off, or reinstall cairn-checkpoint.\n"
    )
