"""Loading into tensors that exist: a model's and an optimizer's own, whose memory is warm.

New memory costs several times what the copy into it does. Everything is compared first, and only then is the first
byte written: a state that does not fit is refused and leaves all live tensors as they were.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from ctypes import Array, addressof, c_char
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import increment_version

from cairn.capture import native
from cairn.capture.interpreter import collector_paused
from cairn.direct import is_cold, read_directly
from cairn.image import LENGTHS_BYTES, Image
from cairn.reading import Piece, read_pieces
from cairn_api.errors import ConfigurationError

_MOST_TOLD = 5
_HINT = (
    "pass tensors of the saved names, shapes and dtypes, and None under the names of what holds no tensor, or load "
    "without `into`; nothing was changed"
)
_WITHOUT_STATE = "is of an optimizer that has no state yet"
_HINT_WITHOUT_STATE = (
    "an optimizer makes its state in its first step: take one step before this load, or load without `into` and pass "
    "the result to `load_state_dict`; nothing was changed"
)


class _Pair(NamedTuple):
    source: torch.Tensor
    target: torch.Tensor


@collector_paused()
def load_into(
    fd: int,
    size_bytes: int,
    into: Any,
    *,
    weights_only: bool,
    alone: bool = False,
    memory: Array[c_char] | None = None,
    threads: int = 1,
) -> Any:
    """``torch.load`` of the first *size_bytes* of file *fd* into the tensors of *into*: see :func:`copy_into`.

    What can be is read from the file straight into the live tensors, past the page cache if it is not there and no
    other process will want it (*alone*). Where this process has the file mapped already, that is its *memory*, and
    *threads* copy from there. Nothing may change the file meanwhile. *fd* stays the caller's, who shares its open file
    description with nobody. Raises :class:`UnavailableError` too, when the file cannot be read; some tensors
    are changed then.
    """
    image = Image.mapped(fd, size_bytes)
    cold = memory is None and is_cold(fd, size_bytes)
    presume = True  # the headers are then read along with the tensors
    while True:
        loaded = image.load(map_location="cpu", weights_only=weights_only, own_bytes=0, presume=presume)
        result, pairs = _fitted(loaded, into)
        headers = array("I", bytes(LENGTHS_BYTES * len(image.presumed)))
        pieces = [
            Piece(record.lengths_offset, headers.buffer_info()[0] + number * LENGTHS_BYTES, LENGTHS_BYTES)
            for number, record in enumerate(image.presumed)
        ]
        others = []
        for pair in pairs:
            offset = pair.source.data_ptr() - image.address
            if _plain(pair.source) and _plain(pair.target) and 0 <= offset < size_bytes:
                pieces.append(Piece(offset, pair.target.data_ptr(), pair.target.nbytes))
                increment_version(pair.target)
            else:
                others.append(pair)
        if memory is not None:
            _copy_pieces(memory, pieces, threads)
        elif not (cold and alone and read_directly(fd, pieces)):
            read_pieces(fd, pieces)
        if all(record.holds(lengths) for record, lengths in zip(image.presumed, headers, strict=True)):
            _copy(others)
            return result
        presume = False  # and then this holds


def _copy_pieces(memory: Array[c_char], pieces: Sequence[Piece], threads: int) -> None:
    native.copy(
        array("Q", (piece.address for piece in pieces)),
        array("Q", (piece.offset for piece in pieces)),
        array("Q", (piece.size_bytes for piece in pieces)),
        threads,
        source_base=addressof(memory),
    )


def copy_into(loaded: Any, into: Any) -> Any:
    """Copy the tensors of *loaded* into those of *into*, and return *loaded* with the latter in their places.

    Both have the same structure: dicts with the same keys, lists and tuples of the same length, and tensors of the same
    shape and dtype at the same places. Other values are taken from *loaded*. Raises :class:`ConfigurationError`, naming
    what differs, before anything is copied.
    """
    result, pairs = _fitted(loaded, into)
    _copy(pairs)
    return result


def _copy(pairs: Sequence[_Pair]) -> None:
    with torch.no_grad():
        for source, target in pairs:
            target.copy_(source)


def _fitted(loaded: Any, into: Any) -> tuple[Any, list[_Pair]]:
    """*loaded* with the tensors of *into* in it, and what is to be copied."""
    pairs: list[_Pair] = []
    problems: list[str] = []
    result = _matched(loaded, into, "", pairs, problems)
    if problems:
        more = f" (and {len(problems) - _MOST_TOLD} more)" if len(problems) > _MOST_TOLD else ""
        without_state = any(problem.endswith(_WITHOUT_STATE) for problem in problems)
        raise ConfigurationError(
            f"the saved state does not fit into the given one: {'; '.join(problems[:_MOST_TOLD])}{more}",
            hint=_HINT_WITHOUT_STATE if without_state else _HINT,
        )
    return result, pairs


def _plain(tensor: torch.Tensor) -> bool:
    """Whether its values lie in memory one after the other, as they do in the file."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _matched(loaded: Any, into: Any, name: str, pairs: list[_Pair], problems: list[str]) -> Any:
    """*loaded* with the tensors of *into* in it; notes what to copy and what does not fit."""
    where = name or "the state"
    if isinstance(loaded, torch.Tensor) or isinstance(into, torch.Tensor):
        difference = _difference(loaded, into)
        if difference:
            problems.append(f"{where} {difference}")
        else:
            pairs.append(_Pair(loaded, into))
        return into
    if isinstance(loaded, Mapping) and isinstance(into, Mapping):
        if _is_optimizers(loaded) and _is_optimizers(into) and loaded["state"] and not into["state"]:
            problems.append(f"{where} {_WITHOUT_STATE}")
            return loaded
        problems += [f"{_below(name, key)} was not saved" for key in into.keys() - loaded.keys()]
        problems += [f"{_below(name, key)} is not in the given state" for key in loaded.keys() - into.keys()]
        matched = {
            key: _matched(value, into[key], _below(name, key), pairs, problems) if key in into else value
            for key, value in loaded.items()
        }
        return _as(loaded, matched)
    if _is_sequence(loaded) and _is_sequence(into):
        if len(loaded) != len(into):
            problems.append(f"{where} has {len(loaded)} entries in the save and {len(into)} in the given state")
        items = [
            _matched(mine, theirs, _below(name, number), pairs, problems)
            for number, (mine, theirs) in enumerate(zip(loaded, into, strict=False))
        ]
        return type(loaded)(*items) if hasattr(loaded, "_fields") else type(loaded)(items)
    if _holds_tensors(loaded) or _holds_tensors(into):
        problems.append(
            f"{where} is a {type(loaded).__name__} in the save and a {type(into).__name__} in the given state"
        )
    return loaded


def _as(loaded: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """*items* in a mapping such as was saved, with what it carries besides (a module's state has ``_metadata``)."""
    if type(loaded) is dict:
        return items
    copy = loaded.copy() if hasattr(loaded, "copy") else dict(loaded)
    copy.update(items)
    return copy


def _difference(loaded: Any, into: Any) -> str:
    if not isinstance(loaded, torch.Tensor):
        return f"was saved as a {type(loaded).__name__}, not as a tensor"
    if not isinstance(into, torch.Tensor):
        return f"was saved as a tensor, and the given state has a {type(into).__name__}"
    if loaded.shape != into.shape:
        return f"was saved with shape {tuple(loaded.shape)}, not {tuple(into.shape)}"
    if loaded.dtype != into.dtype:
        return f"was saved as {loaded.dtype}, not {into.dtype}"
    if loaded.layout != into.layout:
        return f"was saved as {loaded.layout}, not {into.layout}"
    if into.layout is torch.strided and any(
        step == 0 and length > 1 for step, length in zip(into.stride(), into.shape, strict=True)
    ):
        return "is expanded: several elements of the given tensor are one and the same"
    if into.device.type == "meta":
        return "has no memory: the given tensor is on the meta device"
    return ""


def _is_optimizers(state: Mapping[Any, Any]) -> bool:
    return "state" in state and "param_groups" in state


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensors(item) for item in value.values())
    return isinstance(value, torch.Tensor) or (_is_sequence(value) and any(_holds_tensors(item) for item in value))


def _below(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)
