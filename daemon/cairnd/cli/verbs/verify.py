"""Read copies again and compare them with their manifests.

Without --deep: manifests, names and sizes. With --deep: every digest of every byte. VERSION is a version's name or a
tag; without it all versions of the job are checked. The daemon takes copies that it finds damaged out of use; with
--store nothing is changed. Leaves with 1 if anything is damaged.

JSON: {"job", "deep": bool, "versions_checked": int, "copies_checked": int, "read_bytes": int,
"findings": [{"job", "tag", "epoch", "sequence", "version", "tier", "path", "problem"}, ...]}; a finding with an empty
path concerns a whole copy.
"""

from __future__ import annotations

from argparse import ArgumentParser

from cairnd.cli.documents import name_document
from cairnd.cli.invocation import Invocation
from cairnd.cli.output import Advance
from cairnd.cli.source import Check
from cairnd.cli.text import count_text, size_text, wrapped
from cairnd.upkeep.verifier import Finding

NAME = "verify"
HELP = "read copies again and compare digests"
FOUND_DAMAGE = 1


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("version", metavar="VERSION", nargs="?", help="a version's name, or a tag; default: all")
    parser.add_argument("--deep", action="store_true", help="compare every digest, not only names and sizes")


def run(invocation: Invocation) -> int:
    arguments, output = invocation.arguments, invocation.output
    job = invocation.job()
    text = invocation.version(job, arguments.version) if arguments.version else None
    with output.progress("verifying") as advance:
        totals = _Totals(invocation, advance)
        invocation.source().verify(job, text, deep=arguments.deep, report=totals.add)
    if output.as_json:
        output.json(
            {
                "job": job,
                "deep": arguments.deep,
                "versions_checked": totals.versions,
                "copies_checked": totals.copies,
                "read_bytes": totals.read_bytes,
                "findings": [
                    {**name_document(item.job, item.id), "tier": item.tier, "path": item.path, "problem": item.problem}
                    for item in totals.findings
                ],
            }
        )
    else:
        read = f", {size_text(totals.read_bytes)} read" if arguments.deep else ""
        result = count_text(len(totals.findings), "problem") if totals.findings else "no problems"
        output.text(
            f"{count_text(totals.versions, 'version')}, {count_text(totals.copies, 'copy')} checked{read}: {result}"
        )
    return FOUND_DAMAGE if totals.findings else 0


class _Totals:
    """Adds up what is reported, and prints findings as they come."""

    def __init__(self, invocation: Invocation, advance: Advance) -> None:
        self._output = invocation.output
        self._advance = advance
        self.versions = 0
        self.copies = 0
        self.read_bytes = 0
        self.findings: list[Finding] = []

    def add(self, check: Check) -> None:
        # Messages that only tell progress carry no counts.
        self.versions = max(self.versions, check.versions_checked)
        self.copies = max(self.copies, check.copies_checked)
        self.read_bytes = max(self.read_bytes, check.done_bytes)
        self.findings += check.findings
        self._advance(check.done_bytes, check.total_bytes)
        if not self._output.as_json:
            for finding in check.findings:
                self._output.lines(finding_lines(finding))


def finding_lines(finding: Finding) -> list[str]:
    """One finding, wrapped."""
    where = f"{finding.id} in {finding.tier.value}"
    path = f": {finding.path}" if finding.path else ""
    return wrapped(f"{where}{path}: {finding.problem}", first="damaged: ", indent="  ")
