"""What the system grants this process, looked at before anything is made from it.

A library that gets no thread or no descriptor ends the process with a message of its own, or leaves it half alive. So a
shortage that would come soon is told at start, by the name under which an operator can raise it.
"""

from __future__ import annotations

import resource
import threading

from cairn_api.errors import ConfigurationError

LEAST_FILES = 64
"""Descriptors: 20 for an idle daemon, a few for each client and for each partition that is being written."""

LEAST_THREADS = 64
"""As many as a busy daemon uses, those of gRPC included."""


def check_limits() -> None:
    """Take as many descriptors as may be had; raises :class:`ConfigurationError` when they or threads are too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
        raise ConfigurationError(
            f"the daemon may open {hard} files and sockets, it needs {LEAST_FILES} and some more for each client",
            hint="raise LimitNOFILE= of its unit (ulimit -n), best to 65536",
        )
    started = _startable(LEAST_THREADS)
    if started < LEAST_THREADS:
        raise ConfigurationError(
            f"the daemon can start {started} threads, it needs {LEAST_THREADS}",
            hint="raise TasksMax= of its unit (pids.max of its control group) or the user's limit (ulimit -u)",
        )


def _startable(count: int) -> int:
    """How many of *count* threads can run at the same time; none of them is left when this returns."""
    over = threading.Event()
    threads: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=over.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:  # "can't start new thread"
        return len(threads)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    return count
