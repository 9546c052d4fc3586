"""What an array task holds of its link: arrays that came over it, fits, and their results."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from fedhpc import files
from fedhpc.errors import PlatformError
from fedhpc.federation import grid_pb2
from fedhpc.federation.link import chunks
from fedhpc.isolation import Reply, Slot, channel
from fedhpc.paths import RunPaths


class InputsGone(PlatformError):
    """The arrays of a fit are not to be had here; its client is not to blame."""


@dataclass(frozen=True)
class Result:
    """A fit's result, with the memory of its blobs."""

    message: grid_pb2.Result
    blobs: list[int] = field(default_factory=list)

    def events(self) -> Iterator[grid_pb2.FromArrayTask]:
        """Return what to send; it stays valid when the result is forgotten meanwhile."""
        digests = [blob.digest for blob in self.message.blobs if not blob.in_file]
        views = [channel.map_file(fd) for fd in self.blobs]
        return self._events(list(zip(digests, views, strict=True)))

    def _events(self, blobs: list[tuple[str, memoryview]]) -> Iterator[grid_pb2.FromArrayTask]:
        for digest, view in blobs:
            for chunk in chunks(digest, [view]):
                yield grid_pb2.FromArrayTask(chunk=chunk)
        yield grid_pb2.FromArrayTask(result=self.message)

    def missing_files(self, paths: RunPaths) -> list[str]:
        """Return the names of its blobs' files that are gone: a server took them, and died."""
        blobs = [
            paths.result_blob(self.message.message_id, blob.digest)
            for blob in self.message.blobs
            if blob.in_file
        ]
        return [path.name for path in blobs if not path.exists()]

    def close(self) -> None:
        """Give the memory of the blobs back."""
        channel.close_all(self.blobs)


@dataclass(eq=False)
class Held:
    """A fit that an array task runs, or has run.

    Attributes
    ----------
    work : Work
        What is asked.
    tag : str
        Of this fit and no other one of the same message.
    inputs : dict
        Descriptors of the blobs that came over the link, by digest, until the fit takes them.
    wanted : bool
        Whether the server that is connected wants the result: one that came back may not, or not
        yet.
    result : Result or None
        None while it waits or runs.
    """

    work: grid_pb2.Work
    tag: str
    inputs: dict[str, int]
    wanted: bool = True
    result: Result | None = None

    def open_inputs(self, paths: RunPaths) -> list[int]:
        """Return descriptors of the request and its blobs, for the caller to close.

        Raises
        ------
        InputsGone
            If a blob is not there.
        """
        fds = [channel.write_memory([self.work.SerializeToString()])]
        try:
            for blob in self.work.blobs:
                if blob.in_file:
                    fds.append(files.open_whole(paths.blob(blob.digest), blob.size))
                else:
                    fds.append(self.inputs.pop(blob.digest))
        except (KeyError, PlatformError, OSError) as error:
            channel.close_all(fds)
            raise InputsGone(f"the arrays of {self.work.message_id} are gone: {error}") from error
        return fds


class LinkBlobs:
    """The blobs that came over a link, in memory that every child can map."""

    def __init__(self) -> None:
        self._whole: dict[str, int] = {}
        self._incoming: dict[str, int] = {}

    def take(self, chunk: grid_pb2.Chunk) -> None:
        """Take a part of a blob."""
        fd = self._incoming.get(chunk.digest)
        if fd is None:
            fd = self._incoming[chunk.digest] = os.memfd_create(
                "fedhpc", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
            )
        channel.append_memory(fd, chunk.data)
        if chunk.offset + len(chunk.data) == chunk.size:
            channel.seal_memory(fd)
            self._whole[chunk.digest] = self._incoming.pop(chunk.digest)

    def open(self, work: grid_pb2.Work) -> dict[str, int]:
        """Return new descriptors of a fit's blobs by digest, but for those that are not there."""
        here = [blob.digest for blob in work.blobs if blob.digest in self._whole]
        return {digest: os.dup(self._whole[digest]) for digest in here}

    def release(self, digests: list[str]) -> None:
        """Forget blobs."""
        channel.close_all(self._whole.pop(digest, -1) for digest in digests)

    def clear(self) -> None:
        """Forget every blob."""
        channel.close_all([*self._whole.values(), *self._incoming.values()])
        self._whole.clear()
        self._incoming.clear()


def mb(bytes_: int | None) -> float | None:
    """Return megabytes, where bytes are known."""
    return None if bytes_ is None else round(bytes_ / 1e6, 1)


def fit_of(reply: Reply, slot: Slot) -> grid_pb2.Fit:
    """Return how a fit went."""
    return grid_pb2.Fit(
        slot=slot.index,
        wait_s=reply.wait_s,
        start_s=reply.start_s,
        run_s=reply.run_s,
        return_s=reply.return_s,
        peak_rss_mb=reply.peak_rss_mb,
        late_imports=reply.late_imports,
        gpu=slot.gpus[0].id if slot.gpus else "",
        gpu_before_mb=mb(reply.gpu_before_bytes),
        gpu_peak_mb=mb(reply.gpu_peak_bytes),
        out_of_memory=reply.out_of_memory,
        replaced=reply.replaced,
    )


def failure(
    work: grid_pb2.Work,
    slot: Slot,
    reason: str,
    text: str = "",
    *,
    raised: bool = False,
    final: bool = False,
) -> Result:
    """Return the result of a fit that went wrong."""
    failure = grid_pb2.Failure(reason=reason, traceback=text, raised=raised, final=final)
    fit = grid_pb2.Fit(slot=slot.index)
    return Result(grid_pb2.Result(message_id=work.message_id, failure=failure, fit=fit))
