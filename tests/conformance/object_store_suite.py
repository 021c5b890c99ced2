"""What every object store is held to: :class:`cairnd.tiers.object_store.ObjectStore`, line by line.

A store's tests inherit :class:`ObjectStoreSuite` and give it a fixture ``lab``. After each test the lab is looked at
through the back door: nothing unfinished may be left, whatever the test did.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import pytest

from cairn_api.errors import ConfigurationError, UnavailableError, VersionError
from cairnd.digests import BLOCK_BYTES, digest_of
from cairnd.tiers.errors import NotFoundError, UploadCancelledError
from cairnd.tiers.object_store import BinarySource, ObjectStore

MIB = 1024 * 1024
LARGE_BYTES = 10 * BLOCK_BYTES + 12_345
"""Many parts, most of which wait while the first are sent."""


class StoreLab(Protocol):
    """A store, and what it holds as seen without it."""

    store: ObjectStore

    def objects(self) -> dict[str, bytes]:
        """All objects below the store's root."""

    def unfinished(self) -> list[str]:
        """Uploads that are neither complete nor gone."""

    def plant_unfinished(self, key: str) -> bool:
        """Leave an upload of *key* as a killed process would; False where there is no such thing."""


def ignore_progress(_: int) -> None:
    """Nobody looks."""


def never() -> bool:
    return False


class ObjectStoreSuite:
    """One instance of the store, fresh and empty, per test."""

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, lab: StoreLab) -> Iterator[None]:
        yield
        assert lab.unfinished() == []

    @pytest.fixture
    def store(self, lab: StoreLab) -> ObjectStore:
        return lab.store

    @pytest.fixture
    def large(self, tmp_path: Path) -> BinarySource:
        """Sparse, so that it costs no disk."""
        path = tmp_path / "large"
        with path.open("wb") as file:
            file.truncate(LARGE_BYTES)
        return BinarySource(path, LARGE_BYTES)

    def test_the_probe_finds_exclusive_creation_and_leaves_nothing(self, lab: StoreLab) -> None:
        capabilities = lab.store.probe(".cairn/probe-1")
        assert capabilities.conditional_put
        assert capabilities == lab.store.capabilities
        assert lab.objects() == {}

    def test_small_objects_are_put_replaced_and_read(self, lab: StoreLab) -> None:
        lab.store.put("job/e00001/manifest.json", b"one")
        lab.store.put("job/e00001/manifest.json", b"second")
        lab.store.put("job/empty", b"")
        assert lab.store.get("job/e00001/manifest.json", 6) == b"second"
        assert lab.store.get("job/empty", 0) == b""
        assert lab.objects() == {"job/e00001/manifest.json": b"second", "job/empty": b""}

    def test_names_of_the_partition_grammar_are_kept(self, lab: StoreLab) -> None:
        key = "run-7/e00001-s000001-a.b/by-rank/0/_x+y=z@1.-.pt"
        lab.store.put(key, b"x")
        assert lab.objects() == {key: b"x"}
        assert [entry.key for entry in lab.store.list("run-7/")] == [key]

    def test_a_larger_object_than_expected_is_refused(self, store: ObjectStore) -> None:
        store.put("a", bytes(11))
        with pytest.raises(VersionError, match="11 bytes where at most 10"):
            store.get("a", 10)

    def test_what_is_missing_is_not_found(self, store: ObjectStore) -> None:
        store.put("folder/there", b"x")
        for key in ("missing", "folder", "folder/missing", "folder/there/below"):
            assert store.info(key) is None
            with pytest.raises((NotFoundError, ConfigurationError)):
                store.get(key, 10)
            store.delete(key)
        with pytest.raises(NotFoundError):
            store.get("missing", 10)
        with pytest.raises(NotFoundError):
            store.read_into("missing", 0, memoryview(bytearray(1)))
        assert store.get("folder/there", 1) == b"x"

    def test_info_tells_size_and_time(self, store: ObjectStore) -> None:
        before_s = time.time()
        store.put("a/b", b"12345")
        found = store.info("a/b")
        assert found is not None
        assert (found.key, found.size_bytes) == ("a/b", 5)
        assert before_s - 2 < found.modified_s < time.time() + 2

    def test_put_if_absent_creates_once(self, lab: StoreLab) -> None:
        assert lab.store.put_if_absent("decisions/v", b"first")
        assert not lab.store.put_if_absent("decisions/v", b"second")
        assert not lab.store.put_if_absent("decisions/v", b"first")
        assert lab.objects() == {"decisions/v": b"first"}
        lab.store.delete("decisions/v")
        assert lab.store.put_if_absent("decisions/v", b"third")

    def test_of_sixteen_racing_writers_one_wins(self, lab: StoreLab) -> None:
        writers = 16
        barrier = threading.Barrier(writers)

        def race(key: str, number: int) -> bool:
            barrier.wait(30)
            return lab.store.put_if_absent(key, b"%d" % number)

        with ThreadPoolExecutor(writers) as pool:
            for key in ("race/1", "race/2", "race/3"):
                futures = [pool.submit(race, key, number) for number in range(writers)]
                winners = [number for number, future in enumerate(futures) if future.result()]
                assert len(winners) == 1
                assert lab.store.get(key, 10) == b"%d" % winners[0]

    def test_objects_are_listed_below_a_prefix_in_order(self, store: ObjectStore) -> None:
        for key in ("a/2", "a/1/x", "ab/1", "b", "a/1/y"):
            store.put(key, key.encode())
        assert [entry.key for entry in store.list("a/")] == ["a/1/x", "a/1/y", "a/2"]
        assert [entry.key for entry in store.list("")] == ["a/1/x", "a/1/y", "a/2", "ab/1", "b"]
        assert [entry.size_bytes for entry in store.list("a/1/")] == [5, 5]
        assert list(store.list("none/")) == []
        assert list(store.list_folders("")) == ["a", "ab"]
        assert list(store.list_folders("a/")) == ["1"]
        assert list(store.list_folders("none/")) == []

    def test_a_listing_sees_what_was_just_written_and_deleted(self, store: ObjectStore) -> None:
        assert list(store.list("a/")) == []
        store.put("a/1", b"x")
        assert [entry.key for entry in store.list("a/")] == ["a/1"]
        store.delete("a/1")
        store.delete("a/1")
        assert list(store.list("a/")) == []

    @pytest.mark.parametrize("key", ["", "/a", "../a", "a//b", "a/", "a/../b", "."])
    def test_keys_outside_the_root_are_refused(self, lab: StoreLab, key: str) -> None:
        for act in (lambda: lab.store.put(key, b""), lambda: lab.store.get(key, 1), lambda: lab.store.delete(key)):
            with pytest.raises(ConfigurationError, match="not allowed"):
                act()
        with pytest.raises(ConfigurationError, match="not allowed"):
            list(lab.store.list("a"))
        assert lab.objects() == {}

    @pytest.mark.parametrize("size_bytes", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES + 4097])
    @pytest.mark.parametrize("with_digest", [True, False])
    @pytest.mark.parametrize("by_descriptor", [True, False])
    def test_uploads_of_any_size_arrive_whole(
        self, lab: StoreLab, tmp_path: Path, size_bytes: int, with_digest: bool, by_descriptor: bool
    ) -> None:
        data = (os.urandom(4099) * (size_bytes // 4099 + 1))[:size_bytes]
        path = tmp_path / "source"
        path.write_bytes(data)
        digest = digest_of([memoryview(data)]) if with_digest else None
        told: list[int] = []
        fd = os.open(path, os.O_RDONLY)
        try:
            source = BinarySource(fd if by_descriptor else path, size_bytes, digest)
            lab.store.upload("v/model.pt", source, progress=told.append, cancelled=never, deadline_s=60)
            os.fstat(fd)  # the descriptor stays the caller's
        finally:
            os.close(fd)
        assert lab.objects() == {"v/model.pt": data}
        assert told == sorted(told)
        assert not size_bytes or told[-1] == size_bytes
        found = lab.store.info("v/model.pt")
        assert found is not None
        assert found.size_bytes == size_bytes

    def test_parts_are_read_into_memory_that_is_given(self, store: ObjectStore, tmp_path: Path) -> None:
        data = os.urandom(3 * MIB)
        (tmp_path / "source").write_bytes(data)
        store.upload(
            "a", BinarySource(tmp_path / "source", len(data)), progress=ignore_progress, cancelled=never, deadline_s=60
        )
        buffer = memoryview(bytearray(MIB))
        for offset in (0, 1, MIB + 7, 2 * MIB):
            store.read_into("a", offset, buffer)
            assert buffer == data[offset : offset + MIB]
        store.read_into("a", 5, buffer[:0])
        for offset in (2 * MIB + 1, 3 * MIB, 4 * MIB):
            with pytest.raises(VersionError):
                store.read_into("a", offset, buffer)

    def test_a_cancelled_upload_publishes_nothing(self, lab: StoreLab, large: BinarySource) -> None:
        told: list[int] = []
        with pytest.raises(UploadCancelledError):
            lab.store.upload("v/a", large, progress=told.append, cancelled=lambda: bool(told), deadline_s=60)
        assert 0 < max(told) < LARGE_BYTES
        assert lab.objects() == {}

    def test_an_upload_cancelled_before_it_began_publishes_nothing(self, lab: StoreLab, large: BinarySource) -> None:
        with pytest.raises(UploadCancelledError):
            lab.store.upload("v/a", large, progress=ignore_progress, cancelled=lambda: True, deadline_s=60)
        assert lab.objects() == {}

    def test_an_interrupted_upload_publishes_nothing(self, lab: StoreLab, large: BinarySource) -> None:
        def interrupt(_: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            lab.store.upload("v/a", large, progress=interrupt, cancelled=never, deadline_s=60)
        assert lab.objects() == {}

    def test_an_upload_past_its_deadline_publishes_nothing(self, lab: StoreLab, large: BinarySource) -> None:
        with pytest.raises(UnavailableError):
            lab.store.upload("v/a", large, progress=ignore_progress, cancelled=never, deadline_s=0.02)
        assert lab.objects() == {}

    @pytest.mark.parametrize("claimed_bytes", [9_999, 10_001])
    def test_a_source_of_another_size_is_refused(self, lab: StoreLab, tmp_path: Path, claimed_bytes: int) -> None:
        (tmp_path / "source").write_bytes(bytes(10_000))
        source = BinarySource(tmp_path / "source", claimed_bytes)
        with pytest.raises(VersionError):
            lab.store.upload("v/a", source, progress=ignore_progress, cancelled=never, deadline_s=60)
        assert lab.objects() == {}

    def test_a_source_that_shrinks_while_it_is_sent_is_never_published(
        self, lab: StoreLab, large: BinarySource
    ) -> None:
        def shrink(_: int) -> None:
            os.truncate(large.file, 1000)

        with pytest.raises(VersionError):
            lab.store.upload("v/a", large, progress=shrink, cancelled=never, deadline_s=60)
        assert lab.objects() == {}

    def test_a_missing_source_is_an_error(self, lab: StoreLab, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError):
            lab.store.upload(
                "v/a", BinarySource(tmp_path / "none", 1), progress=ignore_progress, cancelled=never, deadline_s=60
            )
        assert lab.objects() == {}

    def test_what_a_killed_upload_left_is_swept_by_age_and_prefix(self, lab: StoreLab) -> None:
        planted = lab.plant_unfinished("v1/model.pt")
        assert len(lab.unfinished()) == planted
        lab.store.put("v1/other", b"x")
        assert lab.store.abort_stale_uploads("", 3600) == 0
        assert lab.store.abort_stale_uploads("v2/", 0) == 0
        assert len(lab.unfinished()) == planted
        assert [entry.key for entry in lab.store.list("")] == ["v1/other"]
        assert lab.store.abort_stale_uploads("v1/", 0) == planted
        assert lab.objects() == {"v1/other": b"x"}

    def test_threads_share_a_store(self, lab: StoreLab) -> None:
        def work(number: int) -> None:
            for turn in range(4):
                key = f"shared/{number % 2}/{number}-{turn}"
                lab.store.put(key, key.encode())
                assert lab.store.get(key, 100) == key.encode()
                lab.store.delete(key)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert lab.objects() == {}


Act = Callable[[ObjectStore], object]


def every_call(source: BinarySource) -> dict[str, Act]:
    """One harmless call of each method, for tests of a store that cannot be reached or entered."""
    return {
        "put": lambda store: store.put("a", b"x"),
        "put_if_absent": lambda store: store.put_if_absent("a", b"x"),
        "upload": lambda store: store.upload("a", source, progress=ignore_progress, cancelled=never, deadline_s=20),
        "get": lambda store: store.get("a", 10),
        "read_into": lambda store: store.read_into("a", 0, memoryview(bytearray(1))),
        "info": lambda store: store.info("a"),
        "list": lambda store: list(store.list("")),
        "list_folders": lambda store: store.list_folders(""),
        "delete": lambda store: store.delete("a"),
        "abort_stale_uploads": lambda store: store.abort_stale_uploads("", 0),
        "probe": lambda store: store.probe("probe"),
    }
