"""The blobs that the server's open messages refer to, in memory or as files."""

import os
import threading
from collections.abc import Mapping, Sequence
from functools import partial

from fedhpc.federation import grid_pb2
from fedhpc.federation.payload import Blob, BytesLike
from fedhpc.files import persist, remove, write_atomic
from fedhpc.paths import RunPaths


class BlobStore:
    """Blobs by digest, kept while a message refers to them and until the next ones come.

    They are kept that long because the model that was evaluated last is the one trained next.

    Parameters
    ----------
    paths : RunPaths
        Of the run; blobs of more than ``inline_bytes`` bytes lie there as files.
    """

    def __init__(self, paths: RunPaths, inline_bytes: int) -> None:
        self._paths = paths
        self._inline_bytes = inline_bytes
        self._lock = threading.Lock()
        self._blobs: dict[str, Blob] = {}
        self._users: dict[str, set[str]] = {}
        self._digests_of: dict[str, list[str]] = {}

    def add(self, blobs_of: Mapping[str, Sequence[Blob]]) -> list[str]:
        """Add the blobs of messages; return the digests of blobs that nobody refers to any more."""
        new = {blob.digest: blob for blobs in blobs_of.values() for blob in blobs}
        for digest in new.keys() & self._blobs.keys():  # it stays where it is
            del new[digest]
        for blob in new.values():
            if self._is_file(blob):
                self._write(blob)
        with self._lock:
            self._blobs.update(new)
            for message_id, blobs in blobs_of.items():
                self._digests_of[message_id] = [blob.digest for blob in blobs]
                for blob in blobs:
                    self._users.setdefault(blob.digest, set()).add(message_id)
            stale = [digest for digest, users in self._users.items() if not users]
            for digest in stale:
                del self._users[digest]
            gone = {digest: self._blobs.pop(digest) for digest in stale}
        for digest, blob in gone.items():  # without the lock: the links must not wait for a disk
            if self._is_file(blob):
                remove(self._paths.blob(digest))
        return stale

    def drop(self, message_id: str) -> None:
        """Note that a message needs its blobs no more."""
        with self._lock:
            for digest in self._digests_of.pop(message_id, ()):
                self._users[digest].discard(message_id)

    def remove_all(self) -> None:
        """Remove every file, those of results that came late or twice too."""
        for path in list(self._paths.blobs.iterdir()):
            remove(path)

    def parts(self, digest: str) -> list[BytesLike]:
        """Return the bytes of a blob."""
        with self._lock:
            return self._blobs[digest].parts

    def describe(self, blob: Blob) -> grid_pb2.Blob:
        """Return what an array task needs to find the blob."""
        with self._lock:
            in_file = self._is_file(self._blobs[blob.digest])
        return grid_pb2.Blob(digest=blob.digest, size=blob.size, in_file=in_file)

    def _write(self, blob: Blob) -> None:
        path = self._paths.blob(blob.digest)
        if blob.path is not None and blob.path.exists():  # else it has been moved, and removed
            persist(partial(os.replace, blob.path, path), f"move {blob.path}")
        else:
            write_atomic(path, blob.parts)

    def _is_file(self, blob: Blob) -> bool:
        return blob.size > self._inline_bytes or blob.path is not None
