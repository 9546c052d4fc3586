"""An array task of the client array: ``python -m fedhpc.client RUN_DIR``.

It holds a fork server and one stream to the server, and runs the fits that it is sent. It loads
neither torch nor flwr itself: what it costs does not grow with the clients or the model.
"""

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from fedhpc import (
    __version__,
    allotment,
    config,
    environment,
    inspection,
    logging_setup,
    rendezvous,
    requeue,
    run_state,
)
from fedhpc.cluster import entries, slurm
from fedhpc.errors import FedHPCError, LinkRefused, PlatformError
from fedhpc.federation import certificates, grid_pb2
from fedhpc.federation.link import LinkClient
from fedhpc.fits import FIT, Fits
from fedhpc.isolation import ChildPool, PoolOptions, Slot, locks
from fedhpc.isolation.calls import DEFAULT_PRELOAD
from fedhpc.isolation.image import keep_what_is_freed
from fedhpc.isolation.nvml import open_nvml
from fedhpc.isolation.telemetry import Sampler
from fedhpc.oversight import ServerGone, ServerJob, ServerQueued
from fedhpc.paths import RunPaths, open_run_folder

logger = logging.getLogger(__name__)


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
        self._signum: int | None = None
        self._link: LinkClient | None = None
        self._gpus: list[str] = []
        self._lock_folder = ""
        self._problem: PlatformError | None = None
        self._refused_since_s: float | None = None
        self._server_job = ServerJob(paths, 60 * self._config.cluster.reattach_timeout_min)

    def run(self) -> int:
        """Serve until the run ends; return the exit code.

        Raises
        ------
        PlatformError
            If there is no server, and will be none.
        """
        try:
            code = self._run()
        except ServerGone as error:
            self._leave_without_server(error)
            raise
        except ServerQueued as error:
            logger.warning("%s; this array task queues behind it", error.message)
            requeue.queue_behind(self._environment.job_id, self._server_job.job_id)
            return 0
        if self._signum is not None:
            self._return_later(self._signum)
            return 128 + self._signum
        return code

    def _run(self) -> int:
        run_state.register_process(self._paths, f"client-{self._index}", self._environment.job_id)
        isolation, cluster = self._config.isolation, self._config.cluster
        folder = allotment.prepare_lock_folder(isolation, self._environment)
        self._lock_folder = locks.identity(folder)
        here = 1
        if cluster.executor == "local":  # the array tasks share this machine
            here = min(cluster.array_tasks, cluster.max_parallel or cluster.array_tasks)
        nvml = open_nvml()
        slots = allotment.slots(
            isolation, self._environment, nvml, folder=folder, array_tasks_here=here
        )
        gpus = list(dict.fromkeys(gpu for slot in slots for gpu in slot.gpus))
        self._gpus = [gpu.id for gpu in gpus]
        timeout_s = cluster.rendezvous_timeout_s
        if cluster.executor == "slurm":  # for its job to start, and then for its address
            timeout_s += 60 * cluster.reattach_timeout_min
        seeker = rendezvous.Seeker(self._paths, self._server_job.job_id or "(not known)")
        # On full cores a child that stands by while others work only takes time from these.
        cpus = max(1, self._environment.cpus // here)
        spare = len(slots) * isolation.threads_per_fit < cpus
        standby = spare if isolation.standby == "auto" else isolation.standby
        options = self._pool_options(standby=standby, rehearse=not gpus)
        with (
            ChildPool(options, nvml) as pool,
            Sampler(
                self._paths.memory_of(self._index),
                pool,
                self._header(slots),
                gpus=gpus,
                nvml=nvml,
                host_limit_bytes=options.host_memory_bytes,
            ) as sampler,
        ):
            fits = Fits(pool, slots, self._paths, self._config, sampler, self._give_up)
            while not self._stopped.is_set():
                found = seeker.wait(timeout_s, self._is_stopped)
                if found is None or found.phase != "serving":
                    break
                try:
                    if self._serve(found, fits, pool):
                        return 0
                except LinkRefused as error:
                    self._leave_if_always_refused(error)
                except PlatformError as error:
                    if not self._stopped.is_set():
                        logger.warning("%s", error)
                seeker.failed(found)
                self._server_job.expect_soon()
        if self._problem is not None:
            raise self._problem
        return 0

    def _leave_if_always_refused(self, error: LinkRefused) -> None:
        """Hold no GPU for ever that it may not use; whom it clashes with may be gone soon."""
        logger.warning("%s", error)
        now_s = time.monotonic()
        if self._refused_since_s is None:
            self._refused_since_s = now_s
        if now_s - self._refused_since_s > 2 * self._config.cluster.liveness_timeout_s:
            raise error

    def _header(self, slots: list[Slot]) -> dict[str, object]:
        """Return what the file with samples of memory begins with."""
        return {
            "host": self._environment.host,
            "array_task": self._index,
            "slots": len(slots),
            "device": "cuda" if self._gpus else "cpu",
        }

    def _give_up(self, problem: PlatformError) -> None:
        """Leave with an error, as nothing can run here any more."""
        self._problem = problem
        self.stop()

    def _is_stopped(self) -> bool:
        """Return whether to stop looking for the server, asking Slurm for its job now and then."""
        if not self._stopped.is_set() and self._config.cluster.executor == "slurm":
            self._server_job.check()
        return self._stopped.is_set()

    def _leave_without_server(self, error: ServerGone) -> None:
        """Say how the run ended, as its server cannot; take the rest of the array with us."""
        cancelled = error.job is not None and error.job.state == "CANCELLED"
        try:
            inspection.settle(self._paths, error.message, cancelled=cancelled)
        except PlatformError as problem:  # fedhpc status finds it out too
            logger.warning("%s", problem)
        slurm.cancel([self._environment.job_id.split("_")[0]], pending_only=True)

    def _return_later(self, signum: int) -> None:
        """Put this job into the queue again after a signal, if the run goes on and Slurm does not.

        The server has seen the link end: what ran here runs elsewhere by now.
        """
        job_id, server_job = self._environment.job_id, self._server_job.job_id
        own_job = self._config.cluster.executor == "slurm" and job_id != server_job
        if not own_job or run_state.read(self._paths)["state"] in run_state.ENDED:
            return
        fate = requeue.foresee(signum, self._environment, self._config.cluster.max_requeues)
        logger.warning("array task %d leaves: %s", self._index, fate.reason)
        if not (fate.returns and fate.by_itself):
            return
        if self._server_job.queued:
            requeue.queue_behind(job_id, server_job)
        else:
            requeue.queue_again(job_id)

    def stop(self, signum: int | None = None) -> None:
        """Leave soon; safe to call from a signal handler, with its signal."""
        self._signum = self._signum or signum
        self._stopped.set()
        link = self._link  # one look: the main thread may forget it meanwhile
        if link is not None:
            reason = "it has to leave" if signum is None else signal.Signals(signum).name
            threading.Thread(target=link.leave, args=(reason,), daemon=True).start()

    def _serve(self, found: rendezvous.Rendezvous, fits: Fits, pool: ChildPool) -> bool:
        """Serve one server; return whether the run ended.

        Raises
        ------
        PlatformError
            If the server was lost.
        """
        hello = grid_pb2.Hello(
            run_id=self._paths.run_id,
            array_task=self._index,
            slots=fits.capacity(),
            host=self._environment.host,
            job_id=self._environment.job_id,
            pid=os.getpid(),
            held=fits.held(),
            version=__version__,
            gpus=self._gpus,
            lock_folder=self._lock_folder,
        )
        credentials = certificates.client_credentials(self._paths.secrets)
        timeout_s = self._config.cluster.liveness_timeout_s
        link = self._link = LinkClient(
            found.address, credentials, hello, timeout_s, waiting=pool.waiting
        )
        try:
            if self._stopped.is_set():  # while the link was being made
                return False
            for event in link.events():
                if event.HasField("welcome"):
                    self._refused_since_s = None
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

    def _pool_options(self, *, standby: bool, rehearse: bool) -> PoolOptions:
        isolation = self._config.isolation
        builtin = self._config.app.is_builtin
        preload = [*DEFAULT_PRELOAD, "flwr.clientapp", FIT, *isolation.preload]
        if builtin:
            preload.append("fedhpc.federation.client_app")
        elif self._config.app.dir is not None:
            preload.append("flwr.common.config")  # it reads the folder's pyproject.toml
        return PoolOptions(
            start_method=isolation.start_method,
            fits_per_process=isolation.fits_per_process,
            threads_per_fit=isolation.threads_per_fit,
            standby=standby,
            preload=preload,
            huge_pages=isolation.fits_per_process == 1,  # they pay where there are many forks
            learn_preload=isolation.learn_preload,
            prepare=f"{FIT}:prepare",
            prepare_arg=str(self._paths.root),
            # Another app's import may touch CUDA: then each child does it for itself.
            prepare_early=builtin and not self._config.app.mods,
            rehearse=f"{FIT}:rehearse" if builtin and rehearse else None,
            host_memory_bytes=(
                None if isolation.host_memory_gb is None else int(1e9 * isolation.host_memory_gb)
            ),
        )


def run(run_dir: str, array_task: int | None = None) -> None:
    """Run an array task of a run folder; ends with `SystemExit` unless the run ended well."""
    logging_setup.set_up(
        f"client-{environment.current().array_task if array_task is None else array_task}"
    )
    keep_what_is_freed()  # all models pass through here
    try:
        entries.use_snapshot(run_dir)
        task = ArrayTask(open_run_folder(Path(run_dir)), array_task)

        def stop_on_signal(signum: int, _frame: FrameType | None) -> None:
            task.stop(signum)

        # submitit's handlers ignore SIGTERM; these replace them.
        for signum in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(signum, stop_on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        code = task.run()
    except FedHPCError as error:
        logger.error("%s", error)
        code = error.exit_code
    except OSError:
        logger.exception("the array task ends, as it could not read or write")
        code = PlatformError.exit_code
    if code:
        sys.exit(code)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m fedhpc.client RUN_DIR [ARRAY_TASK]")
    run(sys.argv[1], int(sys.argv[2]) if len(sys.argv) == 3 else None)
