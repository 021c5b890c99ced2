"""Loading: what exists, which version all ranks take, bringing it near, reading it.

Choosing and restoring are collective. A version that turns out to be damaged while it is fetched is set aside by all
ranks together, and they choose again.
"""

from __future__ import annotations

import errno
import io
import logging
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from ctypes import Array, c_char
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self, cast

from cairn.agreement import error_to_json, first_error
from cairn.capture import native
from cairn.choice import Candidate, Choice, Inventory, Key, Reads, choose, every_partition, parse_request
from cairn.session import Session
from cairn.transport.messages import Fetched, Progress
from cairn.transport.pool import Pool
from cairn.transport.restore_calls import Opened, RestoreCalls
from cairn_api.errors import CairnError, ConfigurationError, VersionError

if TYPE_CHECKING:
    from cairn.image import Image

log = logging.getLogger("cairn")

_GATHERED_VERSIONS = 64
"""Newest versions per node that ranks tell each other of: more would make the exchange grow with the history."""


class Restored:
    """One version, fetched and protected until :meth:`close`; a context manager.

    ``path`` is where a partition lies below its version: its name, or ``by-rank/<rank>/<name>`` for one whose name
    a lower rank used too. :meth:`path_of` finds it.
    """

    def __init__(
        self,
        calls: RestoreCalls,
        candidate: Candidate,
        fetched: Fetched,
        *,
        streamed: bool,
        pool: Pool,
        local_ranks: int,
        alone: frozenset[str],
    ) -> None:
        self.candidate = candidate
        self._alone = alone
        self._local_ranks = local_ranks
        self._pool = pool
        self._calls = calls
        self._fetched = fetched
        self._streamed = streamed

    @property
    def paths(self) -> list[str]:
        """What was fetched."""
        return sorted(self._fetched.ready)

    @property
    def from_tier(self) -> str:
        """Where the bytes came from: memory, tier1 or tier2."""
        return self._fetched.from_tier

    @property
    def digested_bytes(self) -> int:
        """How many bytes the daemon hashed for this fetch: each copy once after its start, or at every load."""
        return self._fetched.digested_bytes

    @property
    def digest_s(self) -> float:
        """Seconds of the fetch that went into that, reading included."""
        return self._fetched.digest_s

    def path_of(self, name: str, rank: int) -> str:
        """Where *rank* finds *name*. Raises :class:`VersionError` when the version does not have it."""
        path = self.candidate.path_of(name, rank)
        if path is None:
            raise VersionError(
                f"version {self.candidate.version} has no partition {name!r}",
                hint=f"it has: {', '.join(sorted(self.candidate.parts))}",
            )
        return path

    def load(self, path: str, *, map_location: Any = None, weights_only: bool = True, into: Any = None) -> Any:
        """``torch.load`` of a fetched partition.

        The tensors are mapped, not read: they stay valid after :meth:`close`, and writing to them changes only this
        process's copy. From memory they are copied when the buffer will be used for a next save, or when the daemon
        cannot spare it as long as the tensors live.

        With *into*, a state of the same structure, the values go into its tensors instead, and what is returned holds
        these: several times faster than new memory, and *map_location* does not matter. Raises
        :class:`ConfigurationError` when the structure, a shape or a dtype differs; nothing was changed then.
        """
        if path not in self._fetched.ready:
            raise ConfigurationError(f"partition {path!r} was not fetched", hint=f"fetched were: {self.paths}")
        from cairn.image import Image  # noqa: PLC0415 - needs torch
        from cairn.live import copy_into, load_into  # noqa: PLC0415 - needs torch

        if self._streamed:
            location = map_location if into is None else "cpu"
            loaded = Image(self._received(path)).load(map_location=location, weights_only=weights_only)
            return loaded if into is None else copy_into(loaded, into)
        opened = self._calls.open(self._fetched.lease, path, hold=into is None)
        try:
            if into is not None:
                # The lease keeps the bytes as they are meanwhile, and nothing of this mapping remains.
                with self._mapping_of(opened) as memory:
                    return load_into(
                        opened.fd,
                        opened.size_bytes,
                        into,
                        weights_only=weights_only,
                        alone=path in self._alone,
                        memory=memory,
                        threads=native.idle_threads(self._local_ranks),
                    )
            image = self._image_of(opened)
            return image.load_of(opened.fd, map_location=map_location, weights_only=weights_only)
        finally:
            os.close(opened.fd)

    def open(self, path: str) -> BinaryIO:
        """The bytes of a fetched partition as a seekable file; valid after :meth:`close` unless they are streamed."""
        if self._streamed:
            return cast("BinaryIO", self._received(path))
        opened = self._calls.open(self._fetched.lease, path)
        if opened.mappable:
            return cast("BinaryIO", io.BufferedReader(_Part(opened)))
        # A buffer of the memory tier, which is filled anew once the version is not protected any more.
        from cairn.image import Image  # noqa: PLC0415 - needs torch

        try:
            return cast("BinaryIO", Image.copied(opened.fd, opened.size_bytes).memory)
        finally:
            os.close(opened.fd)

    def _mapping_of(self, opened: Opened) -> AbstractContextManager[Array[c_char] | None]:
        """The capture buffer itself, if this is the process that saved: it need not ask the kernel for its bytes."""
        if opened.tier == "memory" and native.available():
            return self._pool.mapping_of(opened.fd)
        return nullcontext()

    def _image_of(self, opened: Opened) -> Image:
        from cairn.image import Image  # noqa: PLC0415 - needs torch

        if not opened.mappable:
            return Image.copied(opened.fd, opened.size_bytes)
        try:
            image = Image.mapped(opened.fd, opened.size_bytes)
        except BaseException:
            if opened.hold is not None:
                with mmap.mmap(-1, mmap.PAGESIZE) as nothing:  # when this goes, the hold ends
                    self._calls.end_hold_with(nothing, opened.hold)
            raise
        if opened.hold is not None:
            self._calls.end_hold_with(image.memory, opened.hold)
        return image

    def _received(self, path: str) -> mmap.mmap:
        return self._calls.read(self._fetched.lease, path, self._fetched.ready[path].size_bytes)

    def close(self) -> None:
        """End the protection of the version against deletion, soon: this does not wait for the daemon."""
        self._calls.end_fetch(self._fetched.lease)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Part(io.RawIOBase):
    """The first *size_bytes* of a descriptor as a file: a capture buffer is longer than the partition in it."""

    def __init__(self, opened: Opened) -> None:
        self._fd = opened.fd
        self._size_bytes = opened.size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "a negative position")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        with memoryview(buffer) as view, view.cast("B") as flat:
            wanted = max(0, min(len(flat), self._size_bytes - self._position))
            done = os.preadv(self._fd, [flat[:wanted]], self._position) if wanted else 0
        self._position += done
        return done

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


class Loader:
    """Choosing and restoring for one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._chosen = ""
        """What was chosen automatically last: who loads that by its name resumes from it all the same."""

    def choose(
        self,
        version: str | None,
        *,
        save_dir: str | None,
        source: str,
        reads: Reads,
        bad: frozenset[Key] = frozenset(),
    ) -> Choice | None:
        """See :meth:`cairn.Client.choose`."""
        session = self._session
        tag, exactly = (None, None) if version is None else parse_request(version)
        inventory: dict[str, Any] | None = None
        error: CairnError | None = None
        # Ranks of one node have one daemon: the first of them speaks for all.
        speaker = session.rank_nodes.index(session.rank_nodes[session.ranks.rank])
        if speaker == session.ranks.rank:
            try:
                inventory = _newest(session.restoring.resolve(source, tag or ""), save_dir)
                if tag is not None and not inventory["versions"]:
                    # Nothing of that tag: the whole list, for an error that names what is near.
                    inventory = _newest(session.restoring.resolve(source), save_dir)
            except CairnError as raised:
                error = raised
        said = {"error": error_to_json(error), "inventory": inventory, "version": version or ""}
        gathered = session.ranks.all_gather("choosing a version", said, session.settings.collective_timeout_s)
        if (problem := first_error(gathered)) is not None:
            raise problem from error
        if any(item["version"] != (version or "") for item in gathered):
            raise ConfigurationError("the ranks ask for different versions", hint="pass the same tag on every rank")
        inventories: list[Inventory] = [
            gathered[session.rank_nodes.index(node)]["inventory"] for node in session.rank_nodes
        ]
        chosen = choose(inventories, tag=tag, exactly=exactly, save_dir=save_dir, reads=reads, bad=bad)
        if version is None and not source and chosen is not None:
            self._chosen = str(chosen.version)
        if chosen is not None and chosen.passed_over and session.ranks.rank == 0:
            log.warning("loading %s; newer ones were passed over: %s", chosen.version, "; ".join(chosen.passed_over))
        return chosen

    def fetch(
        self, candidate: Candidate, paths: Iterable[str], *, source: str, progress: Callable[[Progress], None]
    ) -> Restored:
        """See :meth:`cairn.Client.fetch`."""
        session = self._session
        fetched = session.restoring.fetch(candidate.version, sorted(set(paths)), source, progress)
        if fetched.digested_bytes:
            log.info(
                "%s: digest pass over %d bytes, %.2f s", candidate.version, fetched.digested_bytes, fetched.digest_s
            )
        return Restored(
            session.restoring,
            candidate,
            fetched,
            streamed=session.settings.transport == "stream",
            pool=session.pool,
            local_ranks=session.local_ranks,
            alone=frozenset(self._alone(candidate)),
        )

    def _alone(self, candidate: Candidate) -> Iterable[str]:
        """The partitions that no other process of this node is expected to read, which would want them cached."""
        if self._session.local_ranks == 1:
            return candidate.parts
        parts = candidate.parts.values()
        if len({part.rank for part in parts}) < candidate.world_size:
            return []  # some ranks read what others saved
        return [part.path for part in parts if part.rank == self._session.ranks.rank]

    def restore(
        self,
        version: str | None,
        *,
        save_dir: str | None,
        source: str,
        reads: Reads,
        progress: Callable[[Progress], None],
    ) -> Restored | None:
        """See :meth:`cairn.Client.restore`."""
        session = self._session
        bad: frozenset[Key] = frozenset()
        while True:
            chosen = self.choose(version, save_dir=save_dir, source=source, reads=reads, bad=bad)
            if chosen is None:
                return None
            candidate = chosen.candidate
            restored: Restored | None = None
            error: CairnError | None = None
            try:
                paths = reads(candidate, session.ranks.rank)
                restored = self.fetch(candidate, paths, source=source, progress=progress)
            except CairnError as raised:
                error = raised
            gathered = session.ranks.all_gather(
                f"fetching {candidate.version}", {"error": error_to_json(error)}, session.settings.collective_timeout_s
            )
            problem = first_error(gathered)
            if restored is not None:
                if problem is None:
                    session.counters.loads += 1
                    if not source:
                        session.resumed_from = candidate.version
                    if version in (None, self._chosen) and not source:
                        session.note_resume(candidate)
                    return restored
                restored.close()
            if problem is not None and any(
                item["error"] and item["error"]["class"] != VersionError.__name__ for item in gathered
            ):
                raise problem from error
            log.warning("version %s cannot be loaded, choosing another: %s", candidate.version, problem)
            bad |= {candidate.key}

    def versions(self, source: str) -> Iterator[dict[str, Any]]:
        """What this node's daemon could restore, newest first."""
        yield from self._session.restoring.resolve(source)["versions"]


def named(name: str) -> Reads:
    """Every rank reads its own partition *name*, or the one that a lower rank saved under that name."""

    def reads(candidate: Candidate, rank: int) -> Iterable[str]:
        return [candidate.path_of(name, rank) or name]

    return reads


def _newest(inventory: dict[str, Any], save_dir: str | None) -> dict[str, Any]:
    versions = [item for item in inventory["versions"] if save_dir is None or item["save_dir"] == save_dir]
    return {**inventory, "versions": versions[:_GATHERED_VERSIONS]}


__all__ = ["Loader", "Restored", "every_partition", "named"]
