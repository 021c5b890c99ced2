"""Apply retention now, or delete one version from every tier.

With --dry-run nothing is deleted, and what would be is printed exactly as prune itself prints it, after a first line
that says so. Pinned versions, versions that a restore reads and the last good one of a job are never deleted.

JSON: {"job", "dry_run": bool, "deletions": [{"job", "tag", "epoch", "sequence", "version", "tier", "size_bytes",
"reason"}, ...]}, oldest first.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from cairn_api.v1.admin_pb2 import Deletion
from cairnd.cli import translate
from cairnd.cli.documents import name_document
from cairnd.cli.invocation import Invocation
from cairnd.cli.text import VERSION_COLUMN, Column, count_text, size_text, table

NAME = "prune"
HELP = "apply retention now, or say what that would delete"

_COLUMNS = (
    VERSION_COLUMN,
    Column("TIER"),
    Column("SIZE", right=True),
    Column("REASON", shrinks=True, minimum=24),
)


def configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "version", metavar="VERSION", nargs="?", help="delete this version instead of applying the policy"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")


def run(invocation: Invocation) -> int:
    arguments, output = invocation.arguments, invocation.output
    daemon, job = invocation.daemon(), invocation.job()
    text = invocation.version(job, arguments.version) if arguments.version else None
    reply = daemon.prune(job, text, dry_run=arguments.dry_run)
    if output.as_json:
        deletions = [
            {
                **name_document(item.job, translate.version_id(item.id)),
                "tier": translate.tier(item.tier).value,
                "size_bytes": item.size_bytes,
                "reason": item.reason,
            }
            for item in reply.deletions
        ]
        output.json({"job": job, "dry_run": arguments.dry_run, "deletions": deletions})
        return 0
    output.lines(["Dry run: this would be deleted." if arguments.dry_run else "Deleted:", *render(reply.deletions)])
    return 0


def render(deletions: Sequence[Deletion]) -> list[str]:
    """What goes, oldest first, and the sum: the same for a dry run."""
    if not deletions:
        return ["nothing"]
    rows = [
        (str(translate.version_id(item.id)), translate.tier(item.tier).value, size_text(item.size_bytes), item.reason)
        for item in deletions
    ]
    total = size_text(sum(item.size_bytes for item in deletions))
    return [*table(_COLUMNS, rows), f"{count_text(len(deletions), 'copy')}, {total}"]
