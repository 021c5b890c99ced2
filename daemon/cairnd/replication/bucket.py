"""The bucket's protocol: claims, node manifests, decision keys, requests, pins.

Needs nothing but put-if-absent of small objects. A version exists in the bucket when its *decision key* says
``committed``; listings of data decide nothing. A decision key only moves absent -> committed -> deleted, or absent ->
aborted, and is never removed: if it were, a slow writer could create it again and resurrect what was deleted.

All methods block and are called from worker threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cairn_api.errors import CairnError, ConfigurationError, UnavailableError, VersionError
from cairn_api.names import MAX_EPOCH, VersionId, check_job, parse_version
from cairnd.layout import Bucket as Keys
from cairnd.manifest import (
    DECISION_FORMAT,
    EPOCH_FORMAT,
    MAX_DOCUMENT_BYTES,
    MAX_WORLD_SIZE,
    NOTE_FORMAT,
    NodeManifest,
    decode,
    encode,
    number,
    text,
)
from cairnd.tiers.errors import NotFoundError, is_damage
from cairnd.tiers.object_store import ObjectInfo, ObjectStore

_SMALL_BYTES = 1024 * 1024


class Verdict(StrEnum):
    COMMITTED = "committed"
    DELETED = "deleted"
    ABORTED = "aborted"
    DAMAGED = "damaged"
    """Not written by anyone: the key exists and cannot be believed. It must not look undecided, nor hide the others."""


_UNDECIDABLE = "if the version is to be kept, move that object aside, and a daemon that has it decides anew"
_UNCLAIMED = "move that object aside: its launch claims the epoch again, or is over"


@dataclass(frozen=True, slots=True)
class Decision:
    """What a decision key says. ``swept``: the data of a deleted version is gone."""

    verdict: Verdict
    document: Mapping[str, Any]

    @property
    def swept(self) -> bool:
        return bool(self.document.get("swept", False))


_SWEPT = {verdict: Decision(verdict, {"swept": True}) for verdict in Verdict}


@dataclass(frozen=True, slots=True)
class EpochClaim:
    """A launch's claim of an epoch. ``problem``: why it cannot be believed; its name still tells the epoch."""

    epoch: int
    nonce: str
    world_size: int
    resumed_from: VersionId | None
    problem: str = ""


class BucketRepository:
    """One bucket (or folder) as Cairn uses it."""

    def __init__(self, store: ObjectStore, node: str) -> None:
        self.store = store
        self.node = node
        self._read_before: dict[str, tuple[ObjectInfo, Decision]] = {}
        self._swept: dict[str, dict[str, Verdict]] = {}
        """By job and version's name: such keys are for ever and never change, so of each there is no more than this."""
        self._claims: dict[str, EpochClaim] = {}

    def sweep_uploads(self, older_than_s: float) -> int:
        """Remove what uploads left that were begun longer ago than this and never finished; returns how many."""
        return self.store.abort_stale_uploads("", older_than_s)

    # Jobs and versions

    def jobs(self) -> list[str]:
        """Jobs that have anything here; foreign folders are passed over."""
        return [name for name in self.store.list_folders("") if _is_valid(check_job, name)]

    def decisions(self, job: str, *, swept: Callable[[VersionId], bool] = lambda _: True) -> dict[VersionId, Decision]:
        """All decisions of *job*; one that cannot be believed is ``DAMAGED``, with the ``problem`` in its document.

        Of those that are swept, which a job gathers all its life, only the ones that *swept* asks for.
        """
        prefix, before = Keys.decisions(job), self._swept.setdefault(job, {})
        found = {}
        for info in self.store.list(prefix):
            name = info.key.removeprefix(prefix).removesuffix(".json")
            if not _is_valid(parse_version, name):
                continue
            version, decision = parse_version(name), None
            if name not in before:
                decision = self._read_decision(job, version, info)
                if decision is not None and decision.swept:
                    before[name] = decision.verdict
                    self._read_before.pop(info.key, None)
            if name in before:
                decision = _SWEPT[before[name]] if swept(version) else None
            if decision is not None:
                found[version] = decision
        return found

    def _read_decision(self, job: str, version: VersionId, info: ObjectInfo) -> Decision | None:
        listed, decision = self._read_before.get(info.key, (None, None))
        if listed != info or decision is None:
            decision = self._believed(job, version)
        # What was damaged is not kept: a disk may read next time what it could not read now.
        if decision is not None and decision.verdict is not Verdict.DAMAGED:
            self._read_before[info.key] = (info, decision)
        return decision

    def _believed(self, job: str, version: VersionId) -> Decision | None:
        try:
            return self.decision(job, version)
        except CairnError as error:
            if not is_damage(error):
                raise
            return Decision(Verdict.DAMAGED, {"problem": f"{error.message}; {_UNDECIDABLE}"})

    def decision(self, job: str, version: VersionId) -> Decision | None:
        """The decision about one version, or None while it is undecided."""
        key = Keys.decision(job, version)
        data = self._get(key)
        if data is None:
            return None
        document = decode(data, DECISION_FORMAT, key)
        with _read_as_stated(key):
            verdict = Verdict(document["verdict"])
            if verdict is Verdict.DAMAGED:
                raise ValueError("nobody decides that")
            if verdict is Verdict.COMMITTED and not (document["manifests"] and document["nonce"]):
                raise ValueError("it commits nothing")
            # A write that went astray must not pass for a decision: "deleted" would take the data with it.
            if (document["version"], document.get("job", job)) != (str(version), job):
                raise ValueError(f"it is about {document.get('job', job)!r}/{document['version']!r}")
        return Decision(verdict, document)

    def committed(self, job: str, version: VersionId, decision: Decision) -> list[NodeManifest]:
        """The node manifests that a ``committed`` decision covers; raises :class:`VersionError` if they differ."""
        manifests = self.manifests(job, version)
        if {manifest.node: manifest.fingerprint() for manifest in manifests} != decision.document["manifests"]:
            raise VersionError(
                f"the node manifests of {job}/{version} in the bucket are not those that were committed",
                hint="run `cairn verify`; restore the folder from a backup, or choose another version",
            )
        return manifests

    def manifests(self, job: str, version: VersionId) -> list[NodeManifest]:
        """The node manifests of one version, decided or not."""
        found = []
        for info in self.store.list(Keys.nodes(job, version)):
            if info.key.endswith(".json"):
                manifest = NodeManifest.decode(self.store.get(info.key, MAX_DOCUMENT_BYTES), info.key)
                if (manifest.job, manifest.id) != (job, version):
                    raise VersionError(
                        f"{info.key} describes {manifest.job}/{manifest.id}", hint="restore it from a backup"
                    )
                found.append(manifest)
        return found

    def has_manifest(self, manifest: NodeManifest) -> bool:
        """Whether this very part is published, and therefore its data too."""
        return self._get(Keys.node(manifest.job, manifest.id, manifest.node), MAX_DOCUMENT_BYTES) == manifest.encode()

    def put_manifest(self, manifest: NodeManifest) -> None:
        """Publish this node's part, after its data. Repeating it writes the same bytes."""
        self.store.put(Keys.node(manifest.job, manifest.id, manifest.node), manifest.encode())

    # Decisions

    def commit(self, job: str, version: VersionId, world_size: int) -> Decision | None:
        """Decide "committed" if the node manifests cover every rank; None while some are missing.

        Whoever sees completeness may try; all write the same bytes. If the key exists already, what it says counts:
        it may be our own write whose reply was lost, another node's equal one, or an ``aborted`` that fences us off.
        """
        manifests = self.manifests(job, version)
        if not _covers(manifests, world_size):
            return None
        document = {
            "format": DECISION_FORMAT,
            "verdict": Verdict.COMMITTED.value,
            "job": job,
            "version": str(version),
            "world_size": world_size,
            "nonce": manifests[0].nonce,
            "manifests": {manifest.node: manifest.fingerprint() for manifest in manifests},
        }
        return self._decide(job, version, document)

    def abort(self, job: str, version: VersionId, reason: str) -> Decision:
        """Decide "aborted" unless it is decided already; returns what counts."""
        document = {
            "format": DECISION_FORMAT, "verdict": Verdict.ABORTED.value, "job": job, "version": str(version),
            "reason": reason,
        }  # fmt: skip
        return self._decide(job, version, document)

    def _decide(self, job: str, version: VersionId, document: dict[str, Any]) -> Decision:
        key = Keys.decision(job, version)
        if self.store.put_if_absent(key, encode(document)):
            return Decision(Verdict(document["verdict"]), document)
        decision = self.decision(job, version)
        if decision is None:
            raise UnavailableError(f"{key} exists and cannot be read", hint="check the bucket's consistency")
        return decision

    def mark_deleted(self, job: str, version: VersionId, deleted_at_s: float) -> None:
        """Tombstone a committed version: from here no reader offers it. Idempotent.

        Raises :class:`ConfigurationError` when it is pinned: another daemon of the job may have done so a moment ago.
        """
        decision = self.decision(job, version)
        if decision is None or decision.verdict is not Verdict.COMMITTED:
            return
        if version in self.pins(job):
            raise ConfigurationError(f"{job}/{version} is pinned in the bucket", hint="unpin it: `cairn unpin`")
        document = {**decision.document, "verdict": Verdict.DELETED.value, "deleted_at_s": round(deleted_at_s, 3)}
        self.store.put(Keys.decision(job, version), encode(document))

    def delete_data(self, job: str, version: VersionId) -> None:
        """Delete the data of a version whose key says deleted or aborted, then note that it is gone. Idempotent."""
        decision = self.decision(job, version)
        if decision is None or decision.verdict is Verdict.COMMITTED:
            raise VersionError(f"{job}/{version} is not tombstoned; its data is not deleted")
        for info in list(self.store.list(Keys.version(job, version))):
            self.store.delete(info.key)
        self.store.delete(Keys.request(job, version))
        self.store.put(Keys.decision(job, version), encode({**decision.document, "swept": True}))

    def undecided(self, job: str, *, before_epoch: int) -> list[VersionId]:
        """Versions of earlier launches that have data here and no decision."""
        decided = self.decisions(job)
        names = [name for name in self.store.list_folders(f"{check_job(job)}/") if _is_valid(parse_version, name)]
        versions = [parse_version(name) for name in names]
        return [version for version in versions if version.epoch < before_epoch and version not in decided]

    def prepared_everywhere(self, job: str, version: VersionId) -> bool:
        """Whether node manifests cover every rank, so that any daemon may still finish the version."""
        manifests = self.manifests(job, version)
        return bool(manifests) and _covers(manifests, manifests[0].world_size)

    # Epochs

    def epochs(self, job: str) -> list[EpochClaim]:
        """All claims, newest first; one that cannot be believed says so, and does not hide the others."""
        prefix = Keys.epochs(job)
        claims = []
        for info in self.store.list(prefix):
            name = info.key.removeprefix(prefix).removeprefix("e").removesuffix(".json")
            if not (name.isdecimal() and info.key == Keys.epoch(job, int(name))):
                continue
            claim = self._claims.get(info.key)  # a claim is never changed
            if claim is None:
                try:
                    claim = self._claims[info.key] = self._claim(info.key)
                except CairnError as error:
                    if not is_damage(error):
                        raise
                    claim = EpochClaim(int(name), "", 0, None, f"{error.message}; {_UNCLAIMED}")
            claims.append(claim)
        return sorted(claims, key=lambda claim: claim.epoch, reverse=True)

    def claim_epoch(self, job: str, claim: EpochClaim) -> bool:
        """Claim an epoch for a launch; False if another launch has it. Repeating one's own claim returns True."""
        document = {
            "format": EPOCH_FORMAT, "job": job, "epoch": claim.epoch, "nonce": claim.nonce,
            "world_size": claim.world_size, "resumed_from": str(claim.resumed_from or ""),
        }  # fmt: skip
        key = Keys.epoch(job, claim.epoch)
        return self.store.put_if_absent(key, encode(document)) or self._claim(key).nonce == claim.nonce

    def epoch_nonce(self, job: str, epoch: int) -> str | None:
        """Who holds an epoch. Reading rank 0's nonce back proves that the "shared" bucket is shared."""
        try:
            return self._claim(Keys.epoch(job, epoch)).nonce
        except NotFoundError:
            return None

    def _claim(self, key: str) -> EpochClaim:
        document = decode(self.store.get(key, _SMALL_BYTES), EPOCH_FORMAT, key)
        with _read_as_stated(key):
            if key != Keys.epoch(document["job"], document["epoch"]):
                raise ValueError(f"it is the claim of epoch {document['epoch']!r} of {document['job']!r}")
            resumed_from = document["resumed_from"]
            return EpochClaim(
                number(document["epoch"], 1, MAX_EPOCH), text(document["nonce"]),
                number(document["world_size"], 1, MAX_WORLD_SIZE),
                parse_version(resumed_from) if resumed_from else None,
            )  # fmt: skip

    # Notes that all daemons of a job see

    def request_persist(self, job: str, version: VersionId) -> None:
        """Ask all daemons of the job to persist a version."""
        self.store.put(Keys.request(job, version), encode({"format": NOTE_FORMAT, "version": str(version)}))

    def requests(self, job: str) -> set[VersionId]:
        """Versions that someone asked to be persisted."""
        return self._named(Keys.requests(job))

    def pin(self, job: str, version: VersionId, reason: str) -> None:
        """Exempt a version from retention in every tier."""
        self.store.put(Keys.pin(job, version), encode({"format": NOTE_FORMAT, "reason": reason, "node": self.node}))

    def unpin(self, job: str, version: VersionId) -> None:
        """End the exemption."""
        self.store.delete(Keys.pin(job, version))

    def pins(self, job: str) -> set[VersionId]:
        """Pinned versions."""
        return self._named(Keys.pins(job))

    def _named(self, prefix: str) -> set[VersionId]:
        names: Iterable[str] = (info.key.removeprefix(prefix).removesuffix(".json") for info in self.store.list(prefix))
        return {parse_version(name) for name in names if _is_valid(parse_version, name)}

    def _get(self, key: str, max_bytes: int = _SMALL_BYTES) -> bytes | None:
        try:
            return self.store.get(key, max_bytes)
        except NotFoundError:
            return None


@contextmanager
def _read_as_stated(key: str) -> Iterator[None]:
    """What is whole but does not say what it must becomes the error of a damaged record."""
    try:
        yield
    except (KeyError, TypeError, ValueError, ConfigurationError) as error:
        raise VersionError(
            f"{key} is damaged: field missing or invalid ({error})", hint="restore it from a backup"
        ) from error


def _covers(manifests: Iterable[NodeManifest], world_size: int) -> bool:
    covered = {rank for manifest in manifests for rank in manifest.ranks}
    return len(covered) == world_size and all(rank < world_size for rank in covered)


def _is_valid(check: Any, name: str) -> bool:
    try:
        check(name)
    except CairnError:
        return False
    return True
