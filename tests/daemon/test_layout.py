"""Every key that the layout draws stays in the tree, in its own place, and nobody's name reaches Cairn's."""

from __future__ import annotations

import inspect
import posixpath
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn_api.errors import ConfigurationError
from cairn_api.names import RESERVED_NAME, VersionId, parse_version
from cairnd import layout
from cairnd.layout import Bucket
from cairnd.tiers.keys import check_key
from tests.daemon.strategies import hostile, jobs, paths, versions

NODE = "0123456789abcdef" * 2
SOURCE = "s3://bucket/prefix"


def keys(job: str, version: VersionId, path: str) -> dict[str, str]:
    """Every key of the layout, by what it is."""
    return {
        "job_record": layout.job_record(job),
        "pin": layout.pin(job, version),
        "request": layout.request(job, version),
        "health": layout.health(job, version),
        "job_folder": layout.job_folder(job),
        "version_folder": layout.version_folder(job, version),
        "partition": layout.partition(job, version, path),
        "incoming": layout.incoming(job, version, 7),
        "sealed": layout.sealed(job, version),
        "quarantined": layout.quarantined("0" * 8, layout.version_folder(job, version)),
        "incoming_folder": layout.incoming_folder(job, version),
        "incoming_download": layout.incoming_download(job, version, "f" * 16),
        "incoming_fetched": layout.incoming_fetched("f" * 16),
        "fetched": layout.fetched(SOURCE, job, version, path),
        "manifest": layout.manifest(job, version),
        "probe": Bucket.probe(NODE, "1"),
        "epochs": Bucket.epochs(job),
        "epoch": Bucket.epoch(job, version.epoch),
        "decisions": Bucket.decisions(job),
        "decision": Bucket.decision(job, version),
        "requests": Bucket.requests(job),
        "bucket request": Bucket.request(job, version),
        "pins": Bucket.pins(job),
        "bucket pin": Bucket.pin(job, version),
        "bucket version": Bucket.version(job, version),
        "bucket partition": Bucket.partition(job, version, path),
        "nodes": Bucket.nodes(job, version),
        "node": Bucket.node(job, version, NODE),
    }


def test_all_of_the_layout_is_looked_at() -> None:
    def drawn(owner: object) -> set[str]:
        return {
            name
            for name, made in inspect.getmembers(owner, inspect.isfunction)
            if not name.startswith(("_", "check_", "parse_", "version_of")) and made.__module__ == layout.__name__
        }

    named = keys("job", VersionId(1, 1, "t"), "p")
    assert drawn(layout) == {name for name in named if name in drawn(layout)}
    assert drawn(Bucket) == {
        name.removeprefix("bucket ") for name in named if name.removeprefix("bucket ") in drawn(Bucket)
    }


@given(jobs, versions, paths)
def test_keys_stay_below_their_root_and_apart(job: str, version: VersionId, path: str) -> None:
    drawn = keys(job, version, path)
    assert layout.version_of(drawn["version_folder"]) == (job, version)
    for what, key in drawn.items():
        plain = key.removesuffix("/")
        assert check_key(plain) == plain
        assert posixpath.normpath(plain) == plain, what
        assert all(len(part.encode()) <= 255 for part in plain.split("/")), what
    folder = drawn["version_folder"] + "/"
    assert drawn["partition"].startswith(folder)
    assert drawn["manifest"].startswith(folder + RESERVED_NAME + "/")
    assert RESERVED_NAME not in drawn["partition"].removeprefix(folder).split("/")
    assert RESERVED_NAME not in drawn["bucket partition"].split("/")
    tree = {what: key for what, key in drawn.items() if not key.endswith("/") and not what.endswith("folder")}
    assert len(set(tree.values())) >= len(tree) - 4  # the bucket's requests and pins mirror tier 1's, elsewhere


@given(hostile, versions)
def test_what_is_no_name_makes_no_key(name: str, version: VersionId) -> None:
    makers: list[Callable[[], str]] = [
        lambda: layout.job_folder(name),
        lambda: layout.job_record(name),
        lambda: layout.partition("job", version, name),
        lambda: layout.partition(name, version, "p"),
        lambda: layout.fetched(SOURCE, "job", version, name),
        lambda: Bucket.partition("job", version, name),
        lambda: Bucket.decision(name, version),
        lambda: Bucket.node("job", version, name),
        lambda: Bucket.probe(name, "1"),
    ]
    for make in makers:
        try:
            key = make()
        except ConfigurationError:
            continue
        assert posixpath.normpath(key) == key
        assert not key.startswith(("/", "../"))
        assert f"/{RESERVED_NAME}/" not in key.removeprefix(RESERVED_NAME) or "node" in key or name in key


@pytest.mark.parametrize(
    "path", [".cairn", ".cairn/manifest.json", "a/.cairn/b", "..", "../x", "/x", "", "a//b", "a/", "a\n"]
)
def test_the_reserved_name_is_not_reachable(path: str) -> None:
    for make in (layout.partition, Bucket.partition):
        with pytest.raises(ConfigurationError):
            make("job", VersionId(1, 1, "t"), path)


@given(jobs, versions, versions)
def test_versions_sort_and_read_back_from_their_folders(job: str, one: VersionId, other: VersionId) -> None:
    folder = layout.version_folder(job, one)
    assert parse_version(folder.rpartition("/")[2]) == one
    assert (layout.version_folder(job, other) == folder) is (one == other)
    if max(*one[:2], *other[:2]) < 100_000 and one[:2] != other[:2]:
        assert (str(one) < str(other)) is (one < other)


@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40))
def test_foreign_sources_do_not_share_files(one: str, other: str) -> None:
    def fetched(source: str) -> str:
        return layout.fetched(source, "job", VersionId(1, 1, "t"), "p")

    assert (fetched(one) == fetched(other)) is (one == other)
