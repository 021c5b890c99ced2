"""The end of a save: agree with all ranks, tell the daemon, wait as long as was asked for."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

from cairn.agreement import error_to_json, first_error, shared_names
from cairn.session import Session
from cairn.settings import Durability
from cairn.unsettled import Unsettled
from cairn_api.errors import CairnError, ConfigurationError, SaveFailedError, UnavailableError
from cairn_api.names import VersionId

log = logging.getLogger("cairn")


def commit(session: Session, item: Unsettled, names: Collection[str], failure: BaseException | None) -> VersionId:
    """Commit a version on all ranks, or fail on all of them (collective). *failure* is this rank's, if it has one.

    The daemons hold all bytes before anybody agrees, so agreement means that the version will be finished.
    """
    version = item.opening.version
    deadline_s = time.monotonic() + session.settings.commit_timeout_s
    failure = failure or item.lost
    if failure is None:
        try:
            item.open_once(session.saving)
            item.seal_rest(session.saving)
            session.saving.prepare(version, sorted(names))
            item.prepared = True
        except CairnError as error:
            failure = item.lost or error
    background = session.take_failure(tier2_too=False)
    said = {"names": sorted(names), "error": error_to_json(failure), "background": error_to_json(background)}
    try:
        gathered = session.ranks.all_gather(f"commit of {version}", said, session.settings.commit_timeout_s)
    except CairnError as error:
        abort(session, item, error.message)
        raise _failed(session, version, error) from error
    if (problem := first_error(gathered)) is not None:
        abort(session, item, problem.message)
        raise _failed(session, version, problem) from failure
    if not any(rank["names"] for rank in gathered):
        # It would push a version that can be restored out of retention.
        abort(session, item, "nothing was saved")
        raise ConfigurationError(f"no rank has saved anything in {version}", hint="call save before commit")
    _tell_agreed(session, item, shared_names([rank["names"] for rank in gathered]), deadline_s)
    session.counters.saves += 1
    _wait_durable(session, version, deadline_s)
    if (problem := first_error(gathered, "background")) is not None:
        raise type(problem)(
            f"{problem.message} (version {version}, just committed, is not affected)",
            hint=problem.hint,
            context=problem.context,
        )
    return version


def abort(session: Session, item: Unsettled, reason: str) -> None:
    """End a save on this rank that will not be committed."""
    version = item.opening.version
    try:
        if item.opening.persist:
            item.open_once(session.saving)  # the next version inherits the flag from one that the daemon knows
        session.saving.abort(version, reason)
    except CairnError as error:
        log.warning("version %s could not be aborted, its lease will end it: %s", version, error)
    session.ledger.drop(version)


def _tell_agreed(session: Session, item: Unsettled, shared: list[tuple[str, int]], deadline_s: float) -> None:
    """Every rank has agreed: from here the version is committed, so a daemon that is away is waited for."""
    version = item.opening.version
    item.agreed = shared
    while True:
        try:
            if item.lost is not None:
                raise item.lost
            state = session.saving.commit(version, shared)
            # A daemon that was restarted may still miss another rank of this node, which is about to tell it again.
            left_s = max(0.0, deadline_s - time.monotonic())
            if state == "open" and not session.saving.wait(version, Durability.CAPTURED, left_s):
                raise SaveFailedError(f"not all ranks of this node came back to the restarted daemon for {version}")
            return
        except UnavailableError as error:
            if time.monotonic() < deadline_s:
                log.warning("version %s is agreed on, the daemon is away and is waited for: %s", version, error)
                continue
            raise SaveFailedError(
                f"all ranks agreed on version {version}, but this rank's daemon did not come back to be told: whether "
                "it is kept depends on what that daemon finds when it starts",
                hint="start cairnd, then run `cairn show`",
                context={"version": version},
            ) from error
        except CairnError as error:
            session.ledger.drop(version)
            raise _failed(session, version, error) from error


def _wait_durable(session: Session, version: VersionId, deadline_s: float) -> None:
    """Wait for ``commit_durability`` beyond "captured"; ranks agree on the outcome."""
    durability = session.settings.commit_durability
    if durability == Durability.CAPTURED:
        return
    error: CairnError | None = None
    try:
        if not session.saving.wait(version, durability, max(0.0, deadline_s - time.monotonic())):
            error = UnavailableError(
                f"version {version} is captured, but did not reach {durability} within commit_timeout_s",
                hint="run `cairn status`; the daemon goes on trying",
            )
    except CairnError as raised:
        error = raised
    gathered = session.ranks.all_gather(
        f"durability of {version}", {"error": error_to_json(error)}, session.settings.commit_timeout_s
    )
    if (problem := first_error(gathered)) is not None:
        raise problem from error


def _failed(session: Session, version: VersionId, problem: CairnError) -> SaveFailedError:
    session.counters.failed_saves += 1
    if isinstance(problem, SaveFailedError) and str(version) in problem.message:
        return problem
    return SaveFailedError(
        f"version {version} was not committed: {problem.message}",
        hint=problem.hint or "earlier versions are intact; save again",
        context={"version": version, **problem.context},
    )
