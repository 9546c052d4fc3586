"""An array task of the client array: ``python -m fedhpc.client RUN_DIR``.

It holds a fork server and one stream to the server, and runs the fits that it is sent. It loads
neither torch nor flwr itself: what it costs does not grow with the clients or the model.
"""

import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fedhpc import (
    __version__,
    config,
    environment,
    files,
    inspection,
    logging_setup,
    rendezvous,
    run_state,
)
from fedhpc.cluster import entries, slurm
from fedhpc.errors import FedHPCError, FitFailed, ForkServerDied, PlatformError
from fedhpc.federation import certificates, grid_pb2
from fedhpc.federation.link import LinkClient, chunks
from fedhpc.isolation import ChildPool, PoolOptions, Slot, channel, find_slots
from fedhpc.isolation.processes import DEFAULT_PRELOAD
from fedhpc.oversight import ServerGone, ServerJob, ServerQueued
from fedhpc.paths import RunPaths, open_run_folder

logger = logging.getLogger(__name__)

_FIT = "fedhpc.federation.fit"
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
                f"{_FIT}:run", fds, slot=slot, timeout_s=self._fit_timeout_s, tag=work.message_id
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


class ArrayTask:
    """One array task, from the rendezvous to the end of the run.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    array_task : int, optional
        Its index, where the environment does not tell it.
    """

    def __init__(self, paths: RunPaths, array_task: int | None = None) -> None:
        self._paths = paths
        self._config = config.load(paths.config)
        self._environment = environment.current()
        self._index = self._environment.array_task if array_task is None else array_task
        self._stopped = threading.Event()
        self._link: LinkClient | None = None
        self._gpus: list[str] = []
        self._server_job = ServerJob(paths, 60 * self._config.cluster.reattach_timeout_min)

    def run(self) -> int:
        """Serve until the run ends; return the exit code.

        Raises
        ------
        PlatformError
            If there is no server, and will be none.
        """
        try:
            return self._run()
        except ServerGone as error:
            self._leave_without_server(error)
            raise
        except ServerQueued as error:
            return self._queue_behind_server(error)

    def _run(self) -> int:
        run_state.register_process(self._paths, f"client-{self._index}", self._environment.job_id)
        isolation, cluster = self._config.isolation, self._config.cluster
        cpus = self._environment.cpus
        if cluster.executor == "local":  # the array tasks share this machine
            parallel = min(cluster.array_tasks, cluster.max_parallel or cluster.array_tasks)
            cpus = max(1, cpus // parallel)
        slots = find_slots(
            isolation.device,
            isolation.slots,
            cpus=cpus,
            threads_per_fit=isolation.threads_per_fit,
        )
        self._gpus = sorted({slot.env["CUDA_VISIBLE_DEVICES"] for slot in slots} - {""})
        seeker = rendezvous.Seeker(self._paths, self._server_job.job_id or "(not known)")
        # On full cores a standby child only takes time from the fits.
        spare = len(slots) * isolation.threads_per_fit < cpus
        standby = spare if isolation.standby == "auto" else isolation.standby
        with ChildPool(self._pool_options(standby=standby)) as pool:
            fits = Fits(pool, slots, self._paths, isolation.fit_timeout_s)
            while not self._stopped.is_set():
                found = seeker.wait(cluster.rendezvous_timeout_s, self._is_stopped)
                if found is None or found.phase != "serving":
                    break
                try:
                    if self._serve(found, fits, len(slots)):
                        return 0
                except PlatformError as error:
                    if not self._stopped.is_set():
                        logger.warning("%s", error)
                seeker.failed(found)
                self._server_job.expect_soon()
        return 128 + signal.SIGTERM if self._stopped.is_set() else 0

    def _is_stopped(self) -> bool:
        """Return whether to stop looking for the server, asking Slurm for its job now and then."""
        if not self._stopped.is_set() and self._config.cluster.executor == "slurm":
            self._server_job.check()
        return self._stopped.is_set()

    def _leave_without_server(self, error: ServerGone) -> None:
        """Say how the run ended, as its server cannot; take the rest of the array with us."""
        cancelled = error.job is not None and error.job.state == "CANCELLED"
        inspection.settle(self._paths, error.message, cancelled=cancelled)
        slurm.cancel([self._environment.job_id.split("_")[0]], pending_only=True)

    def _queue_behind_server(self, error: ServerQueued) -> int:
        """Give the node back and wait in the queue for the server to start again."""
        logger.warning("%s; this array task queues behind it", error.message)
        job_id = self._environment.job_id
        # Slurm ends everything here as soon as the job is requeued; our next commands inherit this.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        slurm.control("requeuehold", job_id)
        dependency = f"Dependency=after:{self._server_job.job_id}"
        slurm.control("update", f"JobId={job_id}", dependency)
        slurm.control("release", job_id)
        return 0

    def stop(self) -> None:
        """Leave soon; safe to call from a signal handler."""
        self._stopped.set()
        if self._link is not None:
            threading.Thread(target=self._link.close, daemon=True).start()

    def _serve(self, found: rendezvous.Rendezvous, fits: Fits, slots: int) -> bool:
        """Serve one server; return whether the run ended.

        Raises
        ------
        PlatformError
            If the server was lost.
        """
        hello = grid_pb2.Hello(
            run_id=self._paths.run_id,
            array_task=self._index,
            slots=slots,
            host=self._environment.host,
            job_id=self._environment.job_id,
            pid=os.getpid(),
            held=fits.held(),
            version=__version__,
            gpus=self._gpus,
        )
        credentials = certificates.client_credentials(self._paths.secrets)
        timeout_s = self._config.cluster.liveness_timeout_s
        link = self._link = LinkClient(found.address, credentials, hello, timeout_s)
        try:
            if self._stopped.is_set():  # while the link was being made
                return False
            for event in link.events():
                if event.HasField("welcome"):
                    logger.info("connected to %s, attempt %d", found.address, found.attempt)
                    fits.use(link)
                elif event.HasField("finish"):
                    logger.info("the run ended: %s", event.finish.reason)
                    return True
                else:
                    fits.handle(event)
            return False
        finally:
            self._link = None
            fits.use(None)
            link.close()

    def _pool_options(self, *, standby: bool) -> PoolOptions:
        isolation = self._config.isolation
        builtin = self._config.app.is_builtin
        preload = [*DEFAULT_PRELOAD, "flwr.clientapp", _FIT, *isolation.preload]
        if builtin:
            preload.append("fedhpc.federation.client_app")
            if self._config.federation.clients_per_evaluation:
                preload.append("sklearn.metrics")
        return PoolOptions(
            start_method=isolation.start_method,
            fits_per_process=isolation.fits_per_process,
            threads_per_fit=isolation.threads_per_fit,
            standby=standby,
            preload=preload,
            prepare=f"{_FIT}:prepare",
            prepare_arg=str(self._paths.root),
            # Another app's import may touch CUDA: then each child does it for itself.
            prepare_early=builtin and not self._config.app.mods,
        )


def run(run_dir: str, array_task: int | None = None) -> None:
    """Run an array task of a run folder; ends with `SystemExit` unless the run ended well."""
    logging_setup.set_up(
        f"client-{environment.current().array_task if array_task is None else array_task}"
    )
    try:
        entries.use_snapshot(run_dir)
        task = ArrayTask(open_run_folder(Path(run_dir)), array_task)

        def stop_on_signal(_signum: int, _frame: FrameType | None) -> None:
            task.stop()

        # submitit's handlers ignore SIGTERM; these replace them.
        for signum in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(signum, stop_on_signal)
        code = task.run()
    except FedHPCError as error:
        logger.error("%s", error)
        code = error.exit_code
    if code:
        sys.exit(code)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m fedhpc.client RUN_DIR [ARRAY_TASK]")
    run(sys.argv[1], int(sys.argv[2]) if len(sys.argv) == 3 else None)
