"""The client: one per rank, from :func:`connect` to :meth:`Client.close`."""

from __future__ import annotations

import atexit
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cairn.choice import Candidate, Choice, Reads, every_partition, parse_request
from cairn.load import Loader, Restored, named
from cairn.ranks import GlooRanks, Ranks, SingleRank
from cairn.save import Checkpoint, Saver
from cairn.session import Session, open_session
from cairn.settings import ClientSettings, Durability, load_settings
from cairn.transport.messages import Joined, Progress
from cairn_api.errors import ConfigurationError, UnavailableError, VersionError
from cairn_api.names import VersionId, parse_version

if TYPE_CHECKING:
    import torch

__version__ = "0.1.0"

_WAIT_STEP_S = 20.0


def connect(
    job: str | None = None,
    *,
    runtime_dir: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    ranks: Ranks | None = None,
    block: Mapping[str, object] | None = None,
    **settings: object,
) -> Client:
    """Connect this process to its node's daemon. **Collective** when there is more than one rank.

    *rank* and *world_size* come from ``torch.distributed`` if it is initialised, else the process is alone. *ranks*
    replaces that with another implementation of :class:`cairn.ranks.Ranks`. *settings* are those of
    :class:`cairn.settings.ClientSettings`; an argument beats the environment (``CAIRN_*``), which beats *block* (the
    ``"cairn"`` block of a DeepSpeed JSON).

    Raises, on every rank: :class:`UnavailableError` when no daemon answers, :class:`ConfigurationError` for a setting
    that is unknown, wrong, or not allowed by the operator.
    """
    chosen = load_settings({"job": job, "runtime_dir": runtime_dir, **settings}, os.environ, block)
    if not chosen.job:
        raise ConfigurationError("no job is named", hint='pass job="run-7" or set CAIRN_JOB')
    if ranks is None:
        ranks = _ranks(rank, world_size, chosen.collective_timeout_s)
    return Client(open_session(chosen, ranks, __version__))


def _ranks(rank: int | None, world_size: int | None, timeout_s: float) -> Ranks:
    from torch import distributed  # noqa: PLC0415 - not before somebody connects

    initialised = distributed.is_available() and distributed.is_initialized()
    if world_size == 1 or (world_size is None and not initialised):
        if rank not in (None, 0):
            raise ConfigurationError(f"rank {rank} does not exist in a world of 1", hint="pass world_size too")
        return SingleRank()
    found = GlooRanks(timeout_s)
    if rank not in (None, found.rank) or world_size not in (None, found.world_size):
        raise ConfigurationError(
            f"rank {rank} of {world_size} was asked for, torch.distributed says {found.rank} of {found.world_size}",
            hint="leave rank and world_size out",
        )
    return found


class Client:
    """One rank's client. Methods marked *collective* are called by all ranks, in the same order.

    Use one from one thread; :meth:`wait` and :meth:`statistics` may also be called from others.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._saver = Saver(session)
        self._loader = Loader(session)
        self._closed = False
        _CLIENTS.add(self)

    @property
    def settings(self) -> ClientSettings:
        """The settings in force."""
        return self._session.settings

    @property
    def ranks(self) -> Ranks:
        """The ranks that save and restore together, for integrations that have something of their own to agree on."""
        return self._session.ranks

    @property
    def daemon(self) -> Joined:
        """What the daemon said when this rank joined: node, tier 1 path, limits."""
        return self._session.joined

    # Saving

    def create(
        self, tag: str, save_dir: str = "", *, file_marks: bool = False, raise_immediately: bool = True
    ) -> Checkpoint:
        """Begin a save (collective); waits for a free capture buffer, or skips, as ``when_no_buffer`` says.

        *save_dir* is remembered with the version, *file_marks* says that links or placeholders for it will lie there
        (rank 0's values count). With ``raise_immediately=False`` a failing ``save`` is only recorded, and raised by
        ``commit`` on every rank.

        Raises on every rank: :class:`ConfigurationError` (a bad tag, or ranks that disagree about it),
        :class:`OverloadedError` (no buffer became free), and what failed in the background since the last call.
        """
        self._check_open()
        return self._saver.create(tag, save_dir=save_dir, file_marks=file_marks, raise_immediately=raise_immediately)

    def preallocate(self, states: Mapping[str, object], *, buffers: int | None = None) -> None:
        """Make the buffers of the first saves ahead of them, in the background. Not collective.

        *states* gives for each partition the state that will be saved, which is measured and not copied, or its size in
        bytes, which may be somewhat too large. *buffers* is how many of each are made; None means the setting.
        Without this the first save makes its buffers itself, at several times the cost of a later save; a save that
        comes too early waits for the one that is being made.

        Raises :class:`ConfigurationError` for a state that cannot be saved.
        """
        self._check_open()
        self._saver.prefault(states, self.settings.buffers if buffers is None else buffers)

    def guard(self, optimizer: torch.optim.Optimizer, also: Callable[[], Iterable[torch.Tensor]] = tuple) -> None:
        """Let overlapped capture copy what *optimizer* trains, and its state, while training goes on. Not collective.

        The caller promises that from a save until the next ``optimizer.step()`` (or :meth:`wait_copied`) nothing
        changes these tensors; the step waits until they are copied. *also* returns further tensors of which the same
        holds. A change that PyTorch has counted by the end of the copy is noticed and fails the save. One that is still
        running then is not, nor is one made through ``.data`` or by another library, nor a step that was compiled or
        recorded without its hooks: such a version is torn.

        Raises :class:`ConfigurationError` for anything but a ``torch.optim.Optimizer``. Without effect unless the
        setting ``capture`` is ``overlapped``.
        """
        self._check_open()
        self._session.overlap.guard(optimizer, also)

    def wait_copied(self) -> None:
        """Wait until every byte of the saves so far is copied: before changing guarded tensors other than by a step.

        Returns at once unless overlapped capture is still copying. Not collective.
        """
        self._session.overlap.wait_copied()

    def settle(self) -> None:
        """Wait until the saves so far are committed, or have failed, which the next call raises. Not collective.

        Returns at once unless the end of an overlapped save is still pending.
        """
        self._session.background.settle()

    def wait(self, version: str | VersionId, durability: str = Durability.TIER2, timeout: float = 600.0) -> VersionId:
        """Wait until a version (or the newest of a tag) has reached *durability*, at most *timeout* seconds.

        Asking for tier 2 also requests that it be persisted, whatever its flag says. Raises :class:`VersionError` when
        there is no such version, :class:`SaveFailedError` (and others) when it will never get there and
        :class:`UnavailableError` when the time is up. Not collective.
        """
        self._check_open()
        level = _durability(durability)
        deadline_s = time.monotonic() + timeout
        if not self._session.background.settle(timeout):
            raise UnavailableError(
                f"the save before this call was not finished within {timeout:g} s",
                hint="another rank may be slower or gone; see commit_timeout_s",
            )
        self._raise_background(tier2_too=False)
        wanted = self._find(version)
        while True:
            left_s = max(0.0, deadline_s - time.monotonic())
            if self._session.saving.wait(wanted, level, min(left_s, _WAIT_STEP_S)):
                break
            self._raise_background(tier2_too=level is Durability.TIER2)
            if left_s <= _WAIT_STEP_S:
                raise UnavailableError(
                    f"version {wanted} did not reach {level} within {timeout:g} s",
                    hint="run `cairn status` to see what it waits for; the daemon goes on trying",
                    context={"version": wanted},
                )
        if level is Durability.TIER2:
            self._session.forget_tier2_failures()  # it got there all the same
        self._raise_background(tier2_too=False)
        return wanted

    # Loading

    def load(
        self,
        version: str | VersionId,
        name: str,
        map_location: Any = None,
        weights_only: bool | None = None,
        *,
        into: Any = None,
    ) -> Any:
        """Load partition *name* of the newest version of a tag, or of exactly one version (collective).

        Each rank gets the partition that it saved itself, else the one a lower rank saved under that name.
        *weights_only* None means the setting. With *into*, a state of the same structure, the values are copied into
        its tensors (see :meth:`cairn.load.Restored.load`). Raises :class:`VersionError` when no such version can be
        read by all ranks; another tag is never loaded instead.
        """
        restored = self.restore(str(version), reads=named(name))
        if restored is None:
            raise VersionError(f"there is no version of {version}", hint="run `cairn list`")
        with restored:
            safe = self.settings.weights_only if weights_only is None else weights_only
            path = restored.path_of(name, self.ranks.rank)
            return restored.load(path, map_location=map_location, weights_only=safe, into=into)

    def latest(self) -> VersionId | None:
        """The newest version that every rank can restore completely, or None when none exists anywhere (collective).

        Raises :class:`VersionError` when versions are known and none can be restored.
        """
        chosen = self.choose()
        return None if chosen is None else chosen.version

    def versions(self, source: str | None = None) -> list[dict[str, Any]]:
        """What this node's daemon could restore, newest first, each with ``version``, ``state``, ``tiers``,
        ``partitions`` and more (see ``cairn.choice``). Not collective."""
        self._check_ready()
        return list(self._loader.versions(self._source(source)))

    def choose(
        self,
        version: str | VersionId | None = None,
        *,
        save_dir: str | None = None,
        source: str | None = None,
        reads: Reads = every_partition,
    ) -> Choice | None:
        """The version that all ranks would load, without loading it (collective).

        *version* None means the newest; a tag, its newest; a full version name, that one. *save_dir* leaves versions
        saved from elsewhere aside; *source* is the URL of a bucket to read instead of this job's tiers (the setting
        ``load_path`` by default). *reads* tells which partitions each rank will read: a version counts only if every
        rank can reach its own. None means that no version exists anywhere.
        """
        self._check_ready()
        return self._loader.choose(
            None if version is None else str(version), save_dir=save_dir, source=self._source(source), reads=reads
        )

    def fetch(
        self,
        version: Choice | Candidate,
        paths: Iterable[str] = (),
        *,
        source: str | None = None,
        progress: Callable[[Progress], None] = lambda progress: None,  # noqa: ARG005 - nobody watches
    ) -> Restored:
        """Bring *paths* of a chosen version near and verify them; no path means all. Not collective."""
        self._check_ready()
        candidate = version.candidate if isinstance(version, Choice) else version
        return self._loader.fetch(candidate, paths, source=self._source(source), progress=progress)

    def restore(
        self,
        version: str | VersionId | None = None,
        *,
        save_dir: str | None = None,
        source: str | None = None,
        reads: Reads = every_partition,
        progress: Callable[[Progress], None] = lambda progress: None,  # noqa: ARG005 - nobody watches
    ) -> Restored | None:
        """:meth:`choose` and :meth:`fetch` together, choosing again when what was chosen is damaged (collective).

        The last version restored is what the launch's epoch is recorded to have resumed from.
        """
        self._check_ready()
        return self._loader.restore(
            None if version is None else str(version),
            save_dir=save_dir,
            source=self._source(source),
            reads=reads,
            progress=progress,
        )

    # The client itself

    def statistics(self) -> dict[str, int | float]:
        """Counters since the client connected; see :class:`cairn.counters.Counters`."""
        return self._session.counters.as_dict()

    def close(self) -> None:
        """Leave the daemon, aborting a save that is still open. Takes a few seconds at most.

        Committed versions are finished by the daemon; with overlapped capture the last commit is waited for. Raises
        what failed in the background and was not raised yet.
        """
        if self._closed:
            return
        self._leave(ended_well=True)
        self._raise_background(tier2_too=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._leave(ended_well=False)

    def _leave(self, *, ended_well: bool) -> None:
        self._closed = True
        _CLIENTS.discard(self)
        self._session.close(ended_well=ended_well)

    def _leave_at_exit(self) -> None:
        # Set when the interpreter has printed a traceback: the only sign here of how the program ended.
        self._leave(ended_well=getattr(sys, "last_value", None) is None)
        self._session.log_failures()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigurationError("this Cairn client is closed", hint="connect again")

    def _check_ready(self) -> None:
        """As :meth:`_check_open`, and what was saved before the call counts as saved."""
        self._check_open()
        self.settle()

    def _raise_background(self, *, tier2_too: bool) -> None:
        failure = self._session.take_failure(tier2_too=tier2_too)
        if failure is not None:
            raise failure

    def _source(self, source: str | None) -> str:
        return self.settings.load_path if source is None else source

    def _find(self, version: str | VersionId) -> VersionId:
        tag, exactly = parse_request(str(version))
        found = exactly or self._saver.last_of(tag)
        if found is not None:
            return found
        known = self._session.restoring.resolve("", tag)["versions"]
        if not known:
            raise VersionError(f"there is no version of {tag!r}", hint="run `cairn list`", context={"tag": tag})
        return parse_version(known[0]["version"])


def _durability(name: str) -> Durability:
    try:
        return Durability(name)
    except ValueError:
        raise ConfigurationError(
            f"there is no durability {name!r}", hint=f"use one of {', '.join(Durability)}"
        ) from None


_CLIENTS: weakref.WeakSet[Client] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for client in list(_CLIENTS):
        client._leave_at_exit()  # noqa: SLF001 - of this module
