"""What this rank has handed over and the daemon has not yet on disk: told again, in full, to a restarted daemon.

The buffers are still here, mapped by this process, so a daemon that died loses nothing that was captured. A partition
that went as a stream is gone with it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from cairn.transport.messages import Opening, PartitionPlan
from cairn.transport.pool import Pool
from cairn.transport.save_calls import SaveCalls
from cairn.transport.shared_memory import Segment
from cairn.transport.stream import WINDOW_BYTES
from cairn_api.errors import CairnError, OverloadedError, SaveFailedError, UnavailableError
from cairn_api.names import VersionId

log = logging.getLogger("cairn")

_OVER = frozenset({"committed", "prepared", "deleting"})
"""States in which this node needs nothing more from its ranks."""


@dataclass(slots=True, eq=False)
class Unsettled:
    """One version of this launch, as this rank has told it to its daemon so far."""

    opening: Opening
    opened: bool = False
    """Whether the daemon has answered that it knows the version."""
    partitions: dict[str, tuple[PartitionPlan, str]] = field(default_factory=dict)
    """By name: what was written, and the name of its segment (empty: it went as a stream)."""
    unsealed: list[tuple[PartitionPlan, str]] = field(default_factory=list)
    """Those of ``partitions`` that :meth:`seal_rest` tells the daemon of, in its turn."""
    told: set[str] = field(default_factory=set)
    """The names of those of ``partitions`` that the present daemon was given, one way or another."""
    prepared: bool = False
    agreed: list[tuple[str, int]] | None = None
    """The shared names, once all ranks have agreed to commit."""
    lost: CairnError | None = None
    """Why a restarted daemon could not be given this version again."""
    when_over: Callable[[], None] | None = None
    """Lets go of the buffers that only this process knows as the version's: no daemon will say that they are free."""

    def open_once(self, calls: SaveCalls) -> None:
        """Open the version on the daemon, unless that was done. Raises why it cannot be saved to."""
        if self.opened:
            return
        state = calls.create(self.opening)
        if state != "open":
            raise SaveFailedError(f"version {self.opening.version} is already {state}")
        self.opened = True

    def seal_later(self, plan: PartitionPlan, segment: str) -> None:
        """All bytes of a partition have arrived in its segment; :meth:`seal_rest` tells the daemon."""
        self.partitions[plan.name] = (plan, segment)
        self.unsealed.append((plan, segment))

    def seal_rest(self, calls: SaveCalls) -> None:
        """Tell the daemon of what it was not told yet. Raises why it refuses a partition that it does not hold."""
        for plan, segment in self.unsealed:
            if plan.name in self.told:
                continue
            try:
                calls.seal(self.opening.version, plan, segment)
            except CairnError:
                # A daemon that was restarted meanwhile may have been given the bytes as a stream, without the buffer.
                if plan.name not in self.told:
                    raise
            self.told.add(plan.name)


class Ledger:
    """All unsettled versions of this rank, oldest first. Safe to use from several threads."""

    def __init__(self) -> None:
        self._versions: dict[VersionId, Unsettled] = {}
        self._lock = threading.Lock()

    def add(self, opening: Opening) -> Unsettled:
        """Start the record of a version."""
        with self._lock:
            return self._versions.setdefault(opening.version, Unsettled(opening))

    def drop(self, version: VersionId) -> None:
        """The version needs nothing more from this rank."""
        with self._lock:
            item = self._versions.pop(version, None)
        if item is not None and item.when_over is not None:
            item.when_over()

    def all(self) -> list[Unsettled]:
        """Every record."""
        with self._lock:
            return list(self._versions.values())


def tell_again(calls: SaveCalls, ledger: Ledger, pool: Pool) -> list[CairnError]:
    """Bring a daemon that knows nothing of this rank up to date; returns what could not be saved over.

    Raises :class:`UnavailableError` when this daemon goes away too: all of it is then repeated with the next one.
    """
    failures: list[CairnError] = []
    with pool.writers.kept_out():
        pool.keep_only(item.opening.version for item in ledger.all())
        for item in ledger.all():
            try:
                if _tell_version(calls, item, pool) in _OVER:
                    # The daemon knows none of its segments as this connection's, so Reserve would never free them.
                    pool.discard(item.opening.version)
                    ledger.drop(item.opening.version)
            except UnavailableError:
                raise
            except CairnError as error:
                item.lost = _give_up(calls, item, pool, error)
                if item.agreed is not None:  # commit() has returned, so nobody else would report it
                    failures.append(item.lost)
                    ledger.drop(item.opening.version)
    return failures


def _give_up(calls: SaveCalls, item: Unsettled, pool: Pool, error: CairnError) -> SaveFailedError:
    version = item.opening.version
    calls.abort(version, error.message)
    for segment in pool.discard(version):
        calls.release(segment)
    return SaveFailedError(
        f"version {version} did not survive the daemon's restart: {error.message}",
        hint=error.hint or "save again; earlier versions are intact",
        context={"version": version, **error.context},
    )


def _tell_version(calls: SaveCalls, item: Unsettled, pool: Pool) -> str:
    """Tell all of one version; the state in which the daemon had it before."""
    version = item.opening.version
    item.when_over = None
    item.told.clear()
    state = calls.create(item.opening, resumed=True)
    item.opened = True
    if state == "aborted":
        raise SaveFailedError("the daemon had aborted it", hint="save again")
    if state == "sealed":
        # This daemon has the bytes, from an earlier connection. They stay here too until tier 1 has them, for the next.
        held = [segment.name for segment in pool.owned_by(version)]
        item.when_over = partial(pool.forget, held)
    if state == "open":
        unshared = _offer_again(calls, item, pool)
        if unshared:
            item.when_over = partial(pool.forget, unshared)
        for plan, segment in item.partitions.values():
            if not segment:
                raise SaveFailedError(f"partition {plan.name!r} went as a stream and was lost with the old daemon")
            if segment in unshared:
                windows = partial(pool.segment(segment).windows, plan.size_bytes, WINDOW_BYTES)
                calls.put(version, plan, windows)
            else:
                calls.seal(version, plan, segment)
            item.told.add(plan.name)
        if item.prepared:
            calls.prepare(version, list(item.partitions))
    if item.agreed is not None and state not in _OVER:
        calls.commit(version, item.agreed)
    return state


def _offer_again(calls: SaveCalls, item: Unsettled, pool: Pool) -> set[str]:
    """Share the version's segments with the new daemon; the names of those for which there was no room.

    Those are to be streamed from where they are. One that holds nothing yet is no such case: it cannot be filled later.
    """
    filled = {segment for _, segment in item.partitions.values()}
    unshared = set()
    for segment in pool.owned_by(item.opening.version):
        try:
            _share_again(calls, segment, pool)
        except OverloadedError as error:
            if segment.name not in filled:
                raise
            log.warning("a captured buffer goes to the restarted daemon as a stream, which is slower: %s", error)
            unshared.add(segment.name)
    return unshared


def _share_again(calls: SaveCalls, segment: Segment, pool: Pool) -> None:
    if not segment.sealed:
        calls.share(segment.size_bytes, lambda: (segment.name, segment.fd))
        return
    # The old daemon's seals forbid a new one to map this memfd for writing, which it has to: so it gets a copy.
    copy = segment.duplicate()
    try:
        calls.share(copy.size_bytes, lambda: (copy.name, copy.fd))
    except BaseException:
        copy.close()
        raise
    pool.replace(segment, copy)
