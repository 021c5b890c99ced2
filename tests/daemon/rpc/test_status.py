"""How errors travel: whole, or cut so that they always arrive."""

from __future__ import annotations

import json

import pytest

from cairn_api.errors import ConfigurationError, VersionError
from cairn_api.names import check_tag
from cairnd.rpc.status import fields_of, to_proto

_METADATA_BYTES = 8 * 1024
"""What gRPC lets through of all metadata together, unless it is told otherwise."""


def test_an_ordinary_error_travels_whole() -> None:
    error = VersionError("no such version", hint="run `cairn list`", context={"job": "run-7", "näme": "é"})
    told = to_proto(error)
    assert (told.error_class, told.message, told.hint) == ("VersionError", error.message, error.hint)
    assert dict(told.context) == error.context


@pytest.mark.parametrize("text", ["x" * 10**6, "é" * 10**6, "\U0001f600" * 10**6, "\ud800" * 10**6, "a\ud800b"])
def test_what_an_error_quotes_is_cut_to_what_can_be_sent(text: str) -> None:
    error = ConfigurationError(text, hint=text, context={"job": text, "rank": 3})
    told = to_proto(error)
    assert told.ByteSize() < _METADATA_BYTES / 2
    assert told.message[:1] == told.hint[:1] != ""
    assert len(json.dumps(fields_of(error))) < 64 * 1024


def test_a_name_that_is_refused_is_not_quoted_in_full() -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_tag("x" * 10**6)
    assert len(caught.value.message) < 1000
