"""Begins saves: the schedule, the sequence, and the agreement of all ranks on what is saved.

``create`` and ``commit`` are collective. A failure in between is recorded and raised by ``commit`` on every rank, so
that ranks never part ways between two collectives of the training.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

from cairn.agreement import CreateAgreement, agree_on_create, error_to_json
from cairn.launch import Launch, claim
from cairn.save.checkpoint import Checkpoint
from cairn.save.handover import HandOver
from cairn.schedule import persist_due
from cairn.session import Session
from cairn.transport.messages import Opening
from cairn.unsettled import Unsettled
from cairn_api.errors import CairnError, ConfigurationError
from cairn_api.names import VersionId, check_partition, check_tag

log = logging.getLogger("cairn")

_MOST_BYTES = 1 << 48
"""No partition is larger than this; a number that is comes from a mistake."""


class Saver:
    """What outlives one save."""

    def __init__(self, session: Session, now_s: Callable[[], float] = time.monotonic) -> None:
        self._session = session
        self._now_s = now_s
        self._hand_over = HandOver(session)
        self._last_flagged_s: float | None = None
        self._open: Checkpoint | None = None
        self._last_by_tag: dict[str, VersionId] = {}

    def create(self, tag: str, *, save_dir: str, file_marks: bool, raise_immediately: bool) -> Checkpoint:
        """See :meth:`cairn.Client.create`."""
        session = self._session
        with session.counters.stall():
            session.background.settle()
            if self._open is not None:
                log.warning("version %s was never committed and is aborted", self._open.version)
                self._open.abort("the program never committed it")
            launch, agreement = self._agree(tag, save_dir, file_marks=file_marks)
            item: Unsettled | None = None
            if agreement.skip:
                self._count_skip(agreement)
            else:
                item = session.ledger.add(self._opening(launch, agreement))
            checkpoint = Checkpoint(
                session, self._hand_over, tag, item, raise_immediately=raise_immediately, ended=self._ended
            )
            if item is not None:
                self._open = checkpoint
                checkpoint.begin()
            return checkpoint

    def prefault(self, states: Mapping[str, object], each: int) -> None:
        """See :meth:`cairn.Client.preallocate`."""
        if not _is_usable(states, each):
            raise ConfigurationError(
                f"preallocate takes a mapping from partition names to states or sizes, not {type(states).__name__}, "
                f"and a number of buffers, not {each!r}",
                hint='write preallocate({"model.pt": state}) or preallocate({"model.pt": size_bytes})',
            )
        for name in states:
            check_partition(name)
        sizes = {name: _size_bytes(state) for name, state in states.items()}
        self._hand_over.prefault(sizes, each)

    def last_of(self, tag: str) -> VersionId | None:
        """The version of *tag* that this client committed last."""
        return self._last_by_tag.get(tag)

    def _ended(self, checkpoint: Checkpoint, item: Unsettled | None) -> None:
        if self._open is checkpoint:
            self._open = None
        if item is None or item.agreed is None:
            return
        self._last_by_tag[checkpoint.tag] = item.opening.version
        if self._session.counters.saves == 1:
            # Now the sizes are known: the buffers of the following saves are made while training runs.
            captured = [plan for plan, segment in item.partitions.values() if segment]
            sizes = {plan.name: plan.size_bytes for plan in captured}
            self._hand_over.prefault(sizes, self._session.settings.buffers)

    def _agree(self, tag: str, save_dir: str, *, file_marks: bool) -> tuple[Launch, CreateAgreement]:
        session, settings = self._session, self._session.settings
        launch = session.launch
        if launch is None:
            try:
                launch = claim(
                    session.saving, session.ranks, session.max_epoch, session.resumed_from,
                    settings.collective_timeout_s, known=session.set_launch,
                )  # fmt: skip
            except BaseException:
                session.set_launch(None)  # the next save claims anew
                raise
        said, last_persist_age_s = self._reserve(tag)
        if session.ranks.rank == 0:
            said["sequence"] = launch.next_sequence()
            said["persist"] = self._persist_due(last_persist_age_s, inherited=said["persist_lost"])
            said["save_dir"] = save_dir
            said["file_marks"] = file_marks
        gathered = session.ranks.all_gather("create", said, settings.buffer_wait_s + settings.collective_timeout_s)
        agreement = agree_on_create(gathered, launch.epoch, skip_allowed=settings.when_no_buffer == "skip")
        if agreement.persist and not agreement.skip:
            self._last_flagged_s = self._now_s()
        return launch, agreement

    def _reserve(self, tag: str) -> tuple[dict[str, Any], float | None]:
        """What this rank says in ``create``, and the age in seconds of the last copy in tier 2."""
        session, settings = self._session, self._session.settings
        said: dict[str, Any] = {"tag": tag, "available": False, "tier1": [], "tier2": [], "persist_lost": False}
        last_persist_age_s: float | None = None
        error = session.take_failure(tier2_too=False)
        try:
            check_tag(tag)
            wait_s = settings.buffer_wait_s if settings.when_no_buffer == "wait" else 0.0
            session.restoring.settle()
            reply = session.saving.reserve(wait_s, settings.buffers)
            session.note_failures(reply.failures)
            error = error or session.take_failure(tier2_too=False)
            for version in session.pool.free(reply.free_segments):
                session.ledger.drop(version)
            last_persist_age_s = reply.last_persist_age_s
            said["available"] = reply.available
            said["tier1"] = [str(version) for version in reply.tier1]
            said["tier2"] = [str(version) for version in reply.tier2]
            said["persist_lost"] = reply.persist_lost
        except CairnError as raised:
            error = raised
        said["error"] = error_to_json(error)
        return said, last_persist_age_s

    def _persist_due(self, last_persist_age_s: float | None, *, inherited: bool) -> bool:
        now_s = self._now_s()
        last_persisted_s = None if last_persist_age_s is None else now_s - last_persist_age_s
        interval_s = self._session.settings.persistent_time_interval
        return persist_due(now_s, self._last_flagged_s, last_persisted_s, interval_s, inherited=inherited)

    def _count_skip(self, agreement: CreateAgreement) -> None:
        self._session.counters.skipped_saves += 1
        log.warning(
            "save %s was left out on all ranks: no capture buffer was free on rank %s; %d left out so far. Save less "
            'often, raise `buffers`, or set when_no_buffer = "wait"',
            agreement.version.tag,
            ", ".join(map(str, agreement.lacking)),
            self._session.counters.skipped_saves,
        )

    def _opening(self, launch: Launch, agreement: CreateAgreement) -> Opening:
        return Opening(
            version=agreement.version,
            world_size=self._session.ranks.world_size,
            nonce=launch.nonce,
            save_dir=agreement.save_dir,
            persist=agreement.persist,
            floor=agreement.floor,
            file_marks=agreement.file_marks,
            attributes=self._attributes(),
            node_ranks=self._node_ranks(),
        )

    def _attributes(self) -> dict[str, str]:
        import torch  # noqa: PLC0415 - a client that only lists versions needs no torch

        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "nodes": str(len(set(self._session.rank_nodes))),
        }

    def _node_ranks(self) -> tuple[int, ...]:
        nodes = self._session.rank_nodes
        own = nodes[self._session.ranks.rank]
        return tuple(rank for rank, node in enumerate(nodes) if node == own)


def _is_usable(states: object, each: object) -> bool:
    return isinstance(states, Mapping) and type(each) is int and each >= 0


def _size_bytes(state: object) -> int:
    """*state* itself if it is a size, else that of the partition that it would become."""
    if isinstance(state, (int, float)):
        if isinstance(state, bool) or not isinstance(state, int) or not 0 < state < _MOST_BYTES:
            raise ConfigurationError(f"{state!r} is no size in bytes", hint="pass a state, or a whole number of bytes")
        return state
    from cairn.capture import plan as capture  # noqa: PLC0415 - needs torch

    return capture.plan(state).size_bytes
