"""Let retention apply to a pinned version again. Nothing is deleted at once.

VERSION is a version's name or a tag (its newest version).

JSON: {"job", "tag", "epoch", "sequence", "version", "pinned": false, "changed": bool}.
"""

from __future__ import annotations

from argparse import ArgumentParser

from cairnd.cli.invocation import Invocation
from cairnd.cli.verbs.pin import answer

NAME = "unpin"
HELP = "let retention apply to a pinned version again"


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("version", metavar="VERSION", help="a version's name, or a tag")


def run(invocation: Invocation) -> int:
    daemon, job = invocation.daemon(), invocation.job()
    answer(invocation, job, daemon.unpin(job, invocation.version(job, invocation.arguments.version)), pinned=False)
    return 0
