"""One save in progress."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from cairn.save.commit import abort, commit
from cairn.save.handover import HandOver
from cairn.session import Session
from cairn.unsettled import Unsettled
from cairn_api.errors import CairnError, ConfigurationError
from cairn_api.names import VersionId, check_partition

log = logging.getLogger("cairn")


class Checkpoint:
    """One save in progress. As a context manager, leaving the block commits and an exception aborts on every rank.

    ``version`` is None when all ranks leave this save out (``when_no_buffer = "skip"``): saving and committing then
    do nothing.
    """

    def __init__(
        self,
        session: Session,
        hand_over: HandOver,
        tag: str,
        item: Unsettled | None,
        *,
        raise_immediately: bool,
        ended: Callable[[Checkpoint, Unsettled | None], None],
    ) -> None:
        self.tag = tag
        self._session = session
        self._hand_over = hand_over
        self._item = item
        self._raise_immediately = raise_immediately
        self._tell_ended = ended
        self._failure: BaseException | None = None
        self._names: set[str] = set()
        self._ended = False

    @property
    def version(self) -> VersionId | None:
        """The version being saved, or None for a save that is left out."""
        return None if self._item is None else self._item.opening.version

    @property
    def skipped(self) -> bool:
        """Whether all ranks leave this save out."""
        return self._item is None

    @property
    def failure(self) -> BaseException | None:
        """What went wrong on this rank so far; :meth:`commit` will raise for it on every rank."""
        return self._failure

    def begin(self) -> None:
        """Have the version opened on the daemon; with overlapped capture the commit does that, while training goes on.

        Ranks may part ways only in :meth:`commit`, so what fails is recorded and nothing is raised.
        """
        if self._item is not None and self._session.settings.capture != "overlapped":
            try:
                self._item.open_once(self._session.saving)
            except CairnError as error:
                self.note(error)

    def note(self, failure: BaseException | None) -> None:
        """Record what went wrong on this rank, also outside of :meth:`save`; the first failure counts."""
        if failure is not None and self._failure is None:
            self._failure = failure
            log.info("saving %s failed on this rank: %s", self.version, failure)  # the commit tells it to the user

    def save(self, name: str, state: object) -> None:
        """Save *state*, anything ``torch.save`` takes, as partition *name* (a relative path).

        When this returns, the bytes are copied: the tensors may change. With overlapped capture, guarded ones may
        change after the next step of their optimizer has begun, or :meth:`cairn.Client.wait_copied`. A failure is
        recorded for :meth:`commit`, and also raised here unless ``create`` was told ``raise_immediately=False``.
        """
        self._check_open()
        if self._item is None:
            return
        with self._session.counters.stall():
            try:
                if self._failure is not None:
                    raise self._failure
                check_partition(name)
                if name in self._names:
                    raise ConfigurationError(
                        f"partition {name!r} was saved already in {self.version}", hint="use another name"
                    )
                self._names.add(name)
                self._hand_over.give(self._item, name, state, self.note)
            except Exception as error:  # a state dict's own code may raise anything; commit() raises it on all ranks
                self.note(error)
                if self._raise_immediately:
                    raise

    def commit(self) -> VersionId | None:
        """Agree with all ranks that everything is saved (collective); the version, or None when it was left out.

        Raises :class:`SaveFailedError` on **every** rank, with the first failing rank's reason, when any rank failed.
        What it promises is ``commit_durability``: normally that the daemons hold all bytes.

        With overlapped capture this returns at once. All of the above happens while training goes on, and the next
        ``create``, ``commit``, ``wait`` or ``close`` raises it.
        """
        self._check_open()
        self._ended = True
        if self._item is None:
            self._tell_ended(self, None)
            return None
        version = self._item.opening.version
        self.conclude(partial(self._commit, self._item))
        return version

    def conclude(self, work: Callable[[], object]) -> None:
        """Do *work*, which ends this save on all ranks: here, or with overlapped capture while training goes on.

        For integrations that agree on more than :meth:`commit` does, which *work* may call.
        """
        background = self._session.background
        if self._session.settings.capture == "overlapped" and not background.inside:
            background.submit(work)
        else:
            work()

    def _fail(self) -> None:
        """Commit, here, what cannot succeed, so that the other ranks hear of it."""
        self._ended = True
        if self._item is None:
            self._tell_ended(self, None)
        else:
            self._session.overlap.wait_copied()
            self._commit(self._item)

    def _commit(self, item: Unsettled) -> None:
        try:
            with self._session.counters.stall(counted=not self._session.background.inside):
                commit(self._session, item, self._names, self._failure)
        finally:
            self._tell_ended(self, item)

    def abort(self, reason: str = "aborted by the program") -> None:
        """End this save on this rank, without asking the others; they find out in their ``commit``."""
        if self._ended:
            return
        self._ended = True
        self._session.overlap.wait_copied()  # into buffers that are about to be given to others
        if self._item is not None:
            abort(self._session, self._item, reason)
        self._tell_ended(self, None)

    def _check_open(self) -> None:
        if self._ended:
            raise ConfigurationError(f"checkpoint {self.tag!r} has ended", hint="create another one")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ended:
            return
        if error is None:
            self.commit()
        elif not isinstance(error, Exception):
            self.abort(f"{type(error).__name__} in the training script")  # the process is going down: do not wait
        else:
            self.note(error)
            try:
                self._fail()
            except CairnError as raised:
                log.warning("%s", raised)  # the exception of the block is the one to propagate
