"""``make bench``: what a save and a restore cost, as ratios to floors that are measured in the same run.

Machines are shared and noisy, so absolute figures do not travel; ratios do. All contenders take their turn in each
round, so that a slow moment of the machine hits each of them. Prints Markdown; ``--json`` keeps every sample.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path

import psutil
import torch

from tests.perf.contenders import BY_DEFAULT, CONTENDERS
from tests.perf.daemon_memory import measure_daemon_memory
from tests.perf.goals import DAEMON_MEMORY_LIMIT_BYTES
from tests.perf.measuring import Request, start_rank
from tests.perf.plot import plot
from tests.perf.report import report
from tests.perf.results import Run, joined, merged, run_from_json
from tests.perf.states import STATES

_END_TIMEOUT_S = 20.0
_DAEMON_MEMORY_STATE_BYTES = 4_000_000_000


class RankFailedError(Exception):
    """A rank process ended without a result."""


def measure(request: Request) -> Run:
    """Run all ranks of one request to their end. None of their processes is left when this returns or raises."""
    barrier = multiprocessing.get_context("spawn").Barrier(request.ranks)
    started: list[tuple[multiprocessing.Process, Connection]] = []
    try:
        for rank in range(request.ranks):
            started.append(start_rank(rank, request, barrier))  # noqa: PERF401 - those started so far are ended too
        return merged([_answer(process, connection) for process, connection in started])
    finally:
        _end([process for process, _ in started])


def _answer(process: multiprocessing.Process, connection: Connection) -> Run:
    wait([connection, process.sentinel])
    try:
        answer = connection.recv()
    except EOFError:
        process.join()
        raise RankFailedError(f"{process.name} ended with status {process.exitcode}") from None
    if isinstance(answer, str):
        raise RankFailedError(f"{process.name} failed:\n{answer}")
    assert isinstance(answer, Run)
    return answer


def _end(processes: Sequence[multiprocessing.Process]) -> None:
    """Have them end their helpers and go; whoever does not go in time is killed, with its helpers."""
    known = [psutil.Process(item.pid) for item in processes if item.is_alive()]
    helpers = [child for item in known for child in item.children(recursive=True)]
    for process in processes:
        if sys.exc_info()[0] is not None:
            process.terminate()
        process.join(_END_TIMEOUT_S)
        process.kill()
        process.join()
    for helper in helpers:
        if helper.is_running():
            helper.kill()


def _parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.perf", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--states", default=",".join(STATES), help=f"of {', '.join(STATES)}, separated by commas; default: all"
    )
    parser.add_argument(
        "--only",
        default="",
        help=f"contenders separated by semicolons, of: {'; '.join(CONTENDERS)}; default: those that suit the state",
    )
    parser.add_argument("--ranks", default="1", help="how many processes save at once; 1,2 measures both; default: 1")
    parser.add_argument(
        "--rounds", type=int, default=5, help="in which each contender saves once; at least 1, default: 5"
    )
    parser.add_argument(
        "--size-gb",
        type=float,
        default=1.0,
        help="gigabytes (1e9 bytes) of the adam state of one process, default: 1; scales the other states too",
    )
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk under test; default: this one")
    parser.add_argument("--memory", action="store_true", help="measure the daemon's memory while it saves 4 GB, only")
    parser.add_argument("--skip-proof", action="store_true", help="leave out extra memory and what changes corrupt")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every sample here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of stall and training time lost")
    parser.add_argument(
        "--read",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing, report what --json has kept in these files; runs of one state and size are put together",
    )
    parsed = parser.parse_args(arguments)
    parsed.states = parsed.states.split(",")
    parsed.ranks = [int(item) if item.isdecimal() else 0 for item in parsed.ranks.split(",")]
    parsed.only = tuple(item.strip() for item in parsed.only.split(";")) if parsed.only else ()
    if parsed.rounds < 1 or parsed.size_gb <= 0 or min(parsed.ranks) < 1:
        parser.error("--rounds, --size-gb and --ranks take numbers above 0")
    for folder in (parsed.folder, *(path.parent for path in (parsed.json, parsed.plot) if path)):
        if not folder.is_dir():  # better now than after half an hour
            parser.error(f"there is no folder {folder}")
    for name in {*parsed.states} - {*STATES} | {*parsed.only} - {*CONTENDERS}:
        parser.error(f"there is no {name!r}")
    return parsed


def _measure_all(arguments: argparse.Namespace) -> list[Run]:
    runs = []
    for ranks in arguments.ranks:
        for state in arguments.states:
            with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as folder:
                request = Request(
                    state, int(arguments.size_gb * 1e9), ranks, arguments.rounds, Path(folder),
                    arguments.only or BY_DEFAULT[state], prove=not arguments.skip_proof,
                )  # fmt: skip
                runs.append(measure(request))
            print(report(runs[-1]), flush=True)
    return runs


def _kept(path: Path) -> list[Run]:
    try:
        return [run_from_json(item) for item in json.loads(path.read_text())["runs"]]
    except OSError as error:
        sys.exit(f"cannot read {path}: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{path} is not what --json writes: measure again with --json")


def main(given: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    arguments = _parse(given)
    if arguments.memory:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as folder:
            found = measure_daemon_memory(Path(folder), _DAEMON_MEMORY_STATE_BYTES)
        met = "met" if found.peak_without_shared_bytes <= DAEMON_MEMORY_LIMIT_BYTES else "missed"
        print(
            f"daemon while saving {found.state_bytes / 1e9:.2f} GB: {found.peak_rss_bytes / 2**20:.0f} MiB resident, "
            f"{found.peak_without_shared_bytes / 2**20:.0f} MiB without capture buffers "
            f"(limit {DAEMON_MEMORY_LIMIT_BYTES >> 20} MiB: {met})"
        )
        return 0
    if arguments.read:
        runs = joined([run for path in arguments.read for run in _kept(path)])
        print("\n".join(map(report, runs)))
    else:
        runs = _measure_all(arguments)
        machine = {"cores": os.cpu_count(), "kernel": platform.release(), "torch": torch.__version__}
        print(", ".join(f"{name} {value}" for name, value in machine.items()))
        if arguments.json:
            document = {"machine": machine, "runs": [asdict(run) for run in runs]}
            arguments.json.write_text(json.dumps(document, indent=1))
    if arguments.plot:
        plot(runs, arguments.plot)
    return 0


def _interrupt(signal_number: int, frame: object) -> None:  # noqa: ARG001 - the signature of a handler
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # folders and processes are cleaned up then as well
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except RankFailedError as error:
        sys.exit(str(error))
