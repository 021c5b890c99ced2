"""Ask for a version to be copied to tier 2, whatever its own flag says.

VERSION is a version's name or a tag; without it, the newest committed version. The copy is made in the background:
`cairn list` shows it, `cairn drain` waits for it.

JSON: {"job", "tag", "epoch", "sequence", "version", "already": bool}; already: it is in tier 2 or was asked for before.
"""

from __future__ import annotations

from argparse import ArgumentParser

from cairnd.cli import translate
from cairnd.cli.documents import name_document
from cairnd.cli.invocation import Invocation

NAME = "persist"
HELP = "ask for a version to be copied to tier 2"


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("version", metavar="VERSION", nargs="?", help="a version's name, or a tag; default: the newest")


def run(invocation: Invocation) -> int:
    daemon, job = invocation.daemon(), invocation.job()
    wanted: str | None = invocation.arguments.version
    reply = daemon.persist(job, invocation.version(job, wanted) if wanted else None)
    version = translate.version_id(reply.id)
    if invocation.output.as_json:
        invocation.output.json({**name_document(job, version), "already": reply.already})
    elif reply.already:
        invocation.output.text(f"{version} is in tier 2, or on its way there, already.")
    else:
        invocation.output.text(f"{version} will be copied to tier 2.")
    return 0
