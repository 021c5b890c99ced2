"""What is known of each job besides its versions: owner, policy, the launch that runs now. Durable, one file a job.

None of it can be derived from manifests: a launch that committed nothing still used up its epoch, and after a restart
the daemon must know which bucket a job's waiting versions go to before any rank has connected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cairn_api.errors import CairnError, ConfigurationError, OverloadedError, VersionError
from cairn_api.names import MAX_EPOCH, VersionId, check_job, parse_version
from cairnd import layout
from cairnd.manifest import NOTE_FORMAT, decode, encode, number, text
from cairnd.tiers.local import LocalTier
from cairnd.workers import Workers

_MOST = 2**32 - 1


@dataclass(frozen=True, slots=True)
class JobRecord:
    """``epoch``: the highest this node took part in; ``provisional``: its claim is not in the bucket yet."""

    job: str
    uid: int
    gid: int
    storage_url: str
    keep: int
    epoch: int = 0
    nonce: str = ""
    world_size: int = 0
    provisional: bool = False
    resumed_from: VersionId | None = None

    def encode(self) -> bytes:
        """Canonical JSON."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return encode({"format": NOTE_FORMAT, **fields, "resumed_from": str(self.resumed_from or "")})

    @classmethod
    def decode(cls, data: bytes, what: str) -> JobRecord:
        """Raises :class:`VersionError` when the record is damaged."""
        document: Mapping[str, Any] = decode(data, NOTE_FORMAT, what)
        try:
            resumed_from = document["resumed_from"]
            return cls(
                check_job(document["job"]), number(document["uid"], 0, _MOST), number(document["gid"], 0, _MOST),
                text(document["storage_url"]), number(document["keep"], 0, _MOST),
                number(document["epoch"], 0, MAX_EPOCH), text(document["nonce"]),
                number(document["world_size"], 0, _MOST), bool(document["provisional"]),
                parse_version(resumed_from) if resumed_from else None,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, ConfigurationError) as error:
            raise VersionError(f"{what} is damaged: field missing or invalid ({error})") from error


class JobBook:
    """All job records, in memory and below ``.cairn/jobs``."""

    def __init__(self, tier: LocalTier, workers: Workers) -> None:
        self._tier = tier
        self._workers = workers
        self._records: dict[str, JobRecord] = {}

    def load(self) -> list[str]:
        """Read all records; returns the keys of damaged or unreadable ones, left in place for the operator.

        Raises :class:`OverloadedError` when descriptors or memory ran out.
        """
        damaged = []
        if not self._tier.exists(layout.JOB_RECORDS):
            return []
        for entry in self._tier.list_folder(layout.JOB_RECORDS):
            if not entry.name.endswith(".json"):
                continue
            name = entry.name.removesuffix(".json")
            try:
                key = layout.job_record(name)
                record = JobRecord.decode(self._tier.read_small(key), key)
                if record.job != name:
                    raise VersionError(f"{key} is the record of {record.job}")
            except OverloadedError:
                raise
            except CairnError:
                damaged.append(f"{layout.JOB_RECORDS}/{entry.name}")
                continue
            self._records[record.job] = record
        return damaged

    def get(self, job: str) -> JobRecord | None:
        """The record, or None for a job that no rank of this node has joined."""
        return self._records.get(job)

    def all(self) -> list[JobRecord]:
        """All records, by name."""
        return [self._records[job] for job in sorted(self._records)]

    def check_owner(self, job: str, uid: int, privileged: bool) -> None:
        """Raise :class:`ConfigurationError` when *uid* may not touch *job*."""
        record = self._records.get(job)
        if record is not None and record.uid != uid and not privileged:
            raise ConfigurationError(
                f"job {job!r} belongs to user {record.uid}, not to user {uid}",
                hint="choose another job name, or run as that user",
                context={"job": job},
            )

    async def put(self, record: JobRecord) -> JobRecord:
        """Store *record* durably, then use it."""
        if self._records.get(record.job) != record:
            await self._workers.run(self._tier.put_small, layout.job_record(record.job), record.encode())
            self._records[record.job] = record
        return record

    async def change(self, job: str, **changes: Any) -> JobRecord:
        """Replace fields of an existing record durably."""
        return await self.put(replace(self._records[job], **changes))
