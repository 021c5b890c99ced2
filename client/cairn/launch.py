"""One launch of a job: its nonce, its epoch, and the sequence of its versions.

The epoch is claimed when the launch first saves, not when it starts: a program that only reads never fences a training
off. Rank 0 claims; the other ranks tell their daemons.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cairn.agreement import error_to_json, first_error
from cairn.ranks import Ranks, broadcast
from cairn.transport.save_calls import SaveCalls
from cairn_api.errors import CairnError, InternalError
from cairn_api.names import VersionId

_MOST_ATTEMPTS = 100


@dataclass(slots=True)
class Launch:
    """What all ranks of a launch share."""

    nonce: str
    epoch: int
    provisional: bool
    """The bucket could not be asked: versions stay in tier 1 until the daemon's claim succeeds."""
    resumed_from: VersionId | None
    sequence: int = 0

    def next_sequence(self) -> int:
        """1, 2, 3, ...: never given twice. Only rank 0's counts."""
        self.sequence += 1
        return self.sequence


def claim(
    calls: SaveCalls,
    ranks: Ranks,
    max_epoch: int,
    resumed_from: VersionId | None,
    timeout_s: float,
    known: Callable[[Launch], None],
) -> Launch:
    """Claim an epoch above *max_epoch* (collective). Raises the first failing rank's error on every rank.

    *known* is given the launch before this rank's daemon is told of it: one that is restarted later is told by whoever
    connects to it.
    """
    told: dict[str, Any] = {}
    error: CairnError | None = None
    if ranks.rank == 0:
        try:
            told = _claim(calls, ranks.world_size, max_epoch, resumed_from)
        except CairnError as raised:
            error = raised
    told = broadcast(ranks, "claiming an epoch", {**told, "error": error_to_json(error)}, timeout_s)
    if (failure := first_error([told])) is not None:
        raise failure
    launch = Launch(
        nonce=told["nonce"], epoch=told["epoch"], provisional=told["provisional"], resumed_from=resumed_from
    )
    known(launch)
    try:
        # Rank 0's daemon too: it may have been restarted since it answered.
        _tell(calls, ranks, launch, claim=False)
    except CairnError as raised:
        error = raised
    gathered = ranks.all_gather("taking note of the epoch", {"error": error_to_json(error)}, timeout_s)
    if (failure := first_error(gathered)) is not None:
        raise failure
    return launch


def repeat_claim(calls: SaveCalls, ranks: Ranks, launch: Launch) -> None:
    """Tell a daemon that does not know it yet which epoch this launch has."""
    # A provisional claim is still to be put by rank 0's daemon; the same nonce makes putting it again harmless.
    _tell(calls, ranks, launch, claim=ranks.rank == 0 and launch.provisional)


def _tell(calls: SaveCalls, ranks: Ranks, launch: Launch, *, claim: bool) -> None:
    calls.claim_epoch(
        launch.epoch,
        launch.nonce,
        ranks.world_size,
        resumed_from=launch.resumed_from,
        claim=claim,
        provisional=launch.provisional,
    )


def _claim(calls: SaveCalls, world_size: int, max_epoch: int, resumed_from: VersionId | None) -> dict[str, Any]:
    nonce = uuid.uuid4().hex
    epoch = max_epoch + 1
    for _ in range(_MOST_ATTEMPTS):
        reply = calls.claim_epoch(epoch, nonce, world_size, resumed_from=resumed_from, claim=True)
        if not reply.taken:
            return {"nonce": nonce, "epoch": epoch, "provisional": reply.provisional}
        epoch = max(reply.max_epoch, epoch) + 1
    raise InternalError(
        f"{_MOST_ATTEMPTS} epochs in a row were taken", hint="see which other launches of this job are running"
    )
