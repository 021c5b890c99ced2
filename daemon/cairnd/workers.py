"""Where blocking work runs: a pool of threads behind an interface, so that a simulation can run it in line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from cairn_api.errors import OverloadedError

T = TypeVar("T")


class Workers(Protocol):
    """Runs blocking functions without blocking the event loop."""

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run ``function(*arguments)`` elsewhere and return its result or raise its error.

        Cancelling the caller does not stop a function that has begun: it must have a deadline of its own. Raises
        :class:`OverloadedError` when the function ran out of memory: what it took is free again.
        """

    def close(self) -> None:
        """Accept no more work."""


class ThreadWorkers:
    """A bounded pool of threads."""

    def __init__(self, name: str, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: function(*arguments))
        except MemoryError as error:
            raise OverloadedError("there is not enough memory", hint="give the daemon more memory") from error

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await *work*; if the caller is cancelled meanwhile, work that must not be left half done still ends first.

    A file may only be closed when no thread writes to it any more, and a clean-up must not be cancelled itself.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # nobody waits for it any more; asyncio would report it as forgotten
        raise
