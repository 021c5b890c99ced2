"""The piece of a pickle stream that rebuilds one plain tensor, written without a pickler.

The opcodes are those that ``torch.save`` produces for such a tensor (protocol 2), except that what is never referred to
again is not memoised. The names and strings that all tensors share go into the memo at the first fragment that needs
them, from a memo index on that the rest of the stream does not reach.
"""

from __future__ import annotations

from collections.abc import Callable
from pickle import BINGET, BINPERSID, BINPUT, GLOBAL, LONG_BINGET, LONG_BINPUT, MARK, NEWFALSE, NEWTRUE, REDUCE, TUPLE
from pickle import dumps as pickled
from struct import pack

import torch

_TUPLES_OF_UP_TO_3 = (b")", b"\x85", b"\x86", b"\x87")
_PROTOCOL = 2


class FragmentWriter:
    """Writes fragments in the order in which they will stand in the stream.

    *memo_base* is the first memo index that the rest of the stream leaves free.
    """

    def __init__(self, memo_base: int) -> None:
        self._next_memo = memo_base
        self._known: dict[tuple[str, ...], bytes] = {}
        self._geometries: dict[tuple[int, ...], bytes] = {}
        self.globals: set[str] = set()
        """Every ``module.qualname`` that the fragments refer to."""

    def tensor(
        self,
        pid: tuple[str, type, str, str, int],
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype | None,
        *,
        requires_grad: bool,
    ) -> bytes:
        """A tensor over the storage *pid*; *offset* and *stride* count elements.

        *dtype* is None where the storage's class says it, and the tensor is then rebuilt by ``_rebuild_tensor_v2``;
        else by ``_rebuild_tensor_v3``.
        """
        kind, storage, key, location, count = pid
        return b"".join([
            self._global("torch._utils", "_rebuild_tensor_v2" if dtype is None else "_rebuild_tensor_v3"),
            MARK,
            MARK, self._text(kind), self._global(storage.__module__, storage.__qualname__), _text(key),
            self._text(location), _number(count), TUPLE, BINPERSID,
            _number(offset),
            self._geometry(size),
            self._geometry(stride),
            NEWTRUE if requires_grad else NEWFALSE,
            self._global("collections", "OrderedDict"), _TUPLES_OF_UP_TO_3[0], REDUCE,
            b"" if dtype is None else self._global("torch", str(dtype).removeprefix("torch.")),
            TUPLE,
            REDUCE,
        ])  # fmt: skip

    def remember(self, fragment: bytes) -> tuple[bytes, bytes]:
        """*fragment* with its tensor put into the memo, and what stands for the same tensor later in the stream."""
        put, get = self._memo()
        return fragment + put, get

    def _global(self, module: str, name: str) -> bytes:
        def write() -> bytes:
            self.globals.add(f"{module}.{name}")
            return GLOBAL + f"{module}\n{name}\n".encode()

        return self._once((module, name), write)

    def _text(self, text: str) -> bytes:
        return self._once((text,), lambda: _text(text))

    def _once(self, key: tuple[str, ...], write: Callable[[], bytes]) -> bytes:
        known = self._known.get(key)
        if known is not None:
            return known
        put, self._known[key] = self._memo()
        return write() + put

    def _memo(self) -> tuple[bytes, bytes]:
        index = self._next_memo
        self._next_memo += 1
        if index < 1 << 8:
            return BINPUT + pack("<B", index), BINGET + pack("<B", index)
        return LONG_BINPUT + pack("<I", index), LONG_BINGET + pack("<I", index)

    def _geometry(self, numbers: tuple[int, ...]) -> bytes:
        known = self._geometries.get(numbers)
        if known is None:
            items = b"".join(map(_number, numbers))
            short = len(numbers) < len(_TUPLES_OF_UP_TO_3)
            known = items + _TUPLES_OF_UP_TO_3[len(numbers)] if short else MARK + items + TUPLE
            self._geometries[numbers] = known
        return known


def _number(number: int) -> bytes:
    return pickled(number, _PROTOCOL)[2:-1]  # without the PROTO and STOP around it


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + pack("<I", len(encoded)) + encoded
