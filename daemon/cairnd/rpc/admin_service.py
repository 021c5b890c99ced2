"""The Admin service: proto → call → proto. What is shown to a caller is limited to the jobs that the caller owns."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial

from cairn_api.errors import ConfigurationError, VersionError
from cairn_api.names import check_job
from cairn_api.v1 import admin_pb2 as pb
from cairn_api.v1 import admin_pb2_grpc, types_pb2
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.health import HealthBook
from cairnd.catalog.jobs import JobBook
from cairnd.events import EventLog
from cairnd.model import Version
from cairnd.replication.persist import Persistence
from cairnd.restore.inventory import Inventory
from cairnd.rpc import convert
from cairnd.rpc.report import Reporter
from cairnd.rpc.server import translated, translated_stream
from cairnd.session.clients import Client, Clients
from cairnd.session.rules import MAX_REASON_LENGTH
from cairnd.upkeep.drain import Drainer
from cairnd.upkeep.keeper import Deletion, Keeper
from cairnd.upkeep.verification import Verification
from cairnd.upkeep.verifier import Finding


class AdminService(admin_pb2_grpc.AdminServicer):
    """See ``admin.proto`` for why each call exists."""

    def __init__(
        self,
        clients: Clients,
        catalog: Catalog,
        jobs: JobBook,
        inventory: Inventory,
        keeper: Keeper,
        persistence: Persistence,
        drainer: Drainer,
        health: HealthBook,
        verification: Verification,
        reporter: Reporter,
        events: EventLog,
    ) -> None:
        self.clients = clients
        self._catalog = catalog
        self._jobs = jobs
        self._inventory = inventory
        self._keeper = keeper
        self._persistence = persistence
        self._drainer = drainer
        self._health = health
        self._verification = verification
        self._reporter = reporter
        self._events = events

    @translated
    async def List(self, request: pb.ListRequest, client: Client) -> pb.ListReply:
        if request.job:
            error = await self._inventory.refresh(check_job(request.job))
        else:
            error = await self._inventory.refresh_all()
        versions = self._catalog.versions(request.job or None)
        return pb.ListReply(
            versions=[
                convert.version_to(version, partitions=request.partitions)
                for version in versions
                if _may_see(client, version)
            ],
            tier2_error=error,
        )

    @translated
    async def Describe(self, request: pb.DescribeRequest, client: Client) -> types_pb2.Version:
        version = await self._find(client, request.job, request.version)
        return convert.version_to(version, partitions=True)

    @translated_stream
    async def Verify(self, request: pb.VerifyRequest, client: Client) -> AsyncIterator[pb.VerifyProgress]:
        if request.version:
            versions = [await self._find(client, request.job, request.version)]
        else:
            await self._inventory.refresh(check_job(request.job))
            versions = [v for v in self._catalog.versions(request.job) if v.restorable and _may_see(client, v)]
        async with aclosing(self._verification.verify(versions, deep=request.deep)) as steps:
            async for step in steps:
                yield pb.VerifyProgress(
                    done_bytes=step.done_bytes,
                    total_bytes=step.total_bytes,
                    findings=[_finding_to(item) for item in step.findings],
                    versions_checked=step.versions,
                    copies_checked=step.copies,
                )

    @translated
    async def Pin(self, request: pb.PinRequest, client: Client) -> pb.PinReply:
        version = await self._find(client, request.job, request.version)
        changed = await self._keeper.pin(version, request.reason, pinned=True)
        return pb.PinReply(id=convert.id_to(version.id), changed=changed)

    @translated
    async def Unpin(self, request: pb.PinRequest, client: Client) -> pb.PinReply:
        version = await self._find(client, request.job, request.version)
        changed = await self._keeper.pin(version, request.reason, pinned=False)
        return pb.PinReply(id=convert.id_to(version.id), changed=changed)

    @translated
    async def Mark(self, request: pb.MarkRequest, client: Client) -> pb.MarkReply:
        version = await self._find(client, request.job, request.version)
        changed = self._health.mark(version, request.reason[:MAX_REASON_LENGTH])
        await self._health.settle()
        return pb.MarkReply(id=convert.id_to(version.id), changed=changed)

    @translated
    async def Prune(self, request: pb.PruneRequest, client: Client) -> pb.PruneReply:
        job = check_job(request.job)
        self._jobs.check_owner(job, client.uid, client.privileged)
        if request.version:
            plan = self._keeper.plan_version(await self._find(client, job, request.version))
        else:
            error = await self._inventory.refresh(job)
            if error:
                self._events.publish("prune_local_only", job, error=error)
            plan = [item for item in self._keeper.plan(job) if _may_see(client, item.version)]
        deletions = plan if request.dry_run else await self._keeper.delete(plan)
        return pb.PruneReply(deletions=[_deletion_to(item) for item in deletions], dry_run=request.dry_run)

    @translated
    async def Persist(self, request: pb.PersistRequest, client: Client) -> pb.PersistReply:
        job = check_job(request.job)
        self._jobs.check_owner(job, client.uid, client.privileged)
        version = await self._find(client, job, request.version) if request.version else self._persistence.newest(job)
        if version is None or not _may_see(client, version):
            raise VersionError(f"job {job!r} has no committed version", hint="run `cairn list`")
        requested = await self._persistence.request(version)
        return pb.PersistReply(id=convert.id_to(version.id), already=not requested)

    @translated_stream
    async def Drain(self, request: pb.DrainRequest, client: Client) -> AsyncIterator[pb.DrainProgress]:
        if not client.privileged:
            raise ConfigurationError("only root and the daemon's user may drain it", hint="run `sudo cairn drain`")
        async for left in self._drainer.drain(convert.seconds_from(request.timeout_s)):
            yield pb.DrainProgress(
                versions_left=len(left.versions),
                bytes_left=sum(version.size_bytes for version in left.versions),
                done=left.done,
                abandoned=[str(version) for version in left.versions] if left.done else [],
                without_tier2=[str(version) for version in left.without_tier2],
            )

    @translated
    async def Status(self, request: pb.StatusRequest, client: Client) -> pb.StatusReply:
        return await self._reporter.status(partial(_may_see, client))

    @translated_stream
    async def Watch(self, request: pb.WatchRequest, client: Client) -> AsyncIterator[pb.Event]:
        last = max((event.number for event in self._events.remembered()), default=0)
        if not request.follow and not last:
            return
        async for event in self._events.watch():
            record = self._jobs.get(event.job) if event.job else None
            mine = client.privileged or (record is not None and record.uid == client.uid)
            if mine and request.job in ("", event.job):
                yield pb.Event(
                    number=event.number, time_s=event.time_s, name=event.name, job=event.job, version=event.version,
                    fields=event.fields,
                )  # fmt: skip
            if not request.follow and event.number >= last:
                return

    async def _find(self, client: Client, job: str, text: str) -> Version:
        check_job(job)
        self._jobs.check_owner(job, client.uid, client.privileged)
        try:
            version = self._catalog.find(job, text)
        except VersionError:
            await self._inventory.refresh(job)
            version = self._catalog.find(job, text)
        if not _may_see(client, version):
            raise ConfigurationError(f"{version} belongs to user {version.uid}", hint="run as that user, or as root")
        return version


def _may_see(client: Client, version: Version) -> bool:
    return client.privileged or version.uid == client.uid


def _finding_to(item: Finding) -> pb.Finding:
    return pb.Finding(id=convert.id_to(item.id), tier=convert.tier_to(item.tier), path=item.path, problem=item.problem)


def _deletion_to(item: Deletion) -> pb.Deletion:
    return pb.Deletion(
        job=item.version.job,
        id=convert.id_to(item.version.id),
        tier=convert.tier_to(item.tier),
        size_bytes=item.version.size_bytes,
        reason=item.reason,
    )
