"""``cairnd`` with a planted bug: ``python -m tests.crash.faulty_daemon <fault> <cairnd's flags>``.

A harness proves something only if it catches the bug that it is there for. All faults touch versions only, not the
daemon's own records, so that what a test sees is a lost or torn version and not a daemon that does not start.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

from cairnd import __main__ as cairnd_main
from cairnd import layout
from cairnd.app import App
from cairnd.catalog.verified import VerifiedFiles
from cairnd.core import Surroundings
from cairnd.digests import BLOCK_BYTES
from cairnd.manifest import NodeManifest
from cairnd.model import Partition
from cairnd.restore import downloads
from cairnd.restore.memory_copies import MemoryCopies
from cairnd.session import tier1_writer
from cairnd.session.saves import Received
from cairnd.tiers.filesystem import AnyPath, OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.upkeep.verifier import ReadBlock
from tests.crash import impatient

SURROUNDINGS = Surroundings()
"""What else is replaced, beside the file system."""

HOLD = "CAIRN_TEST_HOLD"
"""The variable that names the file with which a test holds the syncs of :class:`HeldDisk`."""


class NoFileSync(OsFileSystem):
    """Files are never synced."""

    def fsync(self, fd: int) -> None:
        if not _of_versions(_path_of(fd)):
            super().fsync(fd)


class NoFolderSync(OsFileSystem):
    """Folders are never synced."""

    def fsync_folder(self, path: AnyPath) -> None:
        if not _of_versions(path):
            super().fsync_folder(path)


class SwallowedSyncError(OsFileSystem):
    """A sync that fails is taken for one that did not."""

    def fsync(self, fd: int) -> None:
        with suppress(OSError) if _of_versions(_path_of(fd)) else nullcontext():
            super().fsync(fd)

    def fsync_folder(self, path: AnyPath) -> None:
        with suppress(OSError) if _of_versions(path) else nullcontext():
            super().fsync_folder(path)


class SlowDisk(OsFileSystem):
    """No bug: each sync of a partition takes a while, so that versions stay sealed and not yet durable."""

    def fsync(self, fd: int) -> None:
        if "/incoming/" in str(_path_of(fd)):
            time.sleep(0.1)
        super().fsync(fd)


class HeldDisk(OsFileSystem):
    """No bug: once :data:`HOLD` exists, syncs of partitions wait until it is gone."""

    def fsync(self, fd: int) -> None:
        if "/incoming/" in str(_path_of(fd)):
            while Path(os.environ[HOLD]).exists():
                time.sleep(0.01)
        super().fsync(fd)


class BufferedDisk(OsFileSystem):
    """No bug: a file system that goes through the page cache only, and says so."""

    def open(self, path: AnyPath, flags: int, mode: int = 0o600) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().open(path, flags, mode)


class DiesWhileSweeping(OsFileSystem):
    """No bug: the sync after the manifest's rename fails once, and the daemon dies after the next removal."""

    def __init__(self) -> None:
        self._failed = False

    def fsync_folder(self, path: AnyPath) -> None:
        if not self._failed and (Path(path) / "manifest.json").exists():
            self._failed = True
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fsync_folder(path)

    def unlink(self, path: AnyPath) -> None:
        super().unlink(path)
        if self._failed:
            os.kill(os.getpid(), signal.SIGKILL)


def publish_manifest_first(
    tier1: LocalTier, manifest: NodeManifest, items: Mapping[str, Received], *, protect: bool = False
) -> None:
    """:func:`cairnd.session.tier1_writer.publish_version` in the wrong order, on a slow disk."""
    assert not protect, "the tests with this fault do not ask for it"
    tier1.put_small(layout.manifest(manifest.job, manifest.id), manifest.encode())
    time.sleep(0.1)
    keys = []
    for path, item in items.items():
        assert item.writer is not None, "it was written"
        key = layout.partition(manifest.job, manifest.id, path)
        tier1.publish(item.writer, key)
        keys.append(key)
    tier1.sync_folders(keys)
    tier1.delete_tree(layout.incoming_folder(manifest.job, manifest.id))


async def _believe(*arguments: object) -> bool:
    """Instead of :meth:`MemoryCopies.intact`."""
    del arguments
    return True


def _only_read(partition: Partition, number: int, read: ReadBlock, buffer: memoryview) -> str:
    """Instead of :func:`cairnd.upkeep.verifier.compare_block`."""
    offset = number * BLOCK_BYTES
    read(offset, buffer[: min(BLOCK_BYTES, partition.size_bytes - offset)])
    return ""


@contextmanager
def no_digest_at_restore() -> Iterator[None]:
    """Restores from memory, tier 1 and tier 2 take what they find; sizes are still looked at."""
    with (
        mock.patch.object(MemoryCopies, "intact", _believe),
        mock.patch.object(VerifiedFiles, "check", return_value=None),
        mock.patch.object(downloads, "compare_block", _only_read),
    ):
        yield


FILE_SYSTEMS: Mapping[str, type[OsFileSystem]] = {
    "no_file_sync": NoFileSync,
    "no_folder_sync": NoFolderSync,
    "swallowed_sync_error": SwallowedSyncError,
    "slow_disk": SlowDisk,
    "held_disk": HeldDisk,
    "buffered_disk": BufferedDisk,
    "dies_while_sweeping": DiesWhileSweeping,
    "manifest_first": OsFileSystem,
    "no_digest_at_restore": OsFileSystem,
    "deletes_too_early": SlowDisk,
    "trusts_latest": OsFileSystem,
    "sweeps_live_session": SlowDisk,
}


def program(fault: str) -> tuple[str, ...]:
    """What :class:`tests.daemon_process.DaemonProcess` runs for *fault*; the empty one is the real daemon."""
    return ("-m", "tests.crash.faulty_daemon", fault) if fault else ("-m", "cairnd")


def environment() -> dict[str, str]:
    """Variables with which the program finds this module."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def _path_of(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}").readlink()


def _of_versions(path: AnyPath) -> bool:
    text = f"{os.fspath(path)}/"
    return f"/{layout.VERSIONS}/" in text and f"/{layout.JOB_RECORDS}/" not in text


def main() -> int:
    """Run the daemon; returns its exit status."""
    fault, *arguments = sys.argv[1:]
    fs = FILE_SYSTEMS[fault]()
    with ExitStack() as patched:
        patched.enter_context(
            mock.patch.object(cairnd_main, "App", partial(App, surroundings=replace(SURROUNDINGS, fs=fs)))
        )
        if fault == "manifest_first":
            patched.enter_context(mock.patch.object(tier1_writer, "publish_version", publish_manifest_first))
        if fault == "no_digest_at_restore":
            patched.enter_context(no_digest_at_restore())
        if fault in impatient.PLANTED:
            patched.enter_context(impatient.PLANTED[fault]())
        return cairnd_main.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
