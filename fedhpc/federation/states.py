"""The clients' states: a client's ``context.state`` lives here between its fits."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, RecordDict

from fedhpc.federation import compat
from fedhpc.federation.mapped import MappedArray
from fedhpc.federation.payload import encode_arrays, loaded, map_arrays
from fedhpc.files import map_whole, remove, write_atomic
from fedhpc.paths import RunPaths


@dataclass(frozen=True)
class _OnDisk:
    skeleton: RecordDict  # arrays without data
    files: dict[str, str]  # by record


class ClientStates:
    """States by client; what exceeds a total is kept on disk.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    memory_bytes : float
        Arrays of states beyond this total are written to the run folder's states/.
    is_needed : callable, optional
        Returns whether somebody else (a checkpoint) needs the file of this name: it is removed
        later, then.
    """

    def __init__(
        self,
        paths: RunPaths,
        memory_bytes: float,
        is_needed: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._paths = paths
        self._memory_bytes = memory_bytes
        self._is_needed = is_needed
        self._in_memory: dict[int, tuple[RecordDict, int]] = {}
        self._on_disk: dict[int, _OnDisk] = {}
        self._used_bytes = 0
        self._stale: set[str] = set()

    def get(self, client_id: int) -> RecordDict | None:
        """Return a client's state; None if it has none."""
        if client_id in self._in_memory:
            return self._in_memory[client_id][0]
        if client_id in self._on_disk:
            return self._read(self._on_disk[client_id])
        return None

    def put(self, client_id: int, state: RecordDict) -> None:
        """Replace a client's state.

        Raises
        ------
        PlatformError
            If the disk refuses it; the old state is kept.
        """
        size = _size_of(state)
        old_bytes = self._in_memory[client_id][1] if client_id in self._in_memory else 0
        if self._used_bytes - old_bytes + size <= self._memory_bytes:
            self.drop(client_id)
            self._in_memory[client_id] = (_in_memory(state), size)
            self._used_bytes += size
        else:
            stored = self._write(client_id, state)
            self.drop(client_id, keep=stored.files.values())
            self._on_disk[client_id] = stored

    def drop(self, client_id: int, *, keep: Collection[str] = ()) -> None:
        """Forget a client's state, but for files of these names."""
        if entry := self._in_memory.pop(client_id, None):
            self._used_bytes -= entry[1]
        if stored := self._on_disk.pop(client_id, None):
            self._remove(set(stored.files.values()) - set(keep))
        self._stale.difference_update(keep)

    def _remove(self, names: Iterable[str]) -> None:
        for name in list(names):
            if self._is_needed(name):
                self._stale.add(name)
            else:
                remove(self._paths.states / name)
                self._stale.discard(name)

    # --- checkpoints ---

    def capture(self) -> tuple[dict[str, Any], frozenset[str]]:
        """Return all states, to be encoded, and the names of the files that they refer to.

        Files that no older checkpoint needs any more are removed.
        """
        self._remove(self._stale)
        in_memory = {client_id: state for client_id, (state, _) in self._in_memory.items()}
        on_disk = {
            client_id: [stored.skeleton, stored.files]
            for client_id, stored in self._on_disk.items()
        }
        names = frozenset(self._names())
        return {"in_memory": in_memory, "on_disk": on_disk}, names

    def restore(self, captured: dict[str, Any]) -> None:
        """Put captured states back, in place of all others; unneeded files are removed."""
        self._in_memory = {
            client_id: (state, _size_of(state))
            for client_id, state in captured["in_memory"].items()
        }
        self._used_bytes = sum(size for _, size in self._in_memory.values())
        self._on_disk = {
            client_id: _OnDisk(skeleton, files)
            for client_id, (skeleton, files) in captured["on_disk"].items()
        }
        self._remove({path.name for path in self._paths.states.iterdir()} - set(self._names()))

    def _names(self) -> Iterator[str]:
        for stored in self._on_disk.values():
            yield from stored.files.values()

    def _write(self, client_id: int, state: RecordDict) -> _OnDisk:
        skeleton = RecordDict()
        written = {}
        for name, record in state.items():
            if isinstance(record, ArrayRecord):
                blob = encode_arrays(record)
                path = self._paths.state_blob(client_id, name, blob.digest)
                write_atomic(path, blob.parts)
                written[name] = path.name
                skeleton[name] = compat.without_data(record)
            else:
                skeleton[name] = record
        return _OnDisk(skeleton, written)

    def _read(self, stored: _OnDisk) -> RecordDict:
        state = RecordDict(dict(stored.skeleton))
        for name, file_name in stored.files.items():
            data = map_whole(self._paths.states / file_name)
            state[name] = map_arrays(stored.skeleton.array_records[name], data)
        return state


def _in_memory(state: RecordDict) -> RecordDict:
    """Return a state without what keeps the blob of a reply."""
    return RecordDict(
        {
            name: loaded(record) if isinstance(record, ArrayRecord) else record
            for name, record in state.items()
        }
    )


def _size_of(state: RecordDict) -> int:
    arrays = [array for record in state.array_records.values() for array in record.values()]
    return sum(
        array.size if isinstance(array, MappedArray) else len(array.data) for array in arrays
    )
