"""The Save service: proto → call → proto."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from cairn_api.errors import CairnError, ConfigurationError, SaveFailedError
from cairn_api.names import check_partition
from cairn_api.v1 import save_pb2 as pb
from cairn_api.v1 import save_pb2_grpc, types_pb2
from cairn_api.wire import PROTOCOL_VERSION
from cairnd import __version__
from cairnd.catalog.catalog import Catalog
from cairnd.model import Tier, Version, VersionState
from cairnd.replication.bucket import EpochClaim
from cairnd.replication.persist import Persistence
from cairnd.replication.replicator import Replicator
from cairnd.rpc import convert
from cairnd.rpc.server import caller, translated
from cairnd.rpc.spool import StreamSlots, parsed, pieces, spool
from cairnd.rpc.status import abort, to_proto, unforeseen, without_traces
from cairnd.sealing import SealingPass
from cairnd.session.clients import Client, Clients
from cairnd.session.launches import Launches
from cairnd.session.memory import CaptureMemory
from cairnd.session.rules import MAX_REASON_LENGTH, check_claim, check_text, check_texts
from cairnd.session.saves import Saves
from cairnd.upkeep.keeper import Keeper
from cairnd.workers import Workers, to_the_end


class SaveService(save_pb2_grpc.SaveServicer):
    """See ``save.proto`` for why each call exists."""

    def __init__(
        self,
        node: str,
        tier1_path: str,
        lease_s: float,
        files_protected: bool,
        clients: Clients,
        launches: Launches,
        saves: Saves,
        catalog: Catalog,
        memory: CaptureMemory,
        keeper: Keeper,
        replicator: Replicator,
        persistence: Persistence,
        workers: Workers,
    ) -> None:
        self.clients = clients
        self._node = node
        self._tier1_path = tier1_path
        self._lease_s = lease_s
        self._files_protected = files_protected
        self._launches = launches
        self._saves = saves
        self._catalog = catalog
        self._memory = memory
        self._keeper = keeper
        self._replicator = replicator
        self._persistence = persistence
        self._workers = workers
        self._streams = StreamSlots()

    @translated
    async def Join(self, request: pb.JoinRequest, client: Client) -> pb.JoinReply:
        if request.protocol != PROTOCOL_VERSION:
            raise ConfigurationError(
                f"this daemon (cairnd {__version__}) speaks protocol {PROTOCOL_VERSION}, the client {request.protocol}",
                hint="install the same version of cairn-checkpoint for the trainer and for the daemon",
            )
        check_text("persistent_storage_path", request.policy.persistent_storage_path)
        client.rank = request.rank
        epoch, error = await self._launches.join(
            client,
            request.job,
            storage_url=request.policy.persistent_storage_path,
            keep=request.policy.num_of_version_in_retention,
        )
        return pb.JoinReply(
            node=self._node,
            max_epoch=epoch,
            tier2_reachable=not error and bool(self._replicator.location(request.job)),
            memory_limit_bytes=self._memory.limit_bytes,
            memory_free_bytes=self._memory.free_bytes,
            lease_s=self._lease_s,
            tier1_path=self._tier1_path,
            persistent_storage_path=self._replicator.location(request.job),
            daemon_version=__version__,
            files_protected=self._files_protected,
            tier2_error=error,
        )

    @translated
    async def ClaimEpoch(self, request: pb.ClaimEpochRequest, client: Client) -> pb.ClaimEpochReply:
        self._check_job(client, request.job)
        check_claim(request.epoch, request.nonce, request.world_size)
        resumed_from = convert.id_from(request.resumed_from) if request.HasField("resumed_from") else None
        claim = EpochClaim(request.epoch, request.nonce, request.world_size, resumed_from)
        taken, provisional = await self._launches.claim(
            client, claim, first_rank=request.claim, provisional=request.provisional
        )
        return pb.ClaimEpochReply(taken=taken, max_epoch=self._launches.max_epoch(request.job), provisional=provisional)

    @translated
    async def Reserve(self, request: pb.ReserveRequest, client: Client) -> pb.ReserveReply:
        self._check_job(client, request.job)
        segments = await self._launches.reserve(client, request.buffers, convert.seconds_from(request.wait_s))
        age_s = self._catalog.last_persist_age_s(client.job)
        return pb.ReserveReply(
            available=segments is not None,
            free_segments=[segment.name for segment in segments or []],
            tier1=[convert.id_to(version.id) for version in self._launches.newest(client.job, Tier.TIER1)],
            tier2=[convert.id_to(version.id) for version in self._launches.newest(client.job, Tier.TIER2)],
            last_persist_age_s=-1.0 if age_s is None else age_s,
            persist_lost=self._launches.persist_lost(client),
            failures=self._failures(client),
        )

    @translated
    async def Grant(self, request: pb.GrantRequest, client: Client) -> pb.GrantReply:
        self._check_job(client, request.job)
        self._launches.reclaim(request.size_bytes)
        return pb.GrantReply(grant=self._memory.grant(client.number, client.job, request.size_bytes))

    @translated
    async def Release(self, request: pb.ReleaseRequest, client: Client) -> pb.ReleaseReply:
        self._memory.drop_grant(client.number, request.grant)
        segment = self._memory.segments.get(request.segment)
        if segment is not None and segment.client == client.number:
            if segment.owner is not None or segment.readers:
                raise ConfigurationError("the buffer still holds a version", hint="release it once it is free")
            self._memory.release(segment)
            self._catalog.wake()
        return pb.ReleaseReply()

    @translated
    async def Create(self, request: pb.CreateRequest, client: Client) -> pb.CreateReply:
        self._check_job(client, request.job)
        self._launches.check_current(client)
        version = self._saves.create(
            client,
            convert.id_from(request.id),
            rank=request.rank,
            world_size=request.world_size,
            nonce=request.nonce,
            save_dir=request.save_dir,
            persist=request.persist,
            file_marks=request.file_marks,
            attributes=request.attributes,
            node_ranks=request.node_ranks,
        )
        floor = convert.id_from(request.floor) if request.HasField("floor") else None
        self._keeper.set_floor(client.job, version.id, floor)
        return pb.CreateReply(state=convert.state_to(version.state))

    @translated
    async def KeepAlive(self, request: pb.KeepAliveRequest, client: Client) -> pb.KeepAliveReply:
        settled = [
            version.id
            for version in self._catalog.versions(client.job)
            if version.nonce == client.nonce and version.has(Tier.TIER1)
        ]
        return pb.KeepAliveReply(
            failures=self._failures(client),
            settled=[convert.id_to(version) for version in settled],
            token=self.clients.issue_token(client),
            lease_s=self._lease_s,
        )

    @translated
    async def Seal(self, request: pb.SealRequest, client: Client) -> pb.SealReply:
        self._check_job(client, request.job)
        self._saves.seal(
            client,
            convert.id_from(request.id),
            rank=request.rank,
            name=request.name,
            segment_name=request.segment,
            size_bytes=request.size_bytes,
            records=convert.records_from(request.records),
            globals_=request.globals,
            digests=convert.digests_from(request.digests),
        )
        return pb.SealReply()

    async def Put(self, requests: AsyncIterator[bytes], context: Any) -> pb.PutReply:
        """Unlike the others it is given the messages as they came: see :mod:`cairn_api.framing`."""
        try:
            client = caller(context, self.clients)
            async with self._streams.taken(client.number):
                return await self._put(aiter(requests), client)
        except CairnError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - as in cairnd.rpc.server
            failure = unforeseen(error, "Put")
        del requests
        await abort(context, without_traces(failure))
        raise AssertionError("abort does not return")

    async def _put(self, requests: AsyncIterator[bytes], client: Client) -> pb.PutReply:
        first = parsed(await anext(requests, b""))
        if first.WhichOneof("part") != "header":
            raise ConfigurationError("a stream begins with its header")
        header = first.header
        self._check_job(client, header.job)
        version = convert.id_from(header.id)
        records = convert.records_from(header.records)
        records.validate(header.size_bytes)
        check_texts("globals", header.globals)
        writer = await self._saves.begin_stream(
            client, version, rank=header.rank, name=header.name, size_bytes=header.size_bytes
        )
        try:
            sealing = SealingPass(header.size_bytes, records)
            await spool(
                pieces(requests, header.size_bytes),
                writer,
                sealing,
                self._workers,
                on_block=lambda: self._saves.check_open(client, version),
            )
            await to_the_end(self._workers.run(writer.finish))
            digest = sealing.finish()
            self._saves.end_stream(
                client,
                version,
                rank=header.rank,
                name=header.name,
                globals_=header.globals,
                writer=writer,
                digest=digest,
            )
        except BaseException:
            await to_the_end(self._workers.run(writer.discard))
            raise
        return pb.PutReply(crc64nvme=digest.crc64nvme)

    @translated
    async def Prepare(self, request: pb.PrepareRequest, client: Client) -> pb.PrepareReply:
        self._check_job(client, request.job)
        await self._saves.prepare(client, convert.id_from(request.id), rank=request.rank, names=request.names)
        return pb.PrepareReply()

    @translated
    async def Commit(self, request: pb.CommitRequest, client: Client) -> pb.CommitReply:
        self._check_job(client, request.job)
        shared = [(check_partition(item.name), item.rank) for item in request.shared_names]
        version = self._saves.commit(client, convert.id_from(request.id), shared_names=shared)
        return pb.CommitReply(state=convert.state_to(version.state))

    @translated
    async def Abort(self, request: pb.AbortRequest, client: Client) -> pb.AbortReply:
        self._check_job(client, request.job)
        version = self._catalog.get(client.job, convert.id_from(request.id))
        if version is not None:
            self._saves.abort(version, f"rank {request.rank}: {request.reason[:MAX_REASON_LENGTH]}")
        return pb.AbortReply()

    @translated
    async def Wait(self, request: pb.WaitRequest, client: Client) -> pb.WaitReply:
        self._check_job(client, request.job)
        version = self._catalog.require(client.job, convert.id_from(request.id))
        reached = self._condition(version, request.durability)
        if request.durability == types_pb2.DURABILITY_TIER2 and not reached():
            await self._persistence.request(version)
        ended = (VersionState.ABORTED, VersionState.DELETING)

        def refused() -> bool:
            return request.durability == types_pb2.DURABILITY_TIER2 and self._replicator.refused(version)

        await self._catalog.wait_until(
            lambda: reached() or version.state in ended or refused(), convert.seconds_from(request.timeout_s)
        )
        if refused():
            raise SaveFailedError(
                f"{version} will not be in tier 2: {version.copy(Tier.TIER2).error or 'it was deleted there'}",
                hint="tier 1 still has it: `cairn export` saves it",
                context={"version": version.id, "tier": Tier.TIER2},
            )
        if not reached() and version.state in ended:
            raise SaveFailedError(
                f"{version} is {version.state}: {version.reason}", hint="save again", context={"version": version.id}
            )
        return pb.WaitReply(reached=reached(), state=convert.state_to(version.state))

    @staticmethod
    def _condition(version: Version, durability: int) -> Any:
        if durability == types_pb2.DURABILITY_CAPTURED:
            return lambda: version.restorable
        if durability == types_pb2.DURABILITY_TIER1:
            return lambda: version.has(Tier.TIER1) or version.has(Tier.TIER2)
        if durability == types_pb2.DURABILITY_TIER2:
            return lambda: version.has(Tier.TIER2)
        raise ConfigurationError("no durability was named", hint="ask for captured, tier1 or tier2")

    @staticmethod
    def _failures(client: Client) -> list[types_pb2.ErrorInfo]:
        return [to_proto(error) for error in client.take_failures()]

    @staticmethod
    def _check_job(client: Client, job: str) -> None:
        if not client.job or job != client.job:
            raise ConfigurationError(f"this connection has not joined job {job!r}", hint="call Join first")
