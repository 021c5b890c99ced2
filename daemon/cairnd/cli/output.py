"""Where text goes: answers to standard output, warnings, errors and progress to standard error.

Progress bars and nothing else use a terminal's abilities, and only where standard error is one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cairn_api.errors import CairnError
from cairnd.cli.text import wrapped

Advance = Callable[[int, int], None]
"""Told ``(done, total)``, in bytes."""


class Output:
    """One invocation's answer: lines for people, or JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def json(self, document: Mapping[str, Any]) -> None:
        """One object on one line; characters outside ASCII are escaped."""
        sys.stdout.write(json.dumps(document, sort_keys=False) + "\n")
        sys.stdout.flush()

    def lines(self, lines: Iterable[str]) -> None:
        """Lines as they are: made by :mod:`cairnd.cli.text`."""
        for line in lines:
            sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def text(self, text: str) -> None:
        """A sentence, wrapped."""
        self.lines(wrapped(text))

    def warn(self, text: str) -> None:
        """What the answer lacks, on standard error."""
        for line in wrapped(text, first="warning: ", indent="  "):
            sys.stderr.write(line + "\n")

    def error(self, error: CairnError, exit_status: int) -> None:
        """Why there is no answer: the message, then the next step; with ``--json`` one object ``{"error": ...}``."""
        if self.as_json:
            fields = {
                "class": type(error).__name__, "kind": error.kind.value, "message": error.message, "hint": error.hint,
                "context": error.context, "exit_status": exit_status,
            }  # fmt: skip
            sys.stderr.write(json.dumps({"error": fields}) + "\n")
            return
        lines = wrapped(error.message, first="error: ", indent="  ")
        if error.hint:
            lines += wrapped(error.hint, first="Next step: ", indent="  ")
        sys.stderr.write("".join(line + "\n" for line in lines))

    @contextmanager
    def progress(self, title: str) -> Iterator[Advance]:
        """A progress bar while the block runs; nothing where nobody would see it."""
        if self.as_json or not sys.stderr.isatty():
            yield _unseen
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(30), DownloadColumn(binary_units=True), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True, width=79), transient=True) as bars:
            task = bars.add_task(title, total=None)
            yield lambda done_bytes, total_bytes: bars.update(task, completed=done_bytes, total=total_bytes or None)


def _unseen(done_bytes: int, total_bytes: int) -> None:
    """Where nobody looks."""
    del done_bytes, total_bytes
