"""Stop accepting saves and wait until everything that waits for tier 2 is there: before a node goes away.

The daemon goes on refusing saves afterwards, until it is restarted. Leaves with 1 if something did not make it within
the timeout; it stays in tier 1 and is copied when a daemon runs there again. Also if a job has no tier 2 at all: its
versions go away with the node.

JSON: {"done": bool, "versions_left": int, "bytes_left": int, "abandoned": ["job/version", ...],
"without_tier2": ["job/version", ...]}; done: nothing is left; without_tier2: the newest version of each such job.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterable

from cairn_api.errors import UnavailableError
from cairn_api.v1.admin_pb2 import DrainProgress
from cairnd.cli.documents import Document
from cairnd.cli.invocation import Invocation
from cairnd.cli.text import count_text, size_text, wrapped

NAME = "drain"
HELP = "stop accepting saves and bring what waits to tier 2"
LEFT_SOMETHING = 1


def configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--timeout", type=_seconds, default=600.0, metavar="S", help="seconds to wait (default: %(default)g)"
    )


def run(invocation: Invocation) -> int:
    last: DrainProgress | None = None
    most_bytes = 0
    daemon = invocation.daemon()
    with invocation.output.progress("draining") as advance:
        for last in daemon.drain(invocation.arguments.timeout):
            most_bytes = max(most_bytes, last.bytes_left)
            advance(most_bytes - last.bytes_left, most_bytes)
    if last is None:
        raise UnavailableError("the daemon ended the drain without a word", hint="run `cairn status`")
    if invocation.output.as_json:
        invocation.output.json(document(last))
    else:
        invocation.output.lines(render(last))
    return LEFT_SOMETHING if _left(last) else 0


def document(last: DrainProgress) -> Document:
    """See the module."""
    return {
        "done": not _left(last),
        "versions_left": last.versions_left,
        "bytes_left": last.bytes_left,
        "abandoned": list(last.abandoned),
        "without_tier2": list(last.without_tier2),
    }


def render(last: DrainProgress) -> list[str]:
    """What is left."""
    if not _left(last):
        return wrapped("Everything that waited is in tier 2. The daemon accepts no saves until it is restarted.")
    lines: list[str] = []
    if last.versions_left or last.abandoned:
        lines += wrapped(
            f"{count_text(last.versions_left, 'version')} ({size_text(last.bytes_left)}) did not reach tier 2 in time:"
        )
        lines += _named(last.abandoned)
        lines += wrapped("run `cairn status` to see why, then drain again", first="Next step: ", indent="  ")
    if last.without_tier2:
        lines += wrapped("No tier 2 is configured for these jobs: this node alone has them, newest version named:")
        lines += _named(last.without_tier2)
        lines += wrapped("save what is needed with `cairn export`", first="Next step: ", indent="  ")
    return lines


def _named(names: Iterable[str]) -> list[str]:
    return [line for name in names for line in wrapped(name, first="  ", indent="    ")]


def _left(last: DrainProgress) -> bool:
    return bool(last.versions_left or last.abandoned or last.without_tier2)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds
