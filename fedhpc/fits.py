"""The fits of an array task: run in slots, their results held until the server has them."""

import contextlib
import logging
import os
import queue
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fedhpc import files
from fedhpc.config import Config
from fedhpc.errors import (
    FedHPCError,
    FitCancelled,
    FitFailed,
    FitKilled,
    FitOutOfMemory,
    ForkServerDied,
    GpuLost,
    PlatformError,
)
from fedhpc.federation import grid_pb2, message_ids
from fedhpc.federation.link import LinkClient, chunks
from fedhpc.isolation import ChildPool, Need, Reply, Slot, channel
from fedhpc.isolation.peaks import Peaks
from fedhpc.isolation.telemetry import Sampler, Usage
from fedhpc.paths import RunPaths

logger = logging.getLogger(__name__)

FIT = "fedhpc.federation.fit"
_TRIES = 3  # of a fit whose child or fork server was killed
_TRIES_WITHOUT_MEMORY = 2  # of one that the kernel killed for want of memory
_MB = 1e6


_Queued = tuple[float, grid_pb2.Work]  # when it came, and what


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
    settings : Config
        Of the run.
    sampler : Sampler
        Told of every fit.
    on_useless : callable
        Called with the reason when no slot is left: every GPU is lost.
    """

    def __init__(
        self,
        pool: ChildPool,
        slots: list[Slot],
        paths: RunPaths,
        settings: Config,
        sampler: Sampler,
        on_useless: Callable[[PlatformError], None],
    ) -> None:
        self._pool = pool
        self._paths = paths
        self._config = settings
        self._sampler = sampler
        self._on_useless = on_useless
        self._peaks = Peaks(paths.peaks)
        self._lock = threading.Lock()
        self._waiting: deque[_Queued] = deque()  # where every slot is busy
        self._idle: dict[int, Slot] = {}
        self._given_to: dict[int, queue.SimpleQueue[_Queued]] = {
            slot.index: queue.SimpleQueue() for slot in slots
        }
        self._held: dict[str, _Result | None] = {}  # None while it waits or runs
        self._returns: dict[str, str] = {}  # fits to hand back, and why, where no link was there
        self._blobs: dict[str, int] = {}
        self._incoming: dict[str, int] = {}
        self._link: LinkClient | None = None
        self._slots = list(slots)
        given = settings.isolation.gpu_memory_gb
        self._given = None if given is None else Need(int(1e9 * given))
        self._need = self._given  # the highest known of any kind of fit
        for slot in slots:
            threading.Thread(
                target=self._work_in, args=(slot,), name=f"slot-{slot.index}", daemon=True
            ).start()

    def held(self) -> list[str]:
        """Return the messages that run here, or whose results the server has not accepted."""
        with self._lock:
            return sorted(self._held)

    def capacity(self) -> int:
        """Return how many fits can run here at a time, as far as is known yet."""
        with self._lock:
            return self._capacity()

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
                self._send_capacity()  # it may have changed since the greeting
                for message_id, reason in self._returns.items():
                    self._hand_back(message_id, reason)
                self._returns.clear()
                for result in results:
                    link.send(result.events())

    def handle(self, event: grid_pb2.ToArrayTask) -> None:
        """Do what the server says."""
        if event.HasField("chunk"):
            self._take_chunk(event.chunk)
        elif event.HasField("work"):
            with self._lock:
                self._held[event.work.message_id] = None
                self._give((time.monotonic(), event.work))
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

    # --- slots ---

    def _give(self, item: _Queued) -> None:
        """Give a fit to the slot that is free for longest, on the GPU that has fewest; locked."""
        busy = Counter(
            gpu for slot in self._slots if slot.index not in self._idle for gpu in slot.gpus
        )
        if free := [slot for slot in self._idle.values() if slot in self._slots]:
            slot = min(free, key=lambda slot: sum(busy[gpu] for gpu in slot.gpus))
            del self._idle[slot.index]
            self._given_to[slot.index].put(item)
        else:
            self._waiting.append(item)

    def _next(self, slot: Slot) -> _Queued | None:
        """Wait for the next fit of a slot; None if its GPU is lost."""
        with self._lock:
            if slot not in self._slots:
                return None
            if self._waiting:
                return self._waiting.popleft()
            self._idle[slot.index] = slot
        return self._given_to[slot.index].get()

    def _work_in(self, slot: Slot) -> None:
        while (item := self._next(slot)) is not None:
            queued_s, work = item
            if not self._is_wanted(work):
                continue  # cancelled while it waited
            try:
                result = self._run(work, slot, time.monotonic() - queued_s)
            except GpuLost as error:
                self._lose(slot, work.message_id, error)
                continue
            except FitCancelled:
                continue  # if it is held, it has come again, and waits
            with self._lock:
                if work.message_id not in self._held:
                    channel.close_all(result.blobs)
                    continue
                self._held[work.message_id] = result
                if self._link is not None:
                    self._link.send(result.events())

    def _capacity(self) -> int:
        """See `capacity`; the lock is held."""
        if self._config.isolation.slots_per_gpu != "auto":
            return len(self._slots)
        gpus = {gpu: 0 for slot in self._slots for gpu in slot.gpus}
        for slot in self._slots:
            for gpu in slot.gpus:
                gpus[gpu] += 1
        if not gpus:
            return len(self._slots)
        if self._need is None:  # the first fits have a GPU each, to learn what they need
            return len(gpus)
        need = self._need.total_bytes
        return sum(min(slots, max(1, gpu.total_bytes // need)) for gpu, slots in gpus.items())

    def _send_capacity(self) -> None:
        """Tell the server how many fits can run here; the lock is held."""
        if self._link is not None:
            slots = grid_pb2.Slots(slots=self._capacity())
            self._link.send([grid_pb2.FromArrayTask(slots=slots)])

    def _hand_back(self, message_id: str, reason: str) -> None:
        """Let another array task have a fit; the lock is held."""
        if self._link is not None:
            back = grid_pb2.HandBack(message_id=message_id, reason=reason)
            self._link.send([grid_pb2.FromArrayTask(hand_back=back)])

    def _lose(self, slot: Slot, message_id: str, error: GpuLost) -> None:
        """Give up the slots of a GPU, and hand the fit back that was to run there."""
        logger.error("%s", error)
        with self._lock:
            self._slots = [other for other in self._slots if not set(other.gpus) & set(slot.gpus)]
            self._held.pop(message_id, None)
            self._send_capacity()
            if self._link is not None:
                self._hand_back(message_id, error.message)
            else:  # the server may be told just now that it is held here
                self._returns[message_id] = error.message
            useless = not self._slots
        if useless:
            self._on_useless(error)

    # --- one fit ---

    def _run(self, work: grid_pb2.Work, slot: Slot, wait_s: float) -> _Result:
        """Run a fit; what goes wrong is a result too, unless the fit can run again or elsewhere."""
        fds: list[int] = []
        try:
            fds = self._open_inputs(work)  # once: a new link takes the blobs of the old one away
            return self._run_again(work, fds, slot, wait_s)
        except (GpuLost, FitCancelled):
            raise
        except FitFailed as error:
            final = isinstance(error, FitOutOfMemory)  # it had a GPU for itself
            return _failure(work, slot, str(error), error.traceback, raised=True, final=final)
        except FedHPCError as error:
            final = isinstance(error, FitKilled | ForkServerDied)  # it ran several times
            return _failure(work, slot, str(error), final=final)
        except Exception as error:
            text = traceback.format_exc()
            return _failure(work, slot, f"{type(error).__name__}: {error}", text)
        finally:
            channel.close_all(fds)

    def _run_again(self, work: grid_pb2.Work, fds: list[int], slot: Slot, wait_s: float) -> _Result:
        """Run a fit, and again if somebody else killed it."""
        tries_left = _TRIES
        while True:
            tries_left -= 1
            try:
                return self._try(work, fds, slot, wait_s)
            except (ForkServerDied, FitKilled) as error:
                if isinstance(error, FitKilled) and error.for_memory:
                    tries_left = min(tries_left, _TRIES_WITHOUT_MEMORY - 1)
                if not (tries_left and self._is_wanted(work)):
                    raise
                logger.warning("%s: %s; it runs again", work.message_id, error.message)

    def _is_wanted(self, work: grid_pb2.Work) -> bool:
        with self._lock:
            return work.message_id in self._held

    def _try(self, work: grid_pb2.Work, fds: list[int], slot: Slot, wait_s: float) -> _Result:
        parts = message_ids.read(work.message_id)
        kind = self._kind_of(parts.verb)
        usages: list[Usage] = []
        gpu = slot.gpus[0] if slot.gpus else None

        def begin(before_bytes: int | None) -> None:
            about = {
                "message_id": work.message_id,
                "client": parts.client_id,
                "round": parts.server_round,
                "verb": parts.verb,
                "slot": slot.index,
                "gpu": gpu and gpu.id,
            }
            usages.append(self._sampler.began(about, gpu, before_bytes))
            if not self._is_wanted(work):  # cancelled while there was no child of its
                self._pool.cancel(work.message_id)

        gone: threading.Event | None = None
        more: dict[str, object] = {"ok": False}
        try:
            reply = self._pool.run(
                f"{FIT}:run",
                fds,
                slot=slot,
                timeout_s=self._config.isolation.fit_timeout_s,
                slot_timeout_s=self._config.isolation.slot_timeout_s,
                tag=work.message_id,
                label=f"{self._paths.run_id}, {parts.verb} of client {parts.client_id}",
                need=self._given or (lambda: self._peaks.need(kind)),
                # A fit without neighbours may use more than those before it did.
                capped=self._given is not None or slot.limit > 1,
                on_admitted=begin,
            )
            gone = reply.gone
            peak_mb = _mb(reply.gpu_peak_bytes) if gpu else reply.peak_rss_mb
            more = {"ok": True, "peak_mb": peak_mb}
        except FitOutOfMemory as error:
            if error.need_bytes:
                self._learn(kind, error.need_bytes, None)
            raise
        finally:
            if usages:
                self._sampler.ended(usages[-1], gone, **more)
        if reply.gpu_peak_bytes:
            self._learn(kind, reply.gpu_peak_bytes, reply.gpu_context_bytes)
        message = grid_pb2.Result.FromString(bytes(channel.map_file(reply.buffers[0])))
        channel.close_all(reply.buffers[:1])
        message.fit.CopyFrom(_as_message(reply, slot, wait_s))
        return _Result(message, reply.buffers[1:])

    def _kind_of(self, verb: str) -> str:
        """Return the kind of a fit: those alike need about the same GPU memory."""
        app = self._config.app
        if app.is_builtin:
            batch: object = self._config.training.batch_size
        else:
            batch = app.run_config.get("batch-size", "of the app")
        return f"{app.client or app.dir or 'built-in'}: {verb}, batch size {batch}"

    def _learn(self, kind: str, peak_bytes: int, context_bytes: int | None) -> None:
        if self._given is not None:
            return
        with contextlib.suppress(PlatformError):  # the next fit learns it
            self._peaks.note(kind, peak_bytes, context_bytes)
        need = self._peaks.need(kind)
        with self._lock:
            before = self._capacity()
            if need and (self._need is None or need.total_bytes > self._need.total_bytes):
                self._need = need
            if self._capacity() != before:
                self._send_capacity()

    def _open_inputs(self, work: grid_pb2.Work) -> list[int]:
        """Return descriptors of the request and its blobs, this fit's own to close."""
        fds = [channel.write_memory([work.SerializeToString()])]
        try:
            for blob in work.blobs:
                if blob.in_file:
                    fds.append(files.open_whole(self._paths.blob(blob.digest), blob.size))
                else:
                    with self._lock:
                        fds.append(os.dup(self._blobs[blob.digest]))
        except (KeyError, PlatformError, OSError) as error:
            channel.close_all(fds)
            raise PlatformError(f"the arrays of {work.message_id} are gone: {error}") from error
        return fds


def _mb(bytes_: int | None) -> float | None:
    return None if bytes_ is None else round(bytes_ / _MB, 1)


def _as_message(reply: Reply, slot: Slot, queued_s: float) -> grid_pb2.Fit:
    return grid_pb2.Fit(
        slot=slot.index,
        wait_s=queued_s + reply.wait_s,
        start_s=reply.start_s,
        run_s=reply.run_s,
        return_s=reply.return_s,
        peak_rss_mb=reply.peak_rss_mb,
        late_imports=reply.late_imports,
        gpu=slot.gpus[0].id if slot.gpus else "",
        gpu_before_mb=_mb(reply.gpu_before_bytes),
        gpu_peak_mb=_mb(reply.gpu_peak_bytes),
        out_of_memory=reply.out_of_memory,
    )


def _failure(
    work: grid_pb2.Work,
    slot: Slot,
    reason: str,
    text: str = "",
    *,
    raised: bool = False,
    final: bool = False,
) -> _Result:
    failure = grid_pb2.Failure(reason=reason, traceback=text, raised=raised, final=final)
    fit = grid_pb2.Fit(slot=slot.index)
    return _Result(grid_pb2.Result(message_id=work.message_id, failure=failure, fit=fit))
