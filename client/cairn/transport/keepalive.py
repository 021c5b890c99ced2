"""The thread that keeps a client alive in the daemon's eyes, and gives it a new daemon when the old one dies."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from cairn.transport.calls import Caller
from cairn.transport.connection import Connection, ConnectionLostError
from cairn.transport.link import Fixed, Link
from cairn.transport.messages import Alive
from cairn.transport.save_calls import SaveCalls
from cairn_api.errors import CairnError, UnavailableError

log = logging.getLogger("cairn")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
_QUIET_S = 2.0
"""A daemon that is away no longer than that was restarted, which nobody has to be told of."""


class KeepAlive:
    """See the module.

    *reopen* opens a connection and brings the new daemon up to date on it; it raises when that is not possible yet.
    *replied* receives every answer: failures of background work and versions whose buffers are free. Both are called
    on the thread of this class. *patience_s* is how long calls wait for a daemon that is away, for the log.
    """

    def __init__(
        self,
        link: Link,
        job: str,
        lease_s: float,
        patience_s: float,
        *,
        reopen: Callable[[], Connection],
        replied: Callable[[Alive], None],
    ) -> None:
        self._link = link
        self._job = job
        self._lease_s = lease_s
        self._patience_s = patience_s
        self._away_since_s: float | None = None
        self._told_away = False
        self._reopen = reopen
        self._replied = replied
        self._thread = threading.Thread(target=self._run, name="cairn-keepalive", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end after the link was closed."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._link.closed:
            connection = self._link.peek()
            if connection is None:
                pause_s = self._reconnect(pause_s)
                continue
            pause_s = FIRST_PAUSE_S
            self._keep(connection)

    def _keep(self, connection: Connection) -> None:
        """One interval with a healthy connection."""
        interval_s = min(self._lease_s, connection.welcome.token_lifetime_s) / 3
        if connection.wait_lost(self._link.wake_fd, interval_s):
            self._link.drop(connection, ConnectionLostError("the daemon closed the connection", hint=_HINT))
            return
        self._drain_wakes()
        if self._link.closed or connection.lost():
            return
        try:
            reply = SaveCalls(Caller(Fixed(connection), self._job, patience_s=0), rank=0).keep_alive()
        except ConnectionLostError as error:
            if connection.lost():
                self._link.drop(connection, error)
            return
        except CairnError as error:
            # The daemon knows this connection no more, or is stuck: a fresh start is the only way forward.
            log.warning("keep-alive failed, connecting again: %s", error)
            self._link.drop(connection, UnavailableError(error.message, hint=error.hint, context=error.context))
            return
        if reply.token:
            connection.token = reply.token
        if reply.lease_s > 0:
            self._lease_s = reply.lease_s
        self._replied(reply)

    def _reconnect(self, pause_s: float) -> float:
        """One attempt to connect again; returns how long to wait before the next."""
        if self._away_since_s is None:
            self._away_since_s, self._told_away = time.monotonic(), False
        try:
            connection = self._reopen()
        except CairnError as error:
            self._link.refused(error)
            self._tell_away(error, time.monotonic() - self._away_since_s)
            deadline_s = time.monotonic() + pause_s
            while not self._link.closed and (left_s := deadline_s - time.monotonic()) > 0:
                time.sleep(min(left_s, FIRST_PAUSE_S))
            return min(pause_s * 2, LONGEST_PAUSE_S)
        self._link.publish(connection)
        away_s, self._away_since_s = time.monotonic() - self._away_since_s, None
        log.log(
            logging.WARNING if self._told_away else logging.INFO,
            "connected again to cairnd on %s, which was away for %.1f s", connection.welcome.node, away_s,
        )  # fmt: skip
        return FIRST_PAUSE_S

    def _tell_away(self, error: CairnError, away_s: float) -> None:
        """Once per absence, when it is more than a restart: calls wait in silence, and somebody should know why."""
        if self._told_away or away_s < _QUIET_S:
            return
        self._told_away = True
        log.warning(
            "the daemon has been away for %.0f s; training goes on, saves and loads wait up to reconnect_timeout_s "
            "(%g s) for it and then fail: %s",
            away_s, self._patience_s, error,
        )  # fmt: skip

    def _drain_wakes(self) -> None:
        try:
            os.eventfd_read(self._link.wake_fd)
        except BlockingIOError:
            return


_HINT = "start cairnd (systemctl start cairnd) or set runtime_dir"
