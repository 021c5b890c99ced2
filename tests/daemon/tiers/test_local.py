"""Tier 1 by key: what comes back, what is refused, what is durable, what deletion leaves."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn_api.errors import ConfigurationError, OverloadedError, UnavailableError, VersionError
from cairnd.tiers.errors import NotFoundError
from cairnd.tiers.filesystem import FolderEntry, OsFileSystem
from cairnd.tiers.keys import check_key, check_prefix
from cairnd.tiers.local import LocalTier
from tests.daemon.tiers.rigged import RiggedFileSystem, durability_gaps, failing

PAGE = 4096


def save(tier: LocalTier, key: str, data: bytes) -> None:
    writer = tier.begin(key, f"staging/{key.replace('/', '-')}.tmp", len(data))
    writer.write(memoryview(data), 0)
    writer.finish()
    tier.publish(writer, key)
    tier.sync_folders([key])


@pytest.fixture
def fs(tmp_path: Path) -> RiggedFileSystem:
    return RiggedFileSystem(tmp_path)


@pytest.fixture
def tier(fs: RiggedFileSystem, tmp_path: Path) -> LocalTier:
    return LocalTier(fs, tmp_path)


def test_a_large_file_appears_whole_under_its_key_and_every_step_is_durable(
    tier: LocalTier, fs: RiggedFileSystem
) -> None:
    data = os.urandom(3 * PAGE + 17)
    save(tier, "job/version/dir/model.pt", data)
    assert tier.read_small("job/version/dir/model.pt") == data
    assert tier.identity("job/version/dir/model.pt").size_bytes == len(data)
    assert tier.list_folder("staging") == []
    assert durability_gaps(fs.calls) == []


def test_sync_folders_syncs_each_folder_once(tier: LocalTier, fs: RiggedFileSystem) -> None:
    for key in ("v/a", "v/b", "v/sub/c"):
        save(tier, key, b"x")
    fs.calls.clear()
    tier.sync_folders(["v/a", "v/b", "v/sub/c"])
    assert fs.calls == [("fsync_folder", "v"), ("fsync_folder", "v/sub")]


def test_small_files_replace_each_other(tier: LocalTier, fs: RiggedFileSystem) -> None:
    tier.put_small("job/manifest.json", b"one")
    tier.put_small("job/manifest.json", b"two")
    assert tier.read_small("job/manifest.json") == b"two"
    assert tier.list_folder("job") == [FolderEntry("manifest.json", is_folder=False, is_file=True)]
    assert durability_gaps(fs.calls) == []


def test_small_reads_are_bounded(tier: LocalTier) -> None:
    tier.put_small("big", bytes(101))
    assert tier.read_small("big", max_bytes=101) == bytes(101)
    with pytest.raises(VersionError, match="at most 100"):
        tier.read_small("big", max_bytes=100)


def test_identity_changes_with_the_file(tier: LocalTier) -> None:
    tier.put_small("a", b"one")
    before = tier.identity("a")
    assert tier.identity("a") == before
    tier.put_small("a", b"two")
    assert tier.identity("a") != before


@pytest.mark.parametrize("key", ["missing", "no/such/folder/file"])
def test_what_is_missing_is_not_found(tier: LocalTier, key: str) -> None:
    for look in (tier.read_small, tier.open_read, tier.identity, tier.list_folder):
        with pytest.raises(NotFoundError):
            look(key)
    assert not tier.exists(key)
    tier.delete(key)
    tier.delete_tree(key)


BAD_KEYS = ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a/.", "a\0b"]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_keys_that_could_leave_the_root_are_refused(tier: LocalTier, key: str) -> None:
    for act in (tier.read_small, tier.open_read, tier.identity, tier.exists, tier.delete, tier.delete_tree):
        with pytest.raises(ConfigurationError, match="not allowed"):
            act(key)
    with pytest.raises(ConfigurationError, match="not allowed"):
        tier.put_small(key, b"")
    with pytest.raises(ConfigurationError, match="not allowed"):
        tier.begin(key, "ok", 0)
    with pytest.raises(ConfigurationError, match="not allowed"):
        tier.begin("ok", key, 0)


@given(st.text(alphabet="./ab\0", max_size=12))
def test_an_accepted_key_stays_below_its_root(key: str) -> None:
    try:
        check_key(key)
    except ConfigurationError:
        return
    assert os.path.normpath(f"/root/{key}") == f"/root/{key}"


@pytest.mark.parametrize("prefix", ["a", "/", "a//", "../", "a/./"])
def test_prefixes_name_folders_below_the_root(prefix: str) -> None:
    assert check_prefix("") == ""
    assert check_prefix("a/b/") == "a/b/"
    with pytest.raises(ConfigurationError, match="not allowed"):
        check_prefix(prefix)


def test_links_are_refused_as_files_and_as_folders(tier: LocalTier, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (tmp_path / "file").symlink_to(outside / "secret")
    (tmp_path / "folder").symlink_to(outside)
    for key in ("file", "folder/secret"):
        for look in (tier.read_small, tier.open_read, tier.identity):
            with pytest.raises(ConfigurationError):
                look(key)
    with pytest.raises(ConfigurationError):
        tier.list_folder("folder")
    for act in (tier.delete, tier.delete_tree):
        with pytest.raises(ConfigurationError):
            act("folder/secret")
    with pytest.raises(ConfigurationError):
        tier.put_small("folder/new", b"")
    with pytest.raises(ConfigurationError):
        tier.begin("folder/new", "staging/new", 0)
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]


def test_a_planted_pipe_does_not_hang_a_reader(tier: LocalTier, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigurationError):
        tier.open_read("pipe")


def test_delete_tree_removes_links_but_not_what_they_point_to(
    tier: LocalTier, fs: RiggedFileSystem, tmp_path: Path
) -> None:
    for key in ("v/a", "v/sub/b", "w/keep"):
        save(tier, key, b"x")
    (tmp_path / "v/sub/link").symlink_to(tmp_path / "w")
    fs.calls.clear()
    tier.delete_tree("v")
    assert [call for call, _ in fs.calls] == ["unlink", "unlink", "unlink", "rmdir", "rmdir", "fsync_folder"]
    assert durability_gaps(fs.calls) == []
    assert not tier.exists("v")
    assert tier.read_small("w/keep") == b"x"
    tier.delete_tree("v")


def test_a_folder_can_be_made_again_after_its_tree_was_deleted(tier: LocalTier, fs: RiggedFileSystem) -> None:
    save(tier, "v/sub/a", b"x")
    tier.delete_tree("v")
    fs.calls.clear()
    save(tier, "v/sub/a", b"y")
    assert {"v", "v/sub"} <= set(fs.names("mkdir"))
    assert durability_gaps(fs.calls) == []


def test_a_deletion_that_failed_half_way_is_completed_by_the_next(tmp_path: Path) -> None:
    fs = RiggedFileSystem(tmp_path)
    tier = LocalTier(fs, tmp_path)
    for name in "abc":
        save(tier, f"v/{name}", b"x")
    fs.fault = failing("unlink", errno.EIO, nth=2)
    with pytest.raises(UnavailableError):
        tier.delete_tree("v")
    assert tier.exists("v")
    tier.delete_tree("v")
    assert not tier.exists("v")


def test_an_immutable_file_is_deleted(tmp_path: Path) -> None:
    tier = LocalTier(OsFileSystem(), tmp_path)
    save(tier, "v/a", b"x")
    if not OsFileSystem().set_immutable(tmp_path / "v/a", immutable=True):
        pytest.skip("this file system or this user cannot make a file immutable")
    with pytest.raises(PermissionError):
        (tmp_path / "v/a").unlink()
    tier.delete_tree("v")
    assert not tier.exists("v")


def test_a_full_disk_leaves_no_temporary_and_the_tier_goes_on(tmp_path: Path) -> None:
    fs = RiggedFileSystem(tmp_path, failing("fallocate", errno.ENOSPC))
    tier = LocalTier(fs, tmp_path)
    with pytest.raises(OverloadedError):
        tier.begin("v/a", "staging/a", PAGE)
    assert tier.list_folder("staging") == []
    save(tier, "v/a", b"works again")
    assert tier.read_small("v/a") == b"works again"


def test_a_file_whose_sync_failed_is_rewritten_under_a_new_descriptor(tmp_path: Path) -> None:
    fs = RiggedFileSystem(tmp_path, failing("fsync", errno.EIO))
    tier = LocalTier(fs, tmp_path)
    writer = tier.begin("v/a", "staging/a", 4)
    writer.write(memoryview(b"data"), 0)
    with pytest.raises(UnavailableError, match="dmesg"):
        writer.finish()
    writer.discard()
    assert not tier.exists("v/a")
    save(tier, "v/a", b"data")
    assert tier.read_small("v/a") == b"data"
    assert not fs.open_fds


def test_free_bytes_is_what_the_file_system_says(tier: LocalTier, tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    assert abs(tier.free_bytes() - found.f_bavail * found.f_frsize) < 1 << 30


def test_the_bare_calls_work(tmp_path: Path) -> None:
    """Calls that only other parts of the daemon use."""
    fs = OsFileSystem()
    fs.symlink("target", tmp_path / "link")
    assert fs.readlink(tmp_path / "link") == "target"
    (tmp_path / "target").write_bytes(b"x")
    assert fs.stat(tmp_path / "link").st_size == 1
    fs.chmod(tmp_path / "target", 0o640)
    fs.chown(tmp_path / "link", -1, os.getgid())
    with (tmp_path / "target").open("rb") as file:
        fs.chown(file.fileno(), os.getuid(), -1)
    assert fs.lstat(tmp_path / "target").st_mode & 0o777 == 0o640
