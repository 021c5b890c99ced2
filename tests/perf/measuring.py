"""One rank process: every contender on one state, interleaved, in step with the other ranks."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

from torch import distributed

from tests.perf.contender import Contender, Place
from tests.perf.contenders import CONTENDERS
from tests.perf.floors import Floors
from tests.perf.page_cache import PageCache
from tests.perf.results import Run, Samples, add_sample
from tests.perf.states import State, clone, copy_into, make_state, same, size_of, train_step
from tests.perf.training import TrainingLoad, Waiter
from tests.perf.usage import Disturbance, PeakMemory, cpu_s, machine_cpu_s

_PROBE_BYTES = 1 << 20
_MEET_TIMEOUT_S = 300.0
_LOOP_PER_DRAIN = 1.1
_ALONE_PER_LOOP = 0.4
_BUSY_SAVES = 2
_TRIES = 3
_CALM_CORES = 0.05
_STEP_PER_COPY = 6


@dataclass(frozen=True, slots=True)
class Request:
    """What a run is to measure; *size_bytes* is that of the *adam* state of one rank."""

    state: str
    size_bytes: int
    ranks: int
    rounds: int
    folder: Path
    contenders: tuple[str, ...]
    prove: bool
    """Whether memory is measured, and whether a change right after the stall corrupts."""


def run_rank(rank: int, request: Request, barrier: Barrier, answer: Connection) -> None:
    """The process of one rank: sends its :class:`Run`, or the traceback of what stopped it, through *answer*."""
    signal.signal(signal.SIGTERM, _leave)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    started: list[Contender] = []
    try:
        distributed.init_process_group(
            "gloo", init_method=f"file://{request.folder}/ranks", rank=rank, world_size=request.ranks
        )
        answer.send(RankRun(rank, request, barrier, started).run())
    except (KeyboardInterrupt, SystemExit):
        barrier.abort()
        raise SystemExit(1) from None
    except BaseException:  # noqa: BLE001 - the parent process prints it
        barrier.abort()
        answer.send(traceback.format_exc())
    finally:
        for contender in started:
            contender.shut_down()


def _leave(signal_number: int, frame: object) -> None:  # noqa: ARG001 - the signature of a handler
    raise SystemExit(128 + signal_number)


class RankRun:
    """See the module. *started* is told each contender that may have processes to end."""

    def __init__(self, rank: int, request: Request, barrier: Barrier, started: list[Contender]) -> None:
        self._request = request
        self._rank = rank
        self._load = TrainingLoad(max(1, (os.cpu_count() or 1) // request.ranks))
        self._state: State = make_state(request.state, request.size_bytes, rank)

        def meet() -> None:
            barrier.wait(_MEET_TIMEOUT_S)

        self._place = Place(request.folder, rank, request.ranks, size_of(self._state), meet)
        self._cache = PageCache(meet, rank)
        self._started = started
        self._step_s = 0.0
        self._run = Run(request.state, request.ranks, request.rounds, self._place.state_bytes)

    def run(self) -> Run:
        """Probe, prove, then the rounds."""
        contenders = [item for item in map(self._probed, self._request.contenders) if item is not None]
        for contender in contenders if self._request.prove else ():
            self._guarded("the proof", contender, self._prove)
        floors = Floors(self._place, self._place.state_bytes)
        try:
            for number in range(self._request.rounds):
                started_s = time.monotonic()
                add_sample(self._run.floors, **floors.measure(self._cache))
                self._step_s = max(0.3, _STEP_PER_COPY * self._run.floors["memcpy"][-1])
                for contender in contenders:
                    contender.floors = floors
                    self._guarded(f"round {number + 1}", contender, self._measure)
                self._say(f"round {number + 1} of {self._request.rounds}: {time.monotonic() - started_s:.0f} s")
        finally:
            floors.close()
        return self._run

    def _probed(self, name: str) -> Contender | None:
        """The contender, after one tiny save and load; None when it cannot take part on some rank."""
        kind = CONTENDERS[name]
        reason = kind.why_not()
        contender: Contender | None = None
        if not reason:
            contender = kind(self._place)
            self._started.append(contender)
            try:
                state = make_state("adam", _PROBE_BYTES, self._rank)
                contender.open(state)
                contender.save(state)
                contender.before_update()
                contender.finish()
                contender.load_into(state)
                contender.close()
            except Exception as error:  # noqa: BLE001 - whatever a contender raises is why it is left out
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        reasons: list[str] = [""] * self._request.ranks
        distributed.all_gather_object(reasons, reason)
        reason = next(filter(None, reasons), "")
        if reason:
            self._run.skipped[name] = reason
            self._say(f"{name} is skipped: {reason}")
            return None
        return contender

    def _guarded(self, step: str, contender: Contender, work: Callable[[Contender, Samples], None]) -> None:
        """*work*, after which nothing is left behind. One rank can go on without a contender that fails."""
        name = contender.name
        if name in self._run.skipped:
            return
        started_s = time.monotonic()
        try:
            work(contender, self._run.contenders.setdefault(name, {}))
            contender.discard()
            contender.close()
        except Exception as error:
            if self._request.ranks > 1:
                raise
            self._run.skipped[name] = f"failed in {step}: {type(error).__name__}: {error}".splitlines()[0]
            self._say(f"{name} {self._run.skipped[name]}\n{traceback.format_exc()}")
            contender.shut_down()
        gc.collect()
        self._say(f"{step}, {name}: {time.monotonic() - started_s:.1f} s")

    def _prove(self, contender: Contender, samples: Samples) -> None:
        """Two saves, not timed, each followed at once by a change of every tensor: peak memory, and what comes back."""
        expected = clone(self._state)
        corrupt = False
        memory: PeakMemory | None = None
        for number in range(2):
            train_step(self._state)
            copy_into(expected, self._state)
            step = self._state["step"]
            with PeakMemory(contender.helpers, shared=self._rank == 0, since=memory) as memory:
                if number == 0:
                    contender.open(self._state)
                contender.save(self._state)
                contender.before_update()
                train_step(self._state)
                contender.finish()
                contender.settle()
            self._place.meet()
            loaded = contender.load_into(self._state)
            corrupt = corrupt or not same(self._state, expected)
            corrupt = corrupt or (isinstance(loaded, dict) and loaded.get("step", step) != step)
            del loaded
        assert memory is not None
        add_sample(samples, extra_bytes=memory.extra_bytes, corrupt=float(corrupt))

    def _measure(self, contender: Contender, samples: Samples) -> None:
        contender.open(self._state)
        add_sample(samples, first_stall_s=self._save(contender))
        self._end_save(contender)
        if contender.preallocates:
            contender.close()
            contender.open(self._state)
            contender.preallocate()
            add_sample(samples, preallocated_stall_s=self._save(contender))
            self._end_save(contender)
        for _ in range(contender.warm_ups):
            self._save(contender)
            self._end_save(contender)
        self._measure_quiet(contender, samples)
        for _ in range(_BUSY_SAVES):
            self._measure_busy(contender, samples)
        if contender.restores:
            add_sample(samples, **contender.measure_restores(self._state, self._cache))

    def _prepare(self, contender: Contender) -> None:
        """Change the state, and leave nothing over from the save before."""
        contender.discard()
        train_step(self._state)
        self._place.meet()
        if self._rank == 0:
            os.sync()
        self._place.meet()

    def _save(self, contender: Contender) -> float:
        """One save of a changed state; the stall in seconds."""
        self._prepare(contender)
        return self._place.timed(lambda: contender.save(self._state))

    def _end_save(self, contender: Contender) -> None:
        contender.before_update()
        contender.finish()
        contender.settle()

    def _measure_quiet(self, contender: Contender, samples: Samples) -> None:
        """A warm save with nothing else to do: time until it is durable, and CPU time."""
        self._prepare(contender)
        raw_write_s = self._raw_write_s(contender, samples, before=True)
        helpers = contender.helpers()
        before = cpu_s([os.getpid(), *helpers]), cpu_s(helpers), machine_cpu_s()
        stall_s = self._place.timed(lambda: contender.save(self._state))
        started_s = time.perf_counter() - stall_s
        if contender.overlaps:
            time.sleep(self._step_s)
            contender.before_update()
        contender.finish()
        durable_s = time.perf_counter() - started_s
        after = cpu_s([os.getpid(), *helpers]), cpu_s(helpers), machine_cpu_s()
        own, helping, machine = (new - old for new, old in zip(after, before, strict=True))
        add_sample(
            samples, durable_s=durable_s, cpu_s=own, daemon_cpu_s=helping, machine_cpu_s=machine, quiet_stall_s=stall_s
        )
        if not contender.overlaps:
            add_sample(samples, stall_s=stall_s)
        contender.settle()
        if contender.goes_direct:
            raw_write_s = raw_write_s or self._raw_write_s(contender, samples, before=False)
            add_sample(samples, drain_s=durable_s - stall_s, raw_write_s=raw_write_s)

    def _raw_write_s(self, contender: Contender, samples: Samples, *, before: bool) -> float:
        """Seconds of the disk's own speed, before or after the save by turns; 0 when it is the other's turn."""
        own_turn = before is (len(samples.get("raw_write_s", ())) % 2 == 0)
        if not contender.goes_direct or contender.floors is None or not own_turn:
            return 0.0
        return contender.floors.write()

    def _measure_busy(self, contender: Contender, samples: Samples) -> None:
        """A warm save with training on every core until it is durable: stall, and training time lost.

        It is a small difference of large times, so one that others disturbed is measured again; the calmest counts.
        """
        tries = []
        for _ in range(_TRIES):
            disturbance = Disturbance()
            stall_s, lost_s = self._busy_save(contender, samples["durable_s"][-1])
            cores = [0.0] * self._request.ranks
            distributed.all_gather_object(cores, disturbance.cores())
            tries.append((max(cores), stall_s, lost_s))
            if max(cores) < _CALM_CORES:
                break
        others, stall_s, lost_s = min(tries)
        add_sample(samples, busy_stall_s=stall_s, lost_s=lost_s, bill_s=stall_s + lost_s, others_cores=others)
        add_sample(samples, stall_s=stall_s)

    def _busy_save(self, contender: Contender, drain_s: float) -> tuple[float, float]:
        """Stall and training time lost in seconds, of a save that is about *drain_s* from being durable."""
        count = self._load.iterations_for(_LOOP_PER_DRAIN * drain_s + contender.overlaps * self._step_s)
        alone = self._load.iterations_for(_ALONE_PER_LOOP * count * self._load.iteration_s)
        self._place.meet()
        before = self._load.run(alone)
        stall_s = self._save(contender)
        waiter = Waiter(contender.finish)
        done, training_s = 0, 0.0
        if contender.overlaps:
            done, training_s = self._load.run(self._load.iterations_for(self._step_s))
            started_s = time.perf_counter()
            contender.before_update()
            stall_s += time.perf_counter() - started_s
        during = self._load.run(count - done, waiter.done)
        waiter.join()
        contender.settle()
        self._place.meet()
        after = self._load.run(alone)
        iteration_s = (before.seconds + after.seconds) / (before.iterations + after.iterations)
        return stall_s, training_s + during.seconds - (done + during.iterations) * iteration_s

    def _say(self, text: str) -> None:
        if self._rank == 0:
            print(f"  {self._request.state}, {self._request.ranks} rank(s): {text}", file=sys.stderr, flush=True)


def start_rank(rank: int, request: Request, barrier: Barrier) -> tuple[multiprocessing.Process, Connection]:
    """Start the process of one rank; what it sends can be read from the connection."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=run_rank, args=(rank, request, barrier, sending), name=f"rank {rank}")
    process.start()
    sending.close()
    return process, receiving  # type: ignore[return-value]  # a SpawnProcess has all of a Process
