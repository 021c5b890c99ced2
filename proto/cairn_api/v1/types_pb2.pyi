from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class VersionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERSION_STATE_UNSPECIFIED: _ClassVar[VersionState]
    VERSION_STATE_OPEN: _ClassVar[VersionState]
    VERSION_STATE_SEALED: _ClassVar[VersionState]
    VERSION_STATE_COMMITTED: _ClassVar[VersionState]
    VERSION_STATE_DELETING: _ClassVar[VersionState]
    VERSION_STATE_ABORTED: _ClassVar[VersionState]
    VERSION_STATE_PREPARED: _ClassVar[VersionState]

class CopyState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COPY_STATE_UNSPECIFIED: _ClassVar[CopyState]
    COPY_STATE_ABSENT: _ClassVar[CopyState]
    COPY_STATE_COPYING: _ClassVar[CopyState]
    COPY_STATE_VERIFIED: _ClassVar[CopyState]
    COPY_STATE_FAILED: _ClassVar[CopyState]
    COPY_STATE_EVICTED: _ClassVar[CopyState]

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_MEMORY: _ClassVar[Tier]
    TIER_TIER1: _ClassVar[Tier]
    TIER_PEER: _ClassVar[Tier]
    TIER_TIER2: _ClassVar[Tier]

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_UNSPECIFIED: _ClassVar[Durability]
    DURABILITY_CAPTURED: _ClassVar[Durability]
    DURABILITY_TIER1: _ClassVar[Durability]
    DURABILITY_TIER2: _ClassVar[Durability]
VERSION_STATE_UNSPECIFIED: VersionState
VERSION_STATE_OPEN: VersionState
VERSION_STATE_SEALED: VersionState
VERSION_STATE_COMMITTED: VersionState
VERSION_STATE_DELETING: VersionState
VERSION_STATE_ABORTED: VersionState
VERSION_STATE_PREPARED: VersionState
COPY_STATE_UNSPECIFIED: CopyState
COPY_STATE_ABSENT: CopyState
COPY_STATE_COPYING: CopyState
COPY_STATE_VERIFIED: CopyState
COPY_STATE_FAILED: CopyState
COPY_STATE_EVICTED: CopyState
TIER_UNSPECIFIED: Tier
TIER_MEMORY: Tier
TIER_TIER1: Tier
TIER_PEER: Tier
TIER_TIER2: Tier
DURABILITY_UNSPECIFIED: Durability
DURABILITY_CAPTURED: Durability
DURABILITY_TIER1: Durability
DURABILITY_TIER2: Durability

class ErrorInfo(_message.Message):
    __slots__ = ("error_class", "message", "hint", "context")
    class ContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ERROR_CLASS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    error_class: str
    message: str
    hint: str
    context: _containers.ScalarMap[str, str]
    def __init__(self, error_class: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ..., context: _Optional[_Mapping[str, str]] = ...) -> None: ...

class VersionId(_message.Message):
    __slots__ = ("epoch", "sequence", "tag")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    tag: str
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., tag: _Optional[str] = ...) -> None: ...

class Partition(_message.Message):
    __slots__ = ("name", "path", "rank", "size_bytes", "crc64nvme", "globals")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CRC64NVME_FIELD_NUMBER: _ClassVar[int]
    GLOBALS_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    rank: int
    size_bytes: int
    crc64nvme: int
    globals: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., rank: _Optional[int] = ..., size_bytes: _Optional[int] = ..., crc64nvme: _Optional[int] = ..., globals: _Optional[_Iterable[str]] = ...) -> None: ...

class Copy(_message.Message):
    __slots__ = ("tier", "state", "error", "damaged")
    TIER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    state: CopyState
    error: str
    damaged: bool
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., state: _Optional[_Union[CopyState, str]] = ..., error: _Optional[str] = ..., damaged: bool = ...) -> None: ...

class Version(_message.Message):
    __slots__ = ("job", "id", "state", "save_dir", "nonce", "world_size", "ranks", "persist", "pinned", "created_s", "size_bytes", "copies", "partitions", "reason", "file_marks", "attributes", "passed_over")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    JOB_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SAVE_DIR_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    PERSIST_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    CREATED_S_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    PARTITIONS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FILE_MARKS_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    PASSED_OVER_FIELD_NUMBER: _ClassVar[int]
    job: str
    id: VersionId
    state: VersionState
    save_dir: str
    nonce: str
    world_size: int
    ranks: _containers.RepeatedScalarFieldContainer[int]
    persist: bool
    pinned: bool
    created_s: float
    size_bytes: int
    copies: _containers.RepeatedCompositeFieldContainer[Copy]
    partitions: _containers.RepeatedCompositeFieldContainer[Partition]
    reason: str
    file_marks: bool
    attributes: _containers.ScalarMap[str, str]
    passed_over: str
    def __init__(self, job: _Optional[str] = ..., id: _Optional[_Union[VersionId, _Mapping]] = ..., state: _Optional[_Union[VersionState, str]] = ..., save_dir: _Optional[str] = ..., nonce: _Optional[str] = ..., world_size: _Optional[int] = ..., ranks: _Optional[_Iterable[int]] = ..., persist: bool = ..., pinned: bool = ..., created_s: _Optional[float] = ..., size_bytes: _Optional[int] = ..., copies: _Optional[_Iterable[_Union[Copy, _Mapping]]] = ..., partitions: _Optional[_Iterable[_Union[Partition, _Mapping]]] = ..., reason: _Optional[str] = ..., file_marks: bool = ..., attributes: _Optional[_Mapping[str, str]] = ..., passed_over: _Optional[str] = ...) -> None: ...
