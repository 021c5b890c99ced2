"""Look at everything that a daemon needs, with the daemon up, down or never started.

Configuration, permissions, space, tier 1's file system, the bucket (it is written to, and cleaned), clocks, shared
memory, limits, huge pages, leftovers, versions, the daemon's own problems. Each finding that is not ok comes with
its fix. Nothing is changed, and nothing is waited for longer than half a minute.

Settings are those of the running daemon; with --config, or flags of cairnd after `--`, or without a daemon, those
that one would start with. Leaves with 0 if there is no problem (warnings are none), else with the status of the
gravest.

JSON: {"healthy": bool, "problems": int, "warnings": int, "settings_from": text, "runtime_dir", "tier1_path",
"persistent_storage_path", "daemon": {"pid": int, "uid": int, "version": text or null} or null, "exit_status": int,
"findings": [{"check", "level": "ok"|"warning"|"problem", "message", "fix", "kind": text or null}, ...]}; fix is
empty where level is ok; kind, of problems, is as in errors.
"""

from __future__ import annotations

import os
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cairn_api.errors import ConfigurationError, ErrorKind
from cairn_api.v1.admin_pb2 import StatusReply
from cairn_api.wire import DEFAULT_RUNTIME_DIR
from cairnd.cli.doctor import bucket, configuration, disk, health, leftovers, permissions, shared_memory
from cairnd.cli.doctor.findings import Check, Finding, Level, run_checks
from cairnd.cli.doctor.stored import Stored
from cairnd.cli.doctor.subject import Subject, ask_status, choose_settings
from cairnd.cli.documents import Document
from cairnd.cli.exits import EXIT_STATUS
from cairnd.cli.invocation import Invocation
from cairnd.cli.text import count_text, wrapped

NAME = "doctor"
HELP = "look at what a daemon needs; each finding with its fix"

_GRAVEST = (
    ErrorKind.FIX_CONFIGURATION,
    ErrorKind.GIVE_UP,
    ErrorKind.CHOOSE_ANOTHER_VERSION,
    ErrorKind.WAIT,
    ErrorKind.RETRY,
)
STATUS_TIMEOUT_S = 10.0
DEADLINE_S = 30.0
"""For all checks together: a store needs a few time-outs of its own to be sure that nobody answers."""

_DISK = "look at dmesg and at the mount of tier1_path: a server that is gone, or a disk that fails"
_BUCKET = "see whether the endpoint of persistent_storage_path answers from this node (curl), and through which proxy"
_HERE = "run it again; report it if it stays so"


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="the daemon's configuration, before it runs with it")
    parser.add_argument(
        "--pid",
        metavar="PID",
        type=int,
        action="append",
        default=[],
        help="a trainer whose limits to look at; may be repeated",
    )
    parser.add_argument("flags", metavar="FLAG", nargs="*", help="after `--`: flags as cairnd gets them")


def run(invocation: Invocation) -> int:
    arguments, output = invocation.arguments, invocation.output
    if arguments.store is not None:
        raise ConfigurationError(
            "`cairn doctor` looks at a machine, not at a store",
            hint="`cairn verify --store` reads a store; `cairn doctor -- --tier1-path DIR` looks at a daemon's folder",
        )
    begun_wall_s, begun_s = time.time(), time.monotonic()
    usual = os.environ.get("CAIRN_RUNTIME_DIR") or DEFAULT_RUNTIME_DIR
    subject = choose_settings(
        arguments.config,
        arguments.flags,
        Path(arguments.runtime_dir),
        os.environ,
        explicit_runtime_dir=arguments.runtime_dir != usual,
        pids=arguments.pid,
    )
    subject = with_status(subject)
    findings = list(run_checks(checks_of(subject, begun_wall_s, begun_s), DEADLINE_S))
    status = exit_status(findings)
    if output.as_json:
        output.json(document(subject, findings, status))
    else:
        output.lines(render(findings))
    return status


def with_status(subject: Subject) -> Subject:
    """The subject with the daemon's report, or with why there is none."""
    if subject.daemon is None:
        return subject
    answer: list[StatusReply] = []

    def ask() -> Sequence[Finding]:
        answer.append(ask_status(subject.runtime_dir))
        return ()

    hangs = "see what it does: journalctl -u cairnd; a daemon that hangs is restarted by its unit's watchdog"
    for failure in run_checks([Check(health.CHECK, ask, hangs)], STATUS_TIMEOUT_S):
        return replace(subject, unanswered=failure)
    return subject.with_status(answer[0])


def checks_of(subject: Subject, begun_wall_s: float, begun_s: float) -> list[Check]:
    """All checks, in the order in which they are shown."""
    stored = Stored(subject.tier1)
    return [
        Check("configuration", partial(configuration.check, subject), _DISK),
        Check(health.CHECK, partial(health.check, subject), _HERE),
        Check(health.VERSIONS, partial(health.check_versions, subject, stored), _DISK),
        Check(permissions.CHECK, partial(permissions.check, subject), _DISK),
        Check(disk.SPACE, partial(disk.check_space, subject, stored), _DISK),
        Check(disk.FILE_SYSTEM, partial(disk.check_file_system, subject), _DISK),
        Check(bucket.CHECK, partial(bucket.check, subject), _BUCKET),
        Check(health.CLOCK, partial(health.check_clock, stored, begun_wall_s, begun_s), _DISK),
        Check(shared_memory.CHECK, partial(shared_memory.check, subject), _HERE),
        Check(shared_memory.LIMITS, partial(shared_memory.check_limits, subject), _HERE),
        Check(shared_memory.HUGE_PAGES, partial(shared_memory.check_huge_pages, subject), _HERE),
        Check(leftovers.CHECK, partial(leftovers.check, subject, stored), _DISK),
    ]


def exit_status(findings: list[Finding]) -> int:
    """0 without problems, else the status of the gravest: what to mend comes before what to wait for."""
    kinds = {finding.kind for finding in findings}
    return next((EXIT_STATUS[kind] for kind in _GRAVEST if kind in kinds), 0)


def document(subject: Subject, findings: list[Finding], status: int) -> Document:
    """See the module."""
    daemon = subject.daemon
    return {
        "healthy": status == 0,
        "problems": sum(finding.level is Level.PROBLEM for finding in findings),
        "warnings": sum(finding.level is Level.WARNING for finding in findings),
        "settings_from": subject.origin,
        "runtime_dir": str(subject.runtime_dir),
        "tier1_path": str(subject.tier1),
        "persistent_storage_path": subject.settings.persistent_storage_path,
        "daemon": None
        if daemon is None
        else {
            "pid": daemon.pid,
            "uid": daemon.uid,
            "version": subject.status.daemon_version if subject.status is not None else None,
        },
        "exit_status": status,
        "findings": [
            {
                "check": finding.check,
                "level": finding.level.value,
                "message": finding.message,
                "fix": finding.fix,
                "kind": finding.kind.value if finding.kind is not None else None,
            }
            for finding in findings
        ],
    }


def render(findings: list[Finding]) -> list[str]:
    """What is ok first, problems last: the end of the text is what stays in sight."""
    lines: list[str] = []
    order = (Level.OK, Level.WARNING, Level.PROBLEM)
    for finding in sorted(findings, key=lambda finding: order.index(finding.level)):
        title = f"{finding.level.value:<8} {finding.check}: "
        lines += wrapped(finding.message, first=title, indent=" " * 9)
        if finding.fix:
            lines += wrapped(finding.fix, first=" " * 9 + "fix: ", indent=" " * 14)
    problems = sum(finding.level is Level.PROBLEM for finding in findings)
    warnings = sum(finding.level is Level.WARNING for finding in findings)
    lines.append(f"{count_text(problems, 'problem')}, {count_text(warnings, 'warning')}")
    return lines
