"""One daemon on folders of its own that is disturbed once, its clients, and what it promised them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import cairn
from cairn.client import Client
from cairn_api.names import VersionId
from cairnd.cli.daemon_client import Daemon
from cairnd.replication.bucket import BucketRepository, Verdict
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.tiers.stores.file import FileStore
from tests.crash import faulty_daemon, ranks, serial_daemon
from tests.crash.trainer import JOB, PARTITIONS, same, state_of
from tests.daemon_process import DaemonProcess

TIER1, BUCKET = "tier1", "bucket"
_WAIT_S = 30.0


class DisturbedDaemon(DaemonProcess):
    """A daemon whose first start may be under strace (*tracer*) and, if it is *disturbed*, may fail. Later ones not."""

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, object],
        tracer: Sequence[str] = (),
        fault: str = "",
        *,
        tier1_path: Path | None = None,
        disturbed: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._tracer = tuple(tracer)
        self._disturbed = disturbed or bool(tracer)
        self.came_up = False
        super().__init__(
            folder,
            environment={
                **faulty_daemon.environment(),
                "PYTHONHASHSEED": "0",
                "PYTHONDONTWRITEBYTECODE": "1",
                **(environment or {}),
            },
            program=serial_daemon.program(fault),
            tier1_path=tier1_path,
            **settings,  # type: ignore[arg-type]
        )

    def start(self) -> None:
        plain, tracer, disturbed = self._command, self._tracer, self._disturbed
        if tracer and not any(self.tier1_path.iterdir()):
            self.tier1_path.rmdir()  # to be made by the daemon itself
        self._command, self._tracer, self._disturbed = [*tracer, *plain], (), False
        try:
            super().start()
            self.came_up = True
        except AssertionError:
            self.came_up = False
            if not disturbed:
                raise
        finally:
            self._command = plain


@dataclass(slots=True)
class Promises:
    """What was told to clients."""

    tried: set[VersionId] = field(default_factory=set)
    tier1: set[VersionId] = field(default_factory=set)
    tier2: set[VersionId] = field(default_factory=set)
    dead: set[VersionId] = field(default_factory=set)
    """Versions of which the bucket had a tombstone."""

    def copy(self) -> Promises:
        """One that may be added to."""
        return Promises(set(self.tried), set(self.tier1), set(self.tier2), set(self.dead))


@dataclass(slots=True)
class Ground:
    """One daemon on folders of its own, and what it promised."""

    folder: Path
    promises: Promises
    tier1_disk: Path | None = None
    bucket_disk: Path | None = None
    daemon: DisturbedDaemon = field(init=False)
    wrong: list[str] = field(default_factory=list)
    shown: str = ""
    """What an operator was shown of a failure of which no caller was told."""

    @property
    def tier1_path(self) -> Path:
        return (self.tier1_disk or self.folder) / TIER1

    @property
    def bucket_path(self) -> Path:
        return (self.bucket_disk or self.folder) / BUCKET

    def start(
        self,
        settings: Mapping[str, object],
        tracer: Sequence[str] = (),
        fault: str = "",
        *,
        disturbed: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start a daemon with *settings* on this ground; see :class:`DisturbedDaemon`."""
        settings = {"persistent_storage_path": f"file://{self.bucket_path}", **settings}
        self.daemon = DisturbedDaemon(
            self.folder, settings, tracer, fault, tier1_path=self.tier1_path, disturbed=disturbed,
            environment=environment,
        )  # fmt: skip

    @property
    def bucket(self) -> BucketRepository:
        """The bucket, read by whoever judges."""
        return BucketRepository(FileStore(OsFileSystem(), self.bucket_path), "0" * 32)

    @property
    def tier1(self) -> LocalTier:
        """Tier 1, read by whoever judges."""
        return LocalTier(OsFileSystem(), self.tier1_path)

    @contextmanager
    def client(self) -> Iterator[Client]:
        """A training's client, which gives up at once when its daemon dies."""
        client = cairn.connect(
            job=JOB, runtime_dir=str(self.daemon.runtime_dir), rank=0, world_size=1, connect_timeout_s=2.0,
            reconnect_timeout_s=0.1, commit_timeout_s=_WAIT_S,
        )  # fmt: skip
        with closing(client):
            yield client

    @contextmanager
    def operator(self) -> Iterator[Daemon]:
        """What the command line uses."""
        with closing(Daemon(self.daemon.runtime_dir)) as daemon:
            yield daemon

    def save(self, client: Client, tag: str) -> VersionId:
        """Save and wait for tier 1; the promise is noted."""
        with client.create(tag) as checkpoint:
            assert checkpoint.version is not None, "saves are never left out here: the client waits for a buffer"
            self.promises.tried.add(checkpoint.version)
            for name in sorted(PARTITIONS):
                checkpoint.save(name, state_of(tag, name))
        client.wait(checkpoint.version, durability="tier1", timeout=_WAIT_S)
        self.promises.tier1.add(checkpoint.version)
        return checkpoint.version

    def save_and_persist(self, client: Client, tag: str) -> VersionId:
        """Save and wait for tier 2; the promises are noted."""
        version = self.save(client, tag)
        client.wait(version, durability="tier2", timeout=_WAIT_S)
        self.promises.tier2.add(version)
        return version

    def load_newest(self, client: Client) -> VersionId | None:
        """Load what a training would resume from; what is not as it was saved is noted as wrong."""
        restored = client.restore()
        if restored is None:
            return None
        version = restored.candidate.version
        with restored:
            for name in sorted(PARTITIONS):
                if not same(restored.load(restored.path_of(name, 0)), state_of(version.tag, name)):
                    self.wrong.append(f"{name} of {version} was loaded with other tensors than were saved")
        return version

    def settle(self, operator: Daemon, done: Callable[[], bool]) -> None:
        """Wait until *done*, or the daemon has ended. Raises :class:`cairn.CairnError` in that case."""
        ranks.wait_until(
            lambda: not self.daemon.running or done(), "the end of it", _WAIT_S, describe=lambda: self.daemon.log
        )
        # A daemon without threads answers only when what it is doing to a disk is finished.
        operator.status()

    def decided(self, verdict: Verdict) -> set[VersionId]:
        """Versions about which the bucket says *verdict*."""
        found = self.bucket.decisions(JOB)
        return {version for version, decision in found.items() if decision.verdict is verdict}
