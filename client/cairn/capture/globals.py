"""Which names a checkpoint's pickle may resolve when it is loaded without trust, and loading under that policy.

torch's weights-only unpickler accepts tensors, plain containers and a short list of its own. DeepSpeed's files also
hold a few of DeepSpeed's classes and NumPy values; those names are added here. Whatever else a pickle refers to is
loaded only on the caller's word, with ``weights_only=False``, because unpickling it may run any code.
"""

from __future__ import annotations

import importlib
import pickle
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from typing import IO, Any, TypeAlias

import torch
from torch._weights_only_unpickler import _get_allowed_globals, _remove_safe_globals

from cairn_api.errors import ConfigurationError

_Trusted: TypeAlias = Callable[..., Any] | tuple[Callable[..., Any], str]

ALLOWED_GLOBALS = frozenset(
    {
        "argparse.Namespace",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
    }
)
"""``module.qualname`` of what a load may resolve beyond torch's own list."""

_NUMPY_DTYPES = "numpy.dtypes"
"""NumPy pickles ``numpy.dtype`` but builds an instance of a class from here, and torch asks about that class too."""

_REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed global")


def outside_allow_list(names: Iterable[str]) -> tuple[str, ...]:
    """Those of *names* that a weights-only load refuses, sorted. Names the process has told torch to trust pass."""
    trusted = {_name_of(entry) for entry in torch.serialization.get_safe_globals()}
    allowed = ALLOWED_GLOBALS | _get_allowed_globals().keys() | trusted
    return tuple(sorted(set(names) - allowed))


def load(
    file: str | PathLike[str] | IO[bytes],
    *,
    map_location: Any = None,
    weights_only: bool = True,
    mmap: bool = False,
) -> Any:
    """``torch.load`` under the allow-list. *mmap* needs a path; tensors then share the file's pages until written to.

    Raises:
        ConfigurationError: with *weights_only*, the file refers to something outside the allow-list.
    """
    start = None if isinstance(file, (str, PathLike)) else file.tell()

    def read() -> Any:
        if start is not None and not isinstance(file, (str, PathLike)):
            file.seek(start)
        return torch.load(file, map_location=map_location, weights_only=weights_only, mmap=mmap)

    return under_allow_list(read) if weights_only else read()


def under_allow_list(read: Callable[[], Any]) -> Any:
    """What *read* returns, a weights-only load that is repeated when a module of the allow-list has to be imported.

    Raises :class:`ConfigurationError` when the pickle refers to something outside the allow-list.
    """
    try:
        return _read_allowed(read)
    except pickle.UnpicklingError as error:
        refused = _REFUSED.search(str(error))
        subject = f"the file refers to {refused[1]}" if refused else f"torch refused the file: {error}"
        raise ConfigurationError(
            f"{subject}, which is outside the allow-list of a weights_only load",
            hint="if you trust whoever wrote this file, set weights_only=False for this load",
        ) from error


def _read_allowed(read: Callable[[], Any]) -> Any:
    imported: set[str] = set()
    while True:
        try:
            with _trusting(_loaded_globals()):
                return read()
        except pickle.UnpicklingError as error:
            # Perhaps only a module that nobody has imported yet. Importing is left until a file asks for it, because
            # DeepSpeed takes seconds.
            refused = _REFUSED.search(str(error))
            package = refused[1].partition(".")[0] if refused else ""
            if refused is None or refused[1] not in ALLOWED_GLOBALS or package in imported:
                raise
        imported.add(package)
        _import_allowed(package)


def _import_allowed(package: str) -> None:
    """Import the modules of *package* that the allow-list names, as far as they are installed."""
    for name in ALLOWED_GLOBALS:
        module = name.rpartition(".")[0]
        if module.partition(".")[0] == package:
            # Not installed: the load will then be refused for the name itself, which says more than an ImportError.
            with suppress(ImportError):
                importlib.import_module(module)


def _loaded_globals() -> list[_Trusted]:
    """The allowed objects whose modules are imported in this process."""
    names = set(ALLOWED_GLOBALS)
    if numpy_dtypes := sys.modules.get(_NUMPY_DTYPES):
        names |= {f"{_NUMPY_DTYPES}.{name}" for name in numpy_dtypes.__all__}
    found = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        if (candidate := getattr(sys.modules.get(module), attribute, None)) is not None:
            found.append(candidate)
    return found


_lock = threading.Lock()
_added: Counter[_Trusted] = Counter()
"""torch's list of trusted names is global to the process: how many loads running now rely on each of our additions."""


@contextmanager
def _trusting(additions: list[_Trusted]) -> Iterator[None]:
    """Have torch trust *additions* meanwhile, leaving alone what others run or the user's own additions need."""
    with _lock:
        theirs = set(torch.serialization.get_safe_globals()) - _added.keys()
        ours = [addition for addition in additions if addition not in theirs]
        _added.update(ours)
        torch.serialization.add_safe_globals(ours)
    try:
        yield
    finally:
        with _lock:
            _added.subtract(ours)
            unused = [addition for addition in ours if not _added[addition]]
            for addition in unused:
                del _added[addition]
            _remove_safe_globals(unused)


def _name_of(entry: _Trusted) -> str:
    """The full name under which torch trusts an entry of its own list."""
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"
