"""The side socket: does what gRPC cannot. It learns from the kernel who connects, and it passes descriptors.

One JSON object per SEQPACKET message, one reply each. The connection is the client's presence: when it closes, the
client is dead, its token with it, and what it left unfinished is settled.

    {"op": "hello", "protocol": 1, "job": "run-7", "rank": 0}            -> token, versions of daemon and protocol
    {"op": "offer", "segment": ..., "size": ..., "grant": ...}  + one fd -> {}
    {"op": "open", "lease": ..., "path": ...}                            -> size, tier, path_hint  + one fd
    {"op": "call", "name": "Reserve", "request": <base64>}               -> {"reply": <base64>}, or null: ask by gRPC

A "number" in a request stands in its reply too, so that a client that gave up waiting can tell late answers.

Whoever sends a descriptor decides how long closing it takes (a TCP socket with SO_LINGER, a file of FUSE). So what was
received is closed on threads, and so is every connection, whose unread packets may hold descriptors too. Those of users
who are not admitted are never taken in, and they have threads of their own: they hold up only each other.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import socket
import struct
from base64 import b64decode, b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cairn_api.errors import CairnError, ConfigurationError, OverloadedError
from cairn_api.names import check_job
from cairn_api.wire import PROTOCOL_VERSION, SIDE_PACKET_BYTES, SIDE_SOCKET_NAME
from cairnd import __version__
from cairnd.catalog.leases import Leases
from cairnd.restore.fetcher import Fetcher
from cairnd.restore.memory_copies import MemoryCopies
from cairnd.rpc.brief import NAMES, BriefCalls
from cairnd.rpc.server import remove_stale_socket
from cairnd.rpc.status import fields_of, unforeseen
from cairnd.session.clients import TOKEN_LIFETIME_S, Client, Clients
from cairnd.session.memory import CaptureMemory
from cairnd.tiers.errors import from_os_error

log = logging.getLogger("cairnd")

_BACKLOG = 128
_MAX_FDS = 4
_KERNEL_MAX_FDS = 253
"""SCM_MAX_FD. Room for all of them, as the kernel closes at once, on the receiving thread, what does not fit."""
_HELLO_S = 10.0
_MAX_UNGREETED = 64
"""Connections that have not said hello, of admitted users and of others each; further ones are closed at once."""
_MAX_CLOSING = 256
"""Connections of strangers that wait to be closed; with more, no further connection is accepted."""
_CLOSERS = 16
_STRANGERS_CLOSERS = 4
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_EXHAUSTED_PAUSE_S = 0.2
_PEERCRED = struct.Struct("3i")
OVERFLOW_UID = 65534
"""What the kernel shows of users of another user namespace: all of them look alike, so none is admitted."""


class SideSocket:
    """Accepts connections and serves each until it closes."""

    def __init__(
        self,
        runtime_dir: Path,
        node: str,
        boot: str,
        clients: Clients,
        memory: CaptureMemory,
        leases: Leases,
        fetcher: Fetcher,
        memory_copies: MemoryCopies,
        brief_calls: BriefCalls,
        *,
        on_gone: Callable[[Client], None],
        tier1_root: Path,
    ) -> None:
        self._path = runtime_dir / SIDE_SOCKET_NAME
        self._node = node
        self._boot = boot
        self._clients = clients
        self._memory = memory
        self._leases = leases
        self._fetcher = fetcher
        self._memory_copies = memory_copies
        self._brief_calls = brief_calls
        self._on_gone = on_gone
        self._tier1_root = tier1_root
        self._socket: socket.socket | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._ungreeted: set[socket.socket] = set()
        self._strangers: set[socket.socket] = set()
        self._closing = 0
        self._closed_one = asyncio.Event()
        self._closers = ThreadPoolExecutor(_CLOSERS, "cairnd-close")
        self._strangers_closers = ThreadPoolExecutor(_STRANGERS_CLOSERS, "cairnd-turn-away")

    def start(self) -> None:
        """Bind and listen."""
        remove_stale_socket(self._path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        listener.bind(str(self._path))
        self._path.chmod(0o666)
        listener.listen(_BACKLOG)
        self._socket = listener

    async def run(self) -> None:
        """Accept until cancelled."""
        assert self._socket is not None, "start() comes first"
        loop = asyncio.get_running_loop()
        exhausted = False
        while True:
            while self._closing >= _MAX_CLOSING:
                self._closed_one.clear()
                await self._closed_one.wait()
            try:
                connection, _ = await loop.sock_accept(self._socket)
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                # Connections wait in the backlog until descriptors are free again; those that exist are served.
                if not exhausted:
                    log.warning("%s", from_os_error(error, "accept connections on", self._path))
                exhausted = True
                await asyncio.sleep(_EXHAUSTED_PAUSE_S)
                continue
            if exhausted:
                log.warning("connections on %s are accepted again", self._path)
            exhausted = False
            connection.setblocking(False)
            self._receive_visitor(connection)

    async def stop(self) -> None:
        """Close all connections and remove the socket."""
        if self._socket is not None:
            self._socket.close()
            self._path.unlink(missing_ok=True)
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        for threads in (self._closers, self._strangers_closers):
            threads.shutdown(wait=False)

    def _receive_visitor(self, connection: socket.socket) -> None:
        """Decide by the kernel's word who this is, before anything is read from it."""
        pid, uid, gid = _PEERCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
        waiting = self._ungreeted
        try:
            if len(self._ungreeted) >= _MAX_UNGREETED:
                raise OverloadedError("too many connections at once", hint="try again")
            work = self._serve(connection, self._admit(uid, gid, pid))
        except CairnError as error:
            waiting = self._strangers
            if len(self._strangers) >= _MAX_UNGREETED:
                self._close_stranger(connection)
                return
            work = self._turn_away(connection, error)
        waiting.add(connection)
        task = asyncio.ensure_future(work)
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _turn_away(self, connection: socket.socket, error: CairnError) -> None:
        """Tell a stranger why once it has spoken: what is unread at close would reset the connection instead."""
        loop = asyncio.get_running_loop()
        try:
            await asyncio.wait_for(_ready(connection, writing=False), _HELLO_S)
            await loop.run_in_executor(self._strangers_closers, _answer_unread, connection, _error(error))
        except OSError:
            return  # the peer is gone or says nothing; either way its connection ends here
        finally:
            self._strangers.discard(connection)
            self._close_stranger(connection)

    def _close_stranger(self, connection: socket.socket) -> None:
        def closed(_: asyncio.Future[None]) -> None:
            self._closing -= 1
            self._closed_one.set()

        self._closing += 1
        closing = asyncio.get_running_loop().run_in_executor(self._strangers_closers, connection.close)
        closing.add_done_callback(closed)

    async def _serve(self, connection: socket.socket, client: Client) -> None:
        try:
            hello, fds = await asyncio.wait_for(self._receive(connection), _HELLO_S)
            await self._close(fds)
            await self._converse(connection, client, hello)
        except CairnError as error:
            await _reply(connection, _error(error))
        except OSError:
            return  # the peer is gone or says nothing; either way its connection ends here
        finally:
            self._ungreeted.discard(connection)
            self._closers.submit(connection.close)
            self._clients.disconnect(client)
            self._on_gone(client)

    async def _close(self, fds: list[int]) -> None:
        """Close what a peer sent; its own conversation waits for that, and nobody else's."""
        if fds:
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._closers, _close, fds))

    async def _receive(self, connection: socket.socket) -> tuple[bytes, list[int]]:
        """The next packet and its descriptors; an empty packet means that the peer is gone."""
        while True:
            try:
                message, received, flags, _ = socket.recv_fds(
                    connection, SIDE_PACKET_BYTES, _KERNEL_MAX_FDS, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await _ready(connection, writing=False)
                continue
            fds = list(received)
            if len(fds) > _MAX_FDS or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                await self._close(fds)
                raise ConfigurationError(
                    f"side-socket messages have at most {SIDE_PACKET_BYTES} bytes and {_MAX_FDS} descriptors"
                )
            return message, fds

    def _admit(self, uid: int, gid: int, pid: int) -> Client:
        if uid == OVERFLOW_UID:
            raise ConfigurationError(
                "the caller's user is not visible here (another user namespace)",
                hint="run cairnd without PrivateUsers=, and in Kubernetes as a sidecar of the trainer's pod",
            )
        return self._clients.connect(uid, gid, pid)

    async def _converse(self, connection: socket.socket, client: Client, hello: bytes) -> None:
        message, fds, greeted = hello, list[int](), False
        while message:
            outgoing: list[int] = []
            number = None
            try:
                request = _parse(message)
                number = request.get("number")
                if not greeted:
                    reply = self._hello(client, request)
                    greeted = True
                    self._ungreeted.discard(connection)
                elif request["op"] == "call":
                    reply = await self._call(client, request)
                else:
                    reply, outgoing = self._handle(client, request, fds)
            except CairnError as error:
                reply = _error(error)
            except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
                reply = _error(ConfigurationError(f"malformed side-socket message: {type(error).__name__} {error}"))
            except OSError as error:
                reply = _error(unforeseen(error, "side socket"))
            finally:
                await self._close(fds)
            if isinstance(number, int):
                reply["number"] = number
            try:
                await _reply(connection, reply, outgoing)
            finally:
                _close(outgoing)  # files of tier 1, opened here
            if not greeted:
                return
            message, fds = await self._receive(connection)
        await self._close(fds)

    def _hello(self, client: Client, request: dict[str, Any]) -> dict[str, Any]:
        if request["op"] != "hello":
            raise ConfigurationError("the first message on the side socket is hello")
        if request["protocol"] != PROTOCOL_VERSION:
            raise ConfigurationError(
                f"this daemon (cairnd {__version__}) speaks protocol {PROTOCOL_VERSION}, the client speaks "
                f"{request['protocol']!r}",
                hint="install the same version of cairn-checkpoint for the trainer and for the daemon",
            )
        if request.get("job") is not None:
            check_job(str(request["job"]))  # for an early answer only: Join decides whose job it is
        rank = request.get("rank")
        client.rank = int(rank) if rank is not None else None
        return {
            "token": self._clients.issue_token(client),
            "token_lifetime_s": TOKEN_LIFETIME_S,
            "protocol": PROTOCOL_VERSION,
            "daemon_version": __version__,
            "node": self._node,
            "boot": self._boot,
            "uid": client.uid,
            "calls": NAMES,
        }

    async def _call(self, client: Client, request: dict[str, Any]) -> dict[str, Any]:
        packed = b64decode(str(request["request"]), validate=True)
        answer = await self._brief_calls.answer(client, str(request["name"]), packed)
        return {"reply": None if answer is None else b64encode(answer).decode()}

    def _handle(self, client: Client, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        if request["op"] == "offer":
            if len(fds) != 1:
                raise ConfigurationError(f"an offer carries one descriptor, this one {len(fds)}")
            self._memory.accept(
                client.number, client.uid, str(request["grant"]), str(request["segment"]), fds[0], int(request["size"])
            )
            fds.clear()  # it is the segment's now
            return {}, []
        if request["op"] == "open":
            lease = self._leases.get(str(request["lease"]), client.number)
            fd, fetched = self._fetcher.open(lease, str(request["path"]))
            hint = None if fetched.segment is not None else str(self._tier1_root / fetched.key)
            hold = self._fetcher.hold(lease, fetched.path) if request.get("hold") is True else None
            return {"size": fetched.size_bytes, "tier": str(fetched.tier), "path_hint": hint, "hold": hold}, [fd]
        if request["op"] == "end_hold":
            self._memory_copies.end_hold(client.number, str(request["hold"]))
            return {}, []
        raise ConfigurationError(f"unknown side-socket operation {request['op']!r}")


def _parse(message: bytes) -> dict[str, Any]:
    request = json.loads(message)
    if not isinstance(request, dict) or not isinstance(request.get("op"), str):
        raise ValueError("a message is a JSON object with an op")
    return request


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _error(error: CairnError) -> dict[str, Any]:
    return {"error": fields_of(error)}


def _answer_unread(connection: socket.socket, reply: dict[str, Any]) -> None:
    """On a thread: take one packet without its descriptors, which the kernel then closes here, and answer."""
    connection.recv(SIDE_PACKET_BYTES)
    connection.send(json.dumps(reply).encode())


async def _reply(connection: socket.socket, reply: dict[str, Any], fds: list[int] | None = None) -> None:
    data = json.dumps(reply).encode()
    while True:
        try:
            socket.send_fds(connection, [data], fds or [])
            return
        except BlockingIOError:
            await _ready(connection, writing=True)
        except (BrokenPipeError, ConnectionResetError):
            return  # the peer left before its answer: its end of the connection says so


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _ready(connection: socket.socket, *, writing: bool) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    fd = connection.fileno()
    add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    add(fd, _wake, future)
    try:
        await future
    finally:
        remove(fd)
