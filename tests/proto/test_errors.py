"""Errors survive the way between processes, and each tells what to do next."""

from __future__ import annotations

import copy
import pickle

import pytest

from cairn_api.errors import ERRORS, CairnError, ErrorKind, VersionError


class OfADaemonError(VersionError):
    """A refinement, as tiers have."""


@pytest.mark.parametrize("kind", [*ERRORS.values(), OfADaemonError])
def test_an_error_survives_pickling_whole(kind: type[CairnError]) -> None:
    error = kind("what happened", hint="do this", context={"rank": 3, "job": "run-7"})
    for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):  # noqa: S301  (our own bytes)
        assert type(again) is kind
        assert (again.message, again.hint, again.context) == ("what happened", "do this", {"rank": "3", "job": "run-7"})
        assert str(again) == str(error) == "what happened. Next step: do this"


def test_without_a_hint_nothing_is_appended() -> None:
    assert str(ERRORS["InternalError"]("x")) == "x"


def test_every_kind_of_answer_is_covered_and_no_class_is_missing() -> None:
    assert {cls.kind for cls in ERRORS.values()} == set(ErrorKind)
    own = {cls for cls in CairnError.__subclasses__() if cls.__module__ == "cairn_api.errors"}
    assert set(ERRORS.values()) == own
    assert all(ERRORS[cls.__name__] is cls and cls.__doc__ for cls in own)
