"""What becomes of looks at copies: what they find is recorded, unless it is no longer about the copy that is there.

A look takes time, and meanwhile a copy may be deleted, or be made anew.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

from cairn_api.errors import CairnError, UnavailableError
from cairn_api.names import VersionId
from cairnd import layout
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.verified import VerifiedFiles
from cairnd.model import Copy, CopyState, Tier, Version, VersionState

_MOST_SILENT = 2
"""Copies in a row about which a place says nothing, before it is asked no more: each may take minutes to fail."""

_MOST_NAMED = 3


class Judge:
    """Shared by all who look; used from the event loop's thread."""

    def __init__(
        self, catalog: Catalog, verified: VerifiedFiles, *, is_deleting: Callable[[Version, Tier], bool]
    ) -> None:
        """*is_deleting*: whether files of a copy that the catalog still has may be gone, because all will go."""
        self._catalog = catalog
        self._verified = verified
        self._is_deleting = is_deleting

    def condemn(self, version: Version, tier: Tier, before: Copy, problem: str) -> bool:
        """Record *problem*, found by a look that began at *before*; False if that copy is going, gone or made anew."""
        now = version.copy(tier)
        # Found damaged by somebody else meanwhile, it is still the same copy.
        same = now is before or (now.damaged and now.state is CopyState.FAILED)
        known = self._catalog.get(version.job, version.id) is version and is_held(version, tier)
        if not (same and known) or self._is_deleting(version, tier):
            return False
        if tier is Tier.TIER1:  # whoever makes it again must not believe what was read of it earlier
            self._verified.forget(f"{layout.version_folder(version.job, version.id)}/")
        self._catalog.set_damaged(version, tier, problem)
        return True


def is_held(version: Version, tier: Tier) -> bool:
    """Whether *tier* should have a copy, intact or not: a failed upload has left none, and what is deleted has gone."""
    gone = version.state in (VersionState.DELETING, VersionState.ABORTED)
    return version.holds(tier) and not gone


class Unseen:
    """The copies at which nobody could look, and why. They keep nobody from looking at the others."""

    def __init__(self) -> None:
        self._copies: list[str] = []
        self._first: CairnError | None = None
        self._silent: dict[str, tuple[int, CairnError]] = {}

    def given_up(self, place: str) -> CairnError | None:
        """Why *place* (a bucket, a folder) need not be asked again; None if it is worth trying."""
        count, error = self._silent.get(place, (0, None))
        return error if count >= _MOST_SILENT else None

    def seen(self, place: str) -> None:
        """A look there succeeded."""
        self._silent.pop(place, None)

    def note(self, version: VersionId, tier: Tier, place: str, error: CairnError) -> None:
        """*error* kept somebody from looking at a copy."""
        self._copies.append(f"{version} in {tier}")
        self._first = self._first or error
        if isinstance(error, UnavailableError):
            self._silent[place] = (self._silent.get(place, (0, error))[0] + 1, error)

    def tell(self) -> None:
        """Raise the first error, with what it and others kept from being looked at; nothing if all was seen."""
        if self._first is None:
            return
        more = len(self._copies) - _MOST_NAMED
        which = ", ".join(self._copies[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
        told = copy(self._first)
        told.message = f"could not look at {which}: {self._first.message}"
        raise told from self._first
