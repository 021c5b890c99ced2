"""Manifests: what was written comes back, and nothing else is ever believed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn_api.errors import CairnError, VersionError
from cairn_api.names import VersionId
from cairnd.digests import BLOCK_BYTES, Digest
from cairnd.manifest import MANIFEST_FORMAT, NOTE_FORMAT, NodeManifest, decode, encode
from cairnd.model import Partition, VersionState
from tests.daemon.strategies import jobs, paths, versions

U64 = st.integers(0, 2**64 - 1)
TEXT = st.text(max_size=20)


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    size_bytes = draw(st.integers(0, 3 * BLOCK_BYTES))
    count = -(-size_bytes // BLOCK_BYTES)
    blocks = tuple(draw(st.lists(U64, min_size=count, max_size=count)))
    digest = Digest(size_bytes, draw(U64), blocks)
    return Partition(
        draw(paths), draw(paths), draw(st.integers(0, 7)), size_bytes, digest, tuple(draw(st.lists(TEXT, max_size=2)))
    )


manifests = st.builds(
    NodeManifest,
    job=jobs,
    id=versions,
    node=st.text("0123456789abcdef", min_size=32, max_size=32),
    nonce=TEXT,
    world_size=st.just(8),
    ranks=st.frozensets(st.integers(0, 7)).map(lambda ranks: tuple(sorted(ranks))),
    partitions=st.lists(partitions(), max_size=3).map(tuple),
    save_dir=TEXT,
    persist=st.booleans(),
    file_marks=st.booleans(),
    created_s=st.floats(0, 4e9).map(lambda seconds: round(seconds, 3)),
    uid=st.integers(0, 2**32 - 1),
    gid=st.integers(0, 2**32 - 1),
    attributes=st.dictionaries(TEXT, TEXT, max_size=3),
)


@given(manifests)
def test_what_was_written_comes_back(manifest: NodeManifest) -> None:
    data = manifest.encode()
    again = NodeManifest.decode(data)
    assert again == manifest
    assert again.encode() == data
    assert again.fingerprint() == manifest.fingerprint()
    version = again.version(VersionState.COMMITTED)
    assert NodeManifest.of(version, again.node, version.partitions) == manifest


SAMPLE = NodeManifest(
    "run-7", VersionId(7, 42, "step"), "0" * 32, "nonce", 2, (0, 1),
    (Partition("model.pt", "model.pt", 0, 5, Digest(5, 2**63, (2**63,)), ("torch._utils._rebuild_tensor_v2",)),),
    "/save/dír/ünï", True, True, 1.7e9, 1000, 1000, {"torch": "2.13.0", "näme": "\N{SNOWMAN}"},
).encode()  # fmt: skip


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_is_refused(bit: int) -> None:
    for position in range(len(SAMPLE)):
        damaged = bytearray(SAMPLE)
        damaged[position] ^= 1 << bit
        with pytest.raises(VersionError):
            NodeManifest.decode(bytes(damaged))


def test_any_truncation_or_addition_is_refused() -> None:
    for length in range(len(SAMPLE)):
        with pytest.raises(VersionError):
            NodeManifest.decode(SAMPLE[:length])
    for more in (b" ", b"\n", b"\0", b"{}", SAMPLE):
        with pytest.raises(VersionError):
            NodeManifest.decode(SAMPLE + more)
        with pytest.raises(VersionError):
            NodeManifest.decode(more + SAMPLE)


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_anything_else_is_refused_with_the_same_error(data: bytes) -> None:
    with pytest.raises(VersionError):
        NodeManifest.decode(data)


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 50_000, b'{"crc64nvme":NaN}', b'{"crc64nvme":1e999}'])
def test_traps_of_the_parser_are_refused(data: bytes) -> None:
    with pytest.raises(VersionError):
        NodeManifest.decode(data)


def forged(**changes: Any) -> bytes:
    """A manifest with a sound checksum that states something else."""
    document = json.loads(SAMPLE)
    del document["crc64nvme"]
    return encode({**document, **changes})


PARTITION = json.loads(SAMPLE)["partitions"][0]


@pytest.mark.parametrize(
    "changes",
    [
        {"job": "../x"}, {"job": 5}, {"version": "../../x"}, {"version": None}, {"node": "../x"}, {"world_size": "two"},
        {"ranks": [2]}, {"ranks": [-1]}, {"ranks": 5}, {"partitions": None}, {"partitions": [1]}, {"uid": None},
        {"attributes": []}, {"created_s": "now"},
        {"partitions": [{**PARTITION, "path": "../../etc/passwd"}]}, {"partitions": [{**PARTITION, "path": "/etc"}]},
        {"partitions": [{**PARTITION, "path": ".cairn/manifest.json"}]}, {"partitions": [{**PARTITION, "name": ""}]},
        {"partitions": [{**PARTITION, "size_bytes": -1}]}, {"partitions": [{**PARTITION, "size_bytes": 2**40}]},
        {"partitions": [{**PARTITION, "blocks": []}]}, {"partitions": [{**PARTITION, "blocks": ["xyz"]}]},
        {"partitions": [{**PARTITION, "blocks": [5]}]}, {"partitions": [{**PARTITION, "crc64nvme": None}]},
        {"partitions": [{}]},
    ],
    ids=str,
)  # fmt: skip
def test_sound_bytes_that_state_nonsense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(VersionError, match="damaged"):
        NodeManifest.decode(forged(**changes))


def test_another_format_is_told_from_damage() -> None:
    with pytest.raises(VersionError, match=r"has format 'cairn\.manifest/2'") as caught:
        NodeManifest.decode(forged(format="cairn.manifest/2"))
    assert "newer" in caught.value.hint
    with pytest.raises(VersionError, match=NOTE_FORMAT):
        decode(SAMPLE, NOTE_FORMAT, "a note")
    assert decode(SAMPLE, MANIFEST_FORMAT, "it")["job"] == "run-7"


def test_the_same_facts_are_the_same_bytes() -> None:
    assert encode({"b": 1, "a": "é"}) == encode({"a": "é", "b": 1})
    assert SAMPLE.isascii()
    with pytest.raises((CairnError, ValueError)):
        encode({"a": float("nan")})
