"""What a check finds, and how checks are run so that none can hold up the others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cairn_api.errors import CairnError, ErrorKind

_NAMED = 3


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    """It works, with less than one could have; or it may stop working."""
    PROBLEM = "problem"
    """Something does not work, or what was promised may be lost."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. Whatever is not ok has a ``fix``: a command or a setting.

    ``kind`` says of a problem what kind of step that is, and so decides the exit status.
    """

    check: str
    level: Level
    message: str
    fix: str = ""
    kind: ErrorKind | None = None


def ok(check: str, message: str) -> Finding:
    """Nothing to do."""
    return Finding(check, Level.OK, message)


def warning(check: str, message: str, fix: str) -> Finding:
    """Worth knowing."""
    return Finding(check, Level.WARNING, message, fix)


def problem(check: str, message: str, fix: str, kind: ErrorKind = ErrorKind.FIX_CONFIGURATION) -> Finding:
    """To be mended."""
    return Finding(check, Level.PROBLEM, message, fix, kind)


def from_error(check: str, what: str, error: CairnError) -> Finding:
    """The problem that *error* tells of; *what* was tried."""
    return problem(check, f"{what}: {error.message}", error.hint or "see the daemon's log", error.kind)


def not_permitted(check: str, what: str) -> Finding:
    """Something that this user may not look at, which says nothing about the daemon's user."""
    return warning(check, f"not looked at: {what}", "run `cairn doctor` as root or as the daemon's user")


def _broken_off(check: str, error: CairnError | OSError) -> Finding:
    if os.geteuid() != 0 and isinstance(error if isinstance(error, OSError) else error.__cause__, PermissionError):
        return not_permitted(check, error.message if isinstance(error, CairnError) else str(error))
    if isinstance(error, CairnError):
        return from_error(check, "this check could not go on", error)
    return problem(check, f"this check could not go on: {error}", "look at what it names, and at dmesg")


def listed(names: Sequence[str]) -> str:
    """The first few of *names*."""
    return ", ".join(names[:_NAMED]) + (" …" if len(names) > _NAMED else "")


@dataclass(frozen=True, slots=True)
class Check:
    """Something to look at. ``unanswered`` is what to do when it does not end in time."""

    name: str
    run: Callable[[], Iterable[Finding]]
    unanswered: str


def run_checks(checks: Sequence[Check], deadline_s: float) -> Iterator[Finding]:
    """The findings of all *checks*, in their order; each has until the same deadline, in seconds from now."""
    until_s = time.monotonic() + deadline_s
    for running in [_Running(check) for check in checks]:
        yield from running.findings_until(until_s, deadline_s)


class _Running:
    """A check in a thread that does not keep the process from ending."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._found: list[Finding] = []
        self._thread = threading.Thread(target=self._run, name=f"check-{check.name}", daemon=True)
        self._thread.start()

    def findings_until(self, until_s: float, deadline_s: float) -> list[Finding]:
        self._thread.join(max(until_s - time.monotonic(), 0.0))
        found, name = list(self._found), self._check.name
        if self._thread.is_alive():
            message = f"this was not answered within {deadline_s:g} s"
            found.append(problem(name, message, self._check.unanswered, ErrorKind.RETRY))
        return found

    def _run(self) -> None:
        name = self._check.name
        try:
            for finding in self._check.run():
                self._found.append(finding)
        except (CairnError, OSError) as error:
            self._found.append(_broken_off(name, error))
        except Exception as error:  # noqa: BLE001 - shown: the other checks matter all the same
            message = f"this check failed itself: {type(error).__name__}: {error}"
            self._found.append(problem(name, message, "report this with the command's output", ErrorKind.GIVE_UP))
