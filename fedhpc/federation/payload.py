"""Flower messages as bytes: a small payload, and the arrays apart from it, by content.

The arrays of a record form a blob: the bytes of a safetensors file
(https://huggingface.co/docs/safetensors, "Format"), so that the global model is sent and stored
once however many messages refer to it, that a blob on disk opens with any safetensors reader, and
that both ends can map it. It is read and written here, not by the safetensors package, because
that one copies: Flower's arrays are views of the blob until Flower itself asks for bytes.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedhpc import files
from fedhpc.federation import compat, grid_pb2
from fedhpc.federation.mapped import MappedArray, MappedArrays, Place, npy_header

BytesLike = bytes | bytearray | memoryview

_RAW = "fedhpc.raw"  # arrays that are not plain C-ordered numpy: Flower's own bytes as they are
_METADATA = "__metadata__"  # safetensors' own key in the header
_DTYPES = {
    "<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "<i2": "I16",
    "|i1": "I8", "<u8": "U64", "<u4": "U32", "<u2": "U16", "|u1": "U8", "|b1": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Blob:
    """The bytes of a safetensors file, in parts, and their SHA-256.

    Attributes
    ----------
    digest : str
        64 hex digits.
    size : int
        Bytes in all.
    parts : list
        The bytes.
    path : Path or None
        A file of the run folder that holds them already, and may be moved.
    """

    digest: str
    size: int
    parts: list[BytesLike] = field(repr=False, compare=False)
    path: Path | None = field(default=None, compare=False)


def encode_arrays(arrays: ArrayRecord) -> Blob:
    """Return the blob of a record; its parts are views of Flower's own bytes, not copies."""
    header: dict[str, object] = {}
    raw_names: list[str] = []
    parts: list[BytesLike] = []
    offset = 0
    for name, array in arrays.items():
        dtype, data = _bare_data(array)
        shape = list(array.shape)
        if not dtype:
            raw_names.append(name)
            dtype, shape = "U8", [len(data)]
        header[_key(name)] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [offset, offset + len(data)],
        }
        parts.append(data)
        offset += len(data)
    if raw_names:
        header[_METADATA] = {_RAW: json.dumps(raw_names)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts.insert(0, len(text).to_bytes(8, "little") + text)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return Blob(digest.hexdigest(), 8 + len(text) + offset, parts)


def map_arrays(skeleton: ArrayRecord, data: memoryview) -> ArrayRecord:
    """Return the record whose names, types and shapes are in ``skeleton`` and data in a blob.

    Its arrays read the blob when they are asked for their data, and keep none of them: see
    `mapped`.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    described = tuple((name, a.dtype, tuple(a.shape), a.stype) for name, a in skeleton.items())
    places = _places(bytes(data[8:end]), described)
    files.unload(data)
    return compat.record_over(MappedArrays(places, data))


@lru_cache(maxsize=16)
def _places(
    header: bytes, described: tuple[tuple[str, str, tuple[int, ...], str], ...]
) -> dict[str, Place]:
    """Return where arrays are in a blob with this header: the same for all replies of a cohort."""
    entries = json.loads(header)
    raw_names = json.loads(entries.get(_METADATA, {}).get(_RAW, "[]"))
    descriptions = {dtype: descr for descr, dtype in _DTYPES.items()}
    places = {}
    for name, dtype, shape, stype in described:
        entry = entries[_key(name)]
        descr = "" if name in raw_names else descriptions[entry["dtype"]]
        start, end = (8 + len(header) + offset for offset in entry["data_offsets"])
        places[name] = Place(dtype, shape, stype, descr, start, end)
    return places


def decode_arrays(skeleton: ArrayRecord, data: memoryview) -> ArrayRecord:
    """Return the same as `map_arrays` with the data in memory."""
    return loaded(map_arrays(skeleton, data))


def loaded(arrays: ArrayRecord) -> ArrayRecord:
    """Return a record with the data of all its arrays in memory."""
    return ArrayRecord(dict(arrays))


def _key(name: str) -> str:
    """Return an array's key in the header: one that is safetensors' own is escaped."""
    return f"_{name}" if name.strip("_") == "metadata" and name.startswith("__") else name


def _bare_data(array: Array) -> tuple[str, memoryview]:
    """Return safetensors' dtype and the bare data of an array; "" and all bytes if not plain."""
    if isinstance(array, MappedArray) and array.body is not None:
        body, descr = array.body
        return _DTYPES.get(descr, ""), body
    data = memoryview(array.data)
    try:
        descr = np.dtype(array.dtype).str
    except TypeError:
        return "", data
    if array.stype != "numpy.ndarray" or descr not in _DTYPES:
        return "", data
    # Compared, not parsed: numpy parses it with `ast`, which fails at times if two threads do that
    # at once (https://github.com/python/cpython/issues/106905).
    header = npy_header(descr, tuple(array.shape))
    size = len(header) + np.dtype(descr).itemsize * math.prod(array.shape)
    is_plain = len(data) == size and data[: len(header)] == header
    return (_DTYPES[descr], data[len(header) :]) if is_plain else ("", data)


class ArrayCache:
    """Blobs of the records encoded lately, so that a cohort's common model is hashed once.

    Entries live as long as the cache: one call of ``push_messages``.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[ArrayRecord, Blob]] = {}

    def know(self, arrays: ArrayRecord, blob: Blob) -> None:
        """Note the blob that a record was made from."""
        self._entries[id(arrays)] = (arrays, blob)

    def encode(self, arrays: ArrayRecord) -> Blob:
        """Return the blob of a record that nobody changes during the cache's life."""
        entry = self._entries.get(id(arrays))
        if entry is None:
            entry = self._entries[id(arrays)] = (arrays, encode_arrays(arrays))
        return entry[1]


@dataclass(frozen=True)
class Packed:
    """A message (and a client's state) ready to travel.

    Attributes
    ----------
    payload : Payload
        All but the arrays.
    blobs : list of Blob
        The arrays, each once.
    content_digest : bytes
        SHA-256 of the message's content without data of arrays and metadata.
    """

    payload: grid_pb2.Payload
    blobs: list[Blob]
    content_digest: bytes = b""

    def fingerprint(self) -> str:
        """Return a digest of what is asked: content, arrays, state and seed.

        Not of Flower's metadata, where the time of creation is: it is the same whenever the same is
        asked again.
        """
        payload = self.payload
        arrays = sorted((entry.of_state, entry.record, entry.digest) for entry in payload.arrays)
        question = (payload.seed, payload.client_id, arrays, payload.state, self.content_digest)
        return hashlib.sha256(repr(question).encode()).hexdigest()


def pack(message: Message, state: RecordDict | None, cache: ArrayCache) -> Packed:
    """Encode a message, and a client's state with it.

    Parameters
    ----------
    message : Message
        With content or an error.
    state : RecordDict or None
        The ``context.state`` of the client, if it is not empty.
    cache : ArrayCache
        Blobs already made.
    """
    payload = grid_pb2.Payload()
    blobs: dict[str, Blob] = {}

    def strip(records: RecordDict, of_state: bool) -> RecordDict:
        stripped = RecordDict()
        for name, record in records.items():
            if isinstance(record, ArrayRecord):
                blob = cache.encode(record)
                blobs[blob.digest] = blob
                payload.arrays.add(record=name, digest=blob.digest, of_state=of_state)
                stripped[name] = compat.without_data(record)
            else:
                stripped[name] = record
        return stripped

    if message.has_content():
        message = compat.with_content(message, strip(message.content, of_state=False))
    payload.message = compat.message_to_bytes(message)
    if state:
        payload.state = compat.records_to_bytes(strip(state, of_state=True))
    content_digest = hashlib.sha256(compat.content_of(payload.message)).digest()
    return Packed(payload, list(blobs.values()), content_digest)


def unpack(
    payload: grid_pb2.Payload, open_blob: Callable[[str], memoryview]
) -> tuple[Message, RecordDict]:
    """Decode a message and a client's state; the data of their arrays stay in the blobs.

    Parameters
    ----------
    payload : Payload
        From `pack`.
    open_blob : callable
        Returns the bytes of the blob with this digest.
    """
    message = compat.message_from_bytes(payload.message)
    state = RecordDict()
    if payload.HasField("state"):
        state = compat.records_from_bytes(payload.state)
    for entry in payload.arrays:
        records = state if entry.of_state else message.content
        skeleton = records.array_records[entry.record]
        records[entry.record] = map_arrays(skeleton, open_blob(entry.digest))
    return message, state
