"""Runs the command in this process and looks at what it printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.cells import cell_len

from cairnd.cli.main import main
from tests.daemon.cli.schemas import ERROR, Schema


@dataclass(frozen=True)
class Outcome:
    """What one command did."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    def json(self, schema: Schema, statuses: Sequence[int] = (0, 1)) -> Any:
        """The one object on standard output, checked."""
        assert self.status in statuses, self.err
        (line,) = self.lines
        document = json.loads(line)
        jsonschema.validate(document, schema)
        return document

    def error(self) -> dict[str, Any]:
        """The one object on standard error, checked; nothing is on standard output then."""
        assert not self.out
        document = json.loads(self.err)
        jsonschema.validate(document, ERROR)
        error: dict[str, Any] = document["error"]
        assert error["exit_status"] == self.status
        return error


Cairn = Callable[..., Outcome]


def runner(capsys: pytest.CaptureFixture[str], *always: str) -> Cairn:
    """Makes the function that runs ``cairn`` with *always* added; texts for people are checked to fit 80 columns."""

    def cairn(*arguments: str | Path) -> Outcome:
        words: Sequence[str] = [*(str(word) for word in arguments), *always]
        try:
            status = main(words)
        except SystemExit as leaving:  # argparse leaves so
            status = int(leaving.code or 0)
        captured = capsys.readouterr()
        outcome = Outcome(status, captured.out, captured.err)
        if "--json" not in words and "--wide" not in words:
            assert_fits(outcome.out.splitlines())
            assert_fits(outcome.err.splitlines())
        return outcome

    return cairn


def assert_fits(lines: Sequence[str]) -> None:
    """No line is wider than 80 terminal cells or holds anything that steers a terminal."""
    for line in lines:
        assert cell_len(line) <= 80, (cell_len(line), line)
        assert line.isprintable(), line
