"""Python values as JSON and bytes, without pickle: what a checkpoint holds besides the model.

Numbers come back bit by bit, containers as the same type. What cannot be encoded is refused, not
guessed at.
"""

import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedhpc.federation.mapped import MappedArray
from fedhpc.federation.payload import BytesLike

_TAG = "$"
_SEQUENCES: dict[str, Callable[..., Any]] = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque,
}  # fmt: skip
_MAPPINGS: dict[str, Callable[..., Any]] = {
    "dict": dict, "ordered": OrderedDict, "counter": Counter,
    "array_record": ArrayRecord, "record_dict": RecordDict,
    "metric_record": MetricRecord, "config_record": ConfigRecord,
}  # fmt: skip


class CannotEncode(TypeError):
    """A value is of a type that is not known here."""


@dataclass(frozen=True)
class Encoded:
    """A value, encoded.

    Attributes
    ----------
    plain
        What JSON can hold; it refers to the buffers by index.
    buffers : list
        Bulk data.
    """

    plain: Any
    buffers: list[BytesLike]


def encode(value: object) -> Encoded:
    """Encode a value; later changes of it do not matter.

    Parameters
    ----------
    value
        None, a bool, number, text or bytes, a numpy array or generator, a torch tensor, a Flower
        record, or a container of such values.

    Raises
    ------
    CannotEncode
        If it is, or holds, anything else.
    """
    buffers: list[BytesLike] = []
    return Encoded(_encode(value, buffers), buffers)


def decode(encoded: Encoded) -> Any:
    """Return the value that `encode` was given."""
    return _decode(encoded.plain, encoded.buffers)


def _encode(value: Any, buffers: list[BytesLike]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_encode(item, buffers) for item in value]
    for name, kind in _SEQUENCES.items():
        if type(value) is kind:
            # The order of a set depends on its history: an encoding that does not can be compared.
            items = sorted(value, key=repr) if name in ("set", "frozenset") else value
            return {_TAG: name, "items": [_encode(item, buffers) for item in items]}
    for name, kind in _MAPPINGS.items():
        if type(value) is kind:
            items = value.items()
            if kind in (MetricRecord, ConfigRecord):
                items = [(key, _builtin(item)) for key, item in items]
            pairs = [[_encode(k, buffers), _encode(v, buffers)] for k, v in items]
            return {_TAG: name, "items": pairs}
    return _encode_bulk(value, buffers)


def _builtin(value: Any) -> Any:
    """Return a record's value as clients get it: Flower takes enums and numpy's numbers too."""
    if isinstance(value, list):
        return [_builtin(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)  # an enum's str() is its name
    kinds: tuple[type, ...] = (bool, int, float, bytes)
    return next((kind(value) for kind in kinds if isinstance(value, kind)), value)


def _encode_bulk(value: Any, buffers: list[BytesLike]) -> Any:
    def add(kind: str, data: BytesLike) -> dict[str, Any]:
        buffers.append(data)
        return {_TAG: kind, "buffer": len(buffers) - 1}

    if type(value) in (bytes, bytearray):
        return add(type(value).__name__, bytes(value))
    if type(value) in (Array, MappedArray):  # its bytes are never changed: no copy
        types = [value.dtype, value.stype]
        return {**add("flower_array", value.data), "types": types, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return _encode_array("scalar", np.asarray(value), buffers)
    if type(value) is np.ndarray and not (value.dtype.hasobject or value.dtype.fields):
        return _encode_array("array", value, buffers)
    if type(value) is random.Random:
        return {_TAG: "random", "state": _encode(value.getstate(), buffers)}
    if isinstance(value, np.random.Generator):
        return {_TAG: "generator", "state": _encode(value.bit_generator.state, buffers)}
    if isinstance(value, np.random.RandomState):
        return {_TAG: "random_state", "state": _encode(value.get_state(legacy=False), buffers)}
    if type(value).__module__ == "torch" and type(value).__name__ == "Tensor":
        try:
            array = value.detach().cpu().numpy()
        except (TypeError, RuntimeError) as error:  # numpy has no bfloat16, nothing sparse
            raise CannotEncode(f"torch.Tensor: {error}") from error
        return _encode_array("tensor", array, buffers)
    raise CannotEncode(f"{type(value).__module__}.{type(value).__qualname__}")


def _encode_array(kind: str, array: np.ndarray, buffers: list[BytesLike]) -> dict[str, Any]:
    # The order in memory is kept too: sums over it depend on it in the last bits.
    order: Literal["C", "F"] = "F" if array.flags.fnc else "C"
    buffers.append(array.tobytes(order))
    descr = np.lib.format.dtype_to_descr(array.dtype)
    index = len(buffers) - 1
    return {_TAG: kind, "buffer": index, "dtype": descr, "shape": array.shape, "order": order}


def _decode(plain: Any, buffers: list[BytesLike]) -> Any:
    if isinstance(plain, list):
        return [_decode(item, buffers) for item in plain]
    if not isinstance(plain, dict):
        return plain
    kind = plain[_TAG]
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](_decode(item, buffers) for item in plain["items"])
    if kind in _MAPPINGS:
        made = _MAPPINGS[kind]()  # empty, as a Counter would count the pairs
        for key, value in plain["items"]:
            made[_decode(key, buffers)] = _decode(value, buffers)
        return made
    if "state" in plain:
        return _decode_generator(kind, _decode(plain["state"], buffers))
    data = bytes(buffers[plain["buffer"]])
    if kind == "flower_array":
        dtype, stype = plain["types"]
        return Array(dtype, tuple(plain["shape"]), stype, data)
    if kind in ("bytes", "bytearray"):
        return data if kind == "bytes" else bytearray(data)
    return _decode_array(plain, data)


def _decode_array(plain: dict[str, Any], data: bytes) -> Any:
    kind = plain[_TAG]
    dtype = np.lib.format.descr_to_dtype(plain["dtype"])
    array = np.frombuffer(bytearray(data), dtype).reshape(plain["shape"], order=plain["order"])
    if kind == "scalar":
        return array[()]
    if kind == "tensor":
        import torch

        return torch.from_numpy(array)
    return array


def _decode_generator(kind: str, state: Any) -> Any:
    if kind == "random":
        generator = random.Random()  # noqa: S311
        generator.setstate(state)
        return generator
    if kind == "random_state":
        legacy = np.random.RandomState()
        legacy.set_state(state)
        return legacy
    bits: Any = getattr(np.random, state["bit_generator"])()
    bits.state = state
    return np.random.Generator(bits)
