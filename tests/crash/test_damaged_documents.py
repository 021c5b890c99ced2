"""Cairn's small records, damaged by hypothesis: what is accepted is, byte for byte, what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn_api.errors import VersionError
from cairn_api.names import VersionId
from cairnd.catalog.health import Health
from cairnd.catalog.jobs import JobRecord
from cairnd.digests import Digest
from cairnd.manifest import NOTE_FORMAT, NodeManifest, decode, encode
from cairnd.model import Partition, Tier
from tests.promises import proof_size

EXAMPLES = proof_size(300, 5000)
NODE = "0" * 32
JOB = "run-7"
VERSION = VersionId(7, 42, "step")
MANIFEST = NodeManifest(
    JOB, VERSION, NODE, "nonce", 2, (0, 1),
    (
        Partition("model.pt", "model.pt", 0, 5, Digest(5, 2**63, (2**63,)), ("torch._utils._rebuild_tensor_v2",)),
        Partition("empty.pt", "by-rank/1/empty.pt", 1, 0, Digest(0, 0, ())),
    ),
    "/save/dír/ünï", True, True, 1.7e9, 1000, 1000, {"torch": "2.13.0", "näme": "\N{SNOWMAN}"},
)  # fmt: skip
RECORD = JobRecord(JOB, 1000, 1000, "file:///bucket", 5, 3, "nonce", 2, True, VERSION)
HEALTH = Health({Tier.TIER1: "block 0 does not match its digest"}, ("one",), "three resumes in a row died on it")
LAYOUT = encode({"format": NOTE_FORMAT, "layout": 1, "node": NODE})

DOCUMENTS: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "manifest": (MANIFEST.encode(), NodeManifest.decode),
    "job record": (RECORD.encode(), lambda data: JobRecord.decode(data, "it")),
    "health record": (HEALTH.encode(), lambda data: Health.decode(data, "it")),
    "layout": (LAYOUT, lambda data: decode(data, NOTE_FORMAT, "it")),
}


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """*data* with a few ranges replaced by others, repeated, cut out, or by bytes of its own from elsewhere."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(changed)))
        end = draw(st.integers(start, min(len(changed), start + 24)))
        source = draw(st.integers(0, len(data)))
        own = st.just(data[source : source + draw(st.integers(0, 40))])
        changed[start:end] = draw(st.binary(max_size=12) | own | st.just(b" ") | st.just(b""))
    return bytes(changed)


@pytest.mark.parametrize("name", DOCUMENTS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(draw=st.data())
def test_nothing_but_the_very_bytes_is_accepted(name: str, draw: st.DataObject) -> None:
    data, read = DOCUMENTS[name]
    changed = draw.draw(mutated(data))
    if changed == data:
        read(changed)
    else:
        with pytest.raises(VersionError):
            read(changed)


@pytest.mark.parametrize("name", DOCUMENTS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans(), order=st.randoms(), upper=st.booleans())
def test_the_same_json_in_other_words_is_refused(
    name: str, indent: int | None, ascii_only: bool, order: Any, upper: bool
) -> None:
    """Equal as JSON is not equal: daemons compare records as bytes."""
    data, read = DOCUMENTS[name]
    items = list(json.loads(data).items())
    order.shuffle(items)
    text = json.dumps(dict(items), indent=indent, ensure_ascii=ascii_only, separators=(",", ":"))
    changed = (text.replace("\\u", "\\U") if upper else text).encode()
    if changed != data:
        with pytest.raises(VersionError):
            read(changed)
