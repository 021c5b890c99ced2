"""From a ``"cairn"`` block to an engine: called by the wrapped factory of DeepSpeed, the first place that sees one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from cairn.integrations.deepspeed.engine import CairnCheckpointEngine
from cairn.integrations.deepspeed.wrapping import wrap_training_engine
from cairn.settings import load_settings
from cairn_api.errors import ConfigurationError


def make_engine(config: object, block: object, plain: Callable[[], Any]) -> Any:
    """The engine that *block* asks for: Cairn's, or with ``enabled`` false the one that *plain* makes.

    Raises :class:`ConfigurationError` for a block that is wrong, and, when the block names a job, whatever keeps this
    rank or another from connecting (collective then): a training must not find out at its first save.
    """
    if not isinstance(block, Mapping):
        raise ConfigurationError(
            f'the "cairn" block of the DeepSpeed JSON is {block!r}', hint='write "cairn": {"enabled": true}'
        )
    # DeepSpeed loads its own files with weights_only=False: they hold its classes and whatever the user adds.
    settings = load_settings({}, os.environ, {"weights_only": False, **block})
    if not settings.enabled:
        return plain()
    wrap_training_engine()
    return CairnCheckpointEngine(config, settings)
