"""``cairn``: arguments, verbs, exit statuses."""

from __future__ import annotations

import io
import os
import sys
import textwrap
import traceback
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, Protocol

from cairn_api.errors import CairnError, InternalError
from cairn_api.wire import DEFAULT_RUNTIME_DIR
from cairnd import __version__
from cairnd.cli.exits import EXIT_STATUS
from cairnd.cli.invocation import Invocation
from cairnd.cli.output import Output
from cairnd.cli.text import wrapped
from cairnd.cli.verbs import doctor, drain, export, mark, persist, pin, prune, show, status, unpin, verify, watch
from cairnd.cli.verbs import list as list_

WRONG_USAGE = 2
INTERRUPTED = 130
OUTPUT_CLOSED = 141

_EPILOG = """\
Exit status: 0 done; 1 verify found damage, or drain left something; 2 wrong
usage; and by what to do next: 10 retry later, 11 wait until there is room, 12 fix
the configuration, 13 choose another version, 14 give up (doctor: the gravest of
its problems); 130 interrupted; 141 nobody reads the answer.

Errors go to standard error: the message, then "Next step: ...". With --json they
are one object: {"error": {"class", "kind", "message", "hint", "context",
"exit_status"}}, where kind is retry, wait, fix_configuration,
choose_another_version or give_up; wrong usage is always text. Answers with --json
are documented in `cairn VERB --help`; they are one object on one line (watch: one
per event).
"""


class Verb(Protocol):
    """A module of :mod:`cairnd.cli.verbs`."""

    NAME: str
    HELP: str

    def configure(self, parser: ArgumentParser) -> None:
        """Add the verb's own arguments."""

    def run(self, invocation: Invocation) -> int:
        """Do it; returns the exit status or raises a :class:`CairnError`."""


VERBS: Sequence[Verb] = (list_, show, verify, pin, unpin, mark, prune, persist, export, status, doctor, drain, watch)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Wrong usage leaves through ``SystemExit(2)``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name must not break the answer in a poor locale
    parsed = _parser().parse_args(arguments)
    output = Output(as_json=parsed.json)
    invocation = Invocation(parsed, output, Path(parsed.runtime_dir))
    try:
        return _run(parsed, invocation)
    except CairnError as error:
        exit_status = EXIT_STATUS[error.kind]
        output.error(error, exit_status)
        return exit_status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the answer has seen enough; the interpreter's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUTPUT_CLOSED
    except Exception as error:  # noqa: BLE001 - left alone it would end with 1, which means that damage was found
        traceback.print_exc()
        defect = InternalError(f"{type(error).__name__}: {error}", hint="report this, with the lines above")
        output.error(defect, EXIT_STATUS[defect.kind])
        return EXIT_STATUS[defect.kind]
    finally:
        invocation.close()


def _run(parsed: Namespace, invocation: Invocation) -> int:
    verb: Verb = next(verb for verb in VERBS if parsed.verb == verb.NAME)
    return verb.run(invocation)


class _Parser(ArgumentParser):
    """Says what is wrong within 80 columns."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(WRONG_USAGE, "\n".join(wrapped(f"{self.prog}: error: {message}", indent="  ")) + "\n")


def _parser() -> ArgumentParser:
    parser = _Parser(
        prog="cairn",
        description="Show and manage the checkpoints that the Cairn daemon of this node keeps.",
        epilog=_filled(_EPILOG),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[_common_options(os.environ.get("CAIRN_RUNTIME_DIR") or DEFAULT_RUNTIME_DIR)],
    )
    parser.add_argument("--version", action="version", version=f"cairn {__version__}")
    # The same options after the verb; there an absent one must not undo what was given before it.
    again = _common_options(None)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        sub = verbs.add_parser(
            verb.NAME,
            help=verb.HELP,
            description=_filled(verb.__doc__ or ""),
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
            parents=[again],
        )
        verb.configure(sub)
    return parser


def _filled(text: str) -> str:
    return "\n\n".join(textwrap.fill(paragraph, 79) for paragraph in text.split("\n\n"))


def _common_options(runtime_dir: str | None) -> _Parser:
    """Options that every verb takes; with defaults if *runtime_dir* is given, else setting nothing when absent."""
    first = runtime_dir is not None
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--runtime-dir",
        metavar="DIR",
        default=runtime_dir if first else SUPPRESS,
        help=f"where the daemon's sockets are (CAIRN_RUNTIME_DIR, else {DEFAULT_RUNTIME_DIR})",
    )
    parser.add_argument(
        "--job", default=None if first else SUPPRESS, help="the job; needed when there is more than one"
    )
    parser.add_argument(
        "--json", action="store_true", default=False if first else SUPPRESS, help="print JSON, a stable interface"
    )
    parser.add_argument(
        "--store",
        metavar="PATH|URL",
        default=None if first else SUPPRESS,
        help="read a tier 1 folder or a bucket instead of asking the daemon",
    )
    parser.add_argument(
        "--storage-option",
        metavar="KEY=VALUE",
        action="append",
        default=[] if first else SUPPRESS,
        help="an option of the bucket that --store names; may be repeated",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
