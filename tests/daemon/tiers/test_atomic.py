"""The publish discipline: order of calls, short writes, full disks, failing syncs, and planted faults."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cairn_api.errors import ConfigurationError, InternalError, OverloadedError, UnavailableError
from cairnd.tiers import atomic
from cairnd.tiers.errors import NotFoundError
from cairnd.tiers.filesystem import AnyPath, OsFileSystem
from tests.daemon.tiers.rigged import RiggedFileSystem, durability_gaps, failing

PAGE = atomic.ALIGNMENT_BYTES


def mapped(size_bytes: int) -> memoryview:
    """Page-aligned memory with a pattern that repeats in no power of two, from a memfd as in the daemon."""
    fd = os.memfd_create("test")
    try:
        os.ftruncate(fd, max(size_bytes, 1))
        view = memoryview(mmap.mmap(fd, max(size_bytes, 1)))[:size_bytes]
    finally:
        os.close(fd)
    view[:] = (bytes(range(251)) * (size_bytes // 251 + 1))[:size_bytes]
    return view


def write_bulk(fs: OsFileSystem, folder: Path, data: memoryview, block_bytes: int = 16 * PAGE) -> Path:
    writer = atomic.BulkWriter(fs, folder / "data.tmp", len(data))
    for offset in range(0, len(data), block_bytes):
        writer.write(data[offset : offset + block_bytes], offset)
    writer.finish()
    writer.publish(folder / "data")
    atomic.sync_folder(fs, folder)
    return folder / "data"


class BufferedFileSystem(RiggedFileSystem):
    """A file system without O_DIRECT. As in the kernel, the flag is refused after the file was made."""

    def open(self, path: AnyPath, flags: int, mode: int = 0o600) -> int:
        if flags & os.O_DIRECT:
            os.close(os.open(path, flags & ~os.O_DIRECT, mode))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().open(path, flags, mode)


SIZES = [0, 1, 511, PAGE - 1, PAGE, PAGE + 1, 16 * PAGE, 16 * PAGE + 1, 40 * PAGE + 777]


@pytest.mark.parametrize("size_bytes", SIZES)
@pytest.mark.parametrize("kind", [RiggedFileSystem, BufferedFileSystem])
def test_a_bulk_file_of_any_size_reads_back(kind: type[RiggedFileSystem], size_bytes: int, tmp_path: Path) -> None:
    fs = kind(tmp_path)
    data = mapped(size_bytes)
    path = write_bulk(fs, tmp_path, data)
    assert path.read_bytes() == bytes(data)
    assert path.stat().st_mode & 0o777 == 0o440
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]
    assert not fs.open_fds
    assert durability_gaps(fs.calls) == []


@pytest.mark.parametrize("longest_write_bytes", [PAGE, PAGE + 513, 3 * PAGE + 1])
@pytest.mark.parametrize("kind", [RiggedFileSystem, BufferedFileSystem])
def test_short_writes_are_continued(kind: type[RiggedFileSystem], longest_write_bytes: int, tmp_path: Path) -> None:
    fs = kind(tmp_path)
    fs.longest_write_bytes = longest_write_bytes
    data = mapped(9 * PAGE + 100)
    assert write_bulk(fs, tmp_path, data).read_bytes() == bytes(data)


def test_writes_that_make_no_progress_end_in_an_error(tmp_path: Path) -> None:
    fs = RiggedFileSystem(tmp_path)
    fs.longest_write_bytes = 100  # never a whole unit of O_DIRECT
    writer = atomic.BulkWriter(fs, tmp_path / "data.tmp", 4 * PAGE)
    if not writer.direct:
        pytest.skip("this file system has no O_DIRECT")
    with pytest.raises(UnavailableError, match=r"cannot write .*data\.tmp"):
        writer.write(mapped(4 * PAGE), 0)
    writer.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shift", [1, 64, 512])
def test_unaligned_memory_is_written_too(shift: int, tmp_path: Path) -> None:
    data = mapped(300 * PAGE + 55 + shift)[shift:]
    path = write_bulk(RiggedFileSystem(tmp_path), tmp_path, data, block_bytes=290 * PAGE)
    assert path.read_bytes() == bytes(data)


def test_blocks_may_come_in_any_order(tmp_path: Path) -> None:
    data = mapped(5 * PAGE + 9)
    writer = atomic.BulkWriter(RiggedFileSystem(tmp_path), tmp_path / "data.tmp", len(data))
    writer.write(data[4 * PAGE :], 4 * PAGE)
    writer.write(data[: 4 * PAGE], 0)
    writer.finish()
    writer.publish(tmp_path / "data")
    assert (tmp_path / "data").read_bytes() == bytes(data)


@pytest.mark.parametrize(("offset", "size"), [(1, PAGE), (0, PAGE - 1), (PAGE, 2 * PAGE), (2 * PAGE, 1)])
def test_misplaced_blocks_are_refused_with_or_without_direct_writes(offset: int, size: int, tmp_path: Path) -> None:
    for number, kind in enumerate((RiggedFileSystem, BufferedFileSystem)):
        writer = atomic.BulkWriter(kind(tmp_path), tmp_path / f"{number}.tmp", 2 * PAGE)
        with pytest.raises(InternalError, match="misplaced"):
            writer.write(mapped(size), offset)
        writer.discard()


def test_an_incomplete_file_is_neither_finished_nor_published(tmp_path: Path) -> None:
    writer = atomic.BulkWriter(RiggedFileSystem(tmp_path), tmp_path / "data.tmp", 2 * PAGE)
    writer.write(mapped(PAGE), 0)
    with pytest.raises(InternalError, match="after 4096 of 8192"):
        writer.finish()
    with pytest.raises(InternalError, match="before it was finished"):
        writer.publish(tmp_path / "data")
    writer.discard()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_before_any_data_is_written(tmp_path: Path) -> None:
    fs = RiggedFileSystem(tmp_path, failing("fallocate", errno.ENOSPC))
    with pytest.raises(OverloadedError, match="No space left") as caught:
        atomic.BulkWriter(fs, tmp_path / "data.tmp", 10 * PAGE)
    assert "num_of_version_in_retention" in caught.value.hint
    assert caught.value.context["path"].endswith("data.tmp")
    assert fs.names("pwrite") == []
    assert list(tmp_path.iterdir()) == []
    assert not fs.open_fds


def test_a_file_system_without_reservation_still_takes_the_file(tmp_path: Path) -> None:
    fs = RiggedFileSystem(tmp_path, failing("fallocate", errno.EOPNOTSUPP))
    data = mapped(3 * PAGE + 3)
    assert write_bulk(fs, tmp_path, data).read_bytes() == bytes(data)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_sync_condemns_the_file_and_is_never_tried_again(code: int, tmp_path: Path) -> None:
    fs = RiggedFileSystem(tmp_path, failing("fsync", code))
    writer = atomic.BulkWriter(fs, tmp_path / "data.tmp", PAGE)
    writer.write(mapped(PAGE), 0)
    with pytest.raises(UnavailableError if code == errno.EIO else OverloadedError, match=r"cannot sync .*data\.tmp"):
        writer.finish()
    with pytest.raises(InternalError):
        writer.publish(tmp_path / "data")
    writer.discard()
    assert fs.names("fsync") == ["data.tmp"]
    assert list(tmp_path.iterdir()) == []
    assert not fs.open_fds


def test_a_small_file_replaces_the_old_one_whole(tmp_path: Path) -> None:
    fs = RiggedFileSystem(tmp_path)
    fs.longest_write_bytes = 3
    atomic.write_file(fs, tmp_path / "manifest", b"first version")
    atomic.write_file(fs, tmp_path / "manifest", b"second", mode=0o400)
    assert (tmp_path / "manifest").read_bytes() == b"second"
    assert (tmp_path / "manifest").stat().st_mode & 0o777 == 0o400
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest"]
    assert durability_gaps(fs.calls) == []


@pytest.mark.parametrize(
    ("call", "code", "error"),
    [
        ("open", errno.EMFILE, OverloadedError),
        ("open", errno.EROFS, ConfigurationError),
        ("open", errno.EACCES, ConfigurationError),
        ("open", errno.ENOENT, NotFoundError),
        ("pwrite", errno.ENOSPC, OverloadedError),
        ("pwrite", errno.EIO, UnavailableError),
        ("fsync", errno.EIO, UnavailableError),
        ("rename", errno.EDQUOT, OverloadedError),
        ("fsync", 9999, InternalError),
    ],
)
def test_a_small_file_that_fails_leaves_the_old_one(
    call: str, code: int, error: type[Exception], tmp_path: Path
) -> None:
    atomic.write_file(OsFileSystem(), tmp_path / "manifest", b"old")
    fs = RiggedFileSystem(tmp_path, failing(call, code))
    with pytest.raises(error):
        atomic.write_file(fs, tmp_path / "manifest", b"new")
    assert (tmp_path / "manifest").read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest"]
    assert not fs.open_fds


def test_every_new_folder_is_made_durable_in_its_parent(tmp_path: Path) -> None:
    fs = RiggedFileSystem(tmp_path)
    atomic.make_folders(fs, tmp_path, "a/b/c")
    assert fs.calls == [
        ("mkdir", "a"),
        ("fsync_folder", "."),
        ("mkdir", "a/b"),
        ("fsync_folder", "a"),
        ("mkdir", "a/b/c"),
        ("fsync_folder", "a/b"),
    ]


def test_a_folder_that_another_process_made_is_synced_once_too(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    fs = RiggedFileSystem(tmp_path)
    durable: set[str] = set()
    atomic.make_folders(fs, tmp_path, "a/b", durable=durable)
    assert fs.names("fsync_folder") == [".", "a"]
    atomic.make_folders(fs, tmp_path, "a/b", durable=durable)
    assert fs.names("fsync_folder") == [".", "a"]


def test_a_folder_whose_parent_could_not_be_synced_is_not_remembered_as_durable(tmp_path: Path) -> None:
    fs = RiggedFileSystem(tmp_path, failing("fsync_folder", errno.EIO))
    durable: set[str] = set()
    with pytest.raises(UnavailableError):
        atomic.make_folders(fs, tmp_path, "a", durable=durable)
    assert durable == set()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_link_where_a_folder_belongs_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    if kind == "file":
        (tmp_path / "a").write_bytes(b"")
    else:
        (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="make the folder"):
        atomic.make_folders(OsFileSystem(), tmp_path, "a/b")
    assert list((tmp_path / "elsewhere").iterdir()) == []


class ForgetsFileSync(RiggedFileSystem):
    """The planted fault: data is never synced."""

    def fsync(self, fd: int) -> None:
        """Nothing happens, and nothing is recorded."""


class ForgetsFolderSync(RiggedFileSystem):
    """The planted fault: names are never synced."""

    def fsync_folder(self, path: AnyPath) -> None:
        """Nothing happens, and nothing is recorded."""


def _write_small(fs: OsFileSystem, folder: Path) -> None:
    atomic.write_file(fs, folder / "manifest", b"data")


def _write_large(fs: OsFileSystem, folder: Path) -> None:
    write_bulk(fs, folder, mapped(PAGE + 1))


def _make_folders(fs: OsFileSystem, folder: Path) -> None:
    atomic.make_folders(fs, folder, "a/b")


@pytest.mark.parametrize(
    ("planted", "act"),
    [
        (ForgetsFileSync, _write_small),
        (ForgetsFileSync, _write_large),
        (ForgetsFolderSync, _write_small),
        (ForgetsFolderSync, _write_large),
        (ForgetsFolderSync, _make_folders),
    ],
)
def test_the_order_check_catches_a_forgotten_sync(
    planted: type[RiggedFileSystem], act: Callable[[OsFileSystem, Path], None], tmp_path: Path
) -> None:
    fs = planted(tmp_path)
    act(fs, tmp_path)
    assert durability_gaps(fs.calls) != []
