"""The clients' states: a client's ``context.state`` lives here between its fits."""

from collections.abc import Collection
from dataclasses import dataclass

from flwr.app import ArrayRecord, RecordDict

from fedhpc.federation import compat
from fedhpc.federation.payload import decode_arrays, encode_arrays
from fedhpc.files import map_whole, remove, write_atomic
from fedhpc.paths import RunPaths


@dataclass(frozen=True)
class _OnDisk:
    skeleton: RecordDict  # arrays without data
    array_records: dict[str, int]  # sizes of their files in bytes


class ClientStates:
    """States by client; what exceeds a total is kept on disk.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    memory_bytes : float
        Arrays of states beyond this total are written to the run folder's blobs/.
    """

    def __init__(self, paths: RunPaths, memory_bytes: float) -> None:
        self._paths = paths
        self._memory_bytes = memory_bytes
        self._in_memory: dict[int, tuple[RecordDict, int]] = {}
        self._on_disk: dict[int, _OnDisk] = {}
        self._used_bytes = 0

    def get(self, client_id: int) -> RecordDict | None:
        """Return a client's state; None if it has none."""
        if client_id in self._in_memory:
            return self._in_memory[client_id][0]
        if client_id in self._on_disk:
            return self._read(client_id, self._on_disk[client_id])
        return None

    def put(self, client_id: int, state: RecordDict) -> None:
        """Replace a client's state.

        Raises
        ------
        PlatformError
            If the disk refuses it; the old state is kept.
        """
        size = sum(
            len(array.data) for record in state.array_records.values() for array in record.values()
        )
        old_bytes = self._in_memory[client_id][1] if client_id in self._in_memory else 0
        if self._used_bytes - old_bytes + size <= self._memory_bytes:
            self.drop(client_id)
            self._in_memory[client_id] = (state, size)
            self._used_bytes += size
        else:
            stored = self._write(client_id, state)
            self.drop(client_id, keep=stored.array_records)
            self._on_disk[client_id] = stored

    def drop(self, client_id: int, *, keep: Collection[str] = ()) -> None:
        """Forget a client's state, but for the files of some of its records."""
        if entry := self._in_memory.pop(client_id, None):
            self._used_bytes -= entry[1]
        if stored := self._on_disk.pop(client_id, None):
            for name in set(stored.array_records) - set(keep):
                remove(self._paths.state_blob(client_id, name))

    def _write(self, client_id: int, state: RecordDict) -> _OnDisk:
        skeleton, sizes = RecordDict(), {}
        for name, record in state.items():
            if isinstance(record, ArrayRecord):
                blob = encode_arrays(record)
                write_atomic(self._paths.state_blob(client_id, name), blob.parts)
                sizes[name] = blob.size
                skeleton[name] = compat.without_data(record)
            else:
                skeleton[name] = record
        return _OnDisk(skeleton, sizes)

    def _read(self, client_id: int, stored: _OnDisk) -> RecordDict:
        state = RecordDict(dict(stored.skeleton))
        for name, size in stored.array_records.items():
            data = map_whole(self._paths.state_blob(client_id, name), size)
            state[name] = decode_arrays(stored.skeleton.array_records[name], data)
        return state
