"""The gRPC server: its socket, its limits, who may call."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cairn_api.errors import CairnError, ConfigurationError
from cairn_api.v1 import admin_pb2, admin_pb2_grpc, restore_pb2, restore_pb2_grpc, save_pb2, save_pb2_grpc
from cairn_api.wire import GRPC_SOCKET_NAME, MAX_MESSAGE_BYTES, TOKEN_METADATA
from cairnd.rpc.status import abort, unforeseen, unreadable, without_traces
from cairnd.session.clients import Client, Clients

_OPEN_TO_ALL = ("/grpc.health.v1.Health/", "/grpc.reflection.")
_STOP_GRACE_S = 2.0

SERVICES = (
    save_pb2.DESCRIPTOR.services_by_name["Save"].full_name,
    restore_pb2.DESCRIPTOR.services_by_name["Restore"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name,
)


class _Guard(grpc.aio.ServerInterceptor):
    """Refuses every call without a live token, except health and reflection."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        # What stands in for a method must have its shape.
        shape, behaviour = {
            (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
            (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
            (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
            (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
        }[bool(handler.request_streaming), bool(handler.response_streaming)]
        if handler_call_details.method.startswith(_OPEN_TO_ALL):
            return shape(behaviour, _read_or_empty(handler.request_deserializer), handler.response_serializer)
        if self._clients.authenticate(_token(handler_call_details.invocation_metadata)) is not None:
            return shape(behaviour, _read_or_refusal(handler.request_deserializer), handler.response_serializer)

        async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            del request  # as in cairnd.rpc.status.without_traces
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "no valid token: say hello on the side socket and pass its token"
            )

        return shape(refuse, None, handler.response_serializer)  # a stranger's message is not even read


def _read_or_refusal(read: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """*read*, but for bytes that are no message it gives the error that the method then raises.

    What is raised while gRPC itself reads a message reaches the caller as UNKNOWN, and the log as a traceback.
    """

    def reading(packed: bytes) -> Any:
        try:
            return read(packed) if read is not None else packed
        except DecodeError as error:
            return unreadable(error)

    return None if read is None else reading


def _read_or_empty(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """*read*, but bytes that are no message are an empty one: health and reflection know none of Cairn's errors."""

    def reading(packed: bytes) -> Any:
        try:
            return read(packed)
        except DecodeError:
            return read(b"")

    return reading


def _token(metadata: Any) -> str:
    for key, value in metadata or ():
        if key == TOKEN_METADATA:
            return value if isinstance(value, str) else ""
    return ""


def caller(context: grpc.aio.ServicerContext[Any, Any], clients: Clients) -> Client:
    """The client behind a call that the guard let through."""
    client = clients.authenticate(_token(context.invocation_metadata()))
    if client is None:
        raise ConfigurationError("the caller's connection ended", hint="connect again")
    return client


def translated(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a unary handler ``(self, request, client)``: finds the client, turns errors into statuses."""

    async def handle(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            if isinstance(request, CairnError):
                raise request
            return await method(self, request, caller(context, self.clients))
        except CairnError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - the last resort: logged, told to the caller
            failure = unforeseen(error, method.__name__)
        del request
        await abort(context, without_traces(failure))
        raise AssertionError("abort does not return")

    handle.__doc__ = method.__doc__
    handle.for_client = method  # type: ignore[attr-defined]  # for cairnd.rpc.brief, which has no context
    return handle


def translated_stream(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a handler that is an asynchronous generator."""

    async def handle(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            if isinstance(request, CairnError):
                raise request
            async for reply in method(self, request, caller(context, self.clients)):
                yield reply
            return
        except CairnError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - the last resort: logged, told to the caller
            failure = unforeseen(error, method.__name__)
        del request
        await abort(context, without_traces(failure))

    handle.__doc__ = method.__doc__
    return handle


class RpcServer:
    """Lifetime of the gRPC server on its unix socket."""

    def __init__(self, runtime_dir: Path, clients: Clients, save: Any, restore: Any, admin: Any) -> None:
        self._path = runtime_dir / GRPC_SOCKET_NAME
        self._bound = False
        self._server = grpc.aio.server(
            interceptors=(_Guard(clients),),
            options=(
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_metadata_size", 64 * 1024),
            ),
        )
        self._health = health.aio.HealthServicer()
        # Before the others: whichever handler knows a call first gets it.
        self._server.add_generic_rpc_handlers(_bulk_handlers(save, restore))
        save_pb2_grpc.add_SaveServicer_to_server(save, self._server)
        restore_pb2_grpc.add_RestoreServicer_to_server(restore, self._server)
        admin_pb2_grpc.add_AdminServicer_to_server(admin, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> None:
        """Bind the socket (replacing a stale one) and serve."""
        remove_stale_socket(self._path)
        self._server.add_insecure_port(f"unix:{self._path}")
        self._bound = True
        await self._server.start()
        # Anyone may connect; the token decides. SO_PEERCRED on the side socket is what tells users apart.
        self._path.chmod(0o666)
        await self.set_serving(True)

    async def set_serving(self, serving: bool) -> None:
        """What health checks answer."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *SERVICES):
            await self._health.set(name, state)

    async def stop(self) -> None:
        """Refuse new calls, give running ones a moment, remove the socket."""
        await self._server.stop(_STOP_GRACE_S)
        if self._bound:  # else the socket there is another daemon's
            self._path.unlink(missing_ok=True)


def _bulk_handlers(save: Any, restore: Any) -> tuple[grpc.GenericRpcHandler, ...]:
    """The two calls that carry bulk bytes, without protobuf between the handler and the stream's messages."""
    put: grpc.RpcMethodHandler[Any, Any] = grpc.stream_unary_rpc_method_handler(
        save.Put, request_deserializer=None, response_serializer=save_pb2.PutReply.SerializeToString
    )
    read: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(
        restore.Read, request_deserializer=restore_pb2.ReadRequest.FromString, response_serializer=None
    )
    return (
        grpc.method_handlers_generic_handler(SERVICES[0], {"Put": put}),
        grpc.method_handlers_generic_handler(SERVICES[1], {"Read": read}),
    )


def remove_stale_socket(path: Path) -> None:
    """Remove a socket that nobody listens on; raises :class:`ConfigurationError` if somebody does."""
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET if "side" in path.name else socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise ConfigurationError(
        f"another daemon is listening on {path}", hint="stop it, or give this daemon another runtime_dir"
    )
