"""A bucket's folder that turns out to be another one: unmounted, or mounted over, behind the daemon's back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cairn_api.errors import UnavailableError
from cairnd.tiers.filesystem import AnyPath, OsFileSystem
from cairnd.tiers.stores.file import FileStore
from tests.crash.disks import Tmpfs, need_mounts


class Mounted(OsFileSystem):
    """A file system whose root has the inode that every root of its kind has."""

    def __init__(self) -> None:
        self.device = self.stated = 1

    def stat(self, path: AnyPath) -> os.stat_result:
        found = list(super().stat(path))
        found[1], found[2] = 2, self.device
        return os.stat_result(found)

    def statvfs(self, path: AnyPath) -> os.statvfs_result:
        return os.statvfs_result((*tuple(super().statvfs(path))[:10], self.stated))


def test_another_file_system_with_the_same_inode_is_not_the_bucket(tmp_path: Path) -> None:
    fs = Mounted()
    store = FileStore(fs, tmp_path / "bucket")
    store.put("a", b"1")
    fs.stated = 2
    with pytest.raises(UnavailableError, match="another one"):
        store.put("b", b"2")
    with pytest.raises(UnavailableError, match="another one"):
        store.get("c", 1)
    fs.stated = 1
    store.put("b", b"2")


def test_a_network_file_system_that_is_mounted_again_is_the_same(tmp_path: Path) -> None:
    """It may have another device number then, and states no id."""
    fs = Mounted()
    fs.stated = 0
    store = FileStore(fs, tmp_path / "bucket")
    store.put("a", b"1")
    fs.device = 2
    store.put("b", b"2")


def test_what_was_used_before_it_was_mounted_is_told_with_what_to_do(tmp_path: Path) -> None:
    need_mounts()
    mount = Tmpfs(tmp_path, 1 << 20, 100)
    root = mount.path
    root.mkdir(exist_ok=True)
    store = FileStore(OsFileSystem(), root)
    store.put("a", b"1")
    mount.mount()
    try:
        with pytest.raises(UnavailableError, match="another one") as caught:
            store.put("b", b"2")
        for step in ("restart cairnd", "under the mount"):
            assert step in caught.value.hint
        fresh = FileStore(OsFileSystem(), root)
        fresh.put("b", b"2")
    finally:
        mount.unmount()
    store.put("c", b"3")
