"""``cairnd`` on one thread: ``python -m tests.crash.serial_daemon <fault, or -> <cairnd's flags>``.

strace counts calls per thread. With the daemon's pools of threads it would be chance which thread makes a call, and the
n-th call of one would be shadowed by that of another. Here every piece of work runs on the thread of the event loop,
one after the other: each run makes the same calls in the same order. The code that runs is the real one.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar
from unittest import mock

from cairnd import __main__ as cairnd_main
from cairnd.app import App
from cairnd.core import Surroundings
from cairnd.upkeep import keeper
from tests.crash import faulty_daemon

T = TypeVar("T")

NO_FAULT = "-"
NO_RESERVE = "CAIRN_TEST_NO_RESERVE"
"""A variable that has nothing kept free in tier 1, so that its space can end anywhere and not only before a save."""
_SHORT_S = 0.05


class InLine:
    """:class:`cairnd.workers.Workers` without threads."""

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        await asyncio.sleep(0)  # others get their turn, as they would with threads
        return function(*arguments)

    def close(self) -> None:
        pass


def program(fault: str = "") -> tuple[str, ...]:
    """What :class:`tests.daemon_process.DaemonProcess` runs, with a *fault* of :mod:`tests.crash.faulty_daemon`."""
    return ("-m", "tests.crash.serial_daemon", fault or NO_FAULT)


def main() -> int:
    """Run the daemon; returns its exit status."""
    fault, *arguments = sys.argv[1:]
    surroundings = Surroundings(workers=lambda _name, _threads: InLine())
    with ExitStack() as patched:
        # What the daemon lets pass between two looks or tries would be most of a test's time.
        for wait in ("_SWEEP_INTERVAL_S", "_RETRY_S"):
            patched.enter_context(mock.patch.object(keeper, wait, _SHORT_S))
        if os.environ.get(NO_RESERVE):
            patched.enter_context(mock.patch.object(keeper, "TIER1_RESERVED_BYTES", 0))
        if fault == NO_FAULT:
            patched.enter_context(mock.patch.object(cairnd_main, "App", partial(App, surroundings=surroundings)))
            return cairnd_main.main(arguments)
        patched.enter_context(mock.patch.object(faulty_daemon, "SURROUNDINGS", surroundings))
        patched.enter_context(mock.patch.object(sys, "argv", [sys.argv[0], fault, *arguments]))
        return faulty_daemon.main()


if __name__ == "__main__":
    sys.exit(main())
