"""How a call is made: the token on it, a deadline, translation of errors, and repetition after a reconnect.

All calls are idempotent for one launch, so a call that met a dying daemon is repeated once the link has a new
connection. What the daemon refused is raised as the daemon's own error and never repeated.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from cairn.transport.connection import Connection, ConnectionLostError, understood
from cairn.transport.link import Source
from cairn.transport.messages import error_from_wire
from cairn_api.errors import CairnError, ConfigurationError, InternalError, OverloadedError, UnavailableError
from cairn_api.v1 import types_pb2
from cairn_api.wire import BRIEF_BYTES, ERROR_METADATA, TOKEN_METADATA

CALL_TIMEOUT_S = 30.0
"""For calls that only change the daemon's memory."""
LEAVE_TIMEOUT_S = 2.0
"""For what is said on the way out: nobody wants to wait for that."""
STORAGE_CALL_TIMEOUT_S = 120.0
"""For calls during which the daemon asks disks or the object store; its own time-outs are shorter."""
RESOLVE_TIMEOUT_S = 300.0
"""For Resolve, which also waits (up to two minutes) for versions that are just being written."""
SILENCE_TIMEOUT_S = 120.0
"""A stream without a message for this long is given up: progress comes at least every few seconds."""

T = TypeVar("T")
Reply = TypeVar("Reply", bound=Message)
Service = Callable[[grpc.Channel], Any]


class Caller:
    """Makes calls on whatever connection *source* has, with up to *patience_s* for a daemon that restarts.

    Every call raises the daemon's errors, and :class:`UnavailableError` when the daemon stays away longer or does not
    answer in time.
    """

    def __init__(self, source: Source, job: str, patience_s: float) -> None:
        self.job = job
        self._source = source
        self._patience_s = patience_s

    def unary(self, service: Service, name: str, reply: type[Reply], request: Message, timeout_s: float) -> Reply:
        """Call ``service.name(request)``, which answers a *reply*: on the side socket if the daemon offers that."""

        def attempt(connection: Connection) -> Reply:
            if name in connection.welcome.calls and request.ByteSize() <= BRIEF_BYTES:
                packed = connection.call(name, request.SerializeToString())
                if packed is not None:
                    with understood():
                        return reply.FromString(packed)
            answer = self.stub(connection, service, name)(request, timeout=timeout_s)
            if not isinstance(answer, reply):
                raise InternalError(f"{name} answered {type(answer).__name__}")
            return answer

        return self.repeat(attempt)

    def repeat(self, attempt: Callable[[Connection], T]) -> T:
        """Run *attempt* on the current connection, and again on the next one when that was lost."""
        deadline_s = time.monotonic() + self._patience_s
        while True:
            connection = self._source.current(deadline_s)
            try:
                return attempt(connection)
            except grpc.RpcError as error:
                problem = translate(error)
                if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                    connection.close()  # its token is spent, so only a new hello helps
                if error.code() is grpc.StatusCode.CANCELLED and connection.lost():
                    problem = ConnectionLostError(problem.message, hint=problem.hint)
            except ConnectionLostError as error:
                problem = error
            except ValueError as error:  # what grpc raises for a channel that another thread has just closed
                if not connection.lost():
                    raise
                problem = _lost(error)
            if not isinstance(problem, ConnectionLostError):
                raise problem
            self._source.failed(connection, problem, deadline_s)

    def current(self) -> Connection:
        """The connection for a call that must not be repeated."""
        return self._source.current(time.monotonic() + self._patience_s)

    @staticmethod
    def stub(connection: Connection, service: Service, name: str) -> Callable[..., Any]:
        """``service.name`` on *connection*, with its token."""
        method = getattr(service(connection.channel), name)

        def call(request: object, *, timeout: float | None = None) -> Any:
            return method(request, timeout=timeout, metadata=((TOKEN_METADATA, connection.token),))

        return call


def listen(stream: Any) -> Iterator[Any]:
    """The messages of a streaming call.

    It is cancelled, and :class:`UnavailableError` raised, when it falls silent for :data:`SILENCE_TIMEOUT_S`.
    """
    watch = _Watch(stream.cancel)
    try:
        while True:
            try:
                with watch.waiting():
                    message = next(stream, None)
            except grpc.RpcError as error:
                if not watch.gave_up:
                    raise
                raise UnavailableError(
                    f"the daemon lives but sent nothing for {SILENCE_TIMEOUT_S:.0f} s",
                    hint="see the daemon's log (journalctl -u cairnd)",
                ) from error
            if message is None:
                return
            yield message
    finally:
        watch.end()


class _Watch:
    """Calls *give_up* when :meth:`waiting` takes too long. One thread per stream: messages may come by the thousand."""

    def __init__(self, give_up: Callable[[], object]) -> None:
        self.gave_up = False
        self._give_up = give_up
        self._ended = threading.Event()
        self._since_s = math.inf
        threading.Thread(target=self._run, name="cairn-listen", daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._since_s = time.monotonic()
        try:
            yield
        finally:
            self._since_s = math.inf

    def end(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        rest_s = SILENCE_TIMEOUT_S
        while not self._ended.wait(rest_s):
            waited_s = max(0.0, time.monotonic() - self._since_s)
            if waited_s >= SILENCE_TIMEOUT_S:
                self.gave_up = True
                self._give_up()
                return
            rest_s = SILENCE_TIMEOUT_S - waited_s


_BY_STATUS: Mapping[grpc.StatusCode, type[CairnError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: UnavailableError,
    grpc.StatusCode.CANCELLED: UnavailableError,  # by a living daemon: it would do so again
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNIMPLEMENTED: ConfigurationError,
    grpc.StatusCode.INVALID_ARGUMENT: ConfigurationError,
}
"""For failures that gRPC itself reports. What the daemon raises on purpose names its class."""

_LOST = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED})


def translate(error: grpc.RpcError) -> CairnError:
    """The error to raise for a failed call: the daemon's own, or one for what happened on the way.

    :class:`ConnectionLostError` means that no daemon has seen the call through and it may be repeated.
    """
    for item in error.trailing_metadata() or ():
        if item.key == ERROR_METADATA and isinstance(item.value, bytes):
            return error_from_wire(types_pb2.ErrorInfo.FromString(item.value))
    code, details = error.code(), error.details()
    if code in _LOST:
        return _lost(details)
    hint = "see the daemon's log (journalctl -u cairnd)"
    return _BY_STATUS.get(code, InternalError)(f"the call to the daemon failed: {code.name}: {details}", hint=hint)


def _lost(what: object) -> ConnectionLostError:
    return ConnectionLostError(
        f"the daemon stopped answering ({what})", hint="start cairnd (systemctl start cairnd) or set runtime_dir"
    )
