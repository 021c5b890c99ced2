"""A client made of a socket and stubs alone: it can be as impolite as a test needs."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import platform
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from cairn_api.v1 import admin_pb2_grpc, restore_pb2_grpc, save_pb2, save_pb2_grpc, types_pb2
from cairn_api.wire import (
    ERROR_METADATA,
    GRPC_SOCKET_NAME,
    PROTOCOL_VERSION,
    SIDE_PACKET_BYTES,
    SIDE_SOCKET_NAME,
    TOKEN_METADATA,
)

TIMEOUT_S = 60.0
_SETRESUID = {"x86_64": 117, "aarch64": 147}.get(platform.machine(), -1)


class Peer:
    """One connection to the side socket and one gRPC channel. ``close`` both."""

    def __init__(self, runtime_dir: Path, *, uid: int | None = None) -> None:
        self.side = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.side.settimeout(TIMEOUT_S)
        as_user(uid, lambda: self.side.connect(str(runtime_dir / SIDE_SOCKET_NAME)))
        self.channel = grpc.aio.insecure_channel(
            f"unix:{runtime_dir / GRPC_SOCKET_NAME}", options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.saving: Any = save_pb2_grpc.SaveStub(self.channel)
        self.restoring: Any = restore_pb2_grpc.RestoreStub(self.channel)
        self.admin: Any = admin_pb2_grpc.AdminStub(self.channel)
        self.token = ""

    async def send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        await asyncio.to_thread(socket.send_fds, self.side, [packet], list(fds))

    async def receive(self) -> tuple[dict[str, Any] | None, list[int]]:
        """The next reply, None when the daemon has closed the connection."""
        data, fds, _, _ = await asyncio.to_thread(socket.recv_fds, self.side, SIDE_PACKET_BYTES, 4)
        return (json.loads(data) if data else None), list(fds)

    async def ask(self, request: object, fds: Sequence[int] = ()) -> dict[str, Any]:
        """One request, one reply."""
        await self.send(json.dumps(request).encode(), fds)
        reply, received = await self.receive()
        for fd in received:
            os.close(fd)
        assert reply is not None, "the daemon closed the connection"
        return reply

    async def hello(self, **changes: object) -> dict[str, Any]:
        reply = await self.ask(
            {"op": "hello", "protocol": PROTOCOL_VERSION, "client_version": "0", "job": None, "rank": 0, **changes}
        )
        self.token = reply.get("token", "")
        return reply

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return ((TOKEN_METADATA, self.token),)

    async def call(self, method: Any, request: Any) -> Any:
        """A unary call with the token."""
        return await method(request, metadata=self.metadata, timeout=TIMEOUT_S)

    async def stream(self, method: Any, request: Any) -> list[Any]:
        """All replies of a streaming call."""
        return [reply async for reply in method(request, metadata=self.metadata, timeout=TIMEOUT_S)]

    async def join(self, job: str, *, rank: int = 0, world_size: int = 1) -> Any:
        return await self.call(
            self.saving.Join,
            save_pb2.JoinRequest(protocol=PROTOCOL_VERSION, job=job, rank=rank, world_size=world_size),
        )

    async def put(self, *parts: save_pb2.PutRequest) -> Any:
        return await self.saving.Put(iter(parts), metadata=self.metadata, timeout=TIMEOUT_S)

    async def close(self) -> None:
        self.side.close()
        await self.channel.close()


def as_user(uid: int | None, act: Callable[[], None]) -> None:
    """Do *act* as another user (None: as this one). Credentials are per thread, so one thread becomes that user."""
    if uid is None:
        act()
        return
    failed: list[BaseException] = []

    def run() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            if libc.syscall(_SETRESUID, -1, uid, -1) != 0:
                raise OSError(ctypes.get_errno(), "setresuid")
            act()
        except BaseException as error:  # noqa: BLE001  (raised again in the caller's thread)
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def error_of(raised: grpc.aio.AioRpcError) -> types_pb2.ErrorInfo:
    """What the daemon raised."""
    for key, value in raised.trailing_metadata() or ():
        if key == ERROR_METADATA:
            assert isinstance(value, bytes)
            return types_pb2.ErrorInfo.FromString(value)
    raise AssertionError(f"no {ERROR_METADATA} in {raised}")
