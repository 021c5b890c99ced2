"""``cairnd``: parse, load settings, run the app, say honestly how it ended."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence

from cairn_api.errors import CairnError
from cairnd.allocator import keep_freed_memory
from cairnd.app import App
from cairnd.events import EventFormatter
from cairnd.limits import check_limits
from cairnd.settings import Settings, load_settings

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIGURATION = 2
EXIT_LEFT_BEHIND = 3
"""Stopped in order, but something that should be in tier 2 is not."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon until SIGTERM or SIGINT; returns the exit status.

    Called without *arguments* it is the program, and ends the process itself if a thread would hold it up.
    """
    try:
        settings = load_settings(sys.argv[1:] if arguments is None else arguments, os.environ)
    except CairnError as error:
        print(f"cairnd: {error}", file=sys.stderr)
        return EXIT_CONFIGURATION
    _configure_logging(settings)
    keep_freed_memory()
    try:
        check_limits()
        status = asyncio.run(_serve(settings))
    except CairnError as error:
        print(f"cairnd: {error}", file=sys.stderr)
        status = EXIT_CONFIGURATION
    if arguments is None and threading.active_count() > 1:
        # A request that hangs in a dead bucket would hold up the exit beyond every deadline, and hide the status.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(status)
    return status


def _configure_logging(settings: Settings) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(EventFormatter(settings.log_format))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    for noisy in ("botocore", "aiobotocore", "s3fs", "fsspec", "asyncio", "urllib3"):
        # Their debug output would show credentials.
        logging.getLogger(noisy).setLevel(logging.WARNING)


async def _serve(settings: Settings) -> int:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    app = App(settings, os.environ)
    try:
        await app.start()
        running = asyncio.ensure_future(app.run())
        waiting = asyncio.ensure_future(stopping.wait())
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            waiting.cancel()
            logging.getLogger("cairnd").critical("a background task failed", exc_info=running.exception())
            return EXIT_FAILED
        left = await app.drain_and_stop()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return EXIT_LEFT_BEHIND if left else EXIT_OK
    finally:
        await app.stop()


if __name__ == "__main__":
    sys.exit(main())
