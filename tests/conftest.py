"""Collects what tests report about Cairn's promises (see :mod:`tests.promises`) and prints the table after the run."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.promises import PLANTED, PROMISES, Evidence, Result, commit, full_run, keep_results, read_results, table

_RESULT = pytest.StashKey[Result]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        promise, planted = _named(item, "promise", PROMISES), _named(item, "planted", PLANTED)
        if promise or planted:
            item.stash[_RESULT] = Result(promise, planted, "not run", full=full_run())


def _named(item: pytest.Item, marker: str, known: object) -> str:
    found = item.get_closest_marker(marker)
    if found is None:
        return ""
    name = str(found.args[0])
    assert isinstance(known, dict)
    if name not in known:
        raise pytest.UsageError(f"{item.nodeid}: there is no {marker} {name!r} in tests/promises.py")
    return name


@pytest.fixture
def evidence(request: pytest.FixtureRequest) -> Evidence:
    """Reports what a test with the marker ``promise`` tried, and how often the promise was broken."""
    return Evidence(request.node.stash[_RESULT])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    result = item.stash.get(_RESULT, None)
    if result is not None:
        result.seconds += report.duration
        if report.failed:
            result.outcome, result.reason = "failed", item.nodeid.rpartition("/")[2]
        elif report.skipped:
            result.outcome = "skipped"
            result.reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            result.reason = result.reason.removeprefix("Skipped: ").removeprefix("NOT PROVED HERE: ")
        elif report.when == "call":
            result.outcome = "passed"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    session = terminalreporter._session
    assert session is not None, "tests have run"
    found = {item.nodeid: item.stash[_RESULT] for item in session.items if _RESULT in item.stash}
    ran = {test: result for test, result in found.items() if result.outcome != "not run"}
    if not ran:
        return
    now = commit()
    for result in ran.values():
        result.commit = now
    keep_results(ran)
    terminalreporter.section("promises, with what this run tried (of all runs since the last --forget)")
    for line in table(read_results().values()):
        terminalreporter.write_line(line)
