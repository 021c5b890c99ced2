"""Documents as nobody writes them: sound ones with a field changed, other JSON, other bytes. For hypothesis."""

from __future__ import annotations

import json
from typing import Any

from awscrt import checksums
from hypothesis import strategies as st

from cairnd.manifest import encode

_HUGE = (2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**9, 10**12, 10**300, 10**400, 10**4000)
_TEXTS = (
    "", "0", "1e5", "../x", "a/../b", ".cairn/manifest.json", "a\0b", "a\nb", "\ud800", "\udfff\ud800",
    "e00001-s000001-t",
    "e00003-s000001-step", "0" * 32, "f" * 16, "-1", "0x10", "1_0", "é" * 40, "x" * 100_000, "committed", "aborted",
    "run-7", "tier1", "\u202e",
)  # fmt: skip

numbers = st.one_of(
    st.integers(-3, 3),
    st.sampled_from(_HUGE).flatmap(lambda huge: st.sampled_from((huge, -huge, huge - 1))),
    st.floats(allow_nan=False, allow_infinity=False),
)
texts = st.one_of(st.sampled_from(_TEXTS), st.text(max_size=12))
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
"""Any JSON value, with what parsers and arithmetic stumble over."""

_TRAPS = (
    b"", b"{", b"null", b"[]", b"NaN", b'{"crc64nvme":NaN}', b'{"crc64nvme":1e999}', b"\xff\xfe{\0}\0",
    b"\xef\xbb\xbf{}",
    b"[" * 200_000, b'{"a":' * 100_000, b"9" * 5000, b'{"a":' + b"9" * 5000 + b"}", b'"' + b"x" * 10_000_000 + b'"',
    b'{"format":"a","format":"b","crc64nvme":"0"}', b"[" + b"1," * 1_000_000 + b"1]", b'"\\ud800"', b"\0" * 4096,
)  # fmt: skip


def sealed(document: dict[str, Any]) -> bytes:
    """*document* with a true checksum, also where no writer of Cairn's could have made it."""
    try:
        return encode(document)
    except ValueError:  # a number that JSON does not have
        body = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
        return json.dumps({**document, "crc64nvme": f"{checksums.crc64nvme(body):016x}"}).encode()


def _places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


def _changed(document: Any, place: tuple[str | int, ...], value: Any) -> Any:
    if not place:
        return value
    copy: Any = dict(document) if isinstance(document, dict) else list(document)
    copy[place[0]] = _changed(copy[place[0]], place[1:], value)
    return copy


@st.composite
def forged(draw: st.DrawFn, document: dict[str, Any]) -> bytes:
    """Bytes in the place of *document* (without its checksum), mostly with a true checksum."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.sampled_from(_TRAPS))
    if kind == 1:
        return draw(st.binary(max_size=200))
    if kind == 2:
        return sealed({"format": document["format"], **draw(st.dictionaries(texts, values, max_size=4))})
    if kind == 3:
        sound = bytearray(encode(document))
        sound[draw(st.integers(0, len(sound) - 1))] ^= draw(st.integers(1, 255))
        return bytes(sound)
    for _ in range(draw(st.integers(1, 3))):
        places = [place for place in _places(document) if place]
        place = draw(st.sampled_from(places))
        if draw(st.integers(0, 9)):
            document = _changed(document, place, draw(values))
        elif len(place) == 1:
            document = {key: value for key, value in document.items() if key != place[0]}
            if not document:
                break
    if draw(st.integers(0, 9)) == 0:
        document = {**document, draw(texts): draw(values)}
    return sealed(document)
