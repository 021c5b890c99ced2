"""The daemon over its two sockets, synchronously.

The side socket introduces this process (the kernel tells the daemon who it is), yields the token for gRPC, and passes
descriptors of partitions. Closing it ends what the daemon keeps for this process: leases of an export, the token.
Tokens expire; a command that outlives one (an export may take hours) introduces itself anew for its next call.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc

from cairn_api.errors import ConfigurationError, InternalError, UnavailableError
from cairn_api.v1 import admin_pb2, admin_pb2_grpc, restore_pb2, restore_pb2_grpc, types_pb2
from cairn_api.wire import (
    GRPC_SOCKET_NAME,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    SIDE_PACKET_BYTES,
    SIDE_SOCKET_NAME,
    TOKEN_METADATA,
)
from cairnd import __version__
from cairnd.cli import translate
from cairnd.cli.source import Blocks, Check, Listed, Listing, file_blocks
from cairnd.model import Partition, Version
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.upkeep.verifier import Finding

SIDE_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 120.0
"""The daemon may ask the object store during a call; its own time-outs are shorter."""
SILENCE_TIMEOUT_S = 300.0
"""A stream that reports progress and says nothing for this long is given up."""
DRAIN_GRACE_S = 30.0
TOKEN_USE = 0.5
"""The part of a token's lifetime for which new calls are made with it."""

_SOCKET_PATH_BYTES = 107  # sun_path holds 108 with the final zero


class SideSocket:
    """One conversation on the side socket. Raises what the daemon raises, and UnavailableError when it is gone."""

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        path = os.fsencode(runtime_dir / SIDE_SOCKET_NAME)
        if len(path) > _SOCKET_PATH_BYTES:
            raise ConfigurationError(
                f"the socket path {os.fsdecode(path)} is longer than {_SOCKET_PATH_BYTES} bytes",
                hint="give the daemon and this command a shorter runtime_dir",
            )
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(SIDE_TIMEOUT_S)
        try:
            self._socket.connect(path)
            about = {"protocol": PROTOCOL_VERSION, "client_version": __version__, "job": None, "rank": None}
            reply, _ = self._exchange({"op": "hello", **about})
            self.token = str(reply["token"])
            self._fresh_until_s = time.monotonic() + TOKEN_USE * float(reply["token_lifetime_s"])
        except PermissionError as error:
            self.close()
            raise ConfigurationError(
                f"this user may not use the daemon in {runtime_dir} ({error.strerror})",
                hint="run the command as root, as the daemon's user or as the job's owner",
            ) from error
        except OSError as error:
            self.close()
            raise self._gone(error) from error
        except BaseException:
            self.close()
            raise

    @property
    def fresh(self) -> bool:
        """Whether the token is good for another call."""
        return time.monotonic() < self._fresh_until_s

    def open(self, lease: str, path: str) -> tuple[int, int]:
        """A descriptor (the caller's to close) of a fetched partition, and its size in bytes."""
        try:
            reply, fds = self._exchange({"op": "open", "lease": lease, "path": path})
        except OSError as error:
            raise self._gone(error) from error
        if len(fds) != 1:
            raise InternalError("the daemon sent no descriptor of a partition", hint="see the daemon's log")
        return fds[0], int(reply["size"])

    def close(self) -> None:
        """Leave."""
        self._socket.close()

    def _exchange(self, message: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        self._socket.sendall(json.dumps(message).encode())
        data, fds, _, _ = socket.recv_fds(self._socket, SIDE_PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise ConnectionResetError("it closed the connection")
        reply = json.loads(data)
        if "error" in reply:
            fields = reply["error"]
            raise translate.error_from_fields(
                fields["class"], fields["message"], fields.get("hint", ""), fields.get("context", {})
            )
        return reply, list(fds)

    def _gone(self, error: OSError) -> UnavailableError:
        return UnavailableError(
            f"no daemon answers in {self._runtime_dir} ({error.strerror or error})",
            hint=translate.START_DAEMON,
            context={"runtime_dir": self._runtime_dir},
        )


class Daemon:
    """A connected daemon: a :class:`~cairnd.cli.source.Source`, and what only a running daemon can do."""

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self._side = SideSocket(runtime_dir)
        self._channel = grpc.insecure_channel(
            f"unix://{(runtime_dir / GRPC_SOCKET_NAME).absolute()}",
            options=(
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.enable_http_proxy", 0),
            ),
        )
        self._admin = admin_pb2_grpc.AdminStub(self._channel)
        self._restore = restore_pb2_grpc.RestoreStub(self._channel)

    def close(self) -> None:
        """Leave; the daemon lets go of everything that it kept for this command."""
        self._channel.close()
        self._side.close()

    # What every source does

    def jobs(self) -> list[str]:
        return sorted({item.version.job for item in self.versions(None).versions})

    def versions(self, job: str | None) -> Listing:
        reply: admin_pb2.ListReply = self._call(self._admin.List, admin_pb2.ListRequest(job=job or ""))
        warnings = [f"tier 2 could not be read, versions there may be missing: {reply.tier2_error}"]
        return Listing(
            [Listed(translate.version(item), item.size_bytes) for item in reply.versions],
            warnings if reply.tier2_error else [],
        )

    def describe(self, job: str, text: str) -> Version:
        reply: types_pb2.Version = self._call(self._admin.Describe, admin_pb2.DescribeRequest(job=job, version=text))
        return translate.version(reply)

    def verify(self, job: str, text: str | None, *, deep: bool, report: Callable[[Check], None]) -> None:
        request = admin_pb2.VerifyRequest(job=job, version=text or "", deep=deep)
        for reply in self._stream(self._admin.Verify, request):
            findings = tuple(
                Finding(job, translate.version_id(item.id), translate.tier(item.tier), item.path, item.problem)
                for item in reply.findings
            )
            report(Check(reply.done_bytes, reply.total_bytes, reply.versions_checked, reply.copies_checked, findings))

    @contextmanager
    def reading(self, version: Version, progress: Callable[[int, int], None]) -> Iterator[Blocks]:
        request = restore_pb2.FetchRequest(
            job=version.job,
            id=types_pb2.VersionId(epoch=version.id.epoch, sequence=version.id.sequence, tag=version.id.tag),
        )
        # A connection of its own: the lease ends when it is closed.
        with closing(SideSocket(self._runtime_dir)) as side:
            lease = ""
            for reply in self._stream(self._restore.Fetch, request, token=side.token):
                lease = reply.lease
                progress(reply.done_bytes, reply.total_bytes)
            if not lease:
                raise InternalError("the daemon ended a fetch without naming its lease", hint="see the daemon's log")
            yield partial(_fetched_blocks, side, lease)

    # What needs a daemon

    def pin(self, job: str, text: str, reason: str) -> admin_pb2.PinReply:
        """Exempt a version from retention."""
        return cast(
            "admin_pb2.PinReply",
            self._call(self._admin.Pin, admin_pb2.PinRequest(job=job, version=text, reason=reason)),
        )

    def unpin(self, job: str, text: str) -> admin_pb2.PinReply:
        """End the exemption."""
        return cast("admin_pb2.PinReply", self._call(self._admin.Unpin, admin_pb2.PinRequest(job=job, version=text)))

    def mark(self, job: str, text: str, reason: str) -> admin_pb2.MarkReply:
        """Have automatic resume pass a version over, or with an empty *reason* no longer."""
        return cast(
            "admin_pb2.MarkReply",
            self._call(self._admin.Mark, admin_pb2.MarkRequest(job=job, version=text, reason=reason)),
        )

    def prune(self, job: str, text: str | None, *, dry_run: bool) -> admin_pb2.PruneReply:
        """Apply retention, or delete one version; with *dry_run* only say what that would do."""
        request = admin_pb2.PruneRequest(job=job, dry_run=dry_run, version=text or "")
        return cast("admin_pb2.PruneReply", self._call(self._admin.Prune, request, SILENCE_TIMEOUT_S))

    def persist(self, job: str, text: str | None) -> admin_pb2.PersistReply:
        """Ask for a version (the newest committed one by default) to be copied to tier 2."""
        request = admin_pb2.PersistRequest(job=job, version=text or "")
        return cast("admin_pb2.PersistReply", self._call(self._admin.Persist, request))

    def drain(self, timeout_s: float) -> Iterator[admin_pb2.DrainProgress]:
        """Stop accepting saves and wait for tier 2; the last message says what is left."""
        yield from self._stream(
            self._admin.Drain, admin_pb2.DrainRequest(timeout_s=timeout_s), deadline_s=timeout_s + DRAIN_GRACE_S
        )

    def status(self) -> admin_pb2.StatusReply:
        """Health and backlog."""
        return cast("admin_pb2.StatusReply", self._call(self._admin.Status, admin_pb2.StatusRequest()))

    def watch(self, job: str | None, *, follow: bool) -> Iterator[admin_pb2.Event]:
        """Remembered events; with *follow* also new ones, until the daemon stops. Silence is normal then."""
        request = admin_pb2.WatchRequest(job=job or "", follow=follow)
        yield from self._stream(self._admin.Watch, request, silence_s=None if follow else SILENCE_TIMEOUT_S)

    # Calls

    def _token(self) -> str:
        if not self._side.fresh:
            self._side.close()
            self._side = SideSocket(self._runtime_dir)
        return self._side.token

    def _call(self, method: Callable[..., Any], request: object, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        try:
            return method(request, timeout=timeout_s, metadata=((TOKEN_METADATA, self._token()),))
        except grpc.RpcError as error:
            raise translate.error_from_call(error) from error

    def _stream(
        self,
        method: Callable[..., Any],
        request: object,
        *,
        token: str | None = None,
        deadline_s: float | None = None,
        silence_s: float | None = SILENCE_TIMEOUT_S,
    ) -> Iterator[Any]:
        """The messages of a streaming call, cancelled after *deadline_s* in all or *silence_s* without a message."""
        stream = method(request, timeout=deadline_s, metadata=((TOKEN_METADATA, token or self._token()),))
        try:
            while True:
                with _interrupted_by_cancelling(stream), _cancelled_after(silence_s, stream):
                    message = next(stream, None)
                if message is None:
                    return
                yield message
        except grpc.RpcError as error:
            raise translate.error_from_call(error) from error
        finally:
            stream.cancel()


def _fetched_blocks(side: SideSocket, lease: str, partition: Partition) -> Iterator[memoryview]:
    fd, size_bytes = side.open(lease, partition.path)
    try:
        yield from file_blocks(OsFileSystem(), fd, size_bytes, partition.path)
    finally:
        os.close(fd)


@contextmanager
def _cancelled_after(seconds: float | None, stream: Any) -> Iterator[None]:
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, stream.cancel)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _interrupted_by_cancelling(stream: Any) -> Iterator[None]:
    """Control-C cancels *stream*, and is raised then: raised at once it is lost when a callback of gRPC runs."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield  # no handler can be set, or somebody wants another one
        return
    interrupted = threading.Event()

    def cancel(signal_number: int, frame: object) -> None:  # noqa: ARG001 - the signature of a handler
        interrupted.set()
        stream.cancel()

    signal.signal(signal.SIGINT, cancel)
    try:
        yield
    except grpc.RpcError:
        if not interrupted.is_set():
            raise
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted.is_set():
        raise KeyboardInterrupt
