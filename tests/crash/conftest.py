"""All tests of this folder inject faults and carry the marker. Their figures are printed at the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crash.trainer import Trainers

_FIGURES: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.fault)
    items.sort(key=lambda item: item.path.name == "test_soak.py")  # half an hour, in full: what is short fails first


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _FIGURES:
        terminalreporter.section("figures of the crash tests")
    for line in _FIGURES:
        terminalreporter.write_line(line)


@pytest.fixture
def figures() -> Callable[[str], None]:
    """Takes a line to be printed after the run, whether the test passes or fails."""
    return _FIGURES.append


@pytest.fixture
def trainers(tmp_path: Path) -> Iterator[Trainers]:
    """Starts training-like client processes; none outlives the test."""
    with Trainers(tmp_path) as started:
        yield started
