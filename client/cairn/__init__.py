"""Cairn: checkpoints that cost the training loop one memory copy.

::

    import cairn

    client = cairn.connect(job="run-7")
    with client.create("global_step100") as checkpoint:  # leaving the block commits; an exception aborts
        checkpoint.save("model.pt", state_dict)
    client.wait("global_step100", durability="tier2", timeout=600)
    state_dict = client.load("global_step100", "model.pt", map_location="cpu")

Importing this module is cheap: torch and gRPC are imported when one of its names is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cairn_api.errors import (
    CairnError,
    ConfigurationError,
    ErrorKind,
    InternalError,
    OverloadedError,
    SaveFailedError,
    UnavailableError,
    VersionError,
)
from cairn_api.names import VersionId

if TYPE_CHECKING:
    from cairn.client import Client, __version__, connect
    from cairn.load import Restored
    from cairn.save import Checkpoint
    from cairn.settings import ClientSettings, Durability

__all__ = [
    "CairnError",
    "Checkpoint",
    "Client",
    "ClientSettings",
    "ConfigurationError",
    "Durability",
    "ErrorKind",
    "InternalError",
    "OverloadedError",
    "Restored",
    "SaveFailedError",
    "UnavailableError",
    "VersionError",
    "VersionId",
    "__version__",
    "connect",
]

_LAZY = {
    "Checkpoint": "cairn.save",
    "Client": "cairn.client",
    "ClientSettings": "cairn.settings",
    "Durability": "cairn.settings",
    "Restored": "cairn.load",
    "__version__": "cairn.client",
    "connect": "cairn.client",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'cairn' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
