"""Ask for a version to be copied to tier 2, whatever its own flag says.

VERSION is a version's name or a tag; without it, the newest committed version. The copy is made in the background:
`cairn list` shows it, `cairn drain` waits for it.

JSON: {"job", "tag", "epoch", "sequence", "version", "already": bool, "hindrance"}; already: it is in tier 2 or was
asked for before; hindrance: what keeps it from getting there at present, or empty.
"""

from __future__ import annotations

from argparse import ArgumentParser

from cairnd.cli import translate
from cairnd.cli.daemon_client import Daemon
from cairnd.cli.documents import name_document
from cairnd.cli.invocation import Invocation
from cairnd.model import Tier, Version

NAME = "persist"
HELP = "ask for a version to be copied to tier 2"


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("version", metavar="VERSION", nargs="?", help="a version's name, or a tag; default: the newest")


def run(invocation: Invocation) -> int:
    daemon, job = invocation.daemon(), invocation.job()
    wanted: str | None = invocation.arguments.version
    reply = daemon.persist(job, invocation.version(job, wanted) if wanted else None)
    version = translate.version_id(reply.id)
    hindrance = _hindrance(daemon, daemon.describe(job, str(version)))
    output = invocation.output
    if output.as_json:
        output.json({**name_document(job, version), "already": reply.already, "hindrance": hindrance})
        return 0
    if hindrance:
        output.text(f"{version} was asked for and is tried again now and then.")
        output.warn(f"it does not get to tier 2 at present: {hindrance}")
    elif reply.already:
        output.text(f"{version} is in tier 2, or on its way there, already.")
    else:
        output.text(f"{version} will be copied to tier 2.")
    return 0


def _hindrance(daemon: Daemon, version: Version) -> str:
    """What the last attempt at this version failed with, or else the last one at the daemon's own bucket."""
    if version.has(Tier.TIER2):
        return ""
    copy = version.copy(Tier.TIER2)
    if copy.error:
        return copy.error
    status = daemon.status()
    return "" if status.tier2_reachable else status.tier2_error
