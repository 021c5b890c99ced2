"""What attacks have in common: a client that knows the protocol well enough to break it at any step."""

from __future__ import annotations

import mmap
import os
import random
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeAlias

import grpc
from google.protobuf.message import Message

from cairn_api.v1 import save_pb2, types_pb2
from cairn_api.wire import ERROR_METADATA, PROTOCOL_VERSION
from cairnd.rpc.status import CODES
from tests.daemon.lab import memfd
from tests.hostile.peer import TIMEOUT_S, Peer

PAGE = mmap.PAGESIZE
CUT_S = 0.4
"""For calls that rightly wait: they are given up after this."""

_REFUSALS = frozenset(CODES.values()) - {grpc.StatusCode.INTERNAL}
_BY_GRPC = frozenset(
    {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED}
)
_CUT = frozenset({grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})


class Attacker:
    """A user who may connect, at one step or another of a save. A context manager: it leaves nothing open."""

    def __init__(self, runtime_dir: Path, chance: random.Random, *, uid: int, victim: Victim) -> None:
        self.runtime_dir = runtime_dir
        self.chance = chance
        self.uid = uid
        self.victim = victim
        self.job = f"hostile-{chance.randrange(30)}"
        self.nonce = uuid.UUID(int=chance.getrandbits(128)).hex
        self.id = types_pb2.VersionId()
        self._peers: list[Peer] = []
        self.peer = self.connect()

    def connect(self, *, hello: bool = True) -> Peer:
        """One more connection."""
        peer = Peer(self.runtime_dir, uid=self.uid)
        self._peers.append(peer)
        if hello:
            assert "token" in peer.hello()
        return peer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self._peers:
            peer.close()

    # Calls

    def call(self, name: str, request: Message | bytes, *, service: str = "Save", cut: bool = False) -> bytes | None:
        """A unary call: its reply, or None if it was refused as it should be; fails for any other end."""
        packed = request if isinstance(request, bytes) else request.SerializeToString()
        answer: bytes | None = self.judged(
            lambda: self.peer.unary(f"/cairn_api.v1.{service}/{name}", packed, CUT_S if cut else TIMEOUT_S), cut=cut
        )
        return answer

    def refused(self, name: str, request: Message | bytes, *, service: str = "Save") -> None:
        """A unary call that must not succeed."""
        assert self.call(name, request, service=service) is None, f"{name} was let through"

    @staticmethod
    def judged(call: Callable[[], Any], *, cut: bool = False) -> Any:
        """What *call* returns; None if it was refused with an error that a client may get, else a failure."""
        try:
            return call()
        except grpc.RpcError as error:
            found: Any = error
            named = [value for key, value in found.trailing_metadata() or () if key == ERROR_METADATA]
            if named:
                info = types_pb2.ErrorInfo.FromString(named[0])
                assert found.code() in _REFUSALS and info.message, f"{found.code()}: {info}"
            else:
                accepted = _BY_GRPC | _CUT if cut else _BY_GRPC
                assert found.code() in accepted, f"{found.code()}: {found.details()}"
            return None

    def asked(self, request: Mapping[str, object], fds: list[int] | None = None) -> bool:
        """A request on the side socket; whether it was granted. Fails for a defect."""
        reply = self.peer.ask(request, fds or [])
        if "error" in reply:
            assert reply["error"]["class"] != "InternalError", reply
            return False
        return True

    # The steps of a save, as they should be

    def join(self) -> None:
        """Join a job of this user's and claim its next epoch."""
        request = save_pb2.JoinRequest(protocol=PROTOCOL_VERSION, job=self.job, world_size=1)
        joined = save_pb2.JoinReply.FromString(self._must("Join", request))
        claim = save_pb2.ClaimEpochRequest(
            job=self.job, epoch=joined.max_epoch + 1, nonce=self.nonce, world_size=1, claim=True
        )
        claimed = save_pb2.ClaimEpochReply.FromString(self._must("ClaimEpoch", claim))
        if claimed.taken:  # another attacker of the same job was faster
            self.job = f"hostile-own-{self.nonce}"
            self.peer = self.connect()
            self.join()
            return
        self.id = types_pb2.VersionId(epoch=claim.epoch, sequence=1, tag="t")

    def create(self, **changes: Any) -> bytes | None:
        """Open the version."""
        fields = {"job": self.job, "id": self.id, "world_size": 1, "nonce": self.nonce, **changes}
        return self.call("Create", save_pb2.CreateRequest(**fields))

    def grant(self, size_bytes: int = PAGE) -> str:
        """Have memory granted; empty if there is none."""
        packed = self.call("Grant", save_pb2.GrantRequest(job=self.job, size_bytes=size_bytes))
        return save_pb2.GrantReply.FromString(packed).grant if packed is not None else ""

    def name(self) -> str:
        """A name for a buffer."""
        return uuid.UUID(int=self.chance.getrandbits(128)).hex

    def offer(self, fd: int, size_bytes: int = PAGE, **changes: object) -> str:
        """Offer a descriptor for a new grant; the buffer's name, or empty if it was refused."""
        name = self.name()
        request = {"op": "offer", "segment": name, "size": size_bytes, "grant": self.grant(size_bytes), **changes}
        return name if self.asked(request, [fd]) else ""

    def share(self, data: bytes = b"x" * 500, size_bytes: int = PAGE) -> str:
        """A buffer as it should be."""
        fd = memfd(data, size_bytes)
        try:
            return self.offer(fd, size_bytes)
        finally:
            os.close(fd)

    def seal(self, segment: str, **changes: Any) -> bytes | None:
        """Hand a partition over."""
        fields = {"job": self.job, "id": self.id, "name": "a", "segment": segment, "size_bytes": 500, **changes}
        return self.call("Seal", save_pb2.SealRequest(**fields))

    def prepare(self, names: tuple[str, ...] = ("a",), **changes: Any) -> bytes | None:
        """Ask whether everything is held."""
        return self.call("Prepare", save_pb2.PrepareRequest(job=self.job, id=self.id, names=names, **changes))

    def commit(self, **changes: Any) -> bytes | None:
        """Say that all agreed."""
        return self.call("Commit", save_pb2.CommitRequest(job=self.job, id=self.id, **changes))

    def _must(self, name: str, request: Message) -> bytes:
        packed = self.call(name, request)
        assert packed is not None, f"{name} was refused to a well-behaved client"
        return packed


class Victim:
    """What attacks are directed at: the job, a version and the buffers of somebody who trains honestly."""

    def __init__(self, job: str, version: types_pb2.VersionId, lease: str, token_of_the_past: str) -> None:
        self.job = job
        self.version = version
        self.lease = lease
        self.token_of_the_past = token_of_the_past


Attack: TypeAlias = Callable[[Attacker], None]
