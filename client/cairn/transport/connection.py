"""One live connection to the daemon: the side socket (presence, descriptors), the gRPC channel and the token.

The side socket *is* the client's presence: the kernel closes it when the process dies, however it dies, and the daemon
acts on that. A connection is made once and closed once; ``link`` replaces it.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cairn_api.errors import ERRORS, CairnError, ConfigurationError, InternalError, UnavailableError
from cairn_api.wire import (
    GRPC_SOCKET_NAME,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    SIDE_PACKET_BYTES,
    SIDE_SOCKET_NAME,
)

SIDE_TIMEOUT_S = 30.0
"""A side-socket reply needs no disk and no network; a daemon that takes longer is stuck."""

_SOCKET_PATH_BYTES = 107
"""Longest path of a unix socket: ``sun_path`` holds 108 bytes with the final zero."""

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Not grpc.min_reconnect_backoff_ms: it is also how long a connection may take, and a busy daemon takes its time.
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),  # a closed channel's backoff must not delay its successor
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, slots=True)
class Welcome:
    """The daemon's answer to ``hello``."""

    token: str
    token_lifetime_s: float
    daemon_version: str
    node: str
    boot: str
    calls: frozenset[str]
    """Those that :meth:`Connection.call` can make; a daemon of another version may know fewer."""


class ConnectionLostError(UnavailableError):
    """The daemon is gone (or was never there). The link catches this; callers see it as UnavailableError."""


@contextmanager
def understood() -> Iterator[None]:
    """What cannot be read in a daemon's answer, inside, becomes :class:`InternalError` with the next step."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, DecodeError) as error:
        raise InternalError(
            f"the daemon's answer cannot be understood: {type(error).__name__}: {error}",
            hint="install the same version of cairn-checkpoint for the trainer and for the daemon",
        ) from error


def no_daemon(reason: object, runtime_dir: str) -> ConnectionLostError:
    """The error of a daemon that does not answer."""
    return ConnectionLostError(
        f"no daemon answers in {runtime_dir} ({reason})",
        hint="start cairnd (systemctl start cairnd) or set runtime_dir",
        context={"runtime_dir": runtime_dir},
    )


class Connection:
    """See the module. Use :meth:`open`; safe to use from several threads."""

    def __init__(self, side: socket.socket, channel: grpc.Channel, welcome: Welcome, runtime_dir: str) -> None:
        self.channel = channel
        self.welcome = welcome
        self.token = welcome.token
        self._side = side
        self._runtime_dir = runtime_dir
        self._side_lock = threading.Lock()
        self._requests = 0

    @classmethod
    def open(cls, runtime_dir: str, job: str | None, rank: int, client_version: str) -> Connection:
        """Connect and say hello.

        Raises :class:`ConnectionLostError` when nothing listens, and :class:`ConfigurationError` when the daemon
        refuses this client (another protocol, a uid that is not allowed) or the socket's path is too long.
        """
        path = str(Path(runtime_dir) / SIDE_SOCKET_NAME)
        if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
            raise ConfigurationError(
                f"the socket path {path} is longer than {_SOCKET_PATH_BYTES} bytes", hint="set a shorter runtime_dir"
            )
        side = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            side.settimeout(SIDE_TIMEOUT_S)
            side.connect(path)
            reply, _ = _exchange(
                side,
                {
                    "op": "hello",
                    "protocol": PROTOCOL_VERSION,
                    "client_version": client_version,
                    "job": job,
                    "rank": rank,
                },
            )
            with understood():
                welcome = Welcome(
                    token=str(reply["token"]),
                    token_lifetime_s=float(reply["token_lifetime_s"]),
                    daemon_version=str(reply["daemon_version"]),
                    node=str(reply["node"]),
                    boot=str(reply["boot"]),
                    calls=frozenset(reply.get("calls", ())),
                )
        except PermissionError as error:
            side.close()
            raise ConfigurationError(
                f"this user may not use the daemon in {runtime_dir} ({error.strerror})",
                hint="ask the operator to add your uid to allowed_uids and your group to the runtime folder",
            ) from error
        except OSError as error:
            side.close()
            raise no_daemon(error.strerror or error, runtime_dir) from error
        except BaseException:
            side.close()
            raise
        address = Path(runtime_dir) / GRPC_SOCKET_NAME
        return cls(side, grpc.insecure_channel(f"unix://{address}", options=_CHANNEL_OPTIONS), welcome, runtime_dir)

    def request(self, message: Mapping[str, object], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        """One request on the side socket; returns the reply and the descriptors (owned by the caller) with it.

        Raises what the daemon raised, :class:`ConnectionLostError` when it is gone, and :class:`UnavailableError` when
        it does not answer.
        """
        with self._side_lock:
            self._requests += 1
            try:
                return _exchange(self._side, {**message, "number": self._requests}, fds)
            except TimeoutError as error:
                raise UnavailableError(
                    f"the daemon in {self._runtime_dir} is there, but did not answer within {SIDE_TIMEOUT_S:g} s",
                    hint="run `cairn status`, and look at the daemon's log and the machine's load",
                    context={"runtime_dir": self._runtime_dir, "op": message["op"]},
                ) from error
            except OSError as error:
                raise no_daemon(error.strerror or error, self._runtime_dir) from error

    def call(self, name: str, packed: bytes) -> bytes | None:
        """Make a gRPC call of ``welcome.calls`` on the side socket; None when the daemon wants it by gRPC after all.

        *packed* has at most :data:`cairn_api.wire.BRIEF_BYTES`. Raises as :meth:`request` does.
        """
        reply, _ = self.request({"op": "call", "name": name, "request": b64encode(packed).decode()})
        with understood():
            return None if reply["reply"] is None else b64decode(reply["reply"])

    def lost(self) -> bool:
        """Whether the daemon closed its end (it stopped, or died) or this end is closed."""
        if self._side.fileno() < 0:
            return True
        poller = select.poll()
        poller.register(self._side, select.POLLRDHUP)
        return bool(poller.poll(0))

    def wait_lost(self, wake_fd: int, timeout_s: float) -> bool:
        """Wait until the daemon is gone, *wake_fd* becomes readable or *timeout_s* passed; True when it is gone."""
        if self._side.fileno() < 0:
            return True
        poller = select.poll()
        poller.register(self._side, select.POLLRDHUP)
        poller.register(wake_fd, select.POLLIN)
        side_fd = self._side.fileno()
        return any(fd == side_fd for fd, _ in poller.poll(max(0.0, timeout_s) * 1000))

    def close(self) -> None:
        """Leave. The daemon sees the end of this client's presence, and so does a thread that waits for a reply."""
        with suppress(OSError):  # the daemon was faster
            self._side.shutdown(socket.SHUT_RDWR)
        # A thread that is about to wait for a reply knows the socket by its number. Were it closed now, the next
        # connection could be given that number, and the thread would wait there for an answer that nobody owes it.
        with self._side_lock:
            self._side.close()
        self.channel.close()

    def forget_in_child(self) -> None:
        """In a forked child: let go of the parent's socket, or the parent's death would go unnoticed."""
        self._side.close()


def _exchange(
    side: socket.socket, message: Mapping[str, object], fds: Sequence[int] = ()
) -> tuple[dict[str, Any], list[int]]:
    data = json.dumps(message).encode()
    if len(data) > SIDE_PACKET_BYTES:
        raise InternalError(f"a side-socket message of {len(data)} bytes is too long", context={"op": message["op"]})
    socket.send_fds(side, [data], list(fds))
    while True:
        reply, received = _receive(side, message)
        # Control-C may have ended an earlier exchange between its request and its reply.
        if reply.get("number") == message.get("number") or "number" not in reply:
            break
        _close(received)
    if "error" in reply:
        _close(received)
        with understood():
            error = error_from(reply["error"])
        raise error
    return reply, received


def _receive(side: socket.socket, message: Mapping[str, object]) -> tuple[dict[str, Any], list[int]]:
    data, received, flags, _ = socket.recv_fds(side, SIDE_PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        if not data:
            raise ConnectionResetError("the daemon closed the connection")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise InternalError("the daemon's answer was cut short", context={"op": message["op"]})
        with understood():
            reply = json.loads(data)
            if not isinstance(reply, dict):
                raise TypeError(f"{type(reply).__name__} instead of an object")
        return reply, list(received)
    except BaseException:
        _close(received)
        raise


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def error_from(fields: Mapping[str, Any]) -> CairnError:
    """The daemon's error, to be raised again here: ``{"class", "message", "hint", "context"}``."""
    cls = ERRORS.get(str(fields.get("class")), InternalError)
    return cls(str(fields.get("message")), hint=str(fields.get("hint", "")), context=fields.get("context") or {})
