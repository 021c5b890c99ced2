"""Who is connected: one client per side-socket connection, identified by the kernel, named by a short-lived token."""

from __future__ import annotations

import secrets
from collections import deque
from dataclasses import dataclass, field
from itertools import count

from cairn_api.errors import CairnError, ConfigurationError
from cairnd.clock import Clock
from cairnd.metrics import Metrics

TOKEN_LIFETIME_S = 300.0
"""A token outlives several keep-alives; it dies at once with its connection."""

_MAX_QUEUED_FAILURES = 64


@dataclass(slots=True, eq=False)
class Client:
    """A connected process. ``uid``, ``gid`` and ``pid`` are what the kernel says of the peer.

    ``job`` is set by Join and ``epoch`` with ``nonce`` by ClaimEpoch: without them there is nothing that it may save.
    """

    number: int
    uid: int
    gid: int
    pid: int
    privileged: bool
    job: str = ""
    rank: int | None = None
    nonce: str = ""
    epoch: int = 0
    seen_s: float = 0.0
    tokens: dict[str, float] = field(default_factory=dict)
    failures: deque[CairnError] = field(default_factory=lambda: deque(maxlen=_MAX_QUEUED_FAILURES))

    def take_failures(self) -> list[CairnError]:
        """Background failures since the last call; each is handed out once."""
        taken = list(self.failures)
        self.failures.clear()
        return taken


class Clients:
    """All connected clients and their tokens. Used from the event loop's thread."""

    def __init__(self, clock: Clock, metrics: Metrics, own_uid: int, allowed_uids: frozenset[int]) -> None:
        self._clock = clock
        self._metrics = metrics
        self._own_uid = own_uid
        self._allowed_uids = allowed_uids
        self._numbers = count(1)
        self._clients: dict[int, Client] = {}
        self._by_token: dict[str, Client] = {}

    def connect(self, uid: int, gid: int, pid: int) -> Client:
        """Admit a peer, or raise :class:`ConfigurationError` when its user may not connect."""
        if uid not in self._allowed_uids | {0, self._own_uid}:
            raise ConfigurationError(
                f"user {uid} may not use this daemon",
                hint=f"add {uid} to allowed_uids in cairnd.toml and restart cairnd",
                context={"uid": uid},
            )
        client = Client(next(self._numbers), uid, gid, pid, uid in (0, self._own_uid), seen_s=self._clock.monotonic_s())
        self._clients[client.number] = client
        self._metrics.clients.set(len(self._clients))
        return client

    def disconnect(self, client: Client) -> None:
        """Forget a client and its tokens."""
        self._clients.pop(client.number, None)
        for token in client.tokens:
            self._by_token.pop(token, None)
        self._metrics.clients.set(len(self._clients))

    def issue_token(self, client: Client) -> str:
        """A new token for *client*; older ones stay valid until they expire."""
        now_s = self._clock.monotonic_s()
        for token in [token for token, expiry_s in client.tokens.items() if expiry_s < now_s]:
            del client.tokens[token]
            self._by_token.pop(token, None)
        token = secrets.token_urlsafe(32)
        client.tokens[token] = now_s + TOKEN_LIFETIME_S
        self._by_token[token] = client
        return token

    def authenticate(self, token: str) -> Client | None:
        """The client whose live token this is, or None."""
        client = self._by_token.get(token)
        if client is None or client.tokens[token] < self._clock.monotonic_s():
            return None
        self.seen(client)
        return client

    def seen(self, client: Client) -> None:
        """Take note of a sign of life."""
        client.seen_s = self._clock.monotonic_s()

    def excuse(self, duration_s: float) -> None:
        """The daemon itself stood still for *duration_s*: nobody could give a sign of life, or renew a token."""
        now_s = self._clock.monotonic_s()
        for client in self._clients.values():
            client.seen_s = min(now_s, client.seen_s + duration_s)
            for token in client.tokens:
                client.tokens[token] += duration_s

    def get(self, number: int) -> Client | None:
        """The connected client of that number, or None."""
        return self._clients.get(number)

    def of_job(self, job: str) -> list[Client]:
        """Connected ranks of *job*."""
        return [client for client in self._clients.values() if client.job == job]

    def all(self) -> list[Client]:
        """Everyone connected."""
        return list(self._clients.values())

    def fail(self, job: str, error: CairnError) -> None:
        """Queue *error* for every connected rank of *job*: it surfaces on their next call."""
        for client in self.of_job(job):
            client.failures.append(error)
