"""The simulated machine room: one seed decides who runs next, how long everything takes and what goes wrong.

There are no threads and no real time. Coroutines run on a loop that takes the next callback at random; a blocking
function runs in a greenlet and gives the others their turn at each call of a disk or a bucket, so that what would be
chance between threads and machines is a choice of the seed. The same seed makes the same choices in the same order.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from asyncio import base_events
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from contextvars import Context, ContextVar, copy_context
from hashlib import sha256
from itertools import count
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")

_REMEMBERED_LINES = 200
_PURGE_AT = 512
_LAST_WORDS = 50


class CrashedError(BaseException):
    """The process that this code belongs to no longer exists. Not an ``Exception``: nothing may handle it."""


class StuckError(Exception):
    """Nothing is left to happen, and somebody still waits."""


class Trace:
    """What happened, one line a step. Always digested; kept whole only on request."""

    def __init__(self, *, whole: bool = False) -> None:
        self.steps = 0
        self._digest = sha256()
        self._lines: deque[str] = deque(maxlen=None if whole else _REMEMBERED_LINES)

    def add(self, line: str) -> None:
        """Another step."""
        self.steps += 1
        self._digest.update(line.encode())
        self._digest.update(b"\n")
        self._lines.append(line)

    def note(self, line: str) -> None:
        """Something worth reading that is no step of its own."""
        self._digest.update(line.encode())
        self._lines.append(f"    {line}")

    @property
    def digest(self) -> str:
        """Equal for equal traces."""
        return self._digest.hexdigest()

    def lines(self, last: int = 0) -> list[str]:
        """The remembered lines, or the *last* of them."""
        return list(self._lines)[-last:]


PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)
"""Which daemon the running code belongs to; None outside of daemons."""


class _Future(asyncio.Future[Any]):
    """Its hash is a number in the order of creation: sets of futures are walked in the same order in every run."""

    def __init__(self, loop: SeededLoop) -> None:
        super().__init__(loop=loop)
        self._number = next(loop.numbers)

    def __hash__(self) -> int:
        return self._number


class _Task(asyncio.Task[Any]):
    """As :class:`_Future`."""

    def __init__(self, coro: Coroutine[Any, Any, Any], loop: SeededLoop, context: Context | None) -> None:
        self._number = next(loop.numbers)
        super().__init__(coro, loop=loop, context=context)

    def __hash__(self) -> int:
        return self._number


class SeededLoop(base_events.BaseEventLoop):
    """An event loop in simulated time. Each turn runs one callback, chosen at random among those that are ready."""

    def __init__(self, chance: random.Random, trace: Trace) -> None:
        super().__init__()
        self.numbers = count()
        self.chance = chance
        self.trace = trace
        self.troubles: list[str] = []
        self.most_steps = 1 << 62
        self._now_s = 1000.0
        self._waiting: list[asyncio.Handle] = []
        self._ready = self._waiting  # what is appended here is drawn from at random
        self.set_task_factory(_make_task)  # type: ignore[arg-type]
        self.set_exception_handler(self._unhandled)

    def time(self) -> float:
        return self._now_s

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(self)

    def _unhandled(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, CrashedError | asyncio.CancelledError):  # those are what a process ends with
            self.troubles.append(f"{context['message']}: {error!r}")

    def _run_once(self) -> None:
        ready = self._waiting
        if not ready:
            self._let_time_pass()
        at = int(self.chance.random() * len(ready)) if len(ready) > 1 else 0
        handle = ready[at]
        ready[at] = ready[-1]
        ready.pop()
        if not handle._cancelled:
            self.trace.add(_name(handle))
            if self.trace.steps > self.most_steps:
                self.most_steps *= 2  # leave room for the end
                raise StuckError("it does not come to an end")
            handle._run()

    def _let_time_pass(self) -> None:
        timers: list[Any] = self._scheduled  # type: ignore[attr-defined]
        if len(timers) > _PURGE_AT:
            timers[:] = [timer for timer in timers if not timer._cancelled]
            heapq.heapify(timers)
        while timers and timers[0]._cancelled:
            heapq.heappop(timers)._scheduled = False
        if not timers:
            raise StuckError("everybody waits for somebody else")
        self._now_s = max(self._now_s, timers[0]._when)
        while timers and timers[0]._when <= self._now_s:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            if not timer._cancelled:
                self._waiting.append(timer)

    def _process_events(self, event_list: list[Any]) -> None:
        raise NotImplementedError

    def _write_to_self(self) -> None:
        raise NotImplementedError("somebody calls from another thread")


def _name(handle: Any) -> str:
    """What a callback is, without anything that differs between runs."""
    callback = handle._callback
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, _Task):
        coroutine = owner.get_coro()
        return getattr(coroutine, "__qualname__", "task")
    if isinstance(owner, greenlet):
        return "blocking call"
    return getattr(callback, "__qualname__", type(callback).__name__)


def _make_task(loop: SeededLoop, coro: Coroutine[Any, Any, Any], context: Context | None = None) -> _Task:
    """A task of the process in whose context it begins; it ends with that process."""
    process = PROCESS.get() if context is None else context.get(PROCESS)
    task = _Task(coro, loop, context)
    if process is not None:
        process.tasks.append(task)
    return task


class _Fiber(greenlet):
    """One blocking call. ``number`` is its own among those of its process."""

    number = 0
    owner: Process | None = None


class Process:
    """One run of one daemon: what it has under way ends with it, and nothing of it happens afterwards."""

    def __init__(self, loop: SeededLoop, name: str) -> None:
        self.loop = loop
        self.name = name
        self.dead = False
        self.on_fuse: Callable[[], None] = lambda: None
        self.fuse = 0
        """The process crashes in its n-th call of a disk or a bucket from now; 0: in none."""
        self.tasks: list[asyncio.Task[Any]] = []
        self.context = copy_context()
        self.context.run(PROCESS.set, self)
        self._fibers: dict[int, _Fiber] = {}
        self._numbers = count(1)

    def start(self, body: Callable[[], None], delay_s: float) -> None:
        """Run *body* in a greenlet of its own, after *delay_s*."""
        number = next(self._numbers)

        def whole() -> None:
            try:
                body()
            finally:
                self._fibers.pop(number, None)

        fiber = self._fibers[number] = _Fiber(whole)
        fiber.number, fiber.owner = number, self
        self.loop.call_later(delay_s, self._resume, number)

    def call(self, what: str, duration_s: float) -> None:
        """A call of a disk or a bucket begins: a step. Others run for *duration_s*, if this is a blocking call.

        Raises :class:`CrashedError` when the process ends before the call has had any effect.
        """
        self.check()
        self.loop.trace.add(f"{self.name} {what}")
        if self.fuse:
            self.fuse -= 1
            if not self.fuse:
                self.on_fuse()
        current = getcurrent()
        if duration_s and isinstance(current, _Fiber) and current.owner is self and not _inline.depth:
            self.loop.call_later(duration_s, self._resume, current.number)
            assert current.parent is not None
            current.parent.switch()
        self.check()

    def check(self) -> None:
        """Raise :class:`CrashedError` if the process is gone."""
        if self.dead:
            raise CrashedError

    def kill(self) -> None:
        """The process is gone: its calls have no effect from here. :meth:`bury` ends them."""
        self.dead = True

    async def bury(self) -> None:
        """End all that a dead process had under way, without any effect on the world."""
        left: list[asyncio.Task[Any]] = []
        for _ in range(_LAST_WORDS):
            for fiber in list(self._fibers.values()):
                if fiber:
                    fiber.throw(CrashedError)
            self._fibers.clear()
            left = [task for task in self.tasks if not task.done()]
            if not left:
                break
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=1.0)
        else:
            raise StuckError(f"{self.name} does not end: {left}")
        for task in self.tasks:
            if not task.cancelled():
                task.exception()  # it was noticed
        self.tasks.clear()

    def trim(self) -> None:
        """Forget tasks that have ended; what they failed with must not have been lost."""
        if len(self.tasks) > _PURGE_AT:
            self.tasks = [task for task in self.tasks if not task.done()]

    def _resume(self, number: int) -> None:
        fiber = self._fibers.get(number)
        if fiber is not None:
            fiber.switch()


class SeededWorkers:
    """:class:`cairnd.workers.Workers`: each call begins at some later moment, in a greenlet."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._loop = process.loop

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        self._process.check()
        future = self._loop.create_future()

        def body() -> None:
            if future.cancelled():
                return  # as with threads: what has not begun is not done
            try:
                result = function(*arguments)
            except BaseException as error:  # noqa: BLE001 - passed on
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        self._process.start(body, self._loop.chance.random() * 0.002)
        return await future  # type: ignore[no-any-return]

    def close(self) -> None:
        pass


class _Inline:
    depth = 0


_inline = _Inline()


class InlinePool(Executor):
    """Does at once, and in one go, what is submitted."""

    def __init__(self, _threads: int, _name: str) -> None:
        pass

    def submit(self, function: Callable[..., T], /, *arguments: Any, **options: Any) -> Future[T]:
        future: Future[T] = Future()
        _inline.depth += 1
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:  # noqa: BLE001 - passed on
            future.set_exception(error)
        finally:
            _inline.depth -= 1
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


class SeededClock:
    """:class:`cairnd.clock.Clock` of one machine. Its wall clock may be wrong, and may jump."""

    def __init__(self, loop: SeededLoop) -> None:
        self._loop = loop
        self.offset_s = 0.0

    def now_s(self) -> float:
        return 1_700_000_000.0 + self._loop.time() + self.offset_s

    def monotonic_s(self) -> float:
        return self._loop.time()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(max(0.0, duration_s))
