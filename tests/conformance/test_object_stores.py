"""The suite over every store that can run here, and what is particular to each."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from cairn_api.errors import CairnError, ConfigurationError, UnavailableError, VersionError
from cairnd.digests import BLOCK_BYTES, digest_of
from cairnd.tiers.errors import UploadCancelledError
from cairnd.tiers.object_store import BinarySource, ObjectStore
from cairnd.tiers.stores import open_store, s3_multipart
from cairnd.tiers.stores.file import FileStore
from cairnd.tiers.stores.s3 import S3Store
from tests.conformance.object_store_suite import ObjectStoreSuite, every_call, ignore_progress, never
from tests.daemon.tiers.rigged import RiggedFileSystem, durability_gaps, failing
from tests.servers.seaweed import SECRET_KEY, SeaweedServer


class FileLab:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store: ObjectStore = open_store(f"file://{folder}", {})

    def _files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if not path.is_dir()]

    def objects(self) -> dict[str, bytes]:
        found = {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in self._files()}
        if not found:
            assert not self.folder.exists() or list(self.folder.iterdir()) == []  # no empty folders either
        return found

    def unfinished(self) -> list[str]:
        return [path.name for path in self._files() if path.name.startswith(".upload-")]

    def plant_unfinished(self, key: str) -> bool:
        path = self.folder / key
        path.parent.mkdir(parents=True)
        (path.parent / ".upload-0123").write_bytes(b"half")
        return True


class MemoryLab:
    def __init__(self) -> None:
        self.root = f"test-{uuid.uuid4().hex}"
        self.store: ObjectStore = open_store(f"memory://{self.root}", {})
        self._fs = fsspec.filesystem("memory")

    def objects(self) -> dict[str, bytes]:
        return {path.removeprefix(f"/{self.root}/"): self._fs.cat_file(path) for path in self._fs.find(f"/{self.root}")}

    def unfinished(self) -> list[str]:
        return []

    def plant_unfinished(self, key: str) -> bool:
        assert key
        return False


class S3Lab:
    def __init__(self, server: SeaweedServer) -> None:
        self._server = server
        self._prefix = f"test-{uuid.uuid4().hex}/checkpoints"
        self._fs = server.file_system()
        self.store: ObjectStore = open_store(f"s3://{server.bucket}/{self._prefix}", server.options)

    def objects(self) -> dict[str, bytes]:
        page = self._fs.call_s3("list_objects_v2", Bucket=self._server.bucket, Prefix=f"{self._prefix}/")
        keys = [entry["Key"] for entry in page.get("Contents", ())]
        return {key.removeprefix(f"{self._prefix}/"): self._fs.cat_file(f"{self._server.bucket}/{key}") for key in keys}

    def unfinished(self) -> list[str]:
        page = self._fs.call_s3("list_multipart_uploads", Bucket=self._server.bucket, Prefix=f"{self._prefix}/")
        return [upload["Key"] for upload in page.get("Uploads", ())]

    def plant_unfinished(self, key: str) -> bool:
        self._fs.call_s3("create_multipart_upload", Bucket=self._server.bucket, Key=f"{self._prefix}/{key}")
        return True


class TestFileStore(ObjectStoreSuite):
    @pytest.fixture
    def lab(self, tmp_path: Path) -> FileLab:
        return FileLab(tmp_path / "bucket" / "root")


class TestMemoryStore(ObjectStoreSuite):
    @pytest.fixture
    def lab(self) -> MemoryLab:
        return MemoryLab()


@pytest.mark.s3
class TestS3Store(ObjectStoreSuite):
    @pytest.fixture
    def lab(self, seaweed: SeaweedServer) -> S3Lab:
        return S3Lab(seaweed)

    def test_bytes_that_differ_from_their_digest_are_refused_by_the_server(self, lab: S3Lab, tmp_path: Path) -> None:
        data = bytearray(BLOCK_BYTES + 100)
        digest = digest_of([memoryview(data)])
        for position in (17, BLOCK_BYTES + 50):
            damaged = bytearray(data)
            damaged[position] ^= 1
            (tmp_path / "source").write_bytes(damaged)
            source = BinarySource(tmp_path / "source", len(data), digest)
            with pytest.raises(CairnError):
                lab.store.upload("v/a", source, progress=ignore_progress, cancelled=never, deadline_s=60)
            assert lab.objects() == {}

    def test_the_check_for_leftovers_catches_an_upload_that_is_not_aborted(
        self, lab: S3Lab, large: BinarySource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def forget(*_: object) -> None:
            """The planted fault."""

        monkeypatch.setattr(s3_multipart, "_abort", forget)
        told: list[int] = []
        with pytest.raises(UploadCancelledError):
            lab.store.upload("v/a", large, progress=told.append, cancelled=lambda: bool(told), deadline_s=60)
        assert len(lab.unfinished()) == 1
        assert lab.store.abort_stale_uploads("v/", 0) == 1

    def test_pages_of_a_long_listing_are_joined(self, lab: S3Lab) -> None:
        lab.store.put("many/000", b"")
        source = lab.objects()
        assert source == {"many/000": b""}
        for number in range(1, 12):
            lab.store.put(f"many/{number:03}/x", b"")
        store = lab.store
        assert isinstance(store, S3Store)
        pages = list(store._pages("many/", {"MaxKeys": 5}))  # type: ignore[dict-item]
        assert [len(page.get("Contents", ())) for page in pages] == [5, 5, 2]
        assert list(store.list_folders("many/")) == [f"{number:03}" for number in range(1, 12)]

    @pytest.mark.parametrize("changed", [{"secret": "wrong-canary-7c0a"}, {"key": "unknown-key"}])
    def test_wrong_credentials_are_named_and_never_shown(
        self, seaweed: SeaweedServer, tmp_path: Path, changed: dict[str, str]
    ) -> None:
        (tmp_path / "source").write_bytes(bytes(BLOCK_BYTES + 1))
        store = open_store(f"s3://{seaweed.bucket}/x", {**seaweed.options, **changed})
        for name, act in every_call(BinarySource(tmp_path / "source", BLOCK_BYTES + 1)).items():
            with pytest.raises(ConfigurationError, match="cannot") as caught:
                act(store)
            assert "credentials" in caught.value.hint, name
            assert "CAIRN_PERSISTENT_STORAGE_PATH" in caught.value.hint
            text = "".join(traceback.format_exception(caught.value))
            assert SECRET_KEY not in text
            assert "wrong-canary-7c0a" not in text

    def test_a_missing_bucket_is_named(self, seaweed: SeaweedServer) -> None:
        # A write would do for most services, but this one makes the bucket for an administrator.
        store = open_store("s3://no-such-bucket/x", seaweed.options)
        with pytest.raises(ConfigurationError, match="NoSuchBucket") as caught:
            store.get("a", 1)
        assert "create the bucket" in caught.value.hint


@pytest.fixture
def source(tmp_path: Path) -> BinarySource:
    path = tmp_path / "source"
    path.write_bytes(bytes(BLOCK_BYTES + 1))
    return BinarySource(path, BLOCK_BYTES + 1)


OPTIONS = {"key": "k", "secret": "s", "region": "us-east-1"}


@pytest.mark.timeout(40)  # less than a call may take by default
@pytest.mark.parametrize("name", sorted(every_call(BinarySource(0, 0))))
def test_an_unreachable_endpoint_is_unavailable_soon(name: str, source: BinarySource) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        store = S3Store("bucket", "", {**OPTIONS, "endpoint_url": endpoint}, call_deadline_s=1.0)
        with pytest.raises(UnavailableError, match="cannot") as caught:
            every_call(source)[name](store)
        assert "endpoint" in caught.value.hint


@contextmanager
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(listener.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in held:
                connection.close()


@pytest.mark.timeout(40)  # less than a call may take by default
def test_a_silent_endpoint_does_not_hang_calls_or_uploads(source: BinarySource) -> None:
    with silent_server() as endpoint:
        store = S3Store("bucket", "", {**OPTIONS, "endpoint_url": endpoint}, call_deadline_s=0.5)
        with pytest.raises(UnavailableError):
            store.put("a", b"x")
        with pytest.raises(UnavailableError, match="not done after"):
            store.upload("a", source, progress=ignore_progress, cancelled=never, deadline_s=0.5)


class TestFileStoreDurability:
    """The order of system calls, and the fall-back without links."""

    @pytest.fixture
    def fs(self, tmp_path: Path) -> RiggedFileSystem:
        return RiggedFileSystem(tmp_path)

    def test_every_way_of_writing_is_durable(self, fs: RiggedFileSystem, tmp_path: Path, source: BinarySource) -> None:
        store = FileStore(fs, tmp_path / "bucket")
        store.put("a/one", b"x")
        assert store.put_if_absent("b/two", b"x")
        assert not store.put_if_absent("b/two", b"y")
        store.upload("c/three", source, progress=ignore_progress, cancelled=never, deadline_s=60)
        # The temporary names need no sync of their own; everything else does.
        assert [gap for gap in durability_gaps(fs.calls) if ".upload-" not in gap] == []
        fs.calls.clear()
        store.delete("a/one")
        assert fs.calls[:2] == [("unlink", "bucket/a/one"), ("fsync_folder", "bucket/a")]

    @pytest.mark.parametrize("direct", [True, False])
    @pytest.mark.parametrize("by_descriptor", [True, False])
    @pytest.mark.parametrize("size_bytes", [0, 1, 4096, BLOCK_BYTES + 4097])
    def test_what_is_read_is_compared_with_the_digest(
        self, fs: RiggedFileSystem, tmp_path: Path, size_bytes: int, by_descriptor: bool, direct: bool
    ) -> None:
        if not direct:
            fs.fault = lambda call, name: (
                OSError(errno.EINVAL, "no O_DIRECT") if call == "open direct" and ".upload-" not in name else None
            )
        store = FileStore(fs, tmp_path / "bucket")
        assert store.capabilities.checks_source
        data = bytes(range(256)) * (size_bytes // 256) + b"x" * (size_bytes % 256)
        (tmp_path / "source").write_bytes(data)
        with (tmp_path / "source").open("rb") as file:
            whole = BinarySource(file.fileno() if by_descriptor else tmp_path / "source", size_bytes)
            told: list[int] = []
            good = whole._replace(digest=digest_of([memoryview(data)]))
            store.upload("v/a", good, progress=told.append, cancelled=never, deadline_s=60)
            assert (tmp_path / "bucket/v/a").read_bytes() == data
            assert told[-1:] == ([size_bytes] if size_bytes else [])
            bad = whole._replace(digest=digest_of([memoryview(data), memoryview(b"1")])._replace(size_bytes=size_bytes))
            with pytest.raises(VersionError, match="does not match its digest"):
                store.upload("v/b", bad, progress=ignore_progress, cancelled=never, deadline_s=60)
            assert [path.name for path in (tmp_path / "bucket").rglob("*")] == ["v", "a"]
            file.read()  # the caller's descriptor is as it was

    @pytest.mark.parametrize("reads", [0, 1])
    def test_a_source_that_opens_and_refuses_direct_reads_is_read_as_usual(
        self, fs: RiggedFileSystem, tmp_path: Path, reads: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        really = fs.pread_into
        direct = []

        def read(fd: int, buffer: memoryview, offset: int) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                direct.append(offset)
                if len(direct) > reads:
                    raise OSError(errno.EINVAL, "no O_DIRECT")
            return really(fd, buffer, offset)

        monkeypatch.setattr(fs, "pread_into", read)
        data = os.urandom(9 << 20)
        (tmp_path / "source").write_bytes(data)
        source = BinarySource(tmp_path / "source", len(data), digest_of([memoryview(data)]))
        FileStore(fs, tmp_path / "bucket").upload(
            "v/a", source, progress=ignore_progress, cancelled=never, deadline_s=60
        )
        assert (tmp_path / "bucket/v/a").read_bytes() == data
        assert len(direct) == reads + 1, "it is not tried again and again"
        assert not fs.open_fds

    def test_short_reads_of_the_source_are_taken_up_again(
        self, fs: RiggedFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = fs.pread_into
        monkeypatch.setattr(fs, "pread_into", lambda fd, buffer, at: min(read(fd, buffer, at), 5000))
        data = bytes(range(250)) * 100
        (tmp_path / "source").write_bytes(data)
        source = BinarySource(tmp_path / "source", len(data), digest_of([memoryview(data)]))
        store = FileStore(fs, tmp_path / "bucket")
        store.upload("v/a", source, progress=ignore_progress, cancelled=never, deadline_s=60)
        assert (tmp_path / "bucket/v/a").read_bytes() == data

    @pytest.mark.parametrize("failure", [OSError(errno.EIO, "bad block"), 0])
    def test_a_source_that_cannot_be_read_is_not_the_buckets_fault(
        self, fs: RiggedFileSystem, tmp_path: Path, source: BinarySource, failure: OSError | int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        def read(_fd: int, _buffer: memoryview, _offset: int) -> int:
            if isinstance(failure, OSError):
                raise failure
            return failure

        monkeypatch.setattr(fs, "pread_into", read)
        with pytest.raises(VersionError):
            FileStore(fs, tmp_path / "bucket").upload(
                "v/a", source, progress=ignore_progress, cancelled=never, deadline_s=60
            )
        assert list((tmp_path / "bucket").rglob("*")) == []

    @pytest.mark.parametrize("call", ["fsync", "rename", "fallocate"])
    def test_a_failed_upload_leaves_nothing(
        self, fs: RiggedFileSystem, tmp_path: Path, source: BinarySource, call: str
    ) -> None:
        fs.fault = failing(call, errno.EIO)
        store = FileStore(fs, tmp_path / "bucket")
        with pytest.raises(UnavailableError):
            store.upload("v/a", source, progress=ignore_progress, cancelled=never, deadline_s=60)
        assert list((tmp_path / "bucket").rglob("*")) == []
        assert not fs.open_fds

    def test_an_empty_folder_that_cannot_be_removed_is_an_error_like_any_other(
        self, fs: RiggedFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def bad_disk(_: object) -> None:
            raise OSError(errno.EIO, "bad block")

        monkeypatch.setattr(fs, "rmdir", bad_disk)
        with pytest.raises(UnavailableError):
            FileStore(fs, tmp_path / "bucket").put("v/a", b"1")

    def test_without_links_exclusive_creation_is_known_to_be_missing(self, tmp_path: Path) -> None:
        def no_links(call: str, _: str) -> OSError | None:
            return OSError(errno.EPERM, "no links here") if call == "link" else None

        store = FileStore(RiggedFileSystem(tmp_path, no_links), tmp_path / "bucket")
        assert not store.probe("probe").conditional_put
        assert store.put_if_absent("a", b"1")
        assert not store.put_if_absent("a", b"2")
        assert store.get("a", 1) == b"1"


@pytest.mark.parametrize(
    ("url", "options", "reason"),
    [
        ("ftp://host/x", {}, "unknown kind"),
        ("/plain/path", {}, "unknown kind"),
        ("file://host/x", {}, "absolute folder"),
        ("file:relative", {}, "absolute folder"),
        ("file:///x", {"key": "k"}, "no storage options"),
        ("s3://", {}, "names a bucket"),
        ("s3://bucket?versionId=1", {}, "after"),
        ("s3://bucket/x", {"acces_key": "k"}, "unknown storage options for s3: acces_key"),
        ("s3://key:canary-5b1e@bucket/x", {}, "holds credentials"),
        ("s3://bucket", {"endpoint_url": "http://key:canary-5b1e@host"}, "holds credentials"),
        ("gs://bucket/x", {}, "gcsfs, which is not installed"),
        ("az://bucket/x", {}, "adlfs, which is not installed"),
    ],
)
def test_locations_that_cannot_work_are_refused(url: str, options: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason) as caught:
        open_store(url, options)
    assert "canary" not in str(caught.value)


def test_a_file_location_may_hold_escaped_characters(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/a%20b", {})
    store.put("x", b"1")
    assert (tmp_path / "a b" / "x").read_bytes() == b"1"
    assert (tmp_path / "a b" / "x").stat().st_mode & 0o777 == 0o440


def test_remote_libraries_are_imported_only_when_a_location_needs_them(tmp_path: Path) -> None:
    script = f"""
import sys
from cairnd.tiers.stores import open_store
open_store("file://{tmp_path}", {{}}).put("a", b"x")
print(sorted({{"fsspec", "s3fs", "botocore", "aiohttp", "torch", "grpc"}} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "[]"
