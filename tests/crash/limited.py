"""``python -m tests.crash.limited <limits> -- <program>``: a Python program that is short of something from its start.

The limits: ``group=<folder>`` joins a control group (several may be named), ``files=<n>`` is ``ulimit -n``.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path


def program(limits: Sequence[str], program: Sequence[str] = ("-m", "cairnd")) -> tuple[str, ...]:
    """What :class:`tests.daemon_process.DaemonProcess` runs for *program* under *limits*."""
    return ("-m", "tests.crash.limited", *limits, "--", *program)


def main() -> None:
    """Take on the limits and become the program."""
    split = sys.argv.index("--")
    for limit in sys.argv[1:split]:
        name, _, value = limit.partition("=")
        if name == "group":
            (Path(value) / "cgroup.procs").write_text(str(os.getpid()))
        elif name == "files":
            resource.setrlimit(resource.RLIMIT_NOFILE, (int(value), int(value)))
        else:
            raise SystemExit(f"there is no limit {limit!r}")
    os.execv(sys.executable, [sys.executable, *sys.argv[split + 1 :]])  # noqa: S606 - a test's own program


if __name__ == "__main__":
    main()
