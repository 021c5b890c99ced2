"""What people see of values that nobody would choose: it fits 80 columns and says the same as the JSON."""

from __future__ import annotations

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn_api.names import VersionId
from cairn_api.v1 import admin_pb2 as pb
from cairn_api.v1.types_pb2 import TIER_TIER1
from cairn_api.v1.types_pb2 import VersionId as VersionIdMessage
from cairnd.cli.documents import version_document, waiting
from cairnd.cli.source import Listed
from cairnd.cli.verbs import drain, export, pin, prune, show, status, verify, watch
from cairnd.cli.verbs import list as list_
from cairnd.digests import Digest
from cairnd.model import Copy, CopyState, Partition, Tier, Version, VersionState
from cairnd.upkeep.verifier import Finding
from tests.daemon.cli import schemas
from tests.daemon.cli.running import assert_fits

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True)
# What crosses the wire is valid Unicode, so there are no lone surrogates.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
COUNTS = st.integers(min_value=0, max_value=2**32 - 1)
SIZES = st.integers(min_value=0, max_value=2**62)
IDS = st.builds(
    VersionId,
    st.integers(min_value=1, max_value=999_999_999),
    st.integers(min_value=1, max_value=999_999_999),
    NAMES,
)
PARTITIONS = st.builds(
    Partition,
    NAMES,
    st.lists(NAMES, min_size=1, max_size=4).map("/".join),
    COUNTS,
    SIZES,
    st.none() | st.builds(Digest, SIZES, st.integers(min_value=0, max_value=2**64 - 1), st.just(())),
    st.lists(TEXTS, max_size=2).map(tuple),
)
VERSIONS = st.builds(
    Version,
    job=NAMES,
    id=IDS,
    state=st.sampled_from(VersionState),
    world_size=COUNTS,
    nonce=TEXTS,
    save_dir=TEXTS,
    persist=st.booleans(),
    created_s=st.floats(min_value=0, max_value=1e12),
    ranks=st.frozensets(COUNTS, max_size=3),
    partitions=st.lists(PARTITIONS, max_size=3).map(tuple),
    attributes=st.dictionaries(TEXTS, TEXTS, max_size=2),
    copies=st.dictionaries(st.sampled_from(Tier), st.builds(Copy, st.sampled_from(CopyState), TEXTS), max_size=4),
    pinned=st.booleans(),
    reason=TEXTS,
)
NOW_S = 1_800_000_000.0


@given(st.lists(st.builds(Listed, VERSIONS, SIZES), max_size=4))
def test_a_list_fits(versions: list[Listed]) -> None:
    lines = list_.render(versions, NOW_S)
    assert_fits(lines)
    for item in versions:
        assert any(line.startswith(str(item.version.id)[:14]) for line in lines)
    document = {"versions": [version_document(item.version, item.size_bytes) for item in versions], "warnings": []}
    jsonschema.validate(document, schemas.LIST)


@given(VERSIONS)
def test_a_shown_version_fits(version: Version) -> None:
    assert_fits(show.render(version, NOW_S))
    jsonschema.validate({"version": show.document(version)}, schemas.SHOW)


@given(st.lists(st.tuples(IDS, SIZES, TEXTS), max_size=4))
def test_a_pruning_plan_fits(items: list[tuple[VersionId, int, str]]) -> None:
    deletions = [
        pb.Deletion(job="run-7", id=VersionIdMessage(**id_._asdict()), tier=TIER_TIER1, size_bytes=size, reason=reason)
        for id_, size, reason in items
    ]
    assert_fits(prune.render(deletions))


@given(IDS, TEXTS, TEXTS)
def test_a_finding_fits(version: VersionId, path: str, problem: str) -> None:
    assert_fits(verify.finding_lines(Finding("run-7", version, Tier.TIER2, path, problem)))


@given(
    st.builds(
        pb.StatusReply, node=TEXTS, tier1_path=TEXTS, persistent_storage_path=TEXTS, uptime_s=st.floats(0, 1e12),
        tier1_used_bytes=SIZES, tier1_free_bytes=SIZES, backlog_versions=COUNTS, backlog_bytes=SIZES,
        oldest_unpersisted_age_s=st.floats(0, 1e12), last_persisted=TEXTS, verify_failures=SIZES, clients=COUNTS,
        draining=st.booleans(), problems=st.lists(TEXTS, max_size=3),
    )
)  # fmt: skip
def test_a_status_fits(reply: pb.StatusReply) -> None:
    assert_fits(status.render(reply))
    jsonschema.validate(status.document(reply), schemas.STATUS)


@given(
    st.builds(
        pb.Event, number=SIZES, time_s=st.floats(0, 1e12), name=NAMES, job=NAMES, version=TEXTS,
        fields=st.dictionaries(TEXTS, TEXTS, max_size=3),
    )
)  # fmt: skip
def test_an_event_fits(event: pb.Event) -> None:
    assert_fits(watch.render(event))
    jsonschema.validate(watch.document(event), schemas.EVENT)


@given(
    st.builds(
        pb.DrainProgress,
        versions_left=COUNTS,
        bytes_left=SIZES,
        abandoned=st.lists(TEXTS, max_size=3),
        without_tier2=st.lists(TEXTS, max_size=3),
    )
)
def test_the_end_of_a_drain_fits(last: pb.DrainProgress) -> None:
    assert_fits(drain.render(last))
    jsonschema.validate(drain.document(last), schemas.DRAIN)


def version(**changes: object) -> Version:
    values: dict[str, object] = {
        "job": "run-7", "id": VersionId(7, 42, "global_step1000"), "state": VersionState.COMMITTED, "world_size": 1,
        "nonce": "n", "ranks": frozenset({0}), "created_s": NOW_S - 300,
    }  # fmt: skip
    return Version(**(values | changes))  # type: ignore[arg-type]  # the values are those of the fields


def test_a_list_says_where_bytes_are_and_what_waits() -> None:
    copies = {
        Tier.MEMORY: Copy(CopyState.VERIFIED),
        Tier.TIER1: Copy(CopyState.FAILED, "rotten"),
        Tier.TIER2: Copy(CopyState.COPYING),
    }
    shown = version(id=VersionId(7, 42, "step1000"), copies=copies, pinned=True, persist=True)
    assert list_.render([Listed(shown, 1536)], NOW_S) == [
        "job run-7",
        "VERSION                  STATE         SIZE  TIERS        AGE  FLAGS",
        "e00007-s000042-step1000  committed  1.5 KiB  mem t1! t2~   5m  pinned waiting",
    ]


def test_a_long_tag_gives_way_and_the_numbers_stay() -> None:
    shown = version(id=VersionId(7, 42, "global_step" + "1" * 100), persist=True)
    (_, _, line) = list_.render([Listed(shown, 1536)], NOW_S)
    assert line.startswith("e00007-s000042-global_step…111")
    assert line.endswith("waiting")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"persist": True}, True),
        ({"requested": True}, True),
        ({}, False),
        ({"persist": True, "copies": {Tier.TIER2: Copy(CopyState.VERIFIED)}}, False),
        ({"persist": True, "copies": {Tier.TIER2: Copy(CopyState.EVICTED)}}, False),
        ({"persist": True, "copies": {Tier.TIER2: Copy(CopyState.FAILED)}}, True),
        ({"persist": True, "state": VersionState.ABORTED}, False),
    ],
)
def test_what_waits_for_tier_2(changes: dict[str, object], *, expected: bool) -> None:
    assert waiting(version(**changes)) is expected


@pytest.mark.parametrize(
    ("name", "usual"),
    [
        ("torch._utils._rebuild_tensor_v2", True),
        ("torch.FloatStorage", True),
        ("torch.cuda.HalfStorage", True),
        ("torch.float8_e4m3fn", True),
        ("collections.OrderedDict", True),
        ("torch.nn.parameter.Parameter", True),
        ("argparse.Namespace", False),
        ("os.system", False),
        ("torch.nn.modules.linear.Linear", False),
        ("evil.torch.FloatStorage", False),
        ("torch.hub.load", False),
    ],
)
def test_usual_globals_are_those_of_plain_tensors(name: str, *, usual: bool) -> None:
    assert show.is_usual(name) is usual


@pytest.mark.parametrize("verb", [list_, show, verify, pin, prune, export, status, drain, watch])
def test_every_verb_documents_its_json(verb: object) -> None:
    assert "JSON" in (verb.__doc__ or "")
