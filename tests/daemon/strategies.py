"""Names as users and other nodes may choose them."""

from __future__ import annotations

import string

from hypothesis import strategies as st

from cairn_api.names import VersionId

_FIRST = string.ascii_letters + string.digits
_MORE = _FIRST + "._-"


def _component(first: str, more: str, longest: int) -> st.SearchStrategy[str]:
    return st.builds(str.__add__, st.sampled_from(first), st.text(more, max_size=longest - 1))


jobs = _component(_FIRST, _MORE, 128)
tags = jobs
paths = st.lists(_component(_FIRST + "_", _MORE + "+=@", 40), min_size=1, max_size=5).map("/".join)
versions = st.builds(VersionId, st.integers(1, 999_999_999), st.integers(1, 999_999_999), tags)
hostile = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", ".", "..", "/", "../x", "a/../b", "a//b", "/abs", "a/", ".cairn", ".cairn/x", "a/.cairn/x", "a\0b", "a\nb",
         "a\n", "x" * 300, "ünïcode", "a/..", "\ud800", "con:", "~root", "$(x)", "by-rank/../../x", "a/./b"]
    ),
)  # fmt: skip
"""Mostly not names."""
