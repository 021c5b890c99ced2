"""Calls that training waits for, answered on the side socket: there a round trip takes a fifth of gRPC's.

They are calls of the Save and Restore services, with the same messages and the same code behind them. What would have
to wait is left to gRPC, and so is an answer that does not fit into one packet: it is then None. All of them may be made
again, so it does no harm that such a call was done once already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.message import DecodeError

from cairn_api.errors import CairnError, ConfigurationError
from cairn_api.v1 import restore_pb2
from cairn_api.v1 import save_pb2 as pb
from cairn_api.wire import BRIEF_BYTES
from cairnd.rpc.restore_service import RestoreService
from cairnd.rpc.save_service import SaveService
from cairnd.rpc.status import unforeseen, unreadable
from cairnd.session.clients import Client, Clients
from cairnd.session.launches import Launches

_SAVING: Mapping[str, Any] = {
    "Reserve": pb.ReserveRequest,
    "Create": pb.CreateRequest,
    "Seal": pb.SealRequest,
    "Commit": pb.CommitRequest,
}
_RESTORING: Mapping[str, Any] = {
    "Resolve": restore_pb2.ResolveRequest,
    "Fetch": restore_pb2.FetchRequest,
    "EndFetch": restore_pb2.EndFetchRequest,
}
_REQUESTS = {**_SAVING, **_RESTORING}
"""Those that wait for nobody: while one is worked on, its client's side socket answers nothing else."""

NAMES = tuple(_REQUESTS)


class BriefCalls:
    """See the module."""

    def __init__(self, clients: Clients, launches: Launches, saves: SaveService, restores: RestoreService) -> None:
        self._clients = clients
        self._launches = launches
        self._saves = saves
        self._restores = restores

    async def answer(self, client: Client, name: str, packed: bytes) -> bytes | None:
        """The packed reply to a packed request, or None when it has to come by gRPC. Raises only Cairn's errors."""
        if name not in _REQUESTS:
            raise ConfigurationError(f"{name!r} is no call of the side socket", hint="make it by gRPC")
        self._clients.seen(client)
        try:
            request = _REQUESTS[name].FromString(packed)
            if name == "Reserve" and not self._is_brief(client, request):
                return None
            if name == "Resolve" and not self._restores.resolves_at_once(request):
                return None
            if name == "Fetch":
                reply = await self._restores.fetch_near(request, client, BRIEF_BYTES)
                if reply is None:
                    return None
            else:
                service = self._saves if name in _SAVING else self._restores
                reply = await getattr(type(service), name).for_client(service, request, client)
            answer: bytes = reply.SerializeToString()
        except CairnError:
            raise
        except DecodeError as error:
            raise unreadable(error) from error
        except Exception as error:
            raise unforeseen(error, name) from error
        return answer if len(answer) <= BRIEF_BYTES else None

    def _is_brief(self, client: Client, request: pb.ReserveRequest) -> bool:
        """Whether a buffer is free without waiting; failures are told once, so they must not be cut off."""
        return not client.failures and (request.wait_s <= 0 or self._launches.has_buffer(client, request.buffers))
