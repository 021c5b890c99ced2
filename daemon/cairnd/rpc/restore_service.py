"""The Restore service: proto → call → proto."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

from cairn_api.errors import CairnError, ConfigurationError, VersionError
from cairn_api.framing import framed
from cairn_api.names import check_job, check_tag
from cairn_api.v1 import restore_pb2 as pb
from cairn_api.v1 import restore_pb2_grpc
from cairn_api.wire import STREAM_CHUNK_BYTES
from cairnd.catalog.catalog import Catalog
from cairnd.catalog.health import HealthBook
from cairnd.catalog.jobs import JobBook
from cairnd.catalog.leases import Leases
from cairnd.model import CopyState, Version, VersionState
from cairnd.restore.fetcher import Fetcher, Progress
from cairnd.restore.inventory import Inventory
from cairnd.rpc import convert
from cairnd.rpc.server import translated, translated_stream
from cairnd.session.clients import Client, Clients
from cairnd.tiers.filesystem import FileSystem, read_exactly
from cairnd.workers import Workers, to_the_end

_SETTLE_S = 120.0
"""With the bucket's own time-outs this stays well below the clients' deadline for Resolve (300 s)."""


class RestoreService(restore_pb2_grpc.RestoreServicer):
    """See ``restore.proto`` for why each call exists."""

    def __init__(
        self,
        clients: Clients,
        catalog: Catalog,
        jobs: JobBook,
        leases: Leases,
        health: HealthBook,
        inventory: Inventory,
        fetcher: Fetcher,
        fs: FileSystem,
        workers: Workers,
    ) -> None:
        self.clients = clients
        self._catalog = catalog
        self._jobs = jobs
        self._leases = leases
        self._health = health
        self._inventory = inventory
        self._fetcher = fetcher
        self._fs = fs
        self._workers = workers

    @translated
    async def Resolve(self, request: pb.ResolveRequest, client: Client) -> pb.ResolveReply:
        job = check_job(request.job)
        self._jobs.check_owner(job, client.uid, client.privileged)
        reply = pb.ResolveReply()
        if request.source:
            versions, claim, unreadable = await self._inventory.read_source(request.source, job)
        else:
            if not request.local_only:
                reply.tier2_error = await self._inventory.refresh(job)
            # What all ranks agreed on and is still being written will be there in a moment: better wait than step back.
            await self._catalog.wait_until(lambda: not self._unsettled(job), _SETTLE_S)
            self._health.judge(job)
            versions, claim = list(self._catalog.versions(job)), self._inventory.newest_claim(job)
            unreadable = self._inventory.unreadable(job)
            claim = claim if claim is not None and not claim.problem else None
            record = self._jobs.get(job)
            if record is not None and record.epoch > (claim.epoch if claim is not None else 0):
                reply.claimed_epoch = record.epoch
                if record.resumed_from is not None:
                    reply.resumed_from.CopyFrom(convert.id_to(record.resumed_from))
        if claim is not None and not reply.claimed_epoch:
            reply.claimed_epoch = claim.epoch
            if claim.resumed_from is not None:
                reply.resumed_from.CopyFrom(convert.id_to(claim.resumed_from))
        _check_owner(client, versions)
        for version in versions:
            if request.tag and version.id.tag != check_tag(request.tag):
                continue
            if not version.restorable:
                continue
            if any(copy.state is CopyState.VERIFIED for copy in version.copies.values()):
                reply.versions.append(convert.version_to(version, partitions=True))
            else:
                reply.unhealthy.append(convert.id_to(version.id))
        reply.unhealthy.extend(map(convert.id_to, unreadable))
        return reply

    def _unsettled(self, job: str) -> list[Version]:
        return [version for version in self._catalog.versions(job) if version.state is VersionState.SEALED]

    @translated_stream
    async def Fetch(self, request: pb.FetchRequest, client: Client) -> AsyncIterator[pb.FetchProgress]:
        version = await self._version_of(request, client)
        fetch = self._fetcher.fetch(client.number, version, request.paths, source=request.source)
        async with aclosing(fetch):  # a call that is cancelled ends its fetch now, not when it is collected
            async for progress in fetch:
                yield _progress_to(progress)

    async def fetch_near(self, request: pb.FetchRequest, client: Client, most_bytes: int) -> pb.FetchProgress | None:
        """What :meth:`Fetch` says last, if nothing has to be brought or read first.

        None if something has to, or if the message has more than *most_bytes*: then nothing was done.
        """
        if request.source:
            return None
        version = await self._version_of(request, client)
        if not self._fetcher.is_near(version, request.paths):
            return None
        message = pb.FetchProgress()
        tier = message.from_tier
        async with aclosing(self._fetcher.fetch(client.number, version, request.paths)) as fetch:
            async for progress in fetch:
                message = _progress_to(progress)
                tier = message.from_tier or tier
        message.from_tier = tier
        if message.ByteSize() <= most_bytes:
            return message
        self._fetcher.end(self._leases.get(message.lease, client.number))
        return None

    def resolves_at_once(self, request: pb.ResolveRequest) -> bool:
        """Whether :meth:`Resolve` would neither wait nor ask a bucket."""
        job = check_job(request.job)
        asks = bool(request.source) or (not request.local_only and self._inventory.has_bucket(job))
        return not asks and not self._unsettled(job)

    async def _version_of(self, request: pb.FetchRequest, client: Client) -> Version:
        job, version_id = check_job(request.job), convert.id_from(request.id)
        self._jobs.check_owner(job, client.uid, client.privileged)
        if request.source:
            versions, _, _ = await self._inventory.read_source(request.source, job)
            version = next((item for item in versions if item.id == version_id), None)
            version = version or self._catalog.require(job, version_id)
        else:
            version = self._catalog.require(job, version_id)
        _check_owner(client, [version])
        return version

    @translated_stream
    async def Read(self, request: pb.ReadRequest, client: Client) -> AsyncIterator[bytes]:
        """Unlike the others it gives its messages as they travel: see :mod:`cairn_api.framing`."""
        lease = self._leases.get(request.lease, client.number)
        fd, fetched = await self._workers.run(self._fetcher.open, lease, request.path)
        scratch = memoryview(bytearray(min(STREAM_CHUNK_BYTES, fetched.size_bytes)))

        def read(offset: int) -> bytes:
            chunk = scratch[: fetched.size_bytes - offset]
            read_exactly(self._fs, fd, chunk, offset)
            return framed(pb.ReadReply.DATA_FIELD_NUMBER, chunk)

        ahead: asyncio.Task[bytes] | None = None
        try:
            for offset in range(0, fetched.size_bytes, STREAM_CHUNK_BYTES):
                ahead = ahead or asyncio.ensure_future(self._workers.run(read, offset))
                message = await asyncio.shield(ahead)  # a call that is cancelled must not leave a thread to itself
                following = offset + STREAM_CHUNK_BYTES
                if following < fetched.size_bytes:  # read while this one is sent
                    ahead = asyncio.ensure_future(self._workers.run(read, following))
                if not self._leases.holds(lease):  # then its buffer may be filled anew
                    raise VersionError(f"the restore of {lease.version} was given up", hint="fetch the version again")
                yield message
        finally:
            try:
                if ahead is not None:
                    with suppress(CairnError, OSError):  # of what nobody waits for any more
                        await to_the_end(_ended(ahead))
            finally:
                self._fs.close(fd)

    @translated
    async def NoteResume(self, request: pb.NoteResumeRequest, client: Client) -> pb.NoteResumeReply:
        if request.ended:
            self._health.resume_ended(client.number)
            return pb.NoteResumeReply()
        job, version_id = check_job(request.job), convert.id_from(request.id)
        self._jobs.check_owner(job, client.uid, client.privileged)
        version = self._catalog.require(job, version_id)
        return pb.NoteResumeReply(
            died_in_a_row=await self._health.resume_began(client.number, version, request.attempt)
        )

    @translated
    async def EndFetch(self, request: pb.EndFetchRequest, client: Client) -> pb.EndFetchReply:
        self._fetcher.end(self._leases.get(request.lease, client.number))
        return pb.EndFetchReply()


async def _ended(reading: asyncio.Task[bytes]) -> None:
    await reading


def _progress_to(progress: Progress) -> pb.FetchProgress:
    message = pb.FetchProgress(
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
        lease=progress.lease,
        digested_bytes=progress.digested_bytes,
        digest_s=progress.digest_s,
    )
    if progress.tier is not None:
        message.from_tier = convert.tier_to(progress.tier)
    for item in progress.ready:
        message.ready.add(path=item.path, tier=convert.tier_to(item.tier), size_bytes=item.size_bytes)
    return message


def _check_owner(client: Client, versions: list[Version]) -> None:
    # Loudly: a trainer that was told of no versions would begin from nothing.
    others = {version.uid for version in versions} - {client.uid}
    if others and not client.privileged:
        raise ConfigurationError(
            f"{versions[0].job!r} has versions of user {min(others)}, not of user {client.uid}",
            hint="run as that user, or name another job",
        )
