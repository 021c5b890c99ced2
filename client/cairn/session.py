"""A rank's standing relation with its daemon: the link, the capture buffers, what is unsettled, what went wrong."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping

from cairn.agreement import check_same, error_to_json, first_error
from cairn.background import Background, RanksInTurn
from cairn.choice import Candidate
from cairn.counters import Counters
from cairn.launch import Launch, repeat_claim
from cairn.overlap import Overlap
from cairn.ranks import Ranks
from cairn.settings import ClientSettings
from cairn.transport.calls import Caller
from cairn.transport.connection import Connection, ConnectionLostError
from cairn.transport.keepalive import KeepAlive
from cairn.transport.link import Fixed, Link, open_first
from cairn.transport.messages import Alive, Joined
from cairn.transport.pool import Pool
from cairn.transport.restore_calls import RestoreCalls
from cairn.transport.save_calls import SaveCalls
from cairn.transport.shared_memory import Segment
from cairn.unsettled import Ledger, tell_again
from cairn_api.errors import CairnError, ConfigurationError, SaveFailedError, VersionError
from cairn_api.names import VersionId

log = logging.getLogger("cairn")

_STOP_TIMEOUT_S = 5.0


class Session:
    """See the module. Made by :func:`open_session`, on every rank at the same time."""

    def __init__(
        self, settings: ClientSettings, ranks: Ranks, client_version: str, connection: Connection, joined: Joined
    ) -> None:
        self.settings = settings
        self.background = Background(self._background_failed)
        self.ranks: Ranks = RanksInTurn(ranks, self.background)
        self.joined = joined
        self.counters = Counters()
        self.ledger = Ledger()
        self.launch: Launch | None = None
        self.resumed_from: VersionId | None = None
        self._resume: tuple[VersionId, str] | None = None
        """What this launch went on from, as its node's daemon was told; None once it has saved something."""
        self.max_epoch = joined.max_epoch
        self.rank_nodes: tuple[str, ...] = (joined.node,)
        self._client_version = client_version
        self._link = Link(connection, settings.runtime_dir)
        caller = Caller(self._link, settings.job, settings.reconnect_timeout_s)
        self.saving = SaveCalls(caller, ranks.rank)
        self.restoring = RestoreCalls(caller)
        self.pool = Pool(
            share=self._share, release=lambda segment: self.saving.release(segment.name), pin=register_with_gpu
        )
        self.overlap = Overlap(self.background, self.counters)
        self._failures: list[CairnError] = []
        self._logged: list[CairnError] = []
        """Those of them that the log has."""
        self._failures_lock = threading.Lock()
        self._keep_alive = KeepAlive(
            self._link, settings.job, joined.lease_s, settings.reconnect_timeout_s,
            reopen=self._reopen, replied=self._replied,
        )  # fmt: skip

    @property
    def local_ranks(self) -> int:
        """How many ranks of the job are on this node."""
        return self.rank_nodes.count(self.rank_nodes[self.ranks.rank])

    def set_launch(self, launch: Launch | None) -> None:
        """From here on a daemon that is connected to anew is told of *launch*."""
        self.launch = launch

    def start(self) -> None:
        """Start keeping the session alive."""
        self._keep_alive.start()

    def note_failures(self, failures: tuple[CairnError, ...] | list[CairnError]) -> None:
        """Queue what went wrong in the background; a failed copy to tier 2 is logged at once, as training goes on."""
        tier2 = [failure for failure in failures if about_tier2(failure)]
        for failure in tier2:
            log.warning("%s", failure)
        self._queue(failures, logged=tier2)

    def _queue(self, failures: Iterable[CairnError], *, logged: Iterable[CairnError]) -> None:
        with self._failures_lock:
            self._failures += failures
            self._logged += logged

    def take_failure(self, *, tier2_too: bool) -> CairnError | None:
        """The oldest queued failure, once; those of copies to tier 2 only for callers who ask about tier 2."""
        with self._failures_lock:
            for number, failure in enumerate(self._failures):
                if tier2_too or not about_tier2(failure):
                    self._logged = [logged for logged in self._logged if logged is not failure]
                    return self._failures.pop(number)
        return None

    def log_failures(self) -> None:
        """Write to the log what nobody will be told any more, and what the log does not have yet."""
        with self._failures_lock:
            logged = set(map(id, self._logged))
            left = [failure for failure in self._failures if id(failure) not in logged]
            self._failures, self._logged = [], []
        for failure in left:
            log.error("%s", failure)

    def forget_tier2_failures(self) -> None:
        """A version has reached tier 2, so what kept earlier ones from it is over."""
        with self._failures_lock:
            self._failures = [failure for failure in self._failures if not about_tier2(failure)]
            self._logged = [failure for failure in self._logged if not about_tier2(failure)]

    def note_resume(self, candidate: Candidate) -> None:
        """This launch goes on from *candidate*, chosen automatically: should it die before it saves, that counts."""
        if self._resume is not None and self._resume[0] == candidate.version:
            return  # another partition of it
        if candidate.passed_over:
            log.warning("loading %s as the last resort, although %s", candidate.version, candidate.passed_over)
        if self.rank_nodes.index(self.rank_nodes[self.ranks.rank]) != self.ranks.rank:
            return  # the first rank of each node speaks for all
        self._resume = (candidate.version, uuid.uuid4().hex)
        try:
            died = self.restoring.note_resume(*self._resume)
        except CairnError as error:  # the training itself can go on
            log.warning("the daemon could not take note of what this launch resumes from: %s", error)
            return
        if died:
            log.warning(
                "launches that went on from %s and died before they saved anything: %d in a row; after some "
                "(pass_over_after_resumes) an older version is taken",
                candidate.version,
                died,
            )

    def close(self, *, ended_well: bool) -> None:
        """Leave the daemon, after what is left of the last save is done.

        What is sealed is finished without this process; what is not is aborted by the daemon.
        """
        self.background.settle()
        if self._resume is not None and ended_well:
            try:
                self.restoring.note_good_end()
            except CairnError as error:
                log.info("the daemon was not told that this launch ended well: %s", error)
        self.background.close()
        self.overlap.close()
        self.restoring.close()
        self._link.close()
        self._keep_alive.join(_STOP_TIMEOUT_S)
        self.pool.close()

    def _background_failed(self, error: BaseException) -> None:
        if not isinstance(error, CairnError):
            error = SaveFailedError(
                f"a save failed in the background: {type(error).__name__}: {error}",
                hint="earlier versions are intact; save again",
            )
        log.error("%s", error)
        self._queue([error], logged=[error])

    def _share(self, size_bytes: int, make: Callable[[], Segment]) -> None:
        def offered() -> tuple[str, int]:
            segment = make()
            return segment.name, segment.fd

        self.saving.share(size_bytes, offered)

    def _replied(self, reply: Alive) -> None:
        self.note_failures(reply.failures)
        if reply.settled:
            self._resume = None
        for version in reply.settled:
            self.ledger.drop(version)  # its buffers stay the memory tier's copy until Reserve gives them back

    def _reopen(self) -> Connection:
        """Connect to the daemon that runs now and tell it all it has to know. On the keep-alive thread."""
        connection = Connection.open(
            self.settings.runtime_dir, self.settings.job, self.ranks.rank, self._client_version
        )
        try:
            calls = SaveCalls(Caller(Fixed(connection), self.settings.job, patience_s=0), self.ranks.rank)
            self.joined = _join(calls, self.settings, self.ranks, self._client_version)
            if self.launch is not None:
                repeat_claim(calls, self.ranks, self.launch)
            self._note_again(RestoreCalls(Caller(Fixed(connection), self.settings.job, patience_s=0)))
            self.note_failures(tell_again(calls, self.ledger, self.pool))
        except BaseException:
            connection.close()
            raise
        self.counters.reconnects += 1
        return connection

    def _note_again(self, calls: RestoreCalls) -> None:
        if self._resume is None:
            return
        try:
            calls.note_resume(*self._resume)
        except VersionError:  # deleted by retention meanwhile: newer ones were saved
            self._resume = None
        except ConnectionLostError:
            raise  # the daemon is gone again
        except CairnError as error:  # a full disk, say: no reason to go without a daemon
            log.warning("the daemon could not take note of what this launch resumed from: %s", error)


def about_tier2(failure: CairnError) -> bool:
    """Whether a background failure is of a copy to tier 2, which leaves the version itself intact."""
    return failure.context.get("tier") == "tier2"


def open_session(settings: ClientSettings, ranks: Ranks, client_version: str) -> Session:
    """Connect to this node's daemon and announce the rank (collective).

    Raises on **every** rank what failed on the first: :class:`UnavailableError` without a daemon,
    :class:`ConfigurationError` when the daemon refuses the job's settings or the ranks do not agree on them.
    """
    connection: Connection | None = None
    joined: Joined | None = None
    error: CairnError | None = None
    try:
        connection = open_first(
            settings.runtime_dir, settings.job, ranks.rank, client_version, settings.connect_timeout_s
        )
        calls = SaveCalls(Caller(Fixed(connection), settings.job, patience_s=0), ranks.rank)
        joined = _join(calls, settings, ranks, client_version)
    except CairnError as raised:
        error = raised
    try:
        said: Mapping[str, object] = {
            "error": error_to_json(error),
            "settings": _agreed_settings(settings),
            "node": joined.node if joined else "",
            "max_epoch": joined.max_epoch if joined else 0,
        }
        gathered = ranks.all_gather("connecting", said, settings.collective_timeout_s)
        if (failure := first_error(gathered)) is not None:
            raise failure from error
        check_same(gathered, "settings", "settings")
        if connection is None or joined is None:
            raise ConfigurationError("this rank has no daemon", hint="start cairnd on every node")
    except BaseException:
        if connection is not None:
            connection.close()
        raise
    session = Session(settings, ranks, client_version, connection, joined)
    session.max_epoch = max(item["max_epoch"] for item in gathered)
    session.rank_nodes = tuple(item["node"] for item in gathered)
    if joined.tier2_error and ranks.rank == session.rank_nodes.index(joined.node):
        # The daemon goes on trying, so this is no reason to stop; but it is told where the user looks, once a node.
        log.warning("nothing reaches tier 2 for now, saves go to tier 1 only: %s", joined.tier2_error)
    session.start()
    return session


def _join(calls: SaveCalls, settings: ClientSettings, ranks: Ranks, client_version: str) -> Joined:
    return calls.join(
        ranks.world_size, settings.persistent_storage_path, settings.num_of_version_in_retention, client_version
    )


def _agreed_settings(settings: ClientSettings) -> dict[str, object]:
    """Those that decide what all ranks do together."""
    names = (
        "job",
        "when_no_buffer",
        "capture",
        "commit_durability",
        "persistent_storage_path",
        "enable_load",
        "load_path",
    )
    return {name: getattr(settings, name) for name in names}


def register_with_gpu(segment: Segment) -> None:
    """Page-lock a new segment for the GPUs of this process, until it is closed."""
    import torch  # noqa: PLC0415 - a client that only lists versions needs no torch

    if not torch.cuda.is_available():
        return
    from cairn.capture import pinning  # noqa: PLC0415 - as above

    image = segment.image
    if pinning.register(image):
        segment.before_close = lambda: pinning.unregister(image)
