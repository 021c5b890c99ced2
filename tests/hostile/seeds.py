"""The one number that this folder's random choices follow from."""

from __future__ import annotations

import os
import random
import secrets

SEED = int(os.environ.get("CAIRN_CRASH_SEED") or secrets.randbelow(10**6))
"""Printed after the run; set it to choose the same inputs again (what a daemon answers depends on its timing too)."""


def choices(*of: object) -> random.Random:
    """A source of choices for one thing among many, the same for the same seed."""
    return random.Random("/".join(map(str, (SEED, *of))))  # noqa: S311 - nothing here is secret
