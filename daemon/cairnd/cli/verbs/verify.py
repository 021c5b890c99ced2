"""Read copies again and compare them with their manifests.

Without --deep: manifests, names and sizes. With --deep: every digest of every byte. VERSION is a version's name or a
tag; without it all versions of the job are checked. The daemon takes copies that it finds damaged out of use, keeps
that in mind over restarts, and makes them again from another tier that has the version; with --store nothing is
changed. Each damaged copy comes with its next step. Leaves with 1 if anything is damaged. A copy at which nobody
could look (its bucket is away, say) keeps no other from being checked; the error comes at the end.

JSON: {"job", "deep": bool, "versions_checked": int, "copies_checked": int, "read_bytes": int,
"findings": [{"job", "tag", "epoch", "sequence", "version", "tier", "path", "problem", "next_step"}, ...]}; a finding
with an empty path concerns a whole copy.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from cairn_api.errors import CairnError, VersionError
from cairn_api.names import VersionId
from cairnd.cli.documents import name_document
from cairnd.cli.invocation import Invocation
from cairnd.cli.output import Advance
from cairnd.cli.source import Check
from cairnd.cli.text import count_text, size_text, wrapped
from cairnd.model import Tier, Version
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
    failure: CairnError | None = None
    with output.progress("verifying") as advance:
        totals = _Totals(invocation, advance)
        try:
            invocation.source().verify(job, text, deep=arguments.deep, report=totals.add)
        except CairnError as error:
            if not totals.copies:
                raise
            failure = error
    if not totals.versions and not totals.findings:
        raise VersionError(f"job {job!r} has no versions: nothing was verified", hint="run `cairn list`")
    steps = next_steps(invocation, job, totals.findings)
    if output.as_json:
        output.json(
            {
                "job": job,
                "deep": arguments.deep,
                "versions_checked": totals.versions,
                "copies_checked": totals.copies,
                "read_bytes": totals.read_bytes,
                "findings": [
                    {
                        **name_document(item.job, item.id), "tier": item.tier, "path": item.path,
                        "problem": item.problem, "next_step": steps[item.id, item.tier],
                    }
                    for item in totals.findings
                ],
            }
        )  # fmt: skip
    else:
        for (version, tier), step in steps.items():
            output.lines(wrapped(step, first=f"{version} in {tier}: ", indent="  "))
        read = f", {size_text(totals.read_bytes)} read" if arguments.deep else ""
        result = count_text(len(totals.findings), "problem") if totals.findings else "no problems"
        output.text(
            f"{count_text(totals.versions, 'version')}, {count_text(totals.copies, 'copy')} checked{read}: {result}"
        )
    if failure is not None:
        if not totals.findings:
            raise failure
        output.error(failure, FOUND_DAMAGE)
    return FOUND_DAMAGE if totals.findings else 0


def next_steps(invocation: Invocation, job: str, findings: Sequence[Finding]) -> dict[tuple[VersionId, Tier], str]:
    """What is done, or is to be done, about each damaged copy."""
    copies = dict.fromkeys((finding.id, finding.tier) for finding in findings)
    if not copies:
        return {}
    if invocation.arguments.store is not None:
        return {(version, tier): _OFFLINE[tier].format(version=version, job=job) for version, tier in copies}
    known = {item.version.id: item.version for item in invocation.source().versions(job).versions}
    return {(version, tier): _online(known.get(version), version, job, tier) for version, tier in copies}


_OFFLINE = {
    Tier.TIER1: "run `cairn verify {version} --deep --job {job}` with cairnd running: it takes this copy out of use "
    "and makes it again from tier 2, if that has the version (`cairn verify --store URL`); else choose another version",
    Tier.TIER2: "run `cairn verify {version} --deep --job {job}` on a node whose tier 1 has the version: its daemon "
    "uploads it again; if there is none, choose another version",
}


def _online(version: Version | None, name: VersionId, job: str, tier: Tier) -> str:
    other = Tier.TIER2 if tier is Tier.TIER1 else Tier.TIER1
    if version is None:
        return f"it is not used any more; see with `cairn list --job {job}` what is intact"
    if version.has(tier):
        return f"it was made again from {other} meanwhile"
    if version.has(other) and tier is Tier.TIER1:
        return (
            "it is out of use, and made again from tier2 in the background; loads read tier2 meanwhile, and what was "
            "damaged goes to .cairn/quarantine in tier 1"
        )
    if version.has(other):
        again = (
            "and is uploaded again from tier1" if version.wants_tier2 else f"(`cairn persist {name}` uploads it again)"
        )
        return f"it is out of use {again}; loads read tier1"
    if version.has(Tier.MEMORY):
        return f"only memory has an intact copy: save it now with `cairn export {name} DIR --job {job}`"
    return f"no tier is known to have an intact copy: choose another version (`cairn list --job {job}`)"


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
