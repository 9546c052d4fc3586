"""What an array task holds of its link: arrays that came over it, fits, and their results."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from fedhpc import files
from fedhpc.errors import PlatformError
from fedhpc.federation import grid_pb2
from fedhpc.federation.link import Event, pieces
from fedhpc.isolation import Reply, Slot, channel
from fedhpc.paths import RunPaths


class InputsGone(PlatformError):
    """The arrays of a fit are not to be had here; its client is not to blame."""


_SMALL = channel.MAX_INLINE // 2  # bytes of a blob


@dataclass(frozen=True)
class Result:
    """A fit's result, with the memory of its blobs."""

    message: grid_pb2.Result
    blobs: list[channel.Buffer] = field(default_factory=list)

    def events(self) -> Iterator[Event]:
        """Return what to send; it stays valid when the result is forgotten meanwhile."""
        digests = [blob.digest for blob in self.message.blobs if not blob.in_file]
        views = [channel.view(blob) for blob in self.blobs]
        return self._events(list(zip(digests, views, strict=True)))

    def _events(self, blobs: list[tuple[str, memoryview]]) -> Iterator[Event]:
        for digest, view in blobs:
            yield from pieces(digest, [view])
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
        The blobs that came over the link, by digest.
    verb : str
        What its client is asked.
    wanted : bool
        Whether the server that is connected wants the result: one that came back may not, or not
        yet.
    result : Result or None
        None while it waits or runs.
    """

    work: grid_pb2.Work
    tag: str
    inputs: dict[str, channel.Buffer]
    verb: str = ""
    wanted: bool = True
    result: Result | None = None
    _opened: list[channel.Buffer] = field(default_factory=list)

    def open_inputs(self, paths: RunPaths) -> list[channel.Buffer]:
        """Return the request and its blobs; what is a descriptor is open until `close_inputs`.

        Raises
        ------
        InputsGone
            If a blob is not there.
        """
        if self._opened:
            return self._opened
        buffers: list[channel.Buffer] = [self.work.SerializeToString()]
        room = channel.MAX_INLINE
        try:
            for blob in self.work.blobs:
                if blob.in_file:
                    buffers.append(files.open_whole(paths.blob(blob.digest), blob.size))
                else:
                    buffers.append(self.inputs.pop(blob.digest))
            for i, buffer in enumerate(buffers):
                if isinstance(buffer, int):
                    continue
                if len(buffer) <= room:
                    room -= len(buffer)
                else:
                    buffers[i] = channel.write_memory([buffer])
        except (KeyError, PlatformError, OSError) as error:
            channel.close_all(buffers)
            raise InputsGone(f"the arrays of {self.work.message_id} are gone: {error}") from error
        self._opened = buffers
        return buffers

    def close_inputs(self) -> None:
        """Give the memory of what it needs back."""
        channel.close_all([*self._opened, *self.inputs.values()])
        self._opened = []
        self.inputs.clear()


class LinkBlobs:
    """The blobs that came over a link; large ones in memory that every child can map."""

    def __init__(self) -> None:
        self._whole: dict[str, channel.Buffer] = {}
        self._incoming: dict[str, int | bytearray] = {}

    def take(self, chunk: grid_pb2.Chunk) -> None:
        """Take a part of a blob."""
        buffer = self._incoming.get(chunk.digest)
        if buffer is None:
            buffer = self._incoming[chunk.digest] = (
                bytearray()
                if chunk.size <= _SMALL
                else os.memfd_create("fedhpc", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            )
        if isinstance(buffer, int):
            channel.append_memory(buffer, chunk.data)
        else:
            buffer += chunk.data
        if chunk.offset + len(chunk.data) == chunk.size:
            if isinstance(buffer, int):
                channel.seal_memory(buffer)
            self._whole[chunk.digest] = self._incoming.pop(chunk.digest)

    def open(self, work: grid_pb2.Work) -> dict[str, channel.Buffer]:
        """Return a fit's blobs by digest, but for those that are not there; it closes them."""
        here = {blob.digest: self._whole.get(blob.digest) for blob in work.blobs}
        return {
            digest: os.dup(blob) if isinstance(blob, int) else blob
            for digest, blob in here.items()
            if blob is not None
        }

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
