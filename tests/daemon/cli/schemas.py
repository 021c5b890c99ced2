"""The JSON of the `cairn` command as users may rely on it. A change here is a change of a stable interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
CRC: Schema = {"type": "string", "pattern": "^[0-9a-f]{16}$"}


def obj(**properties: Schema) -> Schema:
    """An object with exactly these properties."""
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


NULL: Schema = {"type": "null"}
NAME: Mapping[str, Schema] = {"job": TEXT, "tag": TEXT, "epoch": COUNT, "sequence": COUNT, "version": TEXT}
TIER: Schema = {"enum": ["memory", "tier1", "peer", "tier2"]}
COPY = obj(state={"enum": ["absent", "copying", "verified", "failed", "evicted"]}, error=TEXT, damaged=FLAG)
VERSION: Mapping[str, Schema] = {
    **NAME,
    "state": {"enum": ["open", "sealed", "prepared", "committed", "deleting", "aborted"]},
    "size_bytes": COUNT,
    "created_s": NUMBER,
    "world_size": COUNT,
    "ranks": array(COUNT),
    "persist": FLAG,
    "pinned": FLAG,
    "passed_over": TEXT,
    "save_dir": TEXT,
    "copies": {"type": "object", "propertyNames": TIER, "additionalProperties": COPY},
}
PARTITION = obj(name=TEXT, path=TEXT, rank=COUNT, size_bytes=COUNT, crc64nvme=either(CRC, NULL), globals=array(TEXT))

LIST = obj(versions=array(obj(**VERSION)), warnings=array(TEXT))
SHOW = obj(
    version=obj(
        **VERSION,
        nonce=TEXT,
        reason=TEXT,
        file_marks=FLAG,
        attributes={"type": "object", "additionalProperties": TEXT},
        partitions=array(PARTITION),
        unusual_globals=array(TEXT),
    )
)
VERIFY = obj(
    job=TEXT,
    deep=FLAG,
    versions_checked=COUNT,
    copies_checked=COUNT,
    read_bytes=COUNT,
    findings=array(obj(**NAME, tier=TIER, path=TEXT, problem=TEXT, next_step={**TEXT, "minLength": 1})),
)
PIN = obj(**NAME, pinned=FLAG, changed=FLAG)
MARK = obj(**NAME, passed_over=TEXT, changed=FLAG, sound_versions=COUNT)
PRUNE = obj(job=TEXT, dry_run=FLAG, deletions=array(obj(**NAME, tier=TIER, size_bytes=COUNT, reason=TEXT)))
PERSIST = obj(**NAME, already=FLAG, hindrance=TEXT)
EXPORT = obj(
    **NAME,
    directory=TEXT,
    moved_aside=either(TEXT, NULL),
    size_bytes=COUNT,
    files=array(
        obj(
            path=TEXT,
            size_bytes=COUNT,
            crc64nvme=CRC,
            sha256=either({"type": "string", "pattern": "^[0-9a-f]{64}$"}, NULL),
        )
    ),
)
STATUS = obj(
    daemon_version=TEXT, node=TEXT, uptime_s=NUMBER, tier1_path=TEXT, tier1_used_bytes=COUNT, tier1_free_bytes=COUNT,
    persistent_storage_path=TEXT, tier2_reachable=FLAG, tier2_error=TEXT, conditional_put=FLAG,
    memory_limit_bytes=COUNT, memory_granted_bytes=COUNT, clients=COUNT, open_versions=COUNT, backlog_versions=COUNT,
    backlog_bytes=COUNT, oldest_unpersisted_age_s=NUMBER, last_persisted=TEXT, verify_failures=COUNT,
    skipped_saves=COUNT, failed_saves=COUNT, lost_claims=COUNT, draining=FLAG, protocol=COUNT, problems=array(TEXT),
)  # fmt: skip
KIND: Schema = {"enum": ["retry", "wait", "fix_configuration", "choose_another_version", "give_up"]}
DOCTOR = obj(
    healthy=FLAG,
    problems=COUNT,
    warnings=COUNT,
    settings_from=TEXT,
    runtime_dir=TEXT,
    tier1_path=TEXT,
    persistent_storage_path=TEXT,
    daemon=either(obj(pid=COUNT, uid=COUNT, version=either(TEXT, NULL)), NULL),
    exit_status={"enum": [0, 10, 11, 12, 13, 14]},
    findings=array(
        obj(
            check=TEXT,
            level={"enum": ["ok", "warning", "problem"]},
            message=TEXT,
            fix=TEXT,
            kind=either(KIND, NULL),
        )
    ),
)
DRAIN = obj(done=FLAG, versions_left=COUNT, bytes_left=COUNT, abandoned=array(TEXT), without_tier2=array(TEXT))
EVENT = obj(
    number=COUNT,
    time_s=NUMBER,
    event=TEXT,
    job=TEXT,
    version=TEXT,
    fields={"type": "object", "additionalProperties": TEXT},
)
ERROR = obj(
    error=obj(
        **{"class": TEXT},
        kind=KIND,
        message=TEXT,
        hint=TEXT,
        context={"type": "object", "additionalProperties": TEXT},
        exit_status={"enum": [10, 11, 12, 13, 14]},
    )
)
