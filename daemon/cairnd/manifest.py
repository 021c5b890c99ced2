"""The node manifest and the bucket's small records, as canonical JSON that carries its own checksum.

Canonical means: keys sorted, no spaces, ASCII. Two daemons that state the same facts therefore write the same bytes,
which is what lets any of them publish a decision. ``crc64nvme`` at the top level covers the document without it, so a
torn or altered manifest is recognised before anything in it is believed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from awscrt import checksums

from cairn_api.errors import CairnError, VersionError
from cairn_api.names import VersionId, check_job, check_node, check_partition, parse_version
from cairnd.digests import BLOCK_BYTES, Digest
from cairnd.model import Partition, Version, VersionState

MANIFEST_FORMAT = "cairn.manifest/1"
DECISION_FORMAT = "cairn.decision/1"
EPOCH_FORMAT = "cairn.epoch/1"
NOTE_FORMAT = "cairn.note/1"

MAX_WORLD_SIZE = 1_000_000
_CHECKSUM = re.compile(r"[0-9a-f]{16}")
_MOST_BYTES = 2**63 - 1
_MOST_ID = 2**32 - 1
_FARTHEST_S = 1e11

MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
"""Manifests above this are refused: 20 hex digits per 16 MiB block allow about 40 TB per node."""


def encode(document: Mapping[str, Any]) -> bytes:
    """Canonical bytes of *document* with its checksum added."""
    body = _canonical(document)
    return _canonical({**document, "crc64nvme": f"{checksums.crc64nvme(body):016x}"})


def decode(data: bytes, expected_format: str, what: str) -> dict[str, Any]:
    """The document in *data*; raises :class:`VersionError` if it is torn, altered or of another format."""
    try:
        document = json.loads(data)
        del document["crc64nvme"]
        sound = encode(document) == data  # not the checksum alone: only the bytes that Cairn writes are believed
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(what, f"not a Cairn document ({type(error).__name__})") from error
    if not sound:
        raise _damaged(what, "its checksum does not match")
    if document.get("format") != expected_format:
        raise VersionError(
            f"{what} has format {document.get('format')!r}, this Cairn reads {expected_format!r}",
            hint="use the version of Cairn that wrote it, or a newer one",
        )
    return dict(document)


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _damaged(what: str, why: str) -> VersionError:
    return VersionError(f"{what} is damaged: {why}", hint="run `cairn verify` to see which copies are intact")


@dataclass(frozen=True, slots=True)
class NodeManifest:
    """What one node holds of one version. Publishing it is the node's commit."""

    job: str
    id: VersionId
    node: str
    nonce: str
    world_size: int
    ranks: tuple[int, ...]
    partitions: tuple[Partition, ...]
    save_dir: str
    persist: bool
    file_marks: bool
    created_s: float
    uid: int
    gid: int
    attributes: Mapping[str, str]

    def encode(self) -> bytes:
        """Canonical JSON; every partition must have its digest."""
        return encode(
            {
                "format": MANIFEST_FORMAT,
                "job": self.job,
                "version": str(self.id),
                "node": self.node,
                "nonce": self.nonce,
                "world_size": self.world_size,
                "ranks": sorted(self.ranks),
                "save_dir": self.save_dir,
                "persist": self.persist,
                "file_marks": self.file_marks,
                "created_s": round(self.created_s, 3),
                "uid": self.uid,
                "gid": self.gid,
                "attributes": dict(self.attributes),
                "block_bytes": BLOCK_BYTES,
                "partitions": [_encode_partition(item) for item in self.partitions],
            }
        )

    def fingerprint(self) -> str:
        """CRC-64/NVME of the encoded manifest, as 16 hex digits: what a decision key says of it."""
        return f"{checksums.crc64nvme(self.encode()):016x}"

    @classmethod
    def of(cls, version: Version, node: str, partitions: tuple[Partition, ...]) -> NodeManifest:
        """The manifest of *version* on *node* with digested *partitions*."""
        return cls(
            version.job, version.id, node, version.nonce, version.world_size, tuple(sorted(version.ranks)), partitions,
            version.save_dir, version.persist, version.file_marks, version.created_s, version.uid, version.gid,
            version.attributes,
        )  # fmt: skip

    @classmethod
    def decode(cls, data: bytes, what: str = "manifest") -> NodeManifest:
        """Parse and validate; raises :class:`VersionError` for anything but a whole, sound manifest."""
        document = decode(data, MANIFEST_FORMAT, what)
        try:
            manifest = cls(
                job=check_job(document["job"]),
                id=parse_version(document["version"]),
                node=check_node(document["node"]),
                nonce=text(document["nonce"]),
                world_size=number(document["world_size"], 1, MAX_WORLD_SIZE),
                ranks=tuple(number(rank, 0, MAX_WORLD_SIZE) for rank in document["ranks"]),
                partitions=tuple(_decode_partition(item) for item in document["partitions"]),
                save_dir=text(document["save_dir"]),
                persist=bool(document["persist"]),
                file_marks=bool(document["file_marks"]),
                created_s=float(document["created_s"]),
                uid=number(document["uid"], 0, _MOST_ID),
                gid=number(document["gid"], 0, _MOST_ID),
                attributes={text(key): text(value) for key, value in document["attributes"].items()},
            )
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, CairnError) as error:
            raise _damaged(what, f"field missing or invalid ({error})") from error
        ranks = (*manifest.ranks, *(item.rank for item in manifest.partitions))
        if not all(0 <= rank < manifest.world_size for rank in ranks):
            raise _damaged(what, "it names ranks outside its world")
        if sum(item.size_bytes for item in manifest.partitions) > _MOST_BYTES or abs(manifest.created_s) > _FARTHEST_S:
            raise _damaged(what, "a size or a time in it cannot be")
        return manifest

    def version(self, state: VersionState) -> Version:
        """A catalog entry made from this manifest."""
        return Version(
            job=self.job, id=self.id, state=state, world_size=self.world_size, nonce=self.nonce,
            save_dir=self.save_dir, persist=self.persist, file_marks=self.file_marks, created_s=self.created_s,
            uid=self.uid, gid=self.gid, ranks=frozenset(self.ranks), partitions=self.partitions,
            attributes=self.attributes,
        )  # fmt: skip


def number(value: object, least: int, most: int) -> int:
    """*value*, from a document, if it is a whole number within bounds; else raises :class:`ValueError`.

    JSON's numbers have no bounds, but every field that they go to has: of the wire, of the system, of memory.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"not a whole number from {least} to {most}")
    return value


def text(value: object) -> str:
    """*value*, from a document, if it is text that has a UTF-8 form (JSON's need not); else raises ValueError."""
    if not isinstance(value, str):
        raise ValueError("not a text")
    value.encode()
    return value


def _encode_partition(partition: Partition) -> dict[str, Any]:
    assert partition.digest is not None, "a manifest states digests"
    return {
        "name": partition.name,
        "path": partition.path,
        "rank": partition.rank,
        "size_bytes": partition.size_bytes,
        "crc64nvme": f"{partition.digest.crc64nvme:016x}",
        "blocks": [f"{block:016x}" for block in partition.digest.blocks],
        "globals": list(partition.globals),
    }


def _decode_partition(item: Mapping[str, Any]) -> Partition:
    size_bytes = number(item["size_bytes"], 0, _MOST_BYTES)
    blocks = tuple(_checksum(block) for block in item["blocks"])
    if len(blocks) != -(-size_bytes // BLOCK_BYTES):
        raise ValueError("sizes and block digests disagree")
    return Partition(
        name=check_partition(item["name"]),
        path=check_partition(item["path"]),
        rank=number(item["rank"], 0, MAX_WORLD_SIZE),
        size_bytes=size_bytes,
        digest=Digest(size_bytes, _checksum(item["crc64nvme"]), blocks),
        globals=tuple(text(name) for name in item["globals"]),
    )


def _checksum(digits: object) -> int:
    if not isinstance(digits, str) or not _CHECKSUM.fullmatch(digits):
        raise ValueError("a checksum is 16 hexadecimal digits")
    return int(digits, 16)
