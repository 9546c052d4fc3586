"""Flower messages as bytes: a small payload, and the arrays apart from it, by content.

The arrays of a record form a blob: the bytes of a safetensors file
(https://huggingface.co/docs/safetensors, "Format"), so that the global model is sent and stored
once however many messages refer to it, that a blob on disk opens with any safetensors reader, and
that both ends can map it. It is read and written here, not by the safetensors package, because
that one copies: Flower's arrays are views of the blob until Flower itself asks for bytes.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedhpc.federation import compat, grid_pb2

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
    """

    digest: str
    size: int
    parts: list[BytesLike] = field(repr=False, compare=False)


def encode_arrays(arrays: ArrayRecord) -> Blob:
    """Return the blob of a record; its parts are views of Flower's own bytes, not copies."""
    header: dict[str, object] = {}
    raw_names: list[str] = []
    parts: list[BytesLike] = []
    offset = 0
    for name, array in arrays.items():
        plain = _plain_data(array)
        if plain is None:
            raw_names.append(name)
            dtype, shape, data = "U8", [len(array.data)], memoryview(array.data)
        else:
            (dtype, data), shape = plain, list(array.shape)
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


def decode_arrays(skeleton: ArrayRecord, data: memoryview) -> ArrayRecord:
    """Return the record whose names, types and shapes are in ``skeleton`` and data in a blob."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + length]))
    body = data[8 + length :]
    raw_names = json.loads(header.get(_METADATA, {}).get(_RAW, "[]"))
    descriptions = {dtype: descr for descr, dtype in _DTYPES.items()}
    arrays = {}
    for name, array in skeleton.items():
        description = header[_key(name)]
        start, end = description["data_offsets"]
        if name in raw_names:
            content = bytes(body[start:end])
        else:
            npy = _npy_header(descriptions[description["dtype"]], tuple(array.shape))
            content = b"".join((npy, body[start:end]))
        arrays[name] = Array(array.dtype, tuple(array.shape), array.stype, content)
    return ArrayRecord(arrays)


def _key(name: str) -> str:
    """Return an array's key in the header: one that is safetensors' own is escaped."""
    return f"_{name}" if name.strip("_") == "metadata" and name.startswith("__") else name


def _plain_data(array: Array) -> tuple[str, memoryview] | None:
    """Return safetensors' dtype and the bare data of an array, if it is plain numpy."""
    if array.stype != "numpy.ndarray":
        return None
    try:
        dtype = np.dtype(array.dtype)
    except TypeError:
        return None
    name = _DTYPES.get(dtype.str)
    if name is None:
        return None
    # Compared, not parsed: numpy parses it with `ast`, which fails at times if two threads do that
    # at once (https://github.com/python/cpython/issues/106905).
    header = _npy_header(dtype.str, tuple(array.shape))
    content = memoryview(array.data)
    data = content[len(header) :]
    if content[: len(header)] != header:
        return None
    return (name, data) if len(data) == dtype.itemsize * math.prod(array.shape) else None


def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return out.getvalue()


class ArrayCache:
    """Blobs of the records encoded lately, so that a cohort's common model is hashed once.

    Entries live as long as the cache: one call of ``push_messages``.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[ArrayRecord, Blob]] = {}

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
    """Decode a message and a client's state.

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
        records[entry.record] = decode_arrays(skeleton, open_blob(entry.digest))
    return message, state
