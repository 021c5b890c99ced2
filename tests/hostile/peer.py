"""A client made of sockets and bytes, for threads: nothing between a test and the wire."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc

from cairn_api.v1 import admin_pb2
from cairn_api.wire import GRPC_SOCKET_NAME, PROTOCOL_VERSION, SIDE_PACKET_BYTES, SIDE_SOCKET_NAME, TOKEN_METADATA
from tests.daemon.rpc.peer import as_user

TIMEOUT_S = 30.0
"""After which a test calls it a hang."""


class GoneError(Exception):
    """The daemon closed the connection."""


class Peer:
    """One side-socket connection (as *uid*) and one gRPC channel. ``close`` it."""

    def __init__(self, runtime_dir: Path, *, uid: int | None = None) -> None:
        self.runtime_dir = runtime_dir
        self._path = str(runtime_dir / SIDE_SOCKET_NAME)
        self._uid = uid
        self.side = self._connected()
        self.channel = grpc.insecure_channel(
            f"unix:{runtime_dir / GRPC_SOCKET_NAME}",
            options=[
                ("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1), ("grpc.max_metadata_size", 1 << 20),
                ("grpc.absolute_max_metadata_size", 1 << 20),
            ],
        )  # fmt: skip
        self.token = ""

    def _connected(self) -> socket.socket:
        side = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        side.settimeout(TIMEOUT_S)
        as_user(self._uid, lambda: side.connect(self._path))
        return side

    def reconnect(self) -> None:
        """Leave, and say hello again."""
        self.side.close()
        self.side = self._connected()
        self.hello()

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        """One packet; raises :class:`GoneError`."""
        try:
            socket.send_fds(self.side, [packet], list(fds))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise GoneError from error

    def receive(self) -> dict[str, Any]:
        """One reply, its descriptors closed; raises :class:`GoneError`, or ``TimeoutError`` if the daemon hangs."""
        try:
            data, fds, _, _ = socket.recv_fds(self.side, 1 << 20, 8)
        except ConnectionResetError as error:
            raise GoneError from error
        for fd in fds:
            os.close(fd)
        if not data:
            raise GoneError
        reply = json.loads(data)
        assert isinstance(reply, dict), reply
        assert len(data) <= SIDE_PACKET_BYTES, "no client reads more"
        return reply

    def ask(self, request: object, fds: Sequence[int] = ()) -> dict[str, Any]:
        """One request, one reply."""
        self.send(json.dumps(request).encode(), fds)
        return self.receive()

    def hello(self, **changes: object) -> dict[str, Any]:
        """The first message; takes the token."""
        reply = self.ask({"op": "hello", "protocol": PROTOCOL_VERSION, "job": None, "rank": 0, **changes})
        self.token = str(reply.get("token", ""))
        return reply

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return ((TOKEN_METADATA, self.token),)

    def unary(self, path: str, packed: bytes, timeout_s: float = TIMEOUT_S) -> bytes:
        """A call of one message and one answer, both as bytes."""
        call: Any = self.channel.unary_unary(path)
        answer: bytes = call(packed, metadata=self.metadata, timeout=timeout_s)
        return answer

    def upload(self, path: str, messages: Iterable[bytes], timeout_s: float = TIMEOUT_S) -> bytes:
        """A call of many messages and one answer."""
        call: Any = self.channel.stream_unary(path)
        answer: bytes = call(iter(messages), metadata=self.metadata, timeout=timeout_s)
        return answer

    def download(self, path: str, packed: bytes, timeout_s: float = TIMEOUT_S, most: int = 1000) -> list[bytes]:
        """A call of one message and many answers, of which at most *most* are read."""
        method: Any = self.channel.unary_stream(path)
        call: Any = method(packed, metadata=self.metadata, timeout=timeout_s)
        answers: list[bytes] = []
        try:
            for answer in call:
                answers.append(answer)
                if len(answers) >= most:
                    break
        finally:
            call.cancel()
        return answers

    def status(self, timeout_s: float = TIMEOUT_S) -> admin_pb2.StatusReply:
        """``Admin.Status``, after a new hello when the token has expired."""
        for attempt in range(2):
            try:
                packed = self.unary("/cairn_api.v1.Admin/Status", b"", timeout_s)
                return admin_pb2.StatusReply.FromString(packed)
            except grpc.RpcError as error:
                if attempt or error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                    raise
                self.reconnect()
        raise AssertionError("not reached")

    def close(self) -> None:
        """Leave."""
        self.side.close()
        self.channel.close()
