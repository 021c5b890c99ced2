"""What a hostile, broken or newer daemon answers: the client raises an error of Cairn's, whatever it is."""

from __future__ import annotations

import json
import math
import os
import socket
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc
import pytest

from cairn.transport.calls import Caller
from cairn.transport.connection import Connection, Welcome
from cairn.transport.link import Fixed
from cairn.transport.messages import Opening, PartitionPlan
from cairn.transport.restore_calls import RestoreCalls
from cairn.transport.save_calls import SaveCalls
from cairn_api.errors import CairnError
from cairn_api.names import VersionId
from cairnd.records import RecordTable
from tests.hostile.seeds import SEED, choices
from tests.hostile.wire_inputs import METHODS, Heard, Requests
from tests.promises import Evidence, proof_size

pytestmark = pytest.mark.fault

ANSWERS = proof_size(500, 6_000)

_VERSION = VersionId(1, 1, "step")
_PLAN = PartitionPlan("model.pt", 10, RecordTable((), (), (), ()), ())
_OPENING = Opening(_VERSION, 1, "nonce", "", persist=False, floor=None, file_marks=False)

CALLS: Mapping[str, Callable[[SaveCalls, RestoreCalls], object]] = {
    "Join": lambda save, _: save.join(1, "", 2, "0"),
    "ClaimEpoch": lambda save, _: save.claim_epoch(1, "n", 1, resumed_from=None, claim=True),
    "Reserve": lambda save, _: save.reserve(0.0, 2),
    "Release": lambda save, _: save.release("0" * 32),
    "Create": lambda save, _: save.create(_OPENING),
    "KeepAlive": lambda save, _: save.keep_alive(),
    "Seal": lambda save, _: save.seal(_VERSION, _PLAN, "0" * 32),
    "Prepare": lambda save, _: save.prepare(_VERSION, ["model.pt"]),
    "Commit": lambda save, _: save.commit(_VERSION, []),
    "Abort": lambda save, _: save.abort(_VERSION, "x"),
    "Wait": lambda save, _: save.wait(_VERSION, "tier1", 0.0),
    "Resolve": lambda _, restore: restore.resolve(),
    "Fetch": lambda _, restore: restore.fetch(_VERSION, [], "", lambda _: None),
    "NoteResume": lambda _, restore: restore.note_resume(_VERSION, "attempt"),
    "open": lambda _, restore: restore.open("lease", "model.pt"),
}


class Answering:
    """A client's connection whose other end is in the test's hands: what is answered is sent before it is asked."""

    def __init__(self) -> None:
        self._chance = choices()
        self._requests = Requests(self._chance, Heard(), large=0)
        ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._theirs.settimeout(5.0)
        ours.settimeout(5.0)
        welcome = Welcome("token", 300.0, "0", "node", "boot", frozenset(CALLS))
        self._channel = grpc.insecure_channel("unix:/nowhere")
        self.connection = Connection(ours, self._channel, welcome, "/nowhere")
        caller = Caller(Fixed(self.connection), "job", patience_s=0.0)
        self.save, self.restore = SaveCalls(caller, 0), RestoreCalls(caller)

    def ask(self, name: str) -> str:
        """Make the call *name* and have it answered; what was raised, if that was not an error of Cairn's."""
        answer, fds = self._answer(name)
        socket.send_fds(self._theirs, [answer], fds)
        for fd in fds:
            os.close(fd)
        try:
            opened = CALLS[name](self.save, self.restore)
            if name == "open":
                os.close(opened.fd)  # type: ignore[attr-defined]
        except CairnError as error:
            str(error)
        except Exception as error:  # noqa: BLE001 - the finding itself
            return f"{name}: {type(error).__name__}: {error}: {answer[:300]!r}"
        finally:
            self._theirs.recv(1 << 20)
        return ""

    def _answer(self, name: str) -> tuple[bytes, list[int]]:
        chance = self._chance
        fds = [os.open("/dev/null", os.O_RDONLY)] if chance.random() < (0.8 if name == "open" else 0.05) else []
        kind = chance.random()
        if kind < 0.05:
            return chance.randbytes(chance.randrange(1, 60)), fds
        if kind < 0.1:
            return chance.choice((b"[]", b"5", b"null", b'"x"', b"[" * 20_000, b'{"reply":', b"\xff", b"9" * 6000)), fds
        document: Any
        if kind < 0.3 or name == "open":
            document = {
                key: self._value() for key in ("reply", "error", "size", "tier", "path_hint", "hold", "class")
                if chance.random() < (0.2 if key == "error" else 0.6)
            }  # fmt: skip
        elif kind < 0.4:
            document = {"error": {key: self._value() for key in ("class", "message", "hint", "context")}}
        else:
            method = next(method for method in METHODS if method.name == name)
            packed = self._requests.request(method.output_type).SerializeToString()
            if chance.random() < 0.2:
                packed = self._requests.damaged(packed)
            document = {"reply": b64encode(packed[:30_000]).decode()}
        return json.dumps(document).encode(), fds

    def _value(self) -> Any:
        return self._chance.choice(
            (
                None,
                True,
                0,
                -1,
                2**70,
                1.5,
                math.inf,
                "",
                "x",
                "tier1",
                "\ud800",
                [],
                ["x"],
                {},
                {"x": 5},
                "InternalError",
                "AAAA",
            )
        )

    def close(self) -> None:
        """Let go of both ends."""
        self.connection.close()
        self._theirs.close()
        self.restore.close()


@pytest.fixture
def answering() -> Iterator[Answering]:
    made = Answering()
    yield made
    made.close()


@pytest.mark.promise("bad_input")
@pytest.mark.timeout(120 + ANSWERS // 20)
def test_no_answer_raises_anything_but_cairns_errors(answering: Answering, evidence: Evidence) -> None:
    names = sorted(CALLS)
    wrong = [answering.ask(names[number % len(names)]) for number in range(ANSWERS)]
    wrong = [each for each in wrong if each]
    evidence(tried=ANSWERS, broken=len(wrong))
    assert not wrong, f"{len(wrong)} times (CAIRN_CRASH_SEED={SEED}):\n" + "\n".join(wrong[:15])


def test_every_call_of_a_trainer_is_looked_at() -> None:
    asked = {method.name for method in METHODS if method.containing_service.name in ("Save", "Restore")}
    by_grpc_alone = {"Grant", "Put", "Read"}
    waited_for_by_nobody = {"EndFetch"}
    assert asked - by_grpc_alone - waited_for_by_nobody <= set(CALLS)
