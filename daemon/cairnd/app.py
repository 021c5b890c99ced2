"""The composition root: a core, and the ways in to it. The only place that knows all of both. Start and stop order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from cairn_api.errors import ConfigurationError
from cairnd import __version__
from cairnd.core import Core, Surroundings
from cairnd.model import Version
from cairnd.notify import Notifier
from cairnd.rpc.admin_service import AdminService
from cairnd.rpc.brief import BriefCalls
from cairnd.rpc.report import Reporter
from cairnd.rpc.restore_service import RestoreService
from cairnd.rpc.save_service import SaveService
from cairnd.rpc.server import RpcServer
from cairnd.rpc.side_socket import SideSocket
from cairnd.settings import Settings

_GAUGES_S = 30.0


class App(Core):
    """One daemon. ``start``, then ``run`` until cancelled, then ``stop``."""

    def __init__(
        self, settings: Settings, environment: Mapping[str, str], surroundings: Surroundings | None = None
    ) -> None:
        self.runtime_dir = _runtime_dir(settings.runtime_dir)
        super().__init__(settings, surroundings)
        self.boot = secrets.token_hex(16)
        self.notifier = Notifier(environment)
        self._stop_metrics: Callable[[], None] = lambda: None
        self._build_faces()

    def _build_faces(self) -> None:
        settings, clock, events, metrics = self.settings, self.clock, self.events, self.metrics
        self.reporter = Reporter(
            self.node, clock, self.catalog, self.clients, self.memory, self.saves, self.keeper, self.replicator,
            self.storage, self.tier1, self._disk, self.health, metrics, self.left_alone,
        )  # fmt: skip
        save_service = SaveService(
            self.node, settings.tier1_path, settings.lease_s, settings.protect_files, self.clients, self.launches,
            self.saves, self.catalog, self.memory, self.keeper, self.replicator, self.persistence, self._disk,
        )  # fmt: skip
        restore_service = RestoreService(
            self.clients, self.catalog, self.jobs, self.leases, self.health, self.inventory, self.fetcher, self._fs,
            self._workers,
        )  # fmt: skip
        self.side_socket = SideSocket(
            self.runtime_dir, self.node, self.boot, self.clients, self.memory, self.leases, self.fetcher,
            self.memory_copies, BriefCalls(self.clients, self.launches, save_service, restore_service),
            on_gone=self._on_client_gone, tier1_root=self.tier1.root,
        )  # fmt: skip
        self.server = RpcServer(
            self.runtime_dir,
            self.clients,
            save_service,
            restore_service,
            AdminService(
                self.clients, self.catalog, self.jobs, self.inventory, self.keeper, self.persistence, self.drainer,
                self.health, self.verification, self.reporter, events,
            ),
        )  # fmt: skip

    async def start(self) -> None:
        """Recover tier 1, open the sockets, tell systemd."""
        held = len((await self.recover()).versions)
        if self.settings.metrics_address:
            self._stop_metrics = self.metrics.serve(self.settings.metrics_address)
        self.side_socket.start()
        await self.server.start()
        self.events.publish("daemon_started", daemon_version=__version__, node=self.node, versions=held)
        self.notifier.ready(f"{held} versions in tier 1")

    async def run(self) -> None:
        """Serve until cancelled. A defect in any background task ends the daemon: it must not limp on unnoticed."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.side_socket.run())
            group.create_task(self.work())
            group.create_task(self._refresh_gauges())
            if self.notifier.watchdog_interval_s:
                group.create_task(self._feed_watchdog())

    async def drain_and_stop(self) -> list[Version]:
        """SIGTERM: bring what must outlive this node to tier 2 within the deadline; returns what did not make it."""
        self.notifier.stopping("bringing versions to tier 2")
        await self.server.set_serving(False)
        return await self.drain()

    async def stop(self) -> None:
        """Close the sockets and let go of everything; safe after a failed start."""
        await self.give_up()
        await self.side_socket.stop()
        await self.server.stop()
        self._stop_metrics()
        self.let_go()
        self.events.publish("daemon_stopped")

    async def _refresh_gauges(self) -> None:
        while True:
            await self.reporter.refresh()
            await self.clock.sleep(_GAUGES_S)

    async def _feed_watchdog(self) -> None:
        while True:
            self.notifier.alive()
            await self.clock.sleep(self.notifier.watchdog_interval_s)


def _runtime_dir(path: str) -> Path:
    folder = Path(path)
    with contextlib.suppress(FileExistsError):
        try:
            folder.mkdir(mode=0o755, parents=True)
        except OSError as error:
            if not isinstance(error, FileExistsError):
                raise ConfigurationError(
                    f"cannot make the runtime folder {path}: {error}",
                    hint="set runtime_dir to a folder cairnd may make",
                ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"the runtime folder {path} is not writable for user {os.geteuid()}", hint="own it, or set runtime_dir"
        )
    return folder
