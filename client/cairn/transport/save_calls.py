"""The Save service and the hand-over of capture buffers, as methods with plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

from cairn.transport.calls import CALL_TIMEOUT_S, STORAGE_CALL_TIMEOUT_S, Caller
from cairn.transport.connection import Connection
from cairn.transport.messages import (
    Alive,
    Claimed,
    Joined,
    Opening,
    PartitionPlan,
    Reserved,
    errors_from_wire,
    records_to_wire,
    state_name,
    version_to_wire,
    versions_from_wire,
)
from cairn.transport.stream import BulkStub, put
from cairn_api.errors import CairnError
from cairn_api.names import VersionId
from cairn_api.v1 import save_pb2, save_pb2_grpc
from cairn_api.wire import PROTOCOL_VERSION, SLOWEST_STREAM_BYTES_PER_S, pack_column

_SERVICE = save_pb2_grpc.SaveStub


class SaveCalls:
    """What a rank asks while saving. Every method raises as :class:`cairn.transport.calls.Caller` says."""

    def __init__(self, caller: Caller, rank: int) -> None:
        self._caller = caller
        self._job = caller.job
        self._rank = rank

    def join(self, world_size: int, persistent_storage_path: str, retention: int, client_version: str) -> Joined:
        """Announce this rank and its job's policy. Refused with :class:`ConfigurationError` beyond the limits."""
        request = save_pb2.JoinRequest(
            protocol=PROTOCOL_VERSION,
            job=self._job,
            rank=self._rank,
            world_size=world_size,
            policy=save_pb2.JobPolicy(
                persistent_storage_path=persistent_storage_path, num_of_version_in_retention=retention
            ),
            client_version=client_version,
        )
        reply = self._caller.unary(_SERVICE, "Join", save_pb2.JoinReply, request, STORAGE_CALL_TIMEOUT_S)
        return Joined(
            node=reply.node,
            max_epoch=reply.max_epoch,
            lease_s=reply.lease_s,
            tier1_path=reply.tier1_path,
            persistent_storage_path=reply.persistent_storage_path,
            tier2_reachable=reply.tier2_reachable,
            tier2_error=reply.tier2_error,
            memory_limit_bytes=reply.memory_limit_bytes,
            memory_free_bytes=reply.memory_free_bytes,
            files_protected=reply.files_protected,
            daemon_version=reply.daemon_version,
        )

    def claim_epoch(
        self,
        epoch: int,
        nonce: str,
        world_size: int,
        *,
        resumed_from: VersionId | None,
        claim: bool,
        provisional: bool = False,
    ) -> Claimed:
        """Claim *epoch* for this launch (rank 0), or tell the daemon which one rank 0 obtained."""
        request = save_pb2.ClaimEpochRequest(
            job=self._job,
            epoch=epoch,
            nonce=nonce,
            world_size=world_size,
            resumed_from=None if resumed_from is None else version_to_wire(resumed_from),
            claim=claim,
            provisional=provisional,
        )
        reply = self._caller.unary(_SERVICE, "ClaimEpoch", save_pb2.ClaimEpochReply, request, STORAGE_CALL_TIMEOUT_S)
        return Claimed(taken=reply.taken, max_epoch=reply.max_epoch, provisional=reply.provisional)

    def reserve(self, wait_s: float, buffers: int) -> Reserved:
        """Whether a capture buffer is free, waiting up to *wait_s* for one."""
        request = save_pb2.ReserveRequest(job=self._job, wait_s=wait_s, buffers=buffers)
        reply = self._caller.unary(_SERVICE, "Reserve", save_pb2.ReserveReply, request, CALL_TIMEOUT_S + wait_s)
        return Reserved(
            available=reply.available,
            free_segments=tuple(reply.free_segments),
            tier1=versions_from_wire(reply.tier1),
            tier2=versions_from_wire(reply.tier2),
            last_persist_age_s=None if reply.last_persist_age_s < 0 else reply.last_persist_age_s,
            persist_lost=reply.persist_lost,
            failures=errors_from_wire(reply.failures),
        )

    def share(self, size_bytes: int, make: Callable[[], tuple[str, int]]) -> None:
        """Have a capture buffer granted, *make* it (its name and descriptor) and hand it over.

        One step, because a grant dies with its connection: on a new connection all of it is repeated, so *make* has to
        return the same buffer each time. Raises what *make* raises, and :class:`OverloadedError` when the daemon's
        budget is spent.
        """
        request = save_pb2.GrantRequest(job=self._job, size_bytes=size_bytes)

        def attempt(connection: Connection) -> None:
            reply = self._caller.stub(connection, _SERVICE, "Grant")(request, timeout=CALL_TIMEOUT_S)
            grant = cast("save_pb2.GrantReply", reply).grant
            try:
                name, fd = make()
            except CairnError:
                # What could not be made must not be charged: other ranks share the budget.
                unused = save_pb2.ReleaseRequest(grant=grant)
                self._caller.stub(connection, _SERVICE, "Release")(unused, timeout=CALL_TIMEOUT_S)
                raise
            connection.request({"op": "offer", "segment": name, "size": size_bytes, "grant": grant}, [fd])

        self._caller.repeat(attempt)

    def release(self, segment: str) -> None:
        """Give the memory of a segment back to the budget."""
        request = save_pb2.ReleaseRequest(segment=segment)
        self._caller.unary(_SERVICE, "Release", save_pb2.ReleaseReply, request, CALL_TIMEOUT_S)

    def create(self, opening: Opening, *, resumed: bool = False) -> str:
        """Open a version; returns its state, which for a repeated call is whatever it has become."""
        request = save_pb2.CreateRequest(
            job=self._job,
            id=version_to_wire(opening.version),
            rank=self._rank,
            world_size=opening.world_size,
            nonce=opening.nonce,
            save_dir=opening.save_dir,
            persist=opening.persist,
            floor=None if opening.floor is None else version_to_wire(opening.floor),
            resumed=resumed,
            file_marks=opening.file_marks,
            attributes=opening.attributes,
            node_ranks=opening.node_ranks,
        )
        return state_name(
            self._caller.unary(_SERVICE, "Create", save_pb2.CreateReply, request, STORAGE_CALL_TIMEOUT_S).state
        )

    def keep_alive(self) -> Alive:
        """Renew the leases; learn what happened meanwhile."""
        request = save_pb2.KeepAliveRequest(job=self._job)
        reply = self._caller.unary(_SERVICE, "KeepAlive", save_pb2.KeepAliveReply, request, CALL_TIMEOUT_S)
        return Alive(
            failures=errors_from_wire(reply.failures),
            settled=versions_from_wire(reply.settled),
            token=reply.token,
            lease_s=reply.lease_s,
        )

    def seal(self, version: VersionId, partition: PartitionPlan, segment: str) -> None:
        """Hand over a partition that lies at the start of *segment*."""
        request = save_pb2.SealRequest(
            job=self._job,
            id=version_to_wire(version),
            rank=self._rank,
            name=partition.name,
            segment=segment,
            size_bytes=partition.size_bytes,
            records=records_to_wire(partition.records),
            globals=partition.globals,
            digests=pack_column(partition.digests),
        )
        self._caller.unary(_SERVICE, "Seal", save_pb2.SealReply, request, CALL_TIMEOUT_S)

    def put(
        self, version: VersionId, partition: PartitionPlan, windows: Callable[[], Iterable[memoryview | bytes]]
    ) -> None:
        """Hand over a partition as a stream. *windows* gives its bytes in order, anew for every attempt.

        Raises also what *windows* raises.
        """
        header = save_pb2.PutHeader(
            job=self._job,
            id=version_to_wire(version),
            rank=self._rank,
            name=partition.name,
            size_bytes=partition.size_bytes,
            records=records_to_wire(partition.records),
            globals=partition.globals,
        )
        timeout_s = STORAGE_CALL_TIMEOUT_S + partition.size_bytes / SLOWEST_STREAM_BYTES_PER_S

        def attempt(connection: Connection) -> None:
            call = self._caller.stub(connection, BulkStub, "Put")
            put(lambda requests: call(requests, timeout=timeout_s), header, windows())

        self._caller.repeat(attempt)

    def prepare(self, version: VersionId, names: Sequence[str]) -> None:
        """Ask whether the daemon holds everything that this rank saved."""
        request = save_pb2.PrepareRequest(job=self._job, id=version_to_wire(version), rank=self._rank, names=names)
        self._caller.unary(_SERVICE, "Prepare", save_pb2.PrepareReply, request, STORAGE_CALL_TIMEOUT_S)

    def commit(self, version: VersionId, shared_names: Sequence[tuple[str, int]]) -> str:
        """All ranks agreed. Returns the version's state."""
        request = save_pb2.CommitRequest(
            job=self._job,
            id=version_to_wire(version),
            rank=self._rank,
            shared_names=[save_pb2.SharedName(name=name, rank=rank) for name, rank in shared_names],
        )
        return state_name(
            self._caller.unary(_SERVICE, "Commit", save_pb2.CommitReply, request, STORAGE_CALL_TIMEOUT_S).state
        )

    def abort(self, version: VersionId, reason: str) -> None:
        """End a save that will not be committed."""
        request = save_pb2.AbortRequest(job=self._job, id=version_to_wire(version), rank=self._rank, reason=reason)
        self._caller.unary(_SERVICE, "Abort", save_pb2.AbortReply, request, CALL_TIMEOUT_S)

    def wait(self, version: VersionId, durability: str, timeout_s: float) -> bool:
        """Whether the version reached *durability* within *timeout_s*; raises why it never will."""
        request = save_pb2.WaitRequest(
            job=self._job,
            id=version_to_wire(version),
            durability=f"DURABILITY_{durability.upper()}",
            timeout_s=timeout_s,
        )
        reply = self._caller.unary(_SERVICE, "Wait", save_pb2.WaitReply, request, CALL_TIMEOUT_S + timeout_s)
        return reply.reached
