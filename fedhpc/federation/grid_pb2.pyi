from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BatchToArrayTask(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[ToArrayTask]
    def __init__(self, events: _Optional[_Iterable[_Union[ToArrayTask, _Mapping]]] = ...) -> None: ...

class BatchFromArrayTask(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[FromArrayTask]
    def __init__(self, events: _Optional[_Iterable[_Union[FromArrayTask, _Mapping]]] = ...) -> None: ...

class ToArrayTask(_message.Message):
    __slots__ = ("welcome", "chunk", "work", "accepted", "cancel", "release", "heartbeat", "finish", "keep")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    chunk: Chunk
    work: Work
    accepted: Accepted
    cancel: Cancel
    release: Release
    heartbeat: Heartbeat
    finish: Finish
    keep: Keep
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., work: _Optional[_Union[Work, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ..., keep: _Optional[_Union[Keep, _Mapping]] = ...) -> None: ...

class FromArrayTask(_message.Message):
    __slots__ = ("hello", "chunk", "result", "heartbeat", "slots", "hand_back", "goodbye")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    HAND_BACK_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    chunk: Chunk
    result: Result
    heartbeat: Heartbeat
    slots: Slots
    hand_back: HandBack
    goodbye: Goodbye
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., slots: _Optional[_Union[Slots, _Mapping]] = ..., hand_back: _Optional[_Union[HandBack, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("run_id", "array_task", "slots", "host", "job_id", "pid", "held", "version", "gpus", "lock_folder")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ARRAY_TASK_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    LOCK_FOLDER_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    array_task: int
    slots: int
    host: str
    job_id: str
    pid: int
    held: _containers.RepeatedCompositeFieldContainer[Held]
    version: str
    gpus: _containers.RepeatedScalarFieldContainer[str]
    lock_folder: str
    def __init__(self, run_id: _Optional[str] = ..., array_task: _Optional[int] = ..., slots: _Optional[int] = ..., host: _Optional[str] = ..., job_id: _Optional[str] = ..., pid: _Optional[int] = ..., held: _Optional[_Iterable[_Union[Held, _Mapping]]] = ..., version: _Optional[str] = ..., gpus: _Optional[_Iterable[str]] = ..., lock_folder: _Optional[str] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ("message_id", "fingerprint")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    fingerprint: str
    def __init__(self, message_id: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("attempt",)
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    def __init__(self, attempt: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("waiting",)
    WAITING_FIELD_NUMBER: _ClassVar[int]
    waiting: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, waiting: _Optional[_Iterable[str]] = ...) -> None: ...

class Slots(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: int
    def __init__(self, slots: _Optional[int] = ...) -> None: ...

class HandBack(_message.Message):
    __slots__ = ("message_id", "reason")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    reason: str
    def __init__(self, message_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("digest", "size", "in_file")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    IN_FILE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size: int
    in_file: bool
    def __init__(self, digest: _Optional[str] = ..., size: _Optional[int] = ..., in_file: bool = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("digest", "size", "offset", "data")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size: int
    offset: int
    data: bytes
    def __init__(self, digest: _Optional[str] = ..., size: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("digests",)
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, digests: _Optional[_Iterable[str]] = ...) -> None: ...

class Work(_message.Message):
    __slots__ = ("message_id", "payload", "blobs", "fingerprint")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    payload: bytes
    blobs: _containers.RepeatedCompositeFieldContainer[Blob]
    fingerprint: str
    def __init__(self, message_id: _Optional[str] = ..., payload: _Optional[bytes] = ..., blobs: _Optional[_Iterable[_Union[Blob, _Mapping]]] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("message_id",)
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    def __init__(self, message_id: _Optional[str] = ...) -> None: ...

class Keep(_message.Message):
    __slots__ = ("message_id",)
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    def __init__(self, message_id: _Optional[str] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("message_id", "payload", "blobs", "failure", "fit")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    payload: bytes
    blobs: _containers.RepeatedCompositeFieldContainer[Blob]
    failure: Failure
    fit: Fit
    def __init__(self, message_id: _Optional[str] = ..., payload: _Optional[bytes] = ..., blobs: _Optional[_Iterable[_Union[Blob, _Mapping]]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., fit: _Optional[_Union[Fit, _Mapping]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("message_id",)
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    def __init__(self, message_id: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("reason", "traceback", "raised", "final")
    REASON_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    RAISED_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    reason: str
    traceback: str
    raised: bool
    final: bool
    def __init__(self, reason: _Optional[str] = ..., traceback: _Optional[str] = ..., raised: bool = ..., final: bool = ...) -> None: ...

class Fit(_message.Message):
    __slots__ = ("slot", "wait_s", "start_s", "run_s", "return_s", "peak_rss_mb", "late_imports", "gpu", "gpu_before_mb", "gpu_peak_mb", "out_of_memory", "replaced")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    RUN_S_FIELD_NUMBER: _ClassVar[int]
    RETURN_S_FIELD_NUMBER: _ClassVar[int]
    PEAK_RSS_MB_FIELD_NUMBER: _ClassVar[int]
    LATE_IMPORTS_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    GPU_BEFORE_MB_FIELD_NUMBER: _ClassVar[int]
    GPU_PEAK_MB_FIELD_NUMBER: _ClassVar[int]
    OUT_OF_MEMORY_FIELD_NUMBER: _ClassVar[int]
    REPLACED_FIELD_NUMBER: _ClassVar[int]
    slot: int
    wait_s: float
    start_s: float
    run_s: float
    return_s: float
    peak_rss_mb: float
    late_imports: _containers.RepeatedScalarFieldContainer[str]
    gpu: str
    gpu_before_mb: float
    gpu_peak_mb: float
    out_of_memory: bool
    replaced: str
    def __init__(self, slot: _Optional[int] = ..., wait_s: _Optional[float] = ..., start_s: _Optional[float] = ..., run_s: _Optional[float] = ..., return_s: _Optional[float] = ..., peak_rss_mb: _Optional[float] = ..., late_imports: _Optional[_Iterable[str]] = ..., gpu: _Optional[str] = ..., gpu_before_mb: _Optional[float] = ..., gpu_peak_mb: _Optional[float] = ..., out_of_memory: bool = ..., replaced: _Optional[str] = ...) -> None: ...

class Payload(_message.Message):
    __slots__ = ("message", "state", "arrays", "client_id", "seed", "inline_bytes")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    INLINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    message: bytes
    state: bytes
    arrays: _containers.RepeatedCompositeFieldContainer[Arrays]
    client_id: int
    seed: int
    inline_bytes: int
    def __init__(self, message: _Optional[bytes] = ..., state: _Optional[bytes] = ..., arrays: _Optional[_Iterable[_Union[Arrays, _Mapping]]] = ..., client_id: _Optional[int] = ..., seed: _Optional[int] = ..., inline_bytes: _Optional[int] = ...) -> None: ...

class Arrays(_message.Message):
    __slots__ = ("record", "digest", "of_state")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OF_STATE_FIELD_NUMBER: _ClassVar[int]
    record: str
    digest: str
    of_state: bool
    def __init__(self, record: _Optional[str] = ..., digest: _Optional[str] = ..., of_state: bool = ...) -> None: ...
