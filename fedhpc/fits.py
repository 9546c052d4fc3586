"""The fits of an array task: run in slots, their results held until the server has them."""

import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field

from fedhpc import files
from fedhpc.errors import FedHPCError, FitFailed, ForkServerDied, PlatformError
from fedhpc.federation import grid_pb2
from fedhpc.federation.link import LinkClient, chunks
from fedhpc.isolation import ChildPool, Slot, channel
from fedhpc.paths import RunPaths

logger = logging.getLogger(__name__)

FIT = "fedhpc.federation.fit"
_TRIES = 3  # of a fit whose fork server died


@dataclass
class _Result:
    """A result that the server has not accepted yet, with the memory of its blobs."""

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


class Fits:
    """Runs fits in slots and keeps their results until the server has them.

    Parameters
    ----------
    pool : ChildPool
        Where children come from.
    slots : list of Slot
        One fit at a time in each.
    paths : RunPaths
        Of the run.
    fit_timeout_s : float
        Deadline of one fit.
    """

    def __init__(
        self, pool: ChildPool, slots: list[Slot], paths: RunPaths, fit_timeout_s: float
    ) -> None:
        self._pool = pool
        self._paths = paths
        self._fit_timeout_s = fit_timeout_s
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[float, grid_pb2.Work]] = queue.SimpleQueue()
        self._held: dict[str, _Result | None] = {}  # None while it waits or runs
        self._blobs: dict[str, int] = {}
        self._incoming: dict[str, int] = {}
        self._link: LinkClient | None = None
        for slot in slots:
            threading.Thread(
                target=self._work_in, args=(slot,), name=f"slot-{slot.index}", daemon=True
            ).start()

    def held(self) -> list[str]:
        """Return the messages that run here, or whose results the server has not accepted."""
        with self._lock:
            return sorted(self._held)

    def use(self, link: LinkClient | None) -> None:
        """Send results over this link from now on, beginning with those held."""
        with self._lock:
            self._link = link
            channel.close_all(self._blobs.values())  # a new link sends its blobs anew
            channel.close_all(self._incoming.values())
            self._blobs.clear()
            self._incoming.clear()
            results = [result for result in self._held.values() if result is not None]
            if link is not None:
                for result in results:
                    link.send(result.events())

    def handle(self, event: grid_pb2.ToArrayTask) -> None:
        """Do what the server says."""
        if event.HasField("chunk"):
            self._take_chunk(event.chunk)
        elif event.HasField("work"):
            with self._lock:
                self._held[event.work.message_id] = None
            self._waiting.put((time.monotonic(), event.work))
        elif event.HasField("accepted"):
            self._forget(event.accepted.message_id)
        elif event.HasField("cancel"):
            self._forget(event.cancel.message_id)
            self._pool.cancel(event.cancel.message_id)
        elif event.HasField("release"):
            with self._lock:
                for digest in event.release.digests:
                    channel.close_all([self._blobs.pop(digest, -1)])

    def _take_chunk(self, chunk: grid_pb2.Chunk) -> None:
        with self._lock:
            fd = self._incoming.get(chunk.digest)
            if fd is None:
                fd = self._incoming[chunk.digest] = os.memfd_create(
                    "fedhpc", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
                )
            channel.append_memory(fd, chunk.data)
            if chunk.offset + len(chunk.data) == chunk.size:
                channel.seal_memory(fd)
                self._blobs[chunk.digest] = self._incoming.pop(chunk.digest)

    def _forget(self, message_id: str) -> None:
        with self._lock:
            result = self._held.pop(message_id, None)
        if result is not None:
            channel.close_all(result.blobs)

    def _work_in(self, slot: Slot) -> None:
        while True:
            queued_s, work = self._waiting.get()
            with self._lock:
                wanted = work.message_id in self._held
            if not wanted:
                continue  # cancelled while it waited
            result = self._run(work, slot, time.monotonic() - queued_s)
            with self._lock:
                if work.message_id not in self._held:
                    channel.close_all(result.blobs)
                    continue
                self._held[work.message_id] = result
                if self._link is not None:
                    self._link.send(result.events())

    def _run(self, work: grid_pb2.Work, slot: Slot, wait_s: float) -> _Result:
        """Run a fit; whatever goes wrong is a result too, and never the end of the slot."""
        for tries_left in reversed(range(_TRIES)):
            try:
                return self._try(work, slot, wait_s)
            except FitFailed as error:
                return _failure(work, slot, error.message, error.traceback, raised=True)
            except ForkServerDied as error:
                if not tries_left:
                    return _failure(work, slot, str(error))
                logger.warning("%s: %s; it runs again", work.message_id, error.message)
            except FedHPCError as error:
                return _failure(work, slot, str(error))
            except Exception as error:
                text = traceback.format_exc()
                return _failure(work, slot, f"{type(error).__name__}: {error}", text)
        raise AssertionError("unreachable")

    def _try(self, work: grid_pb2.Work, slot: Slot, wait_s: float) -> _Result:
        fds = self._open_inputs(work)
        try:
            reply = self._pool.run(
                f"{FIT}:run", fds, slot=slot, timeout_s=self._fit_timeout_s, tag=work.message_id
            )
        finally:
            channel.close_all(fds)
        message = grid_pb2.Result.FromString(bytes(channel.map_file(reply.buffers[0])))
        channel.close_all(reply.buffers[:1])
        message.fit.CopyFrom(
            grid_pb2.Fit(
                slot=slot.index,
                wait_s=wait_s,
                start_s=reply.start_s,
                run_s=reply.run_s,
                return_s=reply.return_s,
                peak_rss_mb=reply.peak_rss_mb,
                late_imports=reply.late_imports,
            )
        )
        return _Result(message, reply.buffers[1:])

    def _open_inputs(self, work: grid_pb2.Work) -> list[int]:
        """Return descriptors of the request and its blobs, this fit's own to close."""
        fds = [channel.write_memory([work.SerializeToString()])]
        try:
            for blob in work.blobs:
                if blob.in_file:
                    fds.append(self._open_file(blob))
                else:
                    with self._lock:
                        fds.append(os.dup(self._blobs[blob.digest]))
        except (KeyError, PlatformError, OSError) as error:
            channel.close_all(fds)
            raise PlatformError(f"the arrays of {work.message_id} are gone: {error}") from error
        return fds

    def _open_file(self, blob: grid_pb2.Blob) -> int:
        path = self._paths.blob(blob.digest)

        def whole() -> bool:
            files.refresh_directory(path.parent)
            return path.exists() and path.stat().st_size == blob.size

        if not files.wait_until(whole, 30):
            raise PlatformError(
                f"wanted {path} with {blob.size} bytes, did not see it within 30 s",
                "is the run folder on a disk that this node sees?",
            )
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _failure(
    work: grid_pb2.Work, slot: Slot, reason: str, text: str = "", *, raised: bool = False
) -> _Result:
    return _Result(
        grid_pb2.Result(
            message_id=work.message_id,
            failure=grid_pb2.Failure(reason=reason, traceback=text, raised=raised),
            fit=grid_pb2.Fit(slot=slot.index),
        )
    )
