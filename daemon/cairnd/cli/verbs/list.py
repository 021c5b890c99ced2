"""Show versions, newest first.

STATE is where a version stands. TIERS names where its bytes are: mem (memory), t1 (local disk), peer, t2 (object
storage); t2~ is being copied, t2! failed (`cairn show` says why). A version that is `waiting` is on its way to tier 2;
one that is `passed-over` is not taken by automatic resume (`cairn mark`).
Long tags are shortened; e00007-s000042 alone is enough to name a version to any other verb.

JSON: {"versions": [VERSION, ...], "warnings": [text, ...]} with VERSION =
{"job", "tag", "epoch", "sequence", "version", "state", "size_bytes", "created_s", "world_size", "ranks": [int, ...],
"persist": bool, "pinned": bool, "passed_over": text, "save_dir",
"copies": {TIER: {"state", "error", "damaged": bool}}}.
"""

from __future__ import annotations

from argparse import ArgumentParser
from itertools import groupby

from cairnd.cli.documents import version_document, waiting
from cairnd.cli.invocation import Invocation
from cairnd.cli.source import Listed
from cairnd.cli.text import VERSION_COLUMN, WIDTH, Column, age_text, size_text, table
from cairnd.model import CopyState, Tier, Version

NAME = "list"
HELP = "show versions, newest first"

_COLUMNS = (
    VERSION_COLUMN,
    Column("STATE"),
    Column("SIZE", right=True),
    Column("TIERS"),
    Column("AGE", right=True),
    Column("FLAGS"),
)
_TIERS = {Tier.MEMORY: "mem", Tier.TIER1: "t1", Tier.PEER: "peer", Tier.TIER2: "t2"}
_MARKS = {CopyState.VERIFIED: "", CopyState.COPYING: "~", CopyState.FAILED: "!"}


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("--wide", action="store_true", help="never shorten a name, however long the lines get")


def run(invocation: Invocation) -> int:
    listing = invocation.source().versions(invocation.arguments.job)
    output = invocation.output
    if output.as_json:
        versions = [version_document(item.version, item.size_bytes) for item in listing.versions]
        output.json({"versions": versions, "warnings": listing.warnings})
        return 0
    for warning in listing.warnings:
        output.warn(warning)
    width = None if invocation.arguments.wide else WIDTH
    output.lines(render(listing.versions, invocation.now_s, width, knows_tier2=listing.knows_tier2))
    return 0


def render(versions: list[Listed], now_s: float, width: int | None = WIDTH, *, knows_tier2: bool = True) -> list[str]:
    """A table per job. Nothing is shown as waiting where nobody knows what is in tier 2."""
    if not versions:
        return ["There are no versions."]
    lines: list[str] = []
    for job, group in groupby(versions, key=lambda item: item.version.job):
        items = list(group)
        rows = [_row(item, now_s, knows_tier2=knows_tier2) for item in items]
        title = table([Column(f"job {job}", shrinks=True)], [], width)
        lines += [*([""] if lines else []), *title, *table(_COLUMNS, rows, width)]
    return lines


def _row(item: Listed, now_s: float, *, knows_tier2: bool) -> tuple[str, ...]:
    version = item.version
    flags = [
        *(["pinned"] if version.pinned else []),
        *(["waiting"] if knows_tier2 and waiting(version) else []),
        *(["passed-over"] if version.passed_over else []),
    ]
    age = age_text(now_s - version.created_s) if version.created_s else "?"
    return str(version.id), version.state.value, size_text(item.size_bytes), tiers_text(version), age, " ".join(flags)


def tiers_text(version: Version) -> str:
    """Where the version's bytes are."""
    return " ".join(
        name + _MARKS[version.copy(tier).state] for tier, name in _TIERS.items() if version.copy(tier).state in _MARKS
    )
