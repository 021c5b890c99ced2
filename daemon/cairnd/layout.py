"""The tree of tier 1 and of the bucket, drawn once. No other module joins a key.

Tier 1 (below ``tier1_path``; keys are relative to it)::

    .cairn/
      layout.json                      {"layout": 1, "node": "<32 hex>"}: version of this drawing, durable node id
      lock                             flock held by the one daemon that owns the tree
      jobs/<job>.json                  what the job's policy was: storage location, retention, owner
      pins/<job>/<version>.json        exemptions from retention
      requests/<job>/<version>.json    "persist this", asked for after the save
      health/<job>/<version>.json      what is known against it: damage, resumes that died, loss
      quarantine/<n>/<key>             damaged copies, kept for the operator
      fetched/<source>/<job>/<version> read from another bucket (``load_path``); swept at start
    jobs/
      <job>/
        <version>/
          <partition>                  plain torch.save files; ``by-rank/<rank>/<name>`` if two ranks share a name
          .cairn/
            incoming/<n>               partitions being written or downloaded
            incoming/sealed            all ranks agreed: it was captured, and is lost if it is swept
            manifest.json              the node's manifest: its presence is what makes the version exist here

Bucket (below ``persistent_storage_path``)::

    .cairn/probe-<node>-<n>            written and removed by the capability probe
    <job>/
      .cairn/
        epochs/<epoch>.json            claim of a launch, put if absent
        decisions/<version>.json       absent -> committed -> deleted, or absent -> aborted; never removed
        requests/<version>.json        "persist this", for all daemons of the job
        pins/<version>.json
      <version>/
        <partition>                    the same plain files
        .cairn/nodes/<node>.json       each node's manifest, put after its data

Copying one ``<version>`` folder with any tool yields a plain checkpoint folder plus the reserved name ``.cairn``.
"""

from __future__ import annotations

from hashlib import sha256

from cairn_api.names import RESERVED_NAME, VersionId, check_job, check_node, check_partition, parse_version

LAYOUT_VERSION = 1

LAYOUT_KEY = f"{RESERVED_NAME}/layout.json"
LOCK_KEY = f"{RESERVED_NAME}/lock"
JOB_RECORDS = f"{RESERVED_NAME}/jobs"
PINS = f"{RESERVED_NAME}/pins"
REQUESTS = f"{RESERVED_NAME}/requests"
HEALTH = f"{RESERVED_NAME}/health"
QUARANTINE = f"{RESERVED_NAME}/quarantine"
FETCHED = f"{RESERVED_NAME}/fetched"
VERSIONS = "jobs"


def job_record(job: str) -> str:
    return f"{JOB_RECORDS}/{check_job(job)}.json"


def pin(job: str, version: VersionId) -> str:
    return f"{PINS}/{check_job(job)}/{version}.json"


def request(job: str, version: VersionId) -> str:
    return f"{REQUESTS}/{check_job(job)}/{version}.json"


def health(job: str, version: VersionId) -> str:
    return f"{HEALTH}/{check_job(job)}/{version}.json"


def quarantined(number: str, key: str) -> str:
    return f"{QUARANTINE}/{number}/{key}"


def job_folder(job: str) -> str:
    return f"{VERSIONS}/{check_job(job)}"


def version_folder(job: str, version: VersionId) -> str:
    return f"{job_folder(job)}/{version}"


def version_of(folder: str) -> tuple[str, VersionId]:
    """The job and the version whose :func:`version_folder` is *folder*."""
    _, job, version = folder.split("/")
    return job, parse_version(version)


def partition(job: str, version: VersionId, path: str) -> str:
    return f"{version_folder(job, version)}/{check_partition(path)}"


def incoming(job: str, version: VersionId, number: int) -> str:
    return f"{version_folder(job, version)}/{RESERVED_NAME}/incoming/{number:06d}"


def incoming_folder(job: str, version: VersionId) -> str:
    return f"{version_folder(job, version)}/{RESERVED_NAME}/incoming"


def sealed(job: str, version: VersionId) -> str:
    return f"{incoming_folder(job, version)}/sealed"


def incoming_download(job: str, version: VersionId, attempt: str) -> str:
    return f"{incoming_folder(job, version)}/{attempt}"


def fetched(source: str, job: str, version: VersionId, path: str) -> str:
    origin = sha256(source.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{FETCHED}/{origin}/{check_job(job)}/{version}/{check_partition(path)}"


def incoming_fetched(attempt: str) -> str:
    return f"{FETCHED}/{RESERVED_NAME}/{attempt}"


def manifest(job: str, version: VersionId) -> str:
    return f"{version_folder(job, version)}/{RESERVED_NAME}/manifest.json"


class Bucket:
    """Keys of the bucket, relative to ``persistent_storage_path``."""

    @staticmethod
    def probe(node: str, attempt: str) -> str:
        return f"{RESERVED_NAME}/probe-{check_node(node)}-{attempt}"

    @staticmethod
    def epochs(job: str) -> str:
        return f"{check_job(job)}/{RESERVED_NAME}/epochs/"

    @staticmethod
    def epoch(job: str, epoch: int) -> str:
        return f"{Bucket.epochs(job)}e{epoch:05d}.json"

    @staticmethod
    def decisions(job: str) -> str:
        return f"{check_job(job)}/{RESERVED_NAME}/decisions/"

    @staticmethod
    def decision(job: str, version: VersionId) -> str:
        return f"{Bucket.decisions(job)}{version}.json"

    @staticmethod
    def requests(job: str) -> str:
        return f"{check_job(job)}/{RESERVED_NAME}/requests/"

    @staticmethod
    def request(job: str, version: VersionId) -> str:
        return f"{Bucket.requests(job)}{version}.json"

    @staticmethod
    def pins(job: str) -> str:
        return f"{check_job(job)}/{RESERVED_NAME}/pins/"

    @staticmethod
    def pin(job: str, version: VersionId) -> str:
        return f"{Bucket.pins(job)}{version}.json"

    @staticmethod
    def version(job: str, version: VersionId) -> str:
        return f"{check_job(job)}/{version}/"

    @staticmethod
    def partition(job: str, version: VersionId, path: str) -> str:
        return f"{Bucket.version(job, version)}{check_partition(path)}"

    @staticmethod
    def nodes(job: str, version: VersionId) -> str:
        return f"{Bucket.version(job, version)}{RESERVED_NAME}/nodes/"

    @staticmethod
    def node(job: str, version: VersionId, node: str) -> str:
        return f"{Bucket.nodes(job, version)}{check_node(node)}.json"
