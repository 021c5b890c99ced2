"""Exempt a version from retention in every tier, until `cairn unpin`.

VERSION is a version's name or a tag (its newest version).

JSON: {"job", "tag", "epoch", "sequence", "version", "pinned": true, "changed": bool}.
"""

from __future__ import annotations

from argparse import ArgumentParser

from cairn_api.v1.admin_pb2 import PinReply
from cairnd.cli import translate
from cairnd.cli.documents import name_document
from cairnd.cli.invocation import Invocation

NAME = "pin"
HELP = "exempt a version from retention"


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("version", metavar="VERSION", help="a version's name, or a tag")
    parser.add_argument("--reason", default="", help="kept with the pin, for whoever wonders later")


def run(invocation: Invocation) -> int:
    daemon, job = invocation.daemon(), invocation.job()
    text = invocation.version(job, invocation.arguments.version)
    answer(invocation, job, daemon.pin(job, text, invocation.arguments.reason), pinned=True)
    return 0


def answer(invocation: Invocation, job: str, reply: PinReply, *, pinned: bool) -> None:
    """Say what a pin or its removal did."""
    version = translate.version_id(reply.id)
    if invocation.output.as_json:
        invocation.output.json({**name_document(job, version), "pinned": pinned, "changed": reply.changed})
        return
    verdict = ("is" if reply.changed else "was already") if pinned else ("is no longer" if reply.changed else "was not")
    invocation.output.text(f"{version} {verdict} pinned.")
