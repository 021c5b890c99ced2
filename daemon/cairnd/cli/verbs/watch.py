"""Print events: what the daemon remembers, and with --follow each new one as it happens, until interrupted.

JSON: one object per line, {"number": int, "time_s", "event", "job", "version", "fields": {name: text}}. Numbers grow by
one; a gap means that events of other jobs lie between, or that the reader was too slow.
"""

from __future__ import annotations

from argparse import ArgumentParser

from cairn_api.v1.admin_pb2 import Event
from cairnd.cli.documents import Document
from cairnd.cli.invocation import Invocation
from cairnd.cli.text import time_text, wrapped

NAME = "watch"
HELP = "print events, with --follow as they happen"


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("--follow", action="store_true", help="go on with new events until interrupted")


def run(invocation: Invocation) -> int:
    for event in invocation.daemon().watch(invocation.arguments.job, follow=invocation.arguments.follow):
        if invocation.output.as_json:
            invocation.output.json(document(event))
        else:
            invocation.output.lines(render(event))
    return 0


def document(event: Event) -> Document:
    """See the module."""
    return {
        "number": event.number,
        "time_s": round(event.time_s, 3),
        "event": event.name,
        "job": event.job,
        "version": event.version,
        "fields": dict(event.fields),
    }


def render(event: Event) -> list[str]:
    """One event, wrapped."""
    subject = [name for name in (event.job, event.version) if name]
    fields = [f"{name}={text}" for name, text in sorted(event.fields.items())]
    words = [event.name, *(["/".join(subject)] if subject else []), *fields]
    return wrapped(" ".join(words), first=f"{time_text(event.time_s)} ", indent="    ")
