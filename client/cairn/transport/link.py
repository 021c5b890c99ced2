"""The link to the daemon: the connection of this moment, and what replaces it when the daemon restarts.

Calls ask the link for the current connection and report one that failed; the keep-alive thread makes the next one.
Between the two, callers wait here, with a deadline. Training goes on meanwhile: only calls to the daemon wait.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import Protocol

from cairn.transport.connection import Connection, ConnectionLostError, no_daemon
from cairn_api.errors import CairnError, ConfigurationError, UnavailableError


class Source(Protocol):
    """Where calls get their connection from."""

    def current(self, deadline_s: float) -> Connection:
        """The connection to use now; waits for one until *deadline_s* (monotonic)."""

    def failed(self, connection: Connection, error: CairnError, deadline_s: float) -> None:
        """A call on *connection* found no daemon. Returns when it may be repeated, else raises *error*."""


class Fixed:
    """A source of exactly one connection, without a second try: for what is said while a link is being made."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def current(self, deadline_s: float) -> Connection:  # noqa: ARG002 - nothing to wait for
        """The one connection."""
        return self._connection

    def failed(self, connection: Connection, error: CairnError, deadline_s: float) -> None:  # noqa: ARG002
        """Raises *error*."""
        raise error


class Link:
    """See the module. ``wake_fd`` is an eventfd that becomes readable when the keep-alive thread has work to do."""

    def __init__(self, connection: Connection, runtime_dir: str) -> None:
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self.wake_fd).atexit = False  # the keep-alive thread may outlive close()
        self._runtime_dir = runtime_dir
        self._changed = threading.Condition()
        self._connection: Connection | None = connection
        self._last_error: CairnError = no_daemon("it went away", runtime_dir)
        self._closed = False
        self._forked = False
        _LINKS.add(self)

    def current(self, deadline_s: float) -> Connection:
        """The current connection, waiting for a new one until *deadline_s* (monotonic seconds).

        Raises the reason why there is none, or :class:`ConfigurationError` after :meth:`close` and in a forked child.
        """
        if self._forked:  # before the lock: another thread of the parent may have held it during the fork
            raise ConfigurationError(
                "this Cairn client belongs to the parent process", hint="connect after forking, or use spawn"
            )
        with self._changed:
            while not self._closed:
                if self._connection is not None:
                    return self._connection
                if not self._changed.wait(deadline_s - time.monotonic()):
                    raise self._last_error
        raise ConfigurationError("this Cairn client is closed", hint="connect again")

    def failed(self, connection: Connection, error: CairnError, deadline_s: float) -> None:
        """See :class:`Source`. A channel that hiccuped while the daemon's side socket lives is simply tried again."""
        if connection.lost():
            self.drop(connection, error)
        if time.monotonic() >= deadline_s:
            raise error
        with self._changed:
            if self._connection is connection and not self._changed.wait(_HICCUP_PAUSE_S):
                return

    def drop(self, connection: Connection, error: CairnError) -> None:
        """Give up *connection*; the keep-alive thread makes the next one."""
        with self._changed:
            self._last_error = error
            if self._connection is connection:
                self._connection = None
                self._changed.notify_all()
        connection.close()
        self.wake()

    def peek(self) -> Connection | None:
        """The current connection, or None while there is none."""
        with self._changed:
            return self._connection

    def publish(self, connection: Connection) -> None:
        """A new connection is ready for everyone."""
        with self._changed:
            if not self._closed:
                self._connection = connection
                self._changed.notify_all()
                return
        connection.close()

    def refused(self, error: CairnError) -> None:
        """Remember why the last attempt to connect failed, for those who wait in vain."""
        with self._changed:
            self._last_error = error

    def wake(self) -> None:
        """Wake the keep-alive thread."""
        os.eventfd_write(self.wake_fd, 1)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """End the link for good; whoever waits in it is told."""
        with self._changed:
            self._closed = True
            connection, self._connection = self._connection, None
            self._changed.notify_all()
        if connection is not None:
            connection.close()
        if not self._forked:
            self.wake()

    def _after_fork_in_child(self) -> None:
        self._forked = True
        if self._connection is not None:
            self._connection.forget_in_child()


def open_first(runtime_dir: str, job: str | None, rank: int, client_version: str, timeout_s: float) -> Connection:
    """Open a first connection, waiting up to *timeout_s* for a daemon that is just starting."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return Connection.open(runtime_dir, job, rank, client_version)
        except ConnectionLostError as error:
            if time.monotonic() + _START_PAUSE_S >= deadline_s:
                raise UnavailableError(error.message, hint=error.hint, context=error.context) from error
        time.sleep(_START_PAUSE_S)


_HICCUP_PAUSE_S = 0.1
_START_PAUSE_S = 0.1
_LINKS: weakref.WeakSet[Link] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for link in list(_LINKS):
        link._after_fork_in_child()  # noqa: SLF001 - the hook belongs to the class and must not be called by others


os.register_at_fork(after_in_child=_after_fork_in_child)
