"""One client that sends whatever it likes, in any order, by gRPC and on the side socket, and judges each answer.

Every answer must be a reply or an error of Cairn's that names the next step; never a defect, never silence. Its
choices follow from a seed; what it hears back depends on the daemon's timing too.
"""

from __future__ import annotations

import json
import os
import uuid
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from cairn_api.framing import framed
from cairn_api.v1 import admin_pb2, restore_pb2, save_pb2, types_pb2
from cairn_api.wire import ERROR_METADATA, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, SIDE_PACKET_BYTES
from cairnd.rpc.brief import NAMES
from cairnd.rpc.status import CODES
from tests.daemon.lab import memfd
from tests.hostile.peer import TIMEOUT_S, GoneError, Peer
from tests.hostile.seeds import SEED, choices
from tests.hostile.wire_inputs import METHODS, Heard, Requests

_WAITING = frozenset({"Reserve", "Wait", "Watch", "Resolve", "Drain", "Verify", "Fetch", "Prune", "Put"})
"""Calls that may rightly take as long as they were asked to: they are cut short here."""
_CUT_S = 0.3
_INPUTS_PER_CONNECTION = 200
_REFUSALS = frozenset(CODES.values()) - {grpc.StatusCode.INTERNAL}
_OF_GRPC = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT})
_CUT = frozenset({grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})


def path_of(method: MethodDescriptor) -> str:
    """The method's path in HTTP/2."""
    return f"/{method.containing_service.full_name}/{method.name}"


class Talker:
    """Sends inputs with :meth:`send_inputs`; ``wrong`` says which were answered wrongly, and how to make them again."""

    def __init__(self, runtime_dir: Path, seed: str, *, uid: int | None = None, drains: bool = False) -> None:
        self._runtime_dir = runtime_dir
        self._uid = uid
        self._seed = seed
        self._chance = choices(seed)
        self._methods = METHODS if drains or uid is not None else [m for m in METHODS if m.name != "Drain"]
        self._peer: Peer | None = None
        self._left = 0
        self._doing = ""
        self.heard = Heard()
        self.requests = Requests(self._chance, self.heard)
        self.inputs = 0
        self.answered: Counter[str] = Counter()
        """By call or operation: how often its own code answered, with a reply or with an error."""
        self.wrong: list[str] = []

    def send_inputs(self, count: int) -> None:
        """Send *count* inputs."""
        end = self.inputs + count
        try:
            while self.inputs < end:
                if self._left <= 0 or self._peer is None:
                    self._renew()
                self._left -= 1
                act = self._chance.choices((self._call, self._put, self._side, self._brief), (50, 8, 30, 12))[0]
                try:
                    act()
                except GoneError:
                    self._left = 0
                except TimeoutError:
                    self._complain("no answer: it hangs")
                    self._left = 0
        finally:
            self._leave()

    # What is sent

    def _renew(self) -> None:
        self._leave()
        self._peer = Peer(self._runtime_dir, uid=self._uid)
        if self._chance.random() < 0.9:
            self._doing = "hello"
            self.inputs += 1
            self._judge_reply(self._peer.hello())
            self._behave()
        self._left = self._chance.randrange(1, _INPUTS_PER_CONNECTION)

    def _behave(self) -> None:
        """A whole save and its restore, as a well-behaved client makes them, so that there is something to disturb."""
        chance = self._chance
        job, nonce = f"job-{chance.randrange(20)}", uuid.UUID(int=chance.getrandbits(128)).hex
        joined = self._well(
            "Save", "Join", save_pb2.JoinRequest(protocol=PROTOCOL_VERSION, job=job, world_size=1), save_pb2.JoinReply
        )
        if joined is None or joined.max_epoch > 900_000_000:
            return
        epoch = joined.max_epoch + 1
        self._well(
            "Save",
            "ClaimEpoch",
            save_pb2.ClaimEpochRequest(job=job, epoch=epoch, nonce=nonce, world_size=1, claim=True),
            save_pb2.ClaimEpochReply,
        )
        identity = types_pb2.VersionId(epoch=epoch, sequence=1, tag=f"step{epoch}")
        create = save_pb2.CreateRequest(job=job, id=identity, world_size=1, nonce=nonce, persist=chance.random() < 0.3)
        if self._well("Save", "Create", create, save_pb2.CreateReply) is None:
            return
        segment = self._shared(job, b"bytes" * 100)
        seal = save_pb2.SealRequest(job=job, id=identity, name="model.pt", segment=segment or "", size_bytes=500)
        self._well("Save", "Seal", seal, save_pb2.SealReply)
        if chance.random() < 0.3:
            return  # it stays open
        prepare = save_pb2.PrepareRequest(job=job, id=identity, names=["model.pt"])
        self._well("Save", "Prepare", prepare, save_pb2.PrepareReply)
        self._well("Save", "Commit", save_pb2.CommitRequest(job=job, id=identity), save_pb2.CommitReply)
        wait = save_pb2.WaitRequest(job=job, id=identity, durability=types_pb2.DURABILITY_TIER1, timeout_s=5)
        if self._well("Save", "Wait", wait, save_pb2.WaitReply) is not None:
            fetch = restore_pb2.FetchRequest(job=job, id=identity)
            self._well("Restore", "Fetch", fetch, restore_pb2.FetchProgress)
            self._well("Admin", "Describe", admin_pb2.DescribeRequest(job=job, version="step1"), types_pb2.Version)

    def _well(self, service: str, name: str, request: Message, reply: type[Message]) -> Any:
        """A call as it should be; the last reply, or None if the daemon refused it."""
        method = next(m for m in METHODS if m.name == name and m.containing_service.name == service)
        assert reply.DESCRIPTOR.full_name == method.output_type.full_name
        return self._send(method, request.SerializeToString(), request, TIMEOUT_S)

    def _shared(self, job: str, data: bytes) -> str | None:
        assert self._peer is not None, "it has said hello"
        fd, segment = memfd(data), uuid.UUID(int=self._chance.getrandbits(128)).hex
        try:
            size_bytes = os.fstat(fd).st_size
            request = save_pb2.GrantRequest(job=job, size_bytes=size_bytes)
            granted = self._well("Save", "Grant", request, save_pb2.GrantReply)
            if granted is None:
                return None
            offer = {"op": "offer", "segment": segment, "size": size_bytes, "grant": granted.grant}
            self._judge_reply(self._peer.ask(offer, [fd]))
        finally:
            os.close(fd)
        self.heard.value("segment", segment)
        return segment

    def _call(self) -> None:
        method = self._chance.choice(self._methods)
        packed, message = self.requests.packed(method.input_type)
        self._send(method, packed, message, _CUT_S if method.name in _WAITING else TIMEOUT_S)

    def _put(self) -> None:
        """A bulk stream: header and data as they should be, or not."""
        chance = self._chance
        header, _ = self.requests.packed(save_pb2.PutHeader.DESCRIPTOR)
        if chance.random() < 0.5:
            parsed: Any = self.requests.request(save_pb2.PutHeader.DESCRIPTOR)
            parsed.size_bytes = chance.choice((1, 100, 4096, 2**20, 2**40, 2**64 - 1))
            header = parsed.SerializeToString()
        first = b"\x0a" + _varint(len(header)) + header

        def messages() -> Iterator[bytes]:
            if chance.random() < 0.9:
                yield first
            for _ in range(chance.choice((0, 1, 1, 2, 5, 30))):
                match chance.randrange(7):
                    case 0:
                        yield chance.randbytes(chance.randrange(40))
                    case 1:
                        yield b"\x12" + _varint(chance.choice((0, 5, 2**31, 2**35))) + b"abc"
                    case 2:
                        yield b""
                    case 3:
                        yield first
                    case 4:
                        yield framed(2, b"")
                    case _:
                        yield framed(2, bytes(chance.choice((1, 99, 100, 4096, 2**20))))

        method = next(m for m in METHODS if m.name == "Put")
        planned = list(messages())
        self._doing = f"Put of {len(planned)} messages: {b' '.join(each[:40] for each in planned)[:300]!r}"
        largest_bytes = max(map(len, planned), default=0)
        self._attempt(
            method,
            lambda peer: [peer.upload(path_of(method), planned, _CUT_S * 3)],
            None,
            cut=True,
            size_bytes=largest_bytes,
        )

    def _side(self) -> None:
        """A packet on the side socket: bytes, JSON of any shape, an operation with wrong or right fields."""
        chance, fds = self._chance, list[int]()
        if chance.random() < 0.1:
            fds = [os.open(chance.choice(("/dev/null", "/", "/proc/self/status")), os.O_RDONLY)]
        packet = self._packet()
        self.inputs += 1
        self._doing = f"side socket, {len(fds)} descriptors: {packet[:300]!r}"
        try:
            self._exchange(packet, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _packet(self) -> bytes:
        chance = self._chance
        kind = chance.random()
        if kind < 0.1:
            return chance.randbytes(chance.choice((1, 10, 1000, 60_000))) or b"\0"
        if kind < 0.2:
            deep = chance.choice((10, 1000, 30_000))
            return chance.choice((b"[", b'{"op":')) * (deep // 5) + b"1"
        request: dict[str, Any] = {
            "op": chance.choice(("hello", "offer", "open", "end_hold", "call", "call", "", "\ud800", "x" * 9000)),
            "protocol": PROTOCOL_VERSION,
        }
        for name in ("job", "rank", "segment", "size", "grant", "lease", "path", "hold", "name", "request", "number"):
            if chance.random() < 0.7:
                request[name] = self._json_value(name)
        packet = json.dumps(request).encode()
        if kind < 0.3:
            packet = self.requests.damaged(packet)
        return packet[: SIDE_PACKET_BYTES + 100] or b"{}"

    def _json_value(self, name: str, depth: int = 0) -> Any:
        chance = self._chance
        makers: tuple[Callable[[], Any], ...] = (
            lambda: self.requests.text(name)[:20_000],
            lambda: self.requests.text(name)[:20_000],
            lambda: self.requests.number(-(2**64), 2**64),
            lambda: chance.choice((None, True, False, 1e999, -1e999, float("nan"), 0.5, 10**4000, "\ud800", "\0")),
            lambda: [self._json_value(name, depth + 1) for _ in range(chance.randrange(4))] if depth < 3 else [],
            lambda: {"a": self._json_value(name, depth + 1)} if depth < 3 else {},
        )
        return chance.choice(makers)()

    def _brief(self) -> None:
        """A call on the side socket, with its own messages or any other call's, whole or damaged."""
        name = self._chance.choice((*NAMES, *NAMES, *(method.name for method in METHODS), "__init__"))
        method = next((m for m in METHODS if m.name == name), METHODS[0])
        packed, message = self.requests.packed(method.input_type)
        packed = packed[:30_000]
        self.inputs += 1
        self._doing = f"brief {name} {packed[:200].hex()}"
        request = {"op": "call", "name": name, "request": b64encode(packed).decode(), "number": self.inputs}
        reply = self._exchange(json.dumps(request).encode())
        if reply is not None:
            self.answered[f"brief {name}"] += 1
            if "error" not in reply and message is not None:
                self.heard.accepted(message)
            if reply.get("number") != self.inputs and "error" not in reply:
                self._complain(f"the number of another request came back: {reply.get('number')}")

    # What comes back

    def _exchange(self, packet: bytes, fds: list[int] | None = None) -> dict[str, Any] | None:
        assert self._peer is not None, "it was made before"
        self._peer.send(packet, fds or [])
        reply = self._peer.receive()
        self._judge_reply(reply)
        return reply

    def _judge_reply(self, reply: dict[str, Any]) -> None:
        error = reply.get("error")
        self.answered["side socket"] += 1
        if error is None:
            for name, value in reply.items():
                if isinstance(value, str) and name not in ("token", "reply"):
                    self.heard.value(name, value)
        elif error["class"] == "InternalError" or not error["message"]:
            self._complain(f"a defect: {error}")

    def _send(self, method: MethodDescriptor, packed: bytes, message: Message | None, timeout_s: float) -> Any:
        """Make a call; its last reply, or None."""
        cut = timeout_s < TIMEOUT_S
        self._doing = f"{method.name} {packed[:300].hex()} ({len(packed)} bytes)"
        path = path_of(method)

        def call(peer: Peer) -> list[bytes]:
            if method.client_streaming:
                return [peer.upload(path, [packed], timeout_s)]
            if method.server_streaming:
                return peer.download(path, packed, timeout_s)
            return [peer.unary(path, packed, timeout_s)]

        return self._attempt(method, call, message, cut=cut, size_bytes=len(packed))

    def _attempt(
        self,
        method: MethodDescriptor,
        call: Callable[[Peer], list[bytes]],
        message: Message | None,
        *,
        cut: bool,
        size_bytes: int = 0,
    ) -> Any:
        assert self._peer is not None, "it was made before"
        self.inputs += 1
        try:
            answers = call(self._peer)
        except grpc.RpcError as error:
            self._judge_error(method, error, cut=cut, too_large=size_bytes > MAX_MESSAGE_BYTES)
            return None
        self.answered[method.full_name] += 1
        if message is not None:
            self.heard.accepted(message)
        reply = None
        for answer in answers[-1:]:
            reply = GetMessageClass(method.output_type)()
            reply.MergeFromString(answer)
            self.heard.message(reply)
        return reply

    def _judge_error(self, method: MethodDescriptor, error: Any, *, cut: bool, too_large: bool) -> None:
        code = error.code()
        carried = [value for key, value in error.trailing_metadata() or () if key == ERROR_METADATA]
        if carried:
            self.answered[method.full_name] += 1
            info = types_pb2.ErrorInfo.FromString(carried[0])
            if code not in _REFUSALS or info.error_class == "InternalError" or not info.message:
                self._complain(f"{code.name} {info.error_class}: {info.message[:500]}")
        elif code not in _OF_GRPC and not (cut and code in _CUT) and not too_large:
            self._complain(f"{code.name} without an error of Cairn's: {str(error.details())[:500]}")

    def _complain(self, what: str) -> None:
        self.wrong.append(f"{SEED}/{self._seed}, input {self.inputs}: {self._doing}: {what}")

    def _leave(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*encoded, value))
