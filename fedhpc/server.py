"""The server job: ``python -m fedhpc.server RUN_DIR``."""

import contextlib
import hashlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from fedhpc import (
    config,
    environment,
    files,
    logging_setup,
    network,
    rendezvous,
    requeue,
    run_state,
)
from fedhpc.cluster import entries, slurm, submission
from fedhpc.errors import FedHPCError, PlatformError, RunError
from fedhpc.federation import apps, certificates, compat, dispatch, fit, plain
from fedhpc.federation.checkpoint import CheckpointStore
from fedhpc.federation.grid import HpcGrid
from fedhpc.federation.inprocess import InProcess
from fedhpc.federation.link_server import LinkOptions, LinkServer
from fedhpc.federation.payload import encode_arrays
from fedhpc.federation.recorder import Recorder
from fedhpc.federation.rounds import Rounds
from fedhpc.federation.states import ClientStates
from fedhpc.federation.transport import Transport
from fedhpc.oversight import ClientArray
from fedhpc.paths import RunPaths, latest_attempt, open_run_folder
from fedhpc.requeue import Fate

logger = logging.getLogger(__name__)

_STATUS_S = 0.5
_LAST_WRITE_S = 4.0
_SIGNAL_S = 0.3
_KILLED_BY_SIGNAL = 128


class _Stop(BaseException):
    """Raised in the main thread by a signal, whatever the app is doing."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        self.fate: Fate | None = None
        super().__init__(signal.Signals(signum).name)


class Server:
    """One attempt at a run.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._config = config.load(paths.config)
        self._environment = environment.current()
        self._recorder = Recorder(paths)
        if (ended := run_state.read(paths))["state"] in run_state.ENDED:
            raise RunError(
                f"the run has ended already: {ended['state']} {ended['reason']}",
                "submit it again; a run folder is used once",
            )
        self._attempt = _claim_attempt(paths)
        settings = self._config.checkpoint
        self._checkpoints = CheckpointStore(paths, settings, self._attempt)
        self._rounds = Rounds(self._checkpoints, self._config)
        self._clients = ClientArray(paths, self._config.cluster)
        self._superseded = threading.Event()
        self._links: LinkServer | None = None

    def _go_on(self) -> None:
        """Go on where the last attempt was: after its newest checkpoint, or at round 1."""
        found = self._checkpoints.load_newest()
        self._paths.model.unlink(missing_ok=True)
        if found is not None:
            self._recorder.go_on_from(plain.decode(found.parts["records"]))
            self._rounds.go_on_from(found)
        else:
            self._paths.metrics.unlink(missing_ok=True)
            self._paths.fits.unlink(missing_ok=True)

    def run(self) -> int:
        """Run the federation to its end; return the exit code."""
        run_state.register_process(self._paths, "server", self._environment.job_id)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
            with self._reporting():
                if self._attempt > 1:
                    self._go_on()
                if self._config.cluster.executor == "debug":
                    self._run_app(InProcess(fit.load(str(self._paths.root))))
                else:
                    with self._links_open() as transport:
                        self._run_app(transport)
        except _Stop as stop:
            fate = self._foresee(stop)
            if fate.returns:
                return self._leave_for_next_attempt(fate)
            if stop.signum == signal.SIGUSR2:
                go_on = f"to go on: fedhpc submit --resume {self._paths.root}"
                reason = f"server job: {fate.reason}; {go_on}"
                return self._end("failed", reason, PlatformError.exit_code)
            code = _KILLED_BY_SIGNAL + stop.signum
            return self._end("cancelled", f"server job: {fate.reason}", code)
        except KeyboardInterrupt:  # the debug executor runs in a terminal
            return self._end("cancelled", "by Ctrl-C", _KILLED_BY_SIGNAL + signal.SIGINT)
        except SystemExit as error:
            return self._end("failed", f"the ServerApp called exit({error.code})")
        except FedHPCError as error:
            return self._end("failed", error.message, error.exit_code)
        except Exception as error:
            logger.error("the ServerApp failed:\n%s", traceback.format_exc())
            files.write_atomic(self._paths.errors / "server.txt", traceback.format_exc())
            return self._end("failed", f"{type(error).__name__}: {error}", RunError.exit_code)
        return self._end("finished", "", 0)

    @contextlib.contextmanager
    def _links_open(self) -> Iterator[Transport]:
        """Listen, publish the address, and tell everybody at the end."""
        paths, cluster = self._paths, self._config.cluster
        if not certificates.exist(paths.secrets):
            certificates.create(paths.secrets)
        machine = dispatch.Dispatch(
            array_tasks=cluster.array_tasks,
            placement=self._config.federation.placement,
            min_array_tasks=cluster.min_array_tasks,
            liveness_timeout_s=cluster.liveness_timeout_s,
        )
        options = LinkOptions(
            run_id=paths.run_id,
            attempt=self._attempt,
            liveness_timeout_s=cluster.liveness_timeout_s,
            inline_bytes=int(cluster.inline_mb * 1e6),
            on_idle=self._clients.check,
        )
        links = LinkServer(machine, options, paths, certificates.server_credentials(paths.secrets))
        host = network.server_address(cluster)
        port = links.start(host)
        publisher = rendezvous.Publisher(
            paths,
            rendezvous.Rendezvous(
                run_id=paths.run_id,
                attempt=self._attempt,
                address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
                host=self._environment.host,
                pid=os.getpid(),
                job_id=self._environment.job_id,
                phase="serving",
                heartbeat=0,
            ),
            self._supersede,
        )
        publisher.start()
        logger.info("attempt %d listens on %s:%d", self._attempt, host, port)
        self._links = links
        phase: rendezvous.Phase = "failed"
        goes_on = False
        try:
            yield links
            phase = "finished"
        except _Stop as stop:
            goes_on = self._foresee(stop).returns
            raise
        finally:
            if not self._superseded.is_set():
                with contextlib.suppress(PlatformError):
                    publisher.end("requeueing" if goes_on else phase)
                if not goes_on:
                    certificates.remove(paths.secrets)
            links.finish(None if goes_on or self._superseded.is_set() else phase)

    def _run_app(self, transport: Transport) -> None:
        """Call the ServerApp and write the model that its strategy ends with."""
        state_bytes = self._config.cluster.state_mb * 1e6
        grid = HpcGrid(
            transport,
            self._recorder,
            self._paths,
            num_clients=self._config.federation.num_clients,
            seed=self._config.seed,
            states=ClientStates(self._paths, state_bytes, self._checkpoints.refers_to),
            retry=self._config.failures.retry,
        )
        compat.set_identity(self._paths.run_id)
        rounds = self._rounds
        compat.replace_strategy_start(
            lambda strategy, *args, **kwargs: rounds.start(strategy, *args, **kwargs)
        )
        spec = apps.locate(self._config, self._paths)
        app = apps.load_server(spec)
        try:
            try:
                app(grid, apps.server_context(spec, self._paths.run_id))
            except Exception:
                # A signal to the whole job may end a child of ours first, and that is no error of
                # the app: then it is here in a moment.
                time.sleep(_SIGNAL_S)
                raise
        except BaseException:
            with contextlib.suppress(PlatformError):  # there is an error already
                self._checkpoints.close(_LAST_WRITE_S)
            raise
        self._checkpoints.close()
        if rounds.final_arrays is not None:
            files.write_atomic(self._paths.model, encode_arrays(rounds.final_arrays).parts)
        else:
            logger.warning("the app did not run a strategy's start(): no model.safetensors")

    # --- what others see ---

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Keep status.json fresh."""
        ended = threading.Event()

        def report() -> None:
            last: object = None
            while not ended.wait(_STATUS_S):
                current = self._status()
                if current != last and not self._superseded.is_set():
                    with contextlib.suppress(PlatformError):
                        run_state.write(self._paths, "running", **current)
                        last = current

        run_state.write(self._paths, "running", **self._status())
        thread = threading.Thread(target=report, name="status", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _status(self) -> dict[str, Any]:
        return {
            "attempt": self._attempt,
            "array_tasks": self._links.array_tasks() if self._links else [],
            "checkpoint": self._checkpoints.last_round,
            "begins_anew": self._rounds.why_not() if self._recorder.has_sent else "",
            **self._recorder.progress(),
        }

    def _end(self, state: run_state.State, reason: str, code: int = 1) -> int:
        """Write the last status and return the exit code."""
        if self._superseded.is_set():
            logger.warning("a server with a higher attempt has come; this one leaves")
            return PlatformError.exit_code
        logger.log(logging.INFO if code == 0 else logging.ERROR, "%s %s", state, reason)
        status = self._status() | {"exit_code": code}
        if self._paths.model.exists():
            with self._paths.model.open("rb") as file:
                status["model_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        run_state.write(self._paths, state, reason, **status)
        self._end_pending_clients()
        return code

    def _foresee(self, stop: _Stop) -> Fate:
        """Return whether the server job starts again after a signal, instead of ending the run."""
        if stop.fate is None:
            stop.fate = self._ask_fate(stop.signum)
        return stop.fate

    def _ask_fate(self, signum: int) -> Fate:
        cluster = self._config.cluster
        if self._superseded.is_set() or cluster.executor != "slurm":
            return requeue.stays_away(signum)
        fate = requeue.foresee(signum, self._environment, cluster.max_requeues)
        if fate.returns and fate.by_itself and (why := self._why_not_again()):
            return Fate(False, False, f"{fate.reason}; {why}")
        return fate

    def _why_not_again(self) -> str:
        """Return why there is no point in another attempt; "" if there is."""
        if self._recorder.has_sent:
            why = self._rounds.why_not()
            return f"it would begin at round 1 again: {why}" if why else ""
        return "" if self._clients.exists() else f"no array task is left{self._clients.said()}"

    def _leave_for_next_attempt(self, fate: Fate) -> int:
        """Say that the server job is in the queue again, and put it there if Slurm has not."""
        status = self._status()
        done = 0 if status["begins_anew"] else status["checkpoint"] or 0
        why = fate.reason
        if not self._recorder.has_sent:
            why += ", and no work has begun" + self._clients.said()
        reason = f"server job: {why}; its next attempt goes on at round {done + 1}"
        logger.warning("%s", reason)
        run_state.write(self._paths, "pending", reason, phase="requeueing", **status)
        if fate.by_itself:
            try:
                requeue.queue_again(self._environment.job_id)
            except PlatformError as error:
                return self._end("failed", f"{reason}, but: {error.message}", error.exit_code)
        return 0

    def _end_pending_clients(self) -> None:
        """Take array tasks that have not started out of the queue: there is nothing for them."""
        jobs = submission.read(self._paths)
        if jobs is not None and jobs.executor == "slurm" and jobs.clients:
            try:
                slurm.cancel({job_id.split("_")[0] for job_id in jobs.clients}, pending_only=True)
            except PlatformError as error:
                logger.warning("pending array tasks could not be cancelled: %s", error.message)

    def _supersede(self) -> None:
        self._superseded.set()
        os.kill(os.getpid(), signal.SIGTERM)


def _claim_attempt(paths: RunPaths) -> int:
    number = latest_attempt(paths) + 1
    while not files.claim(paths.attempt(number)):
        number += 1
    return number


def _stop_on_signal(signum: int, _frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_IGN)  # once: the way out is not to be interrupted
    raise _Stop(signum)


def run(run_dir: str) -> None:
    """Run the server of a run folder; ends with `SystemExit` unless the run finished."""
    logging_setup.set_up("server")
    # submitit's handlers ignore SIGTERM; these replace them. Python ignores SIGINT already where
    # submit asked for it.
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, _stop_on_signal)
    try:
        entries.use_snapshot(run_dir)
        code = Server(open_run_folder(Path(run_dir))).run()
    except FedHPCError as error:
        logger.error("%s", error)
        code = error.exit_code
    except _Stop as stop:
        code = _KILLED_BY_SIGNAL + stop.signum
    if code:
        sys.exit(code)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fedhpc.server RUN_DIR")
    run(sys.argv[1])
