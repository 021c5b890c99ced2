from cairn_api.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobPolicy(_message.Message):
    __slots__ = ("persistent_storage_path", "num_of_version_in_retention")
    PERSISTENT_STORAGE_PATH_FIELD_NUMBER: _ClassVar[int]
    NUM_OF_VERSION_IN_RETENTION_FIELD_NUMBER: _ClassVar[int]
    persistent_storage_path: str
    num_of_version_in_retention: int
    def __init__(self, persistent_storage_path: _Optional[str] = ..., num_of_version_in_retention: _Optional[int] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("protocol", "job", "rank", "world_size", "policy", "client_version")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    job: str
    rank: int
    world_size: int
    policy: JobPolicy
    client_version: str
    def __init__(self, protocol: _Optional[int] = ..., job: _Optional[str] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., policy: _Optional[_Union[JobPolicy, _Mapping]] = ..., client_version: _Optional[str] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("node", "max_epoch", "tier2_reachable", "memory_limit_bytes", "memory_free_bytes", "lease_s", "tier1_path", "persistent_storage_path", "daemon_version", "files_protected", "tier2_error")
    NODE_FIELD_NUMBER: _ClassVar[int]
    MAX_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TIER2_REACHABLE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    TIER1_PATH_FIELD_NUMBER: _ClassVar[int]
    PERSISTENT_STORAGE_PATH_FIELD_NUMBER: _ClassVar[int]
    DAEMON_VERSION_FIELD_NUMBER: _ClassVar[int]
    FILES_PROTECTED_FIELD_NUMBER: _ClassVar[int]
    TIER2_ERROR_FIELD_NUMBER: _ClassVar[int]
    node: str
    max_epoch: int
    tier2_reachable: bool
    memory_limit_bytes: int
    memory_free_bytes: int
    lease_s: float
    tier1_path: str
    persistent_storage_path: str
    daemon_version: str
    files_protected: bool
    tier2_error: str
    def __init__(self, node: _Optional[str] = ..., max_epoch: _Optional[int] = ..., tier2_reachable: bool = ..., memory_limit_bytes: _Optional[int] = ..., memory_free_bytes: _Optional[int] = ..., lease_s: _Optional[float] = ..., tier1_path: _Optional[str] = ..., persistent_storage_path: _Optional[str] = ..., daemon_version: _Optional[str] = ..., files_protected: bool = ..., tier2_error: _Optional[str] = ...) -> None: ...

class ClaimEpochRequest(_message.Message):
    __slots__ = ("job", "epoch", "nonce", "world_size", "resumed_from", "claim", "provisional")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FROM_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    PROVISIONAL_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    nonce: str
    world_size: int
    resumed_from: _types_pb2.VersionId
    claim: bool
    provisional: bool
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., nonce: _Optional[str] = ..., world_size: _Optional[int] = ..., resumed_from: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., claim: bool = ..., provisional: bool = ...) -> None: ...

class ClaimEpochReply(_message.Message):
    __slots__ = ("taken", "max_epoch", "provisional")
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    MAX_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROVISIONAL_FIELD_NUMBER: _ClassVar[int]
    taken: bool
    max_epoch: int
    provisional: bool
    def __init__(self, taken: bool = ..., max_epoch: _Optional[int] = ..., provisional: bool = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("job", "wait_s", "buffers")
    JOB_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_FIELD_NUMBER: _ClassVar[int]
    job: str
    wait_s: float
    buffers: int
    def __init__(self, job: _Optional[str] = ..., wait_s: _Optional[float] = ..., buffers: _Optional[int] = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("available", "free_segments", "tier1", "tier2", "last_persist_age_s", "persist_lost", "failures")
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    FREE_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    TIER1_FIELD_NUMBER: _ClassVar[int]
    TIER2_FIELD_NUMBER: _ClassVar[int]
    LAST_PERSIST_AGE_S_FIELD_NUMBER: _ClassVar[int]
    PERSIST_LOST_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    available: bool
    free_segments: _containers.RepeatedScalarFieldContainer[str]
    tier1: _containers.RepeatedCompositeFieldContainer[_types_pb2.VersionId]
    tier2: _containers.RepeatedCompositeFieldContainer[_types_pb2.VersionId]
    last_persist_age_s: float
    persist_lost: bool
    failures: _containers.RepeatedCompositeFieldContainer[_types_pb2.ErrorInfo]
    def __init__(self, available: bool = ..., free_segments: _Optional[_Iterable[str]] = ..., tier1: _Optional[_Iterable[_Union[_types_pb2.VersionId, _Mapping]]] = ..., tier2: _Optional[_Iterable[_Union[_types_pb2.VersionId, _Mapping]]] = ..., last_persist_age_s: _Optional[float] = ..., persist_lost: bool = ..., failures: _Optional[_Iterable[_Union[_types_pb2.ErrorInfo, _Mapping]]] = ...) -> None: ...

class GrantRequest(_message.Message):
    __slots__ = ("job", "size_bytes")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    job: str
    size_bytes: int
    def __init__(self, job: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class GrantReply(_message.Message):
    __slots__ = ("grant",)
    GRANT_FIELD_NUMBER: _ClassVar[int]
    grant: str
    def __init__(self, grant: _Optional[str] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("segment", "grant")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    segment: str
    grant: str
    def __init__(self, segment: _Optional[str] = ..., grant: _Optional[str] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CreateRequest(_message.Message):
    __slots__ = ("job", "id", "rank", "world_size", "nonce", "save_dir", "persist", "floor", "resumed", "file_marks", "attributes", "node_ranks")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    JOB_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SAVE_DIR_FIELD_NUMBER: _ClassVar[int]
    PERSIST_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    FILE_MARKS_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    NODE_RANKS_FIELD_NUMBER: _ClassVar[int]
    job: str
    id: _types_pb2.VersionId
    rank: int
    world_size: int
    nonce: str
    save_dir: str
    persist: bool
    floor: _types_pb2.VersionId
    resumed: bool
    file_marks: bool
    attributes: _containers.ScalarMap[str, str]
    node_ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, job: _Optional[str] = ..., id: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., nonce: _Optional[str] = ..., save_dir: _Optional[str] = ..., persist: bool = ..., floor: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., resumed: bool = ..., file_marks: bool = ..., attributes: _Optional[_Mapping[str, str]] = ..., node_ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class CreateReply(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: _types_pb2.VersionState
    def __init__(self, state: _Optional[_Union[_types_pb2.VersionState, str]] = ...) -> None: ...

class KeepAliveRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class KeepAliveReply(_message.Message):
    __slots__ = ("failures", "settled", "token", "lease_s")
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    failures: _containers.RepeatedCompositeFieldContainer[_types_pb2.ErrorInfo]
    settled: _containers.RepeatedCompositeFieldContainer[_types_pb2.VersionId]
    token: str
    lease_s: float
    def __init__(self, failures: _Optional[_Iterable[_Union[_types_pb2.ErrorInfo, _Mapping]]] = ..., settled: _Optional[_Iterable[_Union[_types_pb2.VersionId, _Mapping]]] = ..., token: _Optional[str] = ..., lease_s: _Optional[float] = ...) -> None: ...

class RecordTable(_message.Message):
    __slots__ = ("offsets", "lengths", "descriptor_crc_offsets", "directory_crc_offsets")
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_CRC_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_CRC_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    offsets: bytes
    lengths: bytes
    descriptor_crc_offsets: bytes
    directory_crc_offsets: bytes
    def __init__(self, offsets: _Optional[bytes] = ..., lengths: _Optional[bytes] = ..., descriptor_crc_offsets: _Optional[bytes] = ..., directory_crc_offsets: _Optional[bytes] = ...) -> None: ...

class SealRequest(_message.Message):
    __slots__ = ("job", "id", "rank", "name", "segment", "size_bytes", "records", "globals", "digests")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    GLOBALS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    job: str
    id: _types_pb2.VersionId
    rank: int
    name: str
    segment: str
    size_bytes: int
    records: RecordTable
    globals: _containers.RepeatedScalarFieldContainer[str]
    digests: bytes
    def __init__(self, job: _Optional[str] = ..., id: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., rank: _Optional[int] = ..., name: _Optional[str] = ..., segment: _Optional[str] = ..., size_bytes: _Optional[int] = ..., records: _Optional[_Union[RecordTable, _Mapping]] = ..., globals: _Optional[_Iterable[str]] = ..., digests: _Optional[bytes] = ...) -> None: ...

class SealReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PutHeader(_message.Message):
    __slots__ = ("job", "id", "rank", "name", "size_bytes", "records", "globals")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    GLOBALS_FIELD_NUMBER: _ClassVar[int]
    job: str
    id: _types_pb2.VersionId
    rank: int
    name: str
    size_bytes: int
    records: RecordTable
    globals: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job: _Optional[str] = ..., id: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., rank: _Optional[int] = ..., name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., records: _Optional[_Union[RecordTable, _Mapping]] = ..., globals: _Optional[_Iterable[str]] = ...) -> None: ...

class PutRequest(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: PutHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[PutHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutReply(_message.Message):
    __slots__ = ("crc64nvme",)
    CRC64NVME_FIELD_NUMBER: _ClassVar[int]
    crc64nvme: int
    def __init__(self, crc64nvme: _Optional[int] = ...) -> None: ...

class PrepareRequest(_message.Message):
    __slots__ = ("job", "id", "rank", "names")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    job: str
    id: _types_pb2.VersionId
    rank: int
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job: _Optional[str] = ..., id: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., rank: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class PrepareReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SharedName(_message.Message):
    __slots__ = ("name", "rank")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    name: str
    rank: int
    def __init__(self, name: _Optional[str] = ..., rank: _Optional[int] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("job", "id", "rank", "shared_names")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SHARED_NAMES_FIELD_NUMBER: _ClassVar[int]
    job: str
    id: _types_pb2.VersionId
    rank: int
    shared_names: _containers.RepeatedCompositeFieldContainer[SharedName]
    def __init__(self, job: _Optional[str] = ..., id: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., rank: _Optional[int] = ..., shared_names: _Optional[_Iterable[_Union[SharedName, _Mapping]]] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: _types_pb2.VersionState
    def __init__(self, state: _Optional[_Union[_types_pb2.VersionState, str]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("job", "id", "rank", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    id: _types_pb2.VersionId
    rank: int
    reason: str
    def __init__(self, job: _Optional[str] = ..., id: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., rank: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WaitRequest(_message.Message):
    __slots__ = ("job", "id", "durability", "timeout_s")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    job: str
    id: _types_pb2.VersionId
    durability: _types_pb2.Durability
    timeout_s: float
    def __init__(self, job: _Optional[str] = ..., id: _Optional[_Union[_types_pb2.VersionId, _Mapping]] = ..., durability: _Optional[_Union[_types_pb2.Durability, str]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class WaitReply(_message.Message):
    __slots__ = ("reached", "state")
    REACHED_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    reached: bool
    state: _types_pb2.VersionState
    def __init__(self, reached: bool = ..., state: _Optional[_Union[_types_pb2.VersionState, str]] = ...) -> None: ...
