"""The grammar of names: what may become part of a path."""

from __future__ import annotations

import pytest
from hypothesis import given

from cairn_api.errors import ConfigurationError
from cairn_api.names import (
    VersionId,
    check_job,
    check_node,
    check_partition,
    check_tag,
    parse_version,
    stored_path,
)
from tests.daemon.strategies import hostile, jobs, paths, tags, versions


@given(jobs, tags, paths, versions)
def test_names_pass_unchanged(job: str, tag: str, path: str, version: VersionId) -> None:
    assert check_job(job) == job
    assert check_tag(tag) == tag
    assert check_partition(path) == path
    assert parse_version(str(version)) == version


@given(hostile)
def test_everything_else_is_refused_with_the_one_error(text: str) -> None:
    for check in (check_job, check_tag, check_partition, check_node, parse_version):
        try:
            accepted = str(check(text))
        except ConfigurationError:
            continue
        else:
            assert accepted == text
            assert not text.startswith((".", "/", "-"))
            assert ".." not in text.split("/")
            assert text.isascii()
            assert text.isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "", "e1-s1-t", "e00001-s000001-", "e00001-s000001", "e00000-s000001-t", "e00001-s000000-t", "e000001-s000001-t",
        "e00001-s0000001-t", "e00001-s000001-../x", "e00001-s000001-t\n", "E00001-s000001-t", "e0000\u0661-s000001-t",
        "e1000000000-s000001-t", "e00001-s000001-.t",
    ],
)  # fmt: skip
def test_only_the_one_spelling_of_a_version_is_read(text: str) -> None:
    with pytest.raises(ConfigurationError, match="not allowed"):
        parse_version(text)


def test_versions_are_ordered_by_epoch_and_sequence_only_then_tag() -> None:
    assert VersionId(1, 999_999, "z") < VersionId(2, 1, "a")
    assert VersionId(2, 1, "z") < VersionId(2, 2, "a")
    assert str(VersionId(7, 42, "global_step1000")) == "e00007-s000042-global_step1000"


def test_a_shared_name_lies_below_its_rank() -> None:
    assert stored_path("a/b.pt", 3, shared_name=False) == "a/b.pt"
    assert check_partition(stored_path("a/b.pt", 3, shared_name=True)) == "by-rank/3/a/b.pt"
