from cairn_api.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListRequest(_message.Message):
    __slots__ = ("job", "partitions")
    JOB_FIELD_NUMBER: _ClassVar[int]
    PARTITIONS_FIELD_NUMBER: _ClassVar[int]
    job: str
    partitions: bool
    def __init__(self, job: _Optional[str] = ..., partitions: bool = ...) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("versions", "tier2_error")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    TIER2_ERROR_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[_types_pb2.Version]
    tier2_error: str
    def __init__(self, versions: _Optional[_Iterable[_Union[_types_pb2.Version, _Mapping]]] = ..., tier2_error: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("job", "version")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: str
    def __init__(self, job: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("job", "version", "deep")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEEP_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: str
    deep: bool
    def __init__(self, job: _Optional[str] = ..., version: _Optional[str] = ..., deep: bool = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("id", "tier", "path", "problem")
    ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    id: _types_pb2.VersionId
    tier: _types_pb2.Tier
    path: str
    problem: str
    def __init__(self, id: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., path: _Optional[str] = ..., problem: _Optional[str] = ...) -> None: ...

class VerifyProgress(_message.Message):
    __slots__ = ("done_bytes", "total_bytes", "findings", "versions_checked", "copies_checked")
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_CHECKED_FIELD_NUMBER: _ClassVar[int]
    COPIES_CHECKED_FIELD_NUMBER: _ClassVar[int]
    done_bytes: int
    total_bytes: int
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    versions_checked: int
    copies_checked: int
    def __init__(self, done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ..., versions_checked: _Optional[int] = ..., copies_checked: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("job", "version", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: str
    reason: str
    def __init__(self, job: _Optional[str] = ..., version: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ("id", "changed")
    ID_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    id: _types_pb2.VersionId
    changed: bool
    def __init__(self, id: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., changed: bool = ...) -> None: ...

class MarkRequest(_message.Message):
    __slots__ = ("job", "version", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: str
    reason: str
    def __init__(self, job: _Optional[str] = ..., version: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class MarkReply(_message.Message):
    __slots__ = ("id", "changed")
    ID_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    id: _types_pb2.VersionId
    changed: bool
    def __init__(self, id: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., changed: bool = ...) -> None: ...

class PruneRequest(_message.Message):
    __slots__ = ("job", "dry_run", "version")
    JOB_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    job: str
    dry_run: bool
    version: str
    def __init__(self, job: _Optional[str] = ..., dry_run: bool = ..., version: _Optional[str] = ...) -> None: ...

class Deletion(_message.Message):
    __slots__ = ("job", "id", "tier", "size_bytes", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    id: _types_pb2.VersionId
    tier: _types_pb2.Tier
    size_bytes: int
    reason: str
    def __init__(self, job: _Optional[str] = ..., id: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., size_bytes: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class PruneReply(_message.Message):
    __slots__ = ("deletions", "dry_run")
    DELETIONS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    deletions: _containers.RepeatedCompositeFieldContainer[Deletion]
    dry_run: bool
    def __init__(self, deletions: _Optional[_Iterable[_Union[Deletion, _Mapping]]] = ..., dry_run: bool = ...) -> None: ...

class PersistRequest(_message.Message):
    __slots__ = ("job", "version")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: str
    def __init__(self, job: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class PersistReply(_message.Message):
    __slots__ = ("id", "already")
    ID_FIELD_NUMBER: _ClassVar[int]
    ALREADY_FIELD_NUMBER: _ClassVar[int]
    id: _types_pb2.VersionId
    already: bool
    def __init__(self, id: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., already: bool = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class DrainProgress(_message.Message):
    __slots__ = ("versions_left", "bytes_left", "done", "abandoned", "without_tier2")
    VERSIONS_LEFT_FIELD_NUMBER: _ClassVar[int]
    BYTES_LEFT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    ABANDONED_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_TIER2_FIELD_NUMBER: _ClassVar[int]
    versions_left: int
    bytes_left: int
    done: bool
    abandoned: _containers.RepeatedScalarFieldContainer[str]
    without_tier2: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, versions_left: _Optional[int] = ..., bytes_left: _Optional[int] = ..., done: bool = ..., abandoned: _Optional[_Iterable[str]] = ..., without_tier2: _Optional[_Iterable[str]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("daemon_version", "node", "uptime_s", "tier1_path", "tier1_used_bytes", "tier1_free_bytes", "persistent_storage_path", "tier2_reachable", "tier2_error", "conditional_put", "memory_limit_bytes", "memory_granted_bytes", "clients", "open_versions", "backlog_versions", "backlog_bytes", "oldest_unpersisted_age_s", "last_persisted", "verify_failures", "skipped_saves", "failed_saves", "lost_claims", "draining", "protocol", "problems")
    DAEMON_VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    TIER1_PATH_FIELD_NUMBER: _ClassVar[int]
    TIER1_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIER1_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PERSISTENT_STORAGE_PATH_FIELD_NUMBER: _ClassVar[int]
    TIER2_REACHABLE_FIELD_NUMBER: _ClassVar[int]
    TIER2_ERROR_FIELD_NUMBER: _ClassVar[int]
    CONDITIONAL_PUT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_GRANTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    OPEN_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    OLDEST_UNPERSISTED_AGE_S_FIELD_NUMBER: _ClassVar[int]
    LAST_PERSISTED_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FAILURES_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_SAVES_FIELD_NUMBER: _ClassVar[int]
    FAILED_SAVES_FIELD_NUMBER: _ClassVar[int]
    LOST_CLAIMS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    daemon_version: str
    node: str
    uptime_s: float
    tier1_path: str
    tier1_used_bytes: int
    tier1_free_bytes: int
    persistent_storage_path: str
    tier2_reachable: bool
    tier2_error: str
    conditional_put: bool
    memory_limit_bytes: int
    memory_granted_bytes: int
    clients: int
    open_versions: int
    backlog_versions: int
    backlog_bytes: int
    oldest_unpersisted_age_s: float
    last_persisted: str
    verify_failures: int
    skipped_saves: int
    failed_saves: int
    lost_claims: int
    draining: bool
    protocol: int
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, daemon_version: _Optional[str] = ..., node: _Optional[str] = ..., uptime_s: _Optional[float] = ..., tier1_path: _Optional[str] = ..., tier1_used_bytes: _Optional[int] = ..., tier1_free_bytes: _Optional[int] = ..., persistent_storage_path: _Optional[str] = ..., tier2_reachable: bool = ..., tier2_error: _Optional[str] = ..., conditional_put: bool = ..., memory_limit_bytes: _Optional[int] = ..., memory_granted_bytes: _Optional[int] = ..., clients: _Optional[int] = ..., open_versions: _Optional[int] = ..., backlog_versions: _Optional[int] = ..., backlog_bytes: _Optional[int] = ..., oldest_unpersisted_age_s: _Optional[float] = ..., last_persisted: _Optional[str] = ..., verify_failures: _Optional[int] = ..., skipped_saves: _Optional[int] = ..., failed_saves: _Optional[int] = ..., lost_claims: _Optional[int] = ..., draining: bool = ..., protocol: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("job", "follow")
    JOB_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    job: str
    follow: bool
    def __init__(self, job: _Optional[str] = ..., follow: bool = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("number", "time_s", "name", "job", "version", "fields")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    number: int
    time_s: float
    name: str
    job: str
    version: str
    fields: _containers.ScalarMap[str, str]
    def __init__(self, number: _Optional[int] = ..., time_s: _Optional[float] = ..., name: _Optional[str] = ..., job: _Optional[str] = ..., version: _Optional[str] = ..., fields: _Optional[_Mapping[str, str]] = ...) -> None: ...
