"""Registering a capture buffer with CUDA, so that copies from a GPU run at full speed and overlap.

The buffer's pages must exist already: registering populates and locks them, which is slow on fresh memory and counts
against the container's memory (and, under some drivers, against ``RLIMIT_MEMLOCK``).
"""

from __future__ import annotations

import logging
from typing import Any

import torch

_LOG = logging.getLogger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device's context, as torch/cuda/_pin_memory_utils.py does


def register(buffer: torch.Tensor | memoryview) -> bool:
    """Page-lock *buffer* for all GPUs of this process; True if it now is and must be given to :func:`unregister`.

    Without CUDA there is nothing to do. A refusal by the driver costs speed, not correctness: it is logged and the
    buffer stays usable.
    """
    if not torch.cuda.is_available():
        return False
    address, length = _extent(buffer)
    code = int(_cuda_runtime().cudaHostRegister(address, length, _PORTABLE))
    if code:
        _LOG.warning(
            "CUDA refused to register a capture buffer of %d bytes (cudaError %d): saves will be slower. "
            "Check the memlock limit and the container's memory limit",
            length,
            code,
        )
    return code == 0


def unregister(buffer: torch.Tensor | memoryview) -> None:
    """Undo a :func:`register` that returned True; call it before the buffer is unmapped."""
    address, length = _extent(buffer)
    code = int(_cuda_runtime().cudaHostUnregister(address))
    if code:
        _LOG.warning("CUDA did not unregister a capture buffer of %d bytes (cudaError %d)", length, code)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _extent(buffer: torch.Tensor | memoryview) -> tuple[int, int]:
    """Address and length in bytes."""
    tensor = buffer if isinstance(buffer, torch.Tensor) else torch.frombuffer(buffer, dtype=torch.uint8)
    return tensor.data_ptr(), tensor.nbytes
