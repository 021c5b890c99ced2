"""Three planted bugs of one kind: something is done, or believed, before it is safe. For :mod:`faulty_daemon`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

from cairn_api.names import RESERVED_NAME
from cairnd import layout
from cairnd.core import Core
from cairnd.manifest import NodeManifest
from cairnd.model import CopyState, Tier
from cairnd.session import tier1_writer
from cairnd.session.saves import OpenSave, Received
from cairnd.session.tier1_writer import Tier1Writer
from cairnd.tiers.local import LocalTier
from cairnd.upkeep.recovery import Recovered

_LATEST = f"{RESERVED_NAME}/latest"
_SLOW_RENAME_S = 0.1
_SWEEP_AFTER_S = 0.05
"""By then the version is being written, on a slow disk."""


@contextmanager
def deletes_too_early() -> Iterator[None]:
    """A version counts as kept from the moment it is sealed: older ones go while it is still being written."""
    put = Tier1Writer.put

    def put_and_delete(self: Tier1Writer, save: OpenSave) -> None:
        put(self, save)
        for version in list(self._catalog.versions(save.version.job)):
            if version.id < save.version.id and version.has(Tier.TIER1):
                self._tier1.delete(layout.manifest(version.job, version.id))
                self._tier1.delete_tree(layout.version_folder(version.job, version.id))
                self._catalog.set_copy(version, Tier.TIER1, CopyState.EVICTED)

    with mock.patch.object(Tier1Writer, "put", put_and_delete):
        yield


@contextmanager
def trusts_latest() -> Iterator[None]:
    """A pointer file names the newest version before that is there, and recovery makes true what it says."""
    publish, recover = tier1_writer.publish_version, Core.recover

    def point_and_publish(
        tier1: LocalTier, manifest: NodeManifest, items: dict[str, Received], *, protect: bool = False
    ) -> None:
        tier1.put_small(f"{_LATEST}/{manifest.job}.json", manifest.encode())
        time.sleep(_SLOW_RENAME_S)
        publish(tier1, manifest, items, protect=protect)

    async def believe_and_recover(self: Core) -> Recovered:
        for entry in self.tier1.list_folder(_LATEST) if self.tier1.exists(_LATEST) else ():
            if entry.name.startswith("."):
                continue  # of a daemon that was killed while it wrote one
            said = self.tier1.read_small(f"{_LATEST}/{entry.name}")
            latest = NodeManifest.decode(said, entry.name)
            self.tier1.put_small(layout.manifest(latest.job, latest.id), said)
        return await recover(self)

    with (
        mock.patch.object(tier1_writer, "publish_version", point_and_publish),
        mock.patch.object(Core, "recover", believe_and_recover),
    ):
        yield


@contextmanager
def sweeps_live_session() -> Iterator[None]:
    """Recovery leaves unfinished versions for later, when ranks may have offered them again."""
    recover, put = Core.recover, Tier1Writer.put
    unfinished = set[str]()

    async def recover_and_remember(self: Core) -> Recovered:
        recovered = await recover(self)
        unfinished.update(recovered.swept)
        return recovered

    def put_and_sweep(self: Tier1Writer, save: OpenSave) -> None:
        put(self, save)
        key = layout.version_folder(save.version.job, save.version.id)
        if key in unfinished:
            asyncio.get_running_loop().call_later(_SWEEP_AFTER_S, self._tier1.delete_tree, key)

    with (
        mock.patch.object(Core, "recover", recover_and_remember),
        mock.patch.object(Tier1Writer, "put", put_and_sweep),
    ):
        yield


PLANTED: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
    "deletes_too_early": deletes_too_early,
    "trusts_latest": trusts_latest,
    "sweeps_live_session": sweeps_live_session,
}
