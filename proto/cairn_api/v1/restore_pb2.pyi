from cairn_api.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ResolveRequest(_message.Message):
    __slots__ = ("job", "source", "tag", "local_only")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    LOCAL_ONLY_FIELD_NUMBER: _ClassVar[int]
    job: str
    source: str
    tag: str
    local_only: bool
    def __init__(self, job: _Optional[str] = ..., source: _Optional[str] = ..., tag: _Optional[str] = ..., local_only: bool = ...) -> None: ...

class ResolveReply(_message.Message):
    __slots__ = ("versions", "tier2_error", "resumed_from", "claimed_epoch", "unhealthy")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    TIER2_ERROR_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FROM_FIELD_NUMBER: _ClassVar[int]
    CLAIMED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    UNHEALTHY_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[_types_pb2.Version]
    tier2_error: str
    resumed_from: _types_pb2.VersionId
    claimed_epoch: int
    unhealthy: _containers.RepeatedCompositeFieldContainer[_types_pb2.VersionId]
    def __init__(self, versions: _Optional[_Iterable[_Union[_types_pb2.Version, _Mapping]]] = ..., tier2_error: _Optional[str] = ..., resumed_from: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., claimed_epoch: _Optional[int] = ..., unhealthy: _Optional[_Iterable[_Union[_types_pb2.VersionId, _Mapping]]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("job", "id", "paths", "source")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    job: str
    id: _types_pb2.VersionId
    paths: _containers.RepeatedScalarFieldContainer[str]
    source: str
    def __init__(self, job: _Optional[str] = ..., id: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., paths: _Optional[_Iterable[str]] = ..., source: _Optional[str] = ...) -> None: ...

class FetchedPartition(_message.Message):
    __slots__ = ("path", "tier", "size_bytes")
    PATH_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    path: str
    tier: _types_pb2.Tier
    size_bytes: int
    def __init__(self, path: _Optional[str] = ..., tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class FetchProgress(_message.Message):
    __slots__ = ("done_bytes", "total_bytes", "ready", "lease", "from_tier", "digested_bytes", "digest_s")
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    FROM_TIER_FIELD_NUMBER: _ClassVar[int]
    DIGESTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_S_FIELD_NUMBER: _ClassVar[int]
    done_bytes: int
    total_bytes: int
    ready: _containers.RepeatedCompositeFieldContainer[FetchedPartition]
    lease: str
    from_tier: _types_pb2.Tier
    digested_bytes: int
    digest_s: float
    def __init__(self, done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., ready: _Optional[_Iterable[_Union[FetchedPartition, _Mapping]]] = ..., lease: _Optional[str] = ..., from_tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., digested_bytes: _Optional[int] = ..., digest_s: _Optional[float] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("lease", "path")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    lease: str
    path: str
    def __init__(self, lease: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class ReadReply(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class EndFetchRequest(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: str
    def __init__(self, lease: _Optional[str] = ...) -> None: ...

class EndFetchReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NoteResumeRequest(_message.Message):
    __slots__ = ("job", "id", "attempt", "ended")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    job: str
    id: _types_pb2.VersionId
    attempt: str
    ended: bool
    def __init__(self, job: _Optional[str] = ..., id: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., attempt: _Optional[str] = ..., ended: bool = ...) -> None: ...

class NoteResumeReply(_message.Message):
    __slots__ = ("died_in_a_row",)
    DIED_IN_A_ROW_FIELD_NUMBER: _ClassVar[int]
    died_in_a_row: int
    def __init__(self, died_in_a_row: _Optional[int] = ...) -> None: ...
