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
from functools import cached_property, lru_cache
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


@dataclass(frozen=True)
class Content:
    """A message's content, encoded.

    Attributes
    ----------
    encoded : bytes
        All but the data of its arrays; see `compat.content_to_bytes`.
    arrays : dict
        The blobs of its ArrayRecords, by their names.
    """

    encoded: bytes
    arrays: dict[str, Blob]


class Encodings:
    """What was encoded lately, so that what a cohort has in common is encoded and hashed once.

    Nobody may change a record while this lives, which is for one call of ``push_messages``.
    """

    def __init__(self) -> None:
        self._blobs: dict[int, tuple[ArrayRecord, Blob]] = {}
        self._contents: dict[int, tuple[RecordDict, Content]] = {}

    def know(self, arrays: ArrayRecord, blob: Blob) -> None:
        """Note the blob that a record was made from."""
        self._blobs[id(arrays)] = (arrays, blob)

    def blob(self, arrays: ArrayRecord) -> Blob:
        """Return the blob of a record."""
        entry = self._blobs.get(id(arrays))
        if entry is None:
            entry = self._blobs[id(arrays)] = (arrays, encode_arrays(arrays))
        return entry[1]

    def content(self, records: RecordDict) -> Content:
        """Return a message's content; Flower's strategies give a cohort's messages the same one."""
        entry = self._contents.get(id(records))
        if entry is None:
            bare, blobs = self.strip(records)
            content = Content(compat.content_to_bytes(bare), blobs)
            entry = self._contents[id(records)] = (records, content)
        return entry[1]

    def forget_contents(self) -> None:
        """Forget them, but not the blobs: somebody may change what else is in a content."""
        self._contents.clear()

    def strip(self, records: RecordDict) -> tuple[RecordDict, dict[str, Blob]]:
        """Return records without the data of arrays, and the blobs of these."""
        stripped, blobs = RecordDict(), {}
        for name, record in records.items():
            if isinstance(record, ArrayRecord):
                blobs[name] = self.blob(record)
                record = compat.without_data(record)
            stripped[name] = record
        return stripped, blobs


@dataclass(frozen=True)
class Packed:
    """A message (and a client's state) ready to travel.

    Attributes
    ----------
    payload : Payload
        All but the arrays.
    blobs : list of Blob
        The arrays, each once.
    content : bytes
        The message's content as it is in the payload.
    """

    payload: grid_pb2.Payload
    blobs: list[Blob]
    content: bytes = b""

    @cached_property
    def fingerprint(self) -> str:
        """A digest of what is asked: content, arrays, state and seed; ask once all of it is known.

        Not of Flower's metadata, where the time of creation is: it is the same whenever the same is
        asked again.
        """
        payload = self.payload
        arrays = sorted((entry.of_state, entry.record, entry.digest) for entry in payload.arrays)
        content = hashlib.sha256(self.content).digest()
        question = (payload.seed, payload.client_id, arrays, payload.state, content)
        return hashlib.sha256(repr(question).encode()).hexdigest()


def pack(message: Message, state: RecordDict | None, encodings: Encodings) -> Packed:
    """Encode a message, and a client's state with it.

    Parameters
    ----------
    message : Message
        With content or an error.
    state : RecordDict or None
        The ``context.state`` of the client, if it is not empty.
    encodings : Encodings
        Of what other messages share with it.
    """
    payload = grid_pb2.Payload()
    blobs: dict[str, Blob] = {}

    def add(arrays: dict[str, Blob], *, of_state: bool) -> None:
        for name, blob in arrays.items():
            blobs[blob.digest] = blob
            payload.arrays.add(record=name, digest=blob.digest, of_state=of_state)

    encoded = b""
    if message.has_content():
        content = encodings.content(message.content)
        encoded = content.encoded
        add(content.arrays, of_state=False)
    payload.message = compat.message_to_bytes(message, encoded)
    if state:
        stripped, arrays = encodings.strip(state)
        payload.state = compat.records_to_bytes(stripped)
        add(arrays, of_state=True)
    return Packed(payload, list(blobs.values()), encoded)


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
        skeleton = records[entry.record]
        assert isinstance(skeleton, ArrayRecord)  # noqa: S101
        records[entry.record] = map_arrays(skeleton, open_blob(entry.digest))
    return message, state
