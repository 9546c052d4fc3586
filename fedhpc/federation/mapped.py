"""Flower's arrays whose data stay in a blob until somebody asks for them."""

import io
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from flwr.app import Array, ArrayRecord

from fedhpc import files
from fedhpc.federation import compat

if TYPE_CHECKING:
    import torch


class Place(NamedTuple):
    """What an array is, and where its data are in a blob.

    Attributes
    ----------
    dtype, shape, stype
        See Flower's Array.
    descr : str
        numpy's name of the type of plain data in C order; "" for Flower's bytes as they are.
    start, end : int
        Bytes of the blob.
    """

    dtype: str
    shape: tuple[int, ...]
    stype: str
    descr: str
    start: int
    end: int


class MappedArrays(MutableMapping[str, Array]):
    """What a record of Flower's holds: arrays over a blob, made anew each time one is asked for.

    So a record takes the same little memory however many arrays it has and however large they are,
    before and after it is read.

    Parameters
    ----------
    places : mapping
        The arrays by name; records with the same ones may share it.
    blob : memoryview
        All data.
    """

    def __init__(self, places: Mapping[str, Place], blob: memoryview) -> None:
        self._places = places
        self._blob = blob
        self._changed: dict[str, Array | None] | None = None  # by name, once there is a change

    def __getitem__(self, name: str) -> Array:
        if self._changed is not None:
            found = self._changed[name]
            if found is not None:
                return found
        return MappedArray(self._places[name], self._blob, lambda array: self._set(name, array))

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return types and shapes of the arrays."""
        changed = dict.fromkeys(self._places) if self._changed is None else self._changed
        described: dict[str, Array | Place] = {
            name: array or self._places[name] for name, array in changed.items()
        }
        return {name: (array.dtype, tuple(array.shape)) for name, array in described.items()}

    def __setitem__(self, name: str, array: Array) -> None:
        self._set(name, array)

    def __delitem__(self, name: str) -> None:
        del self._own()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places if self._changed is None else self._changed)

    def __len__(self) -> int:
        return len(self._places if self._changed is None else self._changed)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def copy(self) -> Self:
        """Return a mapping whose changes are its own."""
        made = type(self)(self._places, self._blob)
        made._changed = None if self._changed is None else self._changed.copy()
        return made

    def _set(self, name: str, array: Array) -> None:
        self._own()[name] = array

    def _own(self) -> dict[str, Array | None]:
        if self._changed is None:
            self._changed = dict.fromkeys(self._places)
        return self._changed


class MappedArray(Array):
    """An array whose data lie in a blob: they are read when they are asked for, and not kept.

    What a strategy or an app does with it is the same as with any other: `numpy` returns an array
    of its own each time. Flower's Array is a dataclass that keeps ``data`` as bytes; here ``data``
    is a property.

    Parameters
    ----------
    place : Place
        What it is, and where in the blob.
    blob : memoryview
        The data of this array and of others.
    on_change : callable
        Told of this array when it gets other data.
    """

    def __init__(
        self, place: Place, blob: memoryview, on_change: Callable[["MappedArray"], None]
    ) -> None:
        # Not by super().__init__(), whose checks take longer than to read a small array.
        self.__dict__.update(
            dtype=place.dtype, shape=place.shape, stype=place.stype,
            _place=place, _blob=blob, _own=None, _on_change=on_change,
        )  # fmt: skip

    @property
    def body(self) -> tuple[memoryview, str] | None:
        """The data and numpy's name of their type; None if an app has put others there."""
        if self.__dict__["_own"] is not None:
            return None
        place: Place = self.__dict__["_place"]
        blob: memoryview = self.__dict__["_blob"]
        return blob[place.start : place.end], place.descr

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return len(self.data if self.body is None else self.body[0])

    @property
    def data(self) -> bytes:
        """Flower's bytes: a copy each time."""
        if self.body is None:
            own: bytes = self.__dict__["_own"]
            return own
        body, descr = self.body
        content = b"".join((npy_header(descr, self.shape) if descr else b"", body))
        files.unload(self.__dict__["_blob"])
        return content

    @data.setter
    def data(self, data: bytes) -> None:
        self.__dict__["_own"] = data
        self.__dict__["_on_change"](self)

    def numpy(self) -> np.ndarray:
        """Return a copy of the data, as numpy."""
        body, descr = self.body or (b"", "")
        if not descr:
            return super().numpy()
        array = np.ndarray(self.shape, descr, body).copy()
        files.unload(self.__dict__["_blob"])
        return array

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        mine, others = ((a.dtype, a.shape, a.stype, a.data) for a in (self, other))
        return mine == others

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


def layout_of(arrays: ArrayRecord) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return types and shapes of a record's arrays; those over a blob are not made for it."""
    held = compat.mapping_in(arrays)
    if isinstance(held, MappedArrays):
        return held.layout()
    return {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()}


def record_of(state: Mapping[str, "torch.Tensor"]) -> ArrayRecord:
    """Return what ``ArrayRecord(state)`` is, in a third of the time: that calls numpy.save."""
    record = ArrayRecord()
    for name, tensor in state.items():
        values = tensor.detach().cpu().numpy()
        if values.flags.c_contiguous:
            data = b"".join((npy_header(values.dtype.str, values.shape), values.data))
            record[name] = Array(str(values.dtype), values.shape, "numpy.ndarray", data)
        else:
            record[name] = Array(values)
    return record


@lru_cache(maxsize=1024)
def npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """Return what stands before the data of an array in C order in Flower's bytes of it."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return out.getvalue()
