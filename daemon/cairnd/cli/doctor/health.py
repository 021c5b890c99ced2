"""The daemon itself: does it run, does it answer, is it of this release, and what does it complain of."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from cairn_api.errors import VersionError
from cairn_api.wire import PROTOCOL_VERSION
from cairnd import __version__, layout
from cairnd.cli.doctor.findings import Finding, ok, problem, warning
from cairnd.cli.doctor.stored import Stored
from cairnd.cli.doctor.subject import Subject
from cairnd.cli.text import age_text, time_text
from cairnd.manifest import NOTE_FORMAT, decode
from cairnd.tiers.errors import NotFoundError

CHECK, VERSIONS, CLOCK = "daemon", "versions", "clock"
_NO_TIER2 = "no tier 2 is configured"
"""How the daemon begins what the check of the configuration says too."""
_AHEAD_S = 60.0
_JUMP_S = 1.0


def check(subject: Subject) -> Iterator[Finding]:
    """Whether it runs, and each of its own problems."""
    daemon, status = subject.daemon, subject.status
    if daemon is None:
        yield warning(
            CHECK,
            f"no daemon listens in {subject.runtime_dir}",
            "start it: systemctl start cairnd, or `cairnd --config FILE`; if one runs, give its --runtime-dir",
        )
        return
    if subject.unanswered is not None:
        message = f"process {daemon.pid} listens in {subject.runtime_dir} and gives no report"
        yield replace(subject.unanswered, message=f"{message}: {subject.unanswered.message}")
        return
    assert status is not None, "a daemon reports or fails to"
    yield ok(CHECK, f"process {daemon.pid} has run for {age_text(status.uptime_s)} and answers")
    if status.draining:
        yield warning(
            CHECK, "it is draining and takes no new saves", "systemctl restart cairnd, when the drain is done"
        )
    for text in status.problems:
        if not text.startswith(_NO_TIER2):
            fix = "do what it says; it is gone from here and from `cairn status` then"
            # A version that somebody, or the daemon, marked is as it should be.
            yield (warning if "automatic resume passes" in text else problem)(CHECK, text, fix)


def check_versions(subject: Subject, stored: Stored) -> Iterator[Finding]:
    """Releases of command and daemon, the protocol, and the layout of tier 1."""
    status = subject.status
    if status is not None and status.protocol != PROTOCOL_VERSION:
        yield problem(
            VERSIONS,
            f"the daemon speaks protocol {status.protocol}, this release {PROTOCOL_VERSION}",
            f"install cairn {status.daemon_version} here and for trainers, or restart the daemon as {__version__}",
        )
    elif status is not None and status.daemon_version != __version__:
        yield warning(
            VERSIONS,
            f"the daemon is of release {status.daemon_version}, this command of {__version__}",
            "restart the daemon, which has perhaps been updated since it started",
        )
    else:
        yield ok(
            VERSIONS,
            f"this command is of release {__version__}{', and so is the daemon' if status is not None else ''}",
        )
    try:
        document = decode(stored.tier.read_small(layout.LAYOUT_KEY), NOTE_FORMAT, layout.LAYOUT_KEY)
    except NotFoundError:
        yield from _no_layout(subject)
        return
    except VersionError as error:
        yield problem(
            VERSIONS,
            f"{subject.tier1 / layout.LAYOUT_KEY} cannot be read: {error.message}",
            "restore it from a backup, or move it away: the tree then gets a new node id",
        )
        return
    if document.get("layout") == layout.LAYOUT_VERSION:
        yield ok(VERSIONS, f"tier 1 has layout {layout.LAYOUT_VERSION}, which this release reads and writes")
    else:
        yield problem(
            VERSIONS,
            f"tier 1 has layout {document.get('layout')!r}, this release reads layout {layout.LAYOUT_VERSION}",
            "run the release of Cairn that wrote it, or give this daemon an empty tier1_path",
        )


def _no_layout(subject: Subject) -> Iterator[Finding]:
    if (subject.tier1 / layout.VERSIONS).is_dir():
        yield warning(
            VERSIONS,
            f"{subject.tier1} holds versions and no {layout.LAYOUT_KEY}: its next daemon takes it for a new node's",
            "restore that file from a backup if this node's identity matters",
        )
    else:
        yield ok(VERSIONS, "tier 1 is empty")


def check_clock(stored: Stored, begun_wall_s: float, begun_s: float) -> Iterator[Finding]:
    """Whether the clock jumped while the command ran, or was set back since a version was saved."""
    jumped_s = (time.time() - begun_wall_s) - (time.monotonic() - begun_s)
    fix = "synchronise it smoothly: chronyd, or systemd-timesyncd"
    if abs(jumped_s) > _JUMP_S:
        yield warning(CLOCK, f"the clock jumped by {jumped_s:+.1f} s while this command ran", fix)
    versions = [version for found in stored.by_job().values() for version in found]
    newest = max(versions, key=lambda version: version.created_s, default=None)
    if newest is not None and newest.created_s > time.time() + _AHEAD_S:
        yield warning(
            CLOCK,
            f"{newest} was saved at {time_text(newest.created_s)}, which is still to come: the clock was wrong then "
            "or is now; ages are wrong, the order of versions is not",
            fix,
        )
