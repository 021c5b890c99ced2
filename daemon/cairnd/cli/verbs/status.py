"""Show the daemon's health and backlog, and each problem with its next step.

JSON: {"daemon_version", "protocol": int, "node", "uptime_s", "draining": bool, "clients": int, "open_versions": int,
"memory_limit_bytes", "memory_granted_bytes", "tier1_path", "tier1_used_bytes", "tier1_free_bytes",
"persistent_storage_path", "tier2_reachable": bool, "tier2_error", "conditional_put": bool, "backlog_versions": int,
"backlog_bytes", "oldest_unpersisted_age_s", "last_persisted": "job/version" or "", "verify_failures": int,
"skipped_saves": int, "failed_saves": int, "lost_claims": int, "problems": [text, ...]}.
"""

from __future__ import annotations

from argparse import ArgumentParser

from cairn_api.v1.admin_pb2 import StatusReply
from cairnd.cli.documents import Document
from cairnd.cli.invocation import Invocation
from cairnd.cli.text import age_text, count_text, size_text, wrapped

NAME = "status"
HELP = "show the daemon's health, backlog and problems"


def configure(parser: ArgumentParser) -> None:
    """No arguments of its own."""
    del parser


def run(invocation: Invocation) -> int:
    reply = invocation.daemon().status()
    if invocation.output.as_json:
        invocation.output.json(document(reply))
    else:
        invocation.output.lines(render(reply))
    return 0


def document(reply: StatusReply) -> Document:
    """Every field of the reply under its own name; numbers are numbers."""
    return {
        field.name: list(value) if field.name == "problems" else value
        for field in StatusReply.DESCRIPTOR.fields
        for value in [getattr(reply, field.name)]
    }


def render(reply: StatusReply) -> list[str]:
    """See the module."""
    url = reply.persistent_storage_path
    if not url:
        tier2 = "none is configured: nothing outlives this node"
    else:
        tier2 = f"{url}: {'answers' if reply.tier2_reachable else 'does not answer'}"
    draining = ", draining: no new saves" if reply.draining else ""
    waiting = f"{count_text(reply.backlog_versions, 'version')}, {size_text(reply.backlog_bytes)}"
    if reply.backlog_versions:
        waiting += f", the oldest for {age_text(reply.oldest_unpersisted_age_s)}"
    counted = (
        f"{count_text(reply.skipped_saves, 'save')} skipped, {reply.failed_saves} failed, "
        f"{count_text(reply.verify_failures, 'copy')} found damaged, {reply.lost_claims} lost their place in the queue"
    )
    facts = {
        "daemon": f"cairnd {reply.daemon_version}, up {age_text(reply.uptime_s)}{draining}",
        "node": reply.node,
        "memory": f"{size_text(reply.memory_granted_bytes)} of {size_text(reply.memory_limit_bytes)} granted, "
        f"{count_text(reply.clients, 'client')}, {count_text(reply.open_versions, 'open version')}",
        "tier 1": f"{reply.tier1_path}: {size_text(reply.tier1_used_bytes)} used, "
        f"{size_text(reply.tier1_free_bytes)} free",
        "tier 2": tier2,
        "waiting": waiting,
        "persisted": f"{reply.last_persisted} last" if reply.last_persisted else "nothing yet",
        "counted": counted,
    }
    lines: list[str] = []
    for name, text in facts.items():
        lines += wrapped(text, first=f"{name:<10} ", indent=" " * 11)
    lines += ["problems   none"] if not reply.problems else [f"{count_text(len(reply.problems), 'problem')}:"]
    for problem in reply.problems:
        lines += wrapped(problem, first="  - ", indent="    ")
    return lines
