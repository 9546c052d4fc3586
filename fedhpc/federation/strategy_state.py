"""What a strategy has become in the course of a run: the part of it that a checkpoint must hold.

It is found by comparison, so that it works for every strategy: what an attribute holds at the
beginning comes from the app, and comes again when the app runs again; what has changed since is
state.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from fedhpc.federation import plain
from fedhpc.federation.plain import CannotEncode, Encoded

# What does not change: it comes with the code.
_PROGRAM = (
    type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, partial, logging.Logger,
    type(threading.Lock()), type(threading.RLock()), PurePath,
)  # fmt: skip
_CONTAINERS = (dict, list, tuple, set, frozenset, str, bytes, int, float, complex, np.ndarray)
_STATE_DICT = "state_dict()"
_MAX_DEPTH = 8


class StrategyState:
    """Tells what has changed in a strategy, and puts it back into a new one.

    Objects that the strategy holds (another strategy inside, an accountant) are looked into too.
    One that has ``state_dict`` and ``load_state_dict`` speaks for itself.

    Parameters
    ----------
    strategy : object
        As the app made it.

    Attributes
    ----------
    unknown : set of str
        Attributes whose type cannot be kept, so that nobody knows whether they have changed.
    lazy : set of str
        Objects that have state and were not there at the beginning: a new strategy has nothing to
        put it into.
    """

    def __init__(self, strategy: object) -> None:
        self._strategy = strategy
        self.unknown: set[str] = set()
        self.lazy: set[str] = set()
        self._members: dict[str, Enum] = {}
        self._at_start = {path: _Form(encoded) for path, encoded in self._values()}
        self._holders = {path.rpartition(".")[0] for path in self._at_start}

    def changed(self) -> dict[str, Encoded]:
        """Return the values that are not those of the beginning, by path ("strategy.m_t")."""
        found = {
            path: encoded
            for path, encoded in self._values()
            if path not in self._at_start or self._at_start[path].differs(encoded)
        }
        self.lazy = {path.rpartition(".")[0] for path in found} - self._holders - {""}
        return found

    def restore(self, changed: dict[str, Encoded]) -> None:
        """Put changed values into the strategy.

        Raises
        ------
        AttributeError
            If the strategy is of another kind.
        """
        for path, encoded in changed.items():
            *way, name = path.split(".")
            holder: Any = self._strategy
            for step in way:
                holder = getattr(holder, step)
            if name == _STATE_DICT:
                holder.load_state_dict(plain.decode(encoded))
            else:
                setattr(holder, name, plain.decode(encoded))

    def _values(self) -> Iterator[tuple[str, Encoded]]:
        yield from self._look_into(self._strategy, "", (), 0)

    def _look_into(
        self, holder: object, prefix: str, above: tuple[int, ...], depth: int
    ) -> Iterator[tuple[str, Encoded]]:
        above = (*above, id(holder))
        for name, value in vars(holder).items():
            path = f"{prefix}{name}"
            try:
                yield path, plain.encode(value)
            except CannotEncode:
                if isinstance(value, _PROGRAM) or id(value) in above:
                    continue
                if isinstance(value, Enum):
                    if self._members.setdefault(path, value) is not value:
                        self._note_unknown(path, value)
                elif hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
                    try:
                        yield f"{path}.{_STATE_DICT}", plain.encode(value.state_dict())
                    except Exception:  # whatever an object of the app's raises
                        self._note_unknown(path, value)
                elif _is_open(value) and depth < _MAX_DEPTH:
                    yield from self._look_into(value, f"{path}.", above, depth + 1)
                else:
                    self._note_unknown(path, value)

    def _note_unknown(self, path: str, value: object) -> None:
        self.unknown.add(f"{path} ({type(value).__name__})")


def _is_open(value: object) -> bool:
    """Return whether all that an object holds is in its attributes."""
    closed = isinstance(value, _CONTAINERS) or type(value).__module__.startswith("torch")
    return hasattr(value, "__dict__") and not closed


class _Form:
    """How a value looked at the beginning."""

    def __init__(self, encoded: Encoded) -> None:
        self._text = json.dumps(encoded.plain)
        self._digest = _digest(encoded)

    def differs(self, encoded: Encoded) -> bool:
        """Return whether a value looks different; bulk data is read only where the rest agrees."""
        return json.dumps(encoded.plain) != self._text or _digest(encoded) != self._digest


def _digest(encoded: Encoded) -> bytes:
    digest = hashlib.sha256()
    for buffer in encoded.buffers:
        digest.update(len(buffer).to_bytes(8))
        digest.update(buffer)
    return digest.digest()
