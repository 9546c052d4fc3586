"""The fits of an array task: run in slots, their results held until the server has them."""

import contextlib
import logging
import threading
import traceback
from collections import Counter
from collections.abc import Callable

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
from fedhpc.federation.link import LinkClient
from fedhpc.held import Held, InputsGone, LinkBlobs, Result, failure, fit_of, mb
from fedhpc.isolation import Ahead, ChildPool, Need, Slot, channel
from fedhpc.isolation.peaks import Peaks
from fedhpc.isolation.telemetry import Sampler, Usage
from fedhpc.paths import RunPaths
from fedhpc.turns import Turns

logger = logging.getLogger(__name__)

FIT = "fedhpc.federation.fit"
_TRIES = 3  # of a fit whose child or fork server was killed
_TRIES_WITHOUT_MEMORY = 2  # of one that the kernel killed for want of memory


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
        self._turns = Turns(
            slots,
            binds_ahead=settings.isolation.fits_per_process != 1,
            alone=settings.cluster.array_tasks == 1,
            closes_early=settings.federation.over_select > 1,
        )
        self._held: dict[str, Held] = {}
        self._fits = 0
        self._returns: dict[str, str] = {}  # fits to hand back, and why, where no link was there
        self._blobs = LinkBlobs()
        self._link: LinkClient | None = None
        self._slots = list(slots)
        given = settings.isolation.gpu_memory_gb
        self._given = None if given is None else Need(int(1e9 * given))
        self._need = self._given  # the highest known of any kind of fit
        for slot in slots:
            threading.Thread(
                target=self._work_in, args=(slot,), name=f"slot-{slot.index}", daemon=True
            ).start()

    def held(self) -> list[grid_pb2.Held]:
        """Return the fits that run here, or whose results the server has not accepted.

        Failures are forgotten. The server may have had one and be waiting for the next try, which
        has the same id; if not, the fit runs again.
        """
        with self._lock:
            for message_id, held in list(self._held.items()):
                if held.result is not None and held.result.message.HasField("failure"):
                    del self._held[message_id]
            return [
                grid_pb2.Held(message_id=message_id, fingerprint=held.work.fingerprint)
                for message_id, held in sorted(self._held.items())
            ]

    def capacity(self) -> int:
        """Return how many fits can run here at a time, as far as is known yet."""
        with self._lock:
            return self._capacity()

    def use(self, link: LinkClient | None) -> None:
        """Send results over this link from now on; of fits from before, when they are wanted."""
        with self._lock:
            self._link = link
            self._blobs.clear()  # a new link sends its blobs anew
            for held in self._held.values():
                held.wanted = False
            if link is not None:
                self._send_capacity()  # it may have changed since the greeting
                returns, self._returns = self._returns, {}
                for message_id, reason in returns.items():
                    self._hand_back(message_id, reason)

    def handle(self, event: grid_pb2.ToArrayTask) -> None:
        """Do what the server says."""
        if event.HasField("chunk"):
            with self._lock:
                self._blobs.take(event.chunk)
        elif event.HasField("work"):
            self._take(event.work)
        elif event.HasField("keep"):
            self._keep(event.keep.message_id)
        elif event.HasField("accepted"):
            self._forget(event.accepted.message_id)
        elif event.HasField("cancel"):
            self._forget(event.cancel.message_id)
        elif event.HasField("release"):
            with self._lock:
                self._blobs.release(list(event.release.digests))

    def _take(self, work: grid_pb2.Work) -> None:
        """Take a fit; its arrays are its own, as a new link takes those of the old one away."""
        with self._lock:
            self._fits += 1
            tag = f"{work.message_id} #{self._fits}"
            held = self._held[work.message_id] = Held(
                work, tag, self._blobs.open(work), message_ids.read(work.message_id).verb
            )
            self._turns.give(held)

    def _keep(self, message_id: str) -> None:
        """Let the server have the result of a fit from before, as soon as it is there."""
        with self._lock:
            held = self._held.get(message_id)
            if held is None:
                return  # handed back meanwhile
            held.wanted = True
            if held.result is None:
                return
            if missing := held.result.missing_files(self._paths):
                self._give_up(held, f"of its result {', '.join(missing)} is gone")
            else:
                self._send(held, held.result)

    def _forget(self, message_id: str) -> None:
        with self._lock:
            held = self._held.pop(message_id, None)
        if held is not None and held.result is not None:
            held.result.close()
        elif held is not None:
            self._pool.cancel(held.tag)
            self._hurry()

    def _hurry(self) -> None:
        """Let the server know of all results: fewer fits are here than were when they ended."""
        with self._lock:
            if self._link is not None:
                self._link.hurry()

    # --- slots ---

    def _work_in(self, slot: Slot) -> None:
        has_worked = False

        def idle() -> None:
            # What its child has ahead was cancelled, or is another slot's by now.
            self._pool.pass_over(slot)
            self._hurry()
            if has_worked and self._config.isolation.standby:
                self._pool.stand_by(slot)  # while the server makes the next round

        while (held := self._turns.next(slot, idle)) is not None:
            took_s: float | None = None
            has_worked = True
            try:
                if not self._is_held(held):
                    continue
                result = self._run(held, slot)
                if not result.message.HasField("failure"):
                    fit = result.message.fit
                    took_s = fit.start_s + fit.run_s + fit.return_s
            except GpuLost as error:
                self._lose(slot, held, error)
                continue
            except InputsGone as error:
                logger.warning("%s", error)
                with self._lock:
                    self._give_up(held, error.message)
                continue
            except FitCancelled:
                continue
            finally:
                self._turns.ended(slot, held, took_s)
                held.close_inputs()
            with self._lock:
                if self._held.get(held.work.message_id) is not held:
                    result.close()
                    continue
                held.result = result
                if held.wanted:
                    self._send(held, result, within_s=self._turns.time_to_tell_s(slot))

    def _capacity(self) -> int:
        """See `capacity`; the lock is held."""
        if self._config.isolation.slots_per_gpu != "auto":
            return len(self._slots)
        gpus = Counter(gpu for slot in self._slots for gpu in slot.gpus)
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

    def _send(self, held: Held, result: Result, *, within_s: float = 0.0) -> None:
        """Send a result; the lock is held."""
        if self._link is not None:
            try:
                events = result.events()
            except OSError as error:
                self._give_up(held, f"its result could not be read: {error}")
            else:
                self._link.send(events, within_s=within_s)

    def _give_up(self, held: Held, reason: str) -> None:
        """Let another array task have a fit, unless it was cancelled; the lock is held."""
        message_id = held.work.message_id
        if self._held.get(message_id) is held:
            del self._held[message_id]
            if held.result is not None:
                held.result.close()
            self._hand_back(message_id, reason)

    def _hand_back(self, message_id: str, reason: str) -> None:
        if self._link is None:  # the server may be told just now that it is held here
            self._returns[message_id] = reason
        else:
            back = grid_pb2.HandBack(message_id=message_id, reason=reason)
            self._link.send([grid_pb2.FromArrayTask(hand_back=back)])

    def _lose(self, slot: Slot, held: Held, error: GpuLost) -> None:
        """Give up the slots of a GPU, and hand the fit back that was to run there."""
        logger.error("%s", error)
        with self._lock:
            lost = [other for other in self._slots if set(other.gpus) & set(slot.gpus)]
            self._slots = self._turns.lose(lost)
            self._send_capacity()
            self._give_up(held, error.message)
            useless = not self._slots
        if useless:
            self._on_useless(error)

    # --- one fit ---

    def _run(self, held: Held, slot: Slot) -> Result:
        """Run a fit; what goes wrong is a result too, unless the fit can run again or elsewhere."""
        work = held.work
        try:
            return self._run_again(held, held.open_inputs(self._paths), slot)
        except (GpuLost, FitCancelled, InputsGone):
            raise
        except FitFailed as error:
            final = isinstance(error, FitOutOfMemory)  # it had a GPU for itself
            return failure(work, slot, str(error), error.traceback, raised=True, final=final)
        except FedHPCError as error:
            final = isinstance(error, FitKilled | ForkServerDied)  # it ran several times
            return failure(work, slot, str(error), final=final)
        except Exception as error:
            text = traceback.format_exc()
            return failure(work, slot, f"{type(error).__name__}: {error}", text)

    def _run_again(self, held: Held, buffers: list[channel.Buffer], slot: Slot) -> Result:
        """Run a fit, and again if somebody else killed it."""
        tries_left = _TRIES
        while True:
            tries_left -= 1
            try:
                return self._try(held, buffers, slot)
            except (ForkServerDied, FitKilled) as error:
                if isinstance(error, FitKilled) and error.for_memory:
                    tries_left = min(tries_left, _TRIES_WITHOUT_MEMORY - 1)
                if not (tries_left and self._is_held(held)):
                    raise
                logger.warning("%s: %s; it runs again", held.work.message_id, error.message)

    def _is_held(self, held: Held) -> bool:
        """Return whether a fit was not cancelled meanwhile."""
        with self._lock:
            return self._held.get(held.work.message_id) is held

    def _try(self, held: Held, buffers: list[channel.Buffer], slot: Slot) -> Result:
        parts = message_ids.read(held.work.message_id)
        kind = self._kind_of(parts.verb)
        usages: list[Usage] = []
        gpu = slot.gpus[0] if slot.gpus else None

        def begin(before_bytes: int | None) -> None:
            about = {
                "message_id": held.work.message_id,
                "client": parts.client_id,
                "round": parts.server_round,
                "verb": parts.verb,
                "slot": slot.index,
                "gpu": gpu and gpu.id,
            }
            usages.append(self._sampler.began(about, gpu, before_bytes))
            if not self._is_held(held):  # cancelled while there was no child of its
                self._pool.cancel(held.tag)

        gone: threading.Event | None = None
        more: dict[str, object] = {"ok": False}
        try:
            reply = self._pool.run(
                f"{FIT}:run",
                buffers,
                slot=slot,
                timeout_s=self._config.isolation.fit_timeout_s,
                slot_timeout_s=self._config.isolation.slot_timeout_s,
                tag=held.tag,
                label=f"{self._paths.run_id}, {parts.verb} of client {parts.client_id}",
                need=self._given or self._need_of(kind),
                # A fit without neighbours may use more than those before it did.
                capped=self._given is not None or slot.limit > 1,
                on_admitted=begin,
                following=self._bind_ahead(slot),
            )
            gone = reply.gone
            peak_mb = mb(reply.gpu_peak_bytes) if gpu else reply.peak_rss_mb
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
        message = grid_pb2.Result.FromString(bytes(channel.view(reply.buffers[0])))
        channel.close_all(reply.buffers[:1])
        message.fit.CopyFrom(fit_of(reply, slot))
        return Result(message, reply.buffers[1:])

    def _bind_ahead(self, slot: Slot) -> list[Ahead]:
        """Return the calls that will follow in a slot, as far as they are known."""
        calls = []
        for held in self._turns.bind_ahead(slot):
            if any(blob.in_file for blob in held.work.blobs):
                break  # the file of one fit is not waited for while another one could run
            try:
                buffers = held.open_inputs(self._paths)
            except InputsGone:
                break  # it is told when its turn comes
            calls.append(Ahead(held.tag, tuple(buffers), self._need_of(self._kind_of(held.verb))))
        return calls

    def _need_of(self, kind: str) -> Callable[[], Need | None]:
        """Return what tells the GPU memory that fits of a kind need, as far as it is known."""
        return lambda: self._given or self._peaks.need(kind)

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
