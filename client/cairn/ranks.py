"""How the ranks of one job talk to each other: small JSON values, a deadline on every exchange, never a hang.

Cairn makes its own gloo group when a client connects, so that its exchanges can neither mix with nor wait for the
training's own collectives. Values are JSON, not pickles: what another node sends is data, not code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from cairn_api.errors import ConfigurationError, UnavailableError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

Json: TypeAlias = Any
"""None, bool, int, float, str, or lists and dicts (with text keys) of them."""

_SLOT_BYTES = 4096
_LENGTH_BYTES = 8


class Ranks(Protocol):
    """The ranks that save and restore together. Every method is collective: all ranks call it in the same order."""

    @property
    def rank(self) -> int:
        """This process, from 0."""

    @property
    def world_size(self) -> int:
        """How many processes there are."""

    def all_gather(self, step: str, value: Json, timeout_s: float) -> list[Json]:
        """The *value* of every rank, in rank order.

        *step* says what is being agreed on. Raises :class:`ConfigurationError` on every rank when they are not all at
        the same step, and :class:`UnavailableError` when a rank died or did not come within *timeout_s*.
        """


def broadcast(ranks: Ranks, step: str, value: Json, timeout_s: float) -> Json:
    """Rank 0's *value*, on every rank. Raises as :meth:`Ranks.all_gather` does."""
    return ranks.all_gather(step, value if ranks.rank == 0 else None, timeout_s)[0]


class SingleRank:
    """A job of one process: agrees with itself."""

    rank = 0
    world_size = 1

    def all_gather(self, step: str, value: Json, timeout_s: float) -> list[Json]:  # noqa: ARG002 - nobody to wait for
        """The value alone, after the same trip through JSON as with more ranks."""
        return [json.loads(json.dumps(value))]


class GlooRanks:
    """The ranks of ``torch.distributed``, over a gloo group of Cairn's own.

    Making one is collective over the default group (or over *members* of it). A failed exchange leaves the group out
    of step, so every later one is refused at once: the training has to be restarted, as after any failed collective.
    """

    def __init__(self, timeout_s: float, members: Sequence[int] | None = None) -> None:
        from torch import distributed  # noqa: PLC0415 - a client of one rank needs no torch.distributed

        if not distributed.is_initialized():
            raise ConfigurationError(
                "several ranks can only agree through torch.distributed, which is not initialised",
                hint="call torch.distributed.init_process_group before cairn.connect, or connect with world_size=1",
            )
        group = distributed.new_group(
            None if members is None else list(members), backend="gloo", timeout=timedelta(seconds=timeout_s)
        )
        if not isinstance(group, distributed.ProcessGroup):
            raise ConfigurationError("this process is not among the ranks that save", hint="connect on member ranks")
        self._group: ProcessGroup = group
        self._broken: str | None = None
        self.rank: int = self._group.rank()
        self.world_size: int = self._group.size()

    def all_gather(self, step: str, value: Json, timeout_s: float) -> list[Json]:
        """See :meth:`Ranks.all_gather`. One exchange of 4 KiB per rank, and a second one if a value is longer."""
        if self._broken is not None:
            raise self._lost(step, self._broken)
        own = json.dumps([step, value], separators=(",", ":")).encode()
        try:
            texts = self._exchange(own, timeout_s)
        except RuntimeError as error:
            self._broken = str(error).split(". ", maxsplit=1)[0]
            raise self._lost(step, self._broken) from error
        gathered = [json.loads(text) for text in texts]
        if any(item[0] != step for item in gathered):
            self._broken = "the ranks are at different steps"
            places = "; ".join(f"rank {rank}: {item[0]}" for rank, item in enumerate(gathered))
            raise ConfigurationError(
                f"the ranks are not doing the same thing ({places})",
                hint="call create, save, commit and load in the same order on every rank",
            )
        return [item[1] for item in gathered]

    def _exchange(self, own: bytes, timeout_s: float) -> list[bytes]:
        slot = own[: _SLOT_BYTES - _LENGTH_BYTES]
        first = self._gather(len(own).to_bytes(_LENGTH_BYTES, "little") + slot, _SLOT_BYTES, timeout_s)
        lengths = [int.from_bytes(row[:_LENGTH_BYTES], "little") for row in first]
        if max(lengths) > _SLOT_BYTES - _LENGTH_BYTES:
            return [
                row[:length] for row, length in zip(self._gather(own, max(lengths), timeout_s), lengths, strict=True)
            ]
        return [row[_LENGTH_BYTES : _LENGTH_BYTES + length] for row, length in zip(first, lengths, strict=True)]

    def _gather(self, data: bytes, size_bytes: int, timeout_s: float) -> list[bytes]:
        import torch  # noqa: PLC0415 - as above
        from torch._C._distributed_c10d import AllgatherOptions  # noqa: PLC0415 - it has no public name

        own = torch.frombuffer(bytearray(data.ljust(size_bytes, b"\0")), dtype=torch.uint8)
        received = [bytearray(size_bytes) for _ in range(self.world_size)]
        rows: list[Tensor] = [torch.frombuffer(row, dtype=torch.uint8) for row in received]
        options = AllgatherOptions()
        # With the deadline in the options both ends give up (seen on 2.13); Work.wait(timeout) would leave the
        # exchange running, and a later one could receive this one's bytes.
        options.timeout = timedelta(seconds=timeout_s)
        self._group.allgather([rows], [own], options).wait()
        return [bytes(row) for row in received]

    @staticmethod
    def _lost(step: str, reason: str) -> UnavailableError:
        return UnavailableError(
            f"the ranks could not agree at {step}: a rank died or did not come in time ({reason})",
            hint="look for the first failing rank in the training log, then restart the training",
        )
