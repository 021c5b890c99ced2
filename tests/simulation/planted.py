"""Bugs that the simulation must find, put in where Cairn meets its surroundings; :data:`SOUND` is Cairn as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from unittest import mock

from cairnd import layout
from cairnd.core import Core
from cairnd.manifest import NodeManifest
from cairnd.model import Tier, Version
from cairnd.session import tier1_writer
from cairnd.session.saves import OpenSave, Received
from cairnd.tiers.filesystem import AnyPath
from cairnd.tiers.local import LocalTier
from cairnd.upkeep.keeper import Deletion
from tests.simulation.disk import MountedDisk


@dataclass(frozen=True, slots=True)
class Plant:
    """``disk``: how daemons see their disks; ``into``: what is changed in each daemon; ``patched``: in all of Cairn.

    ``rot``: how often bits rot, beside the weights of all other events.
    """

    disk: type[MountedDisk] = MountedDisk
    into: Callable[[Core], None] = lambda _core: None
    patched: Callable[[], AbstractContextManager[object]] = nullcontext
    rot: int = 3


SOUND = Plant()


class _NoFileSync(MountedDisk):
    def fsync(self, fd: int) -> None:
        if not _of_versions(self.path_of(fd)):
            super().fsync(fd)


class _NoFolderSync(MountedDisk):
    def fsync_folder(self, path: AnyPath) -> None:
        if not _of_versions(path):
            super().fsync_folder(path)


class _SwallowsSyncErrors(MountedDisk):
    def fsync(self, fd: int) -> None:
        path = self.path_of(fd)
        try:
            super().fsync(fd)
        except OSError:
            if not _of_versions(path):
                raise


def _of_versions(path: AnyPath) -> bool:
    return f"/{layout.VERSIONS}/" in f"{path}/" and layout.JOB_RECORDS not in str(path)


def _manifest_first(
    tier1: LocalTier,
    manifest: NodeManifest,
    items: dict[str, Received],
    *,
    protect: bool = False,  # noqa: ARG001 - no setting of the simulation asks for it
) -> None:
    """:func:`cairnd.session.tier1_writer.publish_version` in the wrong order."""
    tier1.put_small(layout.manifest(manifest.job, manifest.id), manifest.encode())
    keys = []
    for path, item in items.items():
        assert item.writer is not None, "it was written"
        key = layout.partition(manifest.job, manifest.id, path)
        tier1.publish(item.writer, key)
        keys.append(key)
    tier1.sync_folders(keys)
    tier1.delete_tree(layout.incoming_folder(manifest.job, manifest.id))


def _delete_too_early(core: Core) -> None:
    """What a version will replace goes as soon as that one is sealed."""
    put = core.saves._on_sealed

    async def delete(version: Version) -> None:
        older = [item for item in core.catalog.versions(version.job) if item.id < version.id and item.has(Tier.TIER1)]
        keep = core.settings.num_of_version_in_retention
        await core.keeper.delete([Deletion(item, Tier.TIER1, "too early") for item in older[keep - 1 :]])

    def sealed(save: OpenSave) -> None:
        put(save)
        core._spawn(delete(save.version))

    core.saves._on_sealed = sealed


def _skip_digests(core: Core) -> None:
    core.verified.check = lambda *_arguments, **_options: None  # type: ignore[method-assign]


PLANTS: Mapping[str, Plant] = {
    "no file sync": Plant(disk=_NoFileSync),
    "no folder sync": Plant(disk=_NoFolderSync),
    "swallowed sync error": Plant(disk=_SwallowsSyncErrors),
    "manifest first": Plant(patched=lambda: mock.patch.object(tier1_writer, "publish_version", _manifest_first)),
    "deletes too early": Plant(into=_delete_too_early),
    "no digest at restore": Plant(into=_skip_digests, rot=30),
}
