"""Have automatic resume pass a version over, or take it again.

A version whose bytes are intact may still be one to stay away from: its loss has exploded, or trainings die on it. The
daemon itself marks one on which several launches in a row died before they had saved anything (the setting
pass_over_after_resumes). A version that is passed over is still loaded by name; if all are, resume takes the newest of
them as the last resort, and the command warns of that.

VERSION is a version's name or a tag (its newest version).

JSON: {"job", "tag", "epoch", "sequence", "version", "passed_over": text, "changed": bool,
"sound_versions": int}; the last: how many versions of the job automatic resume takes before any that is passed over.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError

from cairnd.cli import translate
from cairnd.cli.documents import name_document
from cairnd.cli.invocation import Invocation

NAME = "mark"
HELP = "have automatic resume pass a version over, or take it again"


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("version", metavar="VERSION", help="a version's name, or a tag")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--pass-over", type=_reason, metavar="REASON", help="pass it over; the reason is shown to whoever wonders later"
    )
    how.add_argument("--sound", action="store_true", help="take it again")


def run(invocation: Invocation) -> int:
    arguments = invocation.arguments
    daemon, job = invocation.daemon(), invocation.job()
    reason = "" if arguments.sound else arguments.pass_over
    reply = daemon.mark(job, invocation.version(job, arguments.version), reason)
    version = translate.version_id(reply.id)
    versions = [item.version for item in daemon.versions(job).versions]
    sound = sum(item.restorable and not item.passed_over for item in versions)
    if invocation.output.as_json:
        found = {"passed_over": reason, "changed": reply.changed, "sound_versions": sound}
        invocation.output.json({**name_document(job, version), **found})
    elif reason:
        invocation.output.text(f"Automatic resume passes {version} over.")
        if not sound:
            invocation.output.warn(
                f"no other version of {job} is left, so resume takes the newest that is passed over, as the last "
                "resort; give the training a new job name to begin from nothing"
            )
    else:
        verdict = f"Automatic resume takes {version} again." if reply.changed else f"{version} was not marked."
        invocation.output.text(verdict)
    return 0


def _reason(text: str) -> str:
    if not text.strip():
        raise ArgumentTypeError("it is a text that tells whoever wonders later why")
    return text
